//! The innermost loops of every f32 matrix product: a tile of C is kept in registers while k runs.
//!
//! Two forms, each compiled once per instruction set and number of rows and kept in a table ([`MicroKernels::get`]):
//! the batch-reduce form ([`Tile`]: products, convolutions) and the outer-product form ([`OuterTile`]: weight gradients).
//! Nothing here packs, blocks or threads.
//!
//! Tile sizes. A tile of `rows × NV` vectors needs `rows · NV` accumulators, NV vectors of B and one broadcast of A:
//! 12×2 + 3 of the 32 registers of AVX-512, 6×2 + 3 of the 16 of AVX2. Both have more independent chains than
//! latency × throughput of the FMA (4 × 2 on current cores), and load 14 (8) vectors for 24 (12) FMAs.
//! There is a kernel for each number of rows, so that M can be cut into tiles of nearly equal height
//! ([`MicroKernels::row_tiles`]) and no row is computed in vain; a tile that is one vector wide or less takes the narrow kernels.

#[cfg(target_arch = "x86_64")]
use crate::cpu::amx::{SIDE, Session};
use crate::cpu::isa::{Isa, isa};
#[cfg(target_arch = "x86_64")]
use crate::cpu::simd::{Avx512, Avx512Bf16};
use crate::cpu::simd::{F32s, I32s, Scalar, Simd};
use half::bf16;

/// The most rows that a tile has at any level: the size of a caller's array of row pointers.
pub const MAX_MR: usize = 12;

/// The widest tile at any level, in columns.
pub const MAX_NR: usize = 32;

/// How many k further the first row of A is asked for: some 100 ns.
const AHEAD: usize = 32;

/// What the tile's sum is added to.
#[derive(Clone, Copy, Debug)]
pub enum Init {
    /// Nothing: C is written.
    Zero,
    /// C itself: C is read and written.
    C,
    /// A value per column, the same for every row; `cols` values are read.
    Bias(*const f32),
}

/// What C holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Values {
    /// f32.
    F32,
    /// bf16, to which sums are rounded once; not together with [`Init::C`].
    Bf16,
}

/// Where a tile goes: `C[r][j] = init[r][j] + alpha · sum[r][j]` for `r < rows`, `j < cols`.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// One address per row of the tile, and how many bytes behind it its `cols` contiguous values begin.
    pub c: *const *mut f32,
    /// See `c`: the same addresses serve for all columns of a row.
    pub offset: usize,
    /// What these values are; addresses of bf16 are cast.
    pub values: Values,
    /// Columns that are written: 1 to NR.
    pub cols: usize,
    /// Factor of the sum.
    pub alpha: f32,
    /// What is added to it.
    pub init: Init,
}

impl Output {
    /// Where the values of row `r` begin.
    ///
    /// # Safety
    /// There must be an address for it.
    #[inline(always)]
    pub(super) unsafe fn row(&self, r: usize) -> *mut f32 {
        // SAFETY: the caller's contract.
        unsafe { self.c.add(r).read() }.wrapping_byte_add(self.offset)
    }
}

/// The batch-reduce form: `sum[r][j] = Σ_s Σ_{k < kc} A_s[r][k] · B_s[k][j]`, accumulated in registers over all segments,
/// in the order of s, then k, with one fused multiply-add a term.
///
/// A plain product is one segment; a convolution is one segment per kernel tap, whose row pointers are the gathered pixels
/// (pixels in the padding point to `kc` zeros).
#[derive(Clone, Copy, Debug)]
pub struct Tile {
    /// Number of segments; with 0 the sum is zero.
    pub segments: usize,
    /// Terms of each segment.
    pub kc: usize,
    /// Addresses of each segment's rows: `A_s[r][k]` lies at `a[s · a_step + r] + k · a_stride`.
    pub a: *const *const f32,
    /// Distance between the addresses of neighbouring segments; of no account if there is one.
    pub a_step: usize,
    /// Distance in elements between neighbouring k of A: 1 for row-major A, the panel's height for packed A.
    pub a_stride: usize,
    /// `segments` addresses: `B_s[k][j]` lies at `b[s] + k · b_stride + j`.
    pub b: *const *const f32,
    /// Distance in elements between neighbouring k of B: the panel's width for packed B, the row stride of unpacked B.
    pub b_stride: usize,
    /// Where the result goes.
    pub out: Output,
}

