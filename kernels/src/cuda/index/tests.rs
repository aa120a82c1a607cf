//! Against the processor's functions, on shapes that take each of the kernels.

use super::*;
use crate::cpu::index::{self as cpu, Accumulate};
use crate::cuda::testing::{Values, device};
use crate::element::{Bool, Element};
use crate::view::StridedView;
use half::{bf16, f16};

fn numbers(n: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * 37) % 101) as f64 / 4.0).collect()
}

fn positions(n: usize, size: usize) -> Vec<i64> {
    (0..n).map(|i| ((i * 7919 + i / 3) % size) as i64).collect()
}

fn upload(gpu: &'static Gpu, index: &[i64]) -> Values {
    Values::new(gpu, Type::I64, &index.iter().map(|&i| i as f64).collect::<Vec<_>>())
}

fn of<T: Element>(x: &[f64]) -> Vec<T> {
    x.iter().map(|&x| T::from_f64(x)).collect()
}

fn wide<T: Element>(x: &[T]) -> Vec<f64> {
    x.iter().map(|x| x.to_f64()).collect()
}

#[test]
fn bounds_are_the_extremes() {
    let Some(gpu) = device() else { return };
    assert_eq!(bounds(gpu, upload(gpu, &[]).slice()).unwrap(), None);
    for n in [1, 33, 5000] {
        let mut index = positions(n, 977);
        index[n / 2] = -5;
        let expected = (-5, *index.iter().max().unwrap());
        assert_eq!(bounds(gpu, upload(gpu, &index).slice()).unwrap(), Some(expected));
    }
}

fn select<T: Element>(gpu: &'static Gpu, ty: Type) {
    for [outer, n, inner, k] in [[1, 5, 3, 7], [2, 4, 1, 9], [1, 50, 64, 40], [3, 70, 300, 9], [1, 2, 5000, 5], [2, 3, 4, 0], [0, 3, 4, 2]]
    {
        let (src, index) = (numbers(outer * n * inner), positions(k, n));
        let mut out = Values::unwritten(gpu, ty, outer * k * inner);
        let (on_gpu, positions) = (Values::new(gpu, ty, &src), upload(gpu, &index));
        index_select(gpu, on_gpu.slice(), [outer, n, inner], positions.slice(), &mut out.slice_mut()).unwrap();
        let mut expected = vec![T::default(); outer * k * inner];
        cpu::index_select(&of::<T>(&src), [outer, n, inner], &index, &mut expected).unwrap();
        assert_eq!(out.read(), wide(&expected), "{ty:?} {outer} {n} {inner} {k}");
    }
}

#[test]
fn rows_are_selected() {
    let Some(gpu) = device() else { return };
    select::<f32>(gpu, Type::F32);
    select::<f64>(gpu, Type::F64);
    select::<f16>(gpu, Type::F16);
    select::<u8>(gpu, Type::U8);
}

fn add<T: Accumulate>(gpu: &'static Gpu, ty: Type) {
    let shapes = [
        [1, 5, 3, 70],
        [2, 4, 1, 9],
        [1, 50, 64, 400],
        [2, 70, 37, 90],
        [1, 3, 520, 100],
        [1, 70_000, 2, 5000],
        [2, 3, 4, 0],
        [0, 3, 4, 2],
    ];
    for [outer, n, inner, k] in shapes {
        // Fractions of many sizes, so that another order would show.
        let src: Vec<f64> = numbers(outer * k * inner).iter().enumerate().map(|(i, x)| x / (1 + i % 13) as f64).collect();
        let (start, index) = (numbers(outer * n * inner), positions(k, n));
        let mut out = Values::new(gpu, ty, &start);
        let (on_gpu, positions) = (Values::new(gpu, ty, &src), upload(gpu, &index));
        index_add(gpu, &mut out.slice_mut(), [outer, n, inner], positions.slice(), on_gpu.slice()).unwrap();
        let mut expected = of::<T>(&start);
        cpu::index_add(&mut expected, [outer, n, inner], &index, &of::<T>(&src)).unwrap();
        assert!(out.read() == wide(&expected), "{ty:?} {outer} {n} {inner} {k}");
    }
}

