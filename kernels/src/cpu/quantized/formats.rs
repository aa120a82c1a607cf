//! What codes mean, a file-local type for each [`Quantization`](super::Quantization). The layouts of blocks are ggml's (`ggml-common.h`).
//!
//! A format decodes one *unit* of a row at a time, vector by vector into a [`Sink`]: to memory, or straight into sums.

use crate::cpu::cast::f16_to_f32;
use crate::cpu::simd::{F32s, I32s, Simd};

/// Where the codes of a row begin, and the scales, if they lie apart.
#[derive(Clone, Copy)]
pub(super) struct Row {
    pub(super) codes: *const u8,
    pub(super) scales: *const u8,
}

/// Takes decoded values.
pub(super) trait Sink<S: Simd> {
    /// A vector of values, the first of which is the `at`th of its unit.
    ///
    /// # Safety
    /// The vector must lie in the unit.
    unsafe fn put(&mut self, s: S, at: usize, values: S::F32);
}

/// Writes a unit to memory.
pub(super) struct Store(pub(super) *mut f32);

impl<S: Simd> Sink<S> for Store {
    #[inline(always)]
    unsafe fn put(&mut self, _: S, at: usize, values: S::F32) {
        // SAFETY: whoever made the struct vouches for room for a unit.
        unsafe { values.store(self.0.add(at)) }
    }
}

/// A way to store a row.
pub(super) trait Format: Copy + Send + Sync {
    /// Values that are decoded together: a multiple of the lanes of every level, and a divisor of [`MAX_UNIT`](super::MAX_UNIT).
    const UNIT: usize;

    /// Decodes unit `unit` of a row, each value rounded once from what it stands for.
    ///
    /// # Safety
    /// The unit must lie in the row's memory.
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K);
}

/// Reads bytes of any alignment.
///
/// # Safety
/// They must be readable.
#[inline(always)]
unsafe fn bytes<const N: usize>(from: *const u8) -> [u8; N] {
    // SAFETY: the caller's contract; an array of bytes has alignment 1.
    unsafe { from.cast::<[u8; N]>().read() }
}

/// A little-endian f16.
///
/// # Safety
/// It must be readable.
#[inline(always)]
unsafe fn half(from: *const u8) -> f32 {
    // SAFETY: the caller's contract.
    f16_to_f32(u16::from_le_bytes(unsafe { bytes(from) }))
}

/// A little-endian bf16.
#[inline(always)]
fn brain(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

/// Signed bytes, and a bf16 for each group.
#[derive(Clone, Copy)]
pub(super) struct Int8 {
    /// log₂ of the units of a group.
    shift: u32,
}

impl Int8 {
    pub(super) fn new(group: usize) -> Self {
        Self { shift: u32::from(group > Self::UNIT) }
    }
}

impl Format for Int8 {
    const UNIT: usize = 64;

    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K) {
        // SAFETY: a unit has 64 bytes, and each group that holds columns a scale.
        unsafe {
            let scale = s.splat(brain(bytes(row.scales.add((unit >> self.shift) * 2))));
            let codes = row.codes.add(unit * Self::UNIT).cast::<i8>();
            for at in (0..Self::UNIT).step_by(S::LANES) {
                sink.put(s, at, s.load_i8(codes.add(at)).to_f32() * scale);
            }
        }
    }
}

/// Nibbles, and a scale and a minimum in bf16 for each group. A unit is 16 words: bits 4j to 4j + 3 of word w are value 16j + w, so that a
/// vector of words gives eight vectors of values by shifts.
#[derive(Clone, Copy)]
pub(super) struct Int4 {
    group: usize,
}

impl Int4 {
    pub(super) fn new(group: usize) -> Self {
        Self { group }
    }
}

/// Words of a unit of [`Int4`].
pub(super) const WORDS: usize = 16;

impl Format for Int4 {
    const UNIT: usize = 8 * WORDS;

    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K) {
        // SAFETY: a unit has 64 bytes, and a scale and a minimum for each of its groups.
        unsafe {
            let words = row.codes.add(unit * Self::UNIT / 2).cast::<f32>();
            let meanings = row.scales.add(unit * Self::UNIT / self.group * 4);
            let low = meaning(s, meanings);
            let high = if self.group < Self::UNIT { meaning(s, meanings.add(4)) } else { low };
            for w in (0..WORDS).step_by(S::LANES) {
                let mut codes = s.load(words.add(w)).to_bits();
                for j in 0..8 {
                    sink.put(s, j * WORDS + w, s.nibbles(codes, if j < 4 { low } else { high }));
                    codes = codes.shr_logical::<4>();
                }
            }
        }
    }
}

/// What the codes of a group of [`Int4`] mean.
///
/// # Safety
/// Its four bytes must be readable.
#[inline(always)]
unsafe fn meaning<S: Simd>(s: S, from: *const u8) -> [S::F32; 2] {
    // SAFETY: the caller's contract.
    let both = s.splat_i32(i32::from_le_bytes(unsafe { bytes(from) }));
    // A bf16 is the upper half of an f32.
    s.nibble_values(both.shl::<16>().from_bits(), (both & s.splat_i32(!0xFFFF)).from_bits())
}

