//! The shelf over directories that look like templates, and what a digest is over.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ark_types::image::ImageManifest;
use ark_types::layout::StateDir;
use ark_types::vmm::SnapshotId;

use super::inputs::digest;
use super::shelf::{Built, Record};
use super::*;
use crate::host::unix_ms;
use crate::images::Images;
use crate::models::ModelFile;
use crate::snapshots::Store;

struct World {
    scratch: tempfile::TempDir,
}

fn request(name: &str) -> CreateTemplate {
    let request = serde_json::json!({ "name": name, "image": "base" });
    serde_json::from_value(request).unwrap()
}

fn inputs(n: u8) -> Inputs {
    let manifest = serde_json::json!({
        "manifest_version": 1, "name": "base", "digest": "sha256:0", "size": 0,
        "description": "d", "built_from": [], "created_unix": 0,
    });
    let manifest: ImageManifest = serde_json::from_value(manifest).unwrap();
    let image = crate::images::Image { manifest, path: PathBuf::from("base.erofs") };
    Inputs { media: image.into(), digest: format!("sha256:{n:064x}") }
}

/// Writes what looks like a snapshot.
fn write(dir: &Path, id: SnapshotId) {
    fs::create_dir_all(dir).unwrap();
    for file in ["state", "sums", "memory"] {
        fs::write(dir.join(file), "").unwrap();
    }
    let manifest = serde_json::json!({
        "version": 1, "id": id, "created_unix_ms": 0, "vcpus": 1, "memory_mib": 64,
        "processor": { "vendor": "v", "family": 1, "model": 1, "stepping": 1, "brand": "b" },
        "disks": [], "labels": {},
        "state_bytes": 1, "state_sha256": "", "sums_bytes": 1, "sums_sha256": "", "written_bytes": 4096,
    });
    let sealed = serde_json::json!({ "seal": "", "manifest": manifest });
    fs::write(dir.join("manifest.json"), sealed.to_string()).unwrap();
}

impl World {
    fn new() -> Self {
        Self { scratch: tempfile::tempdir().unwrap() }
    }

    fn open(&self) -> Templates {
        let state = StateDir(self.scratch.path().join("state"));
        let store = Store::open(&state, PathBuf::from("/nonexistent")).unwrap();
        Templates::open(&state, &store)
    }

    /// As an agent that was warmed up and frozen.
    fn built(templates: &Templates, name: &str, inputs: &Inputs, used_unix_ms: u64) -> Built {
        let dir = templates.dir_for(inputs.digits());
        write(&dir, SnapshotId(rand::random()));
        let hold = templates.store().adopt(&dir, None).unwrap();
        templates.store().dispose(hold.id());
        let (request, digest) = (request(name), inputs.digest.clone());
        let names = vec![request.name.clone()];
        let record =
            Record { request, names, digest, build_ms: 1, created_unix_ms: used_unix_ms, used_unix_ms };
        Built { record, hold }
    }

    async fn obtain(templates: &Templates, name: &str, inputs: &Inputs) -> (Found, Vec<PathBuf>) {
        let building = async { Ok(Self::built(templates, name, inputs, unix_ms())) };
        templates.obtain(&request(name).name, inputs, building).await.unwrap()
    }
}

#[test]
fn each_input_makes_another_digest_and_the_name_does_not() {
    let ask = request("a");
    let first = digest(("k", "i"), "m", None, &ask);
    assert!(first.starts_with("sha256:") && first.len() == 71);
    let with = |change: fn(&mut CreateTemplate)| {
        let mut ask = request("a");
        change(&mut ask);
        digest(("k", "i"), "m", None, &ask)
    };
    let file = |digest: &str, context| ModelFile {
        name: "router".parse().unwrap(),
        path: PathBuf::from("router.gguf"),
        digest: digest.to_owned(),
        context,
    };
    let others = [
        digest(("k", "i"), "m", Some(&file("d", 64)), &ask),
        digest(("k", "i"), "m", Some(&file("d2", 64)), &ask),
        digest(("k", "i"), "m", Some(&file("d", 128)), &ask),
        digest(("k2", "i"), "m", None, &ask),
        digest(("k", "i2"), "m", None, &ask),
        digest(("k", "i"), "m2", None, &ask),
        with(|ask| ask.warm = Some(String::new())),
        with(|ask| ask.warm = Some("import json".into())),
        with(|ask| ask.vcpus = 2),
        with(|ask| ask.memory_mib = 512),
    ];
    let distinct: std::collections::HashSet<&String> = others.iter().chain([&first]).collect();
    assert_eq!(distinct.len(), others.len() + 1);
    assert_eq!(first, digest(("k", "i"), "m", None, &request("b")));
    assert_eq!(first, with(|ask| ask.timeout_ms = 1));
}

