//! Comparisons and logic: results are bool and carry no gradient.

use super::kernel::{Arg, compare, compare_scalar};
use crate::{Result, Tensor};
use kiln_kernels::pointwise::relation;

impl Tensor {
    /// a == b; false for NaN.
    pub fn eq(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Eq::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// a != b; true for NaN.
    pub fn ne(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Ne::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// a < b.
    pub fn lt(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Lt::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// a <= b.
    pub fn le(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Le::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// a > b.
    pub fn gt(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Gt::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// a >= b.
    pub fn ge(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Ge::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// x == value.
    pub fn eq_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(relation::Eq::ROW, self, value)
    }

    /// x != value.
    pub fn ne_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(relation::Ne::ROW, self, value)
    }

    /// x < value.
    pub fn lt_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(relation::Lt::ROW, self, value)
    }

    /// x <= value.
    pub fn le_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(relation::Le::ROW, self, value)
    }

    /// x > value.
    pub fn gt_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(relation::Gt::ROW, self, value)
    }

    /// x >= value.
    pub fn ge_scalar(&self, value: f64) -> Result<Tensor> {
        compare_scalar(relation::Ge::ROW, self, value)
    }

    /// Both are not zero (not false).
    pub fn logical_and(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::And::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// At least one is not zero (not false).
    pub fn logical_or(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Or::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// Exactly one is not zero (not false).
    pub fn logical_xor(&self, other: &Tensor) -> Result<Tensor> {
        compare(relation::Xor::ROW, Arg::Tensor(self), Arg::Tensor(other))
    }

    /// It is zero (false).
    pub fn logical_not(&self) -> Result<Tensor> {
        compare_scalar(relation::Eq::ROW, self, 0.0)
    }
}
