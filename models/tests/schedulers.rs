//! Schedulers against `diffusers`' trajectories (`fixtures/schedulers.py`), the training side against its formulas, and what neither takes.

use kiln_models::diffusion::guidance::{classifier_free, rescale};
use kiln_models::diffusion::objective::{NoiseSchedule, flow_interpolate, flow_target};
use kiln_models::diffusion::schedulers::{
    BetaSchedule, PredictionType, Scheduler, SchedulerClass, SchedulerConfig, SchedulerKind, TimestepSpacing, from_config,
};
use kiln_models::text::json::{Value, from_str};
use kiln_tensor::io::safetensors::SafetensorsFile;
use kiln_tensor::{DType, Generator, Result, Tensor};

const SHAPE: [usize; 4] = [2, 2, 2, 2];

/// The script computes the same.
fn wave(phase: f64, scale: f64) -> Tensor {
    let values = (0..16).map(|i| ((i as f64 * 1.3 + phase).sin() * scale) as f32).collect::<Vec<_>>();
    Tensor::from_vec(values, SHAPE).unwrap()
}

/// The script's made-up network.
fn network(x: &Tensor, t: f64, learned: bool) -> Result<Tensor> {
    let waves = (0..16).map(|i| ((t / 100.0 + 0.7 * i as f64).cos() / 2.0) as f32).collect::<Vec<_>>();
    let waves = Tensor::from_vec(waves, SHAPE)?.to_dtype(x.dtype())?;
    let output = x.mul_scalar(0.35)?.add(&waves)?;
    if learned { Tensor::cat(&[&output, &x.tanh()?], 1) } else { Ok(output) }
}

/// The samples after each step from index `begin` on.
fn sampled(scheduler: &mut dyn Scheduler, begin: usize, start: &Tensor, learned: bool, generator: &Generator) -> Result<Vec<Tensor>> {
    let mut x = start.clone();
    let mut samples = Vec::new();
    for i in begin..scheduler.timesteps().len() {
        let output = network(&scheduler.scale_model_input(&x, i)?, scheduler.timesteps()[i], learned)?;
        x = scheduler.step(&output, i, &x, generator)?;
        samples.push(x.clone());
    }
    Ok(samples)
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().to_vec::<f64>().unwrap()
}

/// The largest difference, relative to the largest expected value.
fn distance(ours: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(ours.dims(), expected.dims());
    let (ours, expected) = (values(ours), values(expected));
    let largest = expected.iter().fold(1e-30, |m: f64, x| m.max(x.abs()));
    let worst = ours.iter().zip(&expected).fold(0.0, |m: f64, (a, b)| if (a - b).abs() > m || a.is_nan() { (a - b).abs() } else { m });
    if worst.is_nan() { f64::INFINITY } else { worst / largest }
}

fn every_other(x: &Tensor) -> Tensor {
    x.flatten(0, -1).unwrap().slice(0, 0, 16, 2).unwrap()
}

