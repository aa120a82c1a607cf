//! Batch, group and instance norm: y = (x − mean)·rstd·w + b, where the statistics belong to a channel, or to a group of
//! channels of one sample. Both memory orders of images are passes along contiguous memory: with channels last a pass over
//! `[pixels, C]` with a vector of coefficients, otherwise one over rows of pixels with constants.

use super::samples::Samples;
use super::{Activation, SUM_ROWS, TASK, flush, parameter};
use crate::cpu::cast::Stored;
use crate::cpu::isa::WithSimd;
use crate::cpu::lanes::{FloatElement, FloatLane, Lane, Pack, PackOf, at, sums, sweep};
use crate::cpu::parallel::{self, SharedMut};
use crate::cpu::reduce::{Spread, moments};
use crate::cpu::simd::Simd;
use crate::view::StridedView;

/// Rows of channels-last memory that are worked on at once, so that running sums are read and written once for all of them.
pub(super) const ROWS: usize = 4;

/// With fewer tasks than this the pixels of a sample are cut too.
pub(super) const ENOUGH_TASKS: usize = 16;

/// Samples of `c` channels of `s` pixels, without gaps: `[n, c, s]`, or `[n, s, c]` if `channels_last`.
#[derive(Clone, Copy, Debug)]
pub struct Channels {
    /// Samples.
    pub n: usize,
    /// Channels.
    pub c: usize,
    /// Pixels: the product of the spatial dimensions.
    pub s: usize,
    /// Whether the channels of a pixel are neighbours in memory.
    pub channels_last: bool,
}

/// What shares its statistics.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Grouping {
    /// A channel of all samples: batch norm.
    Batch,
    /// So many groups of neighbouring channels of each sample: group norm; instance norm with as many groups as channels.
    Groups(usize),
}

impl Channels {
    /// Number of elements.
    pub fn numel(self) -> usize {
        self.n * self.c * self.s
    }

    /// Number of means.
    pub fn statistics(self, grouping: Grouping) -> usize {
        match grouping {
            Grouping::Batch => self.c,
            Grouping::Groups(groups) => self.n * groups,
        }
    }

    /// Elements that a mean is taken over.
    fn group_len(self, grouping: Grouping) -> usize {
        match grouping {
            Grouping::Batch => self.n * self.s,
            Grouping::Groups(groups) => self.c / groups * self.s,
        }
    }

    /// The mean that belongs to channel `c` of sample `n`.
    pub(super) fn statistic_of(self, grouping: Grouping, n: usize, c: usize) -> usize {
        match grouping {
            Grouping::Batch => c,
            Grouping::Groups(groups) => n * groups + c / (self.c / groups),
        }
    }

    /// The same memory seen as one sample, if a pass with per-channel constants may forget where samples end.
    fn merged(self, grouping: Grouping) -> Self {
        if self.channels_last && grouping == Grouping::Batch { Self { n: 1, s: self.n * self.s, ..self } } else { self }
    }

    /// Elements of a contiguous run with one vector of coefficients (channels last) or one constant.
    fn run(self) -> usize {
        if self.channels_last { self.c } else { self.s }
    }
}

/// Mean, squared deviations and number of elements of each group.
pub fn group_moments<T: FloatElement>(layout: Channels, grouping: Grouping, x: &[T], out: &mut [Spread]) {
    let Channels { n, c, s, channels_last } = layout;
    assert!(x.len() == layout.numel() && out.len() == layout.statistics(grouping));
    let reduce = |shape: &[usize], axes: &[bool], out: &mut [Spread]| {
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d];
        }
        if let Some(view) = StridedView::new(x, 0, shape, &strides) {
            moments(view, axes, out);
        }
    };
    match grouping {
        Grouping::Batch if channels_last => reduce(&[n * s, c], &[true, false], out),
        Grouping::Batch => reduce(&[n, c, s], &[true, false, true], out),
        Grouping::Groups(groups) if channels_last => {
            let mut single = vec![Spread::default(); n * c];
            reduce(&[n, s, c], &[false, true, false], &mut single);
            for (out, group) in out.iter_mut().zip(single.chunks(c / groups)) {
                *out = group.iter().fold(Spread::default(), |a, &b| if b.count == 0.0 { a } else { a.merge(b) });
            }
        }
        Grouping::Groups(groups) => reduce(&[n * groups, c / groups * s], &[false, true], out),
    }
}

