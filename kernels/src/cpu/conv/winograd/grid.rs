//! How the targets of a gather are cut into tiles, and which sources the patch of a tile holds.
//!
//! Along an axis of stride 2 the four taps are two phases of two. Forward, the phases are of sources: those at even and at odd distance, which are
//! summed. Transposed, they are of targets, even and odd ones, which see the same sources: their tiles share a patch.

use super::super::Gather;
use super::super::axis::Axis;
use super::transform::{F2x3, F3x2, F3x3, Form, MAX_PATCH, MAX_PLACES, MAX_SIDE};
use std::ops::Range;

/// Phases along an axis.
pub(super) const MAX_PHASES: usize = 2;

/// A tile along one axis. Places that hold nothing are zero.
#[derive(Clone, Debug, Default)]
pub(super) struct Piece {
    /// For each phase of sources, the source at each place of the patch.
    pub sources: [[Option<usize>; MAX_PATCH]; MAX_PHASES],
    /// For each phase of targets, the target at each place of the tile.
    pub targets: [[Option<usize>; MAX_SIDE]; MAX_PHASES],
    /// The one target is the sum of what is computed for both ends of the tile.
    pub is_joined: bool,
}

/// The tiles along one axis.
#[derive(Clone, Debug)]
pub(super) struct AxisTiles {
    pub pieces: Vec<Piece>,
    /// For each phase, the taps by rising source.
    taps: Vec<[usize; 3]>,
    source_phases: usize,
    target_phases: usize,
    /// How many of the last tiles are short: they have fewer targets and do not need all places.
    shorts: usize,
    /// The places that a short tile needs, for each phase of targets.
    needed: [[bool; MAX_PATCH]; MAX_PHASES],
    /// Whether the middles of all patches hold every source.
    middles_cover: bool,
}

/// `at` as an index below `len`.
fn within(at: isize, len: usize) -> Option<usize> {
    usize::try_from(at).ok().filter(|&at| at < len)
}

impl AxisTiles {
    /// `None` if the form is not one for these taps: three neighbours, or four at steps of half a stride, at every target.
    fn of(form: Algorithm, axis: &Axis, sources: usize, targets: usize) -> Option<Self> {
        match form {
            Algorithm::F2x3 => Self::of_three(axis, sources, targets, F2x3::SIDE),
            Algorithm::F3x3 => Self::of_three(axis, sources, targets, F3x3::SIDE),
            Algorithm::F3x2 => Self::of_four(axis, sources, targets).or_else(|| Self::of_four_transposed(axis, sources, targets)),
        }
    }

    /// Tiles of `side` targets, or of one less at the end: without the last target, the last source has no part in it.
    fn of_three(axis: &Axis, sources: usize, targets: usize, side: usize) -> Option<Self> {
        let at = |target, tap| axis.source(target, tap);
        let (first, step) = (at(0, 0)?, at(0, 1)? - at(0, 0)?);
        if step.abs() != 1 || at(0, 2)? - first != 2 * step || at(1, 0)? - first != 1 {
            return None;
        }
        let low = first + 2 * step.min(0);
        let tiles = targets.div_ceil(side);
        let shorts = (tiles * side - targets).min(tiles);
        let pieces = (0..tiles).map(|tile| {
            let is_short = tile + shorts >= tiles;
            let target = tile * side - (tile + shorts).saturating_sub(tiles);
            let count = side - usize::from(is_short);
            let mut piece = Piece::default();
            piece.sources[0] = std::array::from_fn(|i| within(low + (target + i) as isize, sources).filter(|_| i < count + 2));
            piece.targets[0] = std::array::from_fn(|i| Some(target + i).filter(|&target| i < count && target < targets));
            piece
        });
        Some(Self {
            pieces: pieces.collect(),
            taps: vec![if step < 0 { [2, 1, 0] } else { [0, 1, 2] }],
            source_phases: 1,
            target_phases: 1,
            shorts,
            needed: [std::array::from_fn(|place| place < side + 1); 2],
            middles_cover: low == -1 && sources == targets,
        })
    }

