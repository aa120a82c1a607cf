//! `+ - * / %` and unary `-` on tensors, references, numbers and results of other operators, so that
//! `((&a * &b)? + &c)?` and `((&a * &b) + &c)?` both work. Every operator returns a `Result`.

use crate::{Result, Tensor};
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

macro_rules! operator {
    ($trait:ident $op:ident, $with_scalar:ident, |$s:ident, $t:ident| $scalar_first:expr) => {
        between_tensors! { $trait $op:
            &Tensor, &Tensor => |a, b| Tensor::$op(a, b);
            &Tensor, Tensor => |a, b| Tensor::$op(a, &b);
            Tensor, &Tensor => |a, b| Tensor::$op(&a, b);
            Tensor, Tensor => |a, b| Tensor::$op(&a, &b);
            &Tensor, Result<Tensor> => |a, b| Tensor::$op(a, &b?);
            Tensor, Result<Tensor> => |a, b| Tensor::$op(&a, &b?);
            Result<Tensor>, &Tensor => |a, b| Tensor::$op(&a?, b);
            Result<Tensor>, Tensor => |a, b| Tensor::$op(&a?, &b);
            &Tensor, f64 => |a, b| a.$with_scalar(b);
            Tensor, f64 => |a, b| a.$with_scalar(b);
            f64, &Tensor => |$s, $t| $scalar_first;
            f64, Tensor => |$s, $t| $scalar_first;
        }
    };
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
}
