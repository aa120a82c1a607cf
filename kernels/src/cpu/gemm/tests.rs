//! Every path against a plain product in f64: shapes, strides, batches, thread counts.

use super::*;
use crate::element::{Element, Float};
use half::{bf16, f16};

/// Uniform in ±`scale`, as far as the type has such values.
fn values<T: Element>(len: usize, seed: u64, scale: f64) -> Vec<T> {
    let mut state = seed.wrapping_mul(0x9E3779B97F4A7C15) | 1;
    let next = |state: &mut u64| {
        *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (*state >> 33) as f64 / (1u64 << 31) as f64 * 2.0 - 1.0
    };
    (0..len).map(|_| T::from_f64(next(&mut state) * scale)).collect()
}

/// How a factor lies in memory.
#[derive(Clone, Copy, Debug)]
enum Layout {
    RowMajor,
    /// Rows with a gap between them.
    Padded,
    Transposed,
    /// Neither direction is contiguous.
    Spread,
    /// One row or column repeated.
    Broadcast,
}

const LAYOUTS: [Layout; 5] = [Layout::RowMajor, Layout::Padded, Layout::Transposed, Layout::Spread, Layout::Broadcast];

impl Layout {
    fn strides(self, rows: usize, cols: usize) -> (usize, usize) {
        match self {
            Layout::RowMajor => (cols, 1),
            Layout::Padded => (cols + 3, 1),
            Layout::Transposed => (1, rows),
            Layout::Spread => (2 * cols + 1, 2),
            Layout::Broadcast => (0, 1),
        }
    }
}

struct Case {
    m: usize,
    n: usize,
    k: usize,
    a: Layout,
    b: Layout,
    batch: usize,
    /// Whether all items share B.
    shared_b: bool,
    alpha: f64,
    bias: bool,
    accumulate: bool,
    /// Columns of C beyond N.
    gap: usize,
}

impl Case {
    fn plain(m: usize, n: usize, k: usize, a: Layout, b: Layout) -> Self {
        Self { m, n, k, a, b, batch: 1, shared_b: false, alpha: 1.0, bias: false, accumulate: false, gap: 0 }
    }

    /// Computes the case and compares every element, those of the gaps too. Returns C.
    fn check<T: GemmElement>(&self, scale: f64, tolerance: f64) -> Vec<T> {
        let &Case { m, n, k, batch, .. } = self;
        let ((a_row, a_col), (b_row, b_col)) = (self.a.strides(m, k), self.b.strides(k, n));
        let reach = |rows: usize, cols: usize, rs: usize, cs: usize| {
            if rows * cols == 0 { 0 } else { (rows - 1) * rs + (cols - 1) * cs + 1 }
        };
        let (a_len, b_len) = (reach(m, k, a_row, a_col), reach(k, n, b_row, b_col));
        let a_offsets: Vec<usize> = (0..batch).map(|i| i * a_len).collect();
        let b_offsets: Vec<usize> = (0..batch).map(|i| if self.shared_b { 0 } else { i * b_len }).collect();
        let (a, b): (Vec<T>, Vec<T>) = (values(a_len * batch, 1, scale), values(b_len * batch, 2, scale));
        let bias: Vec<T> = values(n, 3, scale);
        let row_stride = n + self.gap;
        let before: Vec<T> = values(batch * m * row_stride, 4, scale);
        let mut c = before.clone();
        let gemm = Gemm {
            alpha: self.alpha,
            bias: self.bias.then_some(&bias[..]),
            accumulate: self.accumulate,
            ..Gemm::batched(
                MatView::new(&a, m, k, a_row, a_col).unwrap(),
                &a_offsets,
                MatView::new(&b, k, n, b_row, b_col).unwrap(),
                &b_offsets,
            )
        };
        gemm.run(&mut c, row_stride).unwrap();
        for item in 0..batch {
            for i in 0..m {
                for j in 0..row_stride {
                    let at = (item * m + i) * row_stride + j;
                    if j >= n {
                        assert_eq!(c[at], before[at], "wrote between rows");
                        continue;
                    }
                    let term = |p: usize| {
                        let x = a[a_offsets[item] + i * a_row + p * a_col].to_f64();
                        (x * b[b_offsets[item] + p * b_row + j * b_col].to_f64(), x)
                    };
                    let (sum, size) = (0..k).map(term).fold((0.0, 0.0), |(s, t): (f64, f64), (x, _)| (s + x, t + x.abs()));
                    let init = if self.bias { bias[j].to_f64() } else { 0.0 } + if self.accumulate { before[at].to_f64() } else { 0.0 };
                    let expected = init + self.alpha * sum;
                    let error = (c[at].to_f64() - expected).abs();
                    assert!(
                        error <= tolerance * (size + init.abs() + expected.abs()),
                        "{m}x{n}x{k} {:?} {:?} batch {batch}: C[{item}][{i}][{j}] = {}, not {expected}",
                        self.a,
                        self.b,
                        c[at].to_f64()
                    );
                }
            }
        }
        c
    }
}

