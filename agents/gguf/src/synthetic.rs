//! A small model with random weights and a tokenizer for any text: a real file for the real loading path, which says nothing sensible.

use std::io::{self, Write};

/// Sizes of the model to write.
#[derive(Clone, Debug)]
pub struct Synthetic {
    /// Transformer blocks.
    pub layers: u32,
    /// Width of the residual stream, a multiple of `heads`.
    pub embedding: u32,
    /// Width of the feed-forward network.
    pub feed_forward: u32,
    /// Attention heads.
    pub heads: u32,
    /// Heads of keys and values.
    pub kv_heads: u32,
    /// Context length it states.
    pub context: u32,
    /// Where its weights' random numbers begin.
    pub seed: u64,
    /// Jinja chat template, if any.
    pub chat_template: Option<String>,
}

impl Default for Synthetic {
    fn default() -> Self {
        Self {
            layers: 2,
            embedding: 64,
            feed_forward: 128,
            heads: 4,
            kv_heads: 2,
            context: 2048,
            seed: 1,
            chat_template: Some(CHAT_TEMPLATE.to_owned()),
        }
    }
}

/// A template in the manner of ChatML, with tools.
pub const CHAT_TEMPLATE: &str = "{%- if tools %}<|tools|>{{ tools | tojson }}\n{% endif -%}\
{%- for message in messages %}<|{{ message.role }}|>{{ message.content }}\n{% endfor -%}\
{%- if add_generation_prompt %}<|assistant|>{% endif -%}";

/// A tensor to be written: its name, its sizes.
type Planned = (String, Vec<u64>);

impl Synthetic {
    /// The model's bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        // Writing to memory does not fail.
        let written = self.write(&mut bytes);
        debug_assert!(written.is_ok());
        bytes
    }

    /// Writes the model.
    ///
    /// # Errors
    /// Those of `to`.
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let vocabulary = vocabulary();
        let tensors = self.tensors(vocabulary.len() as u64);
        let mut head = Head(b"GGUF\x03\0\0\0".to_vec());
        head.u64(tensors.len() as u64);
        let metadata = self.metadata(&vocabulary);
        head.u64(metadata.1);
        head.0.extend(metadata.0.0);
        let mut offset = 0;
        for (name, dims) in &tensors {
            head.string(name);
            head.u32(u32::try_from(dims.len()).unwrap_or_default());
            for dim in dims {
                head.u64(*dim);
            }
            head.u32(0);
            head.u64(offset);
            offset = (offset + 4 * dims.iter().product::<u64>()).next_multiple_of(32);
        }
        head.pad();
        to.write_all(&head.0)?;
        let mut random = Random(self.seed);
        for (name, dims) in &tensors {
            write_weights(to, name, dims, &mut random)?;
        }
        to.flush()
    }

    fn metadata(&self, vocabulary: &[(Vec<u8>, f32, i32)]) -> (Head, u64) {
        let mut m = Metadata::default();
        m.string("general.architecture", "llama");
        m.string("general.name", "synthetic");
        m.string("general.license", "Apache-2.0");
        m.u32("llama.context_length", self.context);
        m.u32("llama.embedding_length", self.embedding);
        m.u32("llama.block_count", self.layers);
        m.u32("llama.feed_forward_length", self.feed_forward);
        m.u32("llama.attention.head_count", self.heads);
        m.u32("llama.attention.head_count_kv", self.kv_heads);
        m.f32("llama.attention.layer_norm_rms_epsilon", 1e-5);
        m.u32("llama.rope.dimension_count", self.embedding / self.heads);
        m.string("tokenizer.ggml.model", "llama");
        m.array("tokenizer.ggml.tokens", 8, vocabulary.len(), |head| {
            for (text, ..) in vocabulary {
                head.u64(text.len() as u64);
                head.0.extend(text);
            }
        });
        m.array("tokenizer.ggml.scores", 6, vocabulary.len(), |head| {
            for (_, score, _) in vocabulary {
                head.0.extend(score.to_le_bytes());
            }
        });
        m.array("tokenizer.ggml.token_type", 5, vocabulary.len(), |head| {
            for (.., kind) in vocabulary {
                head.0.extend(kind.to_le_bytes());
            }
        });
        m.u32("tokenizer.ggml.unknown_token_id", 0);
        m.u32("tokenizer.ggml.bos_token_id", 1);
        m.u32("tokenizer.ggml.eos_token_id", 2);
        if let Some(template) = &self.chat_template {
            m.string("tokenizer.chat_template", template);
        }
        (m.head, m.count)
    }

    fn tensors(&self, vocabulary: u64) -> Vec<Planned> {
        let (e, f) = (u64::from(self.embedding), u64::from(self.feed_forward));
        let kv = e / u64::from(self.heads) * u64::from(self.kv_heads);
        let mut tensors = vec![
            ("token_embd.weight".to_owned(), vec![e, vocabulary]),
            ("output_norm.weight".to_owned(), vec![e]),
            ("output.weight".to_owned(), vec![e, vocabulary]),
        ];
        for layer in 0..self.layers {
            for (name, dims) in [
                ("attn_norm", vec![e]),
                ("attn_q", vec![e, e]),
                ("attn_k", vec![e, kv]),
                ("attn_v", vec![e, kv]),
                ("attn_output", vec![e, e]),
                ("ffn_norm", vec![e]),
                ("ffn_gate", vec![e, f]),
                ("ffn_up", vec![e, f]),
                ("ffn_down", vec![f, e]),
            ] {
                tensors.push((format!("blk.{layer}.{name}.weight"), dims));
            }
        }
        tensors
    }
}

