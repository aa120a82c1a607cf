//! Rotary position embedding, and the tables of angles that it takes.

use crate::graph::{Ctx, Grads, Op, record};
use crate::profile::{Cost, operation};
use crate::{DType, Error, Layout, Result, Shape, Tensor};
use kiln_kernels::cpu::rotary::{self, Rotary, Tables};
use kiln_kernels::cuda::rotary as gpu_rotary;
use kiln_kernels::view::StridedView;

/// The gradient turns back; those of the tables are in plain operations.
struct Rotate {
    rotary: Rotary,
    /// Only for the tables' gradients.
    x: Option<Tensor>,
    cos: Tensor,
    sin: Tensor,
}

impl Op for Rotate {
    fn name(&self) -> &'static str {
        "rotary_embedding"
    }
    fn vjp(&self, ctx: &Ctx, grad: &Tensor) -> Result<Grads> {
        let back = Rotary { inverse: !self.rotary.inverse, ..self.rotary };
        let dx = ctx.needs(0).then(|| rotate(back, grad, &self.cos, &self.sin)).transpose()?;
        let [cos, sin] = match &self.x {
            Some(x) => self.of_tables(x, grad)?.map(Some),
            None => [None, None],
        };
        Ok(vec![dx, cos.filter(|_| ctx.needs(1)), sin.filter(|_| ctx.needs(2))])
    }
}

impl Rotate {
    /// With pairs (a, b) of x and (u, v) of the gradient: d cos = u·a + v·b and d sin = v·a − u·b.
    fn of_tables(&self, x: &Tensor, grad: &Tensor) -> Result<[Tensor; 2]> {
        let ([a, b], [u, v]) = (self.pairs(x)?, self.pairs(grad)?);
        let cos = u.mul(&a)?.add(&v.mul(&b)?)?;
        let sin = v.mul(&a)?.sub(&u.mul(&b)?)?;
        Ok([cos, if self.rotary.inverse { sin.neg()? } else { sin }])
    }

    /// The first and the second elements of the pairs, in the tables' dtype.
    fn pairs(&self, x: &Tensor) -> Result<[Tensor; 2]> {
        let n = self.cos.dims()[self.cos.rank() - 1];
        let halves = if self.rotary.interleaved {
            let turned = x.narrow(-1, 0, 2 * n)?.reshape([x.dims()[..x.rank() - 1].to_vec(), vec![n, 2]].concat())?;
            [turned.select(-1, 0)?, turned.select(-1, 1)?]
        } else {
            [x.narrow(-1, 0, n)?, x.narrow(-1, n, n)?]
        };
        let [a, b] = halves;
        Ok([a.to_dtype(self.cos.dtype())?, b.to_dtype(self.cos.dtype())?])
    }
}

/// `x`, or a copy of it, whose last dimension's elements are neighbours in memory.
fn with_dense_rows(x: &Tensor) -> Result<Tensor> {
    let is_dense = x.dims().last() == Some(&1) || x.layout().strides().last() == Some(&1);
    if is_dense { Ok(x.detach()) } else { x.detach().contiguous() }
}

