//! NumPy's npy format: one array behind a header that is a Python dictionary.
//!
//! NumPy has no bfloat16: as the `ml_dtypes` package does, it is written as the raw type `V2`, and `V2` is read as it.

use super::{tensor_from_bytes, with_bytes, write_atomic};
use crate::{DType, Error, Result, Shape, Tensor};
use std::fs::File;
use std::io::{BufReader, Read, Write};
use std::path::Path;

const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// A header that is longer is refused: one of the most dimensions takes some 250 bytes.
const MAX_HEADER: usize = 1 << 16;
/// The format asks that data starts at a multiple of this.
const ALIGN: usize = 64;

/// Reads the npy file at `path`. An array in Fortran order comes as a transposed view.
///
/// # Errors
/// If the file cannot be read, is no npy file, is of a dtype that Kiln does not have, or is longer or shorter than it claims.
pub fn load(path: impl AsRef<Path>) -> Result<Tensor> {
    let path = path.as_ref();
    let failed = |e| Error::io("load", path.display(), e);
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    read(&mut BufReader::new(file), size, size, &path.display().to_string())
}

/// Saves `tensor` at `path`, row-major, all or nothing (see [`write_atomic`]).
///
/// # Errors
/// If the file cannot be written.
pub fn save(path: impl AsRef<Path>, tensor: &Tensor) -> Result<()> {
    let path = path.as_ref();
    write_atomic(path, |file| write(file, tensor, &path.display().to_string()))
}

/// Writes `tensor` in the format's version 1.0; `name` is what errors call the file.
pub(super) fn write(out: &mut impl Write, tensor: &Tensor, name: &str) -> Result<()> {
    let mut shape: String = tensor.dims().iter().map(|d| format!("{d}, ")).collect();
    if tensor.rank() > 1 {
        shape.truncate(shape.len() - 2);
    }
    let descr = descr(tensor.dtype());
    let mut header = format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({}), }}", shape.trim_end());
    let prefix = MAGIC.len() + 4;
    let length = (prefix + header.len() + 1).next_multiple_of(ALIGN) - prefix;
    header.push_str(&" ".repeat(length - 1 - header.len()));
    header.push('\n');
    let mut put = |bytes: &[u8]| out.write_all(bytes).map_err(|e| Error::io("save", name, e));
    put(MAGIC)?;
    put(&[1, 0])?;
    // Eight dimensions of twenty digits stay far below the 65,535 bytes of version 1.0.
    put(&(length as u16).to_le_bytes())?;
    put(header.as_bytes())?;
    with_bytes(tensor, put)
}

/// Reads an array from `input`, which holds `size` bytes if it tells the truth and `most` at the very most.
pub(super) fn read(input: &mut impl Read, size: u64, most: u64, name: &str) -> Result<Tensor> {
    let wrong = |what: String| Error::format("load", format!("{name}: {what}"));
    let mut start = [0; 8];
    fill(input, &mut start, name, "magic number")?;
    if &start[..6] != MAGIC {
        return Err(wrong("magic number: this is no npy file".to_owned()));
    }
    let (prefix, length) = match start[6] {
        1 => {
            let mut length = [0; 2];
            fill(input, &mut length, name, "header length")?;
            (10, u16::from_le_bytes(length) as usize)
        }
        2 | 3 => {
            let mut length = [0; 4];
            fill(input, &mut length, name, "header length")?;
            (12, u32::from_le_bytes(length) as usize)
        }
        version => return Err(wrong(format!("version {version} is not supported, expected 1 to 3"))),
    };
    if length > MAX_HEADER {
        return Err(wrong(format!("header length: {length} bytes are more than the {MAX_HEADER} allowed")));
    }
    let mut header = vec![0; length];
    fill(input, &mut header, name, "header")?;
    let text = std::str::from_utf8(&header).map_err(|e| wrong(format!("header: {e}")))?;
    let header = Header::parse(text).map_err(|what| wrong(format!("header: {what}")))?;
    let claimed = header.elements().and_then(|n| n.checked_mul(header.dtype.size())).map(|bytes| bytes as u64);
    let claimed = claimed.filter(|&bytes| bytes.checked_add(prefix + length as u64) == Some(size) && size <= most);
    if claimed.is_none() {
        let data = size.saturating_sub(prefix + length as u64);
        return Err(wrong(format!("shape {:?} of {} does not fit the file, which holds {data} bytes of data", header.shape, header.dtype)));
    }
    array(header, |out| fill(input, out, name, "data"))
}

/// The tensor that `header` describes, its bytes in the file's order written by `fill`.
fn array(header: Header, fill: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<Tensor> {
    let mut shape = header.shape;
    if header.fortran {
        shape.reverse();
    }
    let tensor = tensor_from_bytes(header.dtype, Shape::new(&shape)?, |out| {
        fill(out)?;
        if !header.little {
            // Back to little-endian, which is what the caller of this closure expects.
            out.chunks_exact_mut(header.dtype.size()).for_each(<[u8]>::reverse);
        }
        Ok(())
    })?;
    let reversed: Vec<isize> = (0..shape.len() as isize).rev().collect();
    if header.fortran { tensor.permute(&reversed) } else { Ok(tensor) }
}

fn fill(input: &mut impl Read, out: &mut [u8], name: &str, field: &str) -> Result<()> {
    input.read_exact(out).map_err(|e| match e.kind() {
        std::io::ErrorKind::UnexpectedEof => Error::format("load", format!("{name}: the file ends within its {field}")),
        _ => Error::io("load", name, e),
    })
}

/// NumPy's name of a dtype, little-endian.
fn descr(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "<f4",
        DType::F64 => "<f8",
        DType::F16 => "<f2",
        DType::BF16 => "<V2",
        DType::I64 => "<i8",
        DType::I32 => "<i4",
        DType::U8 => "|u1",
        DType::Bool => "|b1",
    }
}

