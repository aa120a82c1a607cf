//! Products with one or few rows or columns, where each value of the large factor is used a few times only: nothing is packed, and the large
//! factor streams past at the speed of memory.
//!
//! Two forms, by which direction of the large factor (L lanes × K) is contiguous: dot products ([`Dots`], K contiguous in both factors), and
//! sums of scaled rows ([`Axpys`], one row times a factor whose lanes are contiguous).

use super::blocked::FLOP_PER_NS;
#[cfg(target_arch = "x86_64")]
use super::micro::MicroKernels;
use super::{Gemm, Item, Matrix, Out};
use crate::cpu::isa::{WithSimd, dispatch};
use crate::cpu::parallel::{SharedMut, for_each};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Avx512, Avx512Bf16};
use crate::cpu::simd::{F32s, MAX_LANES, Simd};
use crate::element::{Element, Float};
use half::{bf16, f16};
use std::ops::Range;

/// Up to so many rows of the small factor, dot products beat packing: measured on 16×768×3072 and 32×768×3072.
const MAX_DOT_ROWS: usize = 16;

/// Below this K a dot product is mostly the sum over its lanes.
const MIN_DOT_K: usize = 64;

/// Multiply-adds of a task at most: about 10 µs.
const TASK_MACS: usize = 1 << 18;

/// Bytes of the large factor that a task of dot products reads at most: about 3 µs, which is what a thread may have to wait for another at the end.
const TASK_BYTES: usize = 1 << 17;

/// Terms that a lane of the accumulators adds before it joins those before, so that rounding does not grow with the length of a row.
const SPAN: usize = 1 << 12;

/// Columns of an [`Axpys`] task: its accumulators fill 4 KiB of L1, and each row that it reads is a page.
const AXPY_LANES: usize = 1024;

/// Memory below this is likely to be in a core's L2 still.
const CACHED_BYTES: usize = 1 << 18;

/// How many bytes ahead of its reads a walk over `bytes` of memory asks for cache lines, in the order in which they lie there: 0 if they are likely to
/// be cached. The hardware's own prefetching follows one stream; several rows side by side are as many, each of which it loses at the row's end.
/// Measured on matrices of 2 to 67 MB in rows of 768 to 4096, two threads, where a plain sum reads 48 to 52 GB/s: four rows of int8 at once 35 to 38
/// without, 43 if each row asks for its own continuation, 50 to 55 in this way; two rows of f32 or bf16 47 to 59, 43 to 56 and 51 to 58.
pub(crate) fn read_ahead(bytes: usize) -> usize {
    if bytes < CACHED_BYTES { 0 } else { 12 << 10 }
}

/// Values that are read as vectors of f32.
pub trait Lanes: Element {
    /// The first `count <= LANES` values, and zeros.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load<S: Simd>(s: S, src: *const Self, count: usize) -> S::F32;

    /// One value.
    fn value(self) -> f32;

    /// Computes some lanes as dot products.
    fn dots(job: Job<Self>) {
        dispatch(Dots(job));
    }
}

impl Lanes for f32 {
    #[inline(always)]
    unsafe fn load<S: Simd>(s: S, src: *const f32, count: usize) -> S::F32 {
        // SAFETY: the caller's contract.
        unsafe { if count == S::LANES { s.load(src) } else { s.load_partial(src, count) } }
    }
    #[inline(always)]
    fn value(self) -> f32 {
        self
    }
}