#[test]
fn every_image_has_a_name_for_its_own_template() {
    let name = |image: &str| default_name(&image.parse().unwrap()).to_string();
    assert_eq!(name("base"), "default-base");
    let long = [
        format!("{}a", "x".repeat(62)),
        format!("{}b", "x".repeat(62)),
        format!("{}z", "-".repeat(0) + &"y-".repeat(31)),
    ];
    let names: Vec<String> = long.iter().map(|image| name(image)).collect();
    assert!(names.iter().all(|name| name.len() == MAX_NAME));
    assert_ne!(names[0], names[1]);
}

#[tokio::test]
async fn one_builds_and_the_others_wait_for_it() {
    let world = World::new();
    let templates = Arc::new(world.open());
    let builds = Arc::new(AtomicUsize::new(0));
    let asked: Vec<_> = (0..8)
        .map(|_| (Arc::clone(&templates), Arc::clone(&builds)))
        .map(|(templates, builds)| {
            tokio::spawn(async move {
                let building = async {
                    builds.fetch_add(1, Ordering::Relaxed);
                    assert!(matches!(templates.describe("one"), Err(TemplateError::Building(_))));
                    assert!(matches!(templates.take_down("one"), Err(TemplateError::Building(_))));
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Ok(World::built(&templates, "one", &inputs(1), unix_ms()))
                };
                templates.obtain(&request("one").name, &inputs(1), building).await.unwrap().0.hold.id()
            })
        })
        .collect();
    let mut ids = std::collections::HashSet::new();
    for id in asked {
        ids.insert(id.await.unwrap());
    }
    assert_eq!((ids.len(), builds.load(Ordering::Relaxed)), (1, 1));
    assert!(matches!(templates.describe("two"), Err(TemplateError::NotFound(_))));
}

#[tokio::test]
async fn who_waits_for_a_build_that_fails_does_not_try_it_again() {
    let world = World::new();
    let templates = Arc::new(world.open());
    let builds = Arc::new(AtomicUsize::new(0));
    let ask = |templates: Arc<Templates>, builds: Arc<AtomicUsize>| async move {
        let failing = async {
            builds.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
            Err(TemplateError::NoEvaluator("base".parse().unwrap()))
        };
        templates.obtain(&request("one").name, &inputs(1), failing).await.unwrap_err()
    };
    let asked: Vec<_> =
        (0..8).map(|_| tokio::spawn(ask(Arc::clone(&templates), Arc::clone(&builds)))).collect();
    for error in asked {
        assert!(error.await.unwrap().to_string().contains("has no evaluator"));
    }
    assert_eq!(builds.load(Ordering::Relaxed), 1);
    ask(templates, Arc::clone(&builds)).await;
    assert_eq!(builds.load(Ordering::Relaxed), 2, "who asks later has it tried again");
}

#[tokio::test]
async fn when_a_build_fails_or_is_given_up_the_next_one_builds() {
    let world = World::new();
    let templates = world.open();
    let name = request("one").name;
    let inputs = inputs(1);
    let failing = async { Err(TemplateError::Endless { limit_s: 1 }) };
    assert!(matches!(templates.obtain(&name, &inputs, failing).await, Err(TemplateError::Endless { .. })));
    let never = templates.obtain(&name, &inputs, std::future::pending());
    assert!(tokio::time::timeout(Duration::from_millis(10), never).await.is_err());
    assert!(matches!(templates.describe("one"), Err(TemplateError::NotFound(_))));
    World::obtain(&templates, "one", &inputs).await;
    assert_eq!(templates.list().len(), 1);
}

#[tokio::test]
async fn the_same_under_two_names_is_one_until_its_last_name_goes() {
    let world = World::new();
    let templates = world.open();
    let (first, _) = World::obtain(&templates, "one", &inputs(1)).await;
    let (second, _) = World::obtain(&templates, "two", &inputs(1)).await;
    assert_eq!((first.hold.id(), second.template.name.as_ref()), (second.hold.id(), "two"));
    let dir = first.hold.dir().to_owned();
    drop((first, second));
    let templates = world.open();
    assert_eq!(templates.list().iter().map(|t| t.name.to_string()).collect::<Vec<_>>(), ["one", "two"]);
    assert_eq!(templates.take_down("one").unwrap(), None);
    assert_eq!(templates.request(&request("two").name).unwrap(), request("two"));
    assert_eq!(templates.take_down("two").unwrap(), Some(dir.clone()));
    gone(&dir).await;
}

