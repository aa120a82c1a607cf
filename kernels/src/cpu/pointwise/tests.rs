//! Every row over odd layouts, against plain loops.

use super::*;
use crate::pointwise::{backward, binary, relation, unary};

fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for d in (1..shape.len()).rev() {
        strides[d - 1] = strides[d] * shape[d];
    }
    strides
}

fn at(strides: &[usize], index: &[usize]) -> usize {
    strides.iter().zip(index).map(|(s, i)| s * i).sum()
}

fn indices(shape: &[usize]) -> Vec<Vec<usize>> {
    let of = contiguous(shape);
    (0..shape.iter().product()).map(|i| (0..shape.len()).map(|d| i / of[d].max(1) % shape[d]).collect()).collect()
}

/// a − b over layouts of a, b and the output.
fn check<T: Stored>(shape: &[usize], a: &[usize], b: &[usize], out: &[usize]) {
    let extent = |s: &[usize]| shape.iter().zip(s).map(|(d, s)| d.saturating_sub(1) * s).sum::<usize>() + 3;
    let x: Vec<T> = (0..extent(a)).map(|i| T::from_f64((i % 37) as f64)).collect();
    let y: Vec<T> = (0..extent(b)).map(|i| T::from_f64((i % 29) as f64 * 0.5)).collect();
    let (x, y) = (StridedView::new(&x, 2, shape, a).unwrap(), StridedView::new(&y, 1, shape, b).unwrap());
    let mut result = vec![T::default(); shape.iter().product()];
    let output = Output { data: &mut result, shape, strides: out };
    apply(binary::Sub::ROW, [0.0; 2], [Operand::View(x), Operand::View(y)], output);
    for i in indices(shape) {
        let want = x.data()[2 + at(a, &i)].to_f64() - y.data()[1 + at(b, &i)].to_f64();
        assert_eq!(result[at(out, &i)], T::from_f64(want), "{shape:?} {a:?} {b:?} {out:?} at {i:?}");
    }
}

#[test]
fn operands_of_any_layout_meet() {
    let shapes: [&[usize]; 11] =
        [&[2, 3, 4, 5], &[7, 33, 9], &[1], &[], &[5000], &[3, 0, 2], &[67, 130], &[5, 1500], &[3, 4200], &[3, 5, 300], &[2, 3, 2, 257]];
    for shape in shapes {
        let rows = contiguous(shape);
        let mut columns = rows.clone();
        if shape.len() > 1 {
            let reversed: Vec<usize> = shape.iter().rev().copied().collect();
            columns = contiguous(&reversed).into_iter().rev().collect();
        }
        let zero = vec![0; shape.len()];
        let mut last = zero.clone();
        let (mut first, mut middle) = (zero.clone(), zero.clone());
        if let Some(f) = first.first_mut() {
            *f = 1;
        }
        if let Some(l) = last.last_mut() {
            *l = 1;
        }
        if shape.len() > 2 {
            middle[1] = 1;
        }
        let gaps: Vec<usize> = rows.iter().map(|s| s * 3).collect();
        // Rows that lie apart, and a number for each of them.
        let apart: Vec<usize> = rows.iter().map(|&s| if s == 1 { 1 } else { 2 * s }).collect();
        let of_rows: Vec<usize> = rows.iter().map(|s| s / shape.last().copied().unwrap_or(1).max(1)).collect();
        for out in [&rows, &columns] {
            for a in [&rows, &columns, &gaps, &apart] {
                for b in [&rows, &columns, &zero, &first, &last, &middle, &gaps, &apart, &of_rows] {
                    check::<f32>(shape, a, b, out);
                    check::<f64>(shape, a, b, out);
                    check::<bf16>(shape, b, a, out);
                    check::<i32>(shape, a, b, out);
                }
            }
        }
    }
}

/// condition ? a : b over layouts of the condition; a and b lie like the output.
fn check_select<T: Stored>(shape: &[usize], condition: &[usize], out: &[usize]) {
    let extent = shape.iter().zip(condition).map(|(d, s)| d.saturating_sub(1) * s).sum::<usize>() + 1;
    let conditions: Vec<Bool> = (0..extent).map(|i| Bool((i % 3 == 0) as u8)).collect();
    let numel = shape.iter().product::<usize>();
    let [a, b] = [0, 100].map(|start| (0..numel).map(|i| T::from_f64((start + i % 37) as f64)).collect::<Vec<T>>());
    let view = |x| Operand::View(StridedView::new(x, 0, shape, out).unwrap());
    let mut result = vec![T::default(); numel];
    let choice = StridedView::new(&conditions, 0, shape, condition).unwrap();
    select(choice, view(&a), view(&b), Output { data: &mut result, shape, strides: out });
    for i in indices(shape) {
        let at_out = at(out, &i);
        let want = if conditions[at(condition, &i)].get() { a[at_out] } else { b[at_out] };
        assert_eq!(result[at_out], want, "{shape:?} {condition:?} {out:?} at {i:?}");
    }
}

