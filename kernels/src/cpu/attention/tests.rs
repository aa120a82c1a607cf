//! Both passes against the plain formulas in f64, at extents that leave blocks, panels and vectors unfilled.

use super::backward::backward_of;
use super::entries::{Entries, Pairs, Single};
use super::forward::{forward, forward_of};
use super::{Attended, Attention, Gradients, Heads, Mask};
use crate::cpu::random::{self, Dropout, Stream};
use crate::element::{Bool, Float};
use crate::view::MatView;
use half::{bf16, f16};

/// `[heads][rows][cols]` of some values between -1 and 1.
fn values(heads: usize, rows: usize, cols: usize, salt: usize) -> Vec<f32> {
    (0..heads * rows * cols).map(|i| ((i * 7919 + salt * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
}

struct Inputs {
    heads: usize,
    group: usize,
    queries: usize,
    keys: usize,
    width: usize,
    value_width: usize,
    causal: bool,
    /// 0 none, 1 open, 2 bias.
    mask: usize,
    scale: f32,
    dropout: Option<Dropout>,
}

/// Weights, output and the gradients of q, k, v of one head in f64; `g` is the gradient of the output.
struct Plain {
    out: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
}

impl Inputs {
    fn is_open(&self, i: usize, j: usize) -> bool {
        (self.mask != 1 || (i % 7 != 3 && !(i + j).is_multiple_of(5))) && (!self.causal || j <= i)
    }

    fn bias(&self, i: usize, j: usize) -> f32 {
        match self.mask {
            2 if (i * 3 + j).is_multiple_of(11) => f32::NEG_INFINITY,
            2 => ((i * 5 + j * 3) % 17) as f32 * 0.125,
            _ => 0.0,
        }
    }

    fn plain(&self, q: &[f32], k: &[f32], v: &[f32], g: &[f32], factors: &[f32]) -> Plain {
        let &Inputs { queries, keys, width, value_width, scale, .. } = self;
        let mut plain = Plain {
            out: vec![0.0; queries * value_width],
            dq: vec![0.0; queries * width],
            dk: vec![0.0; keys * width],
            dv: vec![0.0; keys * value_width],
        };
        for i in 0..queries {
            let dot =
                |a: &[f32], i: usize, b: &[f32], j: usize, n: usize| (0..n).map(|e| a[i * n + e] as f64 * b[j * n + e] as f64).sum::<f64>();
            let score = |j: usize| {
                if self.is_open(i, j) { scale as f64 * dot(q, i, k, j, width) + self.bias(i, j) as f64 } else { f64::NEG_INFINITY }
            };
            let scores: Vec<f64> = (0..keys).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if max == f64::NEG_INFINITY {
                continue;
            }
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            let p: Vec<f64> = scores.iter().map(|s| (s - max).exp() / total).collect();
            let kept = |j: usize| factors[i * keys + j] as f64;
            let dp: Vec<f64> = (0..keys).map(|j| kept(j) * dot(g, i, v, j, value_width)).collect();
            let along: f64 = p.iter().zip(&dp).map(|(p, d)| p * d).sum();
            for j in 0..keys {
                let ds = p[j] * (dp[j] - along) * scale as f64;
                for e in 0..value_width {
                    plain.out[i * value_width + e] += kept(j) * p[j] * v[j * value_width + e] as f64;
                    plain.dv[j * value_width + e] += kept(j) * p[j] * g[i * value_width + e] as f64;
                }
                for e in 0..width {
                    plain.dq[i * width + e] += ds * k[j * width + e] as f64;
                    plain.dk[j * width + e] += ds * q[i * width + e] as f64;
                }
            }
        }
        plain
    }

    fn check<T: Attended, E: Entries<T>>(&self, tolerance: f64) {
        let &Inputs { heads, group, queries, keys, width, value_width, causal, mask, scale, dropout } = self;
        let key_heads = heads / group;
        let values = |heads, rows, cols, salt| values(heads, rows, cols, salt).into_iter().map(<T as Float>::narrow).collect::<Vec<T>>();
        let widen = |x: &[T]| x.iter().map(|x| x.widen()).collect::<Vec<f32>>();
        let (q, g) = (values(heads, queries, width, 1), values(heads, queries, value_width, 4));
        let (k, v) = (values(key_heads, keys, width, 2), values(key_heads, keys, value_width, 3));
        let offsets = |count: usize, step: usize| (0..count).map(|i| i * step).collect::<Vec<_>>();
        let (q_at, k_at, v_at) =
            (offsets(heads, queries * width), offsets(key_heads, keys * width), offsets(key_heads, keys * value_width));
        let open: Vec<Bool> = (0..queries * keys).map(|i| Bool(self.is_open(i / keys, i % keys) as u8)).collect();
        let bias: Vec<T> = (0..queries * keys).map(|i| <T as Float>::narrow(self.bias(i / keys, i % keys))).collect();
        let same = vec![0; heads];
        let attention = Attention {
            q: Heads { view: MatView::row_major(&q, queries, width).unwrap(), offsets: &q_at },
            k: Heads { view: MatView::row_major(&k, keys, width).unwrap(), offsets: &k_at },
            v: Heads { view: MatView::row_major(&v, keys, value_width).unwrap(), offsets: &v_at },
            mask: match mask {
                1 => Some(Mask::Open(Heads { view: MatView::row_major(&open, queries, keys).unwrap(), offsets: &same })),
                2 => Some(Mask::Bias(Heads { view: MatView::row_major(&bias, queries, keys).unwrap(), offsets: &same })),
                _ => None,
            },
            causal,
            scale,
            dropout,
        };
        let mut factors = vec![1f32; heads * queries * keys];
        if let Some(Dropout { stream, p }) = dropout {
            random::dropout(stream, p, &vec![1f32; factors.len()], &mut factors);
        }
        let (mut out, mut lse) = (vec![T::default(); heads * queries * value_width], vec![[0f32; 2]; heads * queries]);
        forward_of::<T, E>(&attention, &mut out, &mut lse).unwrap();
        let (mut dq, mut dk, mut dv) = (q.clone(), k.clone(), v.clone());
        backward_of::<T, E>(&attention, Gradients { out: &out, grad: &g, lse: &lse }, &mut dq, &mut dk, &mut dv).unwrap();
        let [q, k, v, g, out, dq, dk, dv] = [q, k, v, g, out, dq, dk, dv].map(|x| widen(&x));
        let (mut all_dk, mut all_dv) = (vec![0f64; k.len()], vec![0f64; v.len()]);
        let label = format!(
            "{heads}/{group} {queries}x{keys} {width} {value_width} causal {causal} mask {mask} scale {scale} {dropout:?} {}",
            std::any::type_name::<E>()
        );
        let close = |what: &str, got: &[f32], want: &[f64]| close(&label, what, got, want, tolerance);
        for h in 0..heads {
            let part = |x: &[f32], h: usize, n: usize| x[h * n..(h + 1) * n].to_vec();
            let (kh, kn, vn) = (h / group, keys * width, keys * value_width);
            let q = part(&q, h, queries * width);
            let plain = self.plain(
                &q,
                &part(&k, kh, kn),
                &part(&v, kh, vn),
                &part(&g, h, queries * value_width),
                &part(&factors, h, queries * keys),
            );
            close("out", &part(&out, h, queries * value_width), &plain.out);
            close("dq", &part(&dq, h, queries * width), &plain.dq);
            all_dk[kh * kn..].iter_mut().zip(&plain.dk).for_each(|(all, x)| *all += x);
            all_dv[kh * vn..].iter_mut().zip(&plain.dv).for_each(|(all, x)| *all += x);
        }
        close("dk", &dk, &all_dk);
        close("dv", &dv, &all_dv);
    }
}

/// The root of the mean square may be off by `tolerance` of itself, a value by four times as much.
fn close(label: &str, what: &str, got: &[f32], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    let root = |squares: f64| (squares / want.len() as f64).sqrt();
    let limit = tolerance * root(want.iter().map(|x| x * x).sum()).max(0.1);
    let error = root(got.iter().zip(want).map(|(&got, &want)| (got as f64 - want).powi(2)).sum());
    assert!(error <= limit, "{label}: {what} is off by {error:e}, more than {limit:e}");
    for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
        assert!((got as f64 - want).abs() <= 4.0 * limit + 2.0 * tolerance * want.abs(), "{label}: {what}[{i}] = {got}, not {want}");
    }
}

/// Heads, of which so many share keys, queries, keys, and the widths of keys and of values.
const SHAPES: [(usize, usize, usize, usize, usize, usize); 11] = [
    (2, 1, 5, 7, 4, 3),
    (4, 2, 130, 300, 64, 64),
    (2, 2, 100, 90, 40, 17),
    (1, 1, 260, 513, 33, 80),
    // Few queries, where keys are not packed, and keys in parts; more of them than a cache is taken to hold.
    (3, 1, 1, 600, 16, 32),
    (8, 4, 1, 300, 20, 33),
    (1, 1, 3, 1400, 64, 64),
    (16, 4, 1, 300, 40, 33),
    (2, 2, 4, 2, 7, 1),
    (1, 1, 30, 1500, 24, 16),
    (2, 1, 50, 1030, 16, 24),
];

fn for_each_input(check: impl Fn(Inputs)) {
    for (heads, group, queries, keys, width, value_width) in SHAPES {
        for (causal, mask) in [(false, 0), (false, 1), (false, 2), (true, 0), (true, 1), (true, 2)] {
            for dropout in [None, Some(Dropout { stream: Stream { seed: 7, offset: 1 << 40 }, p: 0.3 })] {
                check(Inputs { heads, group, queries, keys, width, value_width, causal, mask, scale: 0.25, dropout });
            }
        }
    }
}

#[test]
fn both_passes_match_f64() {
    for_each_input(|inputs| inputs.check::<f32, Single>(4e-6));
}

#[test]
fn both_passes_of_halves_match_f64() {
    for_each_input(|inputs| inputs.check::<bf16, Single>(2e-2));
    for_each_input(|inputs| inputs.check::<f16, Single>(3e-3));
}

/// On machines without instructions for pairs, with emulated ones.
#[test]
fn both_passes_of_pairs_match_f64() {
    for_each_input(|inputs| inputs.check::<bf16, Pairs>(3e-2));
}

fn check_heads_alone<T: Attended>() {
    let (heads, queries, keys, width, value_width) = (4, 2, 600, 40, 33);
    let values = |rows, cols, salt| values(heads, rows, cols, salt).into_iter().map(<T as Float>::narrow).collect::<Vec<T>>();
    let (q, k, v) = (values(queries, width, 1), values(keys, width, 2), values(keys, value_width, 3));
    let run = |first: usize, count: usize| {
        let offsets = |step: usize| (first..first + count).map(|head| head * step).collect::<Vec<_>>();
        let [q_at, k_at, v_at] = [queries * width, keys * width, keys * value_width].map(offsets);
        let attention = Attention {
            q: Heads { view: MatView::row_major(&q, queries, width).unwrap(), offsets: &q_at },
            k: Heads { view: MatView::row_major(&k, keys, width).unwrap(), offsets: &k_at },
            v: Heads { view: MatView::row_major(&v, keys, value_width).unwrap(), offsets: &v_at },
            mask: None,
            causal: false,
            scale: 0.25,
            dropout: None,
        };
        let (mut out, mut lse) = (vec![T::default(); count * queries * value_width], vec![[0f32; 2]; count * queries]);
        forward(&attention, &mut out, &mut lse).unwrap();
        (out, lse)
    };
    let (out, lse) = run(0, heads);
    for head in 0..heads {
        let (alone, alone_lse) = run(head, 1);
        assert!(out[head * alone.len()..][..alone.len()] == alone && lse[head * queries..][..queries] == alone_lse, "head {head}");
    }
}

/// All heads are more than a cache is taken to hold, one is less: what is asked for ahead cuts a block in two, and changes no sum.
#[test]
fn a_head_has_the_bits_that_it_has_among_others() {
    check_heads_alone::<f32>();
    check_heads_alone::<bf16>();
}

#[test]
fn scores_may_have_any_scale() {
    for (heads, group, queries, keys, width, value_width) in [(2, 1, 40, 300, 16, 16), (2, 2, 3, 300, 20, 33)] {
        for scale in [-0.5, 0.0, -0.0, 1e-30, 1.0, 2.0] {
            for mask in [0, 1, 2] {
                let inputs = Inputs { heads, group, queries, keys, width, value_width, causal: mask == 0, mask, scale, dropout: None };
                // Errors of scores grow with the scale, and so do those of the weights, relative to them.
                inputs.check::<f32, Single>(4e-6 * (6.0 * scale.abs() as f64).max(1.0));
            }
        }
    }
}

/// What a score that is not a number reaches: its query's output, and no other's.
#[test]
fn a_score_that_is_nan_reaches_the_output() {
    let (keys, width) = (600, 16);
    let v = values(1, keys, width, 3);
    for queries in [3, 40] {
        let run = |q: &[f32], k: &[f32], causal: bool, scale: f32| {
            let view = |x, rows| Heads { view: MatView::row_major(x, rows, width).unwrap(), offsets: &[0] };
            let (q, k, v) = (view(q, queries), view(k, keys), view(&v, keys));
            let attention = Attention { q, k, v, mask: None, causal, scale, dropout: None };
            let (mut out, mut lse) = (vec![0f32; queries * width], vec![[0f32; 2]; queries]);
            forward(&attention, &mut out, &mut lse).unwrap();
            let is_nan = |row: usize| out[row * width..][..width].iter().all(|x| x.is_nan()) && lse[row].iter().any(|x| x.is_nan());
            let is_finite =
                |row: usize| out[row * width..][..width].iter().all(|x| x.is_finite()) && lse[row].iter().all(|x| x.is_finite());
            (0..queries).map(|row| if is_nan(row) { None } else { Some(is_finite(row)) }).collect::<Vec<_>>()
        };
        let (q, k) = (values(1, queries, width, 1), values(1, keys, width, 2));
        for scale in [0.25, -0.25, 0.0] {
            // All of a query's scores.
            let mut bad = q.clone();
            bad[2 * width] = f32::NAN;
            let want: Vec<_> = (0..queries).map(|row| (row != 2).then_some(true)).collect();
            assert_eq!(run(&bad, &k, false, scale), want, "{queries} {scale}");
            // One score of those queries that look at the key.
            let mut bad = k.clone();
            bad[width] = f32::NAN;
            assert_eq!(run(&q, &bad, false, scale), vec![None; queries], "{queries} {scale}");
            let want: Vec<_> = (0..queries).map(|row| (row < 1).then_some(true)).collect();
            assert_eq!(run(&q, &bad, true, scale), want, "{queries} {scale}");
            // Of the second block, when the first has given a largest score.
            let mut bad = k.clone();
            bad[500 * width] = f32::NAN;
            assert_eq!(run(&q, &bad, false, scale), vec![None; queries], "{queries} {scale}");
        }
    }
}