/// Norms are ones; other weights are spread so that activations keep their size.
fn write_weights(to: &mut impl Write, name: &str, dims: &[u64], random: &mut Random) -> io::Result<()> {
    let count: u64 = dims.iter().product();
    let norm = name.contains("norm");
    #[expect(clippy::cast_precision_loss, reason = "a width is far below 2^23")]
    let spread = (3.0 / dims.first().copied().unwrap_or(1) as f32).sqrt();
    let mut chunk = Vec::with_capacity(1 << 16);
    for _ in 0..count {
        let weight = if norm { 1.0 } else { random.signed() * spread };
        chunk.extend(weight.to_le_bytes());
        if chunk.len() >= 1 << 16 {
            to.write_all(&chunk)?;
            chunk.clear();
        }
    }
    let bytes = usize::try_from(4 * count).unwrap_or_default();
    chunk.extend(std::iter::repeat_n(0, bytes.next_multiple_of(32) - bytes));
    to.write_all(&chunk)
}

/// Text, score and type of each token: three that control, 256 single bytes, the printable characters, some pairs of letters.
fn vocabulary() -> Vec<(Vec<u8>, f32, i32)> {
    const NORMAL: i32 = 1;
    const UNKNOWN: i32 = 2;
    const CONTROL: i32 = 3;
    const BYTE: i32 = 6;
    let mut tokens = vec![
        (b"<unk>".to_vec(), 0.0, UNKNOWN),
        (b"<s>".to_vec(), 0.0, CONTROL),
        (b"</s>".to_vec(), 0.0, CONTROL),
    ];
    tokens.extend((0..=255u8).map(|byte| (format!("<0x{byte:02X}>").into_bytes(), 0.0, BYTE)));
    tokens.push(("\u{2581}".into(), -1.0, NORMAL));
    tokens.extend((b'!'..=b'~').map(|byte| (vec![byte], -2.0, NORMAL)));
    let pairs = [
        "th", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or", "te", "of", "ed", "is",
        "it", "al", "ar",
    ];
    tokens.extend(pairs.iter().map(|pair| (pair.as_bytes().to_vec(), -0.5, NORMAL)));
    tokens
}

/// Bytes of a file's head.
#[derive(Default)]
struct Head(Vec<u8>);

impl Head {
    fn u32(&mut self, n: u32) {
        self.0.extend(n.to_le_bytes());
    }

    fn u64(&mut self, n: u64) {
        self.0.extend(n.to_le_bytes());
    }

    fn string(&mut self, text: &str) {
        self.u64(text.len() as u64);
        self.0.extend(text.as_bytes());
    }

    fn pad(&mut self) {
        self.0.resize(self.0.len().next_multiple_of(32), 0);
    }
}

/// Metadata entries, counted.
#[derive(Default)]
struct Metadata {
    head: Head,
    count: u64,
}

impl Metadata {
    fn entry(&mut self, key: &str, kind: u32) -> &mut Head {
        self.count += 1;
        self.head.string(key);
        self.head.u32(kind);
        &mut self.head
    }

    fn u32(&mut self, key: &str, n: u32) {
        self.entry(key, 4).u32(n);
    }

    fn f32(&mut self, key: &str, n: f32) {
        self.entry(key, 6).0.extend(n.to_le_bytes());
    }

    fn string(&mut self, key: &str, text: &str) {
        self.entry(key, 8).string(text);
    }

    fn array(&mut self, key: &str, kind: u32, len: usize, write: impl FnOnce(&mut Head)) {
        let head = self.entry(key, 9);
        head.u32(kind);
        head.u64(len as u64);
        write(head);
    }
}

/// `SplitMix64`.
struct Random(u64);

impl Random {
    /// From -1 to 1.
    fn signed(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        #[expect(clippy::cast_precision_loss, reason = "24 bits are what an f32 holds")]
        let unit = (z >> 40) as f32 / (1u64 << 24) as f32;
        2.0 * unit - 1.0
    }
}
