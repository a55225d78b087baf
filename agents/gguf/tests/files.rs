//! Files as they come: good, truncated, damaged, hostile.

use std::sync::LazyLock;

use ark_gguf::synthetic::Synthetic;
use ark_gguf::{CacheType, GgufError, Header, Model, Serving, memory};
use proptest::prelude::*;

fn read(bytes: &[u8]) -> Result<Model, GgufError> {
    Model::try_from(&Header::read(bytes, bytes.len() as u64)?)
}

/// What the file becomes with `from`, which it has once, replaced by `to` of the same length.
fn patched(mut bytes: Vec<u8>, from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let at = bytes.windows(from.len()).position(|w| w == from).expect("the file has it");
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

/// The file with the 32-bit number of `key` replaced.
fn with_number(mut bytes: Vec<u8>, key: &str, number: u32) -> Vec<u8> {
    let at =
        bytes.windows(key.len()).position(|w| w == key.as_bytes()).expect("the file has it") + key.len() + 4;
    bytes[at..at + 4].copy_from_slice(&number.to_le_bytes());
    bytes
}

fn refusal(bytes: &[u8]) -> String {
    read(bytes).expect_err("it is refused").to_string()
}

#[test]
fn a_whole_file_is_read_with_its_sizes() {
    let bytes = Synthetic::default().to_bytes();
    let model = read(&bytes).expect("it is whole");
    assert_eq!(model.architecture, "llama");
    assert_eq!((model.layers, model.embedding, model.feed_forward), (2, 64, 128));
    assert_eq!((model.heads, model.kv_heads, model.key, model.value), (4, 2, 16, 16));
    assert_eq!(model.context, 2048);
    assert_eq!(model.file_bytes, bytes.len() as u64);
    assert!(model.chat_template.is_some());
    let header = Header::read(&bytes[..], bytes.len() as u64).expect("it is whole");
    assert_eq!(header.data_offset + model.tensor_bytes, model.file_bytes);
}

#[test]
fn a_file_is_read_from_disk() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, Synthetic::default().to_bytes()).expect("written");
    assert!(Header::open(&path).is_ok());
    assert!(matches!(Header::open(&dir.path().join("none")), Err(GgufError::Io(_))));
}

#[test]
fn what_is_no_gguf_is_named_so() {
    assert!(refusal(b"PK\x03\x04 a zip archive").contains("not a GGUF file"));
    assert!(refusal(b"").contains("truncated"));
    assert!(refusal(b"GG").contains("truncated"));
    assert!(refusal(b"GGUF\x01\0\0\0").contains("version 1 is not supported"));
    assert!(refusal(b"GGUF\0\0\0\x03").contains("big-endian"));
}

#[test]
fn a_file_cut_anywhere_is_truncated() {
    let bytes = Synthetic::default().to_bytes();
    let head = usize::try_from(Header::read(&bytes[..], bytes.len() as u64).expect("whole").data_offset)
        .expect("small");
    for len in (4..head).step_by(97).chain([head, bytes.len() - 1]) {
        assert!(matches!(read(&bytes[..len]), Err(GgufError::Truncated { .. })), "cut at {len}");
    }
}

#[test]
fn a_file_shorter_than_it_was_said_to_be_is_an_error() {
    let bytes = Synthetic::default().to_bytes();
    assert!(Header::read(&bytes[..1000], bytes.len() as u64).is_err());
}

#[test]
fn absurd_numbers_are_refused_before_anything_is_reserved() {
    let mut many = b"GGUF\x03\0\0\0".to_vec();
    many.extend(u64::MAX.to_le_bytes());
    many.extend(0u64.to_le_bytes());
    assert!(refusal(&many).contains("the number of tensors is 18446744073709551615, at most 65536"));
    let mut long = b"GGUF\x03\0\0\0".to_vec();
    long.extend(0u64.to_le_bytes());
    long.extend(1u64.to_le_bytes());
    long.extend((1u64 << 60).to_le_bytes());
    assert!(refusal(&long).contains("at most 256"));
    for (key, number, says) in [
        ("llama.block_count", 1 << 30, "at most 1024"),
        ("llama.block_count", 3, "no tensor of block 2"),
        ("llama.attention.head_count", 0, "no usable metadata"),
        ("llama.attention.head_count_kv", 3, "do not share"),
        ("llama.embedding_length", 65, "wide embeddings"),
        ("llama.context_length", u32::MAX, "at most 16777216"),
        ("tokenizer.ggml.bos_token_id", 100_000, "bos_token_id"),
    ] {
        let text = refusal(&with_number(Synthetic::default().to_bytes(), key, number));
        assert!(text.contains(says), "{key} = {number}: {text}");
    }
}

