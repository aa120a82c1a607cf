use super::super::testing::{Values, device};
use super::*;
use crate::cpu::random;

struct Case {
    batch: usize,
    heads: usize,
    group: usize,
    queries: usize,
    keys: usize,
    width: usize,
    value_width: usize,
    causal: bool,
    /// 0 none, 1 open, 2 bias.
    mask: usize,
    dropout: Option<Dropout>,
    /// Rows of all heads next to each other, as a projection leaves them.
    rows_outside: bool,
}

/// Some values between -1 and 1 that every float type holds.
fn values(len: usize, salt: usize) -> Vec<f64> {
    (0..len).map(|i| ((i * 7919 + salt * 104_729) % 253) as f64 / 128.0 - 0.984375).collect()
}

/// Extents and strides of `[batch, heads, rows, cols]`.
fn layout(c: &Case, heads: usize, rows: usize, cols: usize) -> ([usize; 4], [usize; 4]) {
    let strides = if c.rows_outside { [rows * heads * cols, cols, heads * cols, 1] } else { [heads * rows * cols, rows * cols, cols, 1] };
    ([c.batch, heads, rows, cols], strides)
}

impl Case {
    fn is_open(&self, i: usize, j: usize) -> bool {
        (self.mask != 1 || (i % 7 != 3 && !(i + j).is_multiple_of(5))) && (!self.causal || j <= i)
    }

    fn bias(&self, i: usize, j: usize) -> f64 {
        match self.mask {
            2 if (i * 3 + j).is_multiple_of(11) || i % 13 == 5 => f64::NEG_INFINITY,
            2 => ((i * 5 + j * 3) % 17) as f64 * 0.125,
            _ => 0.0,
        }
    }

    /// Output, sums of exponentials, and the gradients of q, k and v by the plain formulas.
    fn plain(&self, [q, k, v]: [&[f64]; 3], grad: &[f64], scale: f64) -> [Vec<f64>; 5] {
        let &Case { batch, heads, group, queries, keys, width, value_width, .. } = self;
        let key_heads = heads / group;
        let (_, qs) = layout(self, heads, queries, width);
        let ((_, ks), (_, vs)) = (layout(self, key_heads, keys, width), layout(self, key_heads, keys, value_width));
        let mut out = vec![0.0; batch * heads * queries * value_width];
        let (mut lse, mut dq) = (vec![f64::INFINITY; batch * heads * queries], vec![0.0; batch * heads * queries * width]);
        let (mut dk, mut dv) = (vec![0.0; batch * key_heads * keys * width], vec![0.0; batch * key_heads * keys * value_width]);
        let mut factors = vec![1f64; batch * heads * queries * keys];
        if let Some(Dropout { stream, p }) = self.dropout {
            random::dropout(stream, p, &vec![1f64; factors.len()], &mut factors);
        }
        for (b, h, i) in (0..batch * heads * queries).map(|n| (n / queries / heads, n / queries % heads, n % queries)) {
            let row = (b * heads + h) * queries + i;
            let kh = h / group;
            let q = &q[b * qs[0] + h * qs[1] + i * qs[2]..][..width];
            let key = |j: usize| &k[b * ks[0] + kh * ks[1] + j * ks[2]..][..width];
            let value = |j: usize| &v[b * vs[0] + kh * vs[1] + j * vs[2]..][..value_width];
            let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
            let score = |j| if self.is_open(i, j) { scale * dot(q, key(j)) + self.bias(i, j) } else { f64::NEG_INFINITY };
            let scores: Vec<f64> = (0..keys).map(score).collect();
            let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if max == f64::NEG_INFINITY {
                continue;
            }
            let total: f64 = scores.iter().map(|s| (s - max).exp()).sum();
            lse[row] = max + total.ln();
            let g = &grad[row * value_width..][..value_width];
            let p: Vec<f64> = scores.iter().map(|s| (s - lse[row]).exp()).collect();
            let kept = &factors[row * keys..][..keys];
            let dp: Vec<f64> = (0..keys).map(|j| kept[j] * dot(g, value(j))).collect();
            let along = dot(&p, &dp);
            for j in 0..keys {
                let ds = p[j] * (dp[j] - along) * scale;
                let at = (b * key_heads + kh) * keys + j;
                for e in 0..value_width {
                    out[row * value_width + e] += kept[j] * p[j] * value(j)[e];
                    dv[at * value_width + e] += kept[j] * p[j] * g[e];
                }
                for e in 0..width {
                    dq[row * width + e] += ds * key(j)[e];
                    dk[at * width + e] += ds * q[e];
                }
            }
        }
        [out, lse, dq, dk, dv]
    }