/// Rounding of sums of products in f32: well below K · 2⁻²⁴ of the sum of magnitudes.
const F32: f64 = 1e-6;

#[test]
fn all_layouts_and_odd_shapes() {
    let shapes = [
        (1, 1, 1),
        (1, 7, 5),
        (5, 1, 100),
        (1, 100, 33),
        (100, 1, 65),
        (1, 1100, 70),
        (2, 33, 64),
        (3, 17, 257),
        (4, 4, 4),
        (13, 31, 8),
        (12, 32, 64),
        (16, 48, 80),
        (25, 65, 31),
        (49, 64, 300),
        (37, 130, 513),
        (130, 37, 129),
    ];
    for (m, n, k) in shapes {
        for a in LAYOUTS {
            for b in LAYOUTS {
                Case::plain(m, n, k, a, b).check::<f32>(1.0, F32);
            }
        }
    }
}

#[test]
fn small_shapes_exhaustively() {
    for m in 1..=14 {
        for n in [1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 50] {
            for k in [1, 2, 3, 17] {
                Case::plain(m, n, k, Layout::RowMajor, Layout::RowMajor).check::<f32>(1.0, F32);
                Case::plain(m, n, k, Layout::Transposed, Layout::Transposed).check::<f32>(1.0, F32);
            }
        }
    }
}

#[test]
fn large_shapes_take_the_shared_path() {
    for (m, n, k) in [(256, 256, 256), (193, 1000, 100), (700, 200, 300), (200, 201, 2100)] {
        for (a, b) in [(Layout::RowMajor, Layout::RowMajor), (Layout::Transposed, Layout::Padded), (Layout::Spread, Layout::Transposed)] {
            Case::plain(m, n, k, a, b).check::<f32>(1.0, F32);
        }
    }
    let case = Case { alpha: 0.5, bias: true, gap: 5, ..Case::plain(300, 257, 270, Layout::RowMajor, Layout::RowMajor) };
    case.check::<f32>(1.0, F32);
    Case { bias: false, accumulate: true, batch: 2, ..case }.check::<f32>(1.0, F32);
}

/// A is read where it lies, by tiles of f32 or of pairs: unless its rows begin between pairs, or end in half a one. B is packed once, or, of the last
/// shape, panel by panel; rows a page apart may have to be packed.
#[test]
fn narrow_products_read_a_in_place() {
    for (m, n, k) in [(60, 70, 400), (100, 33, 1601), (49, 128, 300), (130, 100, 802), (50, 70, 2048), (17, 1100, 2000)] {
        for (a, b) in [(Layout::RowMajor, Layout::Transposed), (Layout::Padded, Layout::RowMajor), (Layout::Transposed, Layout::Spread)] {
            let case = Case::plain(m, n, k, a, b);
            for case in [Case { gap: 3, ..case }, Case { bias: true, alpha: 0.5, ..case }, Case { accumulate: true, ..case }] {
                case.check::<f32>(1.0, F32);
                case.check::<bf16>(1.0, 8e-3);
            }
        }
    }
}