#[test]
fn conditions_of_any_layout_select() {
    for shape in [[67, 130], [1, 5000], [5000, 1], [300, 700], [2, 3]] {
        let rows = [shape[1], 1];
        let columns = [1, shape[0]];
        for condition in [rows, columns, [0, 0], [0, 1], [1, 0], [2 * shape[1], 2]] {
            for out in [rows, columns] {
                check_select::<f32>(&shape, &condition, &out);
                check_select::<bf16>(&shape, &condition, &out);
                check_select::<i64>(&shape, &condition, &out);
            }
        }
    }
}

/// A row's kernel for bf16 against the one for f32 and one rounding; lengths end within vectors, beyond tiles, and nowhere; the longest has every
/// value, NaNs of all payloads too.
fn check_half_row<const N: usize>(row: &Row<N>) {
    let extremes = [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 0.0, -0.0, 1e-40, 3e38, -1.0];
    let params = [0.75, 1.25];
    for n in [0, 1, 7, 16, 31, 32, 47, 64, 1100, 40_000, 1 << 16] {
        let value = |i: usize, k: usize| match i % 61 {
            r if r < extremes.len() => extremes[(r + 3 * k) % extremes.len()],
            _ => (i * (7 + 6 * k) % 1000) as f32 / 200.0 - 2.0,
        };
        let inputs: [Vec<bf16>; N] = std::array::from_fn(|k| {
            let every = |i: usize| bf16::from_bits((i * [1, 40503, 30011][k]) as u16);
            (0..n).map(|i| if n == 1 << 16 { every(i) } else { bf16::from_f32(value(i, k)) }).collect()
        });
        let wide = inputs.each_ref().map(|x| x.iter().map(|x| x.to_f32()).collect::<Vec<f32>>());
        let (mut want, mut got) = (vec![0f32; n], vec![bf16::ZERO; n]);
        apply(row, params, wide.each_ref().map(|x| Operand::Dense(x)), Output { data: &mut want, shape: &[n], strides: &[1] });
        apply(row, params, inputs.each_ref().map(|x| Operand::Dense(x)), Output { data: &mut got, shape: &[n], strides: &[1] });
        for (want, got) in want.iter().map(|&x| bf16::from_f32(x)).zip(got) {
            assert!(want.to_bits() == got.to_bits() || want.is_nan() && got.is_nan(), "{} of {n}: {want:?} {got:?}", row.name);
        }
    }
}

/// Calls a check with every row of the table.
macro_rules! each_row {
    ($check:ident) => {
        unary::UNARY.iter().for_each(|row| $check(row));
        binary::BINARY.iter().for_each(|row| $check(row));
        binary::TERNARY.iter().for_each(|row| $check(row));
        backward::BACKWARD.iter().for_each(|row| $check(row));
    };
}

#[test]
fn rows_of_bf16_are_those_of_f32_rounded_once() {
    each_row!(check_half_row);
}

#[test]
fn numbers_that_are_none_stay_none_in_bf16() {
    // All bits of its payload are set: rounding would carry them into the sign.
    let nan = f64::from_bits(i64::MAX as u64);
    for n in [1, 16, 70] {
        let (x, mut y) = (vec![bf16::NEG_ONE; n], vec![bf16::ZERO; n]);
        apply(unary::LeakyRelu::ROW, [nan, 0.0], [Operand::Dense(&x)], Output { data: &mut y, shape: &[n], strides: &[1] });
        assert!(y.iter().all(|y| y.is_nan()), "{n}: {y:?}");
    }
}

#[test]
fn numbers_beside_bf16_are_not_rounded() {
    let n = 5000;
    let x: Vec<bf16> = (0..n).map(|i| bf16::from_f32(i as f32)).collect();
    let mut sums = x.clone();
    let out = Output { data: &mut sums, shape: &[n], strides: &[1] };
    apply(binary::Add::ROW, [0.0; 2], [Operand::Output, Operand::Scalar(0.3)], out);
    assert!(x.iter().zip(sums).all(|(x, y)| y == bf16::from_f32(x.to_f32() + 0.3)));
}