macro_rules! half_lanes {
    ($($t:ident by $load:ident $(, $dots:item)?;)*) => { $(
        impl Lanes for $t {
            #[inline(always)]
            unsafe fn load<S: Simd>(s: S, src: *const $t, count: usize) -> S::F32 {
                if count == S::LANES {
                    // SAFETY: the caller's contract.
                    return unsafe { s.$load(src) };
                }
                let mut lanes = [$t::ZERO; MAX_LANES];
                // SAFETY: `count` values are readable, and the array has room for them and for a whole vector.
                unsafe {
                    std::ptr::copy_nonoverlapping(src, lanes.as_mut_ptr(), count);
                    s.$load(lanes.as_ptr())
                }
            }
            #[inline(always)]
            fn value(self) -> f32 {
                self.widen()
            }
            $($dots)?
        }
    )* };
}
half_lanes! {
    f16 by load_f16;
    bf16 by load_bf16,
    fn dots(job: Job<bf16>) {
        #[cfg(target_arch = "x86_64")]
        if let (true, Some(simd), Some(pairs)) = (MicroKernels::has_bf16_pairs(), Avx512::detect(), Avx512Bf16::detect()) {
            // SAFETY: the tokens prove the features.
            return unsafe { paired_dots(simd, pairs, job) };
        }
        dispatch(Dots(job));
    };
}

/// What a step of K adds to the sums of dot products.
trait Step<S: Simd, T>: Copy {
    /// Values that it takes for each lane of a vector.
    const TERMS: usize;

    /// The first `count <= TERMS · LANES` values, and zeros.
    ///
    /// # Safety
    /// They must be readable.
    unsafe fn load(self, s: S, src: *const T, count: usize) -> S::F32;

    fn mul_add(self, x: S::F32, y: S::F32, sum: S::F32) -> S::F32;
}

/// A value a lane.
#[derive(Clone, Copy)]
struct Single;

impl<S: Simd, T: Lanes> Step<S, T> for Single {
    const TERMS: usize = 1;

    #[inline(always)]
    unsafe fn load(self, s: S, src: *const T, count: usize) -> S::F32 {
        // SAFETY: the caller's contract.
        unsafe { T::load(s, src, count) }
    }
    #[inline(always)]
    fn mul_add(self, x: S::F32, y: S::F32, sum: S::F32) -> S::F32 {
        x.mul_add(y, sum)
    }
}

/// A pair of bf16 a lane.
#[cfg(target_arch = "x86_64")]
impl Step<Avx512, bf16> for Avx512Bf16 {
    const TERMS: usize = 2;