#[test]
fn batches_biases_and_accumulation() {
    for (m, n, k) in [(1, 40, 70), (70, 1, 70), (3, 5, 7), (20, 40, 300), (1, 40, 3), (64, 64, 64)] {
        for (shared_b, a) in [(false, Layout::RowMajor), (true, Layout::RowMajor), (true, Layout::Transposed)] {
            for b in [Layout::RowMajor, Layout::Transposed] {
                let case = Case { batch: 3, shared_b, alpha: -0.5, ..Case::plain(m, n, k, a, b) };
                case.check::<f32>(1.0, F32);
                Case { bias: true, gap: 2, ..case }.check::<f32>(1.0, F32);
                Case { accumulate: true, gap: 2, ..case }.check::<f32>(1.0, F32);
            }
        }
    }
    Case { batch: 300, ..Case::plain(4, 4, 4, Layout::RowMajor, Layout::RowMajor) }.check::<f32>(1.0, F32);
}

#[test]
fn every_element_type() {
    for (m, n, k) in [(1, 1, 1), (3, 4, 5), (1, 50, 70), (7, 33, 9), (70, 140, 300)] {
        for (a, b) in [(Layout::RowMajor, Layout::Transposed), (Layout::Spread, Layout::RowMajor), (Layout::Broadcast, Layout::Padded)] {
            let case = Case { batch: 2, gap: 1, ..Case::plain(m, n, k, a, b) };
            for case in [Case { bias: true, ..case }, Case { bias: false, accumulate: true, ..case }] {
                case.check::<f64>(1.0, 1e-14);
                case.check::<f16>(1.0, 1e-3);
                case.check::<bf16>(1.0, 8e-3);
                case.check::<i32>(100.0, 0.0);
                case.check::<i64>(1e6, 0.0);
                case.check::<u8>(1.99, 0.0);
            }
        }
    }
}

#[test]
fn half_precision_rounds_once() {
    // 2049 is between two f16: a running sum in f16 would stay at 2048.
    let (ones, n) = (vec![f16::ONE; 4096], 3);
    let mut c = vec![f16::ZERO; n];
    let b = vec![f16::ONE; 4096 * n];
    Gemm::new(MatView::row_major(&ones, 1, 4096).unwrap(), MatView::row_major(&b, 4096, n).unwrap()).run(&mut c, n).unwrap();
    assert!(c.iter().all(|x| x.widen() == 4096.0));
}

#[test]
fn integers_wrap_around() {
    let (a, b) = ([i32::MAX, 2], [2, i32::MAX]);
    let mut c = [0];
    Gemm::new(MatView::row_major(&a, 1, 2).unwrap(), MatView::row_major(&b, 2, 1).unwrap()).run(&mut c, 1).unwrap();
    assert_eq!(c[0], i32::MAX.wrapping_mul(2).wrapping_mul(2));
}

#[test]
fn empty_sums_are_the_initial_value() {
    for (bias, accumulate) in [(false, false), (true, false), (false, true)] {
        for (m, n, k) in [(3, 4, 0), (0, 4, 2), (3, 0, 2)] {
            Case { bias, accumulate, batch: 2, gap: 1, ..Case::plain(m, n, k, Layout::RowMajor, Layout::RowMajor) }.check::<f32>(1.0, 0.0);
        }
    }
}

#[test]
fn infinities_and_nan_reach_their_elements_only() {
    for (m, n, k) in [(5, 7, 70), (40, 50, 60), (1, 100, 80)] {
        let mut a: Vec<f32> = values(m * k, 1, 1.0);
        let b: Vec<f32> = values::<f32>(k * n, 2, 1.0).iter().map(|x| x.abs() + 0.1).collect();
        a[3] = f32::INFINITY;
        if m > 1 {
            a[k] = f32::NAN;
        }
        let mut c = vec![0f32; m * n];
        Gemm::new(MatView::row_major(&a, m, k).unwrap(), MatView::row_major(&b, k, n).unwrap()).run(&mut c, n).unwrap();
        for (i, x) in c.iter().enumerate() {
            match i / n {
                0 => assert_eq!(*x, f32::INFINITY),
                1 => assert!(x.is_nan()),
                _ => assert!(x.is_finite()),
            }
        }
    }
}

