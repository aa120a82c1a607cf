//! Optimisers against PyTorch's results, and what every training run leans on: saving, clipping, averaging, threads.

use kiln_autograd::TensorExt;
use kiln_models::nn::{Buffer, Param, StateDict};
use kiln_models::optim::*;
use kiln_tensor::{DType, Result, Tensor};
use std::collections::HashMap;

const STEPS: usize = 6;

/// The script of the fixture computes the same values.
fn values(n: usize, salt: usize) -> Vec<f64> {
    (0..n).map(|i| ((i * 7919 + salt * 104_729) % 4001) as f64 / 1000.0 - 2.0).collect()
}

fn tensor(shape: &[usize], salt: usize, dtype: DType) -> Tensor {
    Tensor::from_vec(values(shape.iter().product(), salt), shape).unwrap().to_dtype(dtype).unwrap()
}

fn params(dtype: DType) -> [Param; 2] {
    [Param::new("layer.w", &tensor(&[3, 4], 1, dtype)).unwrap(), Param::new("layer.b", &tensor(&[5], 2, dtype)).unwrap()]
}

/// The gradients of step `t`, from 1; `b` has none at step 3.
fn set_grads([w, b]: &[Param; 2], t: usize) {
    w.set_grad(Some(tensor(&[3, 4], 10 + t, w.dtype()))).unwrap();
    b.set_grad((t != 3).then(|| tensor(&[5], 20 + t, b.dtype()))).unwrap();
}

fn flat(params: &[Param; 2]) -> Vec<f64> {
    let values = |p: &Param| p.get().detach().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
    params.iter().flat_map(values).collect()
}

type Make = fn(&[Param; 2]) -> Result<Box<dyn Optimizer>>;

fn boxed<M: Method>(params: &[Param; 2], options: M) -> Result<Box<dyn Optimizer>> {
    Ok(Box::new(GroupOptimizer::new(params.clone(), options)?))
}

/// The cases of `fixtures/optim.py`.
const CASES: &[(&str, Make)] = &[
    ("sgd", |p| boxed(p, SgdOptions { lr: 0.1, weight_decay: 0.01, ..Default::default() })),
    ("sgd_momentum", |p| boxed(p, SgdOptions { lr: 0.1, momentum: 0.9, dampening: 0.2, weight_decay: 0.01, nesterov: false })),
    ("sgd_nesterov", |p| boxed(p, SgdOptions { lr: 0.1, momentum: 0.9, nesterov: true, ..Default::default() })),
    ("adam", |p| boxed(p, AdamOptions { lr: 0.02, betas: (0.8, 0.99), weight_decay: 0.1, ..Default::default() })),
    ("adam_amsgrad", |p| boxed(p, AdamOptions { lr: 0.02, betas: (0.5, 0.6), amsgrad: true, ..Default::default() })),
    ("adamw", |p| boxed(p, AdamWOptions { lr: 0.02, betas: (0.8, 0.99), weight_decay: 0.1, ..Default::default() })),
    ("adamw_amsgrad", |p| boxed(p, AdamWOptions { lr: 0.02, betas: (0.5, 0.6), weight_decay: 0.1, amsgrad: true, ..Default::default() })),
    ("rmsprop", |p| boxed(p, RmsPropOptions { lr: 0.02, alpha: 0.9, weight_decay: 0.1, ..Default::default() })),
    ("rmsprop_momentum", |p| boxed(p, RmsPropOptions { lr: 0.02, alpha: 0.9, momentum: 0.5, ..Default::default() })),
    ("rmsprop_centered", |p| boxed(p, RmsPropOptions { lr: 0.02, alpha: 0.9, centered: true, ..Default::default() })),
    ("rmsprop_centered_momentum", |p| {
        boxed(p, RmsPropOptions { lr: 0.02, alpha: 0.9, momentum: 0.5, centered: true, ..Default::default() })
    }),
    ("lion", |p| boxed(p, LionOptions { lr: 0.02, betas: (0.9, 0.98), weight_decay: 0.1 })),
    ("adafactor", |p| boxed(p, AdafactorOptions { lr: 0.5, weight_decay: 0.01, ..Default::default() })),
    ("adafactor_clipped", |p| {
        boxed(p, AdafactorOptions { lr: 0.1, beta2_decay: -0.5, eps: (1e-8, 0.01), clip: 1.5, ..Default::default() })
    }),
    ("muon", |p| boxed(p, MuonOptions { lr: 0.02, ..Default::default() })),
    ("muon_match_rms", |p| boxed(p, MuonOptions { lr: 0.02, weight_decay: 0.0, nesterov: false, match_rms: true, ..Default::default() })),
];

