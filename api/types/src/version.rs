//! The headers of every reply that say what answers.

/// Header with the version of `arkd`, as `major.minor.patch`.
pub const ARK_VERSION: &str = "ark-version";
/// Header with the version of the API, [`API_VERSION`]. A request may bear it, too: it is refused when that is not served.
pub const ARK_API_VERSION: &str = "ark-api-version";
/// The one version of the API that there is.
pub const API_VERSION: &str = "v1";

/// Whether programs of the versions `a` and `b` are of one release: major and minor are equal.
#[must_use]
pub fn is_same_release(a: &str, b: &str) -> bool {
    let release = |version: &str| version.splitn(3, '.').take(2).map(str::to_owned).collect::<Vec<_>>();
    release(a) == release(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_patch_is_of_the_same_release() {
        assert!(is_same_release("0.1.0", "0.1.7"));
        assert!(!is_same_release("0.1.0", "0.2.0"));
        assert!(!is_same_release("0.1.0", "1.1.0"));
        assert!(!is_same_release("0.1.0", ""));
    }
}