#[test]
fn the_same_bits_for_any_number_of_threads() {
    let pools: Vec<_> = [1, 2, 7].map(|n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap()).into();
    let shapes = [(300, 400, 500), (1, 3000, 700), (3000, 1, 700), (16, 700, 768), (100, 200, 300), (2000, 40, 70), (20, 1100, 1000)];
    for (m, n, k) in shapes {
        for b in [Layout::RowMajor, Layout::Transposed] {
            let case = Case { batch: 2, ..Case::plain(m, n, k, Layout::RowMajor, b) };
            let results: Vec<Vec<u32>> =
                pools.iter().map(|pool| pool.install(|| case.check::<f32>(1.0, F32)).iter().map(|x| x.to_bits()).collect()).collect();
            assert!(results[0] == results[1] && results[0] == results[2], "{m}x{n}x{k}");
        }
    }
    let case = Case::plain(150, 300, 200, Layout::RowMajor, Layout::RowMajor);
    let bits = |pool: &rayon::ThreadPool| pool.install(|| case.check::<f64>(1.0, 1e-14)).iter().map(|x| x.to_bits()).collect::<Vec<_>>();
    assert!(bits(&pools[0]) == bits(&pools[1]) && bits(&pools[0]) == bits(&pools[2]));
}

/// The same numbers in other orders of memory: read in place, by wide panels, or packed one by one.
fn check_memory_orders<T: GemmElement>(m: usize, n: usize, k: usize) {
    let (x, w): (Vec<T>, Vec<T>) = (values(m * k, 1, 1.0), values(k * n, 2, 1.0));
    let product = |layout: Layout| {
        let (row, col) = layout.strides(m, k);
        let mut a = vec![T::default(); 2 * m * (k + 3)];
        (0..m * k).for_each(|i| a[i / k * row + i % k * col] = x[i]);
        let mut c = vec![T::default(); m * n];
        Gemm::new(MatView::new(&a, m, k, row, col).unwrap(), MatView::row_major(&w, k, n).unwrap()).run(&mut c, n).unwrap();
        c
    };
    let expected = product(Layout::Spread);
    for layout in [Layout::RowMajor, Layout::Padded, Layout::Transposed] {
        assert!(product(layout) == expected, "{m}x{n}x{k} {layout:?}");
    }
}

#[test]
fn the_same_bits_however_a_lies_in_memory() {
    for (m, n, k) in [(60, 70, 400), (50, 70, 2048), (17, 1100, 2000), (200, 300, 1600), (300, 210, 900)] {
        check_memory_orders::<f32>(m, n, k);
        check_memory_orders::<bf16>(m, n, k);
        check_memory_orders::<f16>(m, n, k);
    }
}

/// One row with a factor that is cached, or streams past; its sums are those that it has beside others.
fn check_one_row<T: GemmElement>(n: usize, k: usize, tolerance: f64) {
    const ROWS: usize = 3;
    for case in [Case::plain(1, n, k, Layout::RowMajor, Layout::Transposed), Case::plain(n, 1, k, Layout::Padded, Layout::RowMajor)] {
        Case { bias: true, ..case }.check::<T>(1.0, tolerance);
        Case { accumulate: true, alpha: 0.5, gap: 2, batch: 2, ..case }.check::<T>(1.0, tolerance);
    }
    let (x, w): (Vec<T>, Vec<T>) = (values(ROWS * k, 1, 1.0), values(n * k, 2, 1.0));
    let w = MatView::row_major(&w, n, k).unwrap().t();
    let product = |x: &[T]| {
        let mut c = vec![T::default(); x.len() / k * n];
        Gemm::new(MatView::row_major(x, x.len() / k, k).unwrap(), w).run(&mut c, n).unwrap();
        c
    };
    let rows: Vec<T> = x.chunks(k).flat_map(product).collect();
    assert!(product(&x) == rows, "{n} lanes of {k}");
}