/// The outer-product form: `sum[r][j] = Σ_{k < len} a[k][r] · b[k][j]`, in the order of k, with one fused multiply-add a term.
///
/// In a weight gradient k runs over pixels, A is the input's channels and B the output gradient's.
#[derive(Clone, Copy, Debug)]
pub struct OuterTile {
    /// Number of terms.
    pub len: usize,
    /// `len` addresses, each of `rows` contiguous values of A.
    pub a: *const *const f32,
    /// `len` addresses, each of a panel's width ([`MicroKernels::panel_width`]) of contiguous values of B.
    pub b: *const *const f32,
    /// Where the result goes.
    pub out: Output,
}

type TileFn = unsafe fn(&Tile);
#[cfg(target_arch = "x86_64")]
type TilesFn = unsafe fn(usize, &Tile, &Session);
type OuterFn = unsafe fn(&OuterTile);
type RestFn<S> = unsafe fn(&[<S as Simd>::F32], usize, &Output);

/// The micro-kernels of one instruction set.
#[derive(Debug)]
pub struct MicroKernels {
    /// Most rows of a tile.
    pub mr: usize,
    /// Most columns of a tile.
    pub nr: usize,
    /// Lanes of a vector: the width of a narrow tile.
    pub lanes: usize,
    /// Indexed by rows - 1: NR columns, then one vector of columns.
    wide: &'static [TileFn],
    narrow: &'static [TileFn],
    outer_wide: &'static [OuterFn],
    outer_narrow: &'static [OuterFn],
    /// Instead of all of these: matrix tiles, for any number of rows.
    #[cfg(target_arch = "x86_64")]
    tiles: Option<TilesFn>,
}

/// What a thread needs while it computes tiles.
#[derive(Debug)]
pub(super) struct Started {
    #[cfg(target_arch = "x86_64")]
    session: Option<Session>,
}

