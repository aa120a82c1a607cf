//! Kernels (`emulator_tests.cu`) that each leave out one thing they need, which the emulator must report, and the same kernels whole.

use super::*;
use crate::cuda::memory::DevicePtr;
use crate::cuda::testing;
use half::bf16;

/// A number of elements of plain data, at an address that suits the copy engine.
struct Buffer<'a, T> {
    emulator: &'a Emulator,
    address: u64,
    len: usize,
    kind: std::marker::PhantomData<T>,
}

impl<'a, T: Copy> Buffer<'a, T> {
    fn new(emulator: &'a Emulator, values: &[T]) -> Self {
        let bytes = std::mem::size_of_val(values);
        let address = emulator.alloc(bytes).unwrap().unwrap();
        emulator.lend(address, bytes);
        // SAFETY: the memory was just allocated with this size.
        unsafe { std::ptr::copy_nonoverlapping(values.as_ptr(), address as *mut T, values.len()) };
        Self { emulator, address, len: values.len(), kind: std::marker::PhantomData }
    }

    fn read(&self) -> Vec<T> {
        // SAFETY: `new` wrote as many values of this plain type, and kernels write only numbers.
        unsafe { std::slice::from_raw_parts(self.address as *const T, self.len) }.to_vec()
    }
}

impl<T> Drop for Buffer<'_, T> {
    fn drop(&mut self) {
        self.emulator.lend(self.address, 0);
        self.emulator.free(self.address);
    }
}

fn arg<T>(x: &T) -> *mut c_void {
    std::ptr::from_ref(x).cast_mut().cast()
}

/// Runs a kernel of the file, compiled with these macros. `args` point to values of the types of its parameters.
fn run(
    emulator: &Emulator,
    defines: &[(&str, &str)],
    kernel: &str,
    [grid, block, shared]: [u32; 3],
    args: &mut [*mut c_void],
) -> Result<(), String> {
    let text = compile::expand_file("emulator_tests.cu", include_str!("emulator_tests.cu"), defines);
    let module = compile::load(emulator, "emulator_tests", true, &text).unwrap();
    let function = emulator.function(module, kernel).unwrap();
    let launch = Launch { grid: [grid, 1, 1], block: [block, 1, 1], shared };
    // SAFETY: each caller gives what the kernel's signature in emulator_tests.cu says.
    unsafe { emulator.launch(function, launch, args) }.map_err(|e| e.to_string())
}