#[test]
fn rows_are_added_in_the_order_of_the_index() {
    let Some(gpu) = device() else { return };
    add::<f32>(gpu, Type::F32);
    add::<f64>(gpu, Type::F64);
    add::<f16>(gpu, Type::F16);
    add::<bf16>(gpu, Type::BF16);
    add::<i64>(gpu, Type::I64);
    add::<u8>(gpu, Type::U8);
}

/// Shapes of target and index, and the dimension.
const SCATTERED: [(&[usize], &[usize], usize); 6] = [
    (&[3, 5, 4], &[3, 2, 4], 1),
    (&[3, 5, 4], &[2, 9, 3], 1),
    (&[6, 7, 8], &[6, 7, 85], 2),
    (&[6, 2, 3], &[8, 2, 2], 0),
    (&[1000], &[3000], 0),
    (&[40, 100], &[1, 100], 0),
];

fn gathered_and_scattered<T: Accumulate>(gpu: &'static Gpu, ty: Type) {
    for (out_shape, shape, dim) in SCATTERED {
        let (n, rank) = (out_shape.iter().product::<usize>(), shape.len());
        let (start, index) = (numbers(n), positions(shape.iter().product(), out_shape[dim]));
        let values: Vec<f64> = numbers(index.len() + 5)[5..].iter().map(|x| x / 3.0).collect();
        let (on_gpu, positions, sources) = (Values::new(gpu, ty, &start), upload(gpu, &index), Values::new(gpu, ty, &values));
        // From a transposed view: the strides of the reversed shape.
        let mut strides = row_major(&out_shape.iter().rev().copied().collect::<Vec<_>>())[..rank].to_vec();
        strides.reverse();
        let mut out = Values::unwritten(gpu, ty, index.len());
        let view = View::new(on_gpu.buffer(), ty, 0, out_shape, &strides).unwrap();
        gather(gpu, view, dim, positions.slice(), shape, &mut out.slice_mut()).unwrap();
        let (host, host_values) = (of::<T>(&start), of::<T>(&values));
        let mut expected = vec![T::default(); index.len()];
        cpu::gather(StridedView::new(&host, 0, out_shape, &strides).unwrap(), dim, &index, shape, &mut expected).unwrap();
        assert!(out.read() == wide(&expected), "gather {ty:?} {shape:?}");

        let mut set = Values::new(gpu, ty, &start);
        scatter(gpu, &mut set.slice_mut(), out_shape, dim, positions.slice(), shape, sources.slice()).unwrap();
        let mut expected = host.clone();
        cpu::scatter(&mut expected, out_shape, dim, &index, shape, &host_values).unwrap();
        assert!(set.read() == wide(&expected), "scatter {ty:?} {shape:?}");

        if !matches!(ty, Type::F16 | Type::BF16) {
            let mut sum = Values::new(gpu, ty, &start);
            scatter_add(gpu, &mut sum.slice_mut(), out_shape, dim, positions.slice(), shape, sources.slice()).unwrap();
            let mut expected = host;
            cpu::scatter_add(&mut expected, out_shape, dim, &index, shape, &host_values).unwrap();
            assert!(sum.read() == wide(&expected), "scatter_add {ty:?} {shape:?}");
        }
    }
}

#[test]
fn elements_are_gathered_and_scattered() {
    let Some(gpu) = device() else { return };
    gathered_and_scattered::<f32>(gpu, Type::F32);
    gathered_and_scattered::<f64>(gpu, Type::F64);
    gathered_and_scattered::<f16>(gpu, Type::F16);
    gathered_and_scattered::<i32>(gpu, Type::I32);
    gathered_and_scattered::<u8>(gpu, Type::U8);
}

