//! `gan_mnist` is killed in the middle of an epoch and resumed: it ends with the same weights, bit for bit.
#![cfg(unix)]

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const STEPS: &str = "160";

/// The example's binary, which `cargo test` builds beside the folder of the tests.
fn gan_mnist() -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let binary = test.parent().and_then(Path::parent).unwrap().join("examples/gan_mnist");
    assert!(binary.exists(), "{} is missing: build it with `cargo build --examples`", binary.display());
    binary
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

fn training(data: &Path, out: &Path) -> Command {
    let mut command = Command::new(gan_mnist());
    command.args(["--steps", STEPS, "--batch-size", "8", "--judge-samples", "0"]);
    command.arg("--data").arg(data).arg("--out").arg(out).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

#[test]
fn a_killed_run_resumes_to_the_same_bits() {
    let folder = std::env::temp_dir().join(format!("kiln-resume-{}", std::process::id()));
    let (data, whole, killed) = (folder.join("data"), folder.join("whole"), folder.join("killed"));
    std::fs::create_dir_all(&data).unwrap();
    write_data(&data);
    assert!(training(&data, &whole).status().unwrap().success());

    let checkpoint = |out: &Path| out.join("checkpoint.safetensors");
    let mut child = training(&data, &killed).spawn().unwrap();
    let deadline = Instant::now() + Duration::from_secs(120);
    while !checkpoint(&killed).exists() {
        assert!(Instant::now() < deadline && child.try_wait().unwrap().is_none(), "no checkpoint was written");
        std::thread::sleep(Duration::from_millis(1));
    }
    // A few steps beyond the checkpoint, so that they are done twice.
    std::thread::sleep(Duration::from_millis(50));
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9), "the run ended before it was killed");

    assert!(training(&data, &killed).arg("--resume").status().unwrap().success());
    for file in ["checkpoint.safetensors", "metrics.csv"] {
        assert!(std::fs::read(whole.join(file)).unwrap() == std::fs::read(killed.join(file)).unwrap(), "{file} differs");
    }
    std::fs::remove_dir_all(folder).unwrap();
}