/// The statistics of each group, as [`Channels::statistics`] counts them.
#[derive(Clone, Copy, Debug)]
pub struct Statistics<'a, L> {
    /// What shares them.
    pub grouping: Grouping,
    /// Means.
    pub mean: &'a [L],
    /// 1/√(variance + ε).
    pub rstd: &'a [L],
}

/// Constants of each channel (one sample's, or the same for all samples): out = a·p + b·(q − centre) + c.
pub(super) struct Coefficients<L> {
    centre: Vec<L>,
    a: Vec<L>,
    b: Vec<L>,
    c: Vec<L>,
}

impl<L: FloatLane> Coefficients<L> {
    fn new(layout: Channels, grouping: Grouping, f: impl Fn(usize, usize) -> [L; 4]) -> Self {
        let samples = if grouping == Grouping::Batch { 1 } else { layout.n };
        let room = || Vec::with_capacity(samples * layout.c);
        let mut all = Self { centre: room(), a: room(), b: room(), c: room() };
        for n in 0..samples {
            for channel in 0..layout.c {
                let [centre, a, b, c] = f(n, channel);
                all.centre.push(centre);
                all.a.push(a);
                all.b.push(b);
                all.c.push(c);
            }
        }
        all
    }
}

/// The constants of (x − mean)·rstd·weight + bias.
pub(super) fn forward_coefficients<T: FloatElement>(
    layout: Channels,
    statistics: Statistics<'_, T::Lane>,
    weight: Option<&[T]>,
    bias: Option<&[T]>,
) -> Coefficients<T::Lane> {
    let (w, b) = (parameter(weight, layout.c, T::Lane::ONE), parameter(bias, layout.c, T::Lane::default()));
    Coefficients::new(layout, statistics.grouping, |n, c| {
        let k = layout.statistic_of(statistics.grouping, n, c);
        [statistics.mean[k], T::Lane::default(), statistics.rstd[k] * w[c], b[c]]
    })
}

/// y = (x − mean)·rstd·weight + bias, or the activation of that.
pub fn normalize<T: FloatElement + Stored>(
    layout: Channels,
    statistics: Statistics<'_, T::Lane>,
    weight: Option<&[T]>,
    bias: Option<&[T]>,
    activation: Option<Activation>,
    x: &[T],
    y: &mut [T],
) {
    if let Some(samples) = Samples::of(layout, statistics.grouping) {
        return samples.normalize(statistics, weight, bias, activation, x, y);
    }
    let coefficients = forward_coefficients(layout, statistics, weight, bias);
    apply(layout, statistics.grouping, &coefficients, P::None, x, y, activation);
}

/// The activation that followed a normalisation, and the bias that this had.
#[derive(Clone, Copy, Debug)]
pub struct Activated<'a, T> {
    /// What followed.
    pub activation: Activation,
    /// A value for each channel.
    pub bias: Option<&'a [T]>,
}

/// The gradient of a normalisation's results where an activation followed them: made from the input, part by part, when it is first read, and
/// kept where the gradient of the input will be.
struct BeforeActivation<'a, T: FloatElement> {
    layout: Channels,
    activation: Activation,
    coefficients: Coefficients<T::Lane>,
    g: &'a [T],
    x: &'a [T],
    to: SharedMut<T>,
}

