//! The folds: what a reduction does with a tile of one output's elements ([`Fold::row`]), and with a block of rows whose
//! columns belong to different outputs ([`Fold::columns`]). Which elements those are is the business of [`plan`](super::plan).
//! They are lanes, or narrower ones that are widened as they are loaded.

use crate::cpu::isa::WithSimd;
use crate::cpu::lanes::{FloatLane, Lane, MAX_LANES, Numeric, Pack, Wide, at, pairwise, sums, sweep};
use crate::cpu::simd::Simd;
use std::mem::MaybeUninit;

/// The most columns that [`Fold::columns`] is given: their partial results stay in L1.
pub const MAX_WIDTH: usize = 1024;

/// The most rows that [`Fold::columns`] is given: f32 sums of so many terms are then added in f64.
pub const MAX_ROWS: usize = 128;

/// An associative way to combine elements. Parts are merged in the order of their elements where that matters.
pub trait Fold<L: Lane>: Copy + Send + Sync {
    /// The state of a partial result.
    type Acc: Copy + Send + Sync;
    /// Time for an element, in units of a sum's.
    const COST: usize = 1;
    /// Whether many short rows are folded faster if they are turned into columns first, so that their lanes are all in use.
    const TURNS_SHORT_ROWS: bool = true;
    /// The most rows that are widened before [`columns`](Self::columns) takes them: the fewer, the less they take of the caches, and the more
    /// often results are merged.
    const WIDENED_ROWS: usize = MAX_ROWS;
    /// Whether the elements' order matters, other than for rounding.
    const IS_ORDERED: bool = false;
    /// The result over no elements.
    fn empty(self) -> Self::Acc;
    /// The result over the elements of `a` followed by those of `b`.
    fn merge(self, a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// The result over `tile`, whose first element is number `start`.
    fn row<S: Simd, E: Numeric<Lane = L>>(self, s: S, tile: &[E], start: usize) -> Self::Acc;
    /// The results over dense rows of `n` elements, as [`row`](Self::row) gives them, if there is a faster way to those of so few.
    #[inline(always)]
    fn few<S: Simd, E: Numeric<Lane = L>>(self, _s: S, _rows: &[E], _n: usize, _accs: &mut [Self::Acc]) -> bool {
        false
    }
    /// Merges the result over column `j` of `rows` into `accs[j]`. The first row is number `start`; there are at most
    /// [`MAX_ROWS`], and at most [`MAX_WIDTH`] columns.
    fn columns<S: Simd, E: Numeric<Lane = L>>(self, s: S, rows: &[&[E]], start: usize, accs: &mut [Self::Acc]);
}

/// A fold that combines mapped elements lane by lane.
pub trait Monoid<L: Lane>: Copy + Send + Sync {
    /// See [`Fold::COST`].
    const COST: usize = 1;
    /// What is accumulated across tiles.
    type Acc: Copy + Send + Sync;
    /// The neutral lane of `combine`.
    fn neutral(self) -> L;
    /// Maps elements.
    fn map<S: Simd>(self, s: S, x: L::Pack<S>) -> L::Pack<S>;
    /// Combines mapped elements.
    fn combine<S: Simd>(self, a: L::Pack<S>, b: L::Pack<S>) -> L::Pack<S>;
    /// Accumulates a lane.
    fn promote(self, x: L) -> Self::Acc;
    /// Combines accumulated values.
    fn merge(self, a: Self::Acc, b: Self::Acc) -> Self::Acc;
    /// Accumulates all lanes of a pack.
    #[inline(always)]
    fn across<S: Simd>(self, x: L::Pack<S>) -> Self::Acc {
        let n = L::lanes::<S>();
        let mut lanes = [self.neutral(); MAX_LANES];
        x.store(&mut lanes, n);
        let mut accs = [self.promote(self.neutral()); MAX_LANES];
        for i in 0..n {
            accs[i] = self.promote(lanes[i]);
        }
        pairwise!(accs, n, |a, b| self.merge(a, b))
    }
}

/// Combines everything in `tile` to one lane-wise pack.
#[inline(always)]
fn combine_tile<L: Lane, E: Numeric<Lane = L>, M: Monoid<L>, S: Simd>(m: M, s: S, tile: &[E]) -> L::Pack<S> {
    // Eight independent chains: latency times throughput of an addition. Fewer elements make one: rows that are so short come in numbers,
    // and the processor works on several at once.
    const CHAINS: usize = 8;
    let n = L::lanes::<S>();
    let neutral = L::splat(s, m.neutral());
    let mut acc = [neutral; CHAINS];
    let is_long = tile.len() >= CHAINS * n;
    let mut blocks = tile.chunks_exact(CHAINS * n);
    for block in &mut blocks {
        for (acc, x) in acc.iter_mut().zip(block.chunks_exact(n)) {
            *acc = m.combine::<S>(*acc, m.map(s, E::load_pack(s, x, n)));
        }
    }
    if is_long {
        let mut half = CHAINS / 2;
        while half > 0 {
            for i in 0..half {
                acc[i] = m.combine::<S>(acc[i], acc[i + half]);
            }
            half /= 2;
        }
    }
    let mut all = acc[0];
    let mut packs = blocks.remainder().chunks_exact(n);
    for x in &mut packs {
        all = m.combine::<S>(all, m.map(s, E::load_pack(s, x, n)));
    }
    let rest = packs.remainder();
    if !rest.is_empty() {
        let mapped = m.map(s, E::load_pack(s, rest, rest.len()));
        all = m.combine::<S>(all, L::keep(s, mapped, rest.len(), neutral));
    }
    all
}

/// Room for a lane of each column, of which no more is written than is used.
struct Scratch<L>(MaybeUninit<[L; MAX_WIDTH]>);

impl<L: Copy + Default> Scratch<L> {
    const fn new() -> Self {
        Self(MaybeUninit::uninit())
    }

