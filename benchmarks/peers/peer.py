# SPDX-License-Identifier: Apache-2.0
"""The side of a peer that runs in a process of its own. A peer is a script `SCRIPT FOLDER` that calls serve().

FOLDER holds case.json and raw float32 and int32 arrays in row-major order:
  layer      {case, type, d, f, E, k, rotate}    gate[E,f,d] up[E,f,d] down[E,d,f]   batch: x[T,d] expert[T,k] weight[T,k]
  attention  {case, type, h, hkv, d, n, rotate}  key[n,hkv,d] value[n,hkv,d]         batch: x[T,h,d], queries of the last T
                                                                                     of n positions; each sees up to its own
It holds copies of the weights (of the cache) until all but one are `rotate` bytes, and batch i uses copy i modulo their number.

Lines on stdin, and the answers on stdout (whatever the peer's libraries print goes to stderr):
  at the start         ready BYTES VERSION               or: refused REASON, and the process ends
  batches N T THREADS  ok                                N batches lie in FOLDER, all arrays with N in front
  run I                ok                                the result of batch I lies in FOLDER/y.f32
  go FIRST COUNT       SECONDS                           that COUNT calls took, of batches FIRST, FIRST + 1, ... modulo N
  end of file                                            the process ends
Between two lines the process is stopped, so it may spin as it likes while it runs.
"""
import json
import math
import os
import pathlib
import sys
import time

import numpy as np


class Refusal(Exception):
    """Why a peer does not run a case."""


class Case:
    """What case.json says, as attributes, and the arrays beside it."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.__dict__.update(json.loads((self.folder / "case.json").read_text(encoding="utf-8")))
        self.batches = self.tokens = self.threads = 0

    def array(self, name, *shape, dtype=np.float32):
        file = self.folder / f"{name}.{'i32' if dtype == np.int32 else 'f32'}"
        return np.memmap(file, dtype=dtype, mode="r", shape=shape)

    def weights(self):
        """gate, up and down of the experts."""
        E, f, d = self.E, self.f, self.d
        return self.array("gate", E, f, d), self.array("up", E, f, d), self.array("down", E, d, f)

    def plan(self):
        """x, expert and weight of all batches."""
        n, T = self.batches, self.tokens
        return (self.array("x", n, T, self.d), self.array("expert", n, T, self.k, dtype=np.int32),
                self.array("weight", n, T, self.k))

    def copies(self, size):
        """How many copies of so many bytes there are to be: `rotate` bytes of others lie between two uses of one."""
        return 1 + math.ceil(self.rotate / size)

    def refuse_unless(self, *types):
        if self.type not in types:
            raise Refusal(f"has no {self.type}, only {', '.join(types)}")


def bf16_bits(values):
    """Rounded to nearest even, as uint16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def from_bf16_bits(bits):
    return (bits.astype(np.uint32) << 16).view(np.float32)


def quantised(rows, block, bits):
    """Symmetric: codes of -2^(bits-1)+1 .. 2^(bits-1)-1 and a scale for every `block` of the last axis."""
    top = 2 ** (bits - 1) - 1
    cut = np.asarray(rows).reshape(*rows.shape[:-1], -1, block)
    scale = np.maximum(np.abs(cut).max(-1), 1e-20).astype(np.float32) / top
    return np.rint(cut / scale[..., None]).astype(np.int8).reshape(rows.shape), scale


def reason(error):
    text = str(error).strip().splitlines()
    return (text[0] if isinstance(error, Refusal) else f"{type(error).__name__}: {text[0] if text else ''}")[:300]


def answer_lines(peer, case, say):
    for line in sys.stdin:
        word, *numbers = line.split()
        numbers = [int(n) for n in numbers]
        if word == "batches":
            case.batches, case.tokens, case.threads = numbers
            peer.prepare()
            say("ok")
        elif word == "run":
            peer.run(numbers[0])
            np.ascontiguousarray(peer.result(numbers[0]), np.float32).tofile(case.folder / "y.f32")
            say("ok")
        elif word == "go":
            first, count = numbers
            start = time.perf_counter()
            for i in range(first, first + count):
                peer.run(i % case.batches)
            say(f"{time.perf_counter() - start:.9f}")


def serve(make):
    """Answers for the peer make(case), which has the attributes bytes and version and
    prepare()   for the batches that the case has now
    run(i)      computes batch i
    result(i)   what that came to
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(text):
        answers.write(text + "\n")
        answers.flush()

    try:
        case = Case(sys.argv[1])
        peer = make(case)
        say(f"ready {peer.bytes} {peer.version}")
        answer_lines(peer, case, say)
    except Exception as error:  # whatever a library throws is the reason why the peer cannot go on
        say("refused " + reason(error))
        raise
