//! Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
//!
//! # Layout of a stream
//!
//! Every device must follow it, so that one seed gives the same integers and uniforms everywhere, however the work is cut.
//!
//! - The key is the 64-bit seed (low word first). The 128-bit counter is the number of the block, low word first; a block gives four 32-bit words.
//! - Blocks are used in groups of sixteen, which give 64 words; `offset` counts groups. **Word i** of stream `(seed, offset)` is
//!   word `i / 16 % 4` of block `16 · (offset + i / 64) + i % 16`: sixteen lanes write each of their four words as a whole vector.
//! - **64-bit draw i** lies in block `16 · (offset + i / 32) + i % 16`; with `h = i / 16 % 2` it is `word[2h] << 32 | word[2h + 1]`.
//! - A call that draws n words uses `ceil(n / 64)` groups ([`groups_of_words`]), n 64-bit draws use `ceil(n / 32)` ([`groups_of_longs`]).
//!
//! # Distributions
//!
//! - Uniform in [0, 1): `(word >> 8) · 2⁻²⁴` in f32, `(draw >> 11) · 2⁻⁵³` in f64; f16 and bf16 keep as many bits as their significand holds (11 and 8).
//! - Normal, by Box and Muller: `u = (float(word_a >> 1) + 1) · 2⁻³¹`, `v = (word_b >> 8) · 2⁻²⁴`, `√(−2 ln u) · (cos 2πv, sin 2πv)` for words (a, b) = (0, 1) and (2, 3) of
//!   a block, in the places of a and b. In f64 the two draws of a block give `u = ((draw₀ >> 11) + 1) · 2⁻⁵³`, `v = (draw₁ >> 11) · 2⁻⁵³`. f16 and bf16 round the f32 value.
//! - Integers in [low, low + range): `low + (draw · range >> 64)`; no value is more than `range · 2⁻⁶⁴` likelier than another.
//! - Bernoulli: true where `word >> 8 < ceil(p · 2²⁴)`, which is where the uniform is below p.

use super::isa::{WithSimd, dispatch};
use super::parallel;
use super::simd::{F32s, I32s, Simd};
use crate::element::{Bool, Float};
use half::{bf16, f16};

/// Words of a group.
const GROUP: usize = 64;
/// Blocks of a group: the widest vector's lanes.
const BLOCKS: usize = 16;
/// Elements a task draws: some 20 µs.
const TASK: usize = 16 * 1024;

const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// Where random words come from: a key, and the group to begin with. See the module's head for the layout.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Stream {
    /// Chooses the sequence.
    pub seed: u64,
    /// The first group of 64 words.
    pub offset: u64,
}

/// Groups that `n` 32-bit words use up.
pub fn groups_of_words(n: usize) -> u64 {
    n.div_ceil(GROUP) as u64
}

/// Groups that `n` 64-bit draws use up.
pub fn groups_of_longs(n: usize) -> u64 {
    n.div_ceil(GROUP / 2) as u64
}

impl Stream {
    /// The stream that begins `groups` groups later.
    #[inline(always)]
    fn skip(self, groups: usize) -> Self {
        Self { offset: self.offset.wrapping_add(groups as u64), ..self }
    }

    /// Counter of the first block, low word first; its lowest four bits are zero.
    #[inline(always)]
    fn counter(self) -> [u32; 4] {
        let block = self.offset as u128 * BLOCKS as u128;
        std::array::from_fn(|w| (block >> (32 * w)) as u32)
    }
}