    fn check(&self, gpu: &'static Gpu, level: Level, ty: Type) {
        let &Case { batch, heads, group, queries, keys, width, value_width, causal, mask, .. } = self;
        let key_heads = heads / group;
        let what = format!(
            "{level:?} {ty:?} {batch}x{heads}/{group} {queries}x{keys} {width},{value_width} causal {causal} mask {mask} {:?}",
            self.dropout
        );
        let scale = 1.0 / (width as f64).sqrt();
        let (q, k) = (values(batch * heads * queries * width, 1), values(batch * key_heads * keys * width, 2));
        let (v, g) = (values(batch * key_heads * keys * value_width, 3), values(batch * heads * queries * value_width, 4));
        let expected = self.plain([&q, &k, &v], &g, scale);
        let [q, k, v, g] = [q, k, v, g].map(|values| Values::new(gpu, ty, &values));
        let ((qs, qt), (ks, kt)) = (layout(self, heads, queries, width), layout(self, key_heads, keys, width));
        let (vs, vt) = layout(self, key_heads, keys, value_width);
        let of_mask: Vec<f64> = (0..queries * keys)
            .map(|n| (n / keys, n % keys))
            .map(|(i, j)| match mask {
                2 => self.bias(i, j),
                _ => f64::from(u8::from(i % 7 != 3 && !(i + j).is_multiple_of(5))),
            })
            .collect();
        let mask_values = Values::new(gpu, if mask == 2 { ty } else { Type::Bool }, &of_mask);
        let (mask_shape, mask_strides) = ([batch, heads, queries, keys], [0, 0, keys, 1]);
        let mask_view = View::new(mask_values.buffer(), if mask == 2 { ty } else { Type::Bool }, 0, &mask_shape, &mask_strides).unwrap();
        let attention = Attention {
            q: View::new(q.buffer(), ty, 0, &qs, &qt).unwrap(),
            k: View::new(k.buffer(), ty, 0, &ks, &kt).unwrap(),
            v: View::new(v.buffer(), ty, 0, &vs, &vt).unwrap(),
            mask: [None, Some(Mask::Open(mask_view)), Some(Mask::Bias(mask_view))][mask],
            causal,
            scale,
            dropout: self.dropout,
        };
        assert!(attention.level(gpu) >= level, "{what}: level");
        let rows = batch * heads * queries;
        let mut out = Values::unwritten(gpu, ty, rows * value_width);
        let mut lse = Values::unwritten(gpu, attention.compute(), rows);
        forward_at(level, gpu, &attention, out.slice_mut(), lse.slice_mut()).unwrap();
        let limit = match ty {
            Type::F64 => 1e-13,
            Type::F32 => 2e-6,
            Type::F16 => 2e-3,
            _ => 1.5e-2,
        };
        let close = |name: &str, got: &[f64], expected: &[f64]| {
            let pairs = || got.iter().zip(expected).filter(|(a, b)| a != b);
            let norm = expected.iter().filter(|x| x.is_finite()).map(|x| x * x).sum::<f64>().sqrt();
            let error = pairs().map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt();
            assert!(error <= limit * norm, "{what}: {name} is off by {error:e} of {norm:e}");
        };
        close("out", &out.read(), &expected[0]);
        close("lse", &lse.read(), &expected[1]);
        if level == Level::Hopper && width.max(value_width) > hopper::BACKWARD_WIDTH {
            return;
        }
        let mut dq = Values::unwritten(gpu, ty, rows * width);
        let (mut dk, mut dv) = (
            Values::unwritten(gpu, ty, batch * key_heads * keys * width),
            Values::unwritten(gpu, ty, batch * key_heads * keys * value_width),
        );
        let given = Gradients { out: out.slice(), grad: g.slice(), lse: lse.slice() };
        backward_at(level, gpu, &attention, given, dq.slice_mut(), dk.slice_mut(), dv.slice_mut()).unwrap();
        close("dq", &dq.read(), &expected[2]);
        close("dk", &dk.read(), &expected[3]);
        close("dv", &dv.read(), &expected[4]);
    }
}