    /// As many zeros as there are columns.
    #[inline(always)]
    fn zeros(&mut self, width: usize) -> &mut [L] {
        assert!(width <= MAX_WIDTH);
        let first = self.0.as_mut_ptr().cast::<L>();
        // SAFETY: the room is for MAX_WIDTH lanes, and `width` of them are written before they are lent.
        unsafe {
            (0..width).for_each(|i| first.add(i).write(L::default()));
            std::slice::from_raw_parts_mut(first, width)
        }
    }
}

/// Combines the rows into `part`, lane by lane. Eight rows at a time, so that `part` is read and written once for all of them.
#[inline(always)]
fn combine_rows<L: Lane, E: Numeric<Lane = L>, M: Monoid<L>, S: Simd>(m: M, s: S, rows: &[&[E]], part: &mut [L]) {
    let width = part.len();
    part.fill(m.neutral());
    let mut groups = rows.chunks_exact(8);
    for group in &mut groups {
        let rows: [&[E]; 8] = std::array::from_fn(|i| &group[i][..width]);
        sweep!(L, S, width, |j, count| {
            let mut x = [m.map(s, at(s, rows[0], j, count)); 8];
            for i in 1..8 {
                x[i] = m.map(s, at(s, rows[i], j, count));
            }
            for half in [4, 2, 1] {
                for i in 0..half {
                    x[i] = m.combine::<S>(x[i], x[i + half]);
                }
            }
            m.combine::<S>(at(s, part, j, count), x[0]).store(&mut part[j..], count);
        });
    }
    for row in groups.remainder() {
        let row = &row[..width];
        sweep!(L, S, width, |j, count| {
            m.combine::<S>(at(s, part, j, count), m.map(s, at(s, row, j, count))).store(&mut part[j..], count);
        });
    }
}

/// Elements of rows that are too few for vectors of their own.
const FEW: usize = 4;

/// The first, second, … elements of [`MAX_LANES`] rows.
type FewColumns<L> = [[L; MAX_LANES]; FEW];

/// Dense rows of `N` elements as columns.
struct Turned<'a, const N: usize, E: Numeric>(&'a [E], &'a mut FewColumns<E::Lane>);

impl<const N: usize, E: Numeric> WithSimd for Turned<'_, N, E> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self(rows, columns) = self;
        if rows.len() == N * MAX_LANES {
            // A number that the compiler knows.
            let rows = &rows[..N * MAX_LANES];
            for j in 0..MAX_LANES {
                for i in 0..N {
                    columns[i][j] = rows[j * N + i].to_lane();
                }
            }
        } else {
            for (j, row) in rows.chunks_exact(N).enumerate() {
                for i in 0..N {
                    columns[i][j] = row[i].to_lane();
                }
            }
        }
    }
}

