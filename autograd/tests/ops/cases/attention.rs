//! Attention.

use crate::harness::{Case, case};
use crate::reference::Array;
use kiln_tensor::ops::attention::AttentionOptions;
use kiln_tensor::{Generator, Result, Tensor};

/// `softmax(scale · Q · Kᵀ + bias) · V` with the bias a function of (query, key); a row of -∞ gives zeros.
fn attention(x: &[Array], scale: f64, bias: impl Fn(usize, usize) -> f64) -> Array {
    attention_with(x, scale, bias, |_| 1.0)
}

/// The same, the weights multiplied by a function of their place in `[.., L, S]`.
fn attention_with(x: &[Array], scale: f64, bias: impl Fn(usize, usize) -> f64, factor: impl Fn(&[usize]) -> f64) -> Array {
    let (q, k, v) = (&x[0], &x[1], &x[2]);
    let rank = q.shape.len();
    let shape = [&q.shape[..rank - 1], &[v.shape[rank - 1]]].concat();
    Array::from_fn(&shape, |i| {
        let (lead, at) = i.split_at(rank - 2);
        let dot = |j: usize| {
            (0..q.shape[rank - 1]).map(move |e| q.at_broadcast(&[lead, &[at[0], e]].concat()) * k.at_broadcast(&[lead, &[j, e]].concat()))
        };
        let scores: Vec<f64> = (0..k.shape[k.shape.len() - 2]).map(|j| scale * dot(j).sum::<f64>() + bias(at[0], j)).collect();
        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if max == f64::NEG_INFINITY {
            return 0.0;
        }
        let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
        let weight = |j: usize| (scores[j] - max).exp() / total * factor(&[lead, &[at[0], j]].concat());
        (0..scores.len()).map(|j| weight(j) * v.at_broadcast(&[lead, &[j, at[1]]].concat())).sum()
    })
}

fn sdpa(x: &[Tensor], options: &AttentionOptions<'_>) -> Result<Tensor> {
    x[0].scaled_dot_product_attention(&x[1], &x[2], options)
}

/// Dropout's factors of the weights `[.., L, S]` for generators of seed 3.
fn factors(x: &[Array], p: f64) -> Array {
    let (q, k) = (&x[0].shape, &x[1].shape);
    let shape = [&q[..q.len() - 1], &[k[k.len() - 2]]].concat();
    let dropped = Generator::new(3).rand_bool(p, shape.as_slice()).unwrap().to_vec::<bool>().unwrap();
    Array::new(&shape, dropped.iter().map(|&dropped| if dropped { 0.0 } else { 1.0 / (1.0 - p) }).collect())
}

/// Query 1 may look at no key, the others at all but key 0.
fn opens(i: usize, j: usize) -> bool {
    i != 1 && j != 0
}