impl MicroKernels {
    /// The kernels of this process's level.
    pub fn get() -> &'static Self {
        match isa() {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => &avx512::KERNELS,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => &avx2::KERNELS,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => &neon::KERNELS,
            _ => &scalar::KERNELS,
        }
    }

    /// The kernels whose entries, 32 bits each, are pairs of bf16 (the lower half first): an entry of A and one of B add two products to a
    /// sum. Emulated on machines without [`has_bf16_pairs`](Self::has_bf16_pairs), where they are slow.
    pub fn bf16_pairs() -> &'static Self {
        #[cfg(target_arch = "x86_64")]
        if Self::has_bf16_pairs() {
            return &avx512_bf16::KERNELS;
        }
        &scalar_bf16::KERNELS
    }

    /// Whether this process multiplies pairs of bf16 faster than the same values as f32. Intel's cores have the instruction, at half the
    /// rate of f32.
    pub fn has_bf16_pairs() -> bool {
        #[cfg(target_arch = "x86_64")]
        return isa() == Isa::Avx512 && Avx512Bf16::detect().is_some_and(Avx512Bf16::is_fast);
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Kernels that multiply panels of chunks on matrix tiles.
    #[cfg(target_arch = "x86_64")]
    pub(super) const fn of_tiles(tiles: TilesFn) -> Self {
        Self { mr: SIDE, nr: SIDE, lanes: SIDE, wide: &[], narrow: &[], outer_wide: &[], outer_narrow: &[], tiles: Some(tiles) }
    }

    /// To be called by a thread before it computes tiles, and kept until it has.
    pub(super) fn start(&self) -> Started {
        Started {
            #[cfg(target_arch = "x86_64")]
            session: self.tiles.map(|_| Session::begin()),
        }
    }

    /// How many values of B a tile of `cols` columns reads at each k: one vector, or NR. A packed panel has this width
    /// (padded with anything finite), and unpacked B must be readable this far.
    #[inline]
    pub fn panel_width(&self, cols: usize) -> usize {
        if cols <= self.lanes { self.lanes } else { self.nr }
    }

    /// Cuts `rows` into the fewest tiles of at most MR: tile `i` starts at row `tiles.start(i)`. They are of nearly equal height, as there is a
    /// kernel for each; matrix tiles are whole as long as there are rows.
    #[inline]
    pub fn row_tiles(&self, rows: usize) -> RowTiles {
        let count = rows.div_ceil(self.mr);
        #[cfg(target_arch = "x86_64")]
        if self.tiles.is_some() {
            return RowTiles { rows, count, height: self.mr, higher: 0 };
        }
        RowTiles { rows, count, height: rows / count.max(1), higher: rows % count.max(1) }
    }

    /// Computes a batch-reduce tile of `rows` rows.
    ///
    /// # Panics
    /// If `rows` is not in `1..=mr` or `tile.out.cols` is not in `1..=nr`.
    ///
    /// # Safety
    /// With `w = panel_width(cols)`: `tile.a` must be readable for `rows` addresses of each segment, `tile.b` for `segments`, `tile.out.c` for `rows`;
    /// for each segment and `k < kc`, each row's A value must be readable, and `w` values of B;
    /// each row's `cols` values of C must be writable, disjoint from one another and from all that is read, readable and initialised
    /// for [`Init::C`]; the bias must be readable for `cols` values.
    #[inline]
    pub unsafe fn tile(&self, rows: usize, tile: &Tile) {
        assert!(tile.out.cols >= 1 && tile.out.cols <= self.nr);
        let kernels = if tile.out.cols <= self.lanes { self.narrow } else { self.wide };
        // SAFETY: `get` returns a table of a level that `isa` found; the memory is the caller's word.
        unsafe { kernels[rows - 1](tile) }
    }

    /// [`tile`](Self::tile) of two packed panels, by kernels of any kind.
    ///
    /// # Panics
    /// As for `tile`.
    ///
    /// # Safety
    /// As for `tile`, with the panels that such kernels take, and rows of C equally far apart. [`start`](Self::start) of these kernels returned `started` on this thread.
    #[inline]
    pub(super) unsafe fn panel_tile(&self, started: &Started, rows: usize, tile: &Tile) {
        #[cfg(target_arch = "x86_64")]
        if let (Some(tiles), Some(session)) = (self.tiles, &started.session) {
            assert!((1..=self.mr).contains(&rows) && (1..=self.nr).contains(&tile.out.cols));
            // SAFETY: the memory is the caller's word.
            return unsafe { tiles(rows, tile, session) };
        }
        let Started { .. } = started;
        // SAFETY: the caller's contract.
        unsafe { self.tile(rows, tile) }
    }

    /// Computes an outer-product tile of `rows` rows.
    ///
    /// # Panics
    /// If `rows` is not in `1..=mr` or `tile.out.cols` is not in `1..=nr`.
    ///
    /// # Safety
    /// `tile.a` and `tile.b` must be readable for `len` addresses, each of `rows` readable values of A or `panel_width(cols)` readable
    /// values of B; `tile.out` as for [`tile`](Self::tile).
    #[inline]
    pub unsafe fn outer(&self, rows: usize, tile: &OuterTile) {
        assert!(tile.out.cols >= 1 && tile.out.cols <= self.nr);
        let kernels = if tile.out.cols <= self.lanes { self.outer_narrow } else { self.outer_wide };
        // SAFETY: `get` returns a table of a level that `isa` found; the memory is the caller's word.
        unsafe { kernels[rows - 1](tile) }
    }
}

/// Rows cut into tiles.
#[derive(Clone, Copy, Debug)]
pub struct RowTiles {
    rows: usize,
    /// Number of tiles.
    pub count: usize,
    /// Rows of a tile, but for the last.
    height: usize,
    /// The first tiles, so many, have a row more.
    higher: usize,
}

impl RowTiles {
    /// The first row of tile `i`; the number of rows for `i == count`.
    #[inline]
    pub fn start(&self, i: usize) -> usize {
        (i * self.height + i.min(self.higher)).min(self.rows)
    }

    /// The number of rows of tile `i < count`.
    #[inline]
    pub fn height(&self, i: usize) -> usize {
        self.start(i + 1) - self.start(i)
    }
}

/// What entries of the factors add to a sum.
trait Multiply<S: Simd>: Copy {
    fn mul_add(self, x: S::F32, y: S::F32, sum: S::F32) -> S::F32;

    /// Whether there is an instruction that rounds such sums to bf16.
    const ROUNDS: bool = false;

