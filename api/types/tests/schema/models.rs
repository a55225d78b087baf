//! Models, as `OpenAI` clients and ours read them, and images.

use ark_types::image::{ImageList, ImageManifest};
use ark_types::model::{Model, ModelList, ModelState};

use crate::frozen::{Frozen, digest};

#[test]
fn models() {
    let router = Model {
        id: "router".parse().unwrap(),
        object: "model".to_owned(),
        created: 1_700_000_000,
        owned_by: "ark".to_owned(),
        bytes: 1_697_888,
        digest: digest(),
        architecture: "llama".to_owned(),
        parameters: 1_630_000,
        context: 512,
        memory_mib: 192,
        bundled: true,
        state: ModelState::Idle,
    };
    let qwen = Model {
        id: "qwen".parse().unwrap(),
        owned_by: "user".to_owned(),
        bytes: 491 << 20,
        architecture: "qwen2".to_owned(),
        parameters: 494_000_000,
        context: 4096,
        memory_mib: 1216,
        bundled: false,
        state: ModelState::Ready,
        ..router.clone()
    };
    let loading = Model { state: ModelState::Loading, ..router.clone() };
    Frozen::default()
        .with("model", &router)
        .with("model that is loading", &loading)
        .with("list", &ModelList::new(vec![qwen, router]))
        .check("models");
    assert!(serde_json::from_str::<ark_types::model::ModelName>("\"Qwen\"").is_err());
}

#[test]
fn images() {
    let manifest = ImageManifest {
        manifest_version: 1,
        name: "python".parse().unwrap(),
        digest: digest(),
        size: 37_000_000,
        description: "CPython 3.11".to_owned(),
        built_from: vec!["python3=3.11.2-1+b1".to_owned()],
        created_unix: 1_700_000_000,
    };
    let list = ImageList { images: vec![manifest.clone()] };
    Frozen::default().with("manifest", &manifest).with("list", &list).check("images");
}