impl<T: FloatElement + Stored> BeforeActivation<'_, T> {
    /// The part of some runs.
    ///
    /// # Safety
    /// The runs must be this task's alone, and `to` must have room for them.
    unsafe fn part(&self, first_run: usize, range: std::ops::Range<usize>) -> &[T] {
        // SAFETY: the caller's contract.
        let out = unsafe { std::slice::from_raw_parts_mut(self.to.get().add(range.start), range.len()) };
        let (layout, coefficients, q) = (self.layout, &self.coefficients, &self.x[range.clone()]);
        T::Lane::dispatch(Apply { layout, coefficients, first: first_run, p: P::None, q, out: &mut *out });
        self.activation.gradient(out, &self.g[range]);
        out
    }
}

/// The gradients of input, weight and bias, from that of the output `g`. With h = (x − mean)·rstd and means over each group:
/// dx = rstd·(g·w − mean(g·w) − h·mean(g·w·h)); dw = Σ g·h and db = Σ g over each channel. If the statistics are `fixed`
/// (evaluation), dx = rstd·g·w. If an activation followed, `g` is the gradient of its results; there must be a `dx` then.
#[allow(clippy::too_many_arguments)] // The operands of one formula.
pub fn normalize_backward<T: FloatElement + Stored>(
    layout: Channels,
    statistics: Statistics<'_, T::Lane>,
    fixed: bool,
    weight: Option<&[T]>,
    activated: Option<Activated<'_, T>>,
    g: &[T],
    x: &[T],
    mut dx: Option<&mut [T]>,
    dw: Option<&mut [T]>,
    db: Option<&mut [T]>,
) {
    let Statistics { grouping, mean, .. } = statistics;
    if g.is_empty() {
        [dw, db].into_iter().flatten().for_each(|out| out.fill(T::default()));
        return;
    }
    assert!(activated.is_none() || dx.as_ref().is_some_and(|dx| dx.len() == g.len()), "room for the gradient before the activation");
    if let Some(samples) = Samples::of(layout, grouping) {
        return samples.backward(statistics, fixed, weight, activated, g, x, dx, dw, db);
    }
    let w = parameter(weight, layout.c, T::Lane::ONE);
    let merged = layout.merged(grouping);
    let before = dx.as_deref_mut().zip(activated).map(|(dx, Activated { activation, bias })| {
        let coefficients = forward_coefficients(layout, statistics, weight, bias);
        BeforeActivation { layout: merged, activation, coefficients, g, x, to: SharedMut::new(dx) }
    });
    let needs_sums = !fixed || dw.is_some() || db.is_some() || before.is_some();
    let centres: Vec<T::Lane> = (0..merged.n * merged.c).map(|i| mean[layout.statistic_of(grouping, i / layout.c, i % layout.c)]).collect();
    let pairs = if needs_sums { gradient_sums(merged, &centres, g, x, before.as_ref()) } else { vec![[0.0; 2]; merged.n * merged.c] };
    let mut groups = vec![[0f64; 2]; mean.len()];
    let mut parameters = vec![[0f64; 2]; layout.c];
    totals(layout, statistics, &w, &pairs, &mut groups, &mut parameters);
    for (which, out) in [dw, db].into_iter().enumerate() {
        let Some(out) = out else { continue };
        out.iter_mut().zip(&parameters).for_each(|(out, sums)| *out = T::total(sums[which]));
    }
    let Some(dx) = dx else { return };
    let coefficients = gradient_coefficients(layout, statistics, fixed, &w, &groups);
    let p = if before.is_some() { P::Out } else { P::From(g) };
    apply(layout, grouping, &coefficients, p, x, dx, None);
}