/// One block of Philox4x32-10, for a single counter.
pub fn philox4x32(counter: [u32; 4], seed: u64) -> [u32; 4] {
    let mut key = [seed as u32, (seed >> 32) as u32];
    let [mut a, mut b, mut c, mut d] = counter;
    for _ in 0..ROUNDS {
        let first = a as u64 * MULTIPLIERS[0] as u64;
        let second = c as u64 * MULTIPLIERS[1] as u64;
        (a, b, c, d) = ((second >> 32) as u32 ^ b ^ key[0], second as u32, (first >> 32) as u32 ^ d ^ key[1], first as u32);
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    [a, b, c, d]
}

/// Blocks `first_lane..` of a group, one a lane.
#[inline(always)]
fn philox_lanes<S: Simd>(s: S, stream: Stream, first_lane: usize) -> [S::I32; 4] {
    static LANES: [f32; BLOCKS] = {
        let mut lanes = [0.0; BLOCKS];
        let mut i = 0;
        while i < BLOCKS {
            lanes[i] = f32::from_bits(i as u32);
            i += 1;
        }
        lanes
    };
    let counter = stream.counter();
    let lanes = s.load_slice(&LANES[first_lane..]).to_bits();
    // The lowest bits of the counter are free for the lane.
    let mut a = s.splat_i32(counter[0] as i32) | lanes;
    let (mut b, mut c, mut d) = (s.splat_i32(counter[1] as i32), s.splat_i32(counter[2] as i32), s.splat_i32(counter[3] as i32));
    let mut key = [stream.seed as u32, (stream.seed >> 32) as u32];
    for _ in 0..ROUNDS {
        let (first_high, first_low) = a.widening_mul(MULTIPLIERS[0]);
        let (second_high, second_low) = c.widening_mul(MULTIPLIERS[1]);
        (a, b, c, d) = (second_high ^ b ^ s.splat_i32(key[0] as i32), second_low, first_high ^ d ^ s.splat_i32(key[1] as i32), first_low);
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    [a, b, c, d]
}

/// What becomes of a block's four words.
trait Distribution: Copy + Send + Sync {
    /// The four results, as bit patterns of 32 bits. (Written without `array::map`, whose closures are not always inlined into the
    /// function that has the instructions: that made uniforms slower than normals.)
    fn apply<S: Simd>(self, s: S, words: [S::I32; 4]) -> [S::F32; 4];
}

/// The words themselves, as the bits of an f32.
#[derive(Clone, Copy)]
struct Words;
impl Distribution for Words {
    #[inline(always)]
    fn apply<S: Simd>(self, _: S, words: [S::I32; 4]) -> [S::F32; 4] {
        let [a, b, c, d] = words;
        [a.from_bits(), b.from_bits(), c.from_bits(), d.from_bits()]
    }
}

/// Uniform in [0, 1) with 24 bits.
#[derive(Clone, Copy)]
struct Uniform;
impl Distribution for Uniform {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, words: [S::I32; 4]) -> [S::F32; 4] {
        let [a, b, c, d] = words;
        [unit(s, a), unit(s, b), unit(s, c), unit(s, d)]
    }
}

/// `(word >> 8) · 2⁻²⁴`, exactly.
#[inline(always)]
fn unit<S: Simd>(s: S, word: S::I32) -> S::F32 {
    word.shr_logical::<8>().to_f32() * s.splat(1.0 / (1 << 24) as f32)
}

/// Standard normal.
#[derive(Clone, Copy)]
struct Normal;
impl Distribution for Normal {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, words: [S::I32; 4]) -> [S::F32; 4] {
        let [a, b, c, d] = words;
        let ((x, y), (z, w)) = (box_muller(s, a, b), box_muller(s, c, d));
        [x, y, z, w]
    }
}

#[inline(always)]
fn box_muller<S: Simd>(s: S, a: S::I32, b: S::I32) -> (S::F32, S::F32) {
    let u = (a.shr_logical::<1>().to_f32() + s.splat(1.0)) * s.splat(1.0 / (1u32 << 31) as f32);
    let radius = (ln(s, u) * s.splat(-2.0)).sqrt();
    let (sin, cos) = sin_cos_turns(s, unit(s, b));
    (radius * cos, radius * sin)
}

/// Natural logarithm of a normal number in (0, 1]: Cephes' `logf`, 1 ULP on this range.
#[inline(always)]
fn ln<S: Simd>(s: S, x: S::F32) -> S::F32 {
    const POLYNOMIAL: [f32; 9] = [
        7.037_683_6e-2,
        -1.151_461e-1,
        1.167_699_9e-1,
        -1.242_014_1e-1,
        1.424_932_3e-1,
        -1.666_805_8e-1,
        2.000_071_5e-1,
        -2.499_999_4e-1,
        3.333_333e-1,
    ];
    // x = 2^e · (1 + f), 1 + f in [√½, √2): subtracting the bits of √½ moves the cut of the exponent there.
    const SQRT_HALF_BITS: i32 = std::f32::consts::FRAC_1_SQRT_2.to_bits() as i32;
    let bits = x.to_bits() - s.splat_i32(SQRT_HALF_BITS);
    let e = bits.shr::<23>().to_f32();
    let mantissa = (bits & s.splat_i32(0x007F_FFFF)) + s.splat_i32(SQRT_HALF_BITS);
    let f = mantissa.from_bits() - s.splat(1.0);
    let square = f * f;
    let mut p = s.splat(POLYNOMIAL[0]);
    for c in &POLYNOMIAL[1..] {
        p = p.mul_add(f, s.splat(*c));
    }
    // ln 2 in two parts; the high one has few bits, so that its product with e is exact.
    let low = (p * f).mul_add(square, e * s.splat(-2.121_944_4e-4)) - square * s.splat(0.5);
    e.mul_add(s.splat(0.693_359_4), f + low)
}

