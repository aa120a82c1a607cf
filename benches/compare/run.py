#!/usr/bin/env python3
"""Runs Kiln's workloads and PyTorch's in alternation, a process each, and prints one table of ratios.

    python benches/compare/run.py [--only SUBSTRING,...] [--rounds N] [--threads N] [--device cuda] [--compile] [--sweep] [--binary PATH] [--markdown]
                                  [--isa avx2] [--peers [PROGRAM]]

Needs PyTorch in the Python that runs it, and `cargo bench --no-run` to have been run (or it builds first). PyTorch gets its best
settings: fused optimisers, channels_last, and glibc's malloc told to keep its pages. Of a workload that PyTorch has more than one way to do
(`NAME_cudnn`, `NAME_flash`; `--compile`), the table has the fastest.

`--isa` holds both to a lower instruction set. `--peers` adds columns of candle and burn on the processor (`benches/compare/peers`, built for this
machine unless its program is given), where they have the workload.
"""
import argparse, json, os, pathlib, statistics, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456"}


# What makes PyTorch and its libraries keep to an instruction set.
ISA = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "avx512": {"ATEN_CPU_CAPABILITY": "avx512", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_ENABLE_INSTRUCTIONS": "AVX512"},
}
PEERS = ("candle", "burn")


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


def peers_binary():
    env = {**os.environ, "RUSTFLAGS": "-C target-cpu=native"}
    command = ["cargo", "build", "--release", "--message-format=json", "--manifest-path", ROOT / "benches/compare/peers/Cargo.toml"]
    built = subprocess.run(command, capture_output=True, text=True, env=env)
    if built.returncode:
        sys.exit(built.stderr[-2000:])
    return [m["executable"] for m in map(json.loads, built.stdout.splitlines()) if m.get("executable")][-1]


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--only", default="", help="workloads whose name contains one of these, separated by commas")
    ap.add_argument("--rounds", type=int, default=3, help="alternations; the table shows medians over them")
    ap.add_argument("--threads", type=int, default=2)
    ap.add_argument("--budget", type=float, default=2.0, help="seconds of timed work per workload and round")
    ap.add_argument("--device", default="cpu", help="cpu or cuda")
    ap.add_argument("--compile", action="store_true", help="time PyTorch's models compiled, too, and take the faster")
    ap.add_argument("--sweep", action="store_true", help="the sizes between the workloads, and each operation, instead of the workloads")
    ap.add_argument("--binary", help="the workloads' program, if it is built already")
    ap.add_argument("--markdown", action="store_true", help="print the table in markdown")
    ap.add_argument("--isa", choices=sorted(ISA), help="hold both programs to this instruction set")
    ap.add_argument("--peers", nargs="?", const="", help="also time candle and burn, by the program of benches/compare/peers if it is built already")
    a = ap.parse_args()
    binary = a.binary or bench_binary()
    options = ["--only", a.only, "--threads", str(a.threads), "--budget", str(a.budget), "--device", a.device, *(["--sweep"] if a.sweep else [])]
    torch_bench = [sys.executable, ROOT / "benches/compare/torch_bench.py", *options]
    ours, theirs = {}, {}
    peers = {} if a.peers is None else {name: {} for name in PEERS}
    peers_program = peers and (a.peers or peers_binary())
    own_env = {"KILN_ISA": a.isa} if a.isa else {}
    torch_env = {**MALLOC, **ISA.get(a.isa, {})}
    for _ in range(a.rounds):
        for table, way, command, env in (
            (ours, "", [binary, "--json", *options], own_env),
            (theirs, "", torch_bench, torch_env),
            *([(theirs, "_compiled", [*torch_bench, "--compile"], torch_env)] if a.compile else []),
            *((table, "", [peers_program, name, *options[:6]], None) for name, table in peers.items()),
        ):
            for name, ms in rows(command, env).items():
                table.setdefault(name + way, []).append(ms)
    sep = " | " if a.markdown else "  "
    print(sep.join(["workload".ljust(44), "PyTorch ms".rjust(11), "Kiln ms".rjust(11), "PyTorch ÷ Kiln".rjust(14), *(f"{name} ms".rjust(11) for name in peers)]))
    if a.markdown:
        print("--- | ---: | ---: | ---:" + " | ---:" * len(peers))
    for name in ours:
        ways = [statistics.median(theirs[name + way]) for way in ("", "_compiled", "_cudnn", "_flash") if name + way in theirs]
        if ways:
            k, t = statistics.median(ours[name]), min(ways)
            ms = lambda x: f"{x:.3f}" if x >= 0.1 else f"{x:.5f}"
            others = [ms(statistics.median(table[name])) if name in table else "" for table in peers.values()]
            print(sep.join([name.ljust(44), ms(t).rjust(11), ms(k).rjust(11), f"{t / k:.2f}".rjust(14), *(o.rjust(11) for o in others)]))


if __name__ == "__main__":
    main()
