//! The head of a file: metadata and the list of tensors, every count and size within bounds and within the file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::reader::Reader;
use crate::tensor::bytes_of;
use crate::{GgufError, Tensor, TensorKind};

/// Most metadata entries.
pub const MAX_METADATA: u64 = 4096;
/// Most tensors.
pub const MAX_TENSORS: u64 = 65_536;
/// Longest string that is kept, in bytes: chat templates of a few tens of KiB exist.
pub const MAX_STRING: u64 = 1 << 20;
/// Most elements of a metadata array; vocabularies of 256 Ki tokens exist.
const MAX_ARRAY: u64 = 4 << 20;
/// Longest name of an entry or tensor, in bytes. ggml keeps 64 for a tensor's, with its terminating zero.
const MAX_KEY: u64 = 256;
const MAX_TENSOR_NAME: u64 = 63;

/// A metadata value's type, by its number in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum ValueKind {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ValueKind {
    fn from_id(id: u32, key: &str) -> Result<Self, GgufError> {
        const KINDS: [ValueKind; 13] = [
            ValueKind::U8,
            ValueKind::I8,
            ValueKind::U16,
            ValueKind::I16,
            ValueKind::U32,
            ValueKind::I32,
            ValueKind::F32,
            ValueKind::Bool,
            ValueKind::String,
            ValueKind::Array,
            ValueKind::U64,
            ValueKind::I64,
            ValueKind::F64,
        ];
        usize::try_from(id)
            .ok()
            .and_then(|i| KINDS.get(i).copied())
            .ok_or_else(|| GgufError::Damaged(format!("metadata \"{key}\" has the unknown type {id}")))
    }

    /// Bytes of a value of fixed size; `None` for strings and arrays.
    fn bytes(self) -> Option<u64> {
        match self {
            Self::U8 | Self::I8 | Self::Bool => Some(1),
            Self::U16 | Self::I16 => Some(2),
            Self::U32 | Self::I32 | Self::F32 => Some(4),
            Self::U64 | Self::I64 | Self::F64 => Some(8),
            Self::String | Self::Array => None,
        }
    }
}

/// A metadata value. Of an array only type and length are kept.
#[derive(Clone, Debug, PartialEq)]
#[expect(missing_docs, reason = "the names are the types")]
pub enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    String(String),
    Array { kind: ValueKind, len: u64 },
}

/// What the head of a file says, checked against the file's length.
#[derive(Clone, Debug)]
pub struct Header {
    /// Version of the format.
    pub version: u32,
    /// Metadata by key.
    pub metadata: BTreeMap<String, Value>,
    /// Tensors in the file's order.
    pub tensors: Vec<Tensor>,
    /// First byte of the tensors' data.
    pub data_offset: u64,
    /// Bytes of the whole file.
    pub file_bytes: u64,
}

impl Header {
    /// Reads and checks the head of a file or block device.
    ///
    /// # Errors
    /// See [`GgufError`]; the file is not changed.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let mut file = File::open(path)?;
        // A block device's metadata says 0; its end is where seeking to the end leads.
        let len = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(0))?;
        Self::read(BufReader::new(file), len)
    }

    /// Reads and checks the head of `len` bytes.
    ///
    /// # Errors
    /// See [`GgufError`].
    pub fn read(from: impl Read, len: u64) -> Result<Self, GgufError> {
        let mut reader = Reader::new(from, len);
        let found: [u8; 4] = reader.array("the magic number")?;
        if &found != b"GGUF" {
            return Err(GgufError::Magic { found });
        }
        let version = reader.u32("the version")?;
        if !(2..=3).contains(&version) {
            let hint = if version & 0xffff == 0 { ", and this one looks big-endian" } else { "" };
            return Err(GgufError::Version { found: version, hint });
        }
        let tensor_count =
            bounded(reader.u64("the number of tensors")?, MAX_TENSORS, "the number of tensors")?;
        let metadata_count = bounded(
            reader.u64("the number of metadata entries")?,
            MAX_METADATA,
            "the number of metadata entries",
        )?;
        let metadata = read_metadata(&mut reader, metadata_count)?;
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(read_tensor(&mut reader)?);
        }
        let alignment = alignment(&metadata)?;
        let data_offset = reader.at().next_multiple_of(alignment);
        check_layout(&tensors, alignment, data_offset, len)?;
        Ok(Self { version, metadata, tensors, data_offset, file_bytes: len })
    }

    /// A string of the metadata.
    #[must_use]
    pub fn string(&self, key: &str) -> Option<&str> {
        match self.metadata.get(key) {
            Some(Value::String(text)) => Some(text),
            _ => None,
        }
    }

    /// A whole number of the metadata that is not negative.
    #[must_use]
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key) {
            Some(Value::Unsigned(n)) => Some(*n),
            Some(Value::Signed(n)) => u64::try_from(*n).ok(),
            _ => None,
        }
    }

    /// Length of an array of the metadata.
    #[must_use]
    pub fn array_len(&self, key: &str) -> Option<u64> {
        match self.metadata.get(key) {
            Some(Value::Array { len, .. }) => Some(*len),
            _ => None,
        }
    }
}

fn bounded(found: u64, limit: u64, what: &str) -> Result<u64, GgufError> {
    if found > limit {
        return Err(GgufError::Absurd { what: what.to_owned(), found, limit });
    }
    Ok(found)
}

