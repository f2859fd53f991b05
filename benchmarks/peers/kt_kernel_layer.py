#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""kt-kernel, the CPU experts of ktransformers: AMXBF16_MOE, AMXInt8_MOE and AMXInt4_MOE (bytes and four bits by row), which
run on AVX-512 where there is no AMX; the package loads what fits the processor. It is handed the plan, so it does not run
the router.

A dispatcher spins beside its workers. Where those are as many as the cores, every wait of a small batch takes a time slice:
small batches get one worker fewer, which is faster, and large ones get all.
"""
import numpy as np
import torch
import kt_kernel
from kt_kernel import kt_kernel_ext as kt

from peer import Case, Refusal, bf16_bits, from_bf16_bits, serve

CLASSES = {"bf16": "AMXBF16_MOE", "int8": "AMXInt8_MOE", "int4": "AMXInt4_MOE"}
BYTES = {"bf16": 2, "int8": 1, "int4": 0.5}
LONGEST = 4096  # tokens of a call
SMALL = 64  # tokens of a small batch


class KtLayer:
    def __init__(self, case: Case):
        case.refuse_unless(*CLASSES)
        kind = getattr(kt.moe, CLASSES[case.type], None)
        if kind is None:
            raise Refusal(f"has no {CLASSES[case.type]} for this processor, where it loads {kt_kernel.__cpu_variant__}")
        self.case, self.kind, self.workers, self.infer, self.layers, self.tasks = case, kind, 0, None, [], []
        self.source = [bf16_bits(w) for w in case.weights()]
        self.on_device = np.zeros(case.E, np.bool_)
        self.order = np.arange(case.E, dtype=np.int64)
        self.count = case.copies(3 * case.E * case.d * case.f * BYTES[case.type])
        self.bytes = int(3 * case.E * case.d * case.f * BYTES[case.type]) * self.count
        self.version = f"{kt_kernel.__version__} ({kt_kernel.__cpu_variant__})"

    def start(self, workers):
        if workers == self.workers:
            return
        self.tasks, self.layers, self.infer = [], [], None
        pool = kt.WorkerPoolConfig()
        pool.subpool_count, pool.subpool_numa_map, pool.subpool_thread_count = 1, [0], [workers]
        self.infer, self.workers = kt.CPUInfer(pool), workers
        self.layers = [self.load(i) for i in range(self.count)]

    def load(self, i):
        case = self.case
        config = kt.moe.MOEConfig(case.E, case.k, case.d, case.f, self.on_device.ctypes.data)
        config.layer_idx, config.pool, config.max_len = i, self.infer.backend_, LONGEST
        gate, up, down = self.source
        if case.type == "bf16":
            config.gate_projs, config.up_projs, config.down_projs = ([[e.ctypes.data for e in w]] for w in self.source)
        config.gate_proj, config.up_proj, config.down_proj = gate.ctypes.data, up.ctypes.data, down.ctypes.data
        layer = self.kind(config)
        self.infer.submit(layer.load_weights_task(self.order.ctypes.data))
        self.infer.sync()
        return layer

    def prepare(self):
        case = self.case
        self.start(max(1, case.threads - 1) if case.tokens <= SMALL else case.threads)
        x, expert, weight = case.plan()
        self.x, self.expert, self.weight = bf16_bits(x), np.array(expert).astype(np.int64), np.array(weight)
        self.y, self.size = np.empty((case.tokens, case.d), np.uint16), np.array([case.tokens], np.int32)
        self.tasks = [self.layers[i % self.count].forward_task(
            self.size.ctypes.data, case.k, self.expert[i].ctypes.data, self.weight[i].ctypes.data, self.x[i].ctypes.data,
            self.y.ctypes.data, False) for i in range(case.batches)]

    def run(self, i):
        self.infer.submit(self.tasks[i])
        self.infer.sync()

    def result(self, _):
        return from_bf16_bits(self.y)


if __name__ == "__main__":
    serve(KtLayer)