#[test]
fn one_row_has_the_bits_that_it_has_among_others() {
    for (n, k) in [(5, 70), (7, 4000), (333, 1001), (1003, 768), (70, 5000)] {
        check_one_row::<f32>(n, k, F32);
        // Rounded once.
        check_one_row::<bf16>(n, k, 2f64.powi(-9) + F32);
        check_one_row::<f16>(n, k, 2f64.powi(-11) + F32);
    }
}

/// Pairs of bf16 go through packing and blocking on every machine, emulated where it lacks the instruction.
#[test]
fn pairs_of_bf16_match_f64() {
    let shapes = [(1, 1, 1), (5, 40, 7), (33, 17, 64), (64, 96, 130), (70, 130, 901), (200, 300, 1537)];
    for ((m, n, k), is_plain) in shapes.into_iter().flat_map(|shape| [(shape, false), (shape, true)]) {
        for (a_strides, b_strides) in [((k, 1), (n, 1)), ((1, m), (1, k)), ((k + 3, 1), (1, k + 1)), ((2 * k, 2), (2 * n, 2))] {
            let (a, b): (Vec<bf16>, Vec<bf16>) = (values(2 * m * (k + 3), 1, 1.0), values(2 * k * (n + 3) + n * (k + 1), 2, 1.0));
            let bias: Vec<bf16> = values(n, 3, 1.0);
            let alpha = if is_plain { 1.0 } else { 0.5 };
            let gemm = Gemm {
                bias: (!is_plain).then_some(&bias[..]),
                alpha,
                ..Gemm::new(
                    MatView::new(&a, m, k, a_strides.0, a_strides.1).unwrap(),
                    MatView::new(&b, k, n, b_strides.0, b_strides.1).unwrap(),
                )
            };
            let mut c = vec![bf16::ZERO; m * n];
            rounded::rounded::<packing::Pairs>(&gemm, &mut c, n).unwrap();
            for (at, c) in c.iter().enumerate() {
                let (i, j) = (at / n, at % n);
                let term = |p: usize| a[i * a_strides.0 + p * a_strides.1].to_f64() * b[p * b_strides.0 + j * b_strides.1].to_f64();
                let bias = if is_plain { 0.0 } else { bias[j].to_f64() };
                let want = bias + alpha * (0..k).map(term).sum::<f64>();
                let size = bias.abs() + (0..k).map(|p| term(p).abs()).sum::<f64>();
                assert!(
                    (c.to_f64() - want).abs() <= 0.004 * want.abs() + 1e-5 * size,
                    "{m}x{n}x{k} {a_strides:?} {b_strides:?}: C[{i}][{j}] = {c}, not {want}"
                );
            }
        }
    }
}

/// The rest of this file: products on matrix tiles, in hardware or under the emulator.
#[cfg(target_arch = "x86_64")]
mod on_tiles {
    use super::*;
    use crate::cpu::gemm::blocked::{Sums, multiply};
    use crate::cpu::gemm::packing::{Packing, Plain};
    use crate::cpu::gemm::tiles::Split;
    use crate::cpu::parallel::SharedMut;

    fn product<P: Packing>(a: &[P::Element], b: &[P::Element], [m, n, k]: [usize; 3], strides: [(usize, usize); 2]) -> Vec<f32> {
        let view = |data, rows, cols, (row, col)| MatView::new(data, rows, cols, row, col).unwrap();
        let (a, b) = (view(a, m, k, strides[0]), view(b, k, n, strides[1]));
        let gemm = Gemm { a, b, a_offsets: &[0], b_offsets: &[0], alpha: 1.0, bias: None, accumulate: false, activation: None };
        let mut c = vec![f32::NAN; m * n];
        multiply::<P>(&gemm, &Sums { c: SharedMut::new(&mut c), item_stride: m * n, row_stride: n }).unwrap();
        c
    }

