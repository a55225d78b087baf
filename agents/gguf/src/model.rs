//! What the engine has to know of a model, taken from a checked header.

use crate::{GgufError, Header};

/// Architectures that are served: decoders with rotary positions whose cache is keys and values for every layer.
pub const ARCHITECTURES: [&str; 12] = [
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3",
    "phi3",
    "granite",
    "olmo2",
    "internlm2",
    "stablelm",
    "smollm3",
];

/// A model that can be served, with its sizes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Model {
    /// Architecture, one of [`ARCHITECTURES`].
    pub architecture: String,
    /// Name the author gave it, if any.
    pub name: Option<String>,
    /// License the author gave it, if any.
    pub license: Option<String>,
    /// Parameters: elements of all tensors.
    pub parameters: u64,
    /// Bytes of all tensors.
    pub tensor_bytes: u64,
    /// Bytes of the whole file.
    pub file_bytes: u64,
    /// Longest context it was trained for, in tokens.
    pub context: u64,
    /// Transformer blocks.
    pub layers: u64,
    /// Width of the residual stream.
    pub embedding: u64,
    /// Width of the feed-forward network.
    pub feed_forward: u64,
    /// Attention heads.
    pub heads: u64,
    /// Heads of keys and values; fewer than `heads` with grouped queries.
    pub kv_heads: u64,
    /// Width of a head's keys.
    pub key: u64,
    /// Width of a head's values.
    pub value: u64,
    /// Tokens of the vocabulary.
    pub vocabulary: u64,
    /// Jinja chat template, if the file has one.
    pub chat_template: Option<String>,
}

impl TryFrom<&Header> for Model {
    type Error = GgufError;

    fn try_from(header: &Header) -> Result<Self, GgufError> {
        let architecture = header
            .string("general.architecture")
            .ok_or_else(|| GgufError::Missing("general.architecture".to_owned()))?;
        if !ARCHITECTURES.contains(&architecture) {
            // What a file says of itself is shown, but not more than a line of it.
            return Err(GgufError::Architecture { found: architecture.chars().take(64).collect() });
        }
        if header.unsigned("split.count").is_some_and(|n| n > 1) {
            return Err(GgufError::Damaged(
                "it is one part of several; merge the parts into one file first".to_owned(),
            ));
        }
        let read = Numbers { header, architecture };
        let embedding = read.within("embedding_length", 1 << 17)?;
        let heads = read.within("attention.head_count", 1 << 10)?;
        let kv_heads = read.or("attention.head_count_kv", heads, heads)?;
        if !heads.is_multiple_of(kv_heads) {
            return Err(GgufError::Damaged(format!(
                "{heads} heads do not share {kv_heads} heads of keys evenly"
            )));
        }
        let head = (embedding / heads).max(1);
        let vocabulary = vocabulary(header, embedding)?;
        Ok(Self {
            name: header.string("general.name").map(str::to_owned),
            license: header.string("general.license").map(str::to_owned),
            parameters: header
                .tensors
                .iter()
                .map(|t| t.dims.iter().product::<u64>())
                .fold(0, u64::saturating_add),
            tensor_bytes: header.tensors.iter().map(|t| t.bytes).fold(0, u64::saturating_add),
            file_bytes: header.file_bytes,
            context: read.within("context_length", 1 << 24)?,
            layers: layers(&read)?,
            embedding,
            feed_forward: read.within("feed_forward_length", 1 << 20)?,
            heads,
            kv_heads,
            key: read.or("attention.key_length", head, 1 << 12)?,
            value: read.or("attention.value_length", head, 1 << 12)?,
            vocabulary,
            chat_template: header.string("tokenizer.chat_template").map(str::to_owned),
            architecture: architecture.to_owned(),
        })
    }
}

/// Numbers of the architecture's own metadata, each within bounds.
struct Numbers<'a> {
    header: &'a Header,
    architecture: &'a str,
}

impl Numbers<'_> {
    /// A number from 1 to `limit` that must be there.
    fn within(&self, key: &str, limit: u64) -> Result<u64, GgufError> {
        let key = format!("{}.{key}", self.architecture);
        match self.header.unsigned(&key) {
            None | Some(0) => Err(GgufError::Missing(key)),
            Some(found) if found > limit => {
                Err(GgufError::Absurd { what: format!("\"{key}\""), found, limit })
            }
            Some(found) => Ok(found),
        }
    }

    /// The same, or `default` where it is not there.
    fn or(&self, key: &str, default: u64, limit: u64) -> Result<u64, GgufError> {
        if self.header.metadata.contains_key(&format!("{}.{key}", self.architecture)) {
            self.within(key, limit)
        } else {
            Ok(default)
        }
    }
}

/// As many blocks as stated, each with a tensor at least.
fn layers(read: &Numbers<'_>) -> Result<u64, GgufError> {
    let layers = read.within("block_count", 1 << 10)?;
    for layer in 0..layers {
        let prefix = format!("blk.{layer}.");
        if !read.header.tensors.iter().any(|t| t.name.starts_with(&prefix)) {
            return Err(GgufError::Damaged(format!(
                "it states {layers} blocks but has no tensor of block {layer}"
            )));
        }
    }
    Ok(layers)
}

/// Tokens of the vocabulary: as many in the tokenizer as in the embedding.
fn vocabulary(header: &Header, embedding: u64) -> Result<u64, GgufError> {
    let tokenizer = header
        .string("tokenizer.ggml.model")
        .ok_or_else(|| GgufError::Missing("tokenizer.ggml.model".to_owned()))?;
    if !["llama", "gpt2"].contains(&tokenizer) {
        return Err(GgufError::Tokenizer { found: tokenizer.chars().take(64).collect() });
    }
    let tokens = header
        .array_len("tokenizer.ggml.tokens")
        .filter(|n| *n > 0)
        .ok_or_else(|| GgufError::Missing("tokenizer.ggml.tokens".to_owned()))?;
    for key in ["tokenizer.ggml.scores", "tokenizer.ggml.token_type"] {
        if let Some(len) = header.array_len(key)
            && len != tokens
        {
            return Err(GgufError::Damaged(format!(
                "the tokenizer has {tokens} tokens, but \"{key}\" {len}"
            )));
        }
    }
    for key in ["bos", "eos", "eot", "unknown", "padding"] {
        let key = format!("tokenizer.ggml.{key}_token_id");
        if let Some(id) = header.unsigned(&key)
            && id >= tokens
        {
            return Err(GgufError::Absurd { what: format!("\"{key}\""), found: id, limit: tokens - 1 });
        }
    }
    let table = header
        .tensors
        .iter()
        .find(|t| t.name == "token_embd.weight")
        .ok_or_else(|| GgufError::Damaged("it has no tensor token_embd.weight".to_owned()))?;
    if table.dims.as_slice() != [embedding, tokens] {
        return Err(GgufError::Damaged(format!(
            "token_embd.weight is {:?}, but {embedding} wide embeddings of {tokens} tokens are stated",
            table.dims
        )));
    }
    Ok(tokens)
}
