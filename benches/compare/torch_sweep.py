"""The sizes between the workloads in PyTorch: names and shapes of `benches/workloads/sweep.rs`. `torch_bench.py --sweep` runs it."""
import torch, torch.nn as nn, torch.nn.functional as F


def run(bench, only, randn, channels_last, device):
    wants = lambda *names: any(part in " ".join(names) for part in only.split(","))
    dtypes = ((torch.float32, "f32"), (torch.bfloat16, "bf16"))

    # Products.
    for dt, tag in dtypes:
        for n in (1, 3, 17, 32, 64, 100, 333, 1000, 1536, 3000):
            if wants(f"gemm_{tag}_{n}"):
                x, y = randn(n, n, dtype=dt), randn(n, n, dtype=dt)
                bench(f"gemm_{tag}_{n}", lambda: x @ y, 2 * n**3, "GFLOP/s")
        for batch, n in ((64, 3), (64, 17), (64, 32), (64, 64), (64, 100), (7, 333)):
            x, y = randn(batch, n, n, dtype=dt), randn(batch, n, n, dtype=dt)
            bench(f"bmm_{tag}_{batch}x{n}", lambda: x @ y, 2 * batch * n**3, "GFLOP/s")
        for k, n in ((64, 64), (100, 10), (784, 512), (1024, 1024)):
            w, b = randn(n, k, dtype=dt), randn(n, dtype=dt)
            for m in (1, 2, 3, 8, 16, 33, 64, 256):
                x = randn(m, k, dtype=dt)
                bench(f"linear_bias_{tag}_{m}x{k}x{n}", lambda: F.linear(x, w, b), 2 * m * k * n, "GFLOP/s")

    # Element by element, and sums over all.
    for n in (1, 17, 64, 333, 1000, 4096, 10_000, 32_768, 100_000, 262_144, 1 << 20):
        x, y = randn(n), randn(n)
        bench(f"add_n{n}", lambda: x + y)
        bench(f"add_scalar_n{n}", lambda: x + 1.5)
        bench(f"relu_n{n}", lambda: x.relu())
        bench(f"exp_n{n}", lambda: x.exp())
        bench(f"gelu_n{n}", lambda: F.gelu(x))
        bench(f"gt_n{n}", lambda: x > y)
        bench(f"to_bf16_n{n}", lambda: x.to(torch.bfloat16))
        bench(f"sum_n{n}", lambda: x.sum())
        bench(f"max_n{n}", lambda: x.amax())
        leaf = x.clone().requires_grad_()
        bench(f"add_recorded_n{n}", lambda: leaf + y)
        def exp_both():
            leaf.grad = None
            leaf.exp().sum().backward()
        bench(f"exp_fwdbwd_n{n}", exp_both)
    for m, n in ((8, 8), (64, 17), (333, 333), (1000, 1000)):
        x, row, column = randn(m, n), randn(n), randn(m, 1)
        bench(f"add_row_{m}x{n}", lambda: x + row)
        bench(f"add_column_{m}x{n}", lambda: x + column)

    # Row by row.
    near = [(m, n) for n in (1, 3, 17, 100, 333, 1000, 4096) for m in (1, 16, 1024)]
    # The last lies beyond the caches.
    for m, n in near + [(65_536, 256)]:
        x, w, b = randn(m, n), randn(n), randn(n)
        leaf = x.clone().requires_grad_()
        bench(f"softmax_{m}x{n}", lambda: x.softmax(-1))
        bench(f"log_softmax_{m}x{n}", lambda: x.log_softmax(-1))
        bench(f"layernorm_{m}x{n}", lambda: F.layer_norm(x, (n,), w, b))
        def norm_both():
            leaf.grad = None
            F.layer_norm(leaf, (n,), w, b).sum().backward()
        bench(f"layernorm_fwdbwd_{m}x{n}", norm_both)
        bench(f"sum_last_{m}x{n}", lambda: x.sum(-1))
        bench(f"sum_first_{m}x{n}", lambda: x.sum(0))
        bench(f"max_last_{m}x{n}", lambda: x.amax(-1))

    # What moves elements, or only views them.
    for dim in (3, 64, 333):
        table = randn(1000, dim)
        for count in (1, 17, 1000):
            index = torch.randint(1000, (count,), device=device)
            bench(f"embedding_{count}x{dim}", lambda: F.embedding(index, table))
    for n in (3, 8, 64, 333, 1000):
        x, y = randn(n, n), randn(n, n)
        bench(f"cat_first_{n}", lambda: torch.cat((x, y)))
        bench(f"cat_last_{n}", lambda: torch.cat((x, y), -1))
        bench(f"stack_{n}", lambda: torch.stack((x, y)))
        bench(f"transposed_copy_{n}", lambda: x.t().contiguous())
        bench(f"column_copy_{n}", lambda: x.narrow(1, 1, n - 1).contiguous())
    x = randn(8, 64)
    leaf = x.clone().requires_grad_()
    bench("view_transpose", lambda: x.t())
    bench("view_slice", lambda: x.narrow(0, 2, 4))
    bench("view_reshape", lambda: x.reshape(16, 32))
    bench("view_unsqueeze", lambda: x.unsqueeze(1))
    bench("view_permute", lambda: x.permute(1, 0))
    bench("view_recorded_transpose", lambda: leaf.t())
    bench("view_recorded_slice", lambda: leaf.narrow(0, 2, 4))
    bench("view_recorded_reshape", lambda: leaf.reshape(16, 32))

    # Convolutions that one round can afford.
    for ci, co in ((1, 8), (3, 64), (16, 16), (64, 64), (256, 256), (1024, 1024)):
        for size in (7, 14, 28, 56, 112, 224):
            for batch in (1, 8, 32, 256):
                pixels, name = batch * size * size, f"{ci}to{co}_{size}_b{batch}"
                flop = 18 * pixels * ci * co
                if flop > 8e9 or pixels * max(ci, co) > 32 << 20 or not wants(f"conv_fwd_{name}", f"conv_fwdbwd_{name}"):
                    continue
                conv, x = channels_last(nn.Conv2d(ci, co, 3, padding=1).to(device)), channels_last(randn(batch, ci, size, size)).requires_grad_()
                def conv_forward():
                    with torch.no_grad(): conv(x)
                def conv_both():
                    conv.zero_grad(); x.grad = None
                    conv(x).sum().backward()
                bench(f"conv_fwd_{name}", conv_forward, flop, "GFLOP/s")
                bench(f"conv_fwdbwd_{name}", conv_both, 3 * flop, "GFLOP/s")

    # Attention: as many queries as keys, causal, or one query that looks at all keys.
    for dt, tag in dtypes:
        for heads, queries, keys in ((8, 1, 1), (8, 3, 3), (8, 17, 17), (8, 100, 100), (8, 1000, 1000), (2, 4096, 4096), (2, 8192, 8192), (8, 1, 100), (8, 1, 4096)):
            shape = f"{heads}x{keys}x64" if queries == keys else f"{heads}x{queries}of{keys}x64"
            names = [f"attn_{p}_{tag}_{shape}" for p in ("fwd", "fwdbwd")]
            if not wants(*names):
                continue
            q, k, v = (randn(1, heads, length, 64, dtype=dt).requires_grad_() for length in (queries, keys, keys))
            attend = lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries == keys)
            def attention_forward():
                with torch.no_grad(): attend()
            def attention_both():
                q.grad = k.grad = v.grad = None
                attend().sum().backward()
            bench(names[0], attention_forward)
            bench(names[1], attention_both)