fn file() -> SafetensorsFile {
    SafetensorsFile::open(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/schedulers.safetensors")).unwrap()
}

/// The cases, each with its timesteps and the samples after its steps.
fn fixture() -> Vec<(Value, Vec<f64>, Vec<Tensor>)> {
    let file = file();
    let cases: Vec<Value> = from_str(&file.metadata()["cases"]).unwrap();
    let (samples, times) = (file.tensor("samples").unwrap(), values(&file.tensor("timesteps").unwrap()));
    let mut from = 0;
    let part = |case: Value| {
        let to = from + case["rows"].as_u64().unwrap() as usize;
        let rows = (from..to).map(|row| samples.select(0, row as isize).unwrap()).collect();
        let result = (case, times[from..to].to_vec(), rows);
        from = to;
        result
    };
    cases.into_iter().map(part).collect()
}

#[test]
fn trajectories_are_those_of_diffusers() {
    let cases = fixture();
    let mut failed = Vec::new();
    for (case, expected_times, expected) in &cases {
        let mut scheduler = from_config(&case["config"].to_string()).unwrap();
        if let Some(eta) = case["eta"].as_f64() {
            scheduler.set_eta(eta).unwrap();
        }
        if let Some(mu) = case["mu"].as_f64() {
            scheduler.set_mu(mu).unwrap();
        }
        scheduler.set_timesteps(case["steps"].as_u64().unwrap() as usize).unwrap();
        // Where timesteps are computed from noise levels, f32 shows in them.
        let whole = expected_times.iter().all(|t| t.fract() == 0.0);
        let tolerance = if whole { 0.0 } else { 1e-3 };
        let begin = case["begin"].as_u64().unwrap_or(0) as usize;
        let times = scheduler.timesteps()[begin..].to_vec();
        let same = times.len() == expected_times.len() && times.iter().zip(expected_times).all(|(a, b)| (a - b).abs() <= tolerance);
        if !same {
            failed.push(format!("{case}: timesteps {times:?}, expected {expected_times:?}"));
            continue;
        }
        let learned = case["config"]["variance_type"].as_str().is_some_and(|v| v.starts_with("learned"));
        let start = match case.get("begin") {
            Some(_) => scheduler.add_noise_at(&wave(2.0, 1.0), &wave(0.5, 1.5), begin).unwrap(),
            None => wave(0.5, 1.5).mul_scalar(scheduler.init_noise_sigma()).unwrap(),
        };
        let samples = sampled(scheduler.as_mut(), begin, &start, learned, &Generator::torch_cpu(7)).unwrap();
        assert_eq!(samples.len(), expected.len());
        // The other side's f32 loses digits in x − σ ε from σ = 4096, in UniPC's differences of ε, and in the SDE's of ε: there it is as
        // far from its own result in f64.
        let config = &case["config"];
        let loose =
            config["rescale_betas_zero_snr"] == true || config["predict_x0"] == false || config["algorithm_type"] == "sde-dpmsolver";
        let tolerance = if loose { 1e-4 } else { 1e-5 };
        for (step, (ours, expected)) in samples.iter().zip(expected).enumerate() {
            let error = distance(&every_other(ours), expected);
            if error > tolerance {
                failed.push(format!("{case}: step {step} is off by {error:.1e}"));
            }
        }
    }
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

#[test]
fn timesteps_of_every_spacing_are_those_of_diffusers() {
    let rows: Vec<(String, String, usize, usize, f64, f64)> = from_str(&file().metadata()["timesteps"]).unwrap();
    assert_eq!(rows.len(), 240);
    for (class, spacing, steps, count, total, scale) in rows {
        let text = format!(
            r#"{{"_class_name": "{class}", "timestep_spacing": "{spacing}", "steps_offset": 1, "skip_prk_steps": true, "beta_end": 0.012,
            "beta_schedule": "scaled_linear"}}"#
        );
        let mut scheduler = from_config(&text).unwrap();
        scheduler.set_timesteps(steps).unwrap();
        let ours: f64 = scheduler.timesteps().iter().enumerate().map(|(i, t)| (i + 1) as f64 * t).sum();
        assert_eq!(scheduler.timesteps().len(), count, "{class} {spacing} {steps}");
        // Sums of whole numbers are exact; those of linspace's parts are to the order of summation.
        assert!((ours - total).abs() <= 1e-12 * total, "{class} {spacing} {steps}: {ours}, expected {total}");
        assert!((scheduler.init_noise_sigma() - scale).abs() < 2e-5, "{class} {spacing} {steps}");
    }
}

fn config(text: &str) -> SchedulerConfig {
    SchedulerConfig::from_json(text).unwrap()
}

fn timesteps(ts: &[i64]) -> Tensor {
    Tensor::from_slice(ts, ts.len()).unwrap()
}

