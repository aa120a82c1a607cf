//! Every level against plain f32 arithmetic, lane by lane.

use super::*;
use crate::cpu::isa::{WithSimd, dispatch};

struct LanesAgree;

impl WithSimd for LanesAgree {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        let a: Vec<f32> = (0..S::LANES).map(|i| i as f32 * 1.75 - 9.5).collect();
        let b: Vec<f32> = (0..S::LANES).map(|i| 3.25 - i as f32 * 0.5).collect();
        let (x, y) = (s.load_slice(&a), s.load_slice(&b));
        let check = |v: S::F32, f: fn(f32, f32) -> f32| {
            let mut out = vec![0f32; S::LANES];
            v.store_slice(&mut out, S::LANES);
            for i in 0..S::LANES {
                assert_eq!(out[i].to_bits(), f(a[i], b[i]).to_bits(), "lane {i}");
            }
        };
        check(x + y, |a, b| a + b);
        check(x / y, |a, b| a / b);
        check(-x, |a, _| -a);
        check(x.mul_add(y, x), |a, b| a.mul_add(b, a));
        check(x.min(y), f32::min);
        check(x.max(y), f32::max);
        check(x.abs().sqrt(), |a, _| a.abs().sqrt());
        check(x.round(), |a, _| a.round_ties_even());
        check(x.floor(), |a, _| a.floor());
        check(x.ceil(), |a, _| a.ceil());
        check(x.or_else(x.lt(y), y), |a, b| if a < b { a } else { b });
        check(x.or_else(x.ge(y), y), |a, b| if a >= b { a } else { b });
        let exponents: Vec<f32> = (0..S::LANES).map(|i| ((i % 16) as f32 - 7.0) * 18.0).collect();
        check(y.scale(s.load_slice(&exponents)), |a, b| b * 2f32.powi((((a + 9.5) / 1.75) as i32 % 16 - 7) * 18));
        check(x.to_i32().to_f32(), |a, _| a.round_ties_even());
        check(x.to_bits().shr_logical::<9>().shl::<9>().from_bits(), |a, _| f32::from_bits(a.to_bits() >> 9 << 9));
        check((x.to_bits() & s.splat_i32(i32::MAX)).from_bits(), |a, _| a.abs());
        let bytes: Vec<u8> = (0..S::LANES).map(|i| (i * 77 + 120) as u8).collect();
        // SAFETY: there are LANES bytes.
        let (signed, unsigned) = unsafe { (s.load_i8(bytes.as_ptr().cast()), s.load_u8(bytes.as_ptr())) };
        let meant = s.nibbles(unsigned, s.nibble_values(s.splat(0.5), s.splat(-3.0)));
        for (v, of) in [
            (signed.to_f32(), (|b| f32::from(b as i8)) as fn(u8) -> f32),
            (unsigned.to_f32(), f32::from),
            (meant, |b| f32::from(b & 15) * 0.5 - 3.0),
        ] {
            let mut out = vec![0f32; S::LANES];
            v.store_slice(&mut out, S::LANES);
            assert_eq!(out, bytes.iter().map(|&b| of(b)).collect::<Vec<_>>());
        }
        assert_eq!(x.reduce_max(), a.iter().copied().fold(f32::MIN, f32::max));
        assert_eq!(x.reduce_min(), a.iter().copied().fold(f32::MAX, f32::min));
        assert_eq!(x.reduce_sum(), a.iter().sum::<f32>());
        let bits = x.lt(y).to_bits();
        assert!((0..64).all(|i| bits >> i & 1 == u64::from(i < S::LANES && a[i] < b[i])));
        assert!((x.lt(y) & !x.lt(y)).to_bits() == 0 && (x.eq(x) | x.is_nan()).any());
        let (n, stride) = (S::LANES, S::LANES + 3);
        let matrix: Vec<f32> = (0..n * stride).map(|i| i as f32).collect();
        let mut transposed = vec![0f32; n * stride];
        // SAFETY: both hold LANES rows of LANES + 3 values.
        unsafe { s.transpose(matrix.as_ptr(), stride, transposed.as_mut_ptr(), stride) };
        assert!((0..n * n).all(|k| transposed[k / n * stride + k % n] == matrix[k % n * stride + k / n]));
        for rows in 1..=n {
            let mut some = vec![-7f32; n * stride];
            // SAFETY: as above.
            unsafe { s.transpose_some(matrix.as_ptr(), stride, rows, some.as_mut_ptr(), stride) };
            assert!((0..n * stride).all(|at| some[at] == if at % stride < rows { transposed[at] } else { -7.0 }));
        }
        for count in 1..=n {
            let values =
                [1.0, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, -1.7, f32::NAN, -f32::NAN, f32::INFINITY, 3.4e38, 1e-40, 9.2e-41];
            let values: Vec<f32> = values.into_iter().cycle().take(n).collect();
            let mut out = vec![bf16::from_f32(-7.0); n];
            // SAFETY: there is room for all lanes.
            unsafe { s.load_slice(&values).store_bf16(out.as_mut_ptr(), count) };
            let expected = values.iter().enumerate().map(|(i, &x)| if i < count { bf16::from_f32(x) } else { bf16::from_f32(-7.0) });
            assert!(out.iter().zip(expected).all(|(x, y)| x.to_bits() == y.to_bits()), "{out:?}");
        }
        let halves = [1.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, 3.38e38, 1e-40, 9.2e-41, -1.7, 0.3].map(bf16::from_f32);
        let halves: Vec<bf16> = halves.into_iter().cycle().take(2 * S::LANES).collect();
        let mut out = vec![bf16::ZERO; 2 * S::LANES];
        let third = s.splat(1.0 / 3.0);
        let agree = |out: &[bf16]| {
            let product = |x: &bf16| bf16::from_f32(x.to_f32() * (1.0 / 3.0));
            assert!(halves.iter().map(product).zip(out).all(|(x, y)| x.to_bits() == y.to_bits()), "{out:?}");
        };
        // SAFETY: there is room for two vectors.
        unsafe {
            for at in [0, S::LANES] {
                (s.load_bf16_in_any_order(halves[at..].as_ptr()) * third).store_computed_bf16(out[at..].as_mut_ptr());
            }
            agree(&out);
            // (No `map`: its closure may become a function of its own, for which no level is enabled.)
            let [even, odd] = s.load_bf16_pairs(halves.as_ptr());
            S::F32::store_computed_bf16_pairs([even * third, odd * third], out.as_mut_ptr());
        }
        agree(&out);
        for count in 0..S::LANES {
            let part = s.load_slice_partial(&a[..count]);
            let mut out = vec![-7f32; S::LANES];
            part.store_slice(&mut out, count);
            assert_eq!(out[..count], a[..count]);
            assert!(out[count..].iter().all(|&v| v == -7.0));
            assert_eq!(part.reduce_sum(), a[..count].iter().sum::<f32>());
        }
    }
}

struct LanesOfTwoAgree;

impl WithSimd for LanesOfTwoAgree {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, s: S) {
        LanesAgree.with_simd(Twice(s));
        LanesAgree.with_simd(four(s));
    }
}

#[test]
fn lanes_agree_with_plain_arithmetic() {
    dispatch(LanesAgree);
    dispatch(LanesOfTwoAgree);
}