/// Blocks of 32: d, and a signed byte for each value.
#[derive(Clone, Copy)]
pub(super) struct Q8_0;

impl Format for Q8_0 {
    const UNIT: usize = 32;

    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K) {
        // SAFETY: a block has 34 bytes.
        unsafe {
            let block = row.codes.add(unit * 34);
            let d = s.splat(half(block));
            let codes = block.add(2).cast::<i8>();
            for at in (0..Self::UNIT).step_by(S::LANES) {
                sink.put(s, at, s.load_i8(codes.add(at)).to_f32() * d);
            }
        }
    }
}

/// Blocks of 32: d, and 16 bytes whose low nibbles are the first 16 values, and the high ones the others.
#[derive(Clone, Copy)]
pub(super) struct Q4_0;

impl Format for Q4_0 {
    const UNIT: usize = 32;

    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K) {
        // SAFETY: a block has 18 bytes.
        unsafe {
            let block = row.codes.add(unit * 18);
            let d = half(block);
            // Both products are exact, and so is their sum.
            let meaning = s.nibble_values(s.splat(d), s.splat(-8.0 * d));
            for at in (0..16).step_by(S::LANES) {
                let codes = s.load_u8(block.add(2 + at));
                sink.put(s, at, s.nibbles(codes, meaning));
                sink.put(s, 16 + at, s.nibbles(codes.shr_logical::<4>(), meaning));
            }
        }
    }
}

/// Blocks of 256: d, dₘ, twelve bytes of 6-bit scales and minima for each 32 values, and 128 bytes of nibbles: each 32 of them hold two
/// runs of 32 values, the first in the low nibbles.
#[derive(Clone, Copy)]
pub(super) struct Q4K;

impl Q4K {
    /// The 6-bit scale and minimum of run `j`: of the first four in the low bits of bytes j and 4 + j; of the others the low bits share
    /// byte 4 + j, and the high ones are the upper two of bytes j − 4 and j.
    #[inline(always)]
    fn scale_and_min(packed: &[u8; 12], j: usize) -> [f32; 2] {
        let [scale, min] = if j < 4 {
            [packed[j] & 63, packed[j + 4] & 63]
        } else {
            [packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4]
        };
        [f32::from(scale), f32::from(min)]
    }
}

impl Format for Q4K {
    const UNIT: usize = 256;

    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K) {
        // SAFETY: a block has 144 bytes.
        unsafe {
            let block = row.codes.add(unit * 144);
            let (d, d_min) = (half(block), half(block.add(2)));
            let packed = bytes::<12>(block.add(4));
            for pair in 0..4 {
                let [scale, min] = Self::scale_and_min(&packed, 2 * pair);
                let low = s.nibble_values(s.splat(d * scale), s.splat(-(d_min * min)));
                let [scale, min] = Self::scale_and_min(&packed, 2 * pair + 1);
                let high = s.nibble_values(s.splat(d * scale), s.splat(-(d_min * min)));
                for at in (0..32).step_by(S::LANES) {
                    let codes = s.load_u8(block.add(16 + 32 * pair + at));
                    sink.put(s, 64 * pair + at, s.nibbles(codes, low));
                    sink.put(s, 64 * pair + 32 + at, s.nibbles(codes.shr_logical::<4>(), high));
                }
            }
        }
    }
}

/// Blocks of 256: 128 bytes of low nibbles, 64 of high pairs of bits, 16 signed scales, d. Each half of the values is four runs of 32, of
/// which the first two share 64 low nibbles with the last two, and all four the bytes of high bits.
#[derive(Clone, Copy)]
pub(super) struct Q6K;

impl Format for Q6K {
    const UNIT: usize = 256;

    #[inline(always)]
    unsafe fn decode<S: Simd, K: Sink<S>>(self, s: S, row: Row, unit: usize, sink: &mut K) {
        // SAFETY: a block has 210 bytes.
        unsafe {
            let block = row.codes.add(unit * 210);
            let scales = bytes::<16>(block.add(192));
            let d = half(block.add(208));
            let (nibble, pair, middle) = (s.splat_i32(15), s.splat_i32(0x30), s.splat_i32(32));
            for of in 0..2 {
                let (low, high) = (block.add(64 * of), block.add(128 + 32 * of));
                for at in (0..32).step_by(S::LANES) {
                    let (a, b) = (s.load_u8(low.add(at)), s.load_u8(low.add(32 + at)));
                    let bits = s.load_u8(high.add(at));
                    let codes = [
                        (a & nibble) | (bits.shl::<4>() & pair),
                        (b & nibble) | (bits.shl::<2>() & pair),
                        a.shr_logical::<4>() | (bits & pair),
                        b.shr_logical::<4>() | (bits.shr_logical::<2>() & pair),
                    ];
                    // Not by an iterator, which may become a function of its own, without the level's instructions.
                    #[allow(clippy::needless_range_loop)]
                    for run in 0..4 {
                        let scale = d * f32::from(scales[8 * of + 2 * run + at / 16] as i8);
                        sink.put(s, 128 * of + 32 * run + at, (codes[run] - middle).to_f32() * s.splat(scale));
                    }
                }
            }
        }
    }
}
