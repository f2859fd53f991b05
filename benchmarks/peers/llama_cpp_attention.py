#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp's flash attention on the CPU: causal, grouped queries in float32, a mask of f16. The cache is f16, bf16, or int8
as q8_0, and lies by heads, then positions: its decoding reads that 2.6 times as fast as the order in which llama.cpp itself
stores it, positions, then heads.

As a peer: llama_cpp_attention.py FOLDER. On its own it makes up numbers, compares with a reference, and prints what it did:
  MOE_GGML=... llama_cpp_attention.py --heads 32 --kv-heads 8 --width 128 --queries 512 --keys 4096 --type f16 --threads 2
"""
import argparse
import statistics
import sys
import time
from types import SimpleNamespace

import numpy as np

import ggml
from peer import Case, serve

CACHES = ("f16", "bf16", "int8")


class LlamaAttention:
    def __init__(self, case: Case):
        case.refuse_unless(*CACHES)
        self.case, self.kind, self.backend, self.graphs = case, ggml.TYPES[case.type], ggml.Backend(), None
        key, value = (ggml.encoded(case.array(name, case.n, case.hkv, case.d).transpose(1, 0, 2), self.kind)
                      for name in ("key", "value"))
        self.caches = [(self.place(key), self.place(value)) for _ in range(case.copies(key.nbytes + value.nbytes))]
        self.head, self.position = key.nbytes // case.hkv, key.nbytes // (case.n * case.hkv)  # bytes
        self.bytes = (key.nbytes + value.nbytes) * len(self.caches)
        self.version = ggml.release()

    def place(self, data):
        cache = self.backend.place(self.backend.plain, self.kind, self.case.n, self.case.hkv * self.case.d)
        ggml.fill(cache, data)
        return cache

    def prepare(self):
        case, m = self.case, self.case.tokens
        self.backend.threads(case.threads)
        if self.graphs:
            self.graphs.free()
        self.graphs = ggml.Graphs(self.backend)
        last = np.arange(case.n - m, case.n)[:, None]  # that a query sees
        mask = np.where(np.arange(case.n)[None] <= last, 0, -np.inf).astype(np.float16)
        queries = case.array("x", case.batches, m, case.h, case.d)
        for i, x in enumerate(queries):
            inputs = self.graphs.inputs((ggml.F32, (m, case.h, case.d)), (ggml.F16, (m, case.n)))
            for to, data in zip(inputs, (x, mask)):
                ggml.fill(to, data)
            self.graphs.append(lambda ctx: self.nodes(ctx, self.caches[i % len(self.caches)], *inputs))

    def nodes(self, ctx, cache, x, mask):
        case = self.case
        key, value = (ggml.view_3d(ctx, c, case.d, case.n, case.hkv, self.position, self.head, 0) for c in cache)
        y = ggml.flash_attention(ctx, ggml.permute(ctx, x, 0, 2, 1, 3), key, value, mask, case.d ** -0.5, 0.0, 0.0)
        ggml.accumulate_in_float(y)
        return y

    def run(self, i):
        self.graphs.run(i)

    def result(self, i):
        return np.array(self.graphs.result(i, self.case.tokens, self.case.h, self.case.d))


def reference(x, key, value):
    """In double precision."""
    m, h, d = x.shape
    n, group = key.shape[0], h // key.shape[1]
    y = np.empty((m, h, d))
    hidden = np.arange(n)[None] > np.arange(n - m, n)[:, None]
    for head in range(h):
        scores = x[:, head].astype(np.float64) @ key[:, head // group].T.astype(np.float64) / np.sqrt(d)
        scores[hidden] = -np.inf
        p = np.exp(scores - scores.max(1, keepdims=True))
        y[:, head] = p @ value[:, head // group] / p.sum(1, keepdims=True)
    return y


def made_up_case(flags):
    """A case whose arrays are in memory; batches enough to rotate over its caches."""
    shape = (flags.keys, flags.kv_heads, flags.width)
    bytes_of_cache = 2 * np.prod(shape) * {"f16": 2, "bf16": 2, "int8": 34 / 32}[flags.type]
    rotate = flags.rotate * 2 ** 20 if flags.queries <= 128 else 0
    case = SimpleNamespace(type=flags.type, h=flags.heads, hkv=flags.kv_heads, d=flags.width, n=flags.keys,
                           tokens=flags.queries, threads=flags.threads, refuse_unless=lambda *_: None,
                           copies=lambda size: 1 + -(-rotate // size))
    case.batches = max(2, case.copies(int(bytes_of_cache)))
    random = np.random.default_rng(1)
    arrays = {"key": random.standard_normal(shape, np.float32), "value": random.standard_normal(shape, np.float32),
              "x": random.standard_normal((case.batches, flags.queries, flags.heads, flags.width), np.float32)}
    case.array = lambda name, *_: arrays[name]
    return case, arrays


def alone():
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("heads", 32), ("kv-heads", 8), ("width", 128), ("queries", 512), ("keys", 4096), ("threads", 2),
                        ("rotate", 1024), ("rounds", 5)):
        flags.add_argument("--" + name, type=int, default=value)
    flags.add_argument("--type", choices=CACHES, default="f16")
    flags = flags.parse_args()
    case, arrays = made_up_case(flags)
    peer = LlamaAttention(case)
    peer.prepare()
    peer.run(0)
    wanted = reference(arrays["x"][0], arrays["key"], arrays["value"])
    error = np.linalg.norm(peer.result(0) - wanted) / np.linalg.norm(wanted)
    times, calls = [], 1
    for turn in range(flags.rounds + 1):
        start = time.perf_counter()
        for i in range(calls):
            peer.run((turn * calls + i) % case.batches)
        taken = (time.perf_counter() - start) / calls
        if turn == 0:
            calls = max(1, round(0.2 / taken))
        else:
            times.append(taken)
    seconds, m, n = statistics.median(times), flags.queries, flags.keys
    pairs = m * (n - m) + m * (m + 1) // 2
    cache = peer.bytes // len(peer.caches)
    flops = 4 * pairs * flags.heads * flags.width
    print(f"llama.cpp, {peer.version}: {flags.type}, {flags.heads}/{flags.kv_heads} heads of {flags.width}, {m} queries on "
          f"{n} keys, {flags.threads} threads: {m / seconds:.4g} tokens/s, {flops / seconds / 1e9:.4g} useful Gflop/s, "
          f"{cache / seconds / 1e9:.3g} GB/s of cache; relative error {error:.2g}")


if __name__ == "__main__":
    if any(word.startswith("--") for word in sys.argv[1:]):
        alone()
    else:
        serve(LlamaAttention)