    /// Targets are a stride of 2 apart. One that is left over by tiles of three takes two products.
    fn of_four(axis: &Axis, sources: usize, targets: usize) -> Option<Self> {
        let at = |target, tap| axis.source(target, tap);
        let first = at(0, 0)?;
        if (1..4).any(|tap| at(0, tap) != Some(first + tap as isize)) || at(1, 0)? - first != 2 {
            return None;
        }
        let has_short = targets % F3x2::SIDE == 1;
        let source = |phase: usize, target: usize| within(first + (2 * target + phase) as isize, sources);
        let pieces = (0..targets).step_by(F3x2::SIDE).map(|target| {
            let mut piece = Piece::default();
            if has_short && target + 1 == targets {
                piece.sources = std::array::from_fn(|phase| [source(phase, target), None, None, source(phase, target + 1), None]);
                piece.targets[0] = [Some(target), None, None];
                piece.is_joined = true;
            } else {
                piece.sources = std::array::from_fn(|phase| std::array::from_fn(|i| source(phase, target + i).filter(|_| i < F3x2::PATCH)));
                piece.targets[0] = std::array::from_fn(|i| Some(target + i).filter(|&target| target < targets));
            }
            piece
        });
        Some(Self {
            pieces: pieces.collect(),
            taps: vec![[0, 2, 0], [1, 3, 0]],
            source_phases: 2,
            target_phases: 1,
            shorts: usize::from(has_short),
            needed: [[true, false, false, true, false]; 2],
            middles_cover: false,
        })
    }

    /// Sources are a stride of 2 apart. A target of either phase sees a pair of neighbours; the pairs at the ends of the image, of which one
    /// source lies in the padding, may be cut off: they take one product each.
    fn of_four_transposed(axis: &Axis, sources: usize, targets: usize) -> Option<Self> {
        let mut taps = Vec::new();
        // Of each phase, the first source of its first pair, and the number of pairs.
        let mut pairs = [(0, 0); MAX_PHASES];
        for (phase, pairs) in pairs.iter_mut().enumerate() {
            let mut touching = (0..4).rev().filter_map(|tap| axis.source(phase, tap).map(|source| (tap, source)));
            let ((low, first), (high, second)) = (touching.next()?, touching.next()?);
            if touching.next().is_some() || second - first != 1 || axis.source(phase + 2, low)? - first != 1 || targets < 2 {
                return None;
            }
            taps.push([low, high, 0]);
            *pairs = (first, (targets - phase).div_ceil(2));
        }
        let target = |phase: usize, pair: isize| within(pair - pairs[phase].0, pairs[phase].1).map(|i| phase + 2 * i);
        let lowest = pairs[0].0.min(pairs[1].0);
        let end = pairs.iter().map(|&(first, count)| first + count as isize).max().unwrap_or(0);
        let last = sources as isize - 1;
        let tiles = |pairs: isize| (pairs.max(0) as usize).div_ceil(F3x2::SIDE);
        let has_short = lowest == -1 && end <= last + 1 && F3x2::PATCH * tiles(last) + 1 < F3x2::PATCH * tiles(end - lowest);
        let (start, end) = if has_short { (0, last) } else { (lowest, end) };
        let mut pieces: Vec<Piece> = (0..tiles(end - start))
            .map(|tile| {
                let pair = start + (tile * F3x2::SIDE) as isize;
                let mut piece = Piece::default();
                piece.sources[0] = std::array::from_fn(|i| within(pair + i as isize, sources).filter(|_| i < F3x2::PATCH));
                piece.targets = std::array::from_fn(|phase| {
                    std::array::from_fn(|i| target(phase, pair + i as isize).filter(|_| pair + (i as isize) < end))
                });
                piece
            })
            .collect();
        let ends = |phase: usize| (target(phase, last), target(phase, -1));
        if has_short {
            let mut piece = Piece::default();
            piece.sources[0] = [within(last, sources), None, None, Some(0), None];
            piece.targets = std::array::from_fn(|phase| [ends(phase).0, None, ends(phase).1]);
            pieces.push(piece);
        }
        let needed = |phase| [ends(phase).0.is_some(), false, false, ends(phase).1.is_some(), false];
        Some(Self {
            pieces,
            taps,
            source_phases: 1,
            target_phases: 2,
            shorts: usize::from(has_short),
            needed: std::array::from_fn(needed),
            middles_cover: false,
        })
    }

    fn is_short(&self, piece: usize) -> bool {
        piece + self.shorts >= self.pieces.len()
    }