    #[inline(always)]
    unsafe fn load(self, s: Avx512, src: *const bf16, count: usize) -> <Avx512 as Simd>::F32 {
        const WHOLE: usize = 2 * Avx512::LANES;
        if count == WHOLE {
            // SAFETY: 32 values are as long as 16 of f32, and a load takes any address.
            return unsafe { s.load(src.cast()) };
        }
        let mut values = [bf16::ZERO; WHOLE];
        // SAFETY: `count` values are readable, and the array has room for them and for a whole vector.
        unsafe {
            std::ptr::copy_nonoverlapping(src, values.as_mut_ptr(), count);
            s.load(values.as_ptr().cast())
        }
    }
    #[inline(always)]
    fn mul_add(self, x: <Avx512 as Simd>::F32, y: <Avx512 as Simd>::F32, sum: <Avx512 as Simd>::F32) -> <Avx512 as Simd>::F32 {
        sum.add_bf16_products(self, x, y)
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
fn paired_dots(simd: Avx512, pairs: Avx512Bf16, job: Job<bf16>) {
    Dots(job).run(simd, pairs);
}

/// Which form a product has, if one of the two, for rows of C `row_stride` apart.
fn form<T>(gemm: &Gemm<T, f32>, row_stride: usize) -> Option<Form> {
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let wide = m <= n;
    let rows = m.min(n);
    let contiguous = |stride: usize, extent: usize| stride == 1 || extent == 1;
    let k_contiguous = contiguous(gemm.a.col_stride(), k) && contiguous(gemm.b.row_stride(), k);
    let lanes_contiguous = if wide { contiguous(gemm.b.col_stride(), n) } else { contiguous(gemm.a.row_stride(), m) && row_stride == 1 };
    if rows <= MAX_DOT_ROWS && k_contiguous && k >= MIN_DOT_K {
        Some(Form::Dots)
    } else if rows == 1 && lanes_contiguous {
        Some(Form::Axpys)
    } else {
        None
    }
}

/// Whether [`try_gemm`] computes the product.
pub(super) fn is_one<T>(gemm: &Gemm<T, f32>, row_stride: usize) -> bool {
    form(gemm, row_stride).is_some()
}

/// Computes the product if it has one of the two forms.
pub(super) fn try_gemm<T: Lanes>(gemm: &Gemm<T, f32>, out: &mut [f32], row_stride: usize) -> bool {
    let Some(form) = form(gemm, row_stride) else { return false };
    let (m, n, k) = (gemm.a.rows(), gemm.b.cols(), gemm.a.cols());
    let wide = m <= n;
    let (rows, lanes) = if wide { (m, n) } else { (n, m) };
    let c = SharedMut::new(out);
    let chunk = match form {
        Form::Dots => (TASK_MACS / (rows * k)).min(TASK_BYTES / (k * size_of::<T>())).next_multiple_of(4).max(4),
        Form::Axpys => AXPY_LANES.min((TASK_MACS / k).next_multiple_of(64)).max(64),
    };
    let chunks = lanes.div_ceil(chunk);
    for_each(gemm.batch() * chunks, 2 * gemm.batch() * m * n * k / FLOP_PER_NS, |task| {
        let (i, part) = (task / chunks, task % chunks);
        let lanes = part * chunk..lanes.min((part + 1) * chunk);
        let job = Job::new(gemm, gemm.item(i), wide, lanes.clone(), c.get().wrapping_add(i * m * row_stride), row_stride);
        match form {
            Form::Dots => T::dots(job),
            Form::Axpys => dispatch(Axpys(job)),
        }
        let out = Out { c: c.get().wrapping_add(i * m * row_stride), row_stride };
        // SAFETY: these elements of C were this task's to write.
        unsafe {
            match (wide, n == 1 && row_stride == 1) {
                (true, _) => gemm.finish(out, 0..rows, lanes),
                // One column without gaps is one stretch of memory.
                (false, true) => gemm.finish(out, 0..1, lanes),
                (false, false) => gemm.finish(out, lanes, 0..rows),
            }
        }
    });
    true
}

#[derive(Clone, Copy)]
enum Form {
    Dots,
    Axpys,
}

/// Some lanes of one product: `out[r][l] = init + alpha · Σ_k small[r][k] · large[l][k]`.
pub struct Job<'a, T> {
    gemm: &'a Gemm<'a, T, f32>,
    /// `rows × k`.
    small: Matrix<T>,
    rows: usize,
    /// `lanes × k`.
    large: Matrix<T>,
    lanes: Range<usize>,
    k: usize,
    out: *mut f32,
    row_stride: usize,
    lane_stride: usize,
    /// Whether lanes are the columns of C.
    wide: bool,
}

impl<'a, T: Lanes> Job<'a, T> {
    fn new(gemm: &'a Gemm<'a, T, f32>, item: Item<T>, wide: bool, lanes: Range<usize>, out: *mut f32, row_stride: usize) -> Self {
        let Item { m, n, k, a, b } = item;
        if wide {
            Self { gemm, small: a, rows: m, large: b.t(), lanes, k, out, row_stride, lane_stride: 1, wide }
        } else {
            Self { gemm, small: b.t(), rows: n, large: a, lanes, k, out, row_stride: 1, lane_stride: row_stride, wide }
        }
    }

    /// How far ahead dot products ask for the memory of `large`: 0 if it is in pieces.
    #[inline(always)]
    fn read_ahead(&self) -> usize {
        let gemm = self.gemm;
        if self.large.row_stride != self.k {
            return 0;
        }
        read_ahead(gemm.batch() * gemm.a.rows().max(gemm.b.cols()) * self.k * size_of::<T>())
    }