#[test]
fn tensors_that_lie_are_refused() {
    let bytes = Synthetic::default().to_bytes();
    // token_embd.weight: after its name come the number of dimensions, two sizes, the type, the offset.
    let name = b"token_embd.weight";
    let at = bytes.windows(name.len()).position(|w| w == name).expect("there") + name.len();
    let with = |offset: usize, value: &[u8]| {
        let mut copy = bytes.clone();
        copy[at + offset..at + offset + value.len()].copy_from_slice(value);
        refusal(&copy)
    };
    assert!(with(0, &9u32.to_le_bytes()).contains("the number of dimensions"));
    assert!(with(4, &u64::MAX.to_le_bytes()).contains("number of elements"));
    assert!(with(4, &0u64.to_le_bytes()).contains("no elements"));
    assert!(with(12, &(1u64 << 28).to_le_bytes()).contains("truncated"));
    assert!(with(20, &999u32.to_le_bytes()).contains("unknown type 999"));
    assert!(with(20, &14u32.to_le_bytes()).contains("no multiple of Q6_K's 256"));
    assert!(with(24, &7u64.to_le_bytes()).contains("not aligned"));
    assert!(with(24, &(u64::MAX - 31).to_le_bytes()).contains("truncated"));
    assert!(with(24, &64u64.to_le_bytes()).contains("overlap"));
}

#[test]
fn what_is_not_served_is_named() {
    let bytes = Synthetic::default().to_bytes();
    assert!(
        refusal(&patched(bytes.clone(), b"llama", b"mamba"))
            .contains("\"mamba\" is not supported; supported are llama")
    );
    let twice = patched(bytes, b"blk.0.attn_k.weight", b"blk.0.attn_q.weight");
    assert!(refusal(&twice).contains("is there twice"));
}

#[test]
fn memory_is_the_stated_formula() {
    let model = read(&Synthetic::default().to_bytes()).expect("whole");
    let serving = Serving { context: 1000, sessions: 8, batch: 100, cache: CacheType::F16 };
    let memory = memory(&model, &serving);
    assert_eq!(memory.weights, model.file_bytes);
    assert_eq!(memory.cache, 9 * 1024 * 2 * 2 * (16 + 16) * 2);
    assert_eq!(
        memory.compute,
        4 * (100 + 64) * (model.vocabulary + 8 * 64 + 4 * 128 + 2 * 4 * 1024) + 4 * 8 * model.vocabulary
    );
    assert_eq!(memory.total(), memory.weights + memory.cache + memory.compute + memory.fixed);
}

#[test]
fn memory_of_a_known_model_is_what_is_published() {
    // Qwen2.5-0.5B: 24 layers, 2 heads of keys, 64 wide; 12 KiB a token in half precision.
    let model = Model {
        layers: 24,
        kv_heads: 2,
        key: 64,
        value: 64,
        ..read(&Synthetic::default().to_bytes()).expect("whole")
    };
    let serving = Serving { context: 4096, sessions: 1, batch: 1, cache: CacheType::F16 };
    assert_eq!(memory(&model, &serving).cache, 2 * 4096 * 12 * 1024);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let mut file = b"GGUF\x03\0\0\0".to_vec();
        file.extend(&bytes);
        let _ = read(&bytes);
        let _ = read(&file);
    }

    #[test]
    fn no_damage_to_a_good_file_makes_it_panic(at in 0usize..9000, damage in prop::collection::vec(any::<u8>(), 1..16)) {
        let mut bytes = small();
        let at = at % (bytes.len() - damage.len());
        bytes[at..at + damage.len()].copy_from_slice(&damage);
        if let Ok(model) = read(&bytes) {
            let serving = Serving { context: 4096, sessions: 8, batch: 512, cache: CacheType::F16 };
            prop_assert!(memory(&model, &serving).total() >= model.file_bytes);
        }
    }

    #[test]
    fn memory_grows_with_all_it_depends_on(context in 1u64..1 << 40, sessions in 1u64..1 << 40, batch in 1u64..1 << 40) {
        let model = read(&small()).expect("whole");
        let of = |context, sessions, batch| memory(&model, &Serving { context, sessions, batch, cache: CacheType::F32 }).total();
        let least = of(context, sessions, batch);
        prop_assert!(of(context * 2, sessions, batch) >= least);
        prop_assert!(of(context, sessions + 1, batch) >= least);
        prop_assert!(of(context, sessions, batch + 1) >= least);
    }

    #[test]
    fn every_size_is_read_back(layers in 1u32..4, heads in 1u32..4, width in 1u32..4, seed: u64) {
        let written = Synthetic { layers, heads, kv_heads: 1, embedding: heads * width * 8, seed, ..small_sizes() };
        let model = read(&written.to_bytes()).expect("whole");
        prop_assert_eq!(model.layers, u64::from(layers));
        prop_assert_eq!(model.key, u64::from(width * 8));
    }
}

fn small_sizes() -> Synthetic {
    Synthetic { layers: 1, embedding: 8, feed_forward: 8, heads: 1, kv_heads: 1, ..Synthetic::default() }
}

fn small() -> Vec<u8> {
    static BYTES: LazyLock<Vec<u8>> = LazyLock::new(|| small_sizes().to_bytes());
    BYTES.clone()
}
