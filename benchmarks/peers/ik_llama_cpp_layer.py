#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""ik_llama.cpp: the nodes that it builds for a layer of experts (moe_up_gate, mul_mat_id for down, mul_multi_add), run by its own
ggml. int8 is q8_0, four bits q4_0, ternary iq2_bn; MOE_IK_REPACK=1 interleaves the rows of the weights, as its `-rtr` does when
it loads a model. It is handed the plan, so it does not run the router.
"""
import os

import ggml
from llama_cpp_layer import LlamaLayer
from peer import serve

SILU, IQ2_BN = 10, 135
_type_name = ggml.function("ggml_type_name", ggml.ctypes.c_char_p, ggml.INT)
_repack = ggml.function("iqk_repack_tensor", None, ggml.POINTER)
_up_gate = ggml.function("ggml_moe_up_gate", *[ggml.POINTER] * 6, ggml.INT)
_mul_multi_add = ggml.function("ggml_mul_multi_add", *[ggml.POINTER] * 4)


class IkLayer(LlamaLayer):
    kinds = {**ggml.TYPES, "ternary": IQ2_BN}

    def place(self, data, rows, columns):
        w = self.backend.place(self.backend.plain, self.kind, self.case.E, rows, columns)
        ggml.fill(w, data)
        if os.environ.get("MOE_IK_REPACK") == "1":
            _repack(w)
        return w

    def release(self, w):
        return "ik_llama.cpp's ggml, " + _type_name(ggml.kind(w)).decode()

    def nodes(self, ctx, layer, x, expert, weight):
        gate, up, down = layer
        a = _up_gate(ctx, up, gate, x, expert, SILU)
        return _mul_multi_add(ctx, ggml.mul_mat_id(ctx, down, a, expert), weight)


if __name__ == "__main__":
    serve(IkLayer)