fn fixture() -> HashMap<&'static str, Vec<f64>> {
    let line = |line: &'static str| {
        let mut words = line.split(' ');
        (words.next().unwrap(), words.map(|w| w.parse().unwrap()).collect())
    };
    include_str!("fixtures/optim.txt").lines().map(line).collect()
}

#[test]
fn f64_matches_pytorch() {
    let fixture = fixture();
    for (name, make) in CASES {
        let params = params(DType::F64);
        let mut optimizer = make(&params).unwrap();
        for t in 1..=STEPS {
            set_grads(&params, t);
            optimizer.step().unwrap();
        }
        for (i, (got, expected)) in flat(&params).iter().zip(&fixture[name]).enumerate() {
            assert!((got - expected).abs() < 1e-12, "{name}, element {i}: {got} instead of {expected}");
        }
    }
}

#[test]
fn clipped_steps_match_pytorch() {
    let fixture = fixture();
    for (name, make) in CASES {
        let params = params(DType::F64);
        let mut optimizer = make(&params).unwrap();
        for t in 1..=STEPS {
            set_grads(&params, t);
            optimizer.step_clipped(1.5).unwrap();
        }
        for (i, (got, expected)) in flat(&params).iter().zip(&fixture[format!("{name}+clip").as_str()]).enumerate() {
            assert!((got - expected).abs() < 1e-12, "{name}, element {i}: {got} instead of {expected}");
        }
    }
}

#[test]
fn a_clipped_step_is_a_step_with_clipped_gradients() {
    for (name, make) in CASES {
        for dtype in [DType::F32, DType::F64] {
            // Clipped, not clipped, and clipped to nothing.
            for max_norm in [1.5, 100.0, 0.0] {
                let (whole, split) = (params(dtype), params(dtype));
                let (mut a, mut b) = (make(&whole).unwrap(), make(&split).unwrap());
                for t in 1..=4 {
                    set_grads(&whole, t);
                    set_grads(&split, t);
                    let before = whole[0].grad().unwrap().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap();
                    let norm = a.step_clipped(max_norm).unwrap().item::<f64>().unwrap();
                    assert_eq!(norm, clip_grad_norm(&split, max_norm).unwrap(), "{name}");
                    assert_eq!(whole[0].grad().unwrap().to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap(), before, "{name}");
                    b.step().unwrap();
                }
                assert_eq!(flat(&whole), flat(&split), "{name} {dtype} {max_norm}");
                assert_eq!(bits(&a.state_dict().unwrap()), bits(&b.state_dict().unwrap()), "{name} {dtype} {max_norm}");
            }
        }
    }
}

#[test]
fn gradients_that_are_not_finite_change_nothing() {
    for (name, make) in CASES {
        let params = params(DType::F32);
        let mut optimizer = make(&params).unwrap();
        set_grads(&params, 1);
        optimizer.step_clipped(1.0).unwrap();
        let (before, states) = (flat(&params), bits(&optimizer.state_dict().unwrap()));
        params[1].set_grad(Some(Tensor::full([5], f64::NAN, DType::F32).unwrap())).unwrap();
        assert!(optimizer.step_clipped(1.0).unwrap().item::<f64>().unwrap().is_nan(), "{name}");
        assert_eq!(flat(&params), before, "{name}");
        let changed = bits(&optimizer.state_dict().unwrap()).into_iter().zip(states).filter(|(a, b)| a != b).map(|(a, _)| a.0);
        assert!(changed.clone().all(|name| name.ends_with(".step")) && changed.count() == 2, "{name}");
        assert!(optimizer.step_clipped(-1.0).is_err() && optimizer.step_clipped(f64::NAN).is_err());
    }
}