/// (sin 2πt, cos 2πt) for t in [0, 1): an exact reduction to an eighth of a turn, then Cephes' `sinf` and `cosf`.
#[inline(always)]
fn sin_cos_turns<S: Simd>(s: S, t: S::F32) -> (S::F32, S::F32) {
    let quarters = t * s.splat(4.0);
    let nearest = quarters.round();
    let quadrant = nearest.to_i32();
    let x = (quarters - nearest) * s.splat(std::f32::consts::FRAC_PI_2);
    let z = x * x;
    let sin = s.splat(-1.951_529_6e-4).mul_add(z, s.splat(8.332_161e-3)).mul_add(z, s.splat(-1.666_665_5e-1));
    let sin = (sin * z).mul_add(x, x);
    let cos = s.splat(2.443_315_7e-5).mul_add(z, s.splat(-1.388_731_6e-3)).mul_add(z, s.splat(4.166_664_6e-2));
    let cos = (cos * z).mul_add(z, z.mul_add(s.splat(-0.5), s.splat(1.0)));
    let odd = !(quadrant & s.splat_i32(1)).eq(s.splat_i32(0));
    // Bit 1 of the quadrant is the sign of the sine, that of the next quadrant the sign of the cosine.
    let sin_sign = (quadrant & s.splat_i32(2)).shl::<30>();
    let cos_sign = ((quadrant + s.splat_i32(1)) & s.splat_i32(2)).shl::<30>();
    ((cos.or_else(odd, sin).to_bits() ^ sin_sign).from_bits(), (sin.or_else(odd, cos).to_bits() ^ cos_sign).from_bits())
}

/// Fills `out` from the front of `stream`.
struct Fill<'a, D> {
    stream: Stream,
    distribution: D,
    out: &'a mut [f32],
}

impl<D: Distribution> WithSimd for Fill<'_, D> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let (whole, rest) = self.out.as_chunks_mut::<GROUP>();
        let groups = whole.len();
        for (g, out) in whole.iter_mut().enumerate() {
            fill_group(s, self.stream.skip(g), self.distribution, out);
        }
        if !rest.is_empty() {
            let mut last = [0.0; GROUP];
            fill_group(s, self.stream.skip(groups), self.distribution, &mut last);
            rest.copy_from_slice(&last[..rest.len()]);
        }
    }
}

#[inline(always)]
fn fill_group<S: Simd>(s: S, stream: Stream, distribution: impl Distribution, out: &mut [f32; GROUP]) {
    for lane in (0..BLOCKS).step_by(S::LANES) {
        let results = distribution.apply(s, philox_lanes(s, stream, lane));
        for (w, result) in results.into_iter().enumerate() {
            result.store_slice(&mut out[w * BLOCKS + lane..], S::LANES);
        }
    }
}

/// Calls `f(part of the stream, chunk)` for the chunks of `out`, each of which begins a group.
fn for_each_task<T: Send>(stream: Stream, out: &mut [T], draws_of_group: usize, ns: usize, f: impl Fn(Stream, &mut [T]) + Sync + Send) {
    parallel::for_each_chunk(out, TASK, ns, |i, chunk| f(stream.skip(i * (TASK / draws_of_group)), chunk));
}

fn fill_f32(stream: Stream, distribution: impl Distribution, out: &mut [f32]) {
    let ns = out.len() * 2;
    for_each_task(stream, out, GROUP, ns, |stream, out| dispatch(Fill { stream, distribution, out }));
}

