"""Trains the GAN of `cargo run --example gan_mnist` in PyTorch and saves what it draws.

    python benches/compare/gan_mnist.py --data FOLDER --out samples.npy
    cargo run --example gan_mnist -- --data FOLDER --judge samples.npy

The same networks, initialisation, optimisers, pictures and number of steps; FOLDER holds the IDX files of MNIST's
test set, of which the first 9,000 are trained on.
"""

import argparse
import gzip
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as bce

args = argparse.ArgumentParser()
args.add_argument("--data", type=Path, required=True)
args.add_argument("--out", type=Path, required=True)
args.add_argument("--epochs", type=int, default=25)
args.add_argument("--batch-size", type=int, default=64)
args.add_argument("--samples", type=int, default=2000)
args.add_argument("--seed", type=int, default=0)
args = args.parse_args()


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(100, 128 * 49, bias=False)
        self.b0, self.b1 = nn.BatchNorm2d(128), nn.BatchNorm2d(64)
        self.c1 = nn.ConvTranspose2d(128, 64, 4, 2, 1, bias=False)
        self.c2 = nn.ConvTranspose2d(64, 1, 4, 2, 1)

    def forward(self, z):
        h = self.b0(self.fc(z).view(-1, 128, 7, 7)).relu()
        return self.c2(self.b1(self.c1(h)).relu()).tanh()


def discriminator():
    return nn.Sequential(
        nn.Conv2d(1, 64, 4, 2, 1), nn.LeakyReLU(0.2),
        nn.Conv2d(64, 128, 4, 2, 1, bias=False), nn.BatchNorm2d(128), nn.LeakyReLU(0.2),
        nn.Flatten(), nn.Linear(128 * 49, 1),
    )  # fmt: skip


file = next(args.data.rglob("t10k-images*"))
data = (gzip.open if file.suffix == ".gz" else open)(file, "rb").read()
images = torch.from_numpy(np.frombuffer(data, np.uint8, offset=16).copy()).view(-1, 1, 28, 28)[:9000]
images = images.float() / 127.5 - 1

torch.manual_seed(args.seed)
G, D = Generator(), discriminator()
for net in (G, D):
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(layer.weight, 0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.normal_(layer.weight, 1, 0.02)
        if getattr(layer, "bias", None) is not None:
            nn.init.zeros_(layer.bias)
opt_g, opt_d = (torch.optim.Adam(net.parameters(), 2e-4, (0.5, 0.999), fused=True) for net in (G, D))
start, b = time.time(), args.batch_size
one, zero = torch.ones(b, 1), torch.zeros(b, 1)
for epoch in range(args.epochs):
    for at in torch.randperm(len(images))[: len(images) // b * b].split(b):
        real, fake = images[at], G(torch.randn(b, 100))
        loss_d = bce(D(real), one) + bce(D(fake.detach()), zero)
        opt_d.zero_grad()
        loss_d.backward()
        opt_d.step()
        loss_g = bce(D(fake), one)
        opt_g.zero_grad()
        loss_g.backward()
        opt_g.step()
    print(f"epoch {epoch + 1}: D {loss_d:.3f}, G {loss_g:.3f}, {time.time() - start:.0f} s", flush=True)
G.eval()
with torch.no_grad():
    np.save(args.out, G(torch.randn(args.samples, 100)).numpy())