/// A row, one of whose operands is the same everywhere, against the row of that operand written out. It may be another for each line.
fn check_numbers<T: Stored, const N: usize>(row: &Row<N>) {
    if row.tile::<T::Compute>().is_none() {
        return;
    }
    for (shape, strides) in [([2, 1001], [0, 0]), ([3, 63], [0, 0]), ([1, 70_001], [0, 0]), ([5, 1100], [1, 0]), ([3, 9000], [1, 0])] {
        let numel = shape[0] * shape[1];
        let inputs: [Vec<T>; N] = std::array::from_fn(|k| (0..numel).map(|i| T::from_f64((i * (7 + k) % 13) as f64 * 0.5 - 3.0)).collect());
        for number in 0..N {
            let run = |is_written_out: bool| {
                let few = &inputs[number];
                let written: Vec<T> = (0..numel).map(|i| few[at(&strides, &[i / shape[1], i % shape[1]])]).collect();
                let operands = std::array::from_fn(|k| match (k == number, is_written_out) {
                    (false, _) => Operand::Dense(&inputs[k]),
                    (true, true) => Operand::Dense(&written),
                    (true, false) => Operand::View(StridedView::new(few, 0, &shape, &strides).unwrap()),
                });
                let mut out = vec![T::default(); numel];
                apply(row, [0.75, 1.25], operands, Output { data: &mut out, shape: &shape, strides: &[shape[1], 1] });
                out.iter().map(|x| x.to_f64()).map(|x| if x.is_nan() { f64::NAN } else { x }.to_bits()).collect::<Vec<_>>()
            };
            assert!(run(true) == run(false), "{} of {shape:?}, operand {number}", row.name);
        }
    }
}

#[test]
fn a_number_that_repeats_is_as_good_as_one_written_out() {
    fn check<const N: usize>(row: &Row<N>) {
        check_numbers::<f32, N>(row);
        check_numbers::<bf16, N>(row);
        check_numbers::<half::f16, N>(row);
        check_numbers::<f64, N>(row);
        check_numbers::<i32, N>(row);
    }
    each_row!(check);
}

#[test]
fn relations_and_casts_of_numbers_that_repeat() {
    fn check<T: Stored>()
    where
        T::Compute: Convert<f32>,
    {
        let (shape, strides) = ([4, 1300], [1300, 1]);
        let few: Vec<T> = (0..4).map(|i| T::from_f64(i as f64)).collect();
        let dense: Vec<T> = (0..5200).map(|i| T::from_f64((i % 5) as f64)).collect();
        for few_strides in [[1, 0], [0, 0]] {
            let view = StridedView::new(&few, 0, &shape, &few_strides).unwrap();
            let (mut less, mut wide) = (vec![Bool(7); 5200], vec![-1f32; 5200]);
            let out = Output { data: &mut less, shape: &shape, strides: &strides };
            relate(relation::Lt::ROW, [Operand::View(view), Operand::Dense(&dense)], out);
            cast(view, Output { data: &mut wide, shape: &shape, strides: &strides });
            for i in 0..5200 {
                let number = i / 1300 * few_strides[0];
                assert_eq!((less[i].get(), wide[i]), (number < i % 5, number as f32), "at {i}");
            }
        }
    }
    check::<f32>();
    check::<bf16>();
    check::<half::f16>();
    check::<f64>();
    check::<i64>();
    check::<u8>();
}

#[test]
fn tasks_begin_and_end_within_rows() {
    /// A column, a row or a number, and lines that lie apart.
    fn check<T: Stored>(rows: usize, cols: usize, is_number: bool) {
        let (shape, strides, apart) = ([rows, cols], [cols, 1], cols + 7);
        let column: Vec<T> = (0..rows).map(|i| T::from_f64((i % 60) as f64)).collect();
        let row: Vec<T> = (0..cols).map(|j| T::from_f64((j % 9) as f64)).collect();
        let lines: Vec<T> = (0..rows * apart).map(|i| T::from_f64((i % 5) as f64 * 0.25)).collect();
        let view = |data, strides| Operand::View(StridedView::new(data, 0, &shape, strides).unwrap());
        let end = if is_number { Operand::Scalar(8.0) } else { view(&row, &[0, 1]) };
        let mut result = vec![T::default(); rows * cols];
        let out = Output { data: &mut result, shape: &shape, strides: &strides };
        apply(binary::Lerp::ROW, [0.0; 2], [view(&column, &[1, 0]), end, view(&lines, &[apart, 1])], out);
        for (i, x) in result.iter().enumerate() {
            let (i, j) = (i / cols, i % cols);
            let (start, end) = ((i % 60) as f64, if is_number { 8.0 } else { (j % 9) as f64 });
            // All of it is exact; half types round the result, once.
            let want = start + ((i * apart + j) % 5) as f64 * 0.25 * (end - start);
            assert_eq!(*x, T::from_f64(want), "{rows}x{cols} at {i}, {j}");
        }
    }
    for (rows, cols) in [(300, 1001), (60, 5003)] {
        for is_number in [false, true] {
            check::<f32>(rows, cols, is_number);
            check::<f64>(rows, cols, is_number);
            check::<bf16>(rows, cols, is_number);
            check::<half::f16>(rows, cols, is_number);
        }
    }
}

