//! Rotary position embedding.

use crate::harness::{Case, case};
use crate::reference::Array;
use kiln_tensor::Tensor;

/// The definition, element by element.
fn rotated(x: &[Array], interleaved: bool) -> Array {
    let pairs = *x[1].shape.last().unwrap();
    Array::from_fn(&x[0].shape, |i| {
        let (lead, e) = (&i[..i.len() - 1], i[i.len() - 1]);
        if e >= 2 * pairs {
            return x[0].at(i);
        }
        let (pair, is_first) = if interleaved { (e / 2, e % 2 == 0) } else { (e % pairs, e < pairs) };
        let (first, second) = if interleaved { (2 * pair, 2 * pair + 1) } else { (pair, pair + pairs) };
        let (a, b) = (x[0].at(&[lead, &[first]].concat()), x[0].at(&[lead, &[second]].concat()));
        let angle = [lead, &[pair]].concat();
        let (c, s) = (x[1].at_broadcast(&angle), x[2].at_broadcast(&angle));
        if is_first { a * c - b * s } else { b * c + a * s }
    })
}

pub fn cases() -> Vec<Case> {
    let embedding = |interleaved: bool| {
        case("rotary_embedding", move |x| x[0].rotary_embedding(&x[1], &x[2], interleaved), move |x| rotated(x, interleaved))
            .label(if interleaved { "interleaved" } else { "halves" })
            // (B, nh, T, hs), (B, T, nh, hs), part of the width, a table for each sample, nothing.
            .sample(&[&[1, 2, 3, 4], &[3, 2], &[3, 2]])
            .sample(&[&[2, 3, 2, 4], &[3, 1, 2], &[3, 1, 2]])
            .sample(&[&[3, 5], &[3, 1], &[3, 1]])
            .sample(&[&[2, 2, 4], &[2, 1, 2], &[2, 1, 2]])
            .sample(&[&[4], &[2], &[2]])
            .sample(&[&[0, 4], &[0, 2], &[0, 2]])
            .large(&[&[4, 8, 64, 72], &[64, 32], &[64, 32]])
    };
    let tables = |x: &[Tensor]| {
        let (cos, sin) = x[0].rotary_tables(&Tensor::rotary_frequencies(6, 100.0)?.to_device(x[0].device())?)?;
        Tensor::cat(&[&cos, &sin], -1)
    };
    let reference = |x: &[Array]| {
        Array::from_fn(&[&x[0].shape[..], &[6]].concat(), |i| {
            let (at, e) = (x[0].at(&i[..i.len() - 1]), i[i.len() - 1]);
            let angle = at * 100f64.powf(-2.0 * (e % 3) as f64 / 6.0);
            if e < 3 { angle.cos() } else { angle.sin() }
        })
    };
    vec![
        embedding(false),
        embedding(true),
        case("rotary_tables", tables, reference).also(&["rotary_frequencies"]).sample(&[&[4]]).sample(&[&[2, 3]]).sample(&[&[0]]),
    ]
}