/// Adds the sums Σ g and Σ g·(x − mean) of each channel (of each sample) to what they belong to: Σ g·w and Σ g·w·(x − mean) of each group, and the
/// gradients of each channel's weight and bias.
pub(super) fn totals<L: FloatLane>(
    layout: Channels,
    statistics: Statistics<'_, L>,
    w: &[L],
    pairs: &[[f64; 2]],
    groups: &mut [[f64; 2]],
    parameters: &mut [[f64; 2]],
) {
    for (i, pair) in pairs.iter().enumerate() {
        let c = i % layout.c;
        let k = layout.statistic_of(statistics.grouping, i / layout.c, c);
        for m in 0..2 {
            groups[k][m] += pair[m] * w[c].wide();
        }
        parameters[c][0] += pair[1] * statistics.rstd[k].wide();
        parameters[c][1] += pair[0];
    }
}

/// The constants of the gradient of the input, from the sums of [`totals`].
pub(super) fn gradient_coefficients<L: FloatLane>(
    layout: Channels,
    statistics: Statistics<'_, L>,
    fixed: bool,
    w: &[L],
    groups: &[[f64; 2]],
) -> Coefficients<L> {
    let Statistics { grouping, mean, rstd } = statistics;
    let len = layout.group_len(grouping) as f64;
    Coefficients::new(layout, grouping, |n, c| {
        let k = layout.statistic_of(grouping, n, c);
        let r = rstd[k].wide();
        let [b, c0] = if fixed { [0.0; 2] } else { [-r * r * r * groups[k][1] / len, -r * groups[k][0] / len] };
        [mean[k], L::round_from(r * w[c].wide()), L::round_from(b), L::round_from(c0)]
    })
}

/// Where the first operand of a pass is.
#[derive(Clone, Copy)]
pub(super) enum P<'a, T> {
    /// There is none.
    None,
    /// Here.
    From(&'a [T]),
    /// Where the results go.
    Out,
}

/// Writes a·p + b·(q − centre) + c, the first term only if there is a `p`, or the activation of that.
fn apply<T: FloatElement + Stored>(
    layout: Channels,
    grouping: Grouping,
    coefficients: &Coefficients<T::Lane>,
    p: P<'_, T>,
    q: &[T],
    out: &mut [T],
    activation: Option<Activation>,
) {
    assert!(q.len() == layout.numel() && out.len() == q.len() && !matches!(p, P::From(p) if p.len() != q.len()));
    if out.is_empty() {
        return;
    }
    let layout = layout.merged(grouping);
    let run = layout.run();
    let group = TASK.div_ceil(run);
    parallel::for_each_chunk(out, group * run, q.len() / 4, |i, out| {
        let range = i * group * run..i * group * run + out.len();
        let p = if let P::From(p) = p { P::From(&p[range.clone()]) } else { p };
        T::Lane::dispatch(Apply { layout, coefficients, first: i * group, p, q: &q[range], out: &mut *out });
        if let Some(activation) = activation {
            activation.apply(out);
        }
    });
}

pub(super) struct Apply<'a, T: FloatElement> {
    pub layout: Channels,
    pub coefficients: &'a Coefficients<T::Lane>,
    /// The number of the first run.
    pub first: usize,
    pub p: P<'a, T>,
    pub q: &'a [T],
    pub out: &'a mut [T],
}

impl<T: FloatElement> WithSimd for Apply<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let Self { layout, coefficients, first, p, q, out } = self;
        let part_of = |range: std::ops::Range<usize>| if let P::From(p) = p { P::From(&p[range]) } else { p };
        if !layout.channels_last {
            for (i, (q, out)) in q.chunks_exact(layout.s).zip(out.chunks_exact_mut(layout.s)).enumerate() {
                let p = part_of(i * layout.s..(i + 1) * layout.s);
                coefficients.apply_constant(s, (first + i) % coefficients.a.len(), p, q, out);
            }
            return;
        }
        let pixels = q.len() / layout.c;
        let mut pixel = 0;
        while pixel < pixels {
            let (sample, within) = ((first + pixel) / layout.s, (first + pixel) % layout.s);
            let is_group = ROWS <= (pixels - pixel).min(layout.s - within);
            let count = if is_group { ROWS } else { 1 };
            let range = pixel * layout.c..(pixel + count) * layout.c;
            let (p, q, out) = (part_of(range.clone()), &q[range.clone()], &mut out[range]);
            if is_group {
                coefficients.apply_pixels::<ROWS, T, S>(s, sample * layout.c, p, q, out);
            } else {
                coefficients.apply_pixels::<1, T, S>(s, sample * layout.c, p, q, out);
            }
            pixel += count;
        }
    }
}