/// Turns `x` by checked tables of its accumulator's dtype, and records it.
fn rotate(rotary: Rotary, x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let op = "rotary_embedding";
    let _running = operation(op, &[x, cos, sin], || Cost::per_element(3));
    let pairs = cos.dims()[cos.rank() - 1];
    let table_shape = Shape::new(&[&x.dims()[..x.rank() - 1], &[pairs]].concat())?;
    let [source, dense_cos, dense_sin] = [with_dense_rows(x)?, with_dense_rows(cos)?, with_dense_rows(sin)?];
    let layouts = [&dense_cos, &dense_sin].map(|table| table.layout().broadcast_to(op, &table_shape));
    let [cos_layout, sin_layout] = layouts;
    let (cos_layout, sin_layout) = (cos_layout?, sin_layout?);
    let out = match x.gpu()? {
        Some(gpu) => Tensor::build_on_gpu(gpu, Layout::contiguous(*x.shape()), x.dtype(), |out| {
            let tables = [dense_cos.gpu_view_as(&cos_layout)?, dense_sin.gpu_view_as(&sin_layout)?];
            Ok(gpu_rotary::rotate(gpu, rotary, tables, source.gpu_view()?, out)?)
        }),
        None => for_float!(x.dtype(), op, T => Tensor::build::<T>(x.device(), x.shape(), |out| {
            fn table<'a, L: crate::WithDType>(table: &'a Tensor, layout: &'a Layout) -> Result<StridedView<'a, L>> {
                let view = StridedView::new(table.view_of::<L>()?.data(), layout.offset(), layout.shape().dims(), layout.strides());
                view.ok_or_else(|| Error::shape("rotary_embedding", format!("layout {layout:?} leaves the storage")))
            }
            let tables = Tables { cos: table(&dense_cos, &cos_layout)?, sin: table(&dense_sin, &sin_layout)? };
            rotary::rotate::<T>(rotary, tables, source.view_of()?, out);
            Ok(())
        })),
    }?;
    record(op, out, &[x, cos, sin], |needs| Rotate {
        rotary,
        x: needs.save_for(1, x).or_else(|| needs.save_for(2, x)),
        cos: cos.clone(),
        sin: sin.clone(),
    })
}

impl Tensor {
    /// Rotary position embedding: the pairs (a, b) of the last dimension are turned by the angles of a table,
    /// (a·cos θ − b·sin θ, b·cos θ + a·sin θ).
    ///
    /// `cos` and `sin`, from [`rotary_tables`](Tensor::rotary_tables), have an angle for each pair, `[.., pairs]`, and broadcast to the other
    /// dimensions of the input: tables `[positions, pairs]` fit `[batch, heads, positions, width]`, and `[positions, 1, pairs]` fit
    /// `[batch, positions, heads, width]`. The first 2·pairs elements are turned, the rest of the width stays (partial rotary embedding). If
    /// `interleaved`, elements 2i and 2i + 1 are a pair, as in GPT-J; if not, i and i + pairs, as in GPT-NeoX and Llama.
    ///
    /// Float dtypes; f16 and bf16 compute in f32, with tables of f32, and round once. The result is row-major. Gradients flow to the tables, too.
    ///
    /// Source: Su et al., *RoFormer: Enhanced Transformer with Rotary Position Embedding*, 2021.
    ///
    /// ```
    /// # use kiln_tensor::{DType, Result, Tensor};
    /// # fn main() -> Result<()> {
    /// let positions = Tensor::arange(0.0, 6.0, 1.0, DType::I64)?;
    /// let (cos, sin) = positions.rotary_tables(&Tensor::rotary_frequencies(8, 10_000.0)?)?;
    /// let q = Tensor::randn([2, 3, 6, 8], ())?; // (B, nh, T, hs)
    /// assert_eq!(q.rotary_embedding(&cos, &sin, false)?.dims(), [2, 3, 6, 8]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// If the tables' shapes differ, do not broadcast to the input's other dimensions, or have more pairs than the last dimension; or if a dtype is
    /// no float.
    pub fn rotary_embedding(&self, cos: &Tensor, sin: &Tensor, interleaved: bool) -> Result<Tensor> {
        let op = "rotary_embedding";
        if !self.dtype().is_float() {
            return Err(Error::unsupported_dtype(op, self.dtype(), "a float dtype"));
        }
        let (Some(&width), Some(&pairs)) = (self.dims().last(), cos.dims().last()) else {
            return Err(Error::shape(op, format!("needs at least one dimension, got {} and tables of {}", self.shape(), cos.shape())));
        };
        if cos.shape() != sin.shape() || 2 * pairs > width {
            let message = format!(
                "tables {} and {} must have one shape, with at most half as many angles as the last dimension of {}",
                cos.shape(),
                sin.shape(),
                self.shape()
            );
            return Err(Error::shape(op, message));
        }
        if let Some(table) = [cos, sin].into_iter().find(|table| table.device() != self.device()) {
            return Err(Error::device_mismatch(op, self.device(), table.device()));
        }
        let dtype = self.dtype().accumulator();
        let rotary = Rotary { interleaved, inverse: false };
        rotate(rotary, self, &cos.to_dtype(dtype)?, &sin.to_dtype(dtype)?)
    }

