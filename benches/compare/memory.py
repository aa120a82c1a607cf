"""The most memory that a process holds, in PyTorch and in Kiln, as the operating system counts resident pages: of one that trains GPT-2 124M on
1 x 1024 tokens (AdamW, clipping, f32), or of one that calls the U-Net of Stable Diffusion 1.5 at 256x256 pixels. PyTorch runs twice: as it is, and
with glibc's malloc told to give pages back.

Usage: memory.py [WORKLOAD ...] [--binary PROGRAM]: the built `cargo bench --bench workloads`.
"""
import argparse, os, subprocess, sys

from run import bench_binary

STEPS = 4


def train():
    import torch, torch.nn.functional as F
    from torch_gpt import GPT

    torch.set_num_threads(2)
    model = GPT(50257, 1024, 12, 12, 768)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)
    tokens = torch.randint(50257, (1, 1025))
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def draw(dtype):
    import torch
    from torch_diffusion import unet

    torch.set_num_threads(2)
    _, step = unet(torch.device("cpu"), dtype)
    for _ in range(STEPS):
        step()


def child(workload):
    import torch

    {"train_gpt2_124m_b1_t1024": train, "sd15_unet_256_f32": lambda: draw(torch.float32), "sd15_unet_256_bf16": lambda: draw(torch.bfloat16)}[workload]()


WORKLOADS = ["train_gpt2_124m_b1_t1024", "sd15_unet_256_f32", "sd15_unet_256_bf16"]


def peak(command, **env):
    """Mebibytes of a child at its most."""
    child = subprocess.Popen(command, env={**os.environ, **env}, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command[0]} failed with status {status}")
    return usage.ru_maxrss / 1024


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--binary", help="the workloads' program, if it is built already")
    ap.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    ap.add_argument("--child", help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.child:
        return child(a.child)
    binary = a.binary or bench_binary()
    for workload in a.workloads or WORKLOADS:
        own = peak([binary, "--only", workload, "--budget", "0.01"])
        command = [sys.executable, __file__, "--child", workload]
        theirs = [peak(command), peak(command, MALLOC_TRIM_THRESHOLD_="0", MALLOC_MMAP_THRESHOLD_="65536")]
        print(f"{workload}: PyTorch {theirs[0]:.0f} MiB, giving pages back {theirs[1]:.0f} MiB; Kiln {own:.0f} MiB: {own / min(theirs):.2f} of the less")


if __name__ == "__main__":
    main()
