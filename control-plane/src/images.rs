//! Images on disk: manifests, and proof that an image file is what its manifest says.

use std::collections::HashMap;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use ark_types::image::{ImageManifest, ImageName};
use ark_types::plain::plain;
use sha2::{Digest as _, Sha256};

/// Largest manifest that is read.
const MAX_MANIFEST: u64 = 1 << 20;
/// Bytes hashed at a time.
const HASH_CHUNK: usize = 1 << 20;
/// Version of the manifest format this release reads.
const MANIFEST_VERSION: u32 = 1;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No image of that name.
    #[error("there is no image {name:?}; {}", known(have))]
    NotFound {
        /// What was asked for.
        name: String,
        /// Images that exist.
        have: Vec<ImageName>,
    },
    /// Its manifest or file is not what it should be.
    #[error("the image {name:?} is corrupt: {why}; build it again with `make`")]
    Corrupt {
        /// The image.
        name: String,
        /// What is wrong.
        why: String,
    },
    /// The directory or a file of it cannot be read.
    #[error("{path} cannot be read: {}", plain(source))]
    Unreadable {
        /// What was read.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

fn known(have: &[ImageName]) -> String {
    if have.is_empty() {
        return "no image was built yet: run `make`".to_owned();
    }
    let names: Vec<&str> = have.iter().map(AsRef::as_ref).collect();
    format!("there are: {}", names.join(", "))
}

/// An image that was found to be whole.
#[derive(Clone, Debug)]
pub struct Image {
    /// What it is.
    pub manifest: ImageManifest,
    /// Its file.
    pub path: PathBuf,
}

/// The directory of images.
#[derive(Debug)]
pub struct Images {
    dir: PathBuf,
    /// What was proved, per file. The inner lock makes those who need the same proof wait for one.
    proofs: Mutex<HashMap<PathBuf, Arc<tokio::sync::Mutex<Option<Proof>>>>>,
}

/// A file that had `digest` when it looked like this; while it still does, it is not hashed again.
#[derive(Clone, Debug)]
struct Proof {
    looks: Looks,
    digest: String,
}

/// A file without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Looks {
    inode: u64,
    /// Bytes.
    pub(crate) size: u64,
    /// When it was last written, seconds and nanoseconds.
    pub(crate) mtime: (i64, i64),
}

impl Looks {
    pub(crate) fn of(meta: &std::fs::Metadata) -> Self {
        Self { inode: meta.ino(), size: meta.len(), mtime: (meta.mtime(), meta.mtime_nsec()) }
    }
}

impl Images {
    /// Images in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir, proofs: Mutex::default() }
    }

    /// Every image with a sound manifest, by name.
    ///
    /// # Errors
    /// [`ImageError::Unreadable`] when the directory cannot be read; one that does not exist is empty.
    pub fn list(&self) -> Result<Vec<ImageManifest>, ImageError> {
        let mut manifests = Vec::new();
        for name in self.names()? {
            match self.manifest(name.as_ref()) {
                Ok(manifest) => manifests.push(manifest),
                Err(error) => tracing::warn!(%error, "image left out of the list"),
            }
        }
        Ok(manifests)
    }

    fn names(&self) -> Result<Vec<ImageName>, ImageError> {
        let unreadable = |source| ImageError::Unreadable { path: self.dir.clone(), source };
        let entries = match std::fs::read_dir(&self.dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(unreadable)?,
        };
        let mut names = Vec::new();
        for entry in entries {
            let path = entry.map_err(unreadable)?.path();
            let stem = path.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse().ok());
            if let (Some(name), Some("json")) = (stem, path.extension().and_then(|e| e.to_str())) {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// What the image `name` is, unproved.
    ///
    /// # Errors
    /// [`ImageError`].
    pub fn manifest(&self, name: &str) -> Result<ImageManifest, ImageError> {
        let corrupt = |why| ImageError::Corrupt { name: name.to_owned(), why };
        let Ok(wanted) = name.parse::<ImageName>() else { return Err(self.not_found(name)) };
        let path = self.dir.join(format!("{wanted}.json"));
        let mut text = String::new();
        match std::fs::File::open(&path).map(|file| file.take(MAX_MANIFEST).read_to_string(&mut text)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Err(self.not_found(name)),
            Err(source) => return Err(ImageError::Unreadable { path, source }),
            Ok(Err(e)) => return Err(corrupt(format!("its manifest cannot be read: {}", plain(&e)))),
            Ok(Ok(_)) => {}
        }
        let manifest: ImageManifest = serde_json::from_str(&text)
            .map_err(|e| corrupt(format!("its manifest {} is not valid: {e}", path.display())))?;
        if manifest.manifest_version != MANIFEST_VERSION {
            let version = manifest.manifest_version;
            return Err(corrupt(format!(
                "its manifest has version {version}, this release reads {MANIFEST_VERSION}"
            )));
        }
        if manifest.name != wanted {
            return Err(corrupt(format!("its manifest is that of {:?}", manifest.name.as_ref())));
        }
        Ok(manifest)
    }

    fn not_found(&self, name: &str) -> ImageError {
        ImageError::NotFound { name: name.to_owned(), have: self.names().unwrap_or_default() }
    }

    /// The image `name`, proved to have the size and digest of its manifest. The digest is computed once per state of the
    /// file; who asks meanwhile waits for it.
    ///
    /// # Errors
    /// [`ImageError`].
    pub async fn open(&self, name: &ImageName) -> Result<Image, ImageError> {
        let manifest = self.manifest(name.as_ref())?;
        let path = self.dir.join(format!("{name}.erofs"));
        check_size(&path, &manifest)?;
        let (found, wanted) = (self.digest_of(&path).await?, &manifest.digest);
        if found != *wanted {
            let why = format!("{} has the digest {found}, its manifest says {wanted}", path.display());
            return Err(ImageError::Corrupt { name: manifest.name.into(), why });
        }
        Ok(Image { manifest, path })
    }

    /// `sha256:` and 64 hexadecimal digits over the file at `path`: computed once per state of the file; who asks meanwhile
    /// waits for it.
    ///
    /// # Errors
    /// [`ImageError::Unreadable`].
    pub async fn digest_of(&self, path: &Path) -> Result<String, ImageError> {
        let unreadable = |source| ImageError::Unreadable { path: path.to_owned(), source };
        let slot = Arc::clone(
            self.proofs.lock().unwrap_or_else(PoisonError::into_inner).entry(path.to_owned()).or_default(),
        );
        let mut proof = slot.lock().await;
        let meta = std::fs::metadata(path).map_err(unreadable)?;
        let looks = Looks::of(&meta);
        if let Some(known) = proof.as_ref().filter(|known| known.looks == looks) {
            return Ok(known.digest.clone());
        }
        let file = path.to_owned();
        let found = tokio::task::spawn_blocking(move || digest(&file)).await;
        let digest = found.unwrap_or_else(|e| Err(io::Error::other(e))).map_err(unreadable)?;
        *proof = Some(Proof { looks, digest: digest.clone() });
        Ok(digest)
    }
}

/// Whether the image file is there and has the size that its manifest says.
fn check_size(path: &Path, manifest: &ImageManifest) -> Result<(), ImageError> {
    let corrupt = |why| ImageError::Corrupt { name: manifest.name.to_string(), why };
    let meta = match std::fs::metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(corrupt(format!("its file {} is missing", path.display())));
        }
        other => other.map_err(|source| ImageError::Unreadable { path: path.to_owned(), source })?,
    };
    let (size, wanted) = (meta.len(), manifest.size);
    if size != wanted {
        return Err(corrupt(format!("{} has {size} bytes, its manifest says {wanted}", path.display())));
    }
    Ok(())
}

