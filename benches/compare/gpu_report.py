#!/usr/bin/env python3
"""Everything that a few minutes on a machine with a GPU can say of Kiln: tests, a memory checker, timings beside PyTorch's.

    python benches/compare/gpu_report.py [--bin DIR] [--out report.md] [--rounds N] [--budget S] [--skip tests,sanitizer,bench] [--only ...]

Builds with cargo, or takes the programs `ops`, `kernels` and `workloads` (the harness, the kernels' tests, the benchmark) from --bin. Needs
NVIDIA's driver, NVRTC (`pip install nvidia-cuda-nvrtc`), PyTorch in the Python that runs this, and compute-sanitizer for that part.
"""
import argparse, json, os, pathlib, shutil, subprocess, sys, time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PROGRAMS = {
    "ops": ["test", "-p", "kiln-autograd", "--test", "ops"],
    "kernels": ["test", "-p", "kiln-kernels", "--lib"],
    "workloads": ["bench", "--bench", "workloads"],
}


def build(name):
    done = subprocess.run(["cargo", *PROGRAMS[name], "--no-run", "--message-format=json"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return [m["executable"] for m in map(json.loads, filter(lambda l: l.startswith("{"), done.stdout.splitlines())) if m.get("executable")][-1]


def run(title, command, report, env=None, limit=None, tail=40):
    start = time.time()
    try:
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, timeout=limit, env={**os.environ, **(env or {})})
        text, status = done.stdout + done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as stopped:
        text, status = (stopped.stdout or b"").decode(errors="replace"), f"stopped after {limit} s"
    lines = [f"## {title}", "", f"{status}, {time.time() - start:.0f} s", "", "```", *text.splitlines()[-tail:], "```", ""]
    report.extend(lines)
    print("\n".join(lines), flush=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--bin", type=pathlib.Path, help="folder with the programs, built already")
    ap.add_argument("--out", default="report.md")
    ap.add_argument("--rounds", type=int, default=1)
    ap.add_argument("--budget", type=float, default=0.3, help="seconds of timed work per workload and round")
    ap.add_argument("--skip", default="", help="parts to leave out: tests, sanitizer, bench")
    ap.add_argument("--only", default="", help="workloads to time")
    ap.add_argument("--limit", type=float, default=240, help="seconds that a part may take")
    a = ap.parse_args()
    program = lambda name: a.bin.resolve() / name if a.bin else build(name)
    skipped = a.skip.split(",")
    on_gpu = {"KILN_TEST_DEVICE": "cuda"}
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    report = ["# Kiln on a GPU", "", time.strftime("%Y-%m-%d"), ""]
    run("The machine", query, report)
    if "tests" not in skipped:
        run("Kernels' tests", [program("kernels"), "cuda::"], report, on_gpu, a.limit)
        run("The harness of operations", [program("ops"), "cases::"], report, on_gpu, a.limit)
    if "sanitizer" not in skipped:
        checker = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
        for tool in ("memcheck", "racecheck"):
            command = [checker, "--tool", tool, "--error-exitcode", "9", program("kernels"), "cuda::pointwise", "cuda::softmax", "cuda::gemm"]
            run(f"compute-sanitizer: {tool}", command, report, on_gpu, a.limit, tail=15)
    if "bench" not in skipped:
        command = [sys.executable, ROOT / "benches/compare/run.py", "--device", "cuda", "--binary", program("workloads"), "--markdown"]
        command += ["--rounds", a.rounds, "--budget", a.budget, "--only", a.only]
        run("Timings", command, report, limit=a.limit, tail=200)
    pathlib.Path(a.out).write_text("\n".join(report))
    print(f"written to {a.out}")


if __name__ == "__main__":
    main()