    /// Writes a vector of such sums, rounded to bf16.
    ///
    /// # Safety
    /// `dst` must be valid for writing `LANES` values.
    #[inline(always)]
    unsafe fn store_bf16(self, sum: S::F32, dst: *mut bf16) {
        // SAFETY: the caller's contract.
        unsafe { sum.store_bf16(dst, S::LANES) }
    }
}

/// An entry is an f32.
#[derive(Clone, Copy)]
struct Single;

impl<S: Simd> Multiply<S> for Single {
    #[inline(always)]
    fn mul_add(self, x: S::F32, y: S::F32, sum: S::F32) -> S::F32 {
        x.mul_add(y, sum)
    }
}

/// An entry is a pair of bf16; without an instruction for it.
#[derive(Clone, Copy)]
struct EmulatedPair;

impl Multiply<Scalar> for EmulatedPair {
    #[inline(always)]
    fn mul_add(self, x: <Scalar as Simd>::F32, y: <Scalar as Simd>::F32, sum: <Scalar as Simd>::F32) -> <Scalar as Simd>::F32 {
        let low = |x: <Scalar as Simd>::F32| x.to_bits().shl::<16>().from_bits();
        let high = |x: <Scalar as Simd>::F32| (x.to_bits() & Scalar.splat_i32(!0xFFFF)).from_bits();
        low(x).mul_add(low(y), high(x).mul_add(high(y), sum))
    }
}

/// An entry is a pair of bf16.
#[cfg(target_arch = "x86_64")]
impl Multiply<Avx512> for Avx512Bf16 {
    #[inline(always)]
    fn mul_add(self, x: <Avx512 as Simd>::F32, y: <Avx512 as Simd>::F32, sum: <Avx512 as Simd>::F32) -> <Avx512 as Simd>::F32 {
        sum.add_bf16_products(self, x, y)
    }
    const ROUNDS: bool = true;
    #[inline(always)]
    unsafe fn store_bf16(self, sum: <Avx512 as Simd>::F32, dst: *mut bf16) {
        // The instruction has no denormals, and neither have sums of its like.
        // SAFETY: the caller's contract.
        unsafe { sum.store_normal_bf16(self, dst) }
    }
}

/// # Safety
/// As for [`MicroKernels::tile`] with `R` rows and a panel of `NV` vectors.
#[inline(always)]
unsafe fn tile<S: Simd, M: Multiply<S>, const R: usize, const NV: usize>(s: S, multiply: M, t: &Tile, rest: RestFn<S>) {
    for r in 0..R {
        // C is needed when the sums are done; by then its lines have arrived.
        // SAFETY: there are R row addresses.
        let row = unsafe { t.out.row(r) };
        (0..NV).for_each(|v| s.prefetch(row.wrapping_add(v * S::LANES)));
    }
    let mut acc = [[s.zero(); NV]; R];
    let rows_of_packed = t.a_stride == 1 && t.b_stride == NV * S::LANES;
    // Columns of A lie a row apart, which the hardware does not foresee.
    let ahead = if t.a_stride == 1 { 0 } else { AHEAD * t.a_stride };
    for segment in 0..t.segments {
        // SAFETY: `a` holds R addresses for each segment and `b` holds `segments`.
        let (a, mut b) = unsafe { (t.a.add(segment * t.a_step).cast::<[*const f32; R]>().read(), t.b.add(segment).read()) };
        let mut at = 0usize;
        if rows_of_packed {
            // With strides that are known, the addresses of 12 rows stay in registers, but for one or two.
            let end = b.wrapping_add(t.kc * NV * S::LANES);
            while b != end {
                // SAFETY: the caller vouches for NV vectors of B and each row's A value at every k < kc.
                unsafe { add_step(s, multiply, &mut acc, &a, at, b) };
                at = at.wrapping_add(1);
                b = b.wrapping_add(NV * S::LANES);
            }
            continue;
        }
        for _ in 0..t.kc {
            s.prefetch(a[0].wrapping_add(at.wrapping_add(ahead)));
            // SAFETY: as above; the addresses are advanced without a claim to be in bounds, as the last step leaves the operands.
            unsafe { add_step(s, multiply, &mut acc, &a, at, b) };
            // A check for overflow in the dev profile would keep loads and sums apart, and both in memory.
            at = at.wrapping_add(t.a_stride);
            b = b.wrapping_add(t.b_stride);
        }
    }
    // SAFETY: `out` is the caller's word.
    unsafe { store(s, multiply, &acc, &t.out, rest) }
}

