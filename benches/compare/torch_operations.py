"""One workload for each operation in PyTorch: names and shapes of `benches/workloads/operations.rs`. `torch_bench.py --sweep` runs it."""
import torch, torch.nn.functional as F


def run(bench, randn, device):
    for dtype, tag in ((torch.float32, "f32"), (torch.bfloat16, "bf16")):
        operations(bench, lambda *shape: randn(*shape, dtype=dtype), dtype, tag, device)


def operations(bench, randn, dtype, tag, device):
    def forward(name, f):
        bench(f"op_{name}_{tag}", f)

    def both(name, leaf, f):
        def run():
            leaf.grad = None
            f().sum().backward()
        bench(f"op_{name}_fwdbwd_{tag}", run)

    randint = lambda high, *shape: torch.randint(high, shape, device=device)

    # Element by element.
    x, y = randn(1024, 1024), randn(1024, 1024)
    p, row, mask = x.abs() + 0.1, randn(1024), x > y
    for name in "abs neg square exp expm1 sin cos tanh sigmoid erf floor sign".split():
        forward(name, getattr(x, name))
    for name, function in dict(sqrt="sqrt", rsqrt="rsqrt", recip="reciprocal", log="log", log1p="log1p").items():
        forward(name, getattr(p, function))
    forward("gelu_tanh", lambda: F.gelu(x, approximate="tanh"))
    forward("silu", lambda: F.silu(x))
    forward("softplus", lambda: F.softplus(x))
    forward("mish", lambda: F.mish(x))
    forward("elu", lambda: F.elu(x))
    forward("leaky_relu", lambda: F.leaky_relu(x, 0.1))
    forward("hardswish", lambda: F.hardswish(x))
    forward("clamp", lambda: x.clamp(-0.5, 0.5))
    forward("powf_3", lambda: p**3.0)
    forward("powf_2.5", lambda: p**2.5)
    forward("sub", lambda: x - y)
    forward("mul", lambda: x * y)
    forward("div", lambda: x / p)
    forward("mul_row", lambda: x * row)
    forward("maximum", lambda: x.maximum(y))
    forward("pow", lambda: p**y)
    forward("atan2", lambda: x.atan2(y))
    forward("rem", lambda: x.fmod(p))
    forward("lerp", lambda: x.lerp(y, p))
    forward("eq", lambda: x == y)
    forward("gt_scalar", lambda: x > 0.5)
    forward("where", lambda: torch.where(mask, x, y))
    forward("masked_fill", lambda: x.masked_fill(mask, 0.0))
    forward("logical_and", lambda: mask.logical_and(mask))
    leaf, weight = x.clone().requires_grad_(), row.clone().requires_grad_()
    both("tanh", leaf, lambda: leaf.tanh())
    both("sigmoid", leaf, lambda: leaf.sigmoid())
    both("silu", leaf, lambda: F.silu(leaf))
    both("gelu", leaf, lambda: F.gelu(leaf))
    both("softplus", leaf, lambda: F.softplus(leaf))
    both("square", leaf, lambda: leaf.square())
    both("mul", leaf, lambda: leaf * y)
    both("div", leaf, lambda: leaf / p)
    both("mul_row", leaf, lambda: leaf * row)
    both("mul_by_row", weight, lambda: x * weight)

    # Reductions.
    narrow = randn(1 << 20, 3)
    forward("sum_last", lambda: x.sum(-1))
    forward("sum_first", lambda: x.sum(0))
    forward("sum_narrow_last", lambda: narrow.sum(-1))
    forward("sum_narrow_first", lambda: narrow.sum(0))
    forward("max_narrow_last", lambda: narrow.amax(-1))
    forward("mean", lambda: x.mean())
    forward("var_last", lambda: x.var(-1))
    forward("var_first", lambda: x.var(0))
    forward("norm", lambda: x.norm())
    forward("norm_last", lambda: x.norm(dim=-1))
    forward("prod", lambda: x.prod(-1))
    forward("argmax_last", lambda: x.argmax(-1))
    forward("argmax_first", lambda: x.argmax(0))
    forward("max_dim", lambda: x.max(-1))
    forward("any", lambda: (x > 9.0).any(-1))
    forward("logsumexp", lambda: x.logsumexp(-1))
    forward("softmax_first", lambda: x.softmax(0))
    forward("log_softmax", lambda: x.log_softmax(-1))
    forward("cumsum_last", lambda: x.cumsum(-1))
    forward("cumsum_first", lambda: x.cumsum(0))
    forward("rms_norm", lambda: F.rms_norm(x, (1024,), eps=1e-5))
    both("softmax", leaf, lambda: leaf.softmax(-1))
    both("log_softmax", leaf, lambda: leaf.log_softmax(-1))
    both("logsumexp", leaf, lambda: leaf.logsumexp(-1))
    both("var", leaf, lambda: leaf.var(-1))
    both("max", leaf, lambda: leaf.amax(-1))
    both("cumsum", leaf, lambda: leaf.cumsum(-1))

    # What moves elements.
    index, indices = randint(1024, 1024), randint(1024, 1024, 1024)
    forward("flip", lambda: x.flip(-1))
    forward("roll", lambda: x.roll(5, 1))
    forward("tril", lambda: x.tril())
    forward("repeat", lambda: x.repeat(2, 2))
    forward("cat", lambda: torch.cat((x, y), 1))
    forward("pad", lambda: F.pad(x, (3, 3, 3, 3)))
    forward("index_select", lambda: x.index_select(0, index))
    forward("index_select_last", lambda: x.index_select(1, index))
    forward("gather", lambda: x.gather(1, indices))
    forward("scatter_add", lambda: x.scatter_add(1, indices, y))
    forward("index_add", lambda: x.index_add(0, index, y))
    forward("masked_select", lambda: x.masked_select(mask))
    forward("nonzero", lambda: mask.nonzero())
    forward("one_hot", lambda: F.one_hot(index, 1024))
    forward("sort", lambda: x.sort(-1))
    forward("argsort", lambda: x.argsort(-1, descending=True))
    forward("topk", lambda: x.topk(10, -1))
    forward("permute_copy", lambda: x.reshape(32, 32, 32, 32).permute(0, 2, 3, 1).contiguous())
    forward("einsum", lambda: torch.einsum("bij,bkj->bik", x.reshape(16, 64, 1024), y.reshape(16, 64, 1024)))
    forward("outer", lambda: x[0].outer(y[0]))
    forward("mv", lambda: x.mv(y[0]))
    both("index_select", leaf, lambda: leaf.index_select(0, index))
    both("gather", leaf, lambda: leaf.gather(1, indices))
    both("cat", leaf, lambda: torch.cat((leaf, y), 1))
    tokens, table = randint(10_000, 8, 512), randn(10_000, 256).requires_grad_()
    both("embedding", table, lambda: F.embedding(tokens, table))

    # Images.
    for layout, memory_format in (("nchw", torch.contiguous_format), ("nhwc", torch.channels_last)):
        images = randn(8, 64, 56, 56).to(memory_format=memory_format).requires_grad_()
        w, b = randn(64).requires_grad_(), randn(64).requires_grad_()
        of_images = dict(
            max_pool2d=lambda: F.max_pool2d(images, 3, 2, 1),
            avg_pool2d=lambda: F.avg_pool2d(images, 2),
            adaptive_avg_pool2d=lambda: F.adaptive_avg_pool2d(images, 1),
            upsample_nearest=lambda: F.interpolate(images, scale_factor=2),
            upsample_bilinear=lambda: F.interpolate(images, size=(112, 112), mode="bilinear"),
            batch_norm=lambda: F.batch_norm(images, None, None, w, b, training=True),
            group_norm=lambda: F.group_norm(images, 8, w, b),
            mean_pixels=lambda: images.mean((2, 3)),
        )
        for name, f in of_images.items():
            def without_gradient():
                with torch.no_grad(): f()
            forward(f"{name}_{layout}", without_gradient)
            both(f"{name}_{layout}", images, f)

    # Losses.
    x, y, labels = randn(1024, 1000).requires_grad_(), randn(1024, 1000), randint(1000, 1024)
    target = y.sigmoid()
    both("mse_loss", x, lambda: F.mse_loss(x, y))
    both("l1_loss", x, lambda: F.l1_loss(x, y))
    both("smooth_l1_loss", x, lambda: F.smooth_l1_loss(x, y))
    both("huber_loss", x, lambda: F.huber_loss(x, y))
    both("bce_with_logits", x, lambda: F.binary_cross_entropy_with_logits(x, target))
    both("cross_entropy", x, lambda: F.cross_entropy(x, labels))
    both("cross_entropy_smoothed", x, lambda: F.cross_entropy(x, labels, label_smoothing=0.1))
    both("cosine_similarity", x, lambda: F.cosine_similarity(x, y, -1))

    # Random numbers.
    x = randn(1024, 1024)
    forward("rand", lambda: torch.rand(1024, 1024, dtype=dtype, device=device))
    forward("randn", lambda: torch.randn(1024, 1024, dtype=dtype, device=device))
    forward("dropout", lambda: F.dropout(x, 0.1))
    leaf = x.clone().requires_grad_()
    both("dropout", leaf, lambda: F.dropout(leaf, 0.1))
    if dtype == torch.float32:
        forward("randint", lambda: torch.randint(1000, (1024, 1024), device=device))
        forward("randperm", lambda: torch.randperm(1 << 20, device=device))
