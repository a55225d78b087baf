//! Who may speak: on the Unix socket whom the file's mode lets in, on TCP who knows the token.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use ark_types::plain::plain;
use ark_types::problem::ProblemKind;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};

use crate::cleanup::make_private_dir;
use crate::inference::Failure;
use crate::problems::Refusal;

/// Random bytes of a token that is made here.
const TOKEN_BYTES: usize = 32;

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read or made.
    #[error("the token file {path} cannot be read or made: {}", plain(source))]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Others than the owner may read it.
    #[error(
        "the token file {0} is open to others: delete it for a new one, or chmod 600 it if nobody read it"
    )]
    Open(PathBuf),
    /// There is nothing in it.
    #[error("the token file {0} is empty: delete it for a new one")]
    Empty(PathBuf),
}

/// What a client has to know, as a digest: comparing digests takes the same time wherever a guess goes wrong.
#[derive(Clone, Debug)]
pub struct Token([u8; 32]);

impl Token {
    /// Reads the token in `path`, or makes a random one there, mode 0600.
    ///
    /// # Errors
    /// [`TokenError`].
    pub fn load_or_make(path: &Path) -> Result<Self, TokenError> {
        let file = |source| TokenError::File { path: path.to_owned(), source };
        let text = match fs::read_to_string(path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => make(path).map_err(file)?,
            other => other.map_err(file)?,
        };
        if fs::metadata(path).map_err(file)?.mode() & 0o077 != 0 {
            return Err(TokenError::Open(path.to_owned()));
        }
        match text.trim() {
            "" => Err(TokenError::Empty(path.to_owned())),
            token => Ok(Self::of(token)),
        }
    }

    fn of(token: &str) -> Self {
        Self(Sha256::digest(token.as_bytes()).into())
    }

    /// Whether `guess` is the token. Takes the same time for every guess of one length.
    #[must_use]
    pub fn is(&self, guess: &str) -> bool {
        let Self(guess) = Self::of(guess);
        let difference = self.0.iter().zip(&guess).fold(0, |all, (a, b)| all | (a ^ b));
        std::hint::black_box(difference) == 0
    }
}

/// Writes a random token to a file beside `path` and renames it, so that it is never there half or readable by others.
fn make(path: &Path) -> io::Result<String> {
    if let Some(parent) = path.parent() {
        make_private_dir(parent)?;
    }
    let token: String =
        rand::random::<[u8; TOKEN_BYTES]>().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let _ = fs::remove_file(&beside);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.write_all(token.as_bytes())?;
    fs::rename(&beside, path)?;
    Ok(token)
}

/// Lets a request through that bears the token.
pub async fn demand_token(State(token): State<Token>, request: Request, next: Next) -> Response {
    let bearer =
        request.headers().get(header::AUTHORIZATION).and_then(|value| value.to_str().ok()).and_then(bearer);
    if bearer.is_some_and(|guess| token.is(guess)) {
        return next.run(request).await;
    }
    let detail = match bearer {
        Some(_) => "the bearer token is wrong: use the one in the token file of the arkd that listens here",
        None => {
            "send `Authorization: Bearer <token>` with the token in the token file of the arkd that listens here"
        }
    };
    // OpenAI's clients read it, too.
    let mut response = Failure::from(Refusal::new(ProblemKind::Unauthorized, detail)).into_response();
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// The token of an `Authorization` header; the scheme's case does not matter (RFC 9110, section 11.1).
fn bearer(value: &str) -> Option<&str> {
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_missing_token_is_made_private_and_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state/token");
        let made = Token::load_or_make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(text.len(), 2 * TOKEN_BYTES);
        assert!(made.is(&text) && Token::load_or_make(&path).unwrap().is(&text));
        assert!(!made.is("") && !made.is(&text[1..]));
    }

    #[test]
    fn a_token_that_others_can_read_or_that_is_empty_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        fs::write(&path, "secret\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Token::load_or_make(&path), Err(TokenError::Open(_))));
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert!(Token::load_or_make(&path).unwrap().is("secret"));
        fs::write(&path, " \n").unwrap();
        assert!(matches!(Token::load_or_make(&path), Err(TokenError::Empty(_))));
    }

    #[test]
    fn the_scheme_is_bearer_in_any_case() {
        assert_eq!(bearer("bEARER  x"), Some("x"));
        assert_eq!(bearer("Basic x"), None);
        assert_eq!(bearer("x"), None);
    }
}