/// The results over dense rows of `n` elements, 2 to [`FEW`]. The order is that of [`Monoid::across`].
#[inline(always)]
fn few_elements<L: Lane, E: Numeric<Lane = L>, M: Monoid<L>, S: Simd>(m: M, s: S, rows: &[E], n: usize, accs: &mut [M::Acc]) {
    let lanes = L::lanes::<S>();
    let neutral = m.promote(m.neutral());
    for (rows, accs) in rows.chunks(n * MAX_LANES).zip(accs.chunks_mut(MAX_LANES)) {
        let mut columns = [[m.neutral(); MAX_LANES]; FEW];
        match n {
            2 => s.call(Turned::<2, E>(rows, &mut columns)),
            3 => s.call(Turned::<3, E>(rows, &mut columns)),
            _ => s.call(Turned::<FEW, E>(rows, &mut columns)),
        }
        for lanes in columns[..n].as_flattened_mut().chunks_exact_mut(lanes) {
            m.map(s, L::load(s, lanes)).store(lanes, lanes.len());
        }
        let mut results = [neutral; MAX_LANES];
        for j in 0..MAX_LANES {
            let [a, b, c, d] = [columns[0][j], columns[1][j], columns[2][j], columns[3][j]].map(|x| m.promote(x));
            results[j] = m.merge(m.merge(m.merge(a, c), m.merge(b, d)), neutral);
        }
        accs.copy_from_slice(&results[..accs.len()]);
    }
}

/// Folds by a monoid.
#[derive(Clone, Copy)]
pub struct Each<M>(pub M);

impl<L: Lane, M: Monoid<L>> Fold<L> for Each<M> {
    type Acc = M::Acc;
    const COST: usize = M::COST;
    /// Turning them takes longer than to fold a vector that is not full.
    const TURNS_SHORT_ROWS: bool = false;
    /// With as many columns as are gathered, 32 KiB.
    const WIDENED_ROWS: usize = 16;

    fn empty(self) -> M::Acc {
        self.0.promote(self.0.neutral())
    }
    #[inline(always)]
    fn merge(self, a: M::Acc, b: M::Acc) -> M::Acc {
        Monoid::merge(self.0, a, b)
    }
    #[inline(always)]
    fn row<S: Simd, E: Numeric<Lane = L>>(self, s: S, tile: &[E], _start: usize) -> M::Acc {
        self.0.across::<S>(combine_tile(self.0, s, tile))
    }
    #[inline(always)]
    fn few<S: Simd, E: Numeric<Lane = L>>(self, s: S, rows: &[E], n: usize, accs: &mut [M::Acc]) -> bool {
        // A row is one vector then, and summed across its lanes.
        let are_few = (2..=FEW).contains(&n) && L::lanes::<S>() >= FEW;
        if are_few {
            few_elements(self.0, s, rows, n, accs);
        }
        are_few
    }
    #[inline(always)]
    fn columns<S: Simd, E: Numeric<Lane = L>>(self, s: S, rows: &[&[E]], _start: usize, accs: &mut [M::Acc]) {
        let mut part = Scratch::new();
        let part = part.zeros(accs.len());
        combine_rows(self.0, s, rows, part);
        for (acc, &x) in accs.iter_mut().zip(part.iter()) {
            *acc = Monoid::merge(self.0, *acc, self.0.promote(x));
        }
    }
}

