//! Examples as programs: `gan_mnist` is killed in the middle of an epoch and resumed, and ends with the same weights, bit for bit; and what
//! examples make of odd arguments and of folders that another run left.
#![cfg(unix)]

use kiln::Tensor;
use kiln::diffusion::pipeline::{load_picture, write_png};
use kiln::diffusion::schedulers::SchedulerKind;
use std::collections::BTreeMap;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const STEPS: [&str; 2] = ["--steps", "160"];

/// An example's binary, which `cargo test` builds beside the folder of the tests.
fn example(name: &str) -> Command {
    let test = std::env::current_exe().unwrap();
    let binary = test.parent().and_then(Path::parent).unwrap().join("examples").join(name);
    assert!(binary.exists(), "{} is missing: build it with `cargo build --examples`", binary.display());
    Command::new(binary)
}

/// A folder of the test's own, with data in `data`.
fn scratch(name: &str) -> PathBuf {
    let folder = std::env::temp_dir().join(format!("kiln-{name}-{}", std::process::id()));
    std::fs::create_dir_all(folder.join("data")).unwrap();
    write_data(&folder.join("data"));
    folder
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// What a program prints that is to succeed.
fn printed(command: &mut Command) -> String {
    let Output { status, stdout, stderr } = command.output().unwrap();
    assert!(status.success(), "{}", text(&stderr));
    text(&stdout)
}

/// An IDX file of `count` items of `shape`, whose bytes come from a hash.
fn write_idx(path: PathBuf, count: u32, shape: &[u32], byte: impl Fn(u32) -> u8) {
    let mut bytes = vec![0, 0, 8, 1 + shape.len() as u8];
    bytes.extend(count.to_be_bytes());
    shape.iter().for_each(|extent| bytes.extend(extent.to_be_bytes()));
    bytes.extend((0..count * shape.iter().product::<u32>()).map(byte));
    std::fs::write(path, bytes).unwrap();
}

/// 800 training pictures: a hundred steps of eight an epoch.
fn write_data(folder: &Path) {
    let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8;
    for (name, count) in [("train", 800), ("t10k", 16)] {
        write_idx(folder.join(format!("{name}-images-idx3-ubyte")), count, &[28, 28], noise);
        write_idx(folder.join(format!("{name}-labels-idx1-ubyte")), count, &[], |i| (i % 10) as u8);
    }
}

fn training(data: &Path, out: &Path, length: [&str; 2]) -> Command {
    let mut command = example("gan_mnist");
    command.args(length).args(["--batch-size", "8", "--judge-samples", "0"]);
    command.arg("--data").arg(data).arg("--out").arg(out).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

fn wait_for_checkpoint(out: &Path, child: &mut Child) {
    let deadline = Instant::now() + Duration::from_secs(120);
    while !out.join("checkpoint.safetensors").exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "no checkpoint was written");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let folder = scratch("resume");
    let (data, whole, killed) = (folder.join("data"), folder.join("whole"), folder.join("killed"));
    assert!(training(&data, &whole, STEPS).status().unwrap().success());

    let mut child = training(&data, &killed, STEPS).spawn().unwrap();
    wait_for_checkpoint(&killed, &mut child);
    // A few steps beyond the checkpoint, so that they are done twice.
    std::thread::sleep(Duration::from_millis(50));
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9), "the run ended before it was killed");

    assert!(training(&data, &killed, STEPS).arg("--resume").status().unwrap().success());
    for file in ["checkpoint.safetensors", "metrics.csv"] {
        assert!(std::fs::read(whole.join(file)).unwrap() == std::fs::read(killed.join(file)).unwrap(), "{file} differs");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_stopped_run_says_how_to_continue_with_what_was_asked_for() {
    let folder = scratch("stopped");
    let largest = u64::MAX.to_string();
    for length in [["--steps", "1000000"], ["--epochs", largest.as_str()]] {
        let (data, out) = (folder.join("data"), folder.join(length[0]));
        let mut child = training(&data, &out, length).stdout(Stdio::piped()).spawn().unwrap();
        wait_for_checkpoint(&out, &mut child);
        assert!(Command::new("kill").arg("-INT").arg(child.id().to_string()).status().unwrap().success());
        let said = text(&child.wait_with_output().unwrap().stdout);
        let asked = length.join(" ");
        assert!(["--resume", asked.as_str(), "--judge-samples 0"].iter().all(|part| said.contains(part)), "{said}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}

/// An epoch takes as long as there is data: the default is the same for MNIST's 60,000 pictures and for the test images alone.
#[test]
fn the_default_length_of_a_run_is_a_number_of_steps() {
    for (name, steps) in [("gan_mnist", 3500), ("vae_mnist", 2100), ("diffusion_mnist", 2500)] {
        let help = printed(example(name).arg("--help"));
        assert!(help.contains(&format!("[default: {steps}]")), "{help}");
        let both = example(name).args(["--steps", "1", "--epochs", "1"]).output().unwrap();
        assert!(!both.status.success() && text(&both.stderr).contains("cannot be used with"), "{}", text(&both.stderr));
    }
}

#[test]
fn options_that_cannot_be_followed_are_refused_with_what_is_missing() {
    let cases = [
        ("stable_diffusion", ["--checkpoint", "model.safetensors"], "--model"),
        ("bert_classify", ["--autocast", "f16"], "[possible values: bf16]"),
    ];
    for (name, arguments, missing) in cases {
        let refused = example(name).args(arguments).output().unwrap();
        assert!(!refused.status.success() && text(&refused.stderr).contains(missing), "{}", text(&refused.stderr));
    }
}

#[test]
fn every_scheduler_is_named_in_the_help() {
    for name in ["stable_diffusion", "text_to_image", "diffusion_mnist"] {
        let help = printed(example(name).arg("--help"));
        assert!(SchedulerKind::ALL.iter().all(|kind| help.contains(kind.name())), "{help}");
    }
}

/// Nobody knows which answers to a user's own prompts are right.
#[test]
fn success_is_left_out_where_no_program_judges() {
    let folder = std::env::temp_dir().join(format!("kiln-prompts-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let data = [
        ("prompts", "{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\n"),
        ("sft", "{\"prompt\":\"a\",\"completion\":\"c\"}\n"),
        ("preferences", "{\"prompt\":\"a\",\"chosen\":\"c\",\"rejected\":\"d\"}\n"),
    ];
    let mut command = example("chat_rlhf");
    for (name, lines) in data {
        let file = folder.join(format!("{name}.jsonl"));
        std::fs::write(&file, lines).unwrap();
        command.arg(format!("--data-{name}")).arg(file);
    }
    command.args(["--method", "dpo", "--steps-pretrain", "4", "--steps-sft", "3", "--steps-reward", "3", "--steps", "2"]);
    command.args(["--layers", "1", "--width", "16", "--heads", "2", "--batch-size", "2", "--max-new-tokens", "4", "--eval-samples", "2"]);
    printed(command.arg("--out").arg(&folder));
    let table = std::fs::read_to_string(folder.join("policy.csv")).unwrap();
    assert_eq!(table.lines().next(), Some("step,reward held out,accuracy,loss,margin"));
    std::fs::remove_dir_all(folder).unwrap();
}

#[test]
fn the_largest_numbers_are_taken_and_a_single_sample_is_refused_before_the_training() {
    let folder = scratch("numbers");
    let largest = u64::MAX.to_string();
    let run = |more: &[&str], out: &Path| {
        let mut command = example("gan_mnist");
        command.args(["--seed", largest.as_str(), "--batch-size", "8"]).args(more);
        command.arg("--data").arg(folder.join("data")).arg("--out").arg(out).output().unwrap()
    };
    let taken = run(&["--steps", "1", "--judge-samples", "2"], &folder.join("taken"));
    assert!(taken.status.success() && text(&taken.stdout).contains("2 drawn digits"), "{}", text(&taken.stderr));
    let refused = run(&["--epochs", largest.as_str(), "--judge-samples", "1"], &folder.join("refused"));
    assert!(!refused.status.success() && text(&refused.stderr).contains("--judge-samples"), "{}", text(&refused.stderr));
    assert!(!folder.join("refused").exists());
    std::fs::remove_dir_all(folder).unwrap();
}

/// The map's model of `vae_mnist` may not have begun when a run is stopped: then there must be none to resume.
#[test]
fn a_new_run_removes_the_checkpoints_of_the_one_before() {
    let folder = scratch("map");
    let old = folder.join("out/map/checkpoint.safetensors");
    std::fs::create_dir_all(old.parent().unwrap()).unwrap();
    std::fs::write(&old, b"of another run").unwrap();
    let mut command = example("vae_mnist");
    command.args(["--steps", "1", "--batch-size", "8", "--judge-samples", "0", "--no-map"]);
    printed(command.arg("--data").arg(folder.join("data")).arg("--out").arg(folder.join("out")));
    assert!(!old.exists() && folder.join("out/checkpoint.safetensors").exists());
    std::fs::remove_dir_all(folder).unwrap();
}

/// Draws with the tiny model of the pipeline's tests and two steps of DDIM.
fn draw(out: &Path, more: &[&str]) -> String {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tests/fixtures/pipeline/sd1");
    let mut command = example("stable_diffusion");
    command.arg("--model").arg(model).args(["--steps", "2", "--scheduler", "ddim"]).args(more);
    printed(command.arg("--out").arg(out))
}

#[test]
fn stable_diffusion_draws_from_the_last_seed_on_and_says_what_each_phase_took() {
    let folder = std::env::temp_dir().join(format!("kiln-drawn-{}", std::process::id()));
    let (last, long) = (u64::MAX.to_string(), "light ".repeat(80));
    let said = draw(&folder, &["--vae-tiling", "--seed", &last, "--count", "2", "--prompt", &long]);
    for part in ["reading the prompt", "drawing", "decoding", "MiB at most", "not read"] {
        assert!(said.contains(part), "{said}");
    }
    assert!(folder.join(format!("{last}.png")).exists() && folder.join("00000.png").exists());
    std::fs::remove_dir_all(folder).unwrap();
}

/// Green alone is more than half as bright as white.
#[test]
fn a_mask_counts_by_its_brightness() {
    let folder = std::env::temp_dir().join(format!("kiln-mask-{}", std::process::id()));
    let drawn = |colour: [f32; 3]| {
        let mask = folder.join("mask.png");
        let pixels = colour.into_iter().flat_map(|value| [value; 32 * 32]).collect::<Vec<f32>>();
        write_png(&mask, &Tensor::from_vec(pixels, [1, 3, 32, 32]).unwrap(), &BTreeMap::new()).unwrap();
        let mask = mask.to_str().unwrap();
        draw(&folder, &["--init-image", mask, "--mask", mask, "--strength", "1"]);
        load_picture(folder.join("00000.png")).unwrap().to_vec::<f32>().unwrap()
    };
    // All of the picture is drawn anew, whatever it was; or none.
    let (white, green, blue) = (drawn([1.0; 3]), drawn([-1.0, 1.0, -1.0]), drawn([-1.0, -1.0, 1.0]));
    assert!(white == green && white != blue);
    std::fs::remove_dir_all(folder).unwrap();
}
