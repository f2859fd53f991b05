#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's MoE operator (float32) and QMoE operator (int8 and four bits, by blocks, tokens as bytes), each layer a
model of that one operator. They choose experts from logits themselves: they are handed the logarithms of the plan's weights.
"""
import numpy as np
import onnxruntime
from onnx import TensorProto, helper

from peer import Case, quantised, serve

BITS = {"int8": 8, "int4": 4}
BLOCKS = {"int8": 128, "int4": 32}


def packed(rows, bits, block):
    """Codes around 2^(bits-1) as bytes, two to a byte where they have four bits, and the scales of their blocks."""
    codes, scales = quantised(rows, block, bits)
    codes = (codes.astype(np.int16) + (1 << bits - 1)).astype(np.uint8)
    return (codes[..., ::2] | codes[..., 1::2] << 4 if bits == 4 else codes), scales


def block_of(case):
    block = BLOCKS[case.type]
    while case.d % block or case.f % block:
        block //= 2
    return block


def operator(case):
    """The node, and its weights by name."""
    gate, up, down = case.weights()
    both = np.concatenate([np.stack([g, u], 1).reshape(-1, case.d)[None] for g, u in zip(gate, up)])  # rows of both in turn
    common = dict(domain="com.microsoft", k=case.k, activation_type="swiglu", activation_alpha=1.0, activation_beta=0.0,
                  swiglu_fusion=1, normalize_routing_weights=1)
    if case.type == "f32":
        return (helper.make_node("MoE", ["x", "logits", "up", "", "down"], ["y"], **common),
                {"up": both, "down": np.array(down)})
    bits, block = BITS[case.type], block_of(case)
    (w1, s1), (w2, s2) = packed(both, bits, block), packed(down, bits, block)
    return (helper.make_node("QMoE", ["x", "logits", "up", "up_scales", "", "down", "down_scales"], ["y"],
                             expert_weight_bits=bits, block_size=block, accuracy_level=4, **common),
            {"up": w1, "up_scales": s1, "down": w2, "down_scales": s2})


class OnnxLayer:
    def __init__(self, case: Case):
        case.refuse_unless("f32", *BITS)
        self.case, self.sessions, self.threads = case, [], 0
        node, weights = operator(case)
        size = sum(w.nbytes for w in weights.values())
        self.layers = [{name: np.array(w) for name, w in weights.items()} for _ in range(case.copies(size))]
        self.bytes, self.version = size * len(self.layers), onnxruntime.__version__
        self.model = self.model_of(node, weights)

    def model_of(self, node, weights):
        """Without the numbers: each session is handed its own, so that copies do not share memory."""
        tensors = []
        for name, w in weights.items():
            kind = helper.np_dtype_to_tensor_dtype(w.dtype)
            tensors.append(TensorProto(name=name, data_type=kind, dims=w.shape, data_location=TensorProto.EXTERNAL))
            tensors[-1].external_data.add(key="location", value="handed over")
        rows = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["T", columns])
                for name, columns in (("x", self.case.d), ("logits", self.case.E), ("y", self.case.d))]
        graph = helper.make_graph([node], "layer", rows[:2], rows[2:], tensors)
        operators = [helper.make_opsetid(domain, version) for domain, version in (("", 20), ("com.microsoft", 1))]
        model = helper.make_model(graph, opset_imports=operators)
        model.ir_version = 9
        return model.SerializeToString()

    def session(self, weights):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.add_external_initializers(list(weights), [onnxruntime.OrtValue.ortvalue_from_numpy(w) for w in weights.values()])
        return onnxruntime.InferenceSession(self.model, options, providers=["CPUExecutionProvider"])

    def prepare(self):
        case = self.case
        if self.threads != case.threads:
            self.threads, self.sessions = case.threads, []
            self.sessions = [self.session(weights) for weights in self.layers]
        x, expert, weight = case.plan()
        logits = np.full((case.batches, case.tokens, case.E), -1e4, np.float32)
        np.put_along_axis(logits, expert.astype(np.int64), np.log(np.maximum(weight, 1e-30)), 2)
        self.feeds = [{"x": np.array(a), "logits": b} for a, b in zip(x, logits)]

    def run(self, i):
        self.y = self.sessions[i % len(self.sessions)].run(None, self.feeds[i])[0]

    def result(self, _):
        return self.y


if __name__ == "__main__":
    serve(OnnxLayer)