/// Σ x
#[derive(Clone, Copy)]
pub struct Sum;
/// Π x
#[derive(Clone, Copy)]
pub struct Product;
/// The largest (`MAX`) or the smallest; NaN if any is.
#[derive(Clone, Copy)]
pub struct Extreme<const MAX: bool>;
/// Whether any is not zero (`ANY`), or all are.
#[derive(Clone, Copy)]
pub struct Truth<const ANY: bool>;
/// Number of elements that are not zero.
#[derive(Clone, Copy)]
pub struct CountNonzero;
/// Σ |x|
#[derive(Clone, Copy)]
pub struct AbsSum;
/// Σ x²
#[derive(Clone, Copy)]
pub struct SquareSum;
/// The largest (`MAX`) or the smallest |x|; NaN if any is.
#[derive(Clone, Copy)]
pub struct AbsExtreme<const MAX: bool>;
/// Σ |x|^p
#[derive(Clone, Copy)]
pub struct PowerSum(pub f64);

/// A monoid whose mapped elements are summed.
macro_rules! summed {
    ($name:ident, $self:ident, $cost:expr, |$s:ident, $x:ident| $map:expr) => {
        impl<L: Lane> Monoid<L> for $name {
            type Acc = L::Wide;
            const COST: usize = $cost;
            #[inline(always)]
            fn neutral(self) -> L {
                L::default()
            }
            #[inline(always)]
            fn map<S: Simd>($self, $s: S, $x: L::Pack<S>) -> L::Pack<S> {
                $map
            }
            #[inline(always)]
            fn combine<S: Simd>(self, a: L::Pack<S>, b: L::Pack<S>) -> L::Pack<S> {
                a.add(b)
            }
            #[inline(always)]
            fn promote(self, x: L) -> L::Wide {
                x.wide()
            }
            #[inline(always)]
            fn merge(self, a: L::Wide, b: L::Wide) -> L::Wide {
                a.plus(b)
            }
        }
    };
}
summed!(Sum, self, 1, |_s, x| x);
summed!(AbsSum, self, 1, |_s, x| x.abs());
summed!(SquareSum, self, 1, |_s, x| x.mul(x));
summed!(CountNonzero, self, 1, |_s, x| x.nonzero());
summed!(PowerSum, self, 100, |s, x| powers::<L, S>(s, x, self.0));

#[inline(always)]
fn powers<L: Lane, S: Simd>(s: S, x: L::Pack<S>, p: f64) -> L::Pack<S> {
    let n = L::lanes::<S>();
    let mut lanes = [L::default(); MAX_LANES];
    x.store(&mut lanes, n);
    lanes[..n].iter_mut().for_each(|x| *x = x.abs_pow(p));
    L::load(s, &lanes)
}

impl<L: Lane> Monoid<L> for Product {
    type Acc = L::Wide;
    #[inline(always)]
    fn neutral(self) -> L {
        L::ONE
    }
    #[inline(always)]
    fn map<S: Simd>(self, _: S, x: L::Pack<S>) -> L::Pack<S> {
        x
    }
    #[inline(always)]
    fn combine<S: Simd>(self, a: L::Pack<S>, b: L::Pack<S>) -> L::Pack<S> {
        a.mul(b)
    }
    #[inline(always)]
    fn promote(self, x: L) -> L::Wide {
        x.wide()
    }
    #[inline(always)]
    fn merge(self, a: L::Wide, b: L::Wide) -> L::Wide {
        a.times(b)
    }
}

/// A monoid that keeps the largest or the smallest of its mapped elements.
macro_rules! extreme {
    ($name:ident, $max:expr, |$x:ident| $map:expr, $neutral:expr) => {
        impl<const MAX: bool, L: Lane> Monoid<L> for $name<MAX> {
            type Acc = L;
            #[inline(always)]
            fn neutral(self) -> L {
                $neutral
            }
            #[inline(always)]
            fn map<S: Simd>(self, _: S, $x: L::Pack<S>) -> L::Pack<S> {
                $map
            }
            #[inline(always)]
            fn combine<S: Simd>(self, a: L::Pack<S>, b: L::Pack<S>) -> L::Pack<S> {
                if $max { a.max(b) } else { a.min(b) }
            }
            #[inline(always)]
            fn promote(self, x: L) -> L {
                x
            }
            #[inline(always)]
            fn merge(self, a: L, b: L) -> L {
                // Without a branch.
                let first = a.is_nan() | (if $max { a > b } else { a < b });
                if first { a } else { b }
            }
            #[inline(always)]
            fn across<S: Simd>(self, x: L::Pack<S>) -> L {
                if $max { x.largest() } else { x.smallest() }
            }
        }
    };
}
extreme!(Extreme, MAX, |x| x, if MAX { L::LEAST } else { L::GREATEST });
extreme!(AbsExtreme, MAX, |x| x.abs(), if MAX { L::default() } else { L::GREATEST });
extreme!(Truth, MAX, |x| x.nonzero(), if MAX { L::default() } else { L::ONE });