    /// Adds the initial value to a finished sum and stores it.
    ///
    /// # Safety
    /// The element must lie in C, and belong to this task.
    #[inline(always)]
    unsafe fn finish(&self, row: usize, lane: usize, sum: f32) {
        let at = self.out.wrapping_add(row * self.row_stride + lane * self.lane_stride);
        let value = self.gemm.alpha as f32 * sum;
        // SAFETY: the caller's contract.
        unsafe {
            *at = match self.gemm.bias {
                Some(bias) => value + bias[if self.wide { lane } else { row }],
                None if self.gemm.accumulate => *at + value,
                None => value,
            }
        }
    }
}

/// Dot products of rows that are contiguous in both factors.
struct Dots<'a, T>(Job<'a, T>);

impl<T: Lanes> WithSimd for Dots<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        self.run(s, Single);
    }
}

impl<T: Lanes> Dots<'_, T> {
    #[inline(always)]
    fn run<S: Simd, P: Step<S, T>>(&self, s: S, step: P) {
        let ahead = self.0.read_ahead();
        // What comes from memory is best read nearly as it lies there; what is cached, or used by several rows, with more sums under way.
        if self.0.rows == 1 && ahead > 0 { self.lanes::<S, P, 2>(s, step, ahead) } else { self.lanes::<S, P, 4>(s, step, ahead) }
    }

    /// All lanes, `L` at a time.
    #[inline(always)]
    fn lanes<S: Simd, P: Step<S, T>, const L: usize>(&self, s: S, step: P, ahead: usize) {
        let Range { start, end } = self.0.lanes;
        let full = start + (end - start) / L * L;
        for lane in (start..full).step_by(L) {
            self.rows::<S, P, L>(s, step, lane, ahead);
        }
        for lane in full..end {
            self.rows::<S, P, 1>(s, step, lane, ahead);
        }
    }

    /// All rows with `L` lanes; the order of a sum does not depend on the tile that it is in.
    #[inline(always)]
    fn rows<S: Simd, P: Step<S, T>, const L: usize>(&self, s: S, step: P, lane: usize, ahead: usize) {
        let (four, two) = (self.0.rows / 4 * 4, self.0.rows / 2 * 2);
        for row in (0..four).step_by(4) {
            self.tile::<S, P, 4, L>(s, step, [row, lane], ahead);
        }
        for row in (four..two).step_by(2) {
            self.tile::<S, P, 2, L>(s, step, [row, lane], ahead);
        }
        for row in two..self.0.rows {
            self.tile::<S, P, 1, L>(s, step, [row, lane], ahead);
        }
    }

    #[inline(always)]
    fn tile<S: Simd, P: Step<S, T>, const R: usize, const L: usize>(&self, s: S, step: P, [row, lane]: [usize; 2], ahead: usize) {
        let job = &self.0;
        let small: [*const T; R] = std::array::from_fn(|r| job.small.at(row + r, 0));
        let large: [*const T; L] = std::array::from_fn(|l| job.large.at(lane + l, 0));
        let mut acc = [[s.zero(); L]; R];
        let terms = P::TERMS * S::LANES;
        let full = job.k / terms * terms;
        // Of several rows of `small` the first asks for all.
        let ahead = if row == 0 { ahead } else { 0 };
        let mut done = [[s.zero(); L]; R];
        let span = SPAN * terms;
        for first in (0..full).step_by(span) {
            if first > 0 {
                for (done, acc) in done.as_flattened_mut().iter_mut().zip(acc.as_flattened_mut()) {
                    *done = *done + *acc;
                    *acc = s.zero();
                }
            }
            for k in (first..full.min(first + span)).step_by(terms) {
                if ahead > 0 {
                    for l in 0..L {
                        s.prefetch(large[0].wrapping_add(k * L + l * terms).wrapping_byte_add(ahead).cast());
                    }
                }
                // SAFETY: a full vector of K is left of rows that lie inside their factors, whose extent was checked.
                unsafe { add_products(s, step, &mut acc, &small, &large, k, terms) };
            }
        }
        if full < job.k {
            // SAFETY: as above, with the rest of K.
            unsafe { add_products(s, step, &mut acc, &small, &large, full, job.k - full) };
        }
        for (r, (sums, done)) in acc.iter().zip(&done).enumerate() {
            for (l, (&sum, &done)) in sums.iter().zip(done).enumerate() {
                // SAFETY: the element is in this task's part of C.
                unsafe { job.finish(row + r, lane + l, (sum + done).reduce_sum()) };
            }
        }
    }
}