fn read_metadata<R: Read>(reader: &mut Reader<R>, count: u64) -> Result<BTreeMap<String, Value>, GgufError> {
    let mut metadata = BTreeMap::new();
    for _ in 0..count {
        let key = reader.string("the name of a metadata entry", MAX_KEY)?;
        let kind = ValueKind::from_id(reader.u32(&key)?, &key)?;
        let value = read_value(reader, kind, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(GgufError::Damaged(format!("metadata \"{key}\" is there twice")));
        }
    }
    Ok(metadata)
}

fn read_value<R: Read>(reader: &mut Reader<R>, kind: ValueKind, key: &str) -> Result<Value, GgufError> {
    Ok(match kind {
        ValueKind::U8 => Value::Unsigned(u8::from_le_bytes(reader.array(key)?).into()),
        ValueKind::I8 => Value::Signed(i8::from_le_bytes(reader.array(key)?).into()),
        ValueKind::U16 => Value::Unsigned(u16::from_le_bytes(reader.array(key)?).into()),
        ValueKind::I16 => Value::Signed(i16::from_le_bytes(reader.array(key)?).into()),
        ValueKind::U32 => Value::Unsigned(u32::from_le_bytes(reader.array(key)?).into()),
        ValueKind::I32 => Value::Signed(i32::from_le_bytes(reader.array(key)?).into()),
        ValueKind::U64 => Value::Unsigned(u64::from_le_bytes(reader.array(key)?)),
        ValueKind::I64 => Value::Signed(i64::from_le_bytes(reader.array(key)?)),
        ValueKind::F32 => Value::Float(f32::from_le_bytes(reader.array(key)?).into()),
        ValueKind::F64 => Value::Float(f64::from_le_bytes(reader.array(key)?)),
        ValueKind::Bool => match reader.array::<1>(key)? {
            [0] => Value::Bool(false),
            [1] => Value::Bool(true),
            [other] => {
                return Err(GgufError::Damaged(format!(
                    "metadata \"{key}\" is neither true nor false but {other}"
                )));
            }
        },
        ValueKind::String => Value::String(reader.string(key, MAX_STRING)?),
        ValueKind::Array => {
            let kind = ValueKind::from_id(reader.u32(key)?, key)?;
            let len = bounded(reader.u64(key)?, MAX_ARRAY, &format!("the length of the array \"{key}\""))?;
            skip_array(reader, kind, len, key)?;
            Value::Array { kind, len }
        }
    })
}

fn skip_array<R: Read>(
    reader: &mut Reader<R>,
    kind: ValueKind,
    len: u64,
    key: &str,
) -> Result<(), GgufError> {
    if let Some(bytes) = kind.bytes() {
        return reader.skip(bytes * len, key);
    }
    if kind == ValueKind::Array {
        return Err(GgufError::Damaged(format!("metadata \"{key}\" is an array of arrays")));
    }
    for _ in 0..len {
        let bytes = bounded(reader.u64(key)?, MAX_STRING, &format!("the length of a string of \"{key}\""))?;
        reader.skip(bytes, key)?;
    }
    Ok(())
}

fn read_tensor<R: Read>(reader: &mut Reader<R>) -> Result<Tensor, GgufError> {
    let name = reader.string("the name of a tensor", MAX_TENSOR_NAME)?;
    let count = reader.u32(&name)?;
    if !(1..=4).contains(&count) {
        return Err(GgufError::Absurd {
            what: format!("the number of dimensions of tensor {name}"),
            found: count.into(),
            limit: 4,
        });
    }
    let mut dims = Vec::new();
    for _ in 0..count {
        dims.push(reader.u64(&name)?);
    }
    let id = reader.u32(&name)?;
    let kind = TensorKind::from_id(id).ok_or_else(|| {
        GgufError::Damaged(format!(
            "tensor {name} has the unknown type {id}; convert the model to a common quantization"
        ))
    })?;
    let offset = reader.u64(&name)?;
    let bytes = bytes_of(&name, &dims, kind)?;
    Ok(Tensor { name, dims, kind, offset, bytes })
}

/// Where tensors may begin: a power of two, 32 unless the file says otherwise.
fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64, GgufError> {
    match metadata.get("general.alignment") {
        None => Ok(32),
        Some(Value::Unsigned(n)) if n.is_power_of_two() && (8..=65_536).contains(n) => Ok(*n),
        Some(other) => Err(GgufError::Damaged(format!(
            "its alignment is {other:?}, which is no power of two from 8 to 65536"
        ))),
    }
}

/// Every tensor is aligned, within the file, named once, and shares no byte with another.
fn check_layout(tensors: &[Tensor], alignment: u64, data_offset: u64, len: u64) -> Result<(), GgufError> {
    let mut names = BTreeSet::new();
    let mut spans = Vec::new();
    for tensor in tensors {
        if !names.insert(tensor.name.as_str()) {
            return Err(GgufError::Damaged(format!("tensor {} is there twice", tensor.name)));
        }
        if tensor.offset % alignment != 0 {
            return Err(GgufError::Damaged(format!(
                "tensor {} begins at {}, which is not aligned to {alignment}",
                tensor.name, tensor.offset
            )));
        }
        let need = data_offset.saturating_add(tensor.offset).saturating_add(tensor.bytes);
        if need > len {
            return Err(GgufError::Truncated { what: format!("tensor {}", tensor.name), need, have: len });
        }
        spans.push((tensor.offset, tensor.bytes, tensor.name.as_str()));
    }
    spans.sort_unstable();
    for pair in spans.windows(2) {
        if let [(offset, bytes, first), (next, _, second)] = pair
            && offset + bytes > *next
        {
            return Err(GgufError::Damaged(format!("tensors {first} and {second} overlap")));
        }
    }
    Ok(())
}