/// As [`fill_f32`], each value turned by `f` into another type, group by group.
fn fill_converted<T: Send>(stream: Stream, distribution: impl Distribution, out: &mut [T], f: impl Fn(f32) -> T + Sync + Send) {
    let ns = out.len() * 3;
    for_each_task(stream, out, GROUP, ns, |stream, out| {
        for (g, out) in out.chunks_mut(8 * GROUP).enumerate() {
            let mut tile = [0.0; 8 * GROUP];
            let tile = &mut tile[..out.len()];
            dispatch(Fill { stream: stream.skip(8 * g), distribution, out: tile });
            out.iter_mut().zip(tile).for_each(|(o, &mut x)| *o = f(x));
        }
    });
}

/// The stream's words.
pub fn words(stream: Stream, out: &mut [u32]) {
    fill_converted(stream, Words, out, f32::to_bits);
}

/// Calls `f(two draws of a block)` for the blocks of a group, which puts the results into places `lane` and `lane + 16` of `out`.
fn for_each_pair<T: Copy + Send + Default>(stream: Stream, out: &mut [T], f: impl Fn(u64, u64) -> (T, T) + Sync + Send) {
    let ns = out.len() * 20;
    for_each_task(stream, out, GROUP / 2, ns, |stream, out| {
        for (g, out) in out.chunks_mut(GROUP / 2).enumerate() {
            let mut tile = [0.0; GROUP];
            dispatch(Fill { stream: stream.skip(g), distribution: Words, out: &mut tile });
            let long =
                |w: usize, lane: usize| (tile[w * BLOCKS + lane].to_bits() as u64) << 32 | tile[(w + 1) * BLOCKS + lane].to_bits() as u64;
            let mut results = [T::default(); GROUP / 2];
            for lane in 0..BLOCKS {
                (results[lane], results[lane + BLOCKS]) = f(long(0, lane), long(2, lane));
            }
            out.copy_from_slice(&results[..out.len()]);
        }
    });
}

/// The stream's 64-bit draws.
pub fn longs(stream: Stream, out: &mut [u64]) {
    for_each_pair(stream, out, |a, b| (a, b));
}

/// A float type with its random distributions.
pub trait RandomFloat: Float {
    /// Groups of the stream that filling `n` values uses up.
    fn groups(n: usize) -> u64 {
        groups_of_words(n)
    }
    /// Uniform in [0, 1).
    fn uniform(stream: Stream, out: &mut [Self]);
    /// Standard normal.
    fn normal(stream: Stream, out: &mut [Self]);
}

impl RandomFloat for f32 {
    fn uniform(stream: Stream, out: &mut [f32]) {
        fill_f32(stream, Uniform, out);
    }
    fn normal(stream: Stream, out: &mut [f32]) {
        fill_f32(stream, Normal, out);
    }
}

impl RandomFloat for f16 {
    fn uniform(stream: Stream, out: &mut [f16]) {
        fill_converted(stream, Words, out, |w| f16::from_f32((w.to_bits() >> 21) as f32 / (1 << 11) as f32));
    }
    fn normal(stream: Stream, out: &mut [f16]) {
        fill_converted(stream, Normal, out, f16::from_f32);
    }
}

impl RandomFloat for bf16 {
    fn uniform(stream: Stream, out: &mut [bf16]) {
        fill_converted(stream, Words, out, |w| bf16::from_f32((w.to_bits() >> 24) as f32 / (1 << 8) as f32));
    }
    fn normal(stream: Stream, out: &mut [bf16]) {
        fill_converted(stream, Normal, out, bf16::from_f32);
    }
}

impl RandomFloat for f64 {
    fn groups(n: usize) -> u64 {
        groups_of_longs(n)
    }
    fn uniform(stream: Stream, out: &mut [f64]) {
        for_each_pair(stream, out, |a, b| (unit_f64(a), unit_f64(b)));
    }
    fn normal(stream: Stream, out: &mut [f64]) {
        for_each_pair(stream, out, |a, b| {
            let radius = (-2.0 * (unit_f64(a) + UNIT_F64).ln()).sqrt();
            let (sin, cos) = (std::f64::consts::TAU * unit_f64(b)).sin_cos();
            (radius * cos, radius * sin)
        });
    }
}

const UNIT_F64: f64 = 1.0 / (1u64 << 53) as f64;

fn unit_f64(draw: u64) -> f64 {
    (draw >> 11) as f64 * UNIT_F64
}

