//! What the harness of operations does not run, on a GPU against the processor: new tensors, random numbers, optimiser steps, and what is known of an
//! index. With `KILN_TEST_DEVICE=cuda` on a GPU, with `KILN_CUDA=emulate` beside it on the emulator of one.

use kiln_tensor::ops::optim::{Adam, Sgd, Update, clamp_, clip_factor, global_norm, scale_, step, step_scaled};
use kiln_tensor::{
    AttentionOptions, DType, Device, Dims, Generator, MatmulPrecision, Result, Tensor, forbid_host, fuse, matmul_precision,
    set_matmul_precision,
};

fn gpu() -> Option<Device> {
    std::env::var("KILN_TEST_DEVICE").is_ok_and(|device| device == "cuda").then(|| Device::cuda(0).unwrap())
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_device(Device::Cpu).unwrap().to_dtype(DType::F64).unwrap().to_vec().unwrap()
}

/// `f` on the GPU, without help from the host, and on the processor.
fn check(what: &str, device: Device, f: impl Fn(Device) -> Result<Vec<Tensor>>) {
    let there = forbid_host(|| f(device)).unwrap_or_else(|e| panic!("{what}: {e}"));
    let here = f(Device::Cpu).unwrap();
    assert!(there.iter().all(|t| t.device() == device), "{what}");
    for (there, here) in there.iter().zip(&here) {
        assert_eq!((there.dims(), there.dtype()), (here.dims(), here.dtype()), "{what}");
        assert_eq!(values(there), values(here), "{what}");
    }
}

#[test]
fn new_tensors() {
    let Some(device) = gpu() else { return };
    for dtype in DType::ALL {
        check(&format!("{dtype}"), device, |device| {
            let like = Tensor::zeros([3, 4], (dtype, device))?.t()?;
            Ok(vec![
                Tensor::full([2, 3], 1.7, (dtype, device))?,
                like.ones_like()?,
                Tensor::arange(0.0, 100.0, 7.0, (dtype, device))?,
                Tensor::linspace(0.0, 9.0, 13, (dtype, device))?,
                Tensor::eye(5, (dtype, device))?,
                Tensor::zeros([0, 2], (dtype, device))?,
            ])
        });
    }
}

#[test]
fn random_numbers() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        check(&format!("{dtype}"), device, |device| {
            let g = Generator::new(7);
            let x = g.randn([5, 77], (dtype, device))?;
            let p = Tensor::linspace(0.0, 1.0, 11, (dtype, device))?;
            Ok(vec![g.rand([100], (dtype, device))?, g.dropout(&x.t()?, 0.4)?, g.bernoulli(&p)?, x])
        });
    }
    let g = Generator::new(0);
    assert!(g.bernoulli(&Tensor::full([2], f64::NAN, (DType::F32, device)).unwrap()).is_err());
    assert!(g.dropout(&Tensor::ones([2], (DType::I64, device)).unwrap(), 0.5).is_err());
}

#[test]
fn optimiser_steps() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        check(&format!("{dtype}"), device, |device| {
            let states = kiln_tensor::ops::optim::state_dtype(dtype);
            let mut params =
                [[3usize, 5], [1, 1], [70, 33]].iter().map(|s| Tensor::full(*s, 0.7, (dtype, device))).collect::<Result<Vec<_>>>()?;
            let mut moments = params.iter().map(|p| Tensor::zeros(p.shape(), (states, device))).collect::<Result<Vec<_>>>()?;
            let mut squares = moments.iter().map(|m| m.zeros_like()).collect::<Result<Vec<_>>>()?;
            let held = params[0].clone();
            for t in 1..=3 {
                let rule = Adam { lr: 0.1, beta1: 0.9, beta2: 0.99, eps: 1e-8, weight_decay: 0.01, decoupled: true, step: t };
                let each = params.iter_mut().zip(&mut moments).zip(&mut squares);
                let updates = each.map(|((param, m), v)| {
                    let grad = param.mul_scalar(t as f64)?.t()?.contiguous()?.t()?;
                    Ok(Update { param, grad, states: [m, v] })
                });
                step::<2>(&rule, updates.collect::<Result<_>>()?)?;
            }
            let plain = Sgd { lr: 0.1, momentum: 0.0, dampening: 0.0, weight_decay: 0.1, nesterov: false, first_step: true };
            let grad = params[1].clone();
            step::<0>(&plain, vec![Update { param: &mut params[1], grad, states: [] }])?;
            scale_(&mut params[2], 1.0 / 3.0)?;
            clamp_(&mut params[0], -0.1, 0.3)?;
            Ok(params.into_iter().chain(moments).chain(squares).chain([held]).collect())
        });
    }
    let list = [DType::F32, DType::BF16].map(|dtype| Tensor::full([100, 7], 2.0, (dtype, device)).unwrap());
    assert_eq!(forbid_host(|| global_norm(&list)).unwrap(), 5600f64.sqrt());
}

