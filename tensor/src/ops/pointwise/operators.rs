//! `+ - * / %` and unary `-` on tensors, references, numbers and results of other operators, so that
//! `((&a * &b)? + &c)?` and `((&a * &b) + &c)?` both work. Every operator returns a `Result`.

use super::kernel::{Arg, apply_in_place};
use crate::{Result, Tensor};
use kiln_kernels::pointwise::{Row, binary};
use std::ops::{Add, Div, Mul, Neg, Rem, Sub};

/// One operator between two tensors, each a value, a reference, or (on one side) a result.
macro_rules! between_tensors {
    ($trait:ident $op:ident: $($left:ty, $right:ty => |$a:ident, $b:ident| $e:expr;)*) => { $(
        impl $trait<$right> for $left {
            type Output = Result<Tensor>;
            fn $op(self, other: $right) -> Result<Tensor> {
                let ($a, $b) = (self, other);
                $e
            }
        }
    )* };
}

/// An operator with its row of the table. A left operand given by value may lend its memory to the result.
macro_rules! operator {
    ($trait:ident $op:ident, $with_scalar:ident, |$s:ident, $t:ident| $scalar_first:expr) => {
        between_tensors! { $trait $op:
            &Tensor, &Tensor => |a, b| Tensor::$op(a, b);
            &Tensor, Tensor => |a, b| into_second(binary::$trait::ROW, a, b, Tensor::$op);
            Tensor, &Tensor => |a, b| into_first(binary::$trait::ROW, a, b, Tensor::$op);
            Tensor, Tensor => |a, b| into_first(binary::$trait::ROW, a, &b, Tensor::$op);
            &Tensor, Result<Tensor> => |a, b| into_second(binary::$trait::ROW, a, b?, Tensor::$op);
            Tensor, Result<Tensor> => |a, b| into_first(binary::$trait::ROW, a, &b?, Tensor::$op);
            Result<Tensor>, &Tensor => |a, b| into_first(binary::$trait::ROW, a?, b, Tensor::$op);
            Result<Tensor>, Tensor => |a, b| into_first(binary::$trait::ROW, a?, &b, Tensor::$op);
            &Tensor, f64 => |a, b| a.$with_scalar(b);
            Tensor, f64 => |a, b| with_number(binary::$trait::ROW, a, b, Tensor::$with_scalar);
            f64, &Tensor => |$s, $t| $scalar_first;
            f64, Tensor => |$s, $t| $scalar_first;
        }
    };
}

type Plain = fn(&Tensor, &Tensor) -> Result<Tensor>;

/// `row(a, b)` in the memory of `a` if that is free, else by `plain`.
fn into_first(row: &Row<2>, mut a: Tensor, b: &Tensor, plain: Plain) -> Result<Tensor> {
    if apply_in_place(row, &mut a, Arg::Tensor(b), false)? { Ok(a) } else { plain(&a, b) }
}

/// `row(a, b)` in the memory of `b` if that is free, else by `plain`.
fn into_second(row: &Row<2>, a: &Tensor, mut b: Tensor, plain: Plain) -> Result<Tensor> {
    if apply_in_place(row, &mut b, Arg::Tensor(a), true)? { Ok(b) } else { plain(a, &b) }
}

/// `row(a, b)` in the memory of `a` if that is free, else by `plain`.
fn with_number(row: &Row<2>, mut a: Tensor, b: f64, plain: fn(&Tensor, f64) -> Result<Tensor>) -> Result<Tensor> {
    if apply_in_place(row, &mut a, Arg::Scalar(b), false)? { Ok(a) } else { plain(&a, b) }
}

operator!(Add add, add_scalar, |s, t| t.add_scalar(s));
operator!(Sub sub, sub_scalar, |s, t| t.rsub_scalar(s));
operator!(Mul mul, mul_scalar, |s, t| t.mul_scalar(s));
operator!(Div div, div_scalar, |s, t| t.rdiv_scalar(s));

between_tensors! { Rem rem:
    &Tensor, &Tensor => |a, b| Tensor::rem(a, b);
    Result<Tensor>, &Tensor => |a, b| Tensor::rem(&a?, b);
}

impl Neg for &Tensor {
    type Output = Result<Tensor>;
    fn neg(self) -> Result<Tensor> {
        Tensor::neg(self)
    }
}

impl Neg for Tensor {
    type Output = Result<Tensor>;
    fn neg(self) -> Result<Tensor> {
        Tensor::neg(&self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_read_naturally() -> Result<()> {
        let (a, b) = (Tensor::from_vec(vec![1f32, 2.], 2)?, Tensor::from_vec(vec![3f32, 4.], 2)?);
        assert_eq!(((&a * &b) + &a)?.to_vec::<f32>()?, [4., 10.]);
        assert_eq!((2.0 - (&a * 3.0)?)?.to_vec::<f32>()?, [-1., -4.]);
        assert_eq!((-(1.0 / &b)?)?.to_vec::<f32>()?, [-1. / 3., -0.25]);
        assert_eq!((&b % &Tensor::from_vec(vec![-2f32, 3.], 2)?)?.to_vec::<f32>()?, [-1., 1.]);
        assert!((&a + &Tensor::ones([3], ())?).is_err());
        Ok(())
    }

    #[test]
    fn a_value_lends_its_memory_unless_somebody_could_see_it() -> Result<()> {
        let (a, b) = (Tensor::ones([4], ())?, Tensor::arange(0., 4., 1., ())?);
        let address = a.storage_address();
        let c = ((a + &b)? * 2.0)?;
        assert_eq!((c.storage_address(), c.to_vec::<f32>()?), (address, vec![2., 4., 6., 8.]));
        let d = (&b - c)?;
        assert_eq!((d.storage_address(), d.to_vec::<f32>()?), (address, vec![-2., -3., -4., -5.]));
        let alias = d.clone();
        let e = (d + &b)?;
        assert!(e.storage_address() != address && alias.to_vec::<f32>()? == [-2., -3., -4., -5.]);
        // The result is larger than the value, or somebody will want its gradient.
        assert_eq!((Tensor::ones([1], ())? + &b)?.to_vec::<f32>()?, [1., 2., 3., 4.]);
        let leaf = b.requires_grad_()?;
        assert!((Tensor::ones([4], ())? * &leaf)?.is_tracked());
        Ok(())
    }
}