#[test]
fn a_scaler_clips_in_the_same_pass() {
    for dtype in [DType::F32, DType::F64] {
        let (whole, split) = (params(dtype), params(dtype));
        let options = AdamWOptions { lr: 0.02, weight_decay: 0.1, ..Default::default() };
        let (mut a, mut b) = (AdamW::new(whole.clone(), options).unwrap(), AdamW::new(split.clone(), options).unwrap());
        let mut scalers = [(); 2].map(|_| GradScaler::new(GradScalerOptions { init_scale: 1024.0, ..Default::default() }).unwrap());
        for t in 1..=4 {
            for params in [&whole, &split] {
                set_grads(params, t);
                for p in params {
                    p.set_grad(p.grad().map(|g| g.mul_scalar(1024.0).unwrap())).unwrap();
                }
            }
            assert!(scalers[0].step_clipped(&mut a, &whole, 1.5).unwrap());
            assert!(scalers[1].unscale(&split).unwrap());
            clip_grad_norm(&split, 1.5).unwrap();
            assert!(scalers[1].step(&mut b, &split).unwrap());
            scalers.iter_mut().for_each(|scaler| scaler.update().unwrap());
        }
        assert_eq!(flat(&whole), flat(&split));
    }
}

#[test]
fn other_dtypes_follow_f64() {
    let fixture = fixture();
    for (dtype, tolerance) in [(DType::F32, 2e-5), (DType::F16, 2e-2), (DType::BF16, 0.1)] {
        // Lion's sign turns the rounding of a near-zero gradient into a whole step.
        for (name, make) in CASES.iter().filter(|(name, _)| *name != "lion") {
            let params = params(dtype);
            let mut optimizer = make(&params).unwrap();
            for t in 1..=STEPS {
                set_grads(&params, t);
                optimizer.step().unwrap();
            }
            assert_eq!(params[0].dtype(), dtype);
            for (i, (got, expected)) in flat(&params).iter().zip(&fixture[name]).enumerate() {
                assert!((got - expected).abs() < tolerance, "{name} {dtype}, element {i}: {got} instead of {expected}");
            }
        }
    }
}

#[test]
fn restored_optimizers_continue_bit_for_bit() {
    for dtype in [DType::F32, DType::BF16] {
        for (name, make) in CASES {
            let (whole, resumed) = (params(dtype), params(dtype));
            let (mut a, mut b) = (make(&whole).unwrap(), make(&resumed).unwrap());
            for t in 1..=4 {
                set_grads(&whole, t);
                a.step().unwrap();
            }
            let saved = a.state_dict().unwrap();
            whole.iter().zip(&resumed).for_each(|(from, to)| to.set(&from.get()).unwrap());
            b.set_lr(7.0).unwrap();
            b.load_state_dict(&saved).unwrap();
            assert_eq!(a.lr(), b.lr());
            for t in 5..=STEPS {
                for (params, optimizer) in [(&whole, &mut a), (&resumed, &mut b)] {
                    set_grads(params, t);
                    optimizer.step().unwrap();
                }
            }
            assert_eq!(flat(&whole), flat(&resumed), "{name}");
            // What was saved is a snapshot: later steps did not change it.
            let mut again = make(&params(dtype)).unwrap();
            again.load_state_dict(&saved).unwrap();
            assert_eq!(bits(&again.state_dict().unwrap()), bits(&saved), "{name}");
        }
    }
}

fn bits(dict: &StateDict) -> Vec<(String, Vec<u64>)> {
    let values = |t: &Tensor| t.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap().into_iter().map(f64::to_bits).collect();
    dict.iter().map(|(name, t)| (name.clone(), values(t))).collect()
}

#[test]
fn state_names_are_pytorchs() {
    let params = params(DType::F32);
    let mut optimizer = AdamW::with_lr(params.clone(), 0.1).unwrap();
    set_grads(&params, 3);
    optimizer.step().unwrap();
    let names: Vec<_> = optimizer.state_dict().unwrap().into_keys().filter(|n| n.starts_with("state")).collect();
    assert_eq!(names, ["state.layer.w.exp_avg", "state.layer.w.exp_avg_sq", "state.layer.w.step"]);
}

