//! Losses.

use crate::harness::{Case, case};
use crate::reference::Array;
use kiln_tensor::ops::loss::{BceOptions, CosineEmbeddingOptions, CrossEntropyOptions, KlDivOptions, Reduction, TripletMarginOptions};
use kiln_tensor::{Result, Tensor};

fn mean(losses: &Array) -> Array {
    Array::scalar(losses.sum() / losses.data.len() as f64)
}

fn huber(d: f64, delta: f64) -> f64 {
    if d.abs() < delta { d * d / 2.0 } else { delta * (d.abs() - delta / 2.0) }
}

fn log_softmax(x: &Array) -> Array {
    let dim = usize::from(x.shape.len() > 1);
    let lse = x.fold_keepdim(&[dim], |v| v.iter().map(|x| x.exp()).sum::<f64>().ln());
    x.zip(&lse, |x, l| x - l)
}

pub fn cases() -> Vec<Case> {
    [numbers(), classes(), bits(), distances()].into_iter().flatten().collect()
}

fn numbers() -> Vec<Case> {
    // Differences keep clear of the kinks at 0 and ±1: within (0.1, 0.9) or (1.1, 3).
    let near: &[(f64, f64)] = &[(1.1, 1.9), (0.5, 1.0)];
    let far: &[(f64, f64)] = &[(2.2, 3.0), (0.5, 1.0)];
    vec![
        case("mse_loss", |x| x[0].mse_loss(&x[1]), |x| mean(&x[0].zip(&x[1], |a, b| (a - b).powi(2))))
            .sample(&[&[2, 3], &[2, 3]])
            .large(&[&[1000, 301], &[1000, 301]]),
        case("mse_loss_with", |x| x[0].mse_loss_with(&x[1], Reduction::None), |x| x[0].zip(&x[1], |a, b| (a - b).powi(2)))
            .sample(&[&[2, 3], &[2, 3]]),
        case("l1_loss", |x| x[0].l1_loss(&x[1]), |x| mean(&x[0].zip(&x[1], |a, b| (a - b).abs()))).domain(near).sample(&[&[2, 3], &[2, 3]]),
        case("l1_loss_with", |x| x[0].l1_loss_with(&x[1], Reduction::Sum), |x| Array::scalar(x[0].zip(&x[1], |a, b| (a - b).abs()).sum()))
            .domain(far)
            .sample(&[&[2, 3], &[2, 3]]),
        case("smooth_l1_loss", |x| x[0].smooth_l1_loss(&x[1]), |x| mean(&x[0].zip(&x[1], |a, b| huber(a - b, 1.0))))
            .domain(far)
            .sample(&[&[2, 3], &[2, 3]]),
        case(
            "smooth_l1_loss_with",
            |x| x[0].smooth_l1_loss_with(&x[1], 2.0, Reduction::Mean),
            |x| mean(&x[0].zip(&x[1], |a, b| huber(a - b, 2.0) / 2.0)),
        )
        .domain(near)
        .sample(&[&[2, 3], &[2, 3]]),
        case("huber_loss", |x| x[0].huber_loss(&x[1]), |x| mean(&x[0].zip(&x[1], |a, b| huber(a - b, 1.0))))
            .domain(far)
            .sample(&[&[2, 3], &[2, 3]]),
        case(
            "huber_loss_with",
            |x| x[0].huber_loss_with(&x[1], 0.05, Reduction::Mean),
            |x| mean(&x[0].zip(&x[1], |a, b| huber(a - b, 0.05))),
        )
        .domain(near)
        .sample(&[&[2, 3], &[2, 3]]),
    ]
}

const TARGETS: [i64; 4] = [2, 0, -100, 1];

fn targets(shape: &[usize]) -> Result<Tensor> {
    Tensor::from_vec((0..shape.iter().product()).map(|i| TARGETS[i % 4]).collect::<Vec<i64>>(), shape)
}

/// Cross-entropy of log-probabilities `[N, 3, S]` with class weights w and smoothing.
fn weighted(log_p: &Array, w: [f64; 3], smoothing: f64) -> Array {
    let (n, s) = (log_p.shape[0], log_p.shape[1..].iter().product::<usize>() / 3);
    let log_p = log_p.reshape(&[n, 3, s]);
    let (mut loss, mut total) = (0.0, 0.0);
    for i in 0..n * s {
        let Ok(class) = usize::try_from(TARGETS[i % 4]) else { continue };
        let term = |c: usize| -w[c] * log_p.at(&[i / s, c, i % s]);
        loss += (1.0 - smoothing) * term(class) + smoothing / 3.0 * (0..3).map(term).sum::<f64>();
        total += w[class];
    }
    Array::scalar(loss / total)
}

