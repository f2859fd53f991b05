# SPDX-License-Identifier: Apache-2.0
"""Writes reference.safetensors with the format's reference implementation (Python packages safetensors 0.8, numpy)."""
import pathlib

import numpy
import safetensors

tensors = {
    "scalar": ("float32", [], numpy.array([2.5], "<f4")),
    "vector.f32": ("float32", [5], numpy.array([1, -2, 0.5, 3e38, -0.0], "<f4")),
    "matrix.f32": ("float32", [2, 3], numpy.array([1, 2, 3, 4, 5, 6], "<f4")),
    "stack.bf16": ("bfloat16", [2, 2, 3], (numpy.arange(12, dtype="<f4") / 4 - 1).view("<u4") >> 16),
    "matrix.f16": ("float16", [3, 2], numpy.array([0.1, -65504, 6e-8, 1, numpy.inf, 2], "<f2")),
    "codes.i8": ("int8", [1, 3], numpy.array([-128, 0, 127], "i1")),
    "ids.i32": ("int32", [4], numpy.array([-(2**31), -1, 0, 2**31 - 1], "<i4")),
    "ids.i64": ("int64", [2], numpy.array([-(2**63), 2**63 - 1], "<i8")),
    "mask.bool": ("bool", [3], numpy.array([1, 0, 1], "?")),
    "raw.u8": ("uint8", [2, 2], numpy.array([0, 1, 254, 255], "u1")),
    "raw.f64": ("float64", [1], numpy.array([0.1], "<f8")),
    "empty": ("float32", [0, 4], numpy.array([], "<f4")),
    "n\u00e4me \"quoted\"\\\t\x01 \U0001f600": ("int16", [1], numpy.array([-7], "<i2")),
}
specs = {}
for name, (dtype, shape, values) in tensors.items():
    if dtype == "bfloat16":
        values = values.astype("<u2")
    tensors[name] = values  # the specification below only borrows the bytes
    specs[name] = safetensors.TensorSpec(dtype=dtype, shape=shape, data_ptr=values.ctypes.data, data_len=values.nbytes)
safetensors.serialize_file(specs, pathlib.Path(__file__).with_name("reference.safetensors"), {"format": "moe \"golden\"\n\u00e9"})