    fn row_major<P: Packing>(a: &[P::Element], b: &[P::Element], shape: [usize; 3]) -> Vec<f32> {
        product::<P>(a, b, shape, [(shape[2], 1), (shape[1], 1)])
    }

    /// The relative error of a whole product, against f64: ‖C − C₆₄‖ / ‖C₆₄‖; and its largest |C − C₆₄| / Σ |a||b|.
    fn errors<T: Element>(c: &[f32], a: &[T], b: &[T], [_, n, k]: [usize; 3]) -> (f64, f64) {
        let (mut error, mut size, mut worst) = (0.0, 0.0, 0f64);
        for (i, &c) in c.iter().enumerate() {
            let term = |p: usize| a[i / n * k + p].to_f64() * b[p * n + i % n].to_f64();
            let (want, sum) = (0..k).map(term).fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()));
            error += (c as f64 - want).powi(2);
            size += want.powi(2);
            if sum > 0.0 {
                worst = worst.max((c as f64 - want).abs() / sum);
            }
        }
        ((error / size.max(f64::MIN_POSITIVE)).sqrt(), worst)
    }

    #[test]
    fn parts_match_f64_in_any_layout() {
        fn check<T: Float<Compute = f32>, P: Packing<Element = T>>(bound: f64) {
            for [m, n, k] in [[1, 1, 1], [16, 16, 32], [33, 40, 70], [70, 130, 301], [200, 193, 450]] {
                let all =
                    [((k, 1), (n, 1)), ((1, m), (1, k)), ((k + 3, 1), (1, k + 1)), ((1, m + 1), (n + 5, 1)), ((2 * k, 2), (2 * n, 2))];
                // The emulator takes its time.
                let layouts = if m < 200 { &all[..] } else { &all[..1] };
                for &(a_strides, b_strides) in layouts {
                    let (a, b): (Vec<T>, Vec<T>) = (values(2 * m * (k + 3), 1, 1.0), values(2 * k * (n + 5) + n * (k + 1), 2, 1.0));
                    let c = product::<P>(&a, &b, [m, n, k], [a_strides, b_strides]);
                    for (at, &c) in c.iter().enumerate() {
                        let (i, j) = (at / n, at % n);
                        let term = |p: usize| a[i * a_strides.0 + p * a_strides.1].to_f64() * b[p * b_strides.0 + j * b_strides.1].to_f64();
                        let (want, size) = (0..k).map(term).fold((0.0, 0.0), |(s, t), x| (s + x, t + x.abs()));
                        let error = (c as f64 - want).abs();
                        assert!(error <= bound * size, "{m}x{n}x{k} {a_strides:?} {b_strides:?}: C[{i}][{j}] = {c}, not {want}");
                    }
                }
            }
        }
        check::<f32, Split<f32, 3>>(3e-7);
        check::<f32, Split<f32, 2>>(1.0 / 65536.0);
        check::<f32, Split<f32, 1>>(1.0 / 128.0);
        check::<f16, Split<f16, 2>>(1.0 / 65536.0);
        check::<bf16, Split<bf16, 1>>(3e-7);
    }

    /// Three parts against the plain kernel: on what people multiply, on all magnitudes, on sums that cancel, and on values whose
    /// rounding goes one way.
    #[test]
    fn three_parts_are_as_exact_as_plain_products() {
        // One block of K, so that a product that falls back is the plain one bit for bit.
        let shape @ [m, n, k] = [48, 64, 256];
        let normal = |seed| -> Vec<f32> {
            let uniform: Vec<f32> = values(12 * m.max(n) * k, seed, 0.5);
            uniform.chunks(12).map(|x| x.iter().sum()).collect()
        };
        let scaled = |seed, low: i32, high: i32| -> Vec<f32> {
            let exponents: Vec<f32> = values(m.max(n) * k, seed + 100, 1.0);
            let scale = |e: f32| 2f32.powf(low as f32 + (e + 1.0) / 2.0 * (high - low) as f32);
            normal(seed).iter().zip(exponents).map(|(x, e)| x * scale(e)).collect()
        };
        let cancelling = |seed, sign: f32| -> Vec<f32> {
            let mut x = normal(seed);
            (1..x.len()).step_by(2).for_each(|i| x[i] = sign * x[i - 1] * (1.0 + 1e-5 * x[i]));
            x
        };
        let ones_below = |seed| -> Vec<f32> { normal(seed).iter().map(|x| f32::from_bits(x.to_bits() | 0xFFFF)).collect() };
        let cases: [(&str, Vec<f32>, Vec<f32>); 7] = [
            ("normal", normal(1), normal(2)),
            ("wide", scaled(1, -40, 40), scaled(2, -40, 40)),
            ("whole range", scaled(1, -126, 0), scaled(2, -20, 120)),
            ("denormal", scaled(1, -148, -120), scaled(2, -2, 100)),
            ("cancelling", cancelling(1, -1.0), normal(2).iter().map(|x| 1.0 + 1e-3 * x).collect()),
            ("ones below", ones_below(1), ones_below(2)),
            ("positive", normal(1).iter().map(|x| x.abs()).collect(), normal(2).iter().map(|x| x.abs()).collect()),
        ];
        for (name, a, b) in cases {
            let (a, b) = (&a[..m * k], &b[..n * k]);
            let (plain, split) = (row_major::<Plain>(a, b, shape), row_major::<Split<f32, 3>>(a, b, shape));
            let falls_back = matches!(name, "whole range" | "denormal");
            assert_eq!(plain == split, falls_back, "{name}: which kernel ran");
            let (plain, split) = (errors(&plain, a, b, shape), errors(&split, a, b, shape));
            // Where one term outweighs the others, what the split leaves out shows: a quarter more.
            let most = if name == "wide" { 1.3 } else { 1.05 };
            assert!(split.0 <= plain.0 * most, "{name}: relative error {:e}, plain {:e}", split.0, plain.0);
            assert!(split.1 <= plain.1 + 6e-8, "{name}: worst element {:e}, plain {:e}", split.1, plain.1);
        }
    }

    #[test]
    fn special_values_go_where_they_go_in_plain_products() {
        let shape @ [m, n, k] = [40, 64, 300];
        let places = [(0, 5), (35, 290)];
        let specials = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, 1e-45, -0.0, f32::MIN_POSITIVE];
        for special in specials {
            for (row, col) in places {
                for in_a in [true, false] {
                    let (mut a, mut b): (Vec<f32>, Vec<f32>) = (values(m * k, 1, 1.0), values(k * n, 2, 1.0));
                    if in_a {
                        a[row * k + col] = special
                    } else {
                        b[col * n + row] = special
                    }
                    let (plain, split) = (row_major::<Plain>(&a, &b, shape), row_major::<Split<f32, 3>>(&a, &b, shape));
                    for (i, (x, y)) in plain.iter().zip(&split).enumerate() {
                        let near = (x - y).abs() <= 1e-4 * (1.0 + x.abs());
                        assert!(near || x == y || (x.is_nan() && y.is_nan()), "{special} in {row}, {col}: C[{i}] = {y}, plain {x}");
                    }
                }
            }
        }
        let zeros = vec![0f32; k * n];
        assert!(row_major::<Split<f32, 3>>(&values(m * k, 1, 1.0), &zeros, shape).iter().all(|&x| x == 0.0));
    }

    #[test]
    fn an_activation_follows_the_last_block_of_k() {
        use crate::cpu::gemm::epilogue::Activated;
        use crate::pointwise::unary;
        for shape @ [m, n, k] in [[33, 40, 70], [200, 193, 450]] {
            let (a, b): (Vec<f32>, Vec<f32>) = (values(m * k, 1, 1.0), values(k * n, 2, 1.0));
            let sums = row_major::<Split<f32, 3>>(&a, &b, shape);
            let activation = Activation::new(unary::Relu::ROW, [0.0; 2]);
            let (a, b) = (MatView::new(&a, m, k, k, 1).unwrap(), MatView::new(&b, k, n, n, 1).unwrap());
            let gemm = Gemm { activation: Some(activation), ..Gemm::new(a, b) };
            let mut c = vec![f32::NAN; m * n];
            let target = Activated { sums: Sums { c: SharedMut::new(&mut c), item_stride: m * n, row_stride: n }, gemm: &gemm };
            multiply::<Split<f32, 3>>(&gemm, &target).unwrap();
            assert!(c.iter().zip(&sums).all(|(c, sum)| *c == sum.max(0.0)), "{shape:?}");
        }
    }

    #[test]
    fn the_same_bits_on_any_number_of_threads() {
        for shape @ [m, n, k] in [[70, 90, 200], [200, 200, 420]] {
            let (a, b): (Vec<f32>, Vec<f32>) = (values(m * k, 1, 1.0), values(k * n, 2, 1.0));
            let bits = |threads| {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
                pool.install(|| row_major::<Split<f32, 3>>(&a, &b, shape)).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
            };
            let one = bits(1);
            assert!(one == bits(2) && one == bits(7));
        }
    }
}