fn classes() -> Vec<Case> {
    vec![
        case("cross_entropy", |x| x[0].cross_entropy(&targets(&[x[0].dims()[0]])?), |x| weighted(&log_softmax(&x[0]), [1.0; 3], 0.0))
            .sample(&[&[6, 3]])
            .large(&[&[70_001, 3]]),
        case(
            "cross_entropy_with",
            |x| {
                let weight = Tensor::from_vec(vec![0.5, 1.0, 2.0], [3])?.to_dtype(x[0].dtype())?;
                let options = CrossEntropyOptions { weight: Some(&weight), label_smoothing: 0.25, ..Default::default() };
                x[0].cross_entropy_with(&targets(&[2, 4])?, &options)
            },
            |x| weighted(&log_softmax(&x[0]), [0.5, 1.0, 2.0], 0.25),
        )
        .sample(&[&[2, 3, 4]]),
        case(
            "cross_entropy_with",
            |x| {
                let options = CrossEntropyOptions { label_smoothing: 0.25, ..Default::default() };
                x[0].cross_entropy_with(&x[1], &options)
            },
            |x| {
                let target = x[1].map(|t| 0.75 * t + 0.25 / 3.0);
                let terms = log_softmax(&x[0]).zip(&target, |l, t| -l * t);
                Array::scalar(terms.sum() / 4.0)
            },
        )
        .label("probabilities")
        .domain(&[(-2.0, 2.0), (0.1, 0.9)])
        .sample(&[&[4, 3], &[4, 3]]),
        case(
            "cross_entropy_with",
            |x| x[0].cross_entropy_with(&x[1], &CrossEntropyOptions { weight: Some(&x[2]), ..Default::default() }),
            |x| {
                let log_p = log_softmax(&x[0]);
                let term = |i: &[usize]| -x[2].at(&i[1..]) * x[1].at(i) * log_p.at(i);
                Array::scalar(Array::from_fn(&x[0].shape, term).sum() / 4.0)
            },
        )
        .label("weighted probabilities")
        .domain(&[(-2.0, 2.0), (0.1, 0.9), (0.5, 2.0)])
        .sample(&[&[4, 3], &[4, 3], &[3]]),
        case(
            "linear_cross_entropy",
            |x| x[0].linear_cross_entropy(&x[1], x.get(2), &targets(&[x[0].dims()[0]])?, &CrossEntropyOptions::default(), Some(2)),
            |x| weighted(&log_softmax(&super::product::linear(x)), [1.0; 3], 0.0),
        )
        .sample(&[&[7, 2], &[3, 2], &[3]])
        .sample(&[&[6, 2], &[3, 2]])
        .large(&[&[7001, 17], &[3, 17], &[3]]),
        case(
            "linear_cross_entropy",
            |x| {
                let options = CrossEntropyOptions { reduction: Reduction::Sum, ..Default::default() };
                x[0].linear_cross_entropy(&x[1], None, &targets(&[5])?, &options, Some(4))
            },
            |x| {
                let loss = weighted(&log_softmax(&super::product::linear(x)), [1.0; 3], 0.0);
                loss.map(|mean| 4.0 * mean)
            },
        )
        .label("sum")
        .sample(&[&[5, 2], &[3, 2]]),
        case("nll_loss", |x| x[0].nll_loss(&targets(&[6])?), |x| weighted(&x[0], [1.0; 3], 0.0)).sample(&[&[6, 3]]),
        case(
            "nll_loss_with",
            |x| x[0].nll_loss_with(&targets(&[4])?, &CrossEntropyOptions { reduction: Reduction::None, ..Default::default() }),
            |x| Array::from_fn(&[4], |i| usize::try_from(TARGETS[i[0]]).map_or(0.0, |class| -x[0].at(&[i[0], class]))),
        )
        .sample(&[&[4, 3]]),
    ]
}

fn bits() -> Vec<Case> {
    let with_logits = |x: f64, t: f64| x.max(0.0) - x * t + (-x.abs()).exp().ln_1p();
    let plain = |x: f64, t: f64| -t * x.ln() - (1.0 - t) * (1.0 - x).ln();
    let probability: &[(f64, f64)] = &[(0.1, 0.9), (0.1, 0.9)];
    vec![
        case("bce_with_logits", |x| x[0].bce_with_logits(&x[1]), move |x| mean(&x[0].zip(&x[1], with_logits)))
            .domain(&[(-3.0, 3.0), (0.0, 1.0)])
            .sample(&[&[2, 3], &[2, 3]])
            .large(&[&[1000, 301], &[1000, 301]]),
        case(
            "bce_with_logits_with",
            |x| {
                let constant = |v: Vec<f64>| Tensor::from_vec(v, [3])?.to_dtype(x[0].dtype());
                let weight = constant(vec![1.0, 0.5, 2.0])?;
                let options = BceOptions { weight: Some(&weight), pos_weight: Some(&x[2]), reduction: Reduction::None };
                x[0].bce_with_logits_with(&x[1], &options)
            },
            |x| {
                let w = Array::new(&[3], vec![1.0, 0.5, 2.0]);
                Array::from_fn(&x[0].shape, |i| {
                    let (x, t, p) = (x[0].at(i), x[1].at(i), x[2].at_broadcast(i));
                    let sigmoid = 1.0 / (1.0 + (-x).exp());
                    w.at_broadcast(i) * (-p * t * sigmoid.ln() - (1.0 - t) * (1.0 - sigmoid).ln())
                })
            },
        )
        .domain(&[(-3.0, 3.0), (0.0, 1.0), (0.5, 3.0)])
        .sample(&[&[2, 3], &[2, 3], &[3]]),
        case("bce", |x| x[0].bce(&x[1]), move |x| mean(&x[0].zip(&x[1], plain))).domain(probability).sample(&[&[2, 3], &[2, 3]]),
        case(
            "bce_with",
            |x| x[0].bce_with(&x[1], &BceOptions { reduction: Reduction::Sum, ..Default::default() }),
            move |x| Array::scalar(x[0].zip(&x[1], plain).sum()),
        )
        .domain(probability)
        .sample(&[&[2, 3], &[2, 3]]),
    ]
}