#[test]
fn scalars_and_in_place() {
    for n in [0, 1, 5, 1024, 3001, 300_000] {
        let mut data: Vec<f32> = (0..n).map(|i| i as f32).collect();
        let (shape, strides) = ([n], [1]);
        let out = Output { data: &mut data, shape: &shape, strides: &strides };
        apply(binary::Sub::ROW, [0.0; 2], [Operand::Scalar(1.5), Operand::Output], out);
        let out = Output { data: &mut data, shape: &shape, strides: &strides };
        apply(unary::Neg::ROW, [0.0; 2], [Operand::Output], out);
        assert!(data.iter().enumerate().all(|(i, &x)| x == i as f32 - 1.5));
    }
}

#[test]
fn relations_casts_and_selections() {
    let n = 2500;
    let x: Vec<bf16> = (0..n).map(|i| bf16::from_f64((i % 200) as f64 - 100.0)).collect();
    let (shape, strides) = ([n], [1]);
    let view = StridedView::new(&x, 0, &shape, &strides).unwrap();
    let mut negative = vec![Bool(7); n];
    let out = Output { data: &mut negative, shape: &shape, strides: &strides };
    relate(relation::Lt::ROW, [Operand::View(view), Operand::Scalar(0.0)], out);
    let mut integers = vec![0i64; n];
    cast(view, Output { data: &mut integers, shape: &shape, strides: &strides });
    let mut clipped = vec![bf16::ONE; n];
    let condition = StridedView::new(&negative, 0, &shape, &strides).unwrap();
    let out = Output { data: &mut clipped, shape: &shape, strides: &strides };
    select(condition, Operand::Scalar(0.0), Operand::View(view), out);
    for i in 0..n {
        let x = (i % 200) as i64 - 100;
        assert_eq!((negative[i].0, integers[i], clipped[i].to_f64()), ((x < 0) as u8, x, x.max(0) as f64));
    }
    let mut truth = vec![Bool(9); n];
    cast(StridedView::new(&integers, 0, &shape, &strides).unwrap(), Output { data: &mut truth, shape: &shape, strides: &strides });
    assert!(truth.iter().zip(&integers).all(|(t, &i)| t.0 == (i != 0) as u8));
}

#[test]
fn integers_do_not_panic() {
    let (a, b) = ([i32::MIN, 7, -7, 7, i32::MIN, 2], [-1, -2, 2, 0, 0, -3]);
    let (shape, strides) = ([6], [1]);
    let run = |row| {
        let mut data = a;
        let b = StridedView::new(&b, 0, &shape, &strides).unwrap();
        let out = Output { data: &mut data, shape: &shape, strides: &strides };
        apply(row, [0.0; 2], [Operand::Output, Operand::View(b)], out);
        data
    };
    assert_eq!(run(binary::Div::ROW), [i32::MIN, -3, -3, 0, 0, 0]);
    assert_eq!(run(binary::Rem::ROW), [0, -1, 1, 0, 0, -1]);
    assert_eq!(run(binary::Pow::ROW), [0, 0, 49, 1, 1, 0]);
    for row in binary::BINARY.iter().filter(|row| row.tile::<i32>().is_some()) {
        run(row);
    }
}

/// Every f32 row against its own f64 expression at moderate inputs.
#[test]
fn both_expressions_of_a_row_agree() {
    fn check<const N: usize>(row: &Row<N>) {
        let n = 1000;
        let params = [0.75, 1.25];
        let inputs: [Vec<f64>; N] =
            std::array::from_fn(|k| (0..n).map(|i| ((i * (7 + 6 * k) % n) as f32 / n as f32 * 5.0 - 2.0 + 1e-3) as f64).collect());
        let (shape, strides) = ([n], [1]);
        let mut precise = vec![0f64; n];
        let views = inputs.each_ref().map(|x| Operand::View(StridedView::new(x, 0, &shape, &strides).unwrap()));
        apply(row, params, views, Output { data: &mut precise, shape: &shape, strides: &strides });
        let single = inputs.each_ref().map(|x| x.iter().map(|&x| x as f32).collect::<Vec<_>>());
        let views = single.each_ref().map(|x| Operand::View(StridedView::new(x, 0, &shape, &strides).unwrap()));
        let mut result = vec![0f32; n];
        apply(row, params, views, Output { data: &mut result, shape: &shape, strides: &strides });
        for i in 0..n {
            let (a, b) = (result[i] as f64, precise[i]);
            assert!((a - b).abs() <= 3e-6 * b.abs().max(1.0) || a.is_nan() && b.is_nan(), "{}: {a} {b}", row.name);
        }
    }
    unary::UNARY.iter().for_each(|row| check(row));
    binary::BINARY.iter().filter(|row| row.name != "remainder").for_each(|row| check(row));
    binary::TERNARY.iter().for_each(|row| check(row));
    backward::BACKWARD.iter().for_each(|row| check(row));
}
