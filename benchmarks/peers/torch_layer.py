#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""PyTorch: a loop over the experts that have tokens, as the models of its ecosystem write it on a CPU; rows are grouped by
one sort. float32 through MKL, bf16 and f16 through its oneDNN; int8 as dynamically quantised linear layers; four bits as its
weight-only product of groups. It is handed the plan, so it does not run the router.
"""
import numpy as np
import torch
import torch.nn.functional as F

from peer import Case, quantised, serve


class Float:
    """A bank of matrices [E,N,K] in a float type."""

    def __init__(self, rows, dtype):
        self.w = torch.from_numpy(np.array(rows)).to(dtype)
        self.bytes = self.w.nbytes

    def copy(self):
        twin = object.__new__(Float)
        twin.w, twin.bytes = self.w.clone(), self.bytes
        return twin

    def product(self, x, expert):
        return F.linear(x, self.w[expert])


class Int8:
    """Weights as bytes by row, tokens as bytes on the way: what quantize_dynamic makes of a linear layer."""

    def __init__(self, rows):
        torch.backends.quantized.engine = "x86" if "x86" in torch.backends.quantized.supported_engines else "fbgemm"
        codes, scales = quantised(rows, rows.shape[-1], 8)
        self.codes, self.scales = codes, scales.reshape(rows.shape[:-1]).astype(np.float64)
        self.bytes = codes.nbytes
        self.pack()

    def pack(self):
        self.w = [torch.ops.quantized.linear_prepack(torch._make_per_channel_quantized_tensor(
            torch.from_numpy(c), torch.from_numpy(s), torch.zeros(len(s), dtype=torch.long), 0), None)
            for c, s in zip(self.codes, self.scales)]

    def copy(self):
        twin = object.__new__(Int8)
        twin.codes, twin.scales, twin.bytes = self.codes, self.scales, self.bytes
        twin.pack()
        return twin

    def product(self, x, expert):
        return torch.ops.quantized.linear_dynamic(x, self.w[expert])


class Int4:
    """Groups of 32 with bf16 scales and bf16 tokens."""

    group = 32

    def __init__(self, rows):
        self.rows = rows.shape[1]
        self.w, self.scales = [], []
        for matrix in rows:
            codes, scale = quantised(matrix, self.group, 4)
            codes = torch.from_numpy(codes.astype(np.int32) + 8)
            self.w.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
            self.scales.append(torch.from_numpy(np.stack([scale.T, np.zeros_like(scale.T)], -1).copy()).bfloat16())
        self.bytes = sum(t.nbytes for t in self.w + self.scales)

    def copy(self):
        twin = object.__new__(Int4)
        twin.rows, twin.bytes = self.rows, self.bytes
        twin.w, twin.scales = [t.clone() for t in self.w], [t.clone() for t in self.scales]
        return twin

    def product(self, x, expert):
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.w[expert], self.group, self.scales[expert])


TYPES = {"f32": (torch.float32, None), "bf16": (torch.bfloat16, None), "f16": (torch.float16, None),
         "int8": (torch.float32, Int8), "int4": (torch.bfloat16, Int4)}


class TorchLayer:
    def __init__(self, case: Case):
        torch.set_grad_enabled(False)
        case.refuse_unless(*TYPES)
        self.case, (self.dtype, quantised_bank) = case, TYPES[case.type]
        gate, up, down = case.weights()
        bank = quantised_bank or (lambda rows: Float(rows, self.dtype))
        first = bank(np.concatenate([gate, up], 1)), bank(down)
        size = sum(b.bytes for b in first)
        self.layers = [first] + [tuple(b.copy() for b in first) for _ in range(case.copies(size) - 1)]
        self.bytes, self.version = size * len(self.layers), torch.__version__

    def prepare(self):
        torch.set_num_threads(self.case.threads)
        x, expert, weight = self.case.plan()
        self.x = torch.from_numpy(np.array(x)).to(self.dtype)
        self.expert = torch.from_numpy(np.array(expert)).long()
        self.weight = torch.from_numpy(np.array(weight)).to(self.dtype)

    def run(self, i):
        gate_up, down = self.layers[i % len(self.layers)]
        x, f = self.x[i], self.case.f
        choices = self.expert[i].flatten()
        order = choices.argsort(stable=True)
        counts = torch.bincount(choices, minlength=self.case.E).tolist()
        token, weight = order // self.case.k, self.weight[i].flatten()[order, None]
        rows, self.y, start = x[token], torch.zeros_like(x), 0
        for expert, count in enumerate(counts):
            if count == 0:
                continue
            here = slice(start, start + count)
            z = gate_up.product(rows[here], expert)
            a = F.silu(z[:, :f]) * z[:, f:]
            self.y.index_add_(0, token[here], down.product(a, expert) * weight[here])
            start += count

    def result(self, _):
        return self.y.float().numpy()


if __name__ == "__main__":
    serve(TorchLayer)