/// The first largest (`MAX`) or smallest element and its number; a NaN counts as such.
#[derive(Clone, Copy)]
pub struct ArgExtreme<const MAX: bool>;

/// A value and where it stands. No element has been seen while `index` is `usize::MAX`.
#[derive(Clone, Copy)]
pub struct Found<L> {
    /// The element.
    pub value: L,
    /// Its number in the reduction.
    pub index: usize,
}

/// Whether `x` takes the place of `best`, which came before it.
#[inline(always)]
fn beats<const MAX: bool, L: Lane>(x: L, best: L) -> bool {
    (if MAX { x > best } else { x < best }) || (x.is_nan() && !best.is_nan())
}

impl<const MAX: bool, L: Lane> Fold<L> for ArgExtreme<MAX> {
    type Acc = Found<L>;
    const IS_ORDERED: bool = true;

    fn empty(self) -> Found<L> {
        Found { value: L::default(), index: usize::MAX }
    }
    #[inline(always)]
    fn merge(self, a: Found<L>, b: Found<L>) -> Found<L> {
        if a.index == usize::MAX || (b.index != usize::MAX && beats::<MAX, L>(b.value, a.value)) { b } else { a }
    }
    #[inline(always)]
    fn row<S: Simd, E: Numeric<Lane = L>>(self, s: S, tile: &[E], start: usize) -> Found<L> {
        let value = Each(Extreme::<MAX>).row(s, tile, start);
        let is = |x: &E| {
            let x = x.to_lane();
            x == value || (x.is_nan() && value.is_nan())
        };
        // A block is searched as a whole first, which the compiler vectorises.
        let block = tile.chunks(64).position(|block| block.iter().fold(false, |any, x| any | is(x))).unwrap_or(0);
        let within = tile[block * 64..].iter().position(is).unwrap_or(0);
        Found { value, index: start + block * 64 + within }
    }
    #[inline(always)]
    fn columns<S: Simd, E: Numeric<Lane = L>>(self, _: S, rows: &[&[E]], start: usize, accs: &mut [Found<L>]) {
        let width = accs.len();
        let mut values = [L::default(); MAX_WIDTH];
        let mut at = [0u32; MAX_WIDTH];
        let Some((first, rest)) = rows.split_first() else { return };
        values[..width].iter_mut().zip(&first[..width]).for_each(|(value, x)| *value = x.to_lane());
        for (i, row) in rest.iter().enumerate() {
            for ((best, at), x) in values[..width].iter_mut().zip(&mut at).zip(&row[..width]) {
                let x = x.to_lane();
                let wins = beats::<MAX, L>(x, *best);
                *best = if wins { x } else { *best };
                *at = if wins { i as u32 + 1 } else { *at };
            }
        }
        for ((acc, &value), &at) in accs.iter_mut().zip(&values).zip(&at) {
            *acc = self.merge(*acc, Found { value, index: start + at as usize });
        }
    }
}

/// Number, mean and sum of squared deviations from it, in two sweeps over a tile (which the first leaves in cache). The second
/// takes the first's rounded mean as the centre and also finds how far it is off. Tiles are merged by Chan's formula:
/// no cancellation, however far the mean lies from zero. Of a column's later tiles the mean of those before is centre enough.
#[derive(Clone, Copy)]
pub struct Moments;

/// Mean and squared deviations of `count` elements.
#[derive(Clone, Copy, Default, Debug)]
pub struct Spread {
    /// How many.
    pub count: f64,
    /// Their mean.
    pub mean: f64,
    /// Σ (x − mean)²
    pub squares: f64,
}

