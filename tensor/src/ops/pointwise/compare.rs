//! Comparisons and logic: results are bool and carry no gradient.

use super::kernel::{compare, compare_scalar};
use crate::{Result, Tensor};

impl Tensor {
    /// a == b; false for NaN.
    pub fn eq(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "eq", |a, b| a == b)
    }

    /// a != b; true for NaN.
    pub fn ne(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "ne", |a, b| a != b)
    }

    /// a < b.
    pub fn lt(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "lt", |a, b| a < b)
    }

    /// a <= b.
    pub fn le(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "le", |a, b| a <= b)
    }

    /// a > b.
    pub fn gt(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "gt", |a, b| a > b)
    }

    /// a >= b.
    pub fn ge(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "ge", |a, b| a >= b)
    }

    /// x == value.
    pub fn eq_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(self, |x| x == value)
    }

    /// x != value.
    pub fn ne_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(self, |x| x != value)
    }

    /// x < value.
    pub fn lt_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(self, |x| x < value)
    }

    /// x <= value.
    pub fn le_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(self, |x| x <= value)
    }

    /// x > value.
    pub fn gt_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(self, |x| x > value)
    }

    /// x >= value.
    pub fn ge_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(self, |x| x >= value)
    }

    /// Both are not zero (not false).
    pub fn logical_and(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "logical_and", |a, b| a != 0.0 && b != 0.0)
    }

    /// At least one is not zero (not false).
    pub fn logical_or(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "logical_or", |a, b| a != 0.0 || b != 0.0)
    }

    /// Exactly one is not zero (not false).
    pub fn logical_xor(&self, other: &Tensor) -> Result<Tensor> {
        compare(self, other, "logical_xor", |a, b| (a != 0.0) != (b != 0.0))
    }

    /// It is zero (false).
    pub fn logical_not(&self) -> Result<Tensor> {
        compare_scalar(self, |x| x == 0.0)
    }
}
