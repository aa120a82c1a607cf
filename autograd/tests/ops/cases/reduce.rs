//! Reductions, scans and softmax.

use crate::harness::{Case, DTypes, case};
use crate::reference::Array;
use kiln_tensor::Tensor;

fn var(v: &[f64], correction: f64) -> f64 {
    let mean = v.iter().sum::<f64>() / v.len() as f64;
    v.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (v.len() as f64 - correction)
}

fn logsumexp(v: &[f64]) -> f64 {
    let max = v.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    v.iter().map(|x| (x - max).exp()).sum::<f64>().ln() + max
}

fn greatest(v: &[f64]) -> f64 {
    v.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

fn least(v: &[f64]) -> f64 {
    v.iter().copied().fold(f64::INFINITY, f64::min)
}

fn first(v: &[f64], x: f64) -> f64 {
    v.iter().position(|&y| y == x).map_or(-1.0, |i| i as f64)
}

pub fn cases() -> Vec<Case> {
    [sums(), extremes(), moments(), lines()].into_iter().flatten().collect()
}

fn sums() -> Vec<Case> {
    vec![
        case("sum", |x| x[0].sum([0, -1]), |x| x[0].fold(&[0, 2], |v| v.iter().sum()))
            .dtypes(DTypes::All)
            .sample(&[&[2, 3, 4]])
            .sample(&[&[2, 0, 4]])
            .large(&[&[30, 1001, 20]]),
        case("sum_keepdim", |x| x[0].sum_keepdim(1), |x| x[0].fold_keepdim(&[1], |v| v.iter().sum()))
            .sample(&[&[2, 3]])
            .large(&[&[1000, 1001]]),
        case("mean", |x| x[0].mean(()), |x| x[0].fold(&[0, 1], |v| v.iter().sum::<f64>() / v.len() as f64))
            .sample(&[&[2, 3]])
            .large(&[&[1000, 1001]]),
        case("mean_keepdim", |x| x[0].mean_keepdim([0, 2]), |x| x[0].fold_keepdim(&[0, 2], |v| v.iter().sum::<f64>() / v.len() as f64))
            .sample(&[&[2, 3, 5]])
            .sample(&[&[2, 0, 4]]),
        case("prod", |x| x[0].prod(-1), |x| x[0].fold(&[1], |v| v.iter().product()))
            .also(&["prod_keepdim"])
            .sample(&[&[2, 3]])
            .sample(&[&[2, 0]]),
        // Factors that are zero: the gradient of each is the product of the others.
        case(
            "prod",
            |x| x[0].mul(&Tensor::from_vec(vec![1.0, 0.0, 1.0, 1.0, 0.0, 0.0], [2, 3])?.to_dtype(x[0].dtype())?)?.prod(-1),
            |x| x[0].zip(&Array::new(&[2, 3], vec![1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), |a, b| a * b).fold(&[1], |v| v.iter().product()),
        )
        .label("zeros")
        .sample(&[&[2, 3]]),
        case("any", |x| x[0].gt_scalar(1.0)?.any(1), |x| x[0].fold(&[1], |v| v.iter().any(|&x| x > 1.0) as u8 as f64))
            .not_differentiable()
            .sample(&[&[5, 3]])
            .sample(&[&[2, 0]]),
        case("all", |x| x[0].all(()), |x| x[0].fold(&[0, 1], |v| v.iter().all(|&x| x != 0.0) as u8 as f64))
            .not_differentiable()
            .dtypes(DTypes::All)
            .sample(&[&[2, 3]])
            .sample(&[&[2, 0]]),
    ]
}

fn extremes() -> Vec<Case> {
    vec![
        case("max", |x| x[0].max([0, 2]), |x| x[0].fold(&[0, 2], greatest))
            .also(&["max_keepdim"])
            .dtypes(DTypes::Numbers)
            .distinct()
            .sample(&[&[2, 3, 4]])
            .large(&[&[30, 1001, 20]]),
        case("min", |x| x[0].min(()), |x| x[0].fold(&[0, 1], least))
            .also(&["min_keepdim"])
            .dtypes(DTypes::Numbers)
            .distinct()
            .sample(&[&[3, 4]]),
        case("max_dim", |x| Ok(x[0].max_dim(1)?.0), |x| x[0].fold(&[1], greatest))
            .dtypes(DTypes::Numbers)
            .distinct()
            .sample(&[&[2, 3, 4]])
            .large(&[&[300, 1001]]),
        case("min_dim", |x| Ok(x[0].min_dim(-1)?.0), |x| x[0].fold(&[1], least)).dtypes(DTypes::Numbers).distinct().sample(&[&[2, 5]]),
        case("argmax", |x| x[0].argmax(-1), |x| x[0].fold(&[1], |v| first(v, greatest(v))))
            .dtypes(DTypes::Numbers)
            .not_differentiable()
            .distinct()
            .sample(&[&[4, 5]]),
        case("argmin", |x| x[0].argmin(()), |x| x[0].fold(&[0, 1], |v| first(v, least(v))))
            .dtypes(DTypes::Numbers)
            .not_differentiable()
            .distinct()
            .sample(&[&[4, 5]]),
    ]
}

fn moments() -> Vec<Case> {
    let norm = |p: f64| move |v: &[f64]| v.iter().map(|x| x.abs().powf(p)).sum::<f64>().powf(1.0 / p);
    vec![
        case("var", |x| x[0].var([0, 2], 1.0), |x| x[0].fold(&[0, 2], |v| var(v, 1.0)))
            .also(&["var_keepdim"])
            .sample(&[&[3, 2, 4]])
            .large(&[&[1000, 301, 2]]),
        case("std", |x| x[0].std(1, 0.0), |x| x[0].fold(&[1], |v| var(v, 0.0).sqrt())).also(&["std_keepdim"]).distinct().sample(&[&[3, 5]]),
        case("norm", |x| x[0].norm(2.0, 1), move |x| x[0].fold(&[1], norm(2.0)))
            .also(&["norm_keepdim"])
            .sample(&[&[2, 3]])
            .large(&[&[1000, 301]]),
        case("norm", |x| x[0].norm(1.0, ()), move |x| x[0].fold(&[0, 1], norm(1.0))).label("1").domain(&[(0.5, 2.0)]).sample(&[&[2, 3]]),
        case("norm", |x| x[0].norm(3.0, 0), move |x| x[0].fold(&[0], norm(3.0))).label("3").domain(&[(-2.0, -0.5)]).sample(&[&[4, 3]]),
        case("norm", |x| x[0].norm(f64::INFINITY, 0), |x| x[0].fold(&[0], |v| v.iter().fold(0.0, |a, b| a.max(b.abs()))))
            .label("∞")
            .domain(&[(0.5, 2.0)])
            .distinct()
            .sample(&[&[4, 3]]),
        case("logsumexp", |x| x[0].logsumexp(1), |x| x[0].fold(&[1], logsumexp))
            .also(&["logsumexp_keepdim"])
            .sample(&[&[2, 5]])
            .large(&[&[500, 1001]]),
    ]
}

/// Replaces every line along dimension `dim`.
fn along(x: &Array, dim: usize, f: impl Fn(&[f64]) -> Vec<f64>) -> Array {
    Array::from_fn(&x.shape, |index| {
        let line: Vec<f64> = (0..x.shape[dim])
            .map(|i| {
                let mut at = index.to_vec();
                at[dim] = i;
                x.at(&at)
            })
            .collect();
        f(&line)[index[dim]]
    })
}

fn lines() -> Vec<Case> {
    let running = |v: &[f64]| {
        v.iter()
            .scan(0.0, |total, x| {
                *total += x;
                Some(*total)
            })
            .collect::<Vec<f64>>()
    };
    let softmax = |v: &[f64]| v.iter().map(|x| (x - logsumexp(v)).exp()).collect::<Vec<f64>>();
    let log_softmax = |v: &[f64]| v.iter().map(|x| x - logsumexp(v)).collect::<Vec<f64>>();
    vec![
        case("cumsum", |x| x[0].cumsum(1), move |x| along(&x[0], 1, running))
            .dtypes(DTypes::Numbers)
            .sample(&[&[2, 5, 3]])
            .sample(&[&[2, 0]])
            .large(&[&[300, 1001]]),
        case("softmax", |x| x[0].softmax(-1), move |x| along(&x[0], x[0].shape.len() - 1, softmax))
            .sample(&[&[3, 5]])
            .sample(&[&[2, 0, 4]])
            .large(&[&[1000, 301]]),
        case("softmax", |x| x[0].softmax(1), move |x| along(&x[0], 1, softmax))
            .label("inner")
            .sample(&[&[2, 5, 3]])
            .large(&[&[10, 300, 301]]),
        case("log_softmax", |x| x[0].log_softmax(-1), move |x| along(&x[0], 1, log_softmax)).sample(&[&[3, 5]]).large(&[&[1000, 301]]),
        case("log_softmax", |x| x[0].log_softmax(1), move |x| along(&x[0], 1, log_softmax)).label("inner").sample(&[&[2, 5, 3]]),
    ]
}