fn signs(n: usize, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec((0..n).map(|i| if i % 2 == 0 { 1.0 } else { -1.0 }).collect::<Vec<f64>>(), [n])?.to_dtype(like.dtype())
}

fn distances() -> Vec<Case> {
    let kl = |x: f64, t: f64| t * (t.ln() - x);
    let dot = |a: &Array, b: &Array| a.zip(b, |a, b| a * b).fold(&[1], |v| v.iter().sum());
    let cosine = move |a: &Array, b: &Array| dot(a, b).zip(&dot(a, a).zip(&dot(b, b), |x, y| (x * y).sqrt()), |d, l| d / l);
    let distance = |a: &Array, b: &Array, p: f64| {
        a.zip(b, move |a, b| (a - b + 1e-6).abs().powf(p)).fold(&[1], |v| v.iter().sum::<f64>().powf(1.0 / p))
    };
    let pair = |c: f64, i: usize, margin: f64| if i.is_multiple_of(2) { 1.0 - c } else { (c - margin).max(0.0) };
    let triplet = move |x: &[Array], margin: f64, p: f64| {
        mean(&distance(&x[0], &x[1], p).zip(&distance(&x[0], &x[2], p), |a, b| (a - b + margin).max(0.0)))
    };
    let apart: &[(f64, f64)] = &[(1.1, 1.9), (0.4, 0.9), (0.1, 0.3)];
    vec![
        case("kl_div", |x| x[0].kl_div(&x[1]), move |x| mean(&x[0].zip(&x[1], kl)))
            .domain(&[(-2.0, -0.5), (0.1, 0.9)])
            .sample(&[&[2, 3], &[2, 3]]),
        case(
            "kl_div_with",
            |x| x[0].kl_div_with(&x[1], &KlDivOptions { log_target: true, batch_mean: true, ..Default::default() }),
            |x| Array::scalar(x[0].zip(&x[1], |x, t| t.exp() * (t - x)).sum() / 2.0),
        )
        .domain(&[(-2.0, -0.5)])
        .sample(&[&[2, 3], &[2, 3]]),
        case(
            "hinge_embedding_loss",
            |x| x[0].hinge_embedding_loss(&signs(6, &x[0])?),
            |x| mean(&Array::from_fn(&[6], |i| if i[0] % 2 == 0 { x[0].at(i) } else { (1.0 - x[0].at(i)).max(0.0) })),
        )
        .also(&["hinge_embedding_loss_with"])
        .domain(&[(0.1, 0.9)])
        .sample(&[&[6]]),
        case("cosine_similarity", |x| x[0].cosine_similarity(&x[1], 1, 1e-8), move |x| cosine(&x[0], &x[1]))
            .sample(&[&[3, 4], &[3, 4]])
            .sample(&[&[3, 4], &[1, 4]]),
        case(
            "cosine_embedding_loss",
            |x| x[0].cosine_embedding_loss(&x[1], &signs(4, &x[0])?),
            move |x| mean(&Array::from_fn(&[4], |i| pair(cosine(&x[0], &x[1]).at(i), i[0], 0.0))),
        )
        .domain(&[(0.2, 2.0)])
        .sample(&[&[4, 3], &[4, 3]]),
        case(
            "cosine_embedding_loss_with",
            |x| {
                let options = CosineEmbeddingOptions { margin: -0.5, reduction: Reduction::None };
                x[0].cosine_embedding_loss_with(&x[1], &signs(4, &x[0])?, &options)
            },
            move |x| Array::from_fn(&[4], |i| pair(cosine(&x[0], &x[1]).at(i), i[0], -0.5)),
        )
        .domain(&[(0.2, 2.0)])
        .sample(&[&[4, 3], &[4, 3]]),
        case("triplet_margin_loss", |x| x[0].triplet_margin_loss(&x[1], &x[2]), move |x| triplet(x, 1.0, 2.0)).domain(apart).sample(&[
            &[4, 3],
            &[4, 3],
            &[4, 3],
        ]),
        case(
            "triplet_margin_loss_with",
            |x| x[0].triplet_margin_loss_with(&x[1], &x[2], &TripletMarginOptions { margin: 5.0, p: 3.0, reduction: Reduction::Mean }),
            move |x| triplet(x, 5.0, 3.0),
        )
        // Rounding the differences to f16 weighs threefold in their cubes.
        .tolerance(4.0)
        .domain(apart)
        .sample(&[&[4, 3], &[4, 3], &[4, 3]]),
    ]
}