#[test]
fn a_state_that_does_not_fit_is_an_error_and_changes_nothing() {
    let params = params(DType::F32);
    let mut optimizer = Adam::with_lr(params.clone(), 0.1).unwrap();
    set_grads(&params, 1);
    optimizer.step().unwrap();
    let good = optimizer.state_dict().unwrap();
    let changed = |name: &str, tensor: Option<Tensor>| {
        let mut dict = good.clone();
        dict.remove(name);
        dict.extend(tensor.map(|t| (name.to_owned(), t)));
        dict
    };
    let number = |x: f64| Some(Tensor::scalar(x, DType::F64).unwrap());
    let bad = [
        changed("state.layer.w.exp_avg", None),
        changed("state.layer.w.exp_avg", Some(Tensor::zeros([4, 3], ()).unwrap())),
        changed("state.layer.w.exp_avg", Some(Tensor::zeros([3, 4], DType::I32).unwrap())),
        changed("state.layer.w.step", number(1.0)),
        changed("state.layer.w.step", Some(Tensor::from_vec(vec![-1i64], ()).unwrap())),
        changed("state.layer.c.step", number(1.0)),
        changed("group.0.lr", number(f64::NAN)),
        changed("group.0.beta1", number(1.0)),
        changed("group.0.amsgrad", number(0.5)),
        changed("group.1.lr", number(0.1)),
    ];
    for (i, dict) in bad.iter().enumerate() {
        assert!(optimizer.load_state_dict(dict).is_err(), "bad dictionary {i}");
        assert_eq!(bits(&optimizer.state_dict().unwrap()), bits(&good));
    }
    optimizer.load_state_dict(&good).unwrap();
}

#[test]
fn hyper_parameters_are_checked() {
    let params = params(DType::F32);
    assert!(Sgd::with_lr(params.clone(), -0.1).is_err());
    assert!(Sgd::new(params.clone(), SgdOptions { nesterov: true, ..Default::default() }).is_err());
    assert!(Adam::new(params.clone(), AdamOptions { betas: (0.9, 1.0), ..Default::default() }).is_err());
    let mut optimizer = Sgd::with_lr(params.clone(), 0.1).unwrap();
    assert!(optimizer.add_group(params.clone(), SgdOptions::default()).is_err());
    assert!(optimizer.set_lr(f64::INFINITY).is_err() && optimizer.set_lrs(&[0.1, 0.2]).is_err());
    assert!(optimizer.set_options(1, |_| ()).is_err() && optimizer.set_options(0, |o| o.momentum = f64::NAN).is_err());
    assert_eq!(optimizer.lrs(), [0.1]);
}

#[test]
fn groups_have_their_own_rates_and_frozen_parameters_stay() {
    let [w, b] = params(DType::F64);
    let before = flat(&[w.clone(), b.clone()]);
    let mut optimizer = Sgd::with_lr([w.clone()], 1.0).unwrap();
    optimizer.add_group([b.clone()], SgdOptions { lr: 0.5, ..Default::default() }).unwrap();
    let mut scheduler = Scheduler::new(Schedule::exponential(0.5), &mut optimizer).unwrap();
    scheduler.step(&mut optimizer).unwrap();
    assert_eq!(optimizer.lrs(), [0.5, 0.25]);
    let one = |p: &Param| p.set_grad(Some(p.get().detach().ones_like().unwrap())).unwrap();
    one(&w);
    one(&b);
    b.freeze();
    optimizer.step().unwrap();
    let after = flat(&[w.clone(), b.clone()]);
    assert!(before[..12].iter().zip(&after[..12]).all(|(x, y)| x - 0.5 == *y));
    assert_eq!(before[12..], after[12..]);
    b.unfreeze();
    optimizer.step().unwrap();
    assert!(before[12..].iter().zip(&flat(&[w, b])[12..]).all(|(x, y)| x - 0.25 == *y));

    let saved = scheduler.state_dict().unwrap();
    scheduler.step(&mut optimizer).unwrap();
    scheduler.load_state_dict(&saved).unwrap();
    assert_eq!((scheduler.steps(), scheduler.factor()), (1, 0.5));
    assert!(scheduler.load_state_dict(&StateDict::new()).is_err());
}

