//! The IDX format of the MNIST family, plain or gzipped: a magic number that names the element type and the
//! number of dimensions, the sizes as big-endian u32, then the elements in big-endian order.

use super::error;
use flate2::read::MultiGzDecoder;
use kiln_tensor::Result;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

/// The largest content that is read: a file that claims more is refused.
pub const MAX_BYTES: u64 = 4 << 30;

/// Deflate turns at most 1032 bytes into one (two bits for a match of 258 bytes): a file that claims more lies.
const MAX_DEFLATE_RATIO: u64 = 1032;

/// What is read in one step, so that memory grows with what is there and not with what is claimed.
const STEP: u64 = 1 << 20;

/// An IDX file's element type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IdxType {
    /// 0x08, unsigned byte.
    U8,
    /// 0x09, signed byte.
    I8,
    /// 0x0B, short.
    I16,
    /// 0x0C, int.
    I32,
    /// 0x0D, float.
    F32,
    /// 0x0E, double.
    F64,
}

impl IdxType {
    fn from_code(code: u8) -> Option<Self> {
        Some(match code {
            0x08 => Self::U8,
            0x09 => Self::I8,
            0x0B => Self::I16,
            0x0C => Self::I32,
            0x0D => Self::F32,
            0x0E => Self::F64,
            _ => return None,
        })
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::I16 => 2,
            Self::I32 | Self::F32 => 4,
            Self::F64 => 8,
        }
    }
}

/// The elements of an IDX file, row-major.
#[derive(Clone, Debug, PartialEq)]
pub enum IdxData {
    /// Unsigned bytes.
    U8(Vec<u8>),
    /// Signed bytes.
    I8(Vec<i8>),
    /// 16-bit integers.
    I16(Vec<i16>),
    /// 32-bit integers.
    I32(Vec<i32>),
    /// Single precision.
    F32(Vec<f32>),
    /// Double precision.
    F64(Vec<f64>),
}

/// The content of an IDX file.
#[derive(Clone, Debug, PartialEq)]
pub struct Idx {
    /// The sizes, slowest first; at most 255 dimensions.
    pub shape: Vec<usize>,
    /// The elements, as many as the product of `shape`.
    pub data: IdxData,
}

/// Reads the IDX file at `path`; gzip is recognised by its first two bytes, whatever the name.
///
/// # Errors
/// If the file cannot be read, is no IDX file, claims more than it can hold or than [`MAX_BYTES`],
/// is cut short, or goes on after its last element.
pub fn read_idx(path: impl AsRef<Path>) -> Result<Idx> {
    IdxReader::open(path)?.read()
}

/// Reads IDX from `bytes` (plain or gzipped) as [`read_idx`] does from a file; `name` stands for the path in errors.
///
/// # Errors
/// As [`read_idx`].
pub fn parse_idx(bytes: &[u8], name: impl AsRef<Path>) -> Result<Idx> {
    IdxReader::new(bytes, bytes.len() as u64, name.as_ref())?.read()
}

/// An IDX file whose header has been read and checked and whose elements have not: look at the shape first.
pub struct IdxReader<'a> {
    path: PathBuf,
    shape: Vec<usize>,
    dtype: IdxType,
    bytes: u64,
    content: Box<dyn Read + 'a>,
}

impl IdxReader<'static> {
    /// Opens the file at `path` and reads its header.
    ///
    /// # Errors
    /// If the file cannot be opened or its header is wrong or claims more than the file can hold.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|e| error::io("open", path, e))?;
        let size = file.metadata().map_err(|e| error::io("read the size of", path, e))?.len();
        IdxReader::new(BufReader::new(file), size, path)
    }
}

impl<'a> IdxReader<'a> {
    /// Reads the header from `input`, which holds `size` bytes.
    fn new(mut input: impl Read + 'a, size: u64, path: &Path) -> Result<Self> {
        let mut first = [0; 2];
        read_field(&mut input, &mut first, path, "magic number")?;
        let gzip = first == [0x1f, 0x8b];
        let whole = std::io::Cursor::new(first).chain(input);
        let (mut content, limit): (Box<dyn Read + 'a>, u64) =
            if gzip { (Box::new(MultiGzDecoder::new(whole)), size.saturating_mul(MAX_DEFLATE_RATIO)) } else { (Box::new(whole), size) };
        let mut magic = [0; 4];
        read_field(&mut content, &mut magic, path, "magic number")?;
        let dtype = match magic {
            [0, 0, code, _] => IdxType::from_code(code),
            _ => None,
        };
        let dtype = dtype.ok_or_else(|| {
            let found = u32::from_be_bytes(magic);
            error::format(path, "magic number", format!("found {found:#010x}, expected 0x0000TTDD with type TT of 08, 09, 0b, 0c, 0d, 0e"))
        })?;
        let mut shape = Vec::with_capacity(usize::from(magic[3]));
        let mut bytes = dtype.size() as u64;
        for _ in 0..magic[3] {
            let mut dimension = [0; 4];
            read_field(&mut content, &mut dimension, path, "dimensions")?;
            let dimension = u32::from_be_bytes(dimension);
            bytes = bytes.saturating_mul(u64::from(dimension));
            shape.push(dimension as usize);
        }
        let limit = limit.saturating_sub(4 + 4 * shape.len() as u64);
        if bytes > limit.min(MAX_BYTES) {
            let problem = format!("{shape:?} of {dtype:?} takes {bytes} bytes, but the file can hold at most {}", limit.min(MAX_BYTES));
            return Err(error::format(path, "dimensions", problem));
        }
        Ok(Self { path: path.to_owned(), shape, dtype, bytes, content })
    }

    /// The sizes that the header claims, slowest first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The element type.
    pub fn dtype(&self) -> IdxType {
        self.dtype
    }

    /// Reads the elements.
    ///
    /// # Errors
    /// If the file ends before or goes on after the elements that its header claims, or is corrupt gzip.
    pub fn read(mut self) -> Result<Idx> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < self.bytes {
            let step = STEP.min(self.bytes - bytes.len() as u64);
            let got = (&mut self.content).take(step).read_to_end(&mut bytes).map_err(|e| error::io("read", &self.path, e))?;
            if got == 0 {
                let problem = format!("the file ends after {} of the {} bytes that shape {:?} takes", bytes.len(), self.bytes, self.shape);
                return Err(error::format(&self.path, "elements", problem));
            }
        }
        // Reading to the end also makes gzip check its checksum.
        let rest = self.content.read(&mut [0; 1]).map_err(|e| error::io("read", &self.path, e))?;
        if rest != 0 {
            let problem = format!("the file goes on after the {} bytes that shape {:?} takes", self.bytes, self.shape);
            return Err(error::format(&self.path, "elements", problem));
        }
        Ok(Idx { shape: self.shape, data: decode(self.dtype, bytes) })
    }
}