#[test]
fn limits_of_an_index_follow_its_memory() {
    let Some(device) = gpu() else { return };
    let x = Tensor::arange(0.0, 4.0, 1.0, (DType::F32, device)).unwrap();
    let mut index = Tensor::from_vec(vec![3i64, 0, 9], 3).unwrap().to_device(device).unwrap();
    assert!(x.index_select(0, &index).unwrap_err().to_string().contains("index 9 is out of range for a dimension of 4"));
    // A part of the index without the bad position is fine.
    let part = x.index_select(0, &index.narrow(0, 0, 2).unwrap()).unwrap();
    assert_eq!(part.to_vec::<f32>().unwrap(), [3.0, 0.0]);
    // What is written makes the limits anew.
    index.as_slice_mut::<i64>().unwrap()[2] = 1;
    assert_eq!(x.index_select(0, &index).unwrap().to_vec::<f32>().unwrap(), [3.0, 0.0, 1.0]);
    index.as_slice_mut::<i64>().unwrap()[0] = -1;
    assert!(x.gather(0, &index).is_err());
    let sorted = x.argsort(0, true).unwrap();
    assert_eq!(forbid_host(|| x.index_select(0, &sorted)).unwrap().to_vec::<f32>().unwrap(), [3.0, 2.0, 1.0, 0.0]);
}

#[test]
fn a_step_takes_its_factor_from_the_gpu() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::F64, DType::BF16] {
        for max_norm in [0.5, 1e9] {
            check(&format!("{dtype}, {max_norm}"), device, |device| {
                let make = |salt: usize, n: usize| {
                    let numbers: Vec<f64> = (0..n).map(|i| ((i * 7919 + salt * 104_729) % 4001) as f64 / 1000.0 - 2.0).collect();
                    Tensor::from_vec(numbers, [n])?.to_dtype(dtype)?.to_device(device)
                };
                let wide = kiln_tensor::ops::optim::state_dtype(dtype);
                let (mut params, grads) = ([make(1, 5000)?, make(2, 7)?], [make(3, 5000)?, make(4, 7)?]);
                let mut states = [[make(5, 5000)?, make(5, 5000)?.square()?], [make(6, 7)?, make(6, 7)?.square()?]];
                for x in states.iter_mut().flatten() {
                    *x = x.to_dtype(wide)?;
                }
                let rule = Adam { lr: 0.01, beta1: 0.9, beta2: 0.99, eps: 1e-3, weight_decay: 0.1, decoupled: true, step: 3 };
                let (_, factor) = clip_factor(&grads, max_norm)?;
                let updates = params.iter_mut().zip(grads).zip(&mut states);
                let updates = updates.map(|((param, grad), states)| Update { param, grad, states: states.each_mut() });
                step_scaled(&rule, updates.collect(), &factor)?;
                Ok(params.into_iter().chain(states.into_iter().flatten()).collect())
            });
        }
    }
    let nan = Tensor::full([3], f64::NAN, (DType::F32, device)).unwrap();
    let (norm, factor) = clip_factor(&[nan], 1.0).unwrap();
    assert!(norm.item::<f64>().unwrap().is_nan() && factor.number().unwrap().is_nan());
}