/// Adds the products of one k.
///
/// # Safety
/// NV vectors must be readable at `b`, and a value at `at` in each row.
#[inline(always)]
unsafe fn add_step<S: Simd, M: Multiply<S>, const R: usize, const NV: usize>(
    s: S,
    multiply: M,
    acc: &mut [[S::F32; NV]; R],
    a: &[*const f32; R],
    at: usize,
    b: *const f32,
) {
    // SAFETY: the caller's contract.
    unsafe {
        let bv: [S::F32; NV] = std::array::from_fn(|v| s.load(b.add(v * S::LANES)));
        for (row, sums) in a.iter().zip(acc) {
            let x = s.load_splat(row.wrapping_add(at));
            for (sum, &y) in sums.iter_mut().zip(&bv) {
                *sum = multiply.mul_add(x, y, *sum);
            }
        }
    }
}

/// # Safety
/// As for [`MicroKernels::outer`] with `R` rows and a panel of `NV` vectors.
#[inline(always)]
unsafe fn outer<S: Simd, M: Multiply<S>, const R: usize, const NV: usize>(s: S, multiply: M, t: &OuterTile, rest: RestFn<S>) {
    let mut acc = [[s.zero(); NV]; R];
    for k in 0..t.len {
        // SAFETY: the caller vouches for `len` addresses of R values of A and NV vectors of B.
        unsafe {
            let (a, b) = (t.a.add(k).read(), t.b.add(k).read());
            let bv: [S::F32; NV] = std::array::from_fn(|v| s.load(b.add(v * S::LANES)));
            for (r, sums) in acc.iter_mut().enumerate() {
                let x = s.load_splat(a.add(r));
                for (sum, &y) in sums.iter_mut().zip(&bv) {
                    *sum = multiply.mul_add(x, y, *sum);
                }
            }
        }
    }
    // SAFETY: `out` is the caller's word.
    unsafe { store(s, multiply, &acc, &t.out, rest) }
}

/// Runs the body for each vector of sums, the address of its row and its number there. Written out, not a loop: the compiler unrolls one so long too late
/// to see that sums it takes by number could have been in registers all along, unless it optimises twice, as it does between several codegen units.
macro_rules! each_sum {
    ($acc:ident, $out:ident, |$sum:ident, $row:ident, $v:ident| $body:expr) => {
        each_sum!(@rows $acc, $out, $sum, $row, $v, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    (@rows $acc:ident, $out:ident, $sum:ident, $row:ident, $v:ident, $body:expr, $($r:literal)*) => {{
        const { assert!(R <= [$($r),*].len()) }
        $(if $r < R {
            let $row = $out.row($r);
            each_sum!(@vectors $acc[$r], $sum, $v, $body, 0 1 2 3)
        })*
    }};
    (@vectors $sums:expr, $sum:ident, $v:ident, $body:expr, $($n:literal)*) => {{
        const { assert!(NV <= [$($n),*].len()) }
        $(if $n < NV {
            let ($sum, $v) = ($sums[$n], $n);
            $body;
        })*
    }};
}

/// How a tile is stored.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// As sums.
    New,
    /// Added to C.
    Added,
    /// Added to a value per column.
    Biased(*const f32),
    /// As bf16.
    Rounded,
    /// By [`store_rest`].
    Other,
}

/// Stores whole tiles that are not scaled straight from registers, and leaves others to `rest`, [`store_rest`] of this level: were it part of this
/// function, the compiler would keep the sums in memory all along.
///
/// # Safety
/// As for the output of [`MicroKernels::tile`].
#[inline(always)]
unsafe fn store<S: Simd, M: Multiply<S>, const R: usize, const NV: usize>(
    s: S,
    multiply: M,
    acc: &[[S::F32; NV]; R],
    out: &Output,
    rest: RestFn<S>,
) {
    let whole = out.cols == NV * S::LANES && out.alpha == 1.0;
    let form = match (out.values, out.init) {
        (Values::F32, Init::Zero) if whole => Form::New,
        (Values::F32, Init::C) if whole => Form::Added,
        (Values::F32, Init::Bias(bias)) if whole => Form::Biased(bias),
        (Values::Bf16, Init::Zero) if whole && M::ROUNDS => Form::Rounded,
        _ => Form::Other,
    };
    if form == Form::Other {
        let sums = *acc;
        // SAFETY: the caller's contract.
        return unsafe { rest(sums.as_flattened(), NV, out) };
    }
    let at = |v: usize| v * S::LANES;
    // SAFETY: there is an address for each row, which is NV vectors long.
    unsafe {
        match form {
            Form::Biased(bias) => each_sum!(acc, out, |sum, row, v| (sum + s.load(bias.add(at(v)))).store(row.add(at(v)))),
            Form::Added => each_sum!(acc, out, |sum, row, v| (sum + s.load(row.add(at(v)))).store(row.add(at(v)))),
            Form::Rounded if M::ROUNDS => each_sum!(acc, out, |sum, row, v| multiply.store_bf16(sum, row.cast::<bf16>().add(at(v)))),
            _ => each_sum!(acc, out, |sum, row, v| sum.store(row.add(at(v)))),
        }
    }
}

/// Stores a tile whose rows are `nv` vectors of `sums` each.
///
/// # Safety
/// As for the output of [`MicroKernels::tile`].
#[inline(always)]
unsafe fn store_rest<S: Simd>(s: S, sums: &[S::F32], nv: usize, out: &Output) {
    let alpha = s.splat(out.alpha);
    for (r, sums) in sums.chunks_exact(nv).enumerate() {
        for (v, &sum) in sums.iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe {
                match out.values {
                    Values::F32 => store_vector(s, sum, alpha, r, v * S::LANES, out),
                    Values::Bf16 => store_rounded(s, sum, alpha, r, v * S::LANES, out),
                }
            }
        }
    }
}