    /// The frequencies base^(−2i/width), i < width/2, of a [rotary embedding](Tensor::rotary_embedding) of `width` elements, in f64. Scaled variants
    /// (linear, NTK, YaRN, Llama 3's) change these numbers, and nothing else.
    ///
    /// # Errors
    /// If the width is odd, or the base is not above 0.
    pub fn rotary_frequencies(width: usize, base: f64) -> Result<Tensor> {
        if !width.is_multiple_of(2) || base.is_nan() || base <= 0.0 {
            return Err(Error::argument("rotary_frequencies", format!("width {width} must be even, base {base} above 0")));
        }
        let frequencies: Vec<f64> = (0..width / 2).map(|i| base.powf(-((2 * i) as f64) / width as f64)).collect();
        Tensor::from_vec(frequencies, width / 2)
    }

    /// The tables of a [rotary embedding](Tensor::rotary_embedding) for positions `[..]` and `frequencies` `[pairs]`: cosine and sine of
    /// position · frequency, `[.., pairs]`, computed in f64; they are f64 if the positions are, else f32.
    ///
    /// # Errors
    /// If the frequencies are not a vector, or the positions are bool.
    pub fn rotary_tables(&self, frequencies: &Tensor) -> Result<(Tensor, Tensor)> {
        let op = "rotary_tables";
        frequencies.dims_n::<1>(op)?;
        if self.dtype() == DType::Bool {
            return Err(Error::unsupported_dtype(op, self.dtype(), "positions of a numeric dtype"));
        }
        let angles = self.to_dtype(DType::F64)?.unsqueeze(-1)?.mul(&frequencies.to_dtype(DType::F64)?)?;
        let dtype = self.dtype().accumulator();
        Ok((angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mistakes_are_errors() {
        let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32).unwrap();
        let x = zeros(&[2, 5, 8]);
        for (cos, sin) in [(&[5, 4][..], &[5, 3][..]), (&[5, 5], &[5, 5]), (&[3, 4], &[3, 4]), (&[4, 2, 5, 4], &[4, 2, 5, 4]), (&[], &[])] {
            assert!(x.rotary_embedding(&zeros(cos), &zeros(sin), false).is_err(), "{cos:?}");
        }
        let integers = Tensor::zeros([5, 8], DType::I64).unwrap();
        assert!(integers.rotary_embedding(&zeros(&[5, 4]), &zeros(&[5, 4]), false).is_err());
        assert!(zeros(&[]).rotary_embedding(&zeros(&[1]), &zeros(&[1]), false).is_err());
        assert!(Tensor::rotary_frequencies(7, 1e4).is_err());
        assert!(Tensor::rotary_frequencies(8, 0.0).is_err());
        assert!(x.rotary_tables(&x).is_err());
    }

    #[test]
    fn tables_follow_the_formula() {
        let positions = Tensor::from_vec(vec![0i64, 1, 5000], 3).unwrap();
        let (cos, sin) = positions.rotary_tables(&Tensor::rotary_frequencies(4, 10_000.0).unwrap()).unwrap();
        assert_eq!((cos.dtype(), cos.dims()), (DType::F32, &[3, 2][..]));
        let expected: Vec<f32> = [0.0f64, 1.0, 5000.0].iter().flat_map(|p| [p.cos() as f32, (p / 100.0).cos() as f32]).collect();
        assert_eq!(cos.to_vec::<f32>().unwrap(), expected);
        assert_eq!(sin.to_vec::<f32>().unwrap()[4], 5000f64.sin() as f32);
    }
}