/// What a kernel without one of its parts must lead to.
enum Outcome {
    /// An error that says this, with and without checks.
    Always(&'static str),
    /// An error that says this, with checks only.
    Checked(&'static str),
}

/// Runs `case(emulator, defines)`, which gives the launch's result and whether what the kernel wrote is right: whole, then with each bug.
fn check(bugs: &[(&str, Outcome)], mut case: impl FnMut(&Emulator, &[(&str, &str)]) -> (Result<(), String>, bool)) {
    if !testing::device().is_some_and(|gpu| gpu.is_emulated()) {
        return;
    }
    for checked in [false, true] {
        let emulator = Emulator::with_checks(checked);
        assert_eq!(case(&emulator, &[]), (Ok(()), true), "whole, checked: {checked}");
        for (bug, outcome) in bugs {
            let (result, _) = case(&emulator, &[("BUG", bug)]);
            match (outcome, checked) {
                (Outcome::Always(text), _) | (Outcome::Checked(text), true) => {
                    let message = result.expect_err(&format!("bug {bug}, checked: {checked}"));
                    assert!(message.contains(text), "bug {bug}, checked: {checked}: {message}");
                }
                (Outcome::Checked(_), false) => {}
            }
        }
    }
}

fn map(buffer: &Buffer<'_, bf16>, dims: [u64; 2], tile: [u32; 2]) -> TensorMap {
    let spec =
        TensorMapSpec { ptr: DevicePtr(buffer.address), ty: Type::BF16, dims: &dims, strides: &[dims[0] * 2], tile: &tile, swizzle: 128 };
    buffer.emulator.tensor_map(&spec).unwrap()
}

#[test]
fn barriers_and_bounds() {
    let bugs = [("1", Outcome::Checked("race on byte")), ("2", Outcome::Checked("past the end of a buffer of 4000"))];
    check(&bugs, |emulator, defines| {
        let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let (x, y, n) = (Buffer::new(emulator, &x), Buffer::new(emulator, &[0f32; 1000]), 1000i64);
        let result = run(emulator, defines, "reverse", [4, 256, 0], &mut [arg(&x.address), arg(&y.address), arg(&n)]);
        (result, y.read()[..768].iter().enumerate().all(|(i, &y)| y == (i / 256 * 256 + 255 - i % 256) as f32))
    });
}

#[test]
fn lanes_exchange_values() {
    check(&[("3", Outcome::Checked("race on byte"))], |emulator, defines| {
        let y = Buffer::new(emulator, &[-1i32; 64]);
        (run(emulator, defines, "lanes", [1, 64, 256], &mut [arg(&y.address)]), y.read() == [0; 64])
    });
}

#[test]
fn named_barriers() {
    check(&[("4", Outcome::Always("deadlock: thread 0 and 31 more wait at barrier 2 (32 of 64"))], |emulator, defines| {
        let y = Buffer::new(emulator, &[-1i32; 96]);
        let result = run(emulator, defines, "hand_over", [1, 64, 0], &mut [arg(&y.address)]);
        (result, y.read().iter().enumerate().all(|(i, &y)| y == (i / 32 * 100 + 31 - i % 32) as i32))
    });
}

#[test]
fn asynchronous_copies() {
    let bugs = [("5", Outcome::Checked("an asynchronous copy has not come in")), ("6", Outcome::Checked("race on byte"))];
    check(&bugs, |emulator, defines| {
        let x: Vec<f32> = (0..1000).map(|i| i as f32).collect();
        let (from, y, n) = (Buffer::new(emulator, &x), Buffer::new(emulator, &[0f32; 1024]), 1000i32);
        let result = run(emulator, defines, "copy", [1, 256, 4096], &mut [arg(&from.address), arg(&y.address), arg(&n)]);
        let at = |i: usize| x.get(i % 1024).copied().unwrap_or(0.0);
        let right = y.read().iter().enumerate().all(|(i, &y)| y == at(i) + at(i + 4));
        assert!(!right || !defines.contains(&("BUG", "5")), "a missing wait shows in the values");
        (result, right)
    });
}

/// Small integers, of which products and sums are exact.
fn integers(rows: usize, columns: usize, seed: usize) -> Vec<Vec<f32>> {
    (0..rows).map(|i| (0..columns).map(|j| ((i * 7 + j * 3 + i * j * seed) % 11) as f32 - 5.0).collect()).collect()
}

fn product(a: &[Vec<f32>], b: &[Vec<f32>], depth: usize) -> Vec<f32> {
    a.iter().flat_map(|row| (0..b[0].len()).map(move |j| (0..depth).map(|k| row[k] * b[k][j]).sum())).collect()
}

/// The matrix in bf16, by rows or by columns.
fn stored(x: &[Vec<f32>], by_columns: bool) -> Vec<bf16> {
    let (rows, columns) = (x.len(), x[0].len());
    let at = |i: usize| if by_columns { x[i % rows][i / rows] } else { x[i / columns][i % columns] };
    (0..rows * columns).map(|i| bf16::from_f32(at(i))).collect()
}

#[test]
fn warp_matrices() {
    for columns in [0i32, 1] {
        check(&[], |emulator, defines| {
            let (a, b) = (integers(16, 16, 5), integers(16, 8, 3));
            let (at_a, at_b) = (Buffer::new(emulator, &stored(&a, false)), Buffer::new(emulator, &stored(&b, columns != 0)));
            let (d, tf32) = (Buffer::new(emulator, &[0f32; 128]), Buffer::new(emulator, &[0f32; 128]));
            let args = &mut [arg(&at_a.address), arg(&at_b.address), arg(&d.address), arg(&tf32.address), arg(&columns)];
            let result = run(emulator, defines, "multiply", [1, 32, 1024], args);
            (result, d.read() == product(&a, &b, 16) && tf32.read() == product(&a, &b, 8))
        });
    }
}

#[test]
fn the_copy_engine() {
    let bugs = [
        ("7", Outcome::Checked("of dynamic shared memory")),
        ("8", Outcome::Checked("calls no fence_proxy_async")),
        ("9", Outcome::Always("ends while a bulk store may still read shared memory")),
    ];
    check(&bugs, |emulator, defines| {
        let (rows, columns) = (80, 72);
        let x: Vec<bf16> = (0..rows * columns).map(|i| bf16::from_f32((i % 97) as f32)).collect();
        let (from, to) = (Buffer::new(emulator, &x), Buffer::new(emulator, &vec![bf16::ZERO; x.len()]));
        let maps = [&from, &to].map(|buffer| map(buffer, [columns as u64, rows as u64], [64, 64]));
        let (x0, x1) = (-3i32, 30i32);
        let result = run(emulator, defines, "tiles", [1, 128, 8192], &mut [arg(&maps[0]), arg(&maps[1]), arg(&x0), arg(&x1)]);
        let y = to.read();
        // What lies outside of the tensor comes in as zeros, and is not written.
        let right = (33..rows).all(|row| {
            (5..69).all(|column| {
                let inside = row - 3 < rows && (8..columns + 8).contains(&column);
                let x = if inside { x[(row - 3) * columns + column - 8].to_f32() } else { 0.0 };
                y[row * columns + column].to_f32() == 2.0 * x
            })
        });
        (result, right && y[..33 * columns].iter().all(|&y| y == bf16::ZERO))
    });
}

#[test]
fn warpgroup_matrices() {
    for (mn_a, mn_b, registers) in [("0", "0", 0i32), ("0", "0", 1), ("1", "0", 0), ("0", "1", 0), ("0", "1", 1), ("1", "1", 0)] {
        check(&[("10", Outcome::Checked("an accumulator of a wgmma that it has not waited for"))], |emulator, defines| {
            let (a, b) = (integers(64, 64, 5), integers(64, 32, 3));
            // Where n is contiguous the box is as wide as the swizzle; what lies beyond the tensor is zero.
            let (of_a, of_b) = (stored(&a, mn_a == "1"), stored(&b, mn_b == "0"));
            let (at_a, at_b) = (Buffer::new(emulator, &of_a), Buffer::new(emulator, &of_b));
            let (dims, tile) = if mn_b == "1" { ([32, 64], [64, 64]) } else { ([64, 32], [64, 32]) };
            let (map_a, map_b) = (map(&at_a, [64, 64], [64, 64]), map(&at_b, dims, tile));
            let d = Buffer::new(emulator, &[0f32; 64 * 32]);
            let defines: Vec<_> = defines.iter().copied().chain([("MN_A", mn_a), ("MN_B", mn_b)]).collect();
            let args = &mut [arg(&map_a), arg(&map_b), arg(&d.address), arg(&registers)];
            let result = run(emulator, &defines, "multiply_group", [1, 128, 16384], args);
            let right = d.read() == product(&a, &b, 64);
            assert!(right || defines.iter().any(|&(name, _)| name == "BUG"), "A {mn_a}, B {mn_b}, registers {registers}");
            (result, right)
        });
    }
}

#[test]
fn clusters() {
    check(&[("11", Outcome::Checked("of dynamic shared memory of block"))], |emulator, defines| {
        let x: Vec<f32> = (0..96).map(|i| i as f32).collect();
        let (from, y) = (Buffer::new(emulator, &x), Buffer::new(emulator, &[0f32; 192]));
        let spec =
            TensorMapSpec { ptr: DevicePtr(from.address), ty: Type::F32, dims: &[96, 1], strides: &[384], tile: &[32, 1], swizzle: 0 };
        let map = emulator.tensor_map(&spec).unwrap();
        let result = run(emulator, defines, "share", [2, 32, 1024], &mut [arg(&map), arg(&y.address)]);
        let right = y.read().iter().enumerate().all(|(i, &y)| {
            let (round, rank, t) = (i / 64, i / 32 % 2, i % 32);
            y == 2.0 * x[round * 32 + t] + (1 - rank) as f32
        });
        (result, right)
    });
}

#[test]
fn order_between_blocks() {
    let bugs =
        [("12", Outcome::Checked("race on byte 0 of a buffer of 400")), ("13", Outcome::Checked("race on byte 0 of a buffer of 400"))];
    check(&bugs, |emulator, defines| {
        let x: Vec<f32> = (0..100).map(|i| i as f32).collect();
        let (x, parts) = (Buffer::new(emulator, &x), Buffer::new(emulator, &[0f32; 100]));
        let (count, y) = (Buffer::new(emulator, &[0u32]), Buffer::new(emulator, &[0f32]));
        let args = &mut [arg(&x.address), arg(&parts.address), arg(&count.address), arg(&y.address)];
        (run(emulator, defines, "sum_of_blocks", [100, 64, 0], args), y.read() == [4950.0])
    });
}

#[test]
fn half_types_round_as_they_should() {
    check(&[], |emulator, defines| {
        // Signs, exponents and mantissas of all kinds, the middles between neighbours among them.
        let wide: Vec<f32> = (0..65536u32).map(|i| f32::from_bits(i.wrapping_mul(65521).wrapping_add(i) & !0xfff)).collect();
        let (x, narrow, halves) =
            (Buffer::new(emulator, &wide), Buffer::new(emulator, &[0u16; 131072]), Buffer::new(emulator, &vec![0f32; 65536]));
        let args = &mut [arg(&x.address), arg(&narrow.address), arg(&halves.address)];
        let result = run(emulator, defines, "numbers", [256, 256, 0], args);
        let (narrow, halves) = (narrow.read(), halves.read());
        let right = wide.iter().enumerate().all(|(i, &x)| {
            let half = half::f16::from_bits(i as u16).to_f32();
            (halves[i] == half || half.is_nan() && halves[i].is_nan())
                && (x.is_nan() || narrow[2 * i] == half::f16::from_f32(x).to_bits() && narrow[2 * i + 1] == bf16::from_f32(x).to_bits())
        });
        (result, right)
    });
}

#[test]
fn a_trap_names_its_line() {
    if !testing::device().is_some_and(|gpu| gpu.is_emulated()) {
        return;
    }
    let message = run(&Emulator::with_checks(false), &[], "stop", [3, 64, 0], &mut [arg(&5i32)]).unwrap_err();
    assert!(message.contains("kernel stop, block (0,0,0): a trap by thread 5 (emulator_tests.cu:"), "{message}");
}