impl<L: FloatLane> Coefficients<L> {
    /// The channels of `N` pixels of one sample, whose coefficients begin at `at_channel` and are loaded once for all.
    #[inline(always)]
    fn apply_pixels<const N: usize, T: FloatElement<Lane = L>, S: Simd>(
        &self,
        s: S,
        at_channel: usize,
        p: P<'_, T>,
        q: &[T],
        out: &mut [T],
    ) {
        let n = q.len() / N;
        let (centre, a) = (&self.centre[at_channel..][..n], &self.a[at_channel..][..n]);
        let (b, c) = (&self.b[at_channel..][..n], &self.c[at_channel..][..n]);
        sweep!(L, S, n, |j, count| {
            let of = [at(s, centre, j, count), at(s, a, j, count), at(s, b, j, count), at(s, c, j, count)];
            for i in 0..N {
                combine(s, of, p, q, out, i * n + j, count);
            }
        });
    }

    /// The pixels of a channel.
    #[inline(always)]
    fn apply_constant<T: FloatElement<Lane = L>, S: Simd>(&self, s: S, channel: usize, p: P<'_, T>, q: &[T], out: &mut [T]) {
        let [centre, a] = [L::splat(s, self.centre[channel]), L::splat(s, self.a[channel])];
        let [b, c] = [L::splat(s, self.b[channel]), L::splat(s, self.c[channel])];
        sweep!(L, S, q.len(), |j, count| combine(s, [centre, a, b, c], p, q, out, j, count));
    }
}

/// Writes a·p + b·(q − centre) + c of the `count` elements from `k` on.
#[inline(always)]
fn combine<T: FloatElement, S: Simd>(
    s: S,
    [centre, a, b, c]: [PackOf<T, S>; 4],
    p: P<'_, T>,
    q: &[T],
    out: &mut [T],
    k: usize,
    count: usize,
) {
    let d = at(s, q, k, count).sub(centre).mul_add(b, c);
    let y = match p {
        P::None => d,
        P::From(p) => at(s, p, k, count).mul_add(a, d),
        P::Out => at(s, out, k, count).mul_add(a, d),
    };
    T::store_pack(y, &mut out[k..], count);
}

/// Σ g and Σ g·(x − centre) over the pixels of each channel of each sample, where g may be one that is made on the way.
fn gradient_sums<T: FloatElement + Stored>(
    layout: Channels,
    centres: &[T::Lane],
    g: &[T],
    x: &[T],
    before: Option<&BeforeActivation<'_, T>>,
) -> Vec<[f64; 2]> {
    let Channels { n, c, s, channels_last } = layout;
    assert!(g.len() == layout.numel() && x.len() == g.len() && centres.len() == n * c);
    let mut out = vec![[0f64; 2]; n * c];
    if g.is_empty() {
        return out;
    }
    let estimated_ns = g.len() / 4;
    let part = |first_run: usize, range: std::ops::Range<usize>| match before {
        // SAFETY: tasks have runs of their own, and there is room for all elements.
        Some(before) => unsafe { before.part(first_run, range) },
        None => &g[range],
    };
    if !channels_last {
        let group = TASK.div_ceil(s);
        parallel::for_each_chunk(&mut out, group, estimated_ns, |i, out| {
            let range = i * group * s..(i * group + out.len()) * s;
            let g = part(i * group, range.clone());
            T::Lane::dispatch(RowSums { s, centres: &centres[i * group..][..out.len()], g, x: &x[range], out });
        });
        return out;
    }
    let pixels = if n < ENOUGH_TASKS { s.div_ceil(ENOUGH_TASKS.div_ceil(n)).max(TASK / c) } else { s };
    let pixels = pixels.clamp(1, s).next_multiple_of(ROWS);
    let parts = s.div_ceil(pixels);
    let mut totals = vec![0f64; n * parts * 2 * c];
    parallel::for_each_chunk(&mut totals, 2 * c, estimated_ns, |i, totals| {
        let (sample, start) = (i / parts, i % parts * pixels);
        let range = (sample * s + start) * c..(sample * s + s.min(start + pixels)) * c;
        let g = part(sample * s + start, range.clone());
        T::Lane::dispatch(ColumnSums { centres: &centres[sample * c..][..c], g, x: &x[range], totals });
    });
    for (i, out) in out.iter_mut().enumerate() {
        for part in totals[i / c * parts * 2 * c..].chunks_exact(2 * c).take(parts) {
            out[0] += part[i % c];
            out[1] += part[c + i % c];
        }
    }
    out
}

