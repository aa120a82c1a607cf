//! Takes the header of a GGUF file apart. Every read is checked against the bytes that are left.

use super::value::{Array, Value};
use super::{Storage, TensorInfo, shorten};
use kiln_tensor::{DType, Quantization, Shape};
use std::collections::BTreeMap;
use std::ops::Range;

/// What is wrong, with the key or tensor at fault.
type Result<T> = std::result::Result<T, String>;

const MAGIC: &[u8] = b"GGUF";

/// Where the file does not say another one.
const ALIGNMENT: u64 = 32;

/// ggml's tensors have no more.
const MAX_DIMS: u32 = 4;

/// The specification has no names of tensors that are longer.
const MAX_NAME: usize = 64;

/// Arrays within arrays, of which no writer makes any.
const MAX_DEPTH: usize = 4;

pub(super) struct Header {
    pub(super) version: u32,
    pub(super) metadata: BTreeMap<String, Value>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
    pub(super) names: Vec<String>,
}

pub(super) fn read(bytes: &[u8]) -> Result<Header> {
    let mut cursor = Cursor { bytes, at: 0 };
    if cursor.take(MAGIC.len()) != Ok(MAGIC) {
        return Err("it is no GGUF file: it does not begin with GGUF".into());
    }
    let version = cursor.u32()?;
    if !matches!(version, 2 | 3) {
        let hint = if matches!(version.swap_bytes(), 2 | 3) { ", of a big-endian machine" } else { "" };
        return Err(format!("it is of version {version}{hint}; 2 and 3 are read"));
    }
    let (tensor_count, key_count) = (cursor.u64()?, cursor.u64()?);
    let metadata = read_metadata(&mut cursor, key_count)?;
    let alignment = alignment(&metadata)?;
    let mut tensors = BTreeMap::new();
    let mut names = Vec::new();
    for i in 0..tensor_count {
        let (name, entry) = Entry::read(&mut cursor).map_err(|what| format!("tensor {i} of {tensor_count}: {what}"))?;
        if tensors.insert(name.clone(), entry).is_some() {
            return Err(format!("the tensor {name:?} is there twice"));
        }
        names.push(name);
    }
    // Only a file without tensors may end before its data begins.
    let data = (cursor.at as u64).checked_next_multiple_of(alignment).and_then(|at| usize::try_from(at).ok());
    let data = data.ok_or("the alignment leads out of the file")?;
    let mut placed = BTreeMap::new();
    for (name, entry) in tensors {
        let info = entry.place(data, alignment, bytes.len()).map_err(|what| format!("the tensor {:?}: {what}", shorten(&name)))?;
        placed.insert(name, info);
    }
    expect_apart(&placed)?;
    Ok(Header { version, metadata, tensors: placed, names })
}

fn read_metadata(cursor: &mut Cursor<'_>, count: u64) -> Result<BTreeMap<String, Value>> {
    let mut metadata = BTreeMap::new();
    for i in 0..count {
        let key = cursor.string().map_err(|what| format!("key {i} of {count}: {what}"))?;
        let value = cursor.value().map_err(|what| format!("the key {:?}: {what}", shorten(&key)))?;
        if metadata.contains_key(&key) {
            return Err(format!("the key {:?} is there twice", shorten(&key)));
        }
        metadata.insert(key, value);
    }
    Ok(metadata)
}

fn alignment(metadata: &BTreeMap<String, Value>) -> Result<u64> {
    let key = "general.alignment";
    let Some(value) = metadata.get(key) else { return Ok(ALIGNMENT) };
    match value.as_u64() {
        Some(alignment) if alignment.is_power_of_two() && alignment <= u64::from(u32::MAX) => Ok(alignment),
        _ => Err(format!("the key {key:?} must be a power of two, not {value:?}")),
    }
}

/// No byte belongs to two tensors.
fn expect_apart(tensors: &BTreeMap<String, TensorInfo>) -> Result<()> {
    let mut all: Vec<_> = tensors.iter().filter(|(_, info)| !info.bytes.is_empty()).collect();
    all.sort_by_key(|(_, info)| info.bytes.start);
    for pair in all.windows(2) {
        let [(first, a), (second, b)] = pair else { continue };
        if a.bytes.end > b.bytes.start {
            return Err(format!("the tensors {:?} and {:?} overlap", shorten(first), shorten(second)));
        }
    }
    Ok(())
}

