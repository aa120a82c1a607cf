//! The kernels on raw slices: products in floating-point operations a second, the rest in bytes moved a second.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kiln_kernels::cpu::gemm::Gemm;
use kiln_kernels::cpu::random::{RandomFloat, Stream};
use kiln_kernels::cpu::softmax::{Axis, softmax};
use kiln_kernels::cpu::{copy, reduce};
use kiln_kernels::view::{MatView, StridedView};
use std::hint::black_box;

fn values(n: usize) -> Vec<f32> {
    (0..n).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect()
}

/// The row-major square matrix of `n` rows over `x`.
fn square(x: &[f32], n: usize) -> MatView<'_, f32> {
    MatView::row_major(x, n, n).expect("n² values")
}

fn products(c: &mut Criterion) {
    let mut group = c.benchmark_group("kernels/gemm_f32");
    for n in [32, 128, 512, 1024] {
        let (a, b, mut out) = (values(n * n), values(n * n), vec![0f32; n * n]);
        group.throughput(Throughput::Elements(2 * (n as u64).pow(3)));
        for (name, b) in [("a·b", square(&b, n)), ("a·bᵀ", square(&b, n).t())] {
            group.bench_function(format!("{name}/{n}"), |bench| bench.iter(|| Gemm::new(square(&a, n), b).run(black_box(&mut out), n)));
        }
    }
    group.finish();
}

fn memory_bound(c: &mut Criterion) {
    let (rows, columns) = (4096, 1024);
    let (x, mut y) = (values(rows * columns), values(rows * columns));
    let bytes = 4 * x.len() as u64;
    let mut group = c.benchmark_group("kernels/memory_bound");
    let (shape, strides) = ([rows, columns], [columns, 1]);
    let view = StridedView::new(&x, 0, &shape, &strides).expect("a view of all of x");
    group.throughput(Throughput::Bytes(bytes));
    for (name, axes) in [("sum of rows", [false, true]), ("sum of columns", [true, false])] {
        let len = if axes[0] { columns } else { rows };
        group.bench_function(name, |bench| bench.iter(|| reduce::sum(view, &axes, black_box(&mut y[..len]))));
    }
    group.throughput(Throughput::Bytes(2 * bytes));
    let axis = Axis { outer: rows, n: columns, inner: 1 };
    group.bench_function("softmax of rows", |bench| bench.iter(|| softmax(axis, false, &x, black_box(&mut y))));
    let (shape, strides) = ([columns, rows], [1, columns]);
    let turned = StridedView::new(&x, 0, &shape, &strides).expect("a view of all of x");
    group.bench_function("transposed copy", |bench| bench.iter(|| copy::copy_strided(turned, black_box(&mut y))));
    group.throughput(Throughput::Bytes(bytes));
    let stream = Stream { seed: 1, offset: 0 };
    group.bench_function("normal numbers", |bench| bench.iter(|| f32::normal(stream, black_box(&mut y))));
    group.finish();
}

criterion_group!(benches, products, memory_bound);
criterion_main!(benches);