    /// The places that a tile needs for some phase of targets, or for every one.
    fn uses(&self, is_short: bool, for_all: bool) -> [bool; MAX_PATCH] {
        std::array::from_fn(|place| {
            let needing = (0..self.target_phases).filter(|&phase| self.needed[phase][place]).count();
            !is_short || needing >= if for_all { self.target_phases } else { 1 }
        })
    }

    /// Products of all tiles along this axis, which have `patch` if they are not short.
    fn products(&self, patch: usize) -> usize {
        let short = |phase: usize| (0..patch).filter(|&place| self.needed[phase][place]).count();
        let shorts = (0..self.target_phases).map(short).sum::<usize>() * self.shorts;
        self.source_phases * ((self.pieces.len() - self.shorts) * patch * self.target_phases + shorts)
    }
}

/// The forms by name: targets of a tile × taps, along an axis.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Algorithm {
    F2x3,
    F3x3,
    F3x2,
}

impl Algorithm {
    /// Sources of a patch along an axis.
    fn patch(self) -> usize {
        match self {
            Self::F2x3 => F2x3::PATCH,
            Self::F3x3 => F3x3::PATCH,
            Self::F3x2 => F3x2::PATCH,
        }
    }

    /// Taps of the convolution along an axis: those of a form for a stride of 2 are every second one.
    fn kernel(self) -> usize {
        match self {
            Self::F2x3 => F2x3::TAPS,
            Self::F3x3 => F3x3::TAPS,
            Self::F3x2 => 2 * F3x2::TAPS,
        }
    }
}

/// How the targets of a gather are cut into tiles.
#[derive(Clone, Debug)]
pub(in super::super) struct Grid {
    /// Images, or slices of volumes.
    pub(super) planes: usize,
    pub(super) source: [usize; 2],
    pub(super) target: [usize; 2],
    /// Rows and columns of tiles.
    pub(super) axes: [AxisTiles; 2],
    pub(super) form: Algorithm,
    /// For each kind of tile, the places that it needs for some phase of targets, and those for every one.
    needed: [[[bool; MAX_PLACES]; KINDS]; 2],
}

/// Kinds of tiles: short in their columns, in neither, in their rows, in both.
const KINDS: usize = 4;

/// The kind of tiles that need all places.
const FULL: usize = 1;

/// A phase along both axes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Phase {
    pub index: usize,
    pub row: usize,
    pub col: usize,
}

impl Grid {
    /// `None` if the form is not one for these taps: 3×3 neighbours, or 4×4 of stride 2.
    pub(super) fn of(g: &Gather, form: Algorithm) -> Option<Self> {
        let is_slice = g.kernel[0] == 1 && g.source[0] == g.target[0] && (0..2).all(|i| g.axes[0].source(i, 0) == Some(i as isize));
        if g.groups != 1 || g.kernel[1..] != [form.kernel(); 2] || !is_slice {
            return None;
        }
        let axis = |i: usize| AxisTiles::of(form, &g.axes[i], g.source[i], g.target[i]);
        let axes = [axis(1)?, axis(2)?];
        // Both axes run the same way.
        if axes[0].taps != axes[1].taps || axes[0].pieces.is_empty() || axes[1].pieces.is_empty() {
            return None;
        }
        let [source, target] = [g.source, g.target].map(|extent| [extent[1], extent[2]]);
        let patch = form.patch();
        let needed = [false, true].map(|for_all| {
            let [rows, cols] = axes.each_ref().map(|axis| [false, true].map(|is_short| axis.uses(is_short, for_all)));
            std::array::from_fn(|kind| {
                let (rows, cols) = (rows[usize::from(kind > FULL)], cols[usize::from(kind.is_multiple_of(3))]);
                std::array::from_fn(|place| place < patch * patch && rows[place / patch] && cols[place % patch])
            })
        });
        Some(Self { planes: g.n * g.source[0], source, target, axes, form, needed })
    }

    /// Taps that a target, of one phase and for one phase of sources, has along an axis.
    pub(super) fn taps(&self) -> usize {
        self.form.kernel() / self.axes[0].taps.len()
    }

    fn phases(&self, along: fn(&AxisTiles) -> usize) -> impl Iterator<Item = Phase> + use<> {
        let [rows, cols] = [along(&self.axes[0]), along(&self.axes[1])];
        (0..rows * cols).map(move |index| Phase { index, row: index / cols, col: index % cols })
    }

