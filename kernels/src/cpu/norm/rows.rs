//! Layer norm, y = (x − mean)·rstd·w + b over each row with rstd = 1/√(var + ε), and RMS norm, the same without the mean:
//! rstd = 1/√(mean x² + ε).

use super::{ROW_COST, ROWS_TASK, SUM_ROWS, flush, parameter};
use crate::cpu::isa::WithSimd;
use crate::cpu::lanes::{Ahead, FloatElement, FloatLane, Lane, Pack, PackOf, at, sums, sweep};
use crate::cpu::parallel;
use crate::cpu::parallel::SharedMut;
use crate::cpu::simd::Simd;

/// Rows of `n` elements, without gaps, and how they are normalised.
#[derive(Clone, Copy, Debug)]
pub struct Rows {
    /// Elements of a row.
    pub n: usize,
    /// Added to the variance, or to the mean square.
    pub eps: f64,
    /// Whether the mean is taken off (layer norm) or not (RMS norm).
    pub centered: bool,
}

/// Normalises each row of `x`, times `weight`, plus `bias` (each of `n` elements), and keeps each row's mean (0 if not centred) and rstd.
pub fn layer_norm<T: FloatElement>(
    rows: Rows,
    x: &[T],
    weight: Option<&[T]>,
    bias: Option<&[T]>,
    y: &mut [T],
    mean: &mut [T::Lane],
    rstd: &mut [T::Lane],
) {
    let n = rows.n;
    assert!(x.len() == y.len() && mean.len() == rstd.len() && x.len() == n * mean.len());
    if x.is_empty() {
        mean.fill(T::Lane::round_from(f64::NAN));
        rstd.fill(T::Lane::round_from(f64::NAN));
        return;
    }
    let affine = (weight.is_some() || bias.is_some()).then(|| (parameter(weight, n, T::Lane::ONE), parameter(bias, n, T::Lane::default())));
    let affine = affine.as_ref().map(|(w, b)| (w.as_slice(), b.as_slice()));
    let group = ROWS_TASK.div_ceil(n + ROW_COST);
    let (count, ahead) = (mean.len(), Ahead::of::<T>(x.len()));
    let (mean, rstd) = (SharedMut::new(mean), SharedMut::new(rstd));
    parallel::for_each_chunk(y, group * n, x.len() / 4 + count * ROW_COST / 2, |i, y| {
        let (first, count) = (i * group, y.len() / n);
        // SAFETY: chunk `i` is about rows `first..first + count`, which exist and belong to no other chunk.
        let (mean, rstd) = unsafe {
            (std::slice::from_raw_parts_mut(mean.get().add(first), count), std::slice::from_raw_parts_mut(rstd.get().add(first), count))
        };
        T::Lane::dispatch(Forward { rows, ahead, x: &x[first * n..][..y.len()], affine, y, mean, rstd });
    });
}

/// Weight and bias.
type Affine<'a, L> = (&'a [L], &'a [L]);

struct Forward<'a, T: FloatElement> {
    rows: Rows,
    ahead: Ahead,
    x: &'a [T],
    affine: Option<Affine<'a, T::Lane>>,
    y: &'a mut [T],
    mean: &'a mut [T::Lane],
    rstd: &'a mut [T::Lane],
}

impl<T: FloatElement> WithSimd for Forward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let n = self.rows.n;
        let statistics = self.mean.iter_mut().zip(self.rstd.iter_mut());
        for ((x, y), (mean, rstd)) in self.x.chunks_exact(n).zip(self.y.chunks_exact_mut(n)).zip(statistics) {
            self.ahead.ask(s, x);
            (*mean, *rstd) = row_statistics(s, self.rows, x);
            let (mean, rstd) = (T::Lane::splat(s, *mean), T::Lane::splat(s, *rstd));
            match self.affine {
                Some((w, b)) => sweep!(T::Lane, S, n, |j, count| {
                    let scaled = at(s, x, j, count).sub(mean).mul(rstd);
                    T::store_pack(scaled.mul_add(at(s, w, j, count), at(s, b, j, count)), &mut y[j..], count);
                }),
                None => sweep!(T::Lane, S, n, |j, count| {
                    T::store_pack(at(s, x, j, count).sub(mean).mul(rstd), &mut y[j..], count);
                }),
            }
        }
    }
}