/// Sums over rows of `s` pixels.
struct RowSums<'a, T: FloatElement> {
    s: usize,
    centres: &'a [T::Lane],
    g: &'a [T],
    x: &'a [T],
    out: &'a mut [[f64; 2]],
}

impl<T: FloatElement> WithSimd for RowSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let n = self.s;
        let rows = self.g.chunks_exact(n).zip(self.x.chunks_exact(n));
        for ((g, x), (out, &centre)) in rows.zip(self.out.iter_mut().zip(self.centres)) {
            let centre = T::Lane::splat(s, centre);
            *out = sums!(s, 2, T::Lane, S, n, |j, count| {
                let g = at(s, g, j, count);
                [g, g.mul(at(s, x, j, count).sub(centre))]
            });
        }
    }
}

/// Sums over pixels whose channels are neighbours: Σ g of each channel and then Σ g·(x − centre) of each.
pub(super) struct ColumnSums<'a, T: FloatElement> {
    pub centres: &'a [T::Lane],
    pub g: &'a [T],
    pub x: &'a [T],
    pub totals: &'a mut [f64],
}

impl<T: FloatElement> WithSimd for ColumnSums<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let c = self.centres.len();
        let mut part = vec![T::Lane::default(); 2 * c];
        for (g, x) in self.g.chunks(SUM_ROWS * c).zip(self.x.chunks(SUM_ROWS * c)) {
            for (g, x) in g.chunks(ROWS * c).zip(x.chunks(ROWS * c)) {
                if g.len() == ROWS * c {
                    add_rows::<ROWS, T, S>(s, self.centres, g, x, &mut part);
                } else {
                    for (g, x) in g.chunks_exact(c).zip(x.chunks_exact(c)) {
                        add_rows::<1, T, S>(s, self.centres, g, x, &mut part);
                    }
                }
            }
            flush(&mut part, self.totals);
        }
    }
}

/// Adds the terms of `N` pixels to the sums of each channel.
#[inline(always)]
fn add_rows<const N: usize, T: FloatElement, S: Simd>(s: S, centres: &[T::Lane], g: &[T], x: &[T], part: &mut [T::Lane]) {
    let c = centres.len();
    let (sum, dot) = part.split_at_mut(c);
    sweep!(T::Lane, S, c, |j, count| {
        let centre = at(s, centres, j, count);
        let (mut a, mut b) = (at(s, sum, j, count), at(s, dot, j, count));
        for i in 0..N {
            let g = at(s, &g[i * c..], j, count);
            a = a.add(g);
            b = g.mul_add(at(s, &x[i * c..], j, count).sub(centre), b);
        }
        a.store(&mut sum[j..], count);
        b.store(&mut dot[j..], count);
    });
}