#[tokio::test]
async fn what_changed_takes_the_old_ones_place_and_the_old_one_goes_with_its_last_agent() {
    let world = World::new();
    let templates = world.open();
    let (old, _) = World::obtain(&templates, "one", &inputs(1)).await;
    let dir = old.hold.dir().to_owned();
    let agent = old.hold.tenant();
    drop(old);
    assert_eq!(templates.describe("one").unwrap().agents, 1);
    assert!(matches!(templates.take_down("one"), Err(TemplateError::InUse { agents: 1, .. })));
    let (new, retired) = World::obtain(&templates, "one", &inputs(2)).await;
    assert_eq!(retired, std::slice::from_ref(&dir));
    assert_eq!(templates.list(), [new.template]);
    assert!(dir.join("memory").exists() && !dir.join("record.json").exists());
    // The old state of the files is back: its directory is still somebody's.
    let (again, _) = World::obtain(&templates, "one", &inputs(1)).await;
    assert_ne!(again.hold.dir(), dir);
    drop(agent);
    gone(&dir).await;
    assert!(again.hold.dir().exists());
}

#[tokio::test]
async fn what_nobody_uses_goes() {
    let world = World::new();
    let images = Images::new("/nonexistent".into());
    let templates = world.open();
    let now = unix_ms();
    for n in 0..33u8 {
        let name = format!("t{n}");
        let used = if n == 7 { now - 40 * 24 * 3_600_000 } else { now + u64::from(n) };
        let building = async { Ok(World::built(&templates, &name, &inputs(n), used)) };
        templates.obtain(&request(&name).name, &inputs(n), building).await.unwrap();
    }
    World::obtain(&templates, "default-base", &inputs(100)).await;
    let (in_use, _) = World::obtain(&templates, "t0", &inputs(0)).await;
    let _agent = in_use.hold.tenant();
    let before = templates.list().len();
    let swept = templates.sweep(&images, |_| false);
    let left: Vec<String> = templates.list().iter().map(|t| t.name.to_string()).collect();
    assert_eq!(
        (before, swept.len()),
        (34, 3),
        "the old one, the least used one, and that of an image that is gone"
    );
    assert!(left.contains(&"t0".to_owned()), "an agent lives on it");
    assert!(["t7", "t1", "default-base"].iter().all(|name| !left.contains(&(*name).to_owned())), "{left:?}");
}

#[tokio::test]
async fn what_has_a_pool_stays_though_nobody_uses_it() {
    let world = World::new();
    let (templates, images) = (world.open(), Images::new("/nonexistent".into()));
    let long_ago = unix_ms() - 40 * 24 * 3_600_000;
    for (n, name) in [(1, "one"), (2, "two")] {
        let building = async { Ok(World::built(&templates, name, &inputs(n), long_ago)) };
        templates.obtain(&request(name).name, &inputs(n), building).await.unwrap();
    }
    let pooled = templates.current(&request("one").name).unwrap();
    assert_eq!(templates.sweep(&images, |name| name.as_ref() == "one").len(), 1);
    let left: Vec<String> = templates.list().iter().map(|template| template.name.to_string()).collect();
    assert_eq!(left, ["one"]);
    assert!(templates.current(&request("two").name).is_none() && pooled.dir().exists());
}

#[tokio::test]
async fn the_last_use_is_kept() {
    let world = World::new();
    let templates = world.open();
    let building = async { Ok(World::built(&templates, "one", &inputs(1), 5)) };
    let (found, _) = templates.obtain(&request("one").name, &inputs(1), building).await.unwrap();
    assert_eq!(found.template.used_unix_ms, 5);
    templates.used(&found.hold);
    let used = templates.describe("one").unwrap().used_unix_ms;
    assert!(used > 5);
    assert_eq!(world.open().describe("one").unwrap().used_unix_ms, used);
}

#[tokio::test]
async fn one_without_a_record_goes_at_the_next_start() {
    let world = World::new();
    let templates = world.open();
    let (found, _) = World::obtain(&templates, "one", &inputs(1)).await;
    let dir = found.hold.dir().to_owned();
    drop((found, templates));
    fs::write(dir.join("record.json"), "{").unwrap();
    assert!(world.open().list().is_empty());
    gone(&dir).await;
}

/// Waits until `dir` was removed, beside the runtime.
async fn gone(dir: &Path) {
    for _ in 0..500 {
        if !dir.exists() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("{} is still there", dir.display());
}
