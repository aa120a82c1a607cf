"""The GPT of torch_bench.py and memory.py."""
import torch, torch.nn as nn, torch.nn.functional as F

class Block(nn.Module):
    def __init__(s, c, h):
        super().__init__(); s.h = h
        s.l1, s.l2 = nn.LayerNorm(c), nn.LayerNorm(c); s.qkv, s.o = nn.Linear(c, 3 * c), nn.Linear(c, c); s.f1, s.f2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
    def forward(s, x, past=None):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, s.h, C // s.h).transpose(1, 2) for t in s.qkv(s.l1(x)).split(C, -1))
        if past is not None:
            kc, vc, n = past
            kc[:, :, n:n + T] = k; vc[:, :, n:n + T] = v; k, v = kc[:, :, :n + T], vc[:, :, :n + T]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=past is None or T > 1)
        x = x + s.o(y.transpose(1, 2).reshape(B, T, C))
        return x + s.f2(F.gelu(s.f1(s.l2(x)), approximate="tanh"))

class GPT(nn.Module):
    def __init__(s, V, T, L, H, C):
        super().__init__()
        s.te, s.pe = nn.Embedding(V, C), nn.Embedding(T, C); s.bl = nn.ModuleList(Block(C, H) for _ in range(L)); s.ln = nn.LayerNorm(C); s.head = nn.Linear(C, V, bias=False); s.head.weight = s.te.weight
        for p in s.parameters():  # GPT-2's initialisation; the default N(0,1) embedding saturates the softmax into denormals
            if p.dim() > 1: nn.init.normal_(p, 0.0, 0.02)
    def forward(s, i, past=None, n=0):
        x = s.te(i) + s.pe(torch.arange(n, n + i.shape[1], device=i.device))
        for j, b in enumerate(s.bl): x = b(x, None if past is None else (*past[j], n))
        return s.head(s.ln(x))
