//! The comparison of wire formats with what is frozen under `schema/`, for every test that freezes some.

use std::fmt::Debug;
use std::path::Path;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// A file of `schema/` under construction: named values of one boundary.
#[derive(Default)]
pub(crate) struct Frozen(Map<String, Value>);

impl Frozen {
    /// Adds a value that is both written and read.
    pub(crate) fn with<T: Serialize + DeserializeOwned + PartialEq + Debug>(
        mut self,
        name: &str,
        value: &T,
    ) -> Self {
        let json = serde_json::to_value(value).unwrap();
        let text = serde_json::to_string(value).unwrap();
        assert_eq!(&serde_json::from_str::<T>(&text).unwrap(), value, "{name} there and back");
        assert!(self.0.insert(name.to_owned(), json).is_none(), "{name} is there twice");
        self
    }

    /// Compares with `schema/<file>.json`.
    pub(crate) fn check(self, file: &str) {
        let mut text = serde_json::to_string_pretty(&Value::Object(self.0)).unwrap();
        text.push('\n');
        check_text(&format!("{file}.json"), &text);
    }
}

/// Compares `text` with `schema/<file>`, or renews that when `ARK_BLESS=1`.
pub(crate) fn check_text(file: &str, text: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema").join(file);
    if std::env::var_os("ARK_BLESS").is_some_and(|v| v == "1") {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
    }
    let frozen = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        frozen == text,
        "{file} is not what is frozen; if the change is meant: ARK_BLESS=1 cargo test -p ark-types\nnow:\n{text}"
    );
}

/// A digest as images have it.
pub(crate) fn digest() -> String {
    format!("sha256:{}", "0123456789abcdef".repeat(4))
}
