//! Printing in NumPy's manner.

use crate::{DType, Tensor};
use std::fmt;

/// More elements than this are summarised: the first and last [`EDGE`] of each dimension, with dots between.
const THRESHOLD: usize = 1000;
const EDGE: usize = 3;

/// How floats of one tensor are written: NumPy picks one form for all of them.
#[derive(Clone, Copy)]
enum Style {
    Integer,
    Fixed { digits: usize },
    Scientific,
}

fn pick_style(values: &[f64], dtype: DType) -> Style {
    if !dtype.is_float() {
        return Style::Integer;
    }
    let finite = || values.iter().map(|v| v.abs()).filter(|v| v.is_finite() && *v != 0.0);
    let (max, min) = (finite().fold(0.0, f64::max), finite().fold(f64::INFINITY, f64::min));
    if max >= 1e8 || (max > 0.0 && min < 1e-4) {
        return Style::Scientific;
    }
    // As few digits as tell all values apart, at most four.
    let digits = (0..4).find(|&digits| finite().all(|v| (v * 10f64.powi(digits) - (v * 10f64.powi(digits)).round()).abs() < 1e-9));
    Style::Fixed { digits: digits.unwrap_or(4) as usize }
}

fn format_value(value: f64, style: Style, dtype: DType) -> String {
    match style {
        _ if dtype == DType::Bool => (value != 0.0).to_string(),
        _ if value.is_nan() => "nan".into(),
        _ if value.is_infinite() => if value > 0.0 { "inf" } else { "-inf" }.into(),
        Style::Integer => format!("{value}"),
        Style::Fixed { digits: 0 } => format!("{value:.0}."),
        Style::Fixed { digits } => format!("{value:.digits$}"),
        Style::Scientific => format!("{value:.4e}"),
    }
}

/// The indices of a dimension that are shown, and where the dots go.
fn shown(extent: usize, summarise: bool) -> Vec<Option<usize>> {
    if !summarise || extent <= 2 * EDGE {
        return (0..extent).map(Some).collect();
    }
    (0..EDGE).map(Some).chain([None]).chain((extent - EDGE..extent).map(Some)).collect()
}

struct Printer<'a> {
    tensor: &'a Tensor,
    summarise: bool,
    cells: Vec<String>,
    width: usize,
}

impl Printer<'_> {
    fn gather(&self, dim: usize, at: usize, out: &mut Vec<usize>) {
        let layout = self.tensor.layout();
        if dim == self.tensor.rank() {
            out.push(at);
            return;
        }
        for i in shown(self.tensor.dims()[dim], self.summarise).into_iter().flatten() {
            self.gather(dim + 1, at + i * layout.strides()[dim], out);
        }
    }

    fn write(&self, f: &mut fmt::Formatter<'_>, dim: usize, indent: usize, next: &mut usize) -> fmt::Result {
        if dim == self.tensor.rank() {
            write!(f, "{:>width$}", self.cells[*next], width = self.width)?;
            *next += 1;
            return Ok(());
        }
        f.write_str("[")?;
        let last = dim + 1 == self.tensor.rank();
        for (i, index) in shown(self.tensor.dims()[dim], self.summarise).into_iter().enumerate() {
            if i > 0 && last {
                f.write_str(", ")?;
            } else if i > 0 {
                // A blank line more for each dimension above the rows.
                write!(f, ",{}{}", "\n".repeat(self.tensor.rank() - dim - 1), " ".repeat(indent + 1))?;
            }
            match index {
                Some(_) => self.write(f, dim + 1, indent + 1, next)?,
                None => f.write_str("...")?,
            }
        }
        f.write_str("]")
    }
}

impl fmt::Display for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut printer = Printer { tensor: self, summarise: !(1..=THRESHOLD).contains(&self.numel()), cells: Vec::new(), width: 0 };
        let mut at = Vec::new();
        printer.gather(0, self.layout().offset(), &mut at);
        let values = self.storage_values(&at);
        let style = pick_style(&values, self.dtype());
        printer.cells = values.into_iter().map(|v| format_value(v, style, self.dtype())).collect();
        printer.width = printer.cells.iter().map(String::len).max().unwrap_or(0);
        printer.write(f, 0, 0, &mut 0)
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The indentation of the rows must follow the prefix, as NumPy does.
        write!(f, "tensor(")?;
        let text = self.to_string().replace('\n', "\n       ");
        write!(f, "{text}, {}{})", self.dtype(), if self.is_tracked() { ", tracked" } else { "" })
    }
}

impl Tensor {
    /// The values at these places of the storage, as f64; nothing if a place lies outside.
    fn storage_values(&self, at: &[usize]) -> Vec<f64> {
        use kiln_kernels::element::Element;
        for_any!(self.dtype(), T => {
            let Ok(data) = self.storage().host().map(|host| host.as_slice::<T>()) else { return Vec::new() };
            at.iter().filter_map(|&i| data.get(i)).map(|v| v.to_f64()).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use crate::{DType, Result, Tensor};

    #[test]
    fn prints_like_numpy() -> Result<()> {
        let x = Tensor::from_vec(vec![1f32, 2.5, -3.0, 4.0, 5.0, 600.0], [2, 3])?;
        assert_eq!(x.to_string(), "[[  1.0,   2.5,  -3.0],\n [  4.0,   5.0, 600.0]]");
        assert_eq!(Tensor::from_vec(vec![1f32, 2.0], 2)?.to_string(), "[1., 2.]");
        assert_eq!(Tensor::scalar(3.0, DType::I64)?.to_string(), "3");
        assert_eq!(Tensor::from_vec(vec![true, false], 2)?.to_string(), "[ true, false]");
        assert_eq!(Tensor::zeros([0, 3], ())?.to_string(), "[]");
        assert_eq!(Tensor::from_vec(vec![f32::NAN, 1e-9], 2)?.to_string(), "[      nan, 1.0000e-9]");
        assert_eq!(Tensor::arange(0., 2000., 1., DType::I32)?.to_string(), "[   0,    1,    2, ..., 1997, 1998, 1999]");
        let cube = Tensor::zeros([2, 2, 1], DType::U8)?;
        assert_eq!(cube.to_string(), "[[[0],\n  [0]],\n\n [[0],\n  [0]]]");
        assert_eq!(format!("{:?}", x.requires_grad_()?), "tensor([[  1.0,   2.5,  -3.0],\n        [  4.0,   5.0, 600.0]], f32, tracked)");
        Ok(())
    }
}