/// Adds the products of `count` values of each pair of rows, from `k` on. (Loops: `array::map` may become a function of its own, without the
/// level's instructions.)
///
/// # Safety
/// The values must be readable.
#[inline(always)]
unsafe fn add_products<S: Simd, T, P: Step<S, T>, const R: usize, const L: usize>(
    s: S,
    step: P,
    acc: &mut [[S::F32; L]; R],
    small: &[*const T; R],
    large: &[*const T; L],
    k: usize,
    count: usize,
) {
    let mut y = [s.zero(); L];
    for l in 0..L {
        // SAFETY: the caller's contract.
        y[l] = unsafe { step.load(s, large[l].add(k), count) };
    }
    for r in 0..R {
        // SAFETY: the caller's contract.
        let x = unsafe { step.load(s, small[r].add(k), count) };
        for l in 0..L {
            acc[r][l] = step.mul_add(x, y[l], acc[r][l]);
        }
    }
}

/// One row times a factor whose lanes are contiguous.
struct Axpys<'a, T>(Job<'a, T>);

impl<T: Lanes> WithSimd for Axpys<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        /// Rows that are added before the accumulators go back to L1.
        const ROWS: usize = 8;
        let job = &self.0;
        let width = job.lanes.len();
        let (mut sums, mut done) = ([0f32; AXPY_LANES], [0f32; AXPY_LANES]);
        let mut k = 0;
        while k < job.k {
            if k > 0 && k.is_multiple_of(SPAN) {
                for (done, sum) in done.iter_mut().zip(&mut sums) {
                    *done += *sum;
                    *sum = 0.0;
                }
            }
            let rows = ROWS.min(job.k - k);
            let mut x = [s.zero(); ROWS];
            let mut from = [job.large.at(job.lanes.start, k); ROWS];
            for r in 0..rows {
                // SAFETY: element k + r of the one row, which lies inside its factor.
                x[r] = s.splat(unsafe { job.small.at(0, k + r).read() }.value());
                from[r] = job.large.at(job.lanes.start, k + r);
            }
            let mut lane = 0;
            while lane + S::LANES <= width {
                // SAFETY: a full vector of the task's lanes is left, in the row of L1 and in each row of the factor.
                unsafe {
                    let at = sums.as_mut_ptr().add(lane);
                    let mut sum = s.load(at);
                    if rows == ROWS {
                        for (x, from) in x.iter().zip(&from) {
                            sum = x.mul_add(T::load(s, from.add(lane), S::LANES), sum);
                        }
                    } else {
                        for (x, from) in x.iter().zip(&from).take(rows) {
                            sum = x.mul_add(T::load(s, from.add(lane), S::LANES), sum);
                        }
                    }
                    sum.store(at);
                }
                lane += S::LANES;
            }
            if lane < width {
                let count = width - lane;
                // SAFETY: as above, with what is left of the lanes.
                unsafe {
                    let at = sums.as_mut_ptr().add(lane);
                    let mut sum = s.load_partial(at, count);
                    for (x, from) in x.iter().zip(&from).take(rows) {
                        sum = x.mul_add(T::load(s, from.add(lane), count), sum);
                    }
                    sum.store_partial(at, count);
                }
            }
            k += rows;
        }
        for (i, (&sum, &done)) in sums[..width].iter().zip(&done).enumerate() {
            // SAFETY: the element is in this task's part of C.
            unsafe { job.finish(0, job.lanes.start + i, sum + done) };
        }
    }
}