#[test]
fn a_live_graph_keeps_the_values_it_was_recorded_with() {
    let w = Param::new("w", &Tensor::from_vec(vec![3.0f32, -2.0], [2]).unwrap()).unwrap();
    let mut optimizer = Sgd::with_lr([w.clone()], 0.25).unwrap();
    let loss = w.get().mul(&w.get()).unwrap().sum(()).unwrap();
    w.set_grad(Some(Tensor::ones([2], ()).unwrap())).unwrap();
    optimizer.step().unwrap();
    assert_eq!(w.get().to_vec::<f32>().unwrap(), [2.75, -2.25]);
    optimizer.zero_grad();
    loss.backward().unwrap();
    assert_eq!(w.grad().unwrap().to_vec::<f32>().unwrap(), [6.0, -4.0]);
    // Without a graph, the step is in place.
    drop(loss);
    let address = w.get().storage_address();
    optimizer.step().unwrap();
    assert_eq!(w.get().storage_address(), address);
}

#[test]
fn any_number_of_threads_gives_the_same_bits() {
    let run = |threads: usize, make: Make| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| {
            let large = |name, n, salt| Param::new(name, &tensor(&[n, 257], salt, DType::F32)).unwrap();
            let params = [large("w", 300, 1), large("b", 77, 2)];
            let mut optimizer = make(&params).unwrap();
            let mut norms = Vec::new();
            for t in 1..=3 {
                for (p, salt) in params.iter().zip([10, 20]) {
                    p.set_grad(Some(tensor(p.shape().dims(), salt + t, DType::F32))).unwrap();
                }
                norms.push(clip_grad_norm(&params, 1.0).unwrap().to_bits());
                optimizer.step().unwrap();
            }
            (norms, params.map(|p| p.get().to_vec::<f32>().unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>()))
        })
    };
    for (name, make) in CASES {
        let one = run(1, *make);
        assert!(one == run(2, *make) && one == run(7, *make), "{name}");
    }
}

#[test]
fn newton_schulz_sets_singular_values_near_one() {
    let coefficients = MuonOptions::default().ns_coefficients;
    for [rows, columns] in [[3, 5], [5, 3], [1, 4]] {
        let x = newton_schulz(&tensor(&[rows, columns], 7, DType::F64), coefficients, 5, 1e-7).unwrap();
        let x = if rows > columns { x.t().unwrap() } else { x };
        // The sum of the squares of the singular values.
        let trace = x.square().unwrap().sum(()).unwrap().item::<f64>().unwrap();
        let rank = rows.min(columns) as f64;
        assert!((0.4..1.6).contains(&(trace / rank)), "[{rows}, {columns}]: {trace}");
    }
    assert!(newton_schulz(&Tensor::ones([3], ()).unwrap(), coefficients, 5, 1e-7).is_err());
    let zero = newton_schulz(&Tensor::zeros([2, 2], ()).unwrap(), coefficients, 5, 1e-7).unwrap();
    assert_eq!(zero.to_vec::<f32>().unwrap(), [0.0; 4]);
}

#[test]
fn empty_parameters_take_part() {
    for (name, make) in CASES {
        let empty = |name, shape: &[usize]| Param::new(name, &Tensor::zeros(shape, ()).unwrap()).unwrap();
        let params = [empty("w", &[3, 0]), empty("b", &[0])];
        for p in &params {
            p.set_grad(Some(p.get().zeros_like().unwrap())).unwrap();
        }
        make(&params).unwrap().step().unwrap_or_else(|e| panic!("{name}: {e}"));
    }
}

