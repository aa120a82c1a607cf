#!/usr/bin/env python3
"""Runs Kiln's workloads and PyTorch's in alternation, a process each, and prints one table of ratios.

    python benches/compare/run.py [--only SUBSTRING,...] [--rounds N] [--threads N] [--device cuda] [--compile] [--sweep] [--binary PATH] [--markdown]

Needs PyTorch in the Python that runs it, and `cargo bench --no-run` to have been run (or it builds first). PyTorch gets its best
settings: fused optimisers, channels_last, and glibc's malloc told to keep its pages. Of a workload that PyTorch has more than one way to do
(`NAME_cudnn`, `NAME_flash`; `--compile`), the table has the fastest.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


def rows(command, env=None):
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **(env or {})}, cwd=ROOT)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stderr[-2000:]}")
    return {r["name"]: r["ms"] for r in map(json.loads, filter(lambda l: l.startswith("{"), done.stdout.splitlines()))}


def bench_binary():
    built = subprocess.run(["cargo", "bench", "--bench", "workloads", "--no-run", "--message-format=json"], capture_output=True, text=True, cwd=ROOT)
    if built.returncode:
        sys.exit(built.stderr[-2000:])
    found = [m["executable"] for m in map(json.loads, built.stdout.splitlines()) if m.get("executable") and m["target"]["name"] == "workloads"]
    return found[-1]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--only", default="", help="workloads whose name contains one of these, separated by commas")
    ap.add_argument("--rounds", type=int, default=3, help="alternations; the table shows medians over them")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--budget", type=float, default=2.0, help="seconds of timed work per workload and round")
    ap.add_argument("--device", default="cpu", help="cpu or cuda")
    ap.add_argument("--compile", action="store_true", help="time PyTorch's models compiled, too, and take the faster")
    ap.add_argument("--sweep", action="store_true", help="the sizes between the workloads instead of the workloads")
    ap.add_argument("--binary", help="the workloads' program, if it is built already")
    ap.add_argument("--markdown", action="store_true", help="print the table in markdown")
    a = ap.parse_args()
    binary = a.binary or bench_binary()
    options = ["--only", a.only, "--threads", str(a.threads), "--budget", str(a.budget), "--device", a.device, *(["--sweep"] if a.sweep else [])]
    torch_bench = [sys.executable, ROOT / "benches/compare/torch_bench.py", *options]
    ours, theirs = {}, {}
    for _ in range(a.rounds):
        for table, way, command, env in (
            (ours, "", [binary, "--json", *options], None),
            (theirs, "", torch_bench, MALLOC),
            *([(theirs, "_compiled", [*torch_bench, "--compile"], MALLOC)] if a.compile else []),
        ):
            for name, ms in rows(command, env).items():
                table.setdefault(name + way, []).append(ms)
    sep = " | " if a.markdown else "  "
    print(sep.join(["workload".ljust(44), "PyTorch ms".rjust(11), "Kiln ms".rjust(11), "PyTorch ÷ Kiln".rjust(14)]))
    if a.markdown:
        print("--- | ---: | ---: | ---:")
    for name in ours:
        ways = [statistics.median(theirs[name + way]) for way in ("", "_compiled", "_cudnn", "_flash") if name + way in theirs]
        if ways:
            k, t = statistics.median(ours[name]), min(ways)
            ms = lambda x: f"{x:.3f}" if x >= 0.1 else f"{x:.5f}"
            print(sep.join([name.ljust(44), ms(t).rjust(11), ms(k).rjust(11), f"{t / k:.2f}".rjust(14)]))


if __name__ == "__main__":
    main()