#[test]
fn the_training_side_follows_its_formulas() {
    let schedule = NoiseSchedule::new(&config(r#"{"_class_name": "DDPMScheduler", "prediction_type": "v_prediction"}"#)).unwrap();
    assert_eq!((schedule.num_train_timesteps(), schedule.prediction_type()), (1000, PredictionType::VPrediction));
    let (x, noise) = (wave(0.1, 1.0), wave(2.0, 1.0));
    let t = timesteps(&[0, 700]);
    let noisy = schedule.add_noise(&x, &noise, &t).unwrap();
    let velocity = schedule.target(PredictionType::VPrediction, &x, &noise, &t).unwrap();
    let scheduler = SchedulerConfig::new(SchedulerClass::Ddim).build().unwrap();
    for (row, t) in [(0, 0.0), (1, 700.0)] {
        let a = schedule.alphas_cumprod()[t as usize];
        let part = |x: &Tensor| x.narrow(0, row, 1).unwrap();
        let expected = part(&x).mul_scalar(a.sqrt()).unwrap().add(&part(&noise).mul_scalar((1.0 - a).sqrt()).unwrap()).unwrap();
        assert!(distance(&part(&noisy), &expected) < 1e-6);
        assert!(distance(&scheduler.add_noise(&part(&x), &part(&noise), t).unwrap(), &expected) < 1e-6);
        // x₀ = √ᾱ x_t − √(1 − ᾱ) v.
        let back = expected.mul_scalar(a.sqrt()).unwrap().sub(&part(&velocity).mul_scalar((1.0 - a).sqrt()).unwrap()).unwrap();
        assert!(distance(&back, &part(&x)) < 1e-5);
    }
    assert_eq!(values(&schedule.target(PredictionType::Epsilon, &x, &noise, &t).unwrap()), values(&noise));
    assert_eq!(values(&schedule.target(PredictionType::Sample, &x, &noise, &t).unwrap()), values(&x));

    let snr = values(&schedule.snr(&t).unwrap());
    assert!((snr[0] - 0.9999 / 0.0001).abs() < 10.0 && snr[1] < 0.01, "{snr:?}");
    let weights = |p| values(&schedule.min_snr_weights(p, 5.0, &t).unwrap());
    let close = |a: f64, b: f64| assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
    for (i, snr) in snr.into_iter().enumerate() {
        close(weights(PredictionType::Sample)[i], snr.min(5.0));
        close(weights(PredictionType::Epsilon)[i], snr.min(5.0) / snr);
        close(weights(PredictionType::VPrediction)[i], snr.min(5.0) / (snr + 1.0));
    }
    let drawn = values(&schedule.sample_timesteps(100, &Generator::new(1)).unwrap());
    assert!(drawn.iter().all(|t| (0.0..1000.0).contains(t)));
}

#[test]
fn with_zero_terminal_snr_the_last_timestep_is_noise() {
    let config = SchedulerConfig { rescale_betas_zero_snr: Some(true), ..SchedulerConfig::new(SchedulerClass::Ddpm) };
    let schedule = NoiseSchedule::new(&config).unwrap();
    let (x, noise) = (wave(0.1, 1.0), wave(2.0, 1.0));
    let t = timesteps(&[999, 999]);
    assert_eq!(values(&schedule.add_noise(&x, &noise, &t).unwrap()), values(&noise));
    assert_eq!(values(&config.build().unwrap().add_noise(&x, &noise, 999.0).unwrap()), values(&noise));
    assert_eq!(values(&schedule.snr(&t).unwrap()), [0.0, 0.0]);
    for (prediction, weight) in [(PredictionType::Epsilon, 1.0), (PredictionType::VPrediction, 0.0), (PredictionType::Sample, 0.0)] {
        assert_eq!(values(&schedule.min_snr_weights(prediction, 5.0, &t).unwrap()), [weight, weight]);
    }
    // The first timestep keeps its noise.
    let plain = NoiseSchedule::new(&SchedulerConfig::new(SchedulerClass::Ddpm)).unwrap();
    assert!((schedule.alphas_cumprod()[0] - plain.alphas_cumprod()[0]).abs() < 1e-6);
    let mut scheduler = SchedulerConfig { timestep_spacing: Some(TimestepSpacing::Trailing), ..config }.build().unwrap();
    scheduler.set_timesteps(2).unwrap();
    let error = scheduler.step(&x, 0, &noise, &Generator::new(1)).unwrap_err().to_string();
    assert!(error.contains("v_prediction"), "{error}");
}

#[test]
fn guidance_and_flows_follow_their_formulas() {
    let (u, c) = (wave(0.1, 1.0), wave(2.0, 0.5));
    assert!(distance(&classifier_free(&u, &c, 1.0).unwrap(), &c) < 1e-6);
    assert!(distance(&classifier_free(&u, &c, 0.0).unwrap(), &u) < 1e-6);
    let guided = classifier_free(&u, &c, 7.5).unwrap();
    assert!(distance(&guided, &u.mul_scalar(-6.5).unwrap().add(&c.mul_scalar(7.5).unwrap()).unwrap()) < 1e-6);
    assert!(distance(&rescale(&guided, &c, 0.0).unwrap(), &guided) < 1e-6);
    let whole = rescale(&guided, &c, 1.0).unwrap();
    let spread = |x: &Tensor| values(&x.std(vec![1, 2, 3], 1.0).unwrap());
    for (a, b) in spread(&whole).into_iter().zip(spread(&c)) {
        assert!((a - b).abs() < 1e-5);
    }
    assert!(classifier_free(&u, &c.narrow(0, 0, 1).unwrap(), 2.0).is_err());
    assert!(rescale(&guided, &c, 1.5).is_err());

    let times = Tensor::from_vec(vec![0f32, 0.25], 2).unwrap();
    let mixed = flow_interpolate(&u, &c, &times).unwrap();
    let row = |x: &Tensor, i| x.narrow(0, i, 1).unwrap();
    assert_eq!(values(&row(&mixed, 0)), values(&row(&u, 0)));
    // Along the path the target is the derivative.
    let there = row(&u, 1).add(&row(&flow_target(&u, &c).unwrap(), 1).mul_scalar(0.25).unwrap()).unwrap();
    assert!(distance(&row(&mixed, 1), &there) < 1e-6);
    assert!(flow_interpolate(&u, &c, &timesteps(&[1]).to_dtype(DType::F32).unwrap()).is_err());
}

fn error<T>(result: Result<T>) -> String {
    result.err().expect("an error").to_string()
}

#[test]
fn what_makes_no_sense_is_an_error_that_says_so() {
    let contains = |text: String, part: &str| assert!(text.contains(part), "{text:?} lacks {part:?}");
    contains(error(SchedulerConfig::from_json("{}")), "DDIMScheduler");
    contains(error(SchedulerConfig::from_json("[1")), "scheduler config");
    contains(error(SchedulerConfig::from_json(r#"{"_class_name": "Foo"}"#)), "DDPMScheduler");
    contains(error(SchedulerConfig::from_json(r#"{"_class_name": "DDIMScheduler", "prediction_type": "eps"}"#)), "v_prediction");
    contains(error(SchedulerConfig::from_json(r#"{"_class_name": "DDIMScheduler", "beta_schedule": "cosine"}"#)), "squaredcos_cap_v2");
    contains(error(SchedulerConfig::from_json(r#"{"_class_name": "DDIMScheduler", "beta_start": "x"}"#)), "beta_start");
    contains(error(SchedulerConfig::from_json(r#"{"_class_name": "DDIMScheduler", "num_train_timesteps": -4}"#)), "num_train_timesteps");
    contains(error("dpm".parse::<SchedulerKind>()), "euler");
    contains(error(from_config("/nowhere/scheduler_config.json")), "/nowhere");
    for field in [
        r#""num_train_timesteps": 0"#,
        r#""num_train_timesteps": 1000000000000"#,
        r#""beta_end": 2"#,
        r#""trained_betas": [0.1]"#,
        r#""prediction_type": "flow_prediction""#,
        r#""num_train_timesteps": 1, "rescale_betas_zero_snr": true"#,
    ] {
        for class in ["DDPMScheduler", "DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler"] {
            assert!(config(&format!(r#"{{"_class_name": "{class}", {field}}}"#)).build().is_err(), "{class} {field}");
        }
    }
    let x = wave(0.0, 1.0);
    let g = Generator::new(1);
    for &class in SchedulerClass::ALL {
        let mut scheduler = plain(class).build().unwrap();
        contains(error(scheduler.step(&x, 0, &x, &g)), "set_timesteps");
        assert!(scheduler.set_timesteps(0).is_err() && scheduler.set_timesteps(1001).is_err(), "{class}");
        assert!(scheduler.set_timesteps(usize::MAX).is_err(), "{class}");
        scheduler.set_timesteps(10).unwrap();
        let count = scheduler.timesteps().len();
        assert!(scheduler.step(&x, count, &x, &g).is_err() && scheduler.scale_model_input(&x, count).is_err(), "{class}");
        contains(error(scheduler.step(&x.narrow(0, 0, 1).unwrap(), 0, &x, &g)), "shape");
        assert!(scheduler.step(&timesteps(&[1]), 0, &timesteps(&[1]), &g).is_err(), "{class}");
        scheduler.step(&x, 0, &x, &g).unwrap();
        contains(error(scheduler.step(&x, 0, &x, &g)), "turn of 1");
        contains(error(scheduler.step(&x, 2, &x, &g)), "turn of 1");
        scheduler.step(&x, 1, &x, &g).unwrap();
        scheduler.set_timesteps(10).unwrap();
        scheduler.step(&x, 0, &x, &g).unwrap();
        assert!(scheduler.add_noise(&x, &x, -1.0).is_err() && scheduler.add_noise(&x, &x, 1001.0).is_err(), "{class}");
        assert!(scheduler.add_noise(&x, &x, f64::NAN).is_err() && scheduler.add_noise_at(&x, &x, count).is_err(), "{class}");
        assert!(scheduler.add_noise(&x, &x.narrow(0, 0, 1).unwrap(), 5.0).is_err(), "{class}");
        assert!(scheduler.set_eta(2.0).is_err() && scheduler.set_eta(0.0).is_ok() && scheduler.set_mu(1.0).is_err(), "{class}");
    }
    let schedule = NoiseSchedule::new(&SchedulerConfig::new(SchedulerClass::Ddpm)).unwrap();
    assert!(schedule.add_noise(&x, &x.narrow(0, 0, 1).unwrap(), &timesteps(&[0, 1])).is_err());
    for ts in [&[0i64][..], &[0, 1000], &[-1, 0]] {
        assert!(schedule.add_noise(&x, &x, &timesteps(ts)).is_err(), "{ts:?}");
    }
    assert!(schedule.min_snr_weights(PredictionType::Epsilon, 0.0, &timesteps(&[1])).is_err());
    assert!(schedule.min_snr_weights(PredictionType::FlowPrediction, 5.0, &timesteps(&[1])).is_err());
}

#[test]
fn options_that_do_not_go_together_are_errors() {
    for text in [
        r#""EulerDiscreteScheduler", "use_karras_sigmas": true, "use_exponential_sigmas": true"#,
        r#""EulerDiscreteScheduler", "use_karras_sigmas": true, "use_beta_sigmas": true"#,
        r#""EulerDiscreteScheduler", "use_beta_sigmas": true, "sigma_min": -1"#,
        r#""EulerDiscreteScheduler", "use_karras_sigmas": true, "sigma_min": -1"#,
        r#""HeunDiscreteScheduler", "use_exponential_sigmas": true, "sigma_min": 3, "sigma_max": 2"#,
        r#""DDIMScheduler", "steps_offset": 900"#,
        r#""DDIMScheduler", "steps_offset": -1"#,
        r#""PNDMScheduler", "prediction_type": "sample""#,
        r#""DPMSolverMultistepScheduler", "solver_order": 4"#,
        r#""DPMSolverMultistepScheduler", "solver_order": 0"#,
        r#""DPMSolverMultistepScheduler", "solver_type": "rk4""#,
        r#""DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver""#,
        r#""DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min""#,
        r#""DPMSolverMultistepScheduler", "lambda_min_clipped": 100"#,
        r#""DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "steps_offset": Infinity"#,
        r#""DPMSolverMultistepScheduler", "use_flow_sigmas": true, "flow_shift": 0"#,
        r#""UniPCMultistepScheduler", "predict_x0": false"#,
        r#""UniPCMultistepScheduler", "lower_order_final": false"#,
        r#""UniPCMultistepScheduler", "shift_terminal": 0.1"#,
        r#""UniPCMultistepScheduler", "solver_p": "DDIMScheduler""#,
        r#""UniPCMultistepScheduler", "use_flow_sigmas": true, "use_dynamic_shifting": true"#,
        r#""LCMScheduler", "original_inference_steps": 3"#,
        r#""LCMScheduler", "original_inference_steps": 0"#,
        r#""LCMScheduler", "original_inference_steps": 1001"#,
        r#""FlowMatchEulerDiscreteScheduler", "prediction_type": "epsilon""#,
        r#""FlowMatchEulerDiscreteScheduler", "shift": -1"#,
        r#""FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 0"#,
        r#""FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": true"#,
    ] {
        let text = format!(r#"{{"_class_name": {text}}}"#);
        let result = from_config(&text).and_then(|mut scheduler| {
            scheduler.set_timesteps(6)?;
            let times = scheduler.timesteps().to_vec();
            Ok(times)
        });
        assert!(result.is_err(), "{text} gives {result:?}");
    }
    let x = wave(0.0, 1.0);
    let g = Generator::new(1);
    let started = |class, steps: usize| {
        let mut scheduler = SchedulerConfig::new(class).build().unwrap();
        scheduler.set_timesteps(steps).map(|()| scheduler)
    };
    assert!(error(started(SchedulerClass::Pndm, 3).map(|_| ())).contains("skip_prk_steps"));
    assert!(error(started(SchedulerClass::Pndm, 8).unwrap().step(&x, 4, &x, &g)).contains("skip_prk_steps"));
    let mut heun = started(SchedulerClass::Heun, 8).unwrap();
    assert_eq!(heun.order(), 2);
    assert!(error(heun.step(&x, 3, &x, &g)).contains("even"));
    assert!(heun.step(&x, 4, &x, &g).is_ok());
    let infinite = r#"{"_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": -Infinity, "solver_order": 3}"#;
    let read = config(infinite);
    assert_eq!(read.solver_order, Some(3));
    assert!(!read.to_json().unwrap().contains("lambda_min_clipped"));
    let mut learned = config(r#"{"_class_name": "DDPMScheduler", "variance_type": "learned_range"}"#).build().unwrap();
    learned.set_timesteps(3).unwrap();
    assert!(error(learned.step(&x, 0, &x, &g)).contains("channels"));
}

/// A configuration with which any number of steps will do.
fn plain(class: SchedulerClass) -> SchedulerConfig {
    SchedulerConfig { skip_prk_steps: Some(true), ..SchedulerConfig::new(class) }
}

#[test]
fn samples_keep_their_dtype() {
    for &class in SchedulerClass::ALL {
        for dtype in [DType::F64, DType::BF16, DType::F16] {
            let mut scheduler = plain(class).build().unwrap();
            scheduler.set_timesteps(3).unwrap();
            let start = wave(0.3, 1.0).mul_scalar(scheduler.init_noise_sigma()).unwrap().to_dtype(dtype).unwrap();
            let samples = sampled(scheduler.as_mut(), 0, &start, false, &Generator::new(1)).unwrap();
            assert!(samples.iter().all(|x| x.dtype() == dtype), "{class} {dtype}");
            assert!(values(samples.last().unwrap()).iter().all(|x| x.is_finite()));
            assert_eq!(scheduler.add_noise(&start, &start, scheduler.timesteps()[1]).unwrap().dtype(), dtype);
        }
    }
}

#[test]
fn the_classes_have_diffusers_fields_and_defaults() {
    let configs: Vec<Value> = from_str(&file().metadata()["defaults"]).unwrap();
    assert_eq!(configs.len(), SchedulerClass::ALL.len());
    for expected in configs {
        let class = expected["_class_name"].as_str().unwrap();
        let ours: Value = from_str(&SchedulerConfig::new(class.parse().unwrap()).to_json().unwrap()).unwrap();
        for (key, value) in expected.as_object().unwrap() {
            let same = match (ours.get(key), value.as_f64()) {
                (Some(ours), Some(number)) => ours.as_f64() == Some(number),
                // What is null where a class has it is not written by ours in these two.
                (None, _) => value.is_null() && ["variance_type", "solver_p"].contains(&key.as_str()),
                (Some(ours), None) => ours == value,
            };
            assert!(same, "{class}: {key} is {:?}, expected {value}", ours.get(key));
        }
        for key in ours.as_object().unwrap().keys() {
            assert!(expected.get(key).is_some(), "{class} has no {key}");
        }
    }
}

#[test]
fn a_configuration_is_written_back_and_made_into_another_kind() {
    let text = r#"{"_class_name": "EulerDiscreteScheduler", "_diffusers_version": "0.6.0", "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": false, "steps_offset": 1, "trained_betas": null, "made_up": [1]}"#;
    let given = config(text);
    assert_eq!(given.beta_schedule, Some(BetaSchedule::ScaledLinear));
    assert_eq!(given.timestep_spacing, None);
    let folder = std::env::temp_dir().join(format!("kiln-scheduler-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    given.save(folder.join("scheduler_config.json")).unwrap();
    let back = SchedulerConfig::load(&folder).unwrap();
    assert_eq!(from_config(folder.to_str().unwrap()).unwrap().config(), &back);
    std::fs::remove_dir_all(&folder).unwrap();
    // Now every field of the class is there, and what no class knows.
    assert_eq!(back.timestep_spacing, Some(TimestepSpacing::Linspace));
    assert_eq!((back.clip_sample, back.extra.len()), (Some(false), 2));
    assert_eq!(back.to_json().unwrap(), config(&back.to_json().unwrap()).to_json().unwrap());

    for &kind in SchedulerKind::ALL {
        assert_eq!(kind.to_string().parse::<SchedulerKind>().unwrap(), kind);
        let other = given.with_kind(kind);
        assert_eq!((other.class, other.beta_start, other.steps_offset), (kind.class(), Some(0.00085), Some(1)));
        other.build().unwrap().set_timesteps(5).unwrap();
    }
    let flow = config(r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}"#).with_kind(SchedulerKind::DpmSolver2M);
    assert_eq!(
        (flow.use_flow_sigmas, flow.flow_shift, flow.prediction_type),
        (Some(true), Some(3.0), Some(PredictionType::FlowPrediction))
    );
    flow.build().unwrap().set_timesteps(5).unwrap();
    assert_eq!((flow.mu(256).unwrap(), flow.mu(4096).unwrap()), (0.5, 1.15));
    assert!(SchedulerConfig { max_image_seq_len: Some(256), ..flow.clone() }.mu(1).is_err());
    assert!(flow.with_kind(SchedulerKind::Ddim).build().is_err());
    assert_eq!("euler-ancestral".parse::<SchedulerKind>().unwrap(), SchedulerKind::EulerAncestral);
    let karras = given.with_kind(SchedulerKind::EulerKarras);
    assert_eq!(karras.use_karras_sigmas, Some(true));
    assert_eq!(karras.with_kind(SchedulerKind::Euler).use_karras_sigmas, Some(false));
    // A name that says Karras's levels has no others.
    let beta = SchedulerConfig { use_beta_sigmas: Some(true), ..given };
    beta.with_kind(SchedulerKind::EulerKarras).build().unwrap().set_timesteps(5).unwrap();
}

#[test]
fn a_file_of_an_unknown_class_can_be_read_as_another_kind() {
    let text = r#"{"_class_name": "MagicScheduler", "beta_start": 0.00085, "steps_offset": 1, "sigma_data": 0.5}"#;
    let read = SchedulerConfig::from_json_as(text, SchedulerKind::DpmSolver2MKarras).unwrap();
    assert_eq!((read.class, read.beta_start, read.steps_offset), (SchedulerClass::DpmSolverMultistep, Some(0.00085), Some(1)));
    assert_eq!((read.use_karras_sigmas, read.extra.len()), (Some(true), 1));
    // Of a known one it is what `with_kind` makes of it.
    let flow = r#"{"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}"#;
    let kind = SchedulerKind::DpmSolver2M;
    assert_eq!(SchedulerConfig::from_json_as(flow, kind).unwrap(), config(flow).with_kind(kind));
    assert!(error(SchedulerConfig::from_json_as(r#"{"beta_start": "x"}"#, kind)).contains("beta_start"));
    assert!(error(SchedulerConfig::load_as("/nowhere", kind)).contains("/nowhere"));
}
