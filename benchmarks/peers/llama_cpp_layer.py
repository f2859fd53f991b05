#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: the nodes that it builds for a layer of experts (mul_mat_id for up, gate and down, swiglu_split, mul, a sum of
views), run by ggml's CPU backend, weights arranged as it would arrange them when it loads a model. int8 is q8_0, four bits
q4_0, ternary tq2_0. It is handed the plan, so it does not run the router.
"""
import numpy as np

import ggml
from peer import Case, serve


class LlamaLayer:
    kinds = ggml.TYPES

    def __init__(self, case: Case):
        case.refuse_unless(*self.kinds)
        self.case, self.kind, self.backend, self.graphs = case, self.kinds[case.type], ggml.Backend(), None
        gate, up, down = (ggml.encoded(w, self.kind) for w in case.weights())
        size = gate.nbytes + up.nbytes + down.nbytes
        self.layers = [(self.place(gate, case.f, case.d), self.place(up, case.f, case.d), self.place(down, case.d, case.f))
                       for _ in range(case.copies(size))]
        self.bytes = size * len(self.layers)
        self.version = self.release(self.layers[0][0])

    def release(self, _):
        return ggml.release()

    def place(self, data, rows, columns):
        case = self.case

        def product(ctx, w):
            x, choice = ggml.tensor(ctx, ggml.F32, 512, case.k, columns), ggml.tensor(ctx, ggml.I32, 512, case.k)
            return ggml.mul_mat_id(ctx, w, x, choice)

        w = self.backend.weights(product, self.kind, case.E, rows, columns)
        ggml.fill(w, data)
        return w

    def prepare(self):
        case, T = self.case, self.case.tokens
        self.backend.threads(case.threads)
        if self.graphs:
            self.graphs.free()
        self.graphs = ggml.Graphs(self.backend)
        for i, (x, expert, weight) in enumerate(zip(*case.plan())):
            inputs = self.graphs.inputs((ggml.F32, (T, 1, case.d)), (ggml.I32, (T, case.k)), (ggml.F32, (T, case.k, 1)))
            for to, data in zip(inputs, (x, expert, weight)):
                ggml.fill(to, data)
            self.graphs.append(lambda ctx: self.nodes(ctx, self.layers[i % len(self.layers)], *inputs))

    def nodes(self, ctx, layer, x, expert, weight):
        gate, up, down = layer
        d, T = self.case.d, self.case.tokens
        a = ggml.swiglu_split(ctx, ggml.mul_mat_id(ctx, gate, x, expert), ggml.mul_mat_id(ctx, up, x, expert))
        ys = ggml.mul(ctx, ggml.mul_mat_id(ctx, down, a, expert), weight)
        columns = [ggml.view_2d(ctx, ys, d, T, 4 * d * self.case.k, 4 * d * j) for j in range(self.case.k)]
        y = columns[0]
        for column in columns[1:]:
            y = ggml.add(ctx, y, column)
        return y

    def run(self, i):
        self.graphs.run(i)

    def result(self, i):
        case = self.case
        y = self.graphs.result(i, case.tokens, case.d)
        return np.array(y)


if __name__ == "__main__":
    serve(LlamaLayer)