#[test]
fn a_position_out_of_range_reads_zero_and_writes_nothing() {
    let Some(gpu) = device() else { return };
    for bad in [-1, 3, i64::MAX / 1024] {
        let index = upload(gpu, &[1, bad]);
        let src = Values::new(gpu, Type::F32, &[1.0, 2.0, 3.0]);
        let mut out = Values::unwritten(gpu, Type::F32, 2);
        index_select(gpu, src.slice(), [1, 3, 1], index.slice(), &mut out.slice_mut()).unwrap();
        assert_eq!(out.read(), [2.0, 0.0]);
        gather(gpu, View::new(src.buffer(), Type::F32, 0, &[3], &[1]).unwrap(), 0, index.slice(), &[2], &mut out.slice_mut()).unwrap();
        assert_eq!(out.read(), [2.0, 0.0]);
        let two = Values::new(gpu, Type::F32, &[10.0, 20.0]);
        let mut target = Values::new(gpu, Type::F32, &[1.0, 2.0, 3.0]);
        index_add(gpu, &mut target.slice_mut(), [1, 3, 1], index.slice(), two.slice()).unwrap();
        scatter_add(gpu, &mut target.slice_mut(), &[3], 0, index.slice(), &[2], two.slice()).unwrap();
        assert_eq!(target.read(), [1.0, 22.0, 3.0]);
        scatter(gpu, &mut target.slice_mut(), &[3], 0, index.slice(), &[2], two.slice()).unwrap();
        assert_eq!(target.read(), [1.0, 10.0, 3.0]);
    }
}

fn found<T: Element>(gpu: &'static Gpu, ty: Type) {
    for (shape, every) in [(&[0usize, 3][..], 1), (&[7], 2), (&[5, 4, 3], 3), (&[9000], 1), (&[3, 5000], 7), (&[200], usize::MAX), (&[], 1)]
    {
        let n = shape.iter().product();
        let x: Vec<f64> = (0..n).map(|i| if i % every == every - 1 { if i % 2 == 0 { f64::NAN } else { 3.0 } } else { -0.0 }).collect();
        let x: Vec<f64> = if ty == Type::Bool { x.iter().map(|&x| (x != 0.0) as u8 as f64).collect() } else { x };
        let (out, count) = nonzero(gpu, Values::new(gpu, ty, &x).slice(), shape).unwrap();
        let expected = cpu::nonzero(&of::<T>(&x));
        assert_eq!(count, expected.len(), "{ty:?} {shape:?}");
        let mut bytes = vec![0; count * shape.len() * 8];
        gpu.download(&out, 0, &mut bytes).unwrap();
        let places: Vec<i64> = bytes.as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b)).collect();
        let strides = row_major(shape);
        let coordinates = expected.iter().flat_map(|&at| (0..shape.len()).map(move |d| at / strides[d] as i64 % shape[d] as i64));
        assert!(places.into_iter().eq(coordinates), "{ty:?} {shape:?}");
    }
}

#[test]
fn nonzero_elements_are_found() {
    let Some(gpu) = device() else { return };
    found::<f32>(gpu, Type::F32);
    found::<f64>(gpu, Type::F64);
    found::<f16>(gpu, Type::F16);
    found::<i64>(gpu, Type::I64);
    found::<Bool>(gpu, Type::Bool);
}

#[test]
fn triangles_keep_their_side() {
    let Some(gpu) = device() else { return };
    for ty in [Type::F32, Type::F64, Type::BF16, Type::U8] {
        for [batch, rows, cols] in [[2, 3, 4], [1, 70, 33], [1, 3, 3000], [0, 2, 2]] {
            let x = vec![1.0; batch * rows * cols];
            let on_gpu = Values::new(gpu, ty, &x);
            for kept in [-5, -1, 0, 1, 7, isize::MIN, isize::MAX].into_iter().flat_map(|k| [Triangle::Lower(k), Triangle::Upper(k)]) {
                let mut out = Values::unwritten(gpu, ty, x.len());
                triangle(gpu, on_gpu.slice(), rows, cols, kept, &mut out.slice_mut()).unwrap();
                let mut expected = vec![9.0; x.len()];
                cpu::triangle(&x, rows, cols, kept, &mut expected);
                assert!(out.read() == expected, "{ty:?} {kept:?}");
            }
        }
    }
}

#[test]
fn one_hot_rows() {
    let Some(gpu) = device() else { return };
    for (n, classes) in [(0, 5), (9, 1), (7, 10), (3, 3000)] {
        let index = positions(n, classes);
        let mut out = Values::unwritten(gpu, Type::I64, n * classes);
        one_hot(gpu, upload(gpu, &index).slice(), classes, &mut out.slice_mut()).unwrap();
        assert!(out.read().iter().enumerate().all(|(i, &x)| x == (index[i / classes] as usize == i % classes) as u8 as f64));
    }
}