/// Puts the sums of row `r`, from column `first` on, where they go: values of f32.
///
/// # Safety
/// As for the output of [`MicroKernels::tile`].
#[inline(always)]
pub(super) unsafe fn store_vector<S: Simd>(s: S, sum: S::F32, alpha: S::F32, r: usize, first: usize, out: &Output) {
    // SAFETY: there is an address for each row.
    let row = unsafe { out.row(r) };
    if first + S::LANES <= out.cols {
        // SAFETY: the row has `cols` values, and so has the bias.
        unsafe {
            let init = match out.init {
                Init::Zero => s.zero(),
                Init::C => s.load(row.add(first)),
                Init::Bias(bias) => s.load(bias.add(first)),
            };
            sum.mul_add(alpha, init).store(row.add(first));
        }
    } else if first < out.cols {
        let count = out.cols - first;
        // SAFETY: `count` values are left of the row and of the bias.
        unsafe {
            let init = match out.init {
                Init::Zero => s.zero(),
                Init::C => s.load_partial(row.add(first), count),
                Init::Bias(bias) => s.load_partial(bias.add(first), count),
            };
            sum.mul_add(alpha, init).store_partial(row.add(first), count);
        }
    }
}

/// [`store_vector`] of values that are bf16.
///
/// # Safety
/// As for `store_vector`.
#[inline(always)]
unsafe fn store_rounded<S: Simd>(s: S, sum: S::F32, alpha: S::F32, r: usize, first: usize, out: &Output) {
    debug_assert!(!matches!(out.init, Init::C), "what was rounded cannot be added to");
    let Some(count @ 1..) = out.cols.checked_sub(first).map(|left| left.min(S::LANES)) else { return };
    // SAFETY: there is an address for each row; `count` values are left of it and of the bias.
    unsafe {
        let row = out.row(r).cast::<bf16>();
        let init = match out.init {
            Init::Bias(bias) if count == S::LANES => s.load(bias.add(first)),
            Init::Bias(bias) => s.load_partial(bias.add(first), count),
            Init::Zero | Init::C => s.zero(),
        };
        sum.mul_add(alpha, init).store_bf16(row.add(first), count);
    }
}

