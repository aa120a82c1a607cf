//! A tensor and a number, which takes the tensor's dtype. A number that an integer dtype cannot hold is an error.

use super::kernel::{map, map_number, record_input, record_linear};
use crate::{Error, Result, Tensor};

/// An error if `value` is not a whole number while `x` holds integers.
fn expect_representable(op: &'static str, x: &Tensor, value: f64) -> Result<()> {
    if !x.dtype().is_float() && (value.fract() != 0.0 || !value.is_finite()) {
        return Err(Error::argument(op, format!("{value} is no {}; convert the tensor with .to_dtype(..)", x.dtype())));
    }
    Ok(())
}

impl Tensor {
    /// x + value.
    pub fn add_scalar(&self, value: f64) -> Result<Tensor> {
        expect_representable("add", self, value)?;
        record_linear("add_scalar", map_number(self, "add", |x| x + value)?, self, |g| Ok(g.clone()))
    }

    /// x − value.
    pub fn sub_scalar(&self, value: f64) -> Result<Tensor> {
        self.add_scalar(-value)
    }

    /// value − x.
    pub fn rsub_scalar(&self, value: f64) -> Result<Tensor> {
        expect_representable("sub", self, value)?;
        record_linear("rsub_scalar", map_number(self, "sub", |x| value - x)?, self, |g| g.neg())
    }

    /// x · value.
    pub fn mul_scalar(&self, value: f64) -> Result<Tensor> {
        expect_representable("mul", self, value)?;
        record_linear("mul_scalar", map_number(self, "mul", |x| x * value)?, self, move |g| g.mul_scalar(value))
    }

    /// x / value. Integers round towards zero; 0 is an error for them.
    pub fn div_scalar(&self, value: f64) -> Result<Tensor> {
        expect_representable("div", self, value)?;
        if !self.dtype().is_float() && value == 0.0 {
            return Err(Error::argument("div", format!("an integer tensor of shape {} divided by 0", self.shape())));
        }
        record_linear("div_scalar", map_number(self, "div", |x| x / value)?, self, move |g| g.div_scalar(value))
    }

    /// value / x. Float dtypes.
    pub fn rdiv_scalar(&self, value: f64) -> Result<Tensor> {
        self.recip()?.mul_scalar(value)
    }

    /// x^exponent. Float dtypes. The derivative of x⁰ is 0 everywhere.
    pub fn powf(&self, exponent: f64) -> Result<Tensor> {
        record_input("powf", map(self, "powf", |x| x.powf(exponent))?, self, move |x, g| match exponent {
            0.0 => x.detach().zeros_like(),
            1.0 => Ok(g.clone()),
            2.0 => g.mul(x)?.mul_scalar(2.0),
            _ => g.mul(&x.powf(exponent - 1.0)?)?.mul_scalar(exponent),
        })
    }
}