/// `sha256:` and 64 hexadecimal digits over the file at `path`.
fn digest(path: &Path) -> io::Result<String> {
    let mut file = std::fs::File::open(path)?;
    let mut hasher = Sha256::new();
    let mut chunk = vec![0; HASH_CHUNK];
    loop {
        match file.read(&mut chunk)? {
            0 => break,
            n => hasher.update(chunk.get(..n).unwrap_or_default()),
        }
    }
    let digits: String = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("sha256:{digits}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the image `base`, which holds `content`.
    fn with_base(content: &[u8]) -> (tempfile::TempDir, Images) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("base.erofs");
        std::fs::write(&file, content).unwrap();
        let manifest = serde_json::json!({
            "manifest_version": 1, "name": "base", "digest": digest(&file).unwrap(), "size": content.len(),
            "description": "d", "built_from": [], "created_unix": 0,
        });
        std::fs::write(dir.path().join("base.json"), manifest.to_string()).unwrap();
        let images = Images::new(dir.path().to_owned());
        (dir, images)
    }

    #[tokio::test]
    async fn a_sound_image_opens_and_an_unknown_one_names_those_there_are() {
        let (_dir, images) = with_base(b"image");
        let image = images.open(&"base".parse().unwrap()).await.unwrap();
        assert_eq!(image.manifest.size, 5);
        assert_eq!(images.list().unwrap(), [image.manifest]);
        let unknown = images.open(&"pyton".parse().unwrap()).await.unwrap_err();
        assert_eq!(unknown.to_string(), "there is no image \"pyton\"; there are: base");
        assert!(matches!(images.manifest("../base"), Err(ImageError::NotFound { .. })));
    }

    #[tokio::test]
    async fn a_changed_or_missing_file_is_corrupt_even_after_it_was_proved() {
        let (dir, images) = with_base(b"image");
        let base: ImageName = "base".parse().unwrap();
        images.open(&base).await.unwrap();
        for (content, why) in [(&b"imagf"[..], "digest"), (b"imag", "4 bytes")] {
            std::fs::write(dir.path().join("base.erofs"), content).unwrap();
            let error = images.open(&base).await.unwrap_err();
            assert!(matches!(error, ImageError::Corrupt { .. }));
            assert!(error.to_string().contains(why), "{error}");
        }
        std::fs::remove_file(dir.path().join("base.erofs")).unwrap();
        assert!(images.open(&base).await.unwrap_err().to_string().contains("missing"));
    }

    #[tokio::test]
    async fn a_bad_manifest_is_corrupt_and_left_out_of_the_list() {
        let (dir, images) = with_base(b"image");
        let good = std::fs::read_to_string(dir.path().join("base.json")).unwrap();
        let other_version = good.replace("\"manifest_version\":1", "\"manifest_version\":2");
        let other_name = good.replace("\"base\"", "\"other\"");
        for bad in ["{", &other_version, &other_name] {
            std::fs::write(dir.path().join("base.json"), bad).unwrap();
            assert!(matches!(images.manifest("base"), Err(ImageError::Corrupt { .. })), "{bad}");
            assert!(images.list().unwrap().is_empty());
        }
    }

    #[test]
    fn no_directory_means_no_images() {
        let images = Images::new("/nonexistent".into());
        assert!(images.list().unwrap().is_empty());
        let error = images.manifest("base").unwrap_err().to_string();
        assert!(error.contains("no image was built yet"), "{error}");
    }
}