/// Instantiates the kernels of a level: `$token` makes its token (only the table of an available level is ever handed out, and the check would cost
/// a nanosecond a tile),
/// `$multiply` says what entries are, `$nv` vectors make NR.
macro_rules! level {
    ($name:ident, $simd:ty, $token:expr, $multiply:expr, $nv:literal, [$($rows:literal)*] $(, #[$feature:meta])?) => {
        mod $name {
            use super::*;

            $(#[$feature])?
            unsafe fn tile<const R: usize, const NV: usize>(t: &Tile) {
                // SAFETY: the caller's word.
                unsafe { super::tile::<$simd, _, R, NV>($token, $multiply, t, rest) }
            }

            $(#[$feature])?
            unsafe fn outer<const R: usize, const NV: usize>(t: &OuterTile) {
                // SAFETY: the caller's word.
                unsafe { super::outer::<$simd, _, R, NV>($token, $multiply, t, rest) }
            }

            $(#[$feature])?
            unsafe fn rest(sums: &[<$simd as Simd>::F32], nv: usize, out: &Output) {
                // SAFETY: the caller's word.
                unsafe { super::store_rest($token, sums, nv, out) }
            }

            pub static KERNELS: MicroKernels = MicroKernels {
                mr: [$($rows),*].len(),
                nr: $nv * <$simd as Simd>::LANES,
                lanes: <$simd as Simd>::LANES,
                wide: &[$(tile::<$rows, $nv>),*],
                narrow: &[$(tile::<$rows, 1>),*],
                outer_wide: &[$(outer::<$rows, $nv>),*],
                outer_narrow: &[$(outer::<$rows, 1>),*],
                #[cfg(target_arch = "x86_64")]
                tiles: None,
            };
        }
    };
}

level!(scalar_bf16, Scalar, Scalar, EmulatedPair, 4, [1 2 3 4]);
#[cfg(target_arch = "x86_64")]
level!(avx512_bf16, Avx512, Avx512::assume(), Avx512Bf16::assume(), 2, [1 2 3 4 5 6 7 8 9 10 11 12],
    #[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]);

level!(scalar, Scalar, Scalar, Single, 4, [1 2 3 4]);
#[cfg(target_arch = "x86_64")]
level!(avx2, crate::cpu::simd::Avx2, crate::cpu::simd::Avx2::assume(), Single, 2, [1 2 3 4 5 6],
    #[target_feature(enable = "avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]);
#[cfg(target_arch = "x86_64")]
level!(avx512, Avx512, Avx512::assume(), Single, 2, [1 2 3 4 5 6 7 8 9 10 11 12],
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]);
#[cfg(target_arch = "aarch64")]
level!(neon, crate::cpu::simd::Neon, crate::cpu::simd::Neon::new(), Single, 2, [1 2 3 4 5 6 7 8]);

#[cfg(test)]
mod tests {
    use super::*;

    fn random(seed: &mut u64) -> f32 {
        *seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*seed >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    /// Checks C against f64, and that nothing beyond the tile was touched.
    fn check(c: &[f32], before: &[f32], stride: usize, rows: usize, cols: usize, expected: impl Fn(usize, usize) -> f64) {
        for (at, (&got, &old)) in c.iter().zip(before).enumerate() {
            let (r, j) = (at / stride, at % stride);
            if r < rows && j < cols {
                let e = expected(r, j);
                assert!((got as f64 - e).abs() <= 1e-5 * (1.0 + e.abs()), "{rows}x{cols}: C[{r}][{j}] = {got}, not {e}");
            } else {
                assert_eq!(got, old, "{rows}x{cols}: wrote beyond the tile at {r}, {j}");
            }
        }
    }

    fn init_value(init: Init, old: f32, bias: f32) -> f64 {
        match init {
            Init::Zero => 0.0,
            Init::C => old as f64,
            Init::Bias(_) => bias as f64,
        }
    }

    #[test]
    fn batch_reduce_tiles_match_f64() {
        let kernels = MicroKernels::get();
        let mut seed = 1;
        let (b_stride, c_stride) = (kernels.nr + 3, kernels.nr + 5);
        for rows in 1..=kernels.mr {
            for cols in 1..=kernels.nr {
                let kc = [0, 1, 2, 7, 40][(rows + cols) % 5];
                let segments = (rows * 3 + cols) % 4;
                let a_stride = [1, 12, 5][cols % 3];
                let a: Vec<f32> = (0..segments * rows * (kc * a_stride + 1)).map(|_| random(&mut seed)).collect();
                let b: Vec<f32> = (0..segments * kc * b_stride).map(|_| random(&mut seed)).collect();
                let bias: Vec<f32> = (0..cols).map(|_| random(&mut seed)).collect();
                let a_rows: Vec<&[f32]> = (0..segments * rows).map(|i| &a[i * (kc * a_stride + 1)..]).collect();
                let a_ptrs: Vec<*const f32> = a_rows.iter().map(|r| r.as_ptr()).collect();
                let b_ptrs: Vec<*const f32> = (0..segments).map(|i| b[i * kc * b_stride..].as_ptr()).collect();
                for (alpha, init) in [(1.0, Init::Zero), (0.5, Init::C), (1.0, Init::Bias(bias.as_ptr()))] {
                    let before: Vec<f32> = (0..kernels.mr * c_stride).map(|_| random(&mut seed)).collect();
                    let mut c = before.clone();
                    let c_ptrs: Vec<*mut f32> = c.chunks_mut(c_stride).map(|row| row.as_mut_ptr()).collect();
                    let out = Output { c: c_ptrs.as_ptr(), offset: 0, values: Values::F32, cols, alpha, init };
                    let tile = Tile { segments, kc, a: a_ptrs.as_ptr(), a_step: rows, a_stride, b: b_ptrs.as_ptr(), b_stride, out };
                    // SAFETY: the vectors above have these sizes; a row of B is wider than a panel.
                    unsafe { kernels.tile(rows, &tile) };
                    check(&c, &before, c_stride, rows, cols, |r, j| {
                        let term = |s: usize, k: usize| a_rows[s * rows + r][k * a_stride] as f64 * b[(s * kc + k) * b_stride + j] as f64;
                        let sum: f64 = (0..segments).flat_map(|s| (0..kc).map(move |k| (s, k))).map(|(s, k)| term(s, k)).sum();
                        init_value(init, before[r * c_stride + j], bias[j]) + alpha as f64 * sum
                    });
                }
            }
        }
    }

    #[test]
    fn outer_product_tiles_match_f64() {
        let kernels = MicroKernels::get();
        let mut seed = 2;
        let c_stride = kernels.nr + 5;
        for rows in 1..=kernels.mr {
            for cols in 1..=kernels.nr {
                let len = [0, 1, 33][(rows + cols) % 3];
                let a: Vec<Vec<f32>> = (0..len).map(|_| (0..rows).map(|_| random(&mut seed)).collect()).collect();
                let b: Vec<Vec<f32>> = (0..len).map(|_| (0..kernels.panel_width(cols)).map(|_| random(&mut seed)).collect()).collect();
                let a_ptrs: Vec<*const f32> = a.iter().map(|v| v.as_ptr()).collect();
                let b_ptrs: Vec<*const f32> = b.iter().map(|v| v.as_ptr()).collect();
                for init in [Init::Zero, Init::C] {
                    let before: Vec<f32> = (0..kernels.mr * c_stride).map(|_| random(&mut seed)).collect();
                    let mut c = before.clone();
                    let c_ptrs: Vec<*mut f32> = c.chunks_mut(c_stride).map(|row| row.as_mut_ptr()).collect();
                    let out = Output { c: c_ptrs.as_ptr(), offset: 0, values: Values::F32, cols, alpha: 1.0, init };
                    // SAFETY: the vectors above have these sizes.
                    unsafe { kernels.outer(rows, &OuterTile { len, a: a_ptrs.as_ptr(), b: b_ptrs.as_ptr(), out }) };
                    check(&c, &before, c_stride, rows, cols, |r, j| {
                        let sum: f64 = (0..len).map(|k| a[k][r] as f64 * b[k][j] as f64).sum();
                        init_value(init, before[r * c_stride + j], 0.0) + sum
                    });
                }
            }
        }
    }

    #[test]
    fn row_tiles_cover_all_rows_evenly() {
        let kernels = MicroKernels::get();
        for rows in 0..100 {
            let tiles = kernels.row_tiles(rows);
            let mut next = 0;
            for i in 0..tiles.count {
                assert_eq!(tiles.start(i), next);
                assert!((1..=kernels.mr).contains(&tiles.height(i)));
                next += tiles.height(i);
            }
            assert_eq!(next, rows);
        }
    }
}