fn case(
    [batch, heads, group]: [usize; 3],
    [queries, keys]: [usize; 2],
    [width, value_width]: [usize; 2],
    causal: bool,
    mask: usize,
) -> Case {
    Case { batch, heads, group, queries, keys, width, value_width, causal, mask, dropout: None, rows_outside: (queries + keys) % 2 == 1 }
}

impl Case {
    fn with_dropout(self, p: f64) -> Self {
        Self { dropout: Some(Dropout { stream: Stream { seed: 7, offset: 1 << 40 }, p }), ..self }
    }
}

#[test]
fn any_extents_and_masks() {
    let Some(gpu) = device() else { return };
    for ty in [Type::F32, Type::F64, Type::F16, Type::BF16] {
        for mask in 0..3 {
            case([2, 2, 1], [37, 70], [20, 33], mask == 0, mask).check(gpu, Level::Portable, ty);
            case([1, 4, 2], [70, 37], [7, 7], true, mask).check(gpu, Level::Portable, ty);
        }
    }
    for ty in [Type::F32, Type::F64, Type::BF16] {
        case([2, 4, 2], [70, 81], [20, 33], ty == Type::F32, 0).with_dropout(0.3).check(gpu, Level::Portable, ty);
        case([1, 2, 1], [20, 128], [16, 16], false, 1).with_dropout(0.3).check(gpu, Level::Portable, ty);
    }
    case([1, 1, 1], [5, 9], [150, 256], false, 0).check(gpu, Level::Portable, Type::F32);
    case([1, 1, 1], [5, 9], [256, 90], true, 0).check(gpu, Level::Portable, Type::F64);
    case([1, 2, 1], [1, 1], [1, 1], true, 0).check(gpu, Level::Portable, Type::F32);
}

#[test]
fn on_tensor_cores() {
    let Some(gpu) = device().filter(|gpu| gpu.capability() >= (8, 0)) else { return };
    for ty in [Type::F16, Type::BF16] {
        for mask in 0..3 {
            case([2, 2, 1], [137, 70], [40, 64], mask == 0, mask).check(gpu, Level::Mma, ty);
            case([1, 4, 2], [70, 138], [128, 72], true, mask).check(gpu, Level::Mma, ty);
        }
        case([1, 4, 2], [130, 301], [128, 72], false, 0).check(gpu, Level::Mma, ty);
        case([1, 1, 1], [66, 35], [200, 256], true, 0).check(gpu, Level::Mma, ty);
        case([1, 2, 1], [130, 81], [64, 64], false, 0).with_dropout(0.3).check(gpu, Level::Mma, ty);
        case([1, 4, 2], [70, 128], [128, 72], true, 0).with_dropout(0.3).check(gpu, Level::Mma, ty);
        case([1, 1, 1], [66, 35], [200, 256], false, 2).with_dropout(0.3).check(gpu, Level::Mma, ty);
    }
}

#[test]
fn on_hopper() {
    let Some(gpu) = device().filter(|gpu| gpu.capability() == (9, 0)) else { return };
    for ty in [Type::F16, Type::BF16] {
        for causal in [false, true] {
            case([2, 2, 1], [197, 140], [64, 40], causal, 0).check(gpu, Level::Hopper, ty);
            case([1, 4, 2], [130, 301], [128, 72], causal, 0).check(gpu, Level::Hopper, ty);
            case([1, 2, 2], [135, 95], [200, 256], causal, 0).check(gpu, Level::Hopper, ty);
        }
    }
}