#[test]
fn clipping() {
    let params = params(DType::F64);
    assert_eq!(clip_grad_norm(&params, 1.0).unwrap(), 0.0);
    set_grads(&params, 1);
    let grads = || params.iter().flat_map(|p| p.grad().unwrap().to_vec::<f64>().unwrap()).collect::<Vec<_>>();
    let before = grads();
    let norm = before.iter().map(|g| g * g).sum::<f64>().sqrt();
    assert!((clip_grad_norm(&params, 2.0 * norm).unwrap() - norm).abs() < 1e-12);
    assert_eq!(grads(), before);
    assert!((clip_grad_norm(&params, 1.5).unwrap() - norm).abs() < 1e-12);
    assert!(grads().iter().zip(&before).all(|(x, y)| (x - y * 1.5 / (norm + 1e-6)).abs() < 1e-12));
    clip_grad_value(&params, 0.1).unwrap();
    assert!(grads().iter().zip(&before).all(|(x, y)| (x - (y * 1.5 / (norm + 1e-6)).clamp(-0.1, 0.1)).abs() < 1e-12));

    params[0].set_grad(Some(Tensor::full([3, 4], f64::INFINITY, DType::F64).unwrap())).unwrap();
    let bad = grads();
    assert_eq!(clip_grad_norm(&params, 1.0).unwrap(), f64::INFINITY);
    assert_eq!(grads(), bad);
    assert!(clip_finite_grad_norm(&params, 1.0).is_err());
    assert!(clip_grad_norm(&params, f64::NAN).is_err() && clip_grad_value(&params, -1.0).is_err());
    // A gradient that is one number, expanded.
    params[0].set_grad(Some(Tensor::ones([1], DType::F64).unwrap().expand([3, 4]).unwrap())).unwrap();
    clip_grad_value(&params[..1], 0.5).unwrap();
    assert_eq!(params[0].grad().unwrap().to_vec::<f64>().unwrap(), [0.5; 12]);
}

#[test]
fn averages_follow_and_swap() {
    for dtype in [DType::F64, DType::BF16] {
        let params = params(dtype);
        let mut ema = Ema::new(params.clone(), 0.9).unwrap().with_warmup();
        let mut expected = flat(&params);
        for t in 0..4 {
            params.iter().enumerate().for_each(|(i, p)| p.set(&tensor(p.shape().dims(), 30 + 2 * t + i, dtype)).unwrap());
            let decay = f64::min(0.9, (1 + t) as f64 / (10 + t) as f64);
            expected.iter_mut().zip(flat(&params)).for_each(|(a, p)| *a = decay * *a + (1.0 - decay) * p);
            ema.update().unwrap();
        }
        let trained = flat(&params);
        let tolerance = if dtype == DType::F64 { 1e-12 } else { 1e-2 };
        let close = |params: &[Param; 2]| flat(params).iter().zip(&expected).all(|(x, y)| (x - y).abs() < tolerance);
        assert!(!close(&params));
        assert!(ema.evaluate(|| Ok(close(&params))).unwrap());
        assert_eq!(flat(&params), trained);
        assert!(ema.evaluate(|| Err::<(), _>(kiln_tensor::Error::argument("test", "no"))).is_err());
        assert_eq!(flat(&params), trained);

        ema.swap_in().unwrap();
        assert!(ema.update().is_err() && ema.swap_in().is_err());
        ema.swap_out().unwrap();
        assert!(ema.swap_out().is_err());

        let saved = ema.state_dict().unwrap();
        let mut other = Ema::new(params.clone(), 0.5).unwrap();
        other.load_state_dict(&saved).unwrap();
        ema.update().unwrap();
        other.update().unwrap();
        assert_eq!(bits(&ema.state_dict().unwrap()), bits(&other.state_dict().unwrap()));
        assert_ne!(bits(&ema.state_dict().unwrap()), bits(&saved));
        assert!(other.load_state_dict(&StateDict::new()).is_err());
    }
    assert!(Ema::new([], f64::NAN).is_err());
}

#[test]
fn averages_of_buffers_swap_too() {
    let value = |x: f32| Tensor::from_vec(vec![x], [1]).unwrap();
    let weight = Param::new("weight", &value(1.0)).unwrap();
    let [mean, count] =
        [("mean", value(2.0)), ("count", Tensor::from_vec(vec![7i64], [1]).unwrap())].map(|(n, t)| Buffer::new(n, &t).unwrap());
    let mut ema = Ema::new([weight.clone()], 0.75).unwrap().with_buffers([mean.clone(), count.clone()]).unwrap();
    weight.set(&value(5.0)).unwrap();
    mean.set(&value(6.0)).unwrap();
    ema.update().unwrap();
    let now = || (weight.get().item::<f32>().unwrap(), mean.get().item::<f32>().unwrap(), count.get().item::<i64>().unwrap());
    assert_eq!(ema.evaluate(|| Ok(now())).unwrap(), (2.0, 3.0, 7));
    assert_eq!(now(), (5.0, 6.0, 7));
    let names: Vec<String> = ema.state_dict().unwrap().into_keys().filter(|n| n.starts_with("average")).collect();
    assert_eq!(names, ["average.mean", "average.weight"]);
}