/// The mean (0 if not centred) and rstd of a row.
#[inline(always)]
fn row_statistics<T: FloatElement, S: Simd>(s: S, rows: Rows, x: &[T]) -> (T::Lane, T::Lane) {
    let n = x.len() as f64;
    let mean = if rows.centered {
        let [sum] = sums!(s, 1, T::Lane, S, x.len(), |j, count| [at(s, x, j, count)]);
        T::Lane::round_from(sum / n)
    } else {
        T::Lane::default()
    };
    let centre = T::Lane::splat(s, mean);
    let [squares] = sums!(s, 1, T::Lane, S, x.len(), |j, count| {
        let d = at(s, x, j, count).sub(centre);
        [d.mul(d)]
    });
    (mean, T::Lane::round_from(1.0 / (squares / n + rows.eps).sqrt()))
}

/// Rows of a partial sum, which costs about as much as two of them.
const PART_ROWS: usize = 32;

/// The gradients of input, weight and bias, from that of the output `g`. With h = (x − mean)·rstd:
/// dx = rstd·(g·w − mean(g·w) − h·mean(g·w·h)) (without the second term if not centred), dw = Σ g·h and db = Σ g over the rows.
/// `g` may be one row that stands for all.
#[allow(clippy::too_many_arguments)] // The operands of one formula.
pub fn layer_norm_backward<T: FloatElement>(
    rows: Rows,
    g: &[T],
    x: &[T],
    weight: Option<&[T]>,
    mean: &[T::Lane],
    rstd: &[T::Lane],
    dx: &mut [T],
    dw: Option<&mut [T]>,
    db: Option<&mut [T]>,
) {
    let n = rows.n;
    assert!(dx.len() == x.len() && mean.len() == rstd.len() && x.len() == n * mean.len());
    assert!(g.len() == x.len() || g.len() == n);
    let w = weight.map(|_| parameter(weight, n, T::Lane::ONE));
    // At most 64 partial sums of the parameters' gradients, each over enough rows to be a task.
    let group = mean.len().div_ceil(64).max(ROWS_TASK.div_ceil(n + ROW_COST)).max(PART_ROWS);
    let parts = mean.len().div_ceil(group);
    let (parameters, ahead) = (dw.is_some() || db.is_some(), Ahead::of::<T>(x.len()));
    let mut totals = vec![0f64; if parameters { parts * 2 * n } else { 0 }];
    let shared = SharedMut::new(&mut totals);
    if !x.is_empty() {
        parallel::for_each_chunk(dx, group * n, x.len() / 2 + mean.len() * ROW_COST / 2, |i, dx| {
            let (first, len) = (i * group, dx.len());
            let range = first * n..first * n + len;
            let totals: &mut [f64] = if parameters {
                // SAFETY: part `i` of `totals` belongs to chunk `i` alone.
                unsafe { std::slice::from_raw_parts_mut(shared.get().add(i * 2 * n), 2 * n) }
            } else {
                &mut []
            };
            let (mean, rstd) = (&mean[first..][..len / n], &rstd[first..][..len / n]);
            let g = if g.len() == x.len() { &g[range.clone()] } else { g };
            T::Lane::dispatch(Backward { rows, ahead, g, x: &x[range], w: w.as_deref(), mean, rstd, dx, totals });
        });
    }
    for (which, out) in [dw, db].into_iter().enumerate() {
        let Some(out) = out else { continue };
        for (j, out) in out.iter_mut().enumerate() {
            *out = T::total((0..parts).map(|part| totals[(part * 2 + which) * n + j]).fold(0.0, |a, b| a + b));
        }
    }
}