impl Spread {
    /// From the sums of the deviations from a centre near the mean, and of their squares.
    #[inline(always)]
    fn around(centre: f64, count: f64, sum: f64, squares: f64) -> Self {
        if !centre.is_finite() {
            return Spread { count, mean: centre, squares: f64::NAN };
        }
        let off = sum * (1.0 / count);
        let about_mean = squares - sum * off;
        Spread { count, mean: centre + off, squares: if about_mean < 0.0 { 0.0 } else { about_mean } }
    }

    /// Σ (x − mean)² / (count − correction).
    pub fn variance(self, correction: f64) -> f64 {
        self.squares / (self.count - correction).max(0.0)
    }

    /// The spread of both sets together.
    #[inline(always)]
    pub fn merge(self, b: Spread) -> Spread {
        if self.count == 0.0 {
            return b;
        }
        self.merge_share(b, b.count / (self.count + b.count))
    }

    /// The same, of which `b` has this share.
    #[inline(always)]
    fn merge_share(self, b: Spread, share: f64) -> Spread {
        let delta = b.mean - self.mean;
        Spread {
            count: self.count + b.count,
            mean: self.mean + delta * share,
            squares: self.squares + b.squares + delta * delta * (self.count * share),
        }
    }
}

/// Writes Σ (x − centre) and Σ (x − centre)² over the rows into `sums` and `squares`, each column having its own centre.
#[inline(always)]
fn deviations<L: FloatLane, E: Numeric<Lane = L>, S: Simd>(s: S, rows: &[&[E]], centres: &[L], sums: &mut [L], squares: &mut [L]) {
    let width = sums.len();
    sums.fill(L::default());
    squares.fill(L::default());
    let mut groups = rows.chunks_exact(4);
    for group in &mut groups {
        let rows: [&[E]; 4] = std::array::from_fn(|i| &group[i][..width]);
        sweep!(L, S, width, |j, count| {
            let centre = at(s, centres, j, count);
            let mut d = [at(s, rows[0], j, count).sub(centre); 4];
            for i in 1..4 {
                d[i] = at(s, rows[i], j, count).sub(centre);
            }
            let square = d[0].mul_add(d[0], d[1].mul(d[1])).add(d[2].mul_add(d[2], d[3].mul(d[3])));
            at(s, sums, j, count).add(d[0].add(d[1]).add(d[2].add(d[3]))).store(&mut sums[j..], count);
            at(s, squares, j, count).add(square).store(&mut squares[j..], count);
        });
    }
    for row in groups.remainder() {
        sweep!(L, S, width, |j, count| {
            let d = at(s, row, j, count).sub(at(s, centres, j, count));
            at(s, sums, j, count).add(d).store(&mut sums[j..], count);
            d.mul_add(d, at(s, squares, j, count)).store(&mut squares[j..], count);
        });
    }
}

impl<L: FloatLane> Fold<L> for Moments {
    type Acc = Spread;
    const COST: usize = 2;

    fn empty(self) -> Spread {
        Spread::default()
    }
    #[inline(always)]
    fn merge(self, a: Spread, b: Spread) -> Spread {
        if b.count == 0.0 { a } else { a.merge(b) }
    }
    #[inline(always)]
    fn row<S: Simd, E: Numeric<Lane = L>>(self, s: S, tile: &[E], start: usize) -> Spread {
        let count = tile.len() as f64;
        let centre = L::round_from(Each(Sum).row(s, tile, start) / count);
        let centres = L::splat(s, centre);
        let [sum, squares] = sums!(s, 2, L, S, tile.len(), |j, count| {
            let d = at(s, tile, j, count).sub(centres);
            [d, d.mul(d)]
        });
        Spread::around(centre.wide(), count, sum, squares)
    }
    #[inline(always)]
    fn columns<S: Simd, E: Numeric<Lane = L>>(self, s: S, rows: &[&[E]], _start: usize, accs: &mut [Spread]) {
        let (width, count) = (accs.len(), rows.len() as f64);
        let mut room = [const { Scratch::new() }; 3];
        let [centres, sums, squares] = room.each_mut().map(|room| room.zeros(width));
        // All columns have had as many elements.
        let before = accs.first().map_or(0.0, |acc| acc.count);
        if before > 0.0 {
            centres.iter_mut().zip(accs.iter()).for_each(|(centre, acc)| *centre = L::round_from(acc.mean));
            deviations(s, rows, centres, sums, squares);
        }
        // A column's elements may be so far from those before that the squares overflow. The others' centres stay, and so do their results.
        if before == 0.0 || !squares.iter().all(|x| x.is_finite()) {
            combine_rows(Sum, s, rows, sums);
            for ((centre, sum), squares) in centres.iter_mut().zip(sums.iter()).zip(squares.iter()) {
                if before == 0.0 || !squares.is_finite() {
                    *centre = L::round_from(sum.wide() / count);
                }
            }
            deviations(s, rows, centres, sums, squares);
        }
        let share = count / (before + count);
        for (acc, ((centre, sum), squares)) in accs.iter_mut().zip(centres.iter().zip(sums.iter()).zip(squares.iter())) {
            let part = Spread::around(centre.wide(), count, sum.wide(), squares.wide());
            *acc = if before == 0.0 { part } else { acc.merge_share(part, share) };
        }
    }
}

