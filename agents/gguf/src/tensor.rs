//! Tensors: their types and how many bytes each takes.

use crate::GgufError;

/// How a tensor's elements are stored: in blocks of `block` elements that take `bytes` bytes each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorKind {
    /// The number in the file.
    pub id: u32,
    /// Its usual name.
    pub name: &'static str,
    /// Elements in a block.
    pub block: u64,
    /// Bytes of a block.
    pub bytes: u64,
}

const fn kind(id: u32, name: &'static str, block: u64, bytes: u64) -> TensorKind {
    TensorKind { id, name, block, bytes }
}

/// Every type a served file may have; the ids, block sizes and bytes are ggml's.
const KINDS: &[TensorKind] = &[
    kind(0, "F32", 1, 4),
    kind(1, "F16", 1, 2),
    kind(2, "Q4_0", 32, 18),
    kind(3, "Q4_1", 32, 20),
    kind(6, "Q5_0", 32, 22),
    kind(7, "Q5_1", 32, 24),
    kind(8, "Q8_0", 32, 34),
    kind(10, "Q2_K", 256, 84),
    kind(11, "Q3_K", 256, 110),
    kind(12, "Q4_K", 256, 144),
    kind(13, "Q5_K", 256, 176),
    kind(14, "Q6_K", 256, 210),
    kind(16, "IQ2_XXS", 256, 66),
    kind(17, "IQ2_XS", 256, 74),
    kind(18, "IQ3_XXS", 256, 98),
    kind(19, "IQ1_S", 256, 50),
    kind(20, "IQ4_NL", 32, 18),
    kind(21, "IQ3_S", 256, 110),
    kind(22, "IQ2_S", 256, 82),
    kind(23, "IQ4_XS", 256, 136),
    kind(29, "IQ1_M", 256, 56),
    kind(30, "BF16", 1, 2),
];

impl TensorKind {
    /// The type with this number, if files with it are served.
    #[must_use]
    pub fn from_id(id: u32) -> Option<Self> {
        KINDS.iter().copied().find(|k| k.id == id)
    }
}

/// One tensor of a file: where it is and how large.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name, such as `blk.0.attn_q.weight`.
    pub name: String,
    /// One to four sizes, the fastest-running first; none is 0.
    pub dims: Vec<u64>,
    /// How its elements are stored.
    pub kind: TensorKind,
    /// First byte, from the beginning of the file's data.
    pub offset: u64,
    /// Bytes it takes.
    pub bytes: u64,
}

/// Elements of one tensor: beyond any model (GPT-3's largest has 0.6 thousand million), far below an overflow.
const MAX_ELEMENTS: u64 = 1 << 36;

/// Bytes of a tensor with these sizes.
///
/// # Errors
/// A size of 0, more than 2^36 elements, or rows that are not whole blocks.
pub(crate) fn bytes_of(name: &str, dims: &[u64], kind: TensorKind) -> Result<u64, GgufError> {
    let mut elements = 1u64;
    for &dim in dims {
        elements = elements.saturating_mul(dim);
    }
    if elements == 0 {
        return Err(GgufError::Damaged(format!("tensor {name} has no elements (its sizes are {dims:?})")));
    }
    if elements > MAX_ELEMENTS {
        return Err(GgufError::Absurd {
            what: format!("the number of elements of tensor {name}"),
            found: elements,
            limit: MAX_ELEMENTS,
        });
    }
    if dims.first().is_none_or(|row| row % kind.block != 0) {
        return Err(GgufError::Damaged(format!(
            "tensor {name} has rows of {:?}, which is no multiple of {}'s {}",
            dims.first(),
            kind.name,
            kind.block
        )));
    }
    Ok(elements / kind.block * kind.bytes)
}
