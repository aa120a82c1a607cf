//! Normalisation.

use crate::harness::{Case, case};
use crate::reference::Array;
use kiln_kernels::cpu::math::double;
use kiln_tensor::{Activation, Tensor};

const EPS: f64 = 1e-5;

/// (x − mean)·rstd·w + b, elements with the same `group(index)` sharing their statistics; the parameters belong to `channel(index)`.
fn normalise(x: &[Array], centered: bool, group: impl Fn(&[usize]) -> usize, channel: impl Fn(&[usize]) -> usize) -> Array {
    let mut groups: std::collections::BTreeMap<usize, Vec<f64>> = Default::default();
    for (i, index) in crate::reference::indices(&x[0].shape).enumerate() {
        groups.entry(group(&index)).or_default().push(x[0].data[i]);
    }
    Array::from_fn(&x[0].shape, |index| {
        let values = &groups[&group(index)];
        let n = values.len() as f64;
        let mean = if centered { values.iter().sum::<f64>() / n } else { 0.0 };
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / n;
        let parameter = |i: usize, default| x.get(i).map_or(default, |p: &Array| p.data[channel(index)]);
        (x[0].at(index) - mean) / (var + EPS).sqrt() * parameter(1, 1.0) + parameter(2, 0.0)
    })
}

pub fn cases() -> Vec<Case> {
    [rows(), channels(), activated()].into_iter().flatten().collect()
}

fn rows() -> Vec<Case> {
    vec![
        case(
            "layer_norm",
            |x| x[0].layer_norm(x[0].dims()[x[0].rank() - 1], x.get(1), x.get(2), EPS),
            |x| normalise(x, true, |i| i[..i.len() - 1].iter().fold(0, |a, i| a * 100 + i), |i| i[i.len() - 1]),
        )
        .distinct()
        .sample(&[&[3, 5], &[5], &[5]])
        .sample(&[&[2, 3, 4]])
        .sample(&[&[2, 5], &[5]])
        .large(&[&[1000, 257], &[257], &[257]]),
        case("layer_norm", |x| x[0].layer_norm([3, 4], x.get(1), x.get(2), EPS), |x| normalise(x, true, |i| i[0], |i| i[1] * 4 + i[2]))
            .label("two dimensions")
            .distinct()
            .sample(&[&[2, 3, 4], &[3, 4], &[3, 4]]),
        case("rms_norm", |x| x[0].rms_norm(5, x.get(1), EPS), |x| normalise(x, false, |i| i[0], |i| i[1]))
            .sample(&[&[3, 5], &[5]])
            .sample(&[&[3, 5]])
            .large(&[&[30_000, 5], &[5]]),
    ]
}

fn channels() -> Vec<Case> {
    vec![
        case("batch_norm", |x| Ok(x[0].batch_norm(x.get(1), x.get(2), EPS)?.output), |x| normalise(x, true, |i| i[1], |i| i[1]))
            .distinct()
            .sample(&[&[3, 2, 2, 2], &[2], &[2]])
            .sample(&[&[5, 3]])
            .sample(&[&[3, 4, 2], &[4]])
            .large(&[&[40, 12, 14, 14], &[12], &[12]]),
        case(
            "batch_norm_eval",
            |x| {
                let statistic = |scale: f64| Tensor::arange(1.0, 4.0, 1.0, x[0].dtype())?.mul_scalar(scale);
                x[0].batch_norm_eval(&statistic(0.25)?, &statistic(0.5)?, x.get(1), x.get(2), EPS)
            },
            |x| {
                Array::from_fn(&x[0].shape, |i| {
                    let k = (i[1] + 1) as f64;
                    (x[0].at(i) - 0.25 * k) / (0.5 * k + EPS).sqrt() * x[1].data[i[1]] + x[2].data[i[1]]
                })
            },
        )
        .sample(&[&[2, 3, 2, 2], &[3], &[3]])
        .large(&[&[40, 3, 50, 50], &[3], &[3]]),
        case(
            "group_norm",
            |x| x[0].group_norm(2, x.get(1), x.get(2), EPS),
            |x| normalise(x, true, |i| i[0] * 2 + i[1] / (x[0].shape[1] / 2), |i| i[1]),
        )
        .distinct()
        .sample(&[&[2, 4, 2, 2], &[4], &[4]])
        .sample(&[&[3, 10]])
        .large(&[&[40, 4, 50, 50], &[4], &[4]]),
        case("instance_norm", |x| x[0].instance_norm(x.get(1), x.get(2), EPS), |x| normalise(x, true, |i| i[0] * 10 + i[1], |i| i[1]))
            .distinct()
            .sample(&[&[2, 3, 2, 2], &[3], &[3]])
            .sample(&[&[2, 3, 5]]),
    ]
}

/// Norms with an activation in the same pass.
fn activated() -> Vec<Case> {
    let silu = |x: f64| x * double::sigmoid(x);
    vec![
        case(
            "batch_norm_activation",
            |x| Ok(x[0].batch_norm_activation(x.get(1), x.get(2), EPS, Activation::Silu)?.output),
            move |x| normalise(x, true, |i| i[1], |i| i[1]).map(silu),
        )
        .distinct()
        .sample(&[&[3, 2, 2, 2], &[2], &[2]])
        .sample(&[&[5, 3]])
        .sample(&[&[3, 4, 2], &[4]])
        .large(&[&[40, 12, 14, 14], &[12], &[12]]),
        case(
            "batch_norm_eval_activation",
            |x| {
                let statistic = |scale: f64| Tensor::arange(1.0, 4.0, 1.0, x[0].dtype())?.mul_scalar(scale);
                let statistics = [&statistic(0.25)?, &statistic(0.5)?];
                x[0].batch_norm_eval_activation(statistics, x.get(1), x.get(2), EPS, Activation::Gelu)
            },
            |x| {
                Array::from_fn(&x[0].shape, |i| {
                    let k = (i[1] + 1) as f64;
                    let z = (x[0].at(i) - 0.25 * k) / (0.5 * k + EPS).sqrt() * x[1].data[i[1]] + x[2].data[i[1]];
                    z * double::normal_cdf(z)
                })
            },
        )
        .sample(&[&[2, 3, 2, 2], &[3], &[3]])
        .large(&[&[40, 3, 50, 50], &[3], &[3]]),
        case(
            "group_norm_activation",
            |x| x[0].group_norm_activation(2, x.get(1), x.get(2), EPS, Activation::Silu),
            move |x| normalise(x, true, |i| i[0] * 2 + i[1] / (x[0].shape[1] / 2), |i| i[1]).map(silu),
        )
        .distinct()
        .sample(&[&[2, 4, 2, 2], &[4], &[4]])
        .sample(&[&[3, 10]])
        .large(&[&[40, 4, 50, 50], &[4], &[4]]),
    ]
}