/// log Σ exp(x): each tile's sum is taken relative to its largest element, so nothing overflows.
#[derive(Clone, Copy)]
pub struct LogSumExp;

/// `sum · exp(shift)`; the sum over nothing has `shift` −∞.
#[derive(Clone, Copy)]
pub struct Scaled {
    /// The exponent taken out.
    shift: f64,
    /// Σ exp(x − shift)
    sum: f64,
}

impl Scaled {
    fn new(shift: f64, sum: f64) -> Self {
        Self { shift: if sum == 0.0 { f64::NEG_INFINITY } else { shift }, sum }
    }

    /// log of the sum; −∞ for none.
    pub fn log(self) -> f64 {
        if self.sum == 0.0 { f64::NEG_INFINITY } else { self.sum.ln() + self.shift }
    }
}

/// What exponents are taken relative to: the maximum, or 0 if that would make ∞ − ∞.
#[inline(always)]
fn shift_for<L: FloatLane>(max: L) -> L {
    if num_traits::Float::is_finite(max) { max } else { L::default() }
}

impl<L: FloatLane> Fold<L> for LogSumExp {
    type Acc = Scaled;
    const COST: usize = 8;

    fn empty(self) -> Scaled {
        Scaled { shift: f64::NEG_INFINITY, sum: 0.0 }
    }
    #[inline(always)]
    fn merge(self, a: Scaled, b: Scaled) -> Scaled {
        let shift = a.shift.max(b.shift);
        let scaled = |x: Scaled| if x.sum == 0.0 || !x.sum.is_finite() { x.sum } else { x.sum * (x.shift - shift).exp() };
        Scaled { shift, sum: scaled(a) + scaled(b) }
    }
    #[inline(always)]
    fn row<S: Simd, E: Numeric<Lane = L>>(self, s: S, tile: &[E], start: usize) -> Scaled {
        let shift = shift_for(Each(Extreme::<true>).row(s, tile, start));
        let centre = L::splat(s, shift);
        let [sum] = sums!(s, 1, L, S, tile.len(), |j, count| [L::exp_pack(s, at(s, tile, j, count).sub(centre))]);
        Scaled::new(shift.wide(), sum)
    }
    #[inline(always)]
    fn columns<S: Simd, E: Numeric<Lane = L>>(self, s: S, rows: &[&[E]], _start: usize, accs: &mut [Scaled]) {
        let width = accs.len();
        let mut room = [const { Scratch::new() }; 2];
        let [shifts, sums] = room.each_mut().map(|room| room.zeros(width));
        combine_rows(Extreme::<true>, s, rows, shifts);
        shifts.iter_mut().for_each(|x| *x = shift_for(*x));
        for row in rows {
            sweep!(L, S, width, |j, count| {
                let e = L::exp_pack(s, at(s, row, j, count).sub(at(s, shifts, j, count)));
                at(s, sums, j, count).add(e).store(&mut sums[j..], count);
            });
        }
        for ((acc, &shift), &sum) in accs.iter_mut().zip(shifts.iter()).zip(sums.iter()) {
            *acc = Fold::<L>::merge(self, *acc, Scaled::new(shift.wide(), sum.wide()));
        }
    }
}
