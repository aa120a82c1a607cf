//! `Generator::torch_cpu` against PyTorch's draws (`fixtures/torch_cpu.py`).

use kiln_tensor::generator::GeneratorState;
use kiln_tensor::io::safetensors;
use kiln_tensor::{DType, Generator, Result, Tensor};
use std::collections::BTreeMap;

fn fixture() -> BTreeMap<String, Tensor> {
    safetensors::load(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/torch_cpu.safetensors")).unwrap()
}

/// What a name of the fixture asks for.
fn draw(generator: &Generator, words: &[&str]) -> Result<Tensor> {
    let number = |i: usize| words[i].parse::<i64>().unwrap();
    match words[0] {
        "randint" => generator.randint(number(1), number(2), number(3) as usize),
        "randperm" => generator.randperm(number(1) as usize),
        "rand" => generator.rand(number(1) as usize, words[2].parse::<DType>()?),
        _ => generator.randn(number(1) as usize, words[2].parse::<DType>()?),
    }
}

fn values(x: &Tensor) -> Vec<f64> {
    x.to_dtype(DType::F64).unwrap().to_vec().unwrap()
}

/// Everything but normals is equal; those are to the rounding of their dtype.
fn assert_drawn(name: &str, ours: &Tensor, expected: &Tensor) {
    assert_eq!((ours.dims(), ours.dtype()), (expected.dims(), expected.dtype()), "{name}");
    let ulp = match ours.dtype() {
        _ if !name.contains("randn") => 0.0,
        DType::F64 => 1e-14,
        DType::F32 => 5e-7,
        DType::F16 => 1e-3,
        _ => 8e-3,
    };
    let mut differ = 0;
    for (a, b) in values(ours).into_iter().zip(values(expected)) {
        assert!((a - b).abs() <= ulp * b.abs().max(0.1), "{name}: {a} {b}");
        differ += usize::from(a != b);
    }
    if matches!(ours.dtype(), DType::F16 | DType::BF16) {
        assert!(differ * 20 <= ours.numel(), "{name}: {differ} of {} are rounded otherwise", ours.numel());
    }
}

fn generator(seed: &str) -> Generator {
    Generator::torch_cpu(seed.parse().unwrap())
}

#[test]
fn sequences_of_draws_are_pytorchs() {
    let mut generators = BTreeMap::new();
    for (name, expected) in fixture() {
        let words = name.split(' ').collect::<Vec<_>>();
        let generator = generators.entry(words[0].to_owned()).or_insert_with(|| generator(words[0]));
        assert_drawn(&name, &draw(generator, &words[2..]).unwrap(), &expected);
    }
}

#[test]
fn a_saved_state_continues_everywhere() {
    // Another generator for every draw: each has to continue from the state that the one before it saved, spare normal and all.
    let mut states = BTreeMap::<String, GeneratorState>::new();
    for (name, expected) in fixture() {
        let words = name.split(' ').collect::<Vec<_>>();
        let generator = generator(words[0]);
        if let Some(&state) = states.get(words[0]) {
            generator.manual_seed(99);
            generator.randn(3, ()).unwrap();
            generator.set_state(state);
            assert_eq!(generator.state(), state);
        }
        assert_drawn(&name, &draw(&generator, &words[2..]).unwrap(), &expected);
        states.insert(words[0].to_owned(), generator.state());
    }
    // States that no generator saves.
    for (seed, offset) in [(u64::MAX, 0), (1 << 32, 3), (5 << 32, 7), (1 << 32, 4)] {
        Generator::torch_cpu(0).set_state(GeneratorState { seed, offset });
    }
}

#[test]
fn what_pytorch_draws_otherwise_is_an_error() {
    let g = Generator::torch_cpu(1);
    let before = g.state();
    let x = Tensor::ones([4], ()).unwrap();
    for error in [g.dropout(&x, 0.5).err(), g.rand_bool(0.5, 4).err(), g.bernoulli(&x).err(), g.rand(4, DType::I64).err()] {
        assert!(error.is_some());
    }
    assert!(g.dropout(&x, 0.5).unwrap_err().to_string().contains("Generator::new"));
    assert_eq!(g.state(), before);
    assert!(g.randint(3, 3, 2).is_err());
    assert_eq!(g.randint(3, 4, 2).unwrap().to_vec::<i64>().unwrap(), [3, 3]);
    let clone = g.clone();
    clone.rand(4, ()).unwrap();
    assert_eq!(g.state(), clone.state());
}