/// Integers in `[low, low + range)`, from 64-bit draws; sums wrap. A range of 0 gives `low`.
pub fn integers(stream: Stream, low: i64, range: u64, out: &mut [i64]) {
    let map = |draw: u64| low.wrapping_add(((draw as u128 * range as u128) >> 64) as i64);
    for_each_pair(stream, out, |a, b| (map(a), map(b)));
}

/// The number of 24-bit values below `p` (clamped to [0, 1]): an event of that probability is a word whose upper 24 bits are below it.
pub(crate) fn threshold(p: f64) -> u32 {
    (p.clamp(0.0, 1.0) * (1 << 24) as f64).ceil() as u32
}

/// True with probability `p`.
pub fn bernoulli(stream: Stream, p: f64, out: &mut [Bool]) {
    let threshold = threshold(p);
    fill_converted(stream, Words, out, |w| Bool::from(w.to_bits() >> 8 < threshold));
}

/// Zeroes each element with probability `p` and multiplies the others by `1 / (1 − p)`.
/// An element is zeroed where [`bernoulli`] of the same stream and `p` is true, so the backward pass needs no mask: it is the same call.
///
/// # Panics
/// If the lengths differ.
pub fn dropout<T: Float>(stream: Stream, p: f64, x: &[T], out: &mut [T]) {
    assert_eq!(x.len(), out.len());
    let threshold = threshold(p);
    let scale = <T::Compute as crate::element::Element>::from_f64(if p < 1.0 { 1.0 / (1.0 - p) } else { 0.0 });
    let ns = out.len() * 2;
    parallel::for_each_chunk(out, TASK, ns, |i, out| {
        let x = &x[i * TASK..][..out.len()];
        dispatch(Drop { stream: stream.skip(i * (TASK / GROUP)), threshold, scale, x, out });
    });
}

/// Which elements [`dropout`] of a stream zeroes, for kernels that apply it on the way.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Dropout {
    /// Element i is decided by word i.
    pub stream: Stream,
    /// The probability of zero.
    pub p: f64,
}

impl Dropout {
    /// What the elements from `first` on are multiplied by: zero or `1 / (1 − p)`.
    #[inline(always)]
    pub(super) fn factors<S: Simd>(self, s: S, first: usize, factors: &mut [f32]) {
        let distribution = Kept { threshold: threshold(self.p) as f32, scale: (1.0 / (1.0 - self.p)) as f32 };
        let skipped = first % GROUP;
        let (begun, rest) = factors.split_at_mut(((GROUP - skipped) % GROUP).min(factors.len()));
        if !begun.is_empty() {
            let mut group = [0.0; GROUP];
            fill_group(s, self.stream.skip(first / GROUP), distribution, &mut group);
            begun.copy_from_slice(&group[skipped..skipped + begun.len()]);
        }
        Fill { stream: self.stream.skip(first.div_ceil(GROUP)), distribution, out: rest }.with_simd(s);
    }
}

/// Zero where the upper 24 bits of the word, which f32 holds exactly, are below the threshold.
#[derive(Clone, Copy)]
struct Kept {
    threshold: f32,
    scale: f32,
}
impl Distribution for Kept {
    #[inline(always)]
    fn apply<S: Simd>(self, s: S, words: [S::I32; 4]) -> [S::F32; 4] {
        let [a, b, c, d] = words;
        [self.factor(s, a), self.factor(s, b), self.factor(s, c), self.factor(s, d)]
    }
}
impl Kept {
    #[inline(always)]
    fn factor<S: Simd>(self, s: S, word: S::I32) -> S::F32 {
        s.zero().or_else(word.shr_logical::<8>().to_f32().lt(s.splat(self.threshold)), s.splat(self.scale))
    }
}

struct Drop<'a, T: Float> {
    stream: Stream,
    threshold: u32,
    scale: T::Compute,
    x: &'a [T],
    out: &'a mut [T],
}

impl<T: Float> WithSimd for Drop<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let zero = T::from_f64(0.0);
        for (g, (out, x)) in self.out.chunks_mut(GROUP).zip(self.x.chunks(GROUP)).enumerate() {
            let mut words = [0.0; GROUP];
            fill_group(s, self.stream.skip(g), Words, &mut words);
            for ((out, &x), word) in out.iter_mut().zip(x).zip(&words) {
                let kept = T::narrow(x.widen() * self.scale);
                *out = if word.to_bits() >> 8 < self.threshold { zero } else { kept };
            }
        }
    }
}