#[test]
fn sums_that_end_a_chain_have_its_bits() {
    let Some(device) = gpu() else { return };
    let chain = fuse(|[x, b, y]| y + (&x + b).tanh() * x).unwrap();
    let generator = Generator::new(5);
    let shapes: [[&[usize]; 3]; 6] = [
        [&[70_001], &[1], &[70_001]],
        [&[3, 20_004], &[20_004], &[3, 20_004]],
        [&[37, 130], &[37, 1], &[1, 130]],
        [&[600, 64], &[64], &[600, 64]],
        [&[3, 7, 6, 5], &[7, 1, 1], &[3, 7, 6, 5]],
        [&[0, 3], &[3], &[0, 3]],
    ];
    for shapes in shapes {
        for dtype in [DType::F32, DType::BF16] {
            let [x, b, y] = shapes.map(|shape| generator.randn(shape, ()).unwrap().to_dtype(dtype).unwrap().to_device(device).unwrap());
            for dims in [Dims::All, 0.into(), (-1).into()] {
                forbid_host(|| -> Result<()> {
                    let results = chain.call([&x, &b, &y])?;
                    for (one, other) in [
                        (chain.sum([&x, &b, &y], dims.clone())?, results.sum(dims.clone())?),
                        (chain.mean([&x, &b, &y], dims.clone())?, results.mean(dims.clone())?),
                    ] {
                        assert_eq!((one.dims(), one.device()), (other.dims(), device));
                        let bits = |x: &Tensor| values(x).into_iter().map(f64::to_bits).collect::<Vec<_>>();
                        assert!(bits(&one) == bits(&other), "{dtype} {shapes:?} over {dims:?}");
                    }
                    Ok(())
                })
                .unwrap();
            }
        }
    }
}

/// Parts of an f32 that its rounding leaves are none of an infinity's.
#[test]
fn infinities_stay_in_their_rows_at_every_precision() {
    let Some(device) = gpu() else { return };
    let mut a = vec![1.0f32; 64 * 64];
    (a[0], a[64]) = (f32::INFINITY, 3.4028235e38);
    let a = Tensor::from_vec(a, [64, 64]).unwrap();
    let b = Tensor::full([64, 64], 0.5, DType::F32).unwrap();
    let before = matmul_precision();
    for precision in [MatmulPrecision::Highest, MatmulPrecision::High, MatmulPrecision::Medium] {
        set_matmul_precision(precision);
        let there = a.to_device(device).and_then(|a| a.matmul(&b.to_device(device)?)).unwrap();
        let there = values(&there);
        assert!(there[..64].iter().all(|x| *x == f64::INFINITY), "{precision:?}");
        assert!(
            there[64..128].iter().all(|x| *x > 1e38) && there[128..].iter().all(|x| *x == 32.0),
            "{precision:?} {:?} {:?}",
            &there[64..70],
            there[128..].iter().find(|x| **x != 32.0)
        );
    }
    set_matmul_precision(before);
}

#[test]
fn attention_over_no_keys_is_zero() {
    let Some(device) = gpu() else { return };
    for dtype in [DType::F32, DType::BF16] {
        check(&format!("{dtype}"), device, |device| {
            let (q, keys) = (Tensor::ones([1, 2, 16, 64], (dtype, device))?, Tensor::zeros([1, 2, 0, 64], (dtype, device))?);
            Ok(vec![q.scaled_dot_product_attention(&keys, &keys, &AttentionOptions::default())?])
        });
    }
}

/// Few lines of a long axis, many of a short one, and more parts than blocks run at a time.
#[test]
fn cumulative_sums_of_any_extents() {
    let Some(device) = gpu() else { return };
    for shape in [[3, 9000], [5000, 3], [1, 1], [2, 0]] {
        check(&format!("{shape:?}"), device, |device| {
            let x = Tensor::arange(0.0, (shape[0] * shape[1]) as f64, 1.0, (DType::I64, device))?.reshape(shape)?;
            Ok(vec![x.cumsum(1)?, x.cumsum(0)?])
        });
    }
}
