"""Tokens a second of llama.cpp (pip install llama-cpp-python gguf) and of Kiln, decoding behind 128 tokens with a model of GPT-2 124M's shape whose
weights are random: llama.cpp from a file with Q8_0 weights that this program writes, Kiln with weights in 8 and 4 bits (`decode_gpt2_124m_int8`
and `_int4` of `cargo bench --bench workloads`). The programs alternate; medians.

Usage: decode_llama_cpp.py [--binary PROGRAM] [--rounds N] [--threads N]
"""
import argparse, json, pathlib, statistics, subprocess, tempfile, time

import numpy as np

from run import bench_binary

VOCABULARY, CONTEXT, WIDTH, LAYERS, HEADS = 50257, 1024, 768, 12, 12
PAST, TOKENS = 128, 16


def write_model(path):
    import gguf

    rng = np.random.default_rng(0)
    out = gguf.GGUFWriter(path, "gpt2")
    out.add_context_length(CONTEXT)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(4 * WIDTH)
    out.add_block_count(LAYERS)
    out.add_head_count(HEADS)
    out.add_layer_norm_eps(1e-5)
    out.add_vocab_size(VOCABULARY)
    out.add_tokenizer_model("no_vocab")

    def matrix(name, rows, cols):
        weights = (rng.standard_normal((rows, cols)) * 0.02).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        out.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    def vector(name, value, size=WIDTH):
        out.add_tensor(name, np.full(size, value, np.float32))

    matrix("token_embd.weight", VOCABULARY, WIDTH)
    matrix("output.weight", VOCABULARY, WIDTH)
    out.add_tensor("position_embd.weight", (rng.standard_normal((CONTEXT, WIDTH)) * 0.02).astype(np.float32))
    for name in ["output_norm", *(f"blk.{i}.{norm}" for i in range(LAYERS) for norm in ("attn_norm", "ffn_norm"))]:
        vector(f"{name}.weight", 1.0)
        vector(f"{name}.bias", 0.0)
    for i in range(LAYERS):
        shapes = {"attn_qkv": (3 * WIDTH, WIDTH), "attn_output": (WIDTH, WIDTH), "ffn_up": (4 * WIDTH, WIDTH), "ffn_down": (WIDTH, 4 * WIDTH)}
        for name, (rows, cols) in shapes.items():
            matrix(f"blk.{i}.{name}.weight", rows, cols)
            vector(f"blk.{i}.{name}.bias", 0.0, rows)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def llama_cpp(model):
    """Tokens a second."""
    model.reset()
    model.eval(list(range(1, PAST + 1)))
    start = time.perf_counter()
    for token in range(TOKENS):
        model.eval([token + 1])
    return TOKENS / (time.perf_counter() - start)


def kiln(binary, threads):
    """Tokens a second, by kind of weights."""
    command = [binary, "--json", "--only", "decode_gpt2_124m_int", "--threads", str(threads), "--budget", "1"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {row["name"].rsplit("_", 1)[1]: 1000 * TOKENS / row["ms"] for row in map(json.loads, lines)}


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument("--binary", help="the workloads' program, if it is built already")
    ap.add_argument("--rounds", type=int, default=3)
    ap.add_argument("--threads", type=int, default=2)
    a = ap.parse_args()
    from llama_cpp import Llama

    binary = a.binary or bench_binary()
    with tempfile.TemporaryDirectory() as folder:
        path = str(pathlib.Path(folder) / "gpt2-q8_0.gguf")
        write_model(path)
        model = Llama(path, n_ctx=CONTEXT, n_threads=a.threads, n_threads_batch=a.threads, verbose=False)
        theirs, ours = [], {}
        for _ in range(a.rounds):
            theirs.append(statistics.median(llama_cpp(model) for _ in range(5)))
            for kind, rate in kiln(binary, a.threads).items():
                ours.setdefault(kind, []).append(rate)
    reference = statistics.median(theirs)
    print(f"llama.cpp Q8_0: {reference:.0f} tokens/s")
    for kind, rates in ours.items():
        rate = statistics.median(rates)
        print(f"Kiln {kind}: {rate:.0f} tokens/s, {rate / reference:.2f} x llama.cpp")


if __name__ == "__main__":
    main()