/// A random order of `0..out.len()`: Fisher and Yates' shuffle from the end, element i swapped with `draw_i · (i + 1) >> 64`.
pub fn permutation(stream: Stream, out: &mut [i64]) {
    const DRAWS: usize = GROUP / 2;
    out.iter_mut().enumerate().for_each(|(i, o)| *o = i as i64);
    for group in (0..out.len().div_ceil(DRAWS)).rev() {
        let mut draws = [0; DRAWS];
        longs(stream.skip(group), &mut draws);
        for i in (group * DRAWS..out.len().min((group + 1) * DRAWS)).rev() {
            out.swap(i, ((draws[i % DRAWS] as u128 * (i as u128 + 1)) >> 64) as usize);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: Stream = Stream { seed: 0x1234_5678_9ABC_DEF0, offset: 0xFFFF_FFFF_FFF0_0003 };

    /// The module's head, literally.
    fn word(stream: Stream, i: usize) -> u32 {
        let block = 16 * (stream.offset.wrapping_add(i as u64 / 64) as u128) + i as u128 % 16;
        philox4x32(std::array::from_fn(|w| (block >> (32 * w)) as u32), stream.seed)[i / 16 % 4]
    }

    /// From Random123's `kat_vectors`.
    #[test]
    fn known_answers() {
        assert_eq!(philox4x32([0; 4], 0), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], u64::MAX), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let digits_of_pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(philox4x32(digits_of_pi, 0x299f_31d0_a409_3822), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn factors_are_those_of_dropout_wherever_they_begin() {
        struct From<'a>(Dropout, usize, &'a mut [f32]);
        impl WithSimd for From<'_> {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, s: S) {
                self.0.factors(s, self.1, self.2);
            }
        }
        for p in [0.0, 0.1, 0.75] {
            let mut expected = vec![0.0; 1000];
            dropout(STREAM, p, &[1f32; 1000], &mut expected);
            for (first, len) in [(0, 1000), (0, 64), (1, 62), (1, 63), (63, 1), (64, 200), (77, 3), (700, 300), (5, 0)] {
                let mut factors = vec![9.0; len];
                dispatch(From(Dropout { stream: STREAM, p }, first, &mut factors));
                assert_eq!(factors, expected[first..first + len], "{p} {first} {len}");
            }
        }
    }

    #[test]
    fn every_word_is_where_the_layout_says() {
        for n in [0, 1, 63, 64, 65, 1000, 3 * TASK + 77] {
            let mut out = vec![0; n];
            words(STREAM, &mut out);
            assert!(out.iter().enumerate().all(|(i, &w)| w == word(STREAM, i)), "{n}");
            let mut out = vec![0; n];
            longs(STREAM, &mut out);
            let draw = |i: usize| {
                let at = i / 32 * 64 + i % 16 + i / 16 % 2 * 32;
                (word(STREAM, at) as u64) << 32 | word(STREAM, at + 16) as u64
            };
            assert!(out.iter().enumerate().all(|(i, &w)| w == draw(i)), "{n}");
        }
    }

    #[test]
    fn uniforms_are_the_words_upper_bits() {
        let mut out = vec![0f32; 1000];
        f32::uniform(STREAM, &mut out);
        assert!(out.iter().enumerate().all(|(i, &u)| u == (word(STREAM, i) >> 8) as f32 / (1 << 24) as f32 && u < 1.0));
        let mut half = vec![bf16::ZERO; 100_000];
        bf16::uniform(STREAM, &mut half);
        assert!(half.iter().all(|u| u.to_f32() < 1.0));
        let mean = half.iter().map(|u| u.to_f64()).sum::<f64>() / half.len() as f64;
        assert!((mean - 0.498).abs() < 0.004, "{mean}");
        let mut half = vec![f16::ZERO; 1000];
        f16::uniform(STREAM, &mut half);
        assert!(half.iter().all(|u| u.to_f32() < 1.0));
    }

    /// Compares the first four moments and the tails with the normal distribution's.
    fn check_moments(x: &[f64]) {
        let n = x.len() as f64;
        let moment = |k: i32| x.iter().map(|v| v.powi(k)).sum::<f64>() / n;
        assert!(moment(1).abs() < 5.0 / n.sqrt());
        assert!((moment(2) - 1.0).abs() < 8.0 / n.sqrt());
        assert!(moment(3).abs() < 20.0 / n.sqrt());
        assert!((moment(4) - 3.0).abs() < 50.0 / n.sqrt());
        let beyond_three = x.iter().filter(|v| v.abs() > 3.0).count() as f64 / n;
        assert!((beyond_three - 0.0027).abs() < 0.0004, "{beyond_three}");
    }

    #[test]
    fn normals_follow_the_formula_and_the_distribution() {
        let mut out = vec![0f32; 200_003];
        f32::normal(STREAM, &mut out);
        for (i, &z) in out.iter().enumerate() {
            let first = i / 32 * 32 + i % 16;
            let u = ((word(STREAM, first) >> 1) as f32 + 1.0) as f64 / (1u64 << 31) as f64;
            let v = (word(STREAM, first + 16) >> 8) as f64 / (1 << 24) as f64;
            let (sin, cos) = (std::f64::consts::TAU * v).sin_cos();
            let expected = (-2.0 * u.ln()).sqrt() * if i / 16 % 2 == 0 { cos } else { sin };
            assert!((z as f64 - expected).abs() < 2e-6, "{i}: {z} {expected}");
        }
        check_moments(&out.iter().map(|&z| z as f64).collect::<Vec<_>>());
        let mut out = vec![0f64; 200_000];
        f64::normal(STREAM, &mut out);
        check_moments(&out);
        let mut out = vec![f16::ZERO; 200_000];
        f16::normal(STREAM, &mut out);
        check_moments(&out.iter().map(|z| z.to_f64()).collect::<Vec<_>>());
    }

    #[test]
    fn the_extremes_of_a_word_give_finite_normals() {
        struct Extremes;
        impl WithSimd for Extremes {
            type Output = ();
            #[inline(always)]
            fn with_simd<S: Simd>(self, s: S) {
                for a in [0, 1, -1, i32::MAX, i32::MIN] {
                    for b in [0, -1, 0x2000_0000, 0x4000_0000, i32::MIN] {
                        let (x, y) = box_muller(s, s.splat_i32(a), s.splat_i32(b));
                        for z in [x, y] {
                            assert!(z.reduce_max().abs() < 6.6 && z.reduce_min().is_finite(), "{a} {b}");
                        }
                    }
                }
            }
        }
        dispatch(Extremes);
    }

    #[test]
    fn integers_cover_their_range_evenly() {
        let mut out = vec![0; 70_000];
        integers(STREAM, -3, 7, &mut out);
        for value in -3..4 {
            let count = out.iter().filter(|&&x| x == value).count();
            assert!((9_500..10_500).contains(&count), "{value}: {count}");
        }
        integers(STREAM, i64::MIN, u64::MAX, &mut out);
        assert!(out.iter().any(|&x| x > 0) && out.iter().any(|&x| x < 0));
        integers(STREAM, 5, 1, &mut out);
        assert!(out.iter().all(|&x| x == 5));
    }

    #[test]
    fn dropout_zeroes_where_bernoulli_is_true() {
        let x: Vec<f32> = (0..40_000).map(|i| i as f32 + 1.0).collect();
        let mut out = vec![0f32; x.len()];
        let mut mask = vec![Bool(7); x.len()];
        for p in [0.0, 0.3, 1.0] {
            dropout(STREAM, p, &x, &mut out);
            bernoulli(STREAM, p, &mut mask);
            let share = mask.iter().filter(|m| m.get()).count() as f64 / x.len() as f64;
            assert!((share - p).abs() < 0.01, "{p}: {share}");
            let scale = (1.0 / (1.0 - p)) as f32;
            assert!(x.iter().zip(&out).zip(&mask).all(|((x, o), m)| *o == if m.get() { 0.0 } else { x * scale }));
        }
    }

    #[test]
    fn a_permutation_holds_each_number_once() {
        for n in [0, 1, 2, 1000] {
            let mut out = vec![0; n];
            permutation(STREAM, &mut out);
            assert!(n < 1000 || out[..10] != [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
            out.sort_unstable();
            assert!(out.iter().enumerate().all(|(i, &x)| x == i as i64));
        }
    }
}
