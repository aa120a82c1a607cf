//! Products on matrix tiles (AMX): factors are packed as bf16, f32 and f16 as sums of several, and the products of their parts added up.
//!
//! An f32 is the sum of three bf16 to its last bit or nearly so: x = h + m + l. Of the nine products of two such sums, six count (see
//! [`amx::three_part_products`]); their sum is nearer to the exact product than a sequence of f32 multiply-adds. Two parts and three products
//! give about 2⁻¹⁶. Tiles know no denormals, and a split knows no infinities: values that would need them send their block to the plain kernels.

use super::micro::{Init, MicroKernels, Output, Tile, store_vector};
use super::pack::Strip;
use super::packing::{Magnitudes, Packing, Plain, Side, Widened};
use super::split::{self, Source, TERMS};
use crate::cpu::amx::{self, Block, ENTRIES, SIDE, Session, Sums};
use crate::cpu::isa::{Isa, WithSimd, dispatch_widest, isa};
use crate::cpu::simd::Simd;
use half::{bf16, f16};
use std::marker::PhantomData;

/// f32, f16 or bf16 as the sum of `PARTS` bf16.
#[derive(Clone, Copy)]
pub(super) struct Split<T, const PARTS: usize>(PhantomData<T>);

/// An element type that is split, and who multiplies its blocks that tiles cannot.
pub(super) trait Factor: Source {
    type Fallback: Packing<Element = Self>;
}

impl Factor for f32 {
    type Fallback = Plain;
}
impl Factor for f16 {
    type Fallback = Widened<f16>;
}
impl Factor for bf16 {
    type Fallback = Widened<bf16>;
}

impl<T: Factor, const PARTS: usize> Packing for Split<T, PARTS> {
    type Element = T;
    type Fallback = T::Fallback;
    const TERMS: usize = 2;
    const WORDS: usize = PARTS;
    const UNIT: usize = ENTRIES;
    const WIDE: bool = false;
    /// Panels may come from L2, which keeps up with tiles; what long blocks of K save is the way of C there and back.
    const KC: usize = if PARTS == 3 { 256 } else { 384 };
    /// To pack a factor again costs a tenth of what is done with it.
    const SUPER_BLOCK: usize = 6 << 20;
    const TILES: usize = if PARTS == 1 { 16 } else { 8 };
    const BLOCK_ROWS: usize = Self::TILES * SIDE;
    const SPEED: usize = 6 / PARTS;

    fn kernels() -> &'static MicroKernels {
        const {
            match PARTS {
                1 => &ONE_PART,
                2 => &TWO_PARTS,
                3 => &THREE_PARTS,
                _ => panic!("one to three parts"),
            }
        }
    }

    fn panel_rows(_: usize) -> usize {
        SIDE
    }

    #[inline(always)]
    unsafe fn pack<S: Simd>(_: S, side: Side, strip: Strip<T>, _: usize, dst: *mut f32) -> Magnitudes {
        // SAFETY: the caller's contract; a strip has at most SIDE lanes, as tiles have rows and columns.
        unsafe { split::pack::<T, PARTS>(side, strip, dst) }
    }

    fn multiplies(a: Magnitudes, b: Magnitudes, terms: usize) -> bool {
        split::multiplies::<PARTS>(a, b, terms)
    }
}

/// Whether this process has tiles, and a product in so many parts is faster on them than on vectors: by what both take, in picoseconds of a core of
/// 2.6 GHz (two vectors of FMA a cycle; a product of tiles every 16 cycles; splitting at the speed of L2).
pub(super) fn pay(parts: usize, m: usize, n: usize, k: usize) -> bool {
    const FMA: usize = 12;
    let (multiply, split) = match parts {
        1 => (2, 60),
        2 => (3, 150),
        _ => (6, 250),
    };
    let on_tiles = m.next_multiple_of(SIDE) * n.next_multiple_of(SIDE) * k.next_multiple_of(TERMS) * multiply + (m + n) * k * split;
    isa() == Isa::Amx && on_tiles < m * n * k * FMA
}

static ONE_PART: MicroKernels = MicroKernels::of_tiles(tile::<1>);
static TWO_PARTS: MicroKernels = MicroKernels::of_tiles(tile::<2>);
static THREE_PARTS: MicroKernels = MicroKernels::of_tiles(tile::<3>);

/// A block of up to SIDE rows from two panels, the only addresses of A and B that it reads.
///
/// # Safety
/// As for [`MicroKernels::panel_tile`], for panels of `kc` entries; the session is this thread's.
unsafe fn tile<const PARTS: usize>(rows: usize, t: &Tile, session: &Session) {
    let products = match PARTS {
        1 => amx::bf16_products,
        2 => amx::two_part_products,
        _ => amx::three_part_products,
    };
    let mut sums = Sums::default();
    // SAFETY: `t` has a row for each of `rows`.
    let in_c = unsafe { whole_block(rows, &t.out) };
    // SAFETY: there is one segment, and both panels hold `kc` entries, a multiple of a chunk's; a whole block of C is the caller's word.
    unsafe {
        let (a, b) = (t.a.read().cast::<u8>(), t.b.read().cast::<u8>());
        products(session, a, b, t.kc / ENTRIES, in_c.unwrap_or_else(|| sums.block()));
    }
    if in_c.is_none() {
        dispatch_widest(Finish { sums: &sums, rows, out: &t.out });
    }
}

/// C itself, if tiles can write it.
///
/// # Safety
/// `out` must have `rows` rows.
unsafe fn whole_block(rows: usize, out: &Output) -> Option<Block<f32>> {
    let add = match out.init {
        Init::Zero => false,
        Init::C => true,
        Init::Bias(_) => return None,
    };
    if (rows, out.cols, out.alpha) != (SIDE, SIDE, 1.0) {
        return None;
    }
    // SAFETY: there are SIDE rows.
    let (first, second) = unsafe { (out.row(0), out.row(1)) };
    Some(Block { first, row_stride: (second.addr() - first.addr()) / size_of::<f32>(), add })
}

struct Finish<'a> {
    sums: &'a Sums<f32>,
    rows: usize,
    out: &'a Output,
}

impl WithSimd for Finish<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let alpha = s.splat(self.out.alpha);
        for (r, sums) in self.sums.0.as_chunks::<SIDE>().0.iter().take(self.rows).enumerate() {
            for first in (0..self.out.cols).step_by(S::LANES) {
                // SAFETY: `tile`'s caller vouches for the rows of C; SIDE is a multiple of LANES.
                unsafe { store_vector(s, s.load(sums.as_ptr().add(first)), alpha, r, first, self.out) };
            }
        }
    }
}