struct Backward<'a, T: FloatElement> {
    rows: Rows,
    ahead: Ahead,
    /// Of each row, or one row.
    g: &'a [T],
    x: &'a [T],
    w: Option<&'a [T::Lane]>,
    mean: &'a [T::Lane],
    rstd: &'a [T::Lane],
    dx: &'a mut [T],
    /// Σ g·h and then Σ g for each column; empty if not wanted.
    totals: &'a mut [f64],
}

impl<T: FloatElement> WithSimd for Backward<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let n = self.rows.n;
        let mut part = vec![T::Lane::default(); self.totals.len()];
        let wants_parameters = !part.is_empty();
        let g_row = |i: usize| if self.g.len() == n { self.g } else { &self.g[i * n..(i + 1) * n] };
        let outputs = self.x.chunks_exact(n).zip(self.dx.chunks_exact_mut(n));
        let statistics = self.mean.iter().zip(self.rstd);
        for (i, ((x, dx), (&mean, &rstd))) in outputs.zip(statistics).enumerate() {
            let row = Row { g: g_row(i), x, w: self.w, mean, rstd };
            self.ahead.ask(s, row.g);
            self.ahead.ask(s, x);
            if wants_parameters {
                row.gradients::<S, true>(s, self.rows.centered, dx, &mut part);
            } else {
                row.gradients::<S, false>(s, self.rows.centered, dx, &mut []);
            }
            if (i + 1) % SUM_ROWS == 0 {
                flush(&mut part, self.totals);
            }
        }
        flush(&mut part, self.totals);
    }
}

/// One row's operands of the backward pass.
struct Row<'a, T: FloatElement> {
    g: &'a [T],
    x: &'a [T],
    w: Option<&'a [T::Lane]>,
    mean: T::Lane,
    rstd: T::Lane,
}

impl<T: FloatElement> Row<'_, T> {
    /// g·w
    #[inline(always)]
    fn weighted<S: Simd>(&self, s: S, j: usize, count: usize) -> PackOf<T, S> {
        let g = at(s, self.g, j, count);
        match self.w {
            Some(w) => g.mul(at(s, w, j, count)),
            None => g,
        }
    }

    /// dx = rstd·g·w + (x − mean)·b + c, b and c being constants of the row; with `PARAMETERS`, adds g·h to the first half of `part`, and g
    /// to the second.
    #[inline(always)]
    fn gradients<S: Simd, const PARAMETERS: bool>(&self, s: S, centered: bool, dx: &mut [T], part: &mut [T::Lane]) {
        let (n, centre) = (self.g.len(), T::Lane::splat(s, self.mean));
        let [sum, dot] = sums!(s, 2, T::Lane, S, n, |j, count| {
            let gw = self.weighted(s, j, count);
            [gw, gw.mul(at(s, self.x, j, count).sub(centre))]
        });
        let rstd = self.rstd.wide();
        let b = T::Lane::splat(s, T::Lane::round_from(-rstd * rstd * rstd * dot / n as f64));
        let c = T::Lane::splat(s, T::Lane::round_from(if centered { -rstd * sum / n as f64 } else { 0.0 }));
        let rstd = T::Lane::splat(s, self.rstd);
        let (dw, db) = part.split_at_mut(part.len() / 2);
        sweep!(T::Lane, S, n, |j, count| {
            let d = at(s, self.x, j, count).sub(centre);
            T::store_pack(self.weighted(s, j, count).mul_add(rstd, d.mul_add(b, c)), &mut dx[j..], count);
            if PARAMETERS {
                let g = at(s, self.g, j, count);
                g.mul_add(d.mul(rstd), at(s, dw, j, count)).store(&mut dw[j..], count);
                at(s, db, j, count).add(g).store(&mut db[j..], count);
            }
        });
    }
}