/// A tensor as the file lists it.
struct Entry {
    shape: Shape,
    storage: Storage,
    offset: u64,
}

impl Entry {
    fn read(cursor: &mut Cursor<'_>) -> Result<(String, Self)> {
        let name = cursor.string()?;
        if name.len() > MAX_NAME {
            return Err(format!("its name {:?}… is longer than {MAX_NAME} bytes", shorten(&name)));
        }
        let named = |what: String| format!("{name:?}: {what}");
        let rank = cursor.u32().map_err(named)?;
        if rank > MAX_DIMS {
            return Err(named(format!("it claims {rank} dimensions, of at most {MAX_DIMS}")));
        }
        let mut dims = Vec::new();
        for _ in 0..rank {
            let extent = cursor.u64().map_err(named)?;
            dims.push(usize::try_from(extent).map_err(|_| named(format!("its extent {extent} is too large")))?);
        }
        dims.reverse();
        let shape = Shape::new(&dims).map_err(|e| named(e.to_string()))?;
        let storage = storage(cursor.u32().map_err(named)?);
        let offset = cursor.u64().map_err(named)?;
        Ok((name, Self { shape, storage, offset }))
    }

    /// Finds the tensor's bytes in a file of `len`.
    fn place(self, data: usize, alignment: u64, len: usize) -> Result<TensorInfo> {
        let Self { shape, storage, offset } = self;
        if !offset.is_multiple_of(alignment) {
            return Err(format!("its offset {offset} is no multiple of the alignment {alignment}"));
        }
        let overflow = || format!("{shape} values overflow");
        let size = match storage {
            Storage::Plain(dtype) => shape.numel().checked_mul(dtype.size()).ok_or_else(overflow)?,
            Storage::Blocks(kind) => {
                let cols = shape.dims().last().copied().unwrap_or(1);
                if let Some(reason) = kind.refuses(cols) {
                    return Err(reason);
                }
                kind.nbytes(shape.numel().checked_div(cols).unwrap_or(0), cols).ok_or_else(overflow)?
            }
            // Of unknown size: it is an error to read it, not to have it.
            Storage::Unknown(..) => 0,
        };
        let bytes = byte_range(data, offset, size).filter(|bytes| bytes.end <= len || size == 0);
        let bytes = bytes.ok_or_else(|| format!("its {size} bytes at offset {offset} lie outside of the file of {len}"))?;
        Ok(TensorInfo { shape, storage, bytes: if size == 0 { 0..0 } else { bytes } })
    }
}

fn byte_range(data: usize, offset: u64, size: usize) -> Option<Range<usize>> {
    let start = data.checked_add(usize::try_from(offset).ok()?)?;
    Some(start..start.checked_add(size)?)
}

/// ggml's types by number; those that were taken out of it are numbers without a name.
fn storage(number: u32) -> Storage {
    const NAMES: [(u32, &str); 28] = [
        (3, "Q4_1"),
        (6, "Q5_0"),
        (7, "Q5_1"),
        (9, "Q8_1"),
        (10, "Q2_K"),
        (11, "Q3_K"),
        (13, "Q5_K"),
        (15, "Q8_K"),
        (16, "IQ2_XXS"),
        (17, "IQ2_XS"),
        (18, "IQ3_XXS"),
        (19, "IQ1_S"),
        (20, "IQ4_NL"),
        (21, "IQ3_S"),
        (22, "IQ2_S"),
        (23, "IQ4_XS"),
        (24, "I8"),
        (25, "I16"),
        (26, "I32"),
        (27, "I64"),
        (28, "F64"),
        (29, "IQ1_M"),
        (34, "TQ1_0"),
        (35, "TQ2_0"),
        (39, "MXFP4"),
        (40, "NVFP4"),
        (31, "Q4_0_4_4"),
        (32, "Q4_0_4_8"),
    ];
    match number {
        0 => Storage::Plain(DType::F32),
        1 => Storage::Plain(DType::F16),
        30 => Storage::Plain(DType::BF16),
        2 => Storage::Blocks(Quantization::Q4_0),
        8 => Storage::Blocks(Quantization::Q8_0),
        12 => Storage::Blocks(Quantization::Q4K),
        14 => Storage::Blocks(Quantization::Q6K),
        other => Storage::Unknown(NAMES.iter().find(|(n, _)| *n == other).map_or("unknown", |(_, name)| name), other),
    }
}

