use super::super::testing::{Values, device};
use super::plan::{HopperTile, Level, MmaTile, Plan, Skinny, TiledTile};
use super::*;
use crate::pointwise::unary::{Gelu, Relu};

/// How a test's matrix lies in memory.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Layout {
    /// Rows with so many elements between them.
    Rows(usize),
    /// The same of columns.
    Cols(usize),
    /// Neither is contiguous.
    Gaps,
}
use Layout::{Cols, Gaps, Rows};

impl Layout {
    fn strides(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Rows(pad) => (cols + pad, 1),
            Cols(pad) => (1, rows + pad),
            Gaps => (2 * cols + 3, 2),
        }
    }
}

/// A row of the table, and its function.
type Activation = (&'static Row<1>, fn(f64) -> f64);

/// One product: what is computed and how it lies.
#[derive(Clone, Copy, Debug)]
struct Case {
    ty: Type,
    out: Type,
    /// m, n, k.
    extents: [usize; 3],
    a: Layout,
    b: Layout,
    batch: usize,
    /// Distances between items of the batch in so many matrices; an irregular list in their place.
    steps: [usize; 2],
    irregular: bool,
    pad: usize,
    alpha: f64,
    bias: bool,
    residual: bool,
    accumulate: bool,
    activation: Option<fn() -> Activation>,
    precision: MatmulPrecision,
}

impl Case {
    fn new(ty: Type, extents: [usize; 3], a: Layout, b: Layout) -> Self {
        Self {
            ty,
            out: ty,
            extents,
            a,
            b,
            batch: 1,
            steps: [1, 1],
            irregular: false,
            pad: 0,
            alpha: 1.0,
            bias: false,
            residual: false,
            accumulate: false,
            activation: None,
            precision: MatmulPrecision::Highest,
        }
    }

    fn batched(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    fn finished(self) -> Self {
        Self {
            alpha: 0.5,
            bias: true,
            residual: true,
            pad: 3,
            activation: Some(|| (Gelu::ROW, |x| x * crate::cpu::math::double::normal_cdf(x))),
            ..self
        }
    }

    /// Computes by `plan`, or by the one that is chosen, and compares with a plain loop. `None` if the plan does not fit the operands' alignment.
    fn check(self, gpu: &'static Gpu, plan: Option<Plan>) {
        let [m, n, k] = self.extents;
        let numbers = |len: usize, seed: usize| -> Vec<f64> {
            let number = |i: usize| {
                let hash = ((i + seed * 7919) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
                if self.ty.is_float() {
                    hash as f64 / (1 << 23) as f64 - 1.0
                } else {
                    (hash % 200) as f64 - if self.ty == Type::U8 { 0.0 } else { 100.0 }
                }
            };
            (0..len).map(number).collect()
        };
        let (a_strides, b_strides) = (self.a.strides(m, k), self.b.strides(k, n));
        // Items begin at multiples of 8 elements, so that they are aligned if their lines are.
        let size = |rows: usize, cols: usize, strides: (usize, usize)| {
            (rows.max(1) * strides.0.max(1))
                .max(cols.max(1) * strides.1.max(1))
                .max(rows * strides.0 + cols * strides.1)
                .next_multiple_of(8)
        };
        let (a_size, b_size) = (size(m, k, a_strides), size(k, n, b_strides));
        let place = |i: usize| if self.irregular { i * i % 5 } else { i };
        let a_offsets: Vec<usize> = (0..self.batch).map(|i| place(i) * self.steps[0] * a_size).collect();
        let b_offsets: Vec<usize> = (0..self.batch).map(|i| place(i) * self.steps[1] * b_size).collect();
        let last = |offsets: &[usize]| offsets.iter().copied().max().unwrap_or(0);
        let a = Values::new(gpu, self.ty, &numbers(last(&a_offsets) + a_size, 1));
        let b = Values::new(gpu, self.ty, &numbers(last(&b_offsets) + b_size, 2));
        let row_stride = n + self.pad;
        let len = self.batch * m * row_stride;
        let bias = Values::new(gpu, self.ty, &numbers(n, 3));
        let residual = Values::new(gpu, self.out, &numbers(len, 4));
        let mut out = Values::new(gpu, self.out, &numbers(len, 5));
        let before = out.read();
        let activation = self.activation.map(|of| of());
        let gemm = Gemm {
            alpha: self.alpha,
            bias: self.bias.then(|| bias.slice()),
            residual: self.residual.then(|| residual.slice()),
            accumulate: self.accumulate,
            activation: activation.map(|a| a.0),
            precision: self.precision,
            ..Gemm::batched(
                Matrix::new(a.slice(), m, k, a_strides.0, a_strides.1).unwrap(),
                &a_offsets,
                Matrix::new(b.slice(), k, n, b_strides.0, b_strides.1).unwrap(),
                &b_offsets,
            )
        };
        match plan {
            None => gemm.run(gpu, &mut out.slice_mut(), row_stride).unwrap(),
            Some(plan) => {
                let mut out = out.slice_mut();
                gemm.check(&out, row_stride);
                let problem = gemm.problem(&out, row_stride);
                gemm.launch(gpu, problem, plan, &mut out).unwrap();
            }
        }
        let (out, a, b, bias, residual) = (out.read(), a.read(), b.read(), bias.read(), residual.read());
        let rounding = match self.out {
            Type::F16 => 1.0 / 1024.0,
            Type::BF16 => 1.0 / 128.0,
            Type::F32 => 1e-6,
            _ => 1e-14,
        };
        // Of each product, relative to factors of at most 1.
        let exactness = match (self.ty, self.precision) {
            (Type::F32, MatmulPrecision::Medium) => 1.0 / 1024.0,
            (Type::F64, _) => 1e-15,
            _ => 3e-7,
        };
        for i in 0..self.batch {
            for row in 0..m {
                for col in 0..row_stride {
                    let at = (i * m + row) * row_stride + col;
                    if col >= n {
                        assert_eq!(out[at], before[at], "{self:?} {plan:?}: between rows, at {row}, {col}");
                        continue;
                    }
                    let term = |j: usize| {
                        (a[a_offsets[i] + row * a_strides.0 + j * a_strides.1], b[b_offsets[i] + j * b_strides.0 + col * b_strides.1])
                    };
                    if !self.ty.is_float() {
                        let sum = (0..k).map(term).fold(0i64, |sum, (x, y)| sum.wrapping_add((x as i64).wrapping_mul(y as i64)));
                        let sum = sum.wrapping_mul(self.alpha as i64) + if self.accumulate { before[at] as i64 } else { 0 };
                        let expected = match self.ty {
                            Type::U8 => sum as u8 as f64,
                            Type::I32 => sum as i32 as f64,
                            _ => sum as f64,
                        };
                        assert_eq!(out[at], expected, "{self:?} {plan:?}: item {i} at {row}, {col}");
                        continue;
                    }
                    let sum: f64 = (0..k).map(term).map(|(x, y)| x * y).sum();
                    let mut expected = self.alpha * sum + if self.bias { bias[col] } else { 0.0 };
                    expected = activation.map_or(expected, |a| (a.1)(expected));
                    expected += if self.residual { residual[at] } else { 0.0 };
                    expected += if self.accumulate { before[at] } else { 0.0 };
                    let bound = rounding * (expected.abs() + 1e-2) + exactness * (k as f64).sqrt().max(1.0) * 2.0;
                    assert!((out[at] - expected).abs() <= bound, "{self:?} {plan:?}: item {i} at {row}, {col}: {} for {expected}", out[at]);
                }
            }
        }
    }
}

const FOUR: [(Layout, Layout); 4] = [(Rows(0), Rows(0)), (Rows(0), Cols(0)), (Cols(0), Rows(0)), (Cols(0), Cols(0))];
const ALL: [Type; 7] = [Type::F32, Type::F64, Type::F16, Type::BF16, Type::I64, Type::I32, Type::U8];

#[test]
fn tiles_of_every_type_and_layout() {
    let Some(gpu) = device() else { return };
    let plan = |level, splits| Some(Plan { level: Level::Tiled(level), splits });
    for ty in ALL {
        for (a, b) in FOUR.into_iter().chain([(Rows(1), Cols(3)), (Gaps, Gaps)]) {
            Case::new(ty, [68, 72, 40], a, b).check(gpu, plan(TiledTile::SMALL, 1));
        }
        Case { alpha: 3.0, accumulate: true, pad: 1, ..Case::new(ty, [5, 7, 70], Rows(0), Cols(0)).batched(3) }
            .check(gpu, plan(TiledTile::SMALL, 2));
    }
    for ty in [Type::F32, Type::BF16] {
        Case::new(ty, [132, 136, 20], Rows(0), Rows(0)).finished().check(gpu, plan(TiledTile::LARGE, 1));
        Case::new(ty, [132, 136, 20], Cols(0), Cols(1)).finished().check(gpu, plan(TiledTile::LARGE, 2));
    }
}

#[test]
fn few_rows_or_columns() {
    let Some(gpu) = device() else { return };
    for ty in ALL {
        for few in [1, 2, 3, 8] {
            for (a, b) in FOUR.into_iter().chain([(Rows(1), Cols(3)), (Cols(0), Rows(1))]) {
                Case { pad: 1, ..Case::new(ty, [few, 80, 72], a, b).batched(2) }.check(gpu, None);
                Case::new(ty, [48, few, 301], a, b).check(gpu, None);
            }
        }
    }
    for swap in [false, true] {
        let skinny = Skinny { swap, few: 4, along_k: !swap, vector: 1, few_along_k: false };
        let extents = if swap { [40, 3, 500] } else { [3, 40, 500] };
        let case = Case::new(Type::F32, extents, if swap { Cols(0) } else { Rows(1) }, if swap { Rows(1) } else { Cols(1) });
        case.finished().check(gpu, Some(Plan { level: Level::Skinny(skinny), splits: 3 }));
    }
}

#[test]
fn tensor_cores_of_a_warp() {
    let Some(gpu) = device().filter(|gpu| gpu.capability() >= (8, 0)) else { return };
    let tile = MmaTile { m: 64, n: 64, warp_m: 32, warp_n: 32, stages: 3 };
    let plan = |tile, splits| Some(Plan { level: Level::Mma(tile), splits });
    for ty in [Type::F16, Type::BF16, Type::F32] {
        for precision in [MatmulPrecision::Medium, MatmulPrecision::High] {
            for (a, b) in FOUR {
                let case = Case { precision, ..Case::new(ty, [72, 88, 200], a, b) };
                case.batched(2).check(gpu, plan(tile, 1));
                Case { pad: 1, ..case }.check(gpu, plan(tile, 2));
                // Extents that are no multiples of a unit, in lines that are.
                let odd = |layout| if let Rows(_) = layout { Rows(5) } else { Cols(5) };
                Case { a: odd(a), b: odd(b), extents: [67, 67, 35], ..case }.finished().check(gpu, plan(tile, 1));
            }
        }
    }
    Case::new(Type::BF16, [136, 264, 72], Rows(0), Rows(0)).check(gpu, plan(MmaTile::PLAIN, 1));
    Case { precision: MatmulPrecision::High, ..Case::new(Type::F32, [136, 264, 72], Rows(0), Cols(0)) }.check(gpu, plan(MmaTile::SPLIT, 1));
}

#[test]
fn tensor_cores_of_a_warpgroup() {
    let Some(gpu) = device().filter(|gpu| gpu.capability().0 == 9) else { return };
    let plan = |tile| Some(Plan { level: Level::Hopper(tile), splits: 1 });
    for (a, b) in FOUR {
        let turns = HopperTile { pingpong: true, cluster: 2, ..HopperTile::SQUARE };
        for tile in [HopperTile::WIDE, HopperTile { cluster: 2, ..HopperTile::WIDE }, HopperTile::SQUARE, turns, HopperTile::NARROW] {
            Case::new(Type::BF16, [328, 264, 200], a, b).check(gpu, plan(tile));
            Case { pad: 3, ..Case::new(Type::F16, [136, 264, 72], a, b) }
                .check(gpu, plan(HopperTile { cluster: 1, pingpong: !tile.pingpong && tile.n <= 128, ..tile }));
        }
        Case { pad: 8, ..Case::new(Type::F16, [72, 136, 72], a, b).batched(5) }.check(gpu, plan(HopperTile::NARROW));
        // Rows of C that are not aligned are stored from registers.
        Case::new(Type::BF16, [136, 136, 136], a, b).finished().check(gpu, plan(HopperTile::NARROW));
        Case { out: Type::F32, ..Case::new(Type::BF16, [136, 136, 136], a, b) }.check(gpu, plan(HopperTile::SQUARE));
        for tile in [HopperTile { parts: 3, ..HopperTile::NARROW }, HopperTile { parts: 8, ..HopperTile::SQUARE }] {
            Case::new(Type::BF16, [136, 72, 648], a, b).batched(2).finished().check(gpu, plan(tile));
            Case { pad: 8, ..Case::new(Type::BF16, [136, 264, 648], a, b) }.check(gpu, plan(tile));
        }
    }
    for few in [2, 8, 13, 40, 64] {
        let b = if few == 64 { Rows(0) } else { Cols(0) };
        Case { pad: 1, ..Case::new(Type::BF16, [few, 264, 600], Rows(0), Cols(0)) }.check(gpu, None);
        Case::new(Type::BF16, [few, 264, 136], Rows(0), Rows(0)).finished().check(gpu, plan(HopperTile::few(few, true)));
        Case::new(Type::BF16, [few, 264, 520], Rows(0), Rows(0))
            .finished()
            .check(gpu, plan(HopperTile { parts: 4, ..HopperTile::few(few, true) }));
        Case::new(Type::BF16, [264, few, 136], Cols(0), b).batched(2).finished().check(gpu, plan(HopperTile::few(few, false)));
    }
    // More tiles than multiprocessors: each block takes several, and the ring of stages goes on.
    Case { pad: 5, ..Case::new(Type::BF16, [1032, 520, 72], Rows(0), Cols(0)).finished() }.check(gpu, plan(HopperTile::WIDE));
    Case { accumulate: true, residual: false, ..Case::new(Type::F16, [264, 264, 328], Rows(0), Rows(0)).finished() }
        .check(gpu, plan(HopperTile::WIDE));
}

#[test]
fn batches_of_any_arrangement() {
    let Some(gpu) = device() else { return };
    for ty in [Type::F32, Type::BF16] {
        for (steps, irregular) in [([1, 1], false), ([0, 1], false), ([1, 0], false), ([2, 3], false), ([1, 1], true)] {
            Case { steps, irregular, ..Case::new(ty, [24, 40, 32], Rows(0), Cols(0)).batched(6) }.check(gpu, None);
            Case { steps, irregular, ..Case::new(ty, [3, 40, 32], Rows(0), Cols(0)).batched(6) }.check(gpu, None);
        }
    }
}

#[test]
fn factors_with_odd_lines_are_padded() {
    let Some(gpu) = device() else { return };
    let (m, k, n) = (40, 33, 51);
    // Small integers: sums of f32 are exact at every level.
    let values = |len: usize, step: usize| Values::new(gpu, Type::BF16, &(0..len).map(|i| (i * step % 7) as f64 - 3.0).collect::<Vec<_>>());
    let (x, y) = (values(m * k, 5), values(k * n, 3));
    for (a, b) in [
        (Matrix::row_major(x.slice(), m, k), Matrix::row_major(y.slice(), k, n)),
        (Matrix::row_major(x.slice(), k, m).map(Matrix::t), Matrix::row_major(y.slice(), n, k).map(Matrix::t)),
    ] {
        let gemm = Gemm::new(a.unwrap(), b.unwrap());
        let copied = [gemm.a, gemm.b].into_iter().any(|factor| gemm.padded(gpu, factor, 0).unwrap().is_some());
        assert_eq!(copied, gpu.capability() >= (8, 0));
        let [padded, plain] = [0, usize::MAX].map(|worth| {
            let mut out = Values::unwritten(gpu, Type::F32, m * n);
            gemm.run_padded(gpu, &mut out.slice_mut(), n, worth).unwrap();
            out.read()
        });
        assert_eq!(padded, plain);
    }
}

#[test]
fn empty_sums_and_empty_results() {
    let Some(gpu) = device() else { return };
    for ty in [Type::F32, Type::BF16] {
        for extents in [[4, 20, 0], [20, 1, 0], [0, 4, 4], [4, 0, 4]] {
            Case { bias: true, ..Case::new(ty, extents, Rows(0), Rows(0)) }.check(gpu, None);
        }
        Case { accumulate: true, ..Case::new(ty, [9, 9, 0], Rows(0), Rows(0)) }.check(gpu, None);
    }
    let relu = || -> (&'static Row<1>, fn(f64) -> f64) { (Relu::ROW, |x| x.max(0.0)) };
    Case { activation: Some(relu), ..Case::new(Type::F64, [17, 18, 19], Rows(0), Rows(0)) }.check(gpu, None);
}

fn problem(ty: Type, extents: [usize; 3], a: Layout, b: Layout) -> Problem {
    let [m, n, k] = extents;
    let factor = |(row, col): (usize, usize)| Factor { stride: row as i64, k_stride: col as i64, ..Factor::default() };
    let (col, row) = b.strides(k, n);
    let mut problem = Problem {
        m,
        n,
        k,
        batch: 1,
        batch_inner: 1,
        a: factor(a.strides(m, k)),
        b: factor((row, col)),
        by_offsets: false,
        ty,
        out_ty: ty,
        out: DevicePtr::NULL,
        row_stride: n,
        precision: MatmulPrecision::Highest,
    };
    problem.settle_strides();
    problem
}

#[test]
fn the_level_follows_from_the_problem() {
    let level = |ty, extents, a, b, capability| Plan::of(&problem(ty, extents, a, b), capability).level;
    let square = [4096; 3];
    assert_eq!(level(Type::BF16, square, Rows(0), Rows(0), (9, 0)), Level::Hopper(HopperTile::WIDE));
    assert_eq!(level(Type::BF16, square, Cols(0), Cols(0), (8, 0)), Level::Mma(MmaTile::PLAIN));
    assert_eq!(level(Type::F16, square, Rows(0), Rows(0), (10, 0)), Level::Mma(MmaTile::PLAIN), "wgmma is of 9.0 alone");
    assert_eq!(level(Type::BF16, square, Rows(0), Rows(0), (7, 5)), Level::Tiled(TiledTile::LARGE));
    assert_eq!(level(Type::BF16, square, Rows(1), Rows(0), (9, 0)), Level::Tiled(TiledTile::LARGE), "lines that are not aligned");
    assert_eq!(level(Type::F32, square, Rows(0), Rows(0), (9, 0)), Level::Tiled(TiledTile::LARGE), "exact products of f32");
    assert!(matches!(
        level(Type::BF16, [1, 4096, 4096], Rows(0), Cols(0), (9, 0)),
        Level::Skinny(Skinny { swap: false, few: 1, along_k: true, vector: 8, .. })
    ));
    assert!(matches!(
        level(Type::F32, [4096, 5, 4096], Rows(0), Cols(0), (9, 0)),
        Level::Skinny(Skinny { swap: true, few: 8, vector: 4, .. })
    ));
    assert_eq!(level(Type::BF16, [64, 64, 0], Rows(0), Rows(0), (9, 0)), Level::Tiled(TiledTile::SMALL));
    let inexact = Problem { precision: MatmulPrecision::High, ..problem(Type::F32, square, Rows(0), Rows(0)) };
    assert_eq!(Plan::of(&inexact, (9, 0)).level, Level::Mma(MmaTile::SPLIT));
}

#[test]
fn k_is_cut_where_tiles_are_few() {
    let parts = |extents| match Plan::of(&problem(Type::BF16, extents, Rows(0), Cols(0)), (9, 0)) {
        Plan { level: Level::Hopper(tile), splits: 1 } => tile.parts,
        plan => panic!("{plan:?}"),
    };
    assert_eq!(parts([4096; 3]), 1);
    assert_eq!(parts([128, 256, 65536]), 8);
    assert_eq!(parts([128, 128, 64]), 1);
    assert_eq!(parts([8, 4096, 4096]), 4);
    let splits = |ty, extents| Plan::of(&problem(ty, extents, Rows(0), Cols(0)), (8, 0)).splits;
    assert!(splits(Type::F32, [128, 256, 65536]) > 4 && splits(Type::BF16, [128, 256, 65536]) > 4);
    assert_eq!(splits(Type::F32, [2048; 3]), 1);
}

#[test]
fn regular_batches_need_no_list() {
    let mut p = problem(Type::F32, [8, 8, 8], Rows(0), Rows(0));
    p.batch = 6;
    p.arrange_batch(&[0, 64, 128, 0, 64, 128], &[5, 5, 5, 69, 69, 69]);
    assert_eq!((p.by_offsets, p.batch_inner, p.a.inner, p.a.outer, p.b.inner, p.b.outer), (false, 3, 64, 0, 0, 64));
    assert_eq!((p.a.offset_step, p.b.offset_step), (64, 64));
    p.batch = 4;
    p.arrange_batch(&[0, 64, 32, 0], &[0, 0, 0, 0]);
    assert!(p.by_offsets && p.a.offset_step == 32);
}