    pub(super) fn source_phases(&self) -> impl Iterator<Item = Phase> + use<> {
        self.phases(|axis| axis.source_phases)
    }

    pub(super) fn target_phases(&self) -> impl Iterator<Item = Phase> + use<> {
        self.phases(|axis| axis.target_phases)
    }

    /// The tap at row `i`, column `j` of a phase.
    pub(super) fn tap(&self, phase: Phase, i: usize, j: usize) -> usize {
        self.axes[0].taps[phase.row][i] * self.form.kernel() + self.axes[1].taps[phase.col][j]
    }

    /// All taps, phase by phase.
    pub(super) fn order(&self) -> Vec<usize> {
        let phases = self.phases(|axis| axis.taps.len());
        let taps = |i: usize| (i / self.taps(), i % self.taps());
        phases
            .flat_map(|phase| (0..self.taps().pow(2)).map(move |i| (phase, taps(i))))
            .map(|(phase, (i, j))| self.tap(phase, i, j))
            .collect()
    }

    pub(super) fn plane_tiles(&self) -> usize {
        self.axes[0].pieces.len() * self.axes[1].pieces.len()
    }

    /// Places that the tiles of a plane need.
    pub(super) fn plane_places(&self) -> usize {
        let places = |axis: &AxisTiles| {
            let needed =
                |piece: usize| axis.uses(axis.is_short(piece), false)[..self.form.patch()].iter().filter(|&&needed| needed).count();
            (0..axis.pieces.len()).map(needed).sum::<usize>()
        };
        self.axes.iter().map(places).product()
    }

    /// The places that a tile needs for some phase of targets, or for every one, if not all.
    pub(super) fn needed_places(&self, at: &At, for_all: bool) -> Option<&[bool; MAX_PLACES]> {
        (at.kind != FULL).then(|| &self.needed[usize::from(for_all)][at.kind])
    }

    /// Number of tiles.
    pub(super) fn len(&self) -> usize {
        self.planes * self.plane_tiles()
    }

    /// Values that the weights of a pair of channels become.
    pub(super) fn weights(&self) -> usize {
        self.form.patch() * self.form.patch() * self.source_phases().count() * self.target_phases().count()
    }

    /// Products of a pair of channels.
    pub(super) fn products(&self) -> usize {
        self.planes * self.axes[0].products(self.form.patch()) * self.axes[1].products(self.form.patch())
    }

    /// Whether the middles of all patches hold every source.
    pub(super) fn middles_cover(&self) -> bool {
        self.axes.iter().all(|axis| axis.middles_cover)
    }

    /// Some tiles.
    pub(super) fn block(&self, tiles: Range<usize>) -> Block {
        let mut sorted: [Vec<At>; KINDS] = Default::default();
        let cols = self.axes[1].pieces.len();
        for tile in tiles {
            let (plane, at) = (tile / self.plane_tiles(), tile % self.plane_tiles());
            let (row, col) = (at / cols, at % cols);
            let kind = match (self.axes[0].is_short(row), self.axes[1].is_short(col)) {
                (false, true) => 0,
                (false, false) => FULL,
                (true, false) => 2,
                (true, true) => 3,
            };
            sorted[kind].push(At { plane, row, col, kind });
        }
        let counts = sorted.each_ref().map(Vec::len);
        Block { tiles: sorted.concat(), counts }
    }

    /// Which tiles of a block need a place for a phase of targets.
    pub(super) fn needing(&self, block: &Block, place: usize, phase: Phase) -> Range<usize> {
        let [rows, cols] = &self.axes;
        let [short_cols, full, short_rows, short] = block.counts;
        let in_rows = rows.needed[phase.row][place / self.form.patch()];
        let in_cols = cols.needed[phase.col][place % self.form.patch()];
        let start = if in_cols { 0 } else { short_cols };
        let end = short_cols + full + if in_rows { short_rows } else { 0 } + if in_rows && in_cols { short } else { 0 };
        start..end
    }
}

/// Where a tile lies: indices of rows and columns of tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct At {
    pub plane: usize,
    pub row: usize,
    pub col: usize,
    kind: usize,
}

/// Some tiles, sorted by kind: in this order those that need a place follow one another.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub tiles: Vec<At>,
    counts: [usize; KINDS],
}

impl Block {
    pub fn len(&self) -> usize {
        self.tiles.len()
    }
}