/// Products with an activation against the same products and a pass over C, to the bit.
fn check_activation<T: GemmElement + Float>(m: usize, n: usize, k: usize, batch: usize, gap: usize) {
    use crate::cpu::pointwise::{Operand, Output, apply};
    use crate::pointwise::unary;
    let (a, b, bias): (Vec<T>, Vec<T>, Vec<T>) = (values(batch * m * k, 1, 1.0), values(k * n, 2, 1.0), values(n, 3, 1.0));
    let offsets: Vec<usize> = (0..batch).map(|i| i * m * k).collect();
    let row_stride = n + gap;
    let len = batch * m * row_stride;
    let (left, right) = (MatView::new(&a, m, k, k, 1).unwrap(), MatView::new(&b, k, n, 1, k).unwrap());
    let zeros = vec![0; batch];
    let plain = Gemm { bias: Some(&bias), ..Gemm::batched(left, &offsets, right, &zeros) };
    let bytes = |c: &[T]| c.iter().map(|x| x.to_f64().to_bits()).collect::<Vec<_>>();
    let mut sums = vec![T::default(); len];
    plain.run(&mut sums, row_stride).unwrap();
    for row in [unary::Relu::ROW, unary::LeakyRelu::ROW, unary::Gelu::ROW, unary::GeluTanh::ROW, unary::Silu::ROW] {
        let params = [0.2, 0.0];
        let mut expected = sums.clone();
        // The elements between rows are zeros, which all of these functions keep.
        apply(row, params, [Operand::Output], Output { data: &mut expected, shape: &[len], strides: &[1] });
        let gemm = Gemm { activation: Some(Activation::new(row, params)), ..plain };
        let mut c = vec![T::default(); len];
        gemm.run(&mut c, row_stride).unwrap();
        assert!(bytes(&c) == bytes(&expected), "{} of {m}x{n}x{k}", row.name);
        let (mut kept, mut results) = (vec![T::default(); len], vec![T::default(); len]);
        gemm.run_keeping(&mut kept, &mut results, row_stride).unwrap();
        assert!(bytes(&kept) == bytes(&sums) && bytes(&results) == bytes(&expected), "{} of {m}x{n}x{k}, sums kept", row.name);
    }
}

#[test]
fn activations_in_the_epilogue_are_those_of_a_pass_over_c() {
    for (m, n, k) in
        [(1, 300, 70), (300, 1, 70), (5, 40, 129), (40, 5, 129), (1, 7, 3), (33, 65, 31), (50, 70, 800), (260, 270, 900), (3, 4, 0)]
    {
        for (batch, gap) in [(1, 0), (2, 3)] {
            check_activation::<f32>(m, n, k, batch, gap);
            check_activation::<f64>(m, n, k, batch, gap);
            check_activation::<bf16>(m, n, k, batch, gap);
            check_activation::<f16>(m, n, k, batch, gap);
        }
    }
}
