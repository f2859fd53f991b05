#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""A peer for the test of the protocol: fake_peer.py HOW FOLDER, where HOW is

right     computes the layer, or attention, slowly
wrong     adds one to it
refuses   does not run the case
dies      ends in the middle, with a word on stderr

It needs nothing but Python's standard library, and says the protocol anew instead of using benchmarks/peers/peer.py.
"""
import array
import json
import math
import pathlib
import sys
import time

how, folder = sys.argv[1], pathlib.Path(sys.argv[2])
case = json.loads((folder / "case.json").read_text(encoding="utf-8"))
is_layer = case["case"] == "layer"
d, f, E, k = (case.get(name, 0) for name in "dfEk")
h, hkv, n = (case.get(name, 0) for name in ("h", "hkv", "n"))


def numbers(name, kind="f"):
    return array.array(kind, (folder / name).read_bytes())


def dot(a, i, b, j, n):
    return sum(a[i + l] * b[j + l] for l in range(n))


def layer(x, expert, weight):
    y = array.array("f", bytes(4 * len(x)))
    for choice, e in enumerate(expert):
        token = choice // k
        hidden = []
        for row in range(e * f, (e + 1) * f):
            z = dot(gate, row * d, x, token * d, d)
            hidden.append(z / (1 + math.exp(-z)) * dot(up, row * d, x, token * d, d))
        for j in range(d):
            y[token * d + j] += weight[choice] * dot(hidden, 0, down, (e * d + j) * f, f) + (how == "wrong")
    return y


def attention(x):
    y = array.array("f", bytes(4 * len(x)))
    for t in range(T):
        for a in range(h):
            at, keys = (t * h + a) * d, range(n - T + t + 1)
            place = [(j * hkv + a // (h // hkv)) * d for j in keys]
            p = [math.exp(dot(x, at, key, row, d) / math.sqrt(d)) for row in place]
            for i in range(d):
                y[at + i] = sum(w * value[row + i] for w, row in zip(p, place)) / sum(p) + (how == "wrong")
    return y


def result(i):
    return layer(*batch(i)) if is_layer else attention(numbers("x.f32")[i * T * h * d:(i + 1) * T * h * d])


def batch(i):
    return (numbers("x.f32")[i * T * d:(i + 1) * T * d], numbers("expert.i32", "i")[i * T * k:(i + 1) * T * k],
            numbers("weight.f32")[i * T * k:(i + 1) * T * k])


if how == "refuses":
    print(f"refused has no {case['type']}", flush=True)
    sys.exit()
if is_layer:
    gate, up, down = (numbers(f"{name}.f32") for name in ("gate", "up", "down"))
else:
    key, value = (numbers(f"{name}.f32") for name in ("key", "value"))
print(f"ready {4 * len(gate) * 3 if is_layer else 8 * len(key)} 1.0 of {case['case']}", flush=True)
for line in sys.stdin:
    word, *rest = line.split()
    if word == "batches":
        N, T, threads = map(int, rest)
        print("ok", flush=True)
    elif word == "run":
        if how == "dies":
            sys.exit("it fell over")
        (folder / "y.f32").write_bytes(result(int(rest[0])))
        print("ok", flush=True)
    elif word == "go":
        first, count = map(int, rest)
        start = time.perf_counter()
        for i in range(first, first + count):
            result(i % N)
        print(time.perf_counter() - start, flush=True)