/// Fills `field` from `input`, or says which field the file is too short for.
fn read_field(input: &mut impl Read, field: &mut [u8], path: &Path, name: &'static str) -> Result<()> {
    input.read_exact(field).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => error::format(path, name, "the file ends within it"),
        _ => error::io("read", path, e),
    })
}

/// Big-endian bytes to elements.
fn decode(dtype: IdxType, bytes: Vec<u8>) -> IdxData {
    fn words<const N: usize, T>(bytes: &[u8], from: fn([u8; N]) -> T) -> Vec<T> {
        bytes.as_chunks::<N>().0.iter().map(|&word| from(word)).collect()
    }
    match dtype {
        IdxType::U8 => IdxData::U8(bytes),
        IdxType::I8 => IdxData::I8(words(&bytes, i8::from_be_bytes)),
        IdxType::I16 => IdxData::I16(words(&bytes, i16::from_be_bytes)),
        IdxType::I32 => IdxData::I32(words(&bytes, i32::from_be_bytes)),
        IdxType::F32 => IdxData::F32(words(&bytes, f32::from_be_bytes)),
        IdxType::F64 => IdxData::F64(words(&bytes, f64::from_be_bytes)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(code: u8, shape: &[u32], elements: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0, 0, code, shape.len() as u8];
        shape.iter().for_each(|d| bytes.extend(d.to_be_bytes()));
        bytes.extend(elements);
        bytes
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn reads_every_type_plain_and_gzipped() {
        let cases = [
            (file(0x08, &[2], &[1, 255]), IdxData::U8(vec![1, 255])),
            (file(0x09, &[2], &[1, 255]), IdxData::I8(vec![1, -1])),
            (file(0x0B, &[1], &(-300i16).to_be_bytes()), IdxData::I16(vec![-300])),
            (file(0x0C, &[1], &(-70_000i32).to_be_bytes()), IdxData::I32(vec![-70_000])),
            (file(0x0D, &[1], &1.5f32.to_be_bytes()), IdxData::F32(vec![1.5])),
            (file(0x0E, &[1], &(-2.5f64).to_be_bytes()), IdxData::F64(vec![-2.5])),
        ];
        for (bytes, expected) in cases {
            assert_eq!(parse_idx(&bytes, "x").unwrap().data, expected);
            assert_eq!(parse_idx(&gzip(&bytes), "x").unwrap().data, expected);
        }
        let empty = parse_idx(&file(0x08, &[0, 28, 28], &[]), "x").unwrap();
        assert_eq!((empty.shape, empty.data), (vec![0, 28, 28], IdxData::U8(vec![])));
    }

    #[test]
    fn says_what_is_wrong() {
        let error = |bytes: &[u8]| parse_idx(bytes, "digits.idx").err().unwrap().to_string();
        assert_eq!(error(&[0]), "read: digits.idx: magic number: the file ends within it");
        assert!(error(&[1, 2, 3, 4]).contains("found 0x01020304"));
        assert!(error(&[0, 0, 8, 2, 0, 0]).contains("dimensions: the file ends within it"));
        assert!(error(&file(8, &[u32::MAX, u32::MAX, u32::MAX], &[])).contains("can hold at most 0"));
        assert!(error(&file(8, &[3], &[1, 2])).contains("takes 3 bytes"));
        assert!(error(&file(8, &[1], &[1, 2])).contains("goes on after the 1 bytes"));
        assert!(error(&gzip(&file(8, &[3], &[1, 2]))).contains("ends after 2 of the 3 bytes"));
        let mut corrupt = gzip(&file(8, &[3], &[1, 2, 3]));
        let last = corrupt.len() - 5;
        corrupt[last] ^= 1;
        assert!(error(&corrupt).contains("read: digits.idx"));
    }
}
