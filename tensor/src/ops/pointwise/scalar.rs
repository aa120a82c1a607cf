//! A tensor and a number, which takes the tensor's dtype. A number that an integer dtype cannot hold is an error.

use super::kernel::{Arg, apply, holds, map, record_input, record_linear};
use crate::autocast::raised;
use crate::{Error, Result, Tensor};
use kiln_kernels::pointwise::{Row, binary, unary};

/// An error if `value` is not a number of the integer dtype that `x` has.
fn expect_representable(op: &'static str, x: &Tensor, value: f64) -> Result<()> {
    if !x.dtype().is_float() && !holds(x.dtype(), value) {
        return Err(Error::argument(op, format!("{value} is no {}; convert the tensor with .to_dtype(..)", x.dtype())));
    }
    Ok(())
}

/// `row(x, value)`.
fn with_scalar(row: &Row<2>, x: &Tensor, value: f64) -> Result<Tensor> {
    expect_representable(row.name, x, value)?;
    apply(row, [0.0; 2], [Arg::Tensor(x), Arg::Scalar(value)])
}

/// `row(value, x)`.
fn from_scalar(row: &Row<2>, value: f64, x: &Tensor) -> Result<Tensor> {
    expect_representable(row.name, x, value)?;
    apply(row, [0.0; 2], [Arg::Scalar(value), Arg::Tensor(x)])
}

impl Tensor {
    /// x + value.
    pub fn add_scalar(&self, value: f64) -> Result<Tensor> {
        // An unsigned dtype has no negative number to add, but it can be subtracted.
        let negative = !self.dtype().is_float() && value < 0.0;
        let out = if negative { with_scalar(binary::Sub::ROW, self, -value)? } else { with_scalar(binary::Add::ROW, self, value)? };
        record_linear("add_scalar", out, self, |g| Ok(g.clone()))
    }

    /// x − value.
    pub fn sub_scalar(&self, value: f64) -> Result<Tensor> {
        self.add_scalar(-value)
    }

    /// value − x.
    pub fn rsub_scalar(&self, value: f64) -> Result<Tensor> {
        record_linear("rsub_scalar", from_scalar(binary::Sub::ROW, value, self)?, self, |g| g.neg())
    }

    /// x · value.
    pub fn mul_scalar(&self, value: f64) -> Result<Tensor> {
        record_linear("mul_scalar", with_scalar(binary::Mul::ROW, self, value)?, self, move |g| g.mul_scalar(value))
    }

    /// x / value. Integers round towards zero; 0 is an error for them.
    pub fn div_scalar(&self, value: f64) -> Result<Tensor> {
        if !self.dtype().is_float() && value == 0.0 {
            return Err(Error::argument("div", format!("an integer tensor of shape {} divided by 0", self.shape())));
        }
        record_linear("div_scalar", with_scalar(binary::Div::ROW, self, value)?, self, move |g| g.div_scalar(value))
    }

    /// value / x. Float dtypes.
    pub fn rdiv_scalar(&self, value: f64) -> Result<Tensor> {
        if !self.dtype().is_float() {
            return Err(Error::unsupported_dtype("div", self.dtype(), "a float dtype"));
        }
        let out = from_scalar(binary::Div::ROW, value, self)?;
        record_input("rdiv_scalar", out, self, None, move |x, g| g.mul(&x.recip()?.square()?)?.mul_scalar(-value))
    }

    /// x^exponent. Float dtypes. The derivative of x⁰ is 0 everywhere.
    pub fn powf(&self, exponent: f64) -> Result<Tensor> {
        if !self.dtype().is_float() {
            return Err(Error::unsupported_dtype("powf", self.dtype(), "a float dtype"));
        }
        let x = &*raised(self)?;
        // Exact where the general power is not, or nearly so, and faster.
        let out = if exponent == 2.0 {
            map(x, unary::Square::ROW)?
        } else if exponent == 3.0 {
            map(x, unary::Cube::ROW)?
        } else if exponent == -1.0 {
            map(x, unary::Recip::ROW)?
        } else if exponent == 0.5 {
            map(x, unary::Sqrt::ROW)?
        } else {
            with_scalar(binary::Pow::ROW, x, exponent)?
        };
        record_input("powf", out, x, None, move |x, g| match exponent {
            0.0 => x.detach().zeros_like(),
            1.0 => Ok(g.clone()),
            2.0 => g.mul(x)?.mul_scalar(2.0),
            _ => g.mul(&x.powf(exponent - 1.0)?)?.mul_scalar(exponent),
        })
    }
}
