//! Functions of one element, or one of each operand.

use crate::harness::{Case, case};

pub fn cases() -> Vec<Case> {
    vec![
        case("exp", |x| x[0].exp(), |x| x[0].map(f64::exp)).sample(&[&[2, 3]]).sample(&[&[0, 3]]).specials().large(&[&[300_001]]),
        case("add", |x| x[0].add(&x[1]), |x| x[0].zip(&x[1], |a, b| a + b))
            .sample(&[&[2, 3], &[2, 3]])
            .sample(&[&[2, 1, 3], &[4, 1]])
            .specials()
            .large(&[&[300, 1001], &[1001]]),
        case("mul", |x| x[0].mul(&x[1]), |x| x[0].zip(&x[1], |a, b| a * b))
            .sample(&[&[2, 3], &[2, 3]])
            .sample(&[&[2, 1, 3], &[4, 1]])
            .specials(),
    ]
}