pub fn cases() -> Vec<Case> {
    const SHUT: f64 = f64::NEG_INFINITY;
    let mask = |x: &[Tensor]| {
        let (l, s) = (x[0].dim(-2)?, x[1].dim(-2)?);
        Tensor::from_vec((0..l * s).map(|i| opens(i / s, i % s)).collect::<Vec<bool>>(), [l, s])
    };
    vec![
        case("scaled_dot_product_attention", |x| sdpa(x, &AttentionOptions::default()), |x| attention(x, 0.5, |_, _| 0.0))
            .sample(&[&[2, 4], &[3, 4], &[3, 2]])
            .sample(&[&[2, 2, 3, 4], &[2, 1, 2, 4], &[2, 1, 2, 3]])
            .large(&[&[2, 4, 130, 64], &[2, 4, 130, 64], &[2, 4, 130, 64]]),
        case(
            "scaled_dot_product_attention",
            |x| sdpa(x, &AttentionOptions { causal: true, scale: Some(0.3), ..Default::default() }),
            |x| attention(x, 0.3, |i, j| if j <= i { 0.0 } else { SHUT }),
        )
        .label("causal")
        .sample(&[&[2, 3, 4], &[2, 3, 4], &[2, 3, 2]])
        .sample(&[&[2, 3, 4], &[2, 4, 4], &[2, 4, 2]])
        .large(&[&[4, 200, 64], &[4, 200, 64], &[4, 200, 64]]),
        case(
            "scaled_dot_product_attention",
            |x| sdpa(x, &AttentionOptions { causal: true, enable_gqa: true, ..Default::default() }),
            |x| {
                let spread = |x: &Array| {
                    let mut shape = x.shape.clone();
                    shape[1] *= 2;
                    Array::from_fn(&shape, |i| x.at(&[i[0], i[1] / 2, i[2], i[3]]))
                };
                attention(&[x[0].clone(), spread(&x[1]), spread(&x[2])], 0.5, |i, j| if j <= i { 0.0 } else { SHUT })
            },
        )
        .label("grouped queries")
        .sample(&[&[2, 4, 3, 4], &[2, 2, 3, 4], &[2, 2, 3, 5]])
        .large(&[&[2, 4, 300, 40], &[2, 2, 300, 40], &[2, 2, 300, 40]]),
        case(
            "scaled_dot_product_attention",
            move |x| sdpa(x, &AttentionOptions { mask: Some(&mask(x)?), ..Default::default() }),
            |x| attention(x, 0.5, |i, j| if opens(i, j) { 0.0 } else { SHUT }),
        )
        .label("mask, with a query that sees nothing")
        .sample(&[&[2, 3, 4], &[2, 3, 4], &[2, 3, 2]]),
        case(
            "scaled_dot_product_attention",
            move |x| {
                let shut = mask(x)?.logical_not()?;
                let bias = Tensor::zeros(shut.shape(), x[0].dtype())?.masked_fill(&shut, SHUT)?;
                sdpa(x, &AttentionOptions { mask: Some(&bias), causal: true, ..Default::default() })
            },
            |x| attention(x, 0.5, |i, j| if opens(i, j) && j <= i { 0.0 } else { SHUT }),
        )
        .label("added mask of -∞, and causal")
        .sample(&[&[2, 3, 4], &[2, 3, 4], &[2, 3, 2]]),
        case(
            "scaled_dot_product_attention",
            |x| sdpa(x, &AttentionOptions { enable_gqa: true, ..Default::default() }),
            |x| {
                let spread = |x: &Array| {
                    let mut shape = x.shape.clone();
                    shape[1] *= 4;
                    Array::from_fn(&shape, |i| x.at(&[i[0], i[1] / 4, i[2], i[3]]))
                };
                attention(&[x[0].clone(), spread(&x[1]), spread(&x[2])], 0.5, |_, _| 0.0)
            },
        )
        .label("one query over many keys, in parts")
        .sample(&[&[1, 4, 1, 4], &[1, 1, 5, 4], &[1, 1, 5, 3]])
        .large(&[&[1, 8, 1, 64], &[1, 2, 1500, 64], &[1, 2, 1500, 40]]),
        case("scaled_dot_product_attention", |x| sdpa(x, &AttentionOptions::default()), |x| attention(x, 0.5, |_, _| 0.0))
            .label("some queries over many keys, in parts")
            .sample(&[&[5, 4], &[7, 4], &[7, 3]])
            .large(&[&[2, 30, 32], &[2, 1700, 32], &[2, 1700, 48]]),
        case(
            "scaled_dot_product_attention",
            |x| sdpa(x, &AttentionOptions { dropout_p: 0.4, generator: Some(&Generator::new(3)), ..Default::default() }),
            |x| {
                let factors = factors(x, 0.4);
                attention_with(x, 0.5, |_, _| 0.0, |at| factors.at(at))
            },
        )
        .label("dropout")
        .sample(&[&[2, 4], &[3, 4], &[3, 2]])
        .sample(&[&[2, 2, 3, 4], &[2, 1, 5, 4], &[2, 1, 5, 3]])
        .sample(&[&[2, 1, 4], &[1, 9, 4], &[2, 9, 3]])
        .large(&[&[2, 4, 130, 64], &[2, 4, 131, 64], &[2, 4, 131, 64]]),
        case(
            "scaled_dot_product_attention",
            |x| sdpa(x, &AttentionOptions { causal: true, dropout_p: 0.25, generator: Some(&Generator::new(3)), ..Default::default() }),
            |x| {
                let factors = factors(x, 0.25);
                attention_with(x, 0.5, |i, j| if j <= i { 0.0 } else { SHUT }, |at| factors.at(at))
            },
        )
        .label("dropout, causal")
        .sample(&[&[2, 5, 4], &[2, 3, 4], &[2, 3, 2]])
        .large(&[&[4, 200, 64], &[4, 200, 64], &[4, 200, 64]]),
        case(
            "scaled_dot_product_attention",
            |x| sdpa(x, &AttentionOptions { mask: Some(&x[3]), ..Default::default() }),
            |x| attention(x, 0.5, |i, j| x[3].at_broadcast(&[i, j])),
        )
        .label("added mask with a gradient")
        .sample(&[&[2, 4], &[3, 4], &[3, 2], &[2, 3]])
        .sample(&[&[2, 4], &[3, 4], &[3, 2], &[3]]),
    ]
}