/// What a header says.
#[derive(Debug, PartialEq)]
struct Header {
    dtype: DType,
    little: bool,
    fortran: bool,
    shape: Vec<usize>,
}

impl Header {
    /// Parses the dictionary of the three keys, in any order.
    fn parse(text: &str) -> std::result::Result<Self, String> {
        let mut rest = Scanner(text.trim());
        let (mut dtype, mut fortran, mut shape) = (None, None, None);
        rest.expect("{")?;
        while !rest.take("}") {
            let key = rest.string()?;
            rest.expect(":")?;
            match key {
                "descr" => dtype = Some(parse_descr(rest.string()?)?),
                "fortran_order" => fortran = Some(rest.boolean()?),
                "shape" => shape = Some(rest.tuple()?),
                other => return Err(format!("unknown key {other:?}")),
            }
            if !rest.take(",") {
                rest.expect("}")?;
                break;
            }
        }
        match (dtype, fortran, shape, rest.0.trim()) {
            (Some((dtype, little)), Some(fortran), Some(shape), "") => Ok(Self { dtype, little, fortran, shape }),
            _ => Err("expected exactly the keys 'descr', 'fortran_order' and 'shape'".to_owned()),
        }
    }

    fn elements(&self) -> Option<usize> {
        Shape::new(&self.shape).ok().map(|shape| shape.numel())
    }
}

/// The dtype and whether it is little-endian.
fn parse_descr(text: &str) -> std::result::Result<(DType, bool), String> {
    let unknown = || format!("dtype {text:?} is not supported");
    let (order, kind) = text.split_at_checked(1).ok_or_else(unknown)?;
    let little = match order {
        "<" | "|" => true,
        "=" => cfg!(target_endian = "little"),
        ">" => false,
        _ => return Err(unknown()),
    };
    let dtype = DType::ALL.into_iter().find(|&dtype| &descr(dtype)[1..] == kind).ok_or_else(unknown)?;
    Ok((dtype, little))
}

/// The part of a header that is still to be read.
struct Scanner<'a>(&'a str);

impl<'a> Scanner<'a> {
    fn take(&mut self, token: &str) -> bool {
        let rest = self.0.trim_start();
        let found = rest.strip_prefix(token);
        self.0 = found.unwrap_or(rest);
        found.is_some()
    }

    fn expect(&mut self, token: &str) -> std::result::Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(format!("expected {token:?} before {:?}", self.ahead())) }
    }

    /// What comes next, for errors.
    fn ahead(&self) -> String {
        self.0.chars().take(20).collect()
    }

    fn string(&mut self) -> std::result::Result<&'a str, String> {
        let quote = if self.take("'") {
            '\''
        } else if self.take("\"") {
            '"'
        } else {
            return Err(format!("expected a string at {:?}", self.ahead()));
        };
        let (text, rest) = self.0.split_once(quote).ok_or("a string has no end")?;
        self.0 = rest;
        Ok(text)
    }

    fn boolean(&mut self) -> std::result::Result<bool, String> {
        if self.take("True") { Ok(true) } else { self.expect("False").map(|()| false) }
    }

    fn tuple(&mut self) -> std::result::Result<Vec<usize>, String> {
        self.expect("(")?;
        let mut numbers = Vec::new();
        while !self.take(")") {
            let end = self.0.find(|c: char| !c.is_ascii_digit()).unwrap_or(self.0.len());
            let (digits, rest) = self.0.split_at(end);
            numbers.push(digits.parse().map_err(|_| format!("expected a size at {:?}", self.ahead()))?);
            // Python 2 wrote long integers with an L.
            self.0 = rest.strip_prefix('L').unwrap_or(rest);
            if !self.take(",") {
                self.expect(")")?;
                break;
            }
        }
        Ok(numbers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_of_any_spelling() {
        let header = Header::parse("{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }   \n").unwrap();
        assert_eq!(header, Header { dtype: DType::F32, little: true, fortran: false, shape: vec![3, 4] });
        let header = Header::parse("{\"shape\":(7L,),'fortran_order':True,'descr':'>i8'}").unwrap();
        assert_eq!(header, Header { dtype: DType::I64, little: false, fortran: true, shape: vec![7] });
        assert_eq!(Header::parse("{'descr':'|b1','fortran_order':False,'shape':()}").unwrap().shape, Vec::<usize>::new());
        for wrong in ["", "{}", "{'descr': '<c8', 'fortran_order': False, 'shape': ()}", "{'descr': '<f4', 'shape': (-1,), ", "{'descr'"] {
            assert!(Header::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn big_endian_and_fortran_order_are_undone() {
        let mut file = MAGIC.to_vec();
        let header = "{'descr': '>i4', 'fortran_order': True, 'shape': (2, 3), }\n";
        file.extend([2, 0]);
        file.extend((header.len() as u32).to_le_bytes());
        file.extend(header.as_bytes());
        for value in [0i32, 10, 1, 11, 2, 12] {
            file.extend(value.to_be_bytes());
        }
        let size = file.len() as u64;
        let tensor = read(&mut file.as_slice(), size, size, "x").unwrap();
        assert_eq!(tensor.to_vec::<i32>().unwrap(), [0, 1, 2, 10, 11, 12]);
        let error = read(&mut file.as_slice(), size + 4, size + 4, "x").unwrap_err();
        assert!(error.to_string().contains("holds 28 bytes of data"), "{error}");
    }
}