/// Bytes that are read from front to back.
struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

/// A little-endian number of the width of its type.
macro_rules! number {
    ($name:ident: $t:ty) => {
        fn $name(&mut self) -> Result<$t> {
            let mut bytes = [0; size_of::<$t>()];
            bytes.copy_from_slice(self.take(size_of::<$t>())?);
            Ok(<$t>::from_le_bytes(bytes))
        }
    };
}

impl<'a> Cursor<'a> {
    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8]> {
        let taken = self.at.checked_add(count).and_then(|end| self.bytes.get(self.at..end));
        let cut = || format!("{count} bytes were expected at byte {}, where {} are left", self.at, self.left());
        let taken = taken.ok_or_else(cut)?;
        self.at += count;
        Ok(taken)
    }

    number!(u8: u8);
    number!(i8: i8);
    number!(u16: u16);
    number!(i16: i16);
    number!(u32: u32);
    number!(i32: i32);
    number!(u64: u64);
    number!(i64: i64);
    number!(f32: f32);
    number!(f64: f64);

    fn bool(&mut self) -> Result<bool> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(format!("{other} is neither true (1) nor false (0)")),
        }
    }

    fn string(&mut self) -> Result<String> {
        let len = self.u64()?;
        let len = usize::try_from(len).map_err(|_| format!("a text claims {len} bytes"))?;
        let bytes = self.take(len)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|e| format!("a text is not UTF-8: {e}"))
    }

    fn value(&mut self) -> Result<Value> {
        Ok(match self.u32()? {
            0 => Value::Unsigned(self.u8()?.into()),
            1 => Value::Signed(self.i8()?.into()),
            2 => Value::Unsigned(self.u16()?.into()),
            3 => Value::Signed(self.i16()?.into()),
            4 => Value::Unsigned(self.u32()?.into()),
            5 => Value::Signed(self.i32()?.into()),
            6 => Value::Float(self.f32()?.into()),
            7 => Value::Bool(self.bool()?),
            8 => Value::String(self.string()?),
            9 => Value::Array(self.array(1)?),
            10 => Value::Unsigned(self.u64()?),
            11 => Value::Signed(self.i64()?),
            12 => Value::Float(self.f64()?),
            other => return Err(format!("it is of the unknown type {other}")),
        })
    }

    fn array(&mut self, depth: usize) -> Result<Array> {
        if depth > MAX_DEPTH {
            return Err(format!("arrays lie within arrays more than {MAX_DEPTH} deep"));
        }
        let (kind, len) = (self.u32()?, self.u64()?);
        Ok(match kind {
            0 => Array::Unsigned(self.many(len, |c| c.u8().map(u64::from))?),
            1 => Array::Signed(self.many(len, |c| c.i8().map(i64::from))?),
            2 => Array::Unsigned(self.many(len, |c| c.u16().map(u64::from))?),
            3 => Array::Signed(self.many(len, |c| c.i16().map(i64::from))?),
            4 => Array::Unsigned(self.many(len, |c| c.u32().map(u64::from))?),
            5 => Array::Signed(self.many(len, |c| c.i32().map(i64::from))?),
            6 => Array::Float(self.many(len, |c| c.f32().map(f64::from))?),
            7 => Array::Bool(self.many(len, Self::bool)?),
            8 => Array::String(self.many(len, Self::string)?),
            9 => Array::Array(self.many(len, |c| c.array(depth + 1))?),
            10 => Array::Unsigned(self.many(len, Self::u64)?),
            11 => Array::Signed(self.many(len, Self::i64)?),
            12 => Array::Float(self.many(len, Self::f64)?),
            other => return Err(format!("its elements are of the unknown type {other}")),
        })
    }

    /// `len` elements, of a byte each at the least.
    fn many<T>(&mut self, len: u64, mut read: impl FnMut(&mut Self) -> Result<T>) -> Result<Vec<T>> {
        if len > self.left() as u64 {
            return Err(format!("an array claims {len} elements, where {} bytes are left", self.left()));
        }
        let mut elements = Vec::new();
        for i in 0..len {
            elements.push(read(self).map_err(|what| format!("element {i} of {len}: {what}"))?);
        }
        Ok(elements)
    }
}
