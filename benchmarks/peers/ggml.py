# SPDX-License-Identifier: Apache-2.0
"""ggml, the library of products under llama.cpp, through ctypes: what a graph of a few nodes on the CPU needs.

MOE_GGML names the folder of its shared libraries: install.py builds llama.cpp's from the source that llama-cpp-python carries;
ik_llama.cpp's is one that somebody has built.
"""
import ctypes
import os
import pathlib

import numpy as np

F32, F16, Q4_0, Q8_0, I32, BF16, TQ2_0 = 0, 1, 2, 8, 26, 30, 35
TYPES = {"f32": F32, "f16": F16, "bf16": BF16, "int8": Q8_0, "int4": Q4_0, "ternary": TQ2_0}
POINTER, LONG, INT, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_size_t, ctypes.c_float

files = [pathlib.Path(os.environ["MOE_GGML"]) / f"libggml{part}.so" for part in ("-base", "-cpu", "")]
libraries = [ctypes.CDLL(str(file), ctypes.RTLD_GLOBAL) for file in files if file.exists()]


class InitParams(ctypes.Structure):
    _fields_ = [("size", SIZE), ("buffer", POINTER), ("no_alloc", ctypes.c_bool)]


def function(name, result, *arguments):
    """What this build lacks fails where it is called."""
    for library in libraries:
        if hasattr(library, name):
            call = getattr(library, name)
            call.restype, call.argtypes = result, arguments
            return call

    def lack(*_):
        raise ImportError(f"ggml lacks {name}")

    return lack


_version = function("ggml_version", ctypes.c_char_p)
_commit = function("ggml_commit", ctypes.c_char_p)
_init = function("ggml_init", POINTER, InitParams)
_tensor_overhead = function("ggml_tensor_overhead", SIZE)
_graph_overhead = function("ggml_graph_overhead", SIZE)
_new_tensor = function("ggml_new_tensor", POINTER, POINTER, INT, INT, ctypes.POINTER(LONG))
_data = function("ggml_get_data", POINTER, POINTER)
_bytes = function("ggml_nbytes", SIZE, POINTER)
_row_bytes = function("ggml_row_size", SIZE, INT, LONG)
# ik_llama.cpp's takes one argument more, which llama.cpp's ignores.
_quantize = function("ggml_quantize_chunk", SIZE, INT, POINTER, POINTER, LONG, LONG, LONG, POINTER, POINTER)
_new_graph = function("ggml_new_graph", POINTER, POINTER)
_expand = function("ggml_build_forward_expand", None, POINTER, POINTER)
_cpu_init = function("ggml_backend_cpu_init", POINTER)
_set_threads = function("ggml_backend_cpu_set_n_threads", None, POINTER, INT)
_compute = function("ggml_backend_graph_compute", INT, POINTER, POINTER)
_alloc_context = function("ggml_backend_alloc_ctx_tensors_from_buft", POINTER, POINTER, POINTER)
_cpu_buffers = function("ggml_backend_cpu_buffer_type", POINTER)
_tensor_set = function("ggml_backend_tensor_set", None, POINTER, POINTER, SIZE, SIZE)
_device = function("ggml_backend_get_device", POINTER, POINTER)
_registry = function("ggml_backend_dev_backend_reg", POINTER, POINTER)
_address = function("ggml_backend_reg_get_proc_address", POINTER, POINTER, ctypes.c_char_p)
_supports = function("ggml_backend_dev_supports_op", ctypes.c_bool, POINTER, POINTER)
_buffer_init = function("ggml_backend_buft_alloc_buffer", POINTER, POINTER, SIZE)
_buffer_free = function("ggml_backend_buffer_free", None, POINTER)
_new_allocator = function("ggml_gallocr_new", POINTER, POINTER)
_free_allocator = function("ggml_gallocr_free", None, POINTER)
_alloc_graph = function("ggml_gallocr_alloc_graph", ctypes.c_bool, POINTER, POINTER)
_free = function("ggml_free", None, POINTER)

mul_mat_id = function("ggml_mul_mat_id", POINTER, POINTER, POINTER, POINTER, POINTER)
swiglu_split = function("ggml_swiglu_split", POINTER, POINTER, POINTER, POINTER)
mul = function("ggml_mul", POINTER, POINTER, POINTER, POINTER)
add = function("ggml_add", POINTER, POINTER, POINTER, POINTER)
permute = function("ggml_permute", POINTER, POINTER, POINTER, INT, INT, INT, INT)
view_2d = function("ggml_view_2d", POINTER, POINTER, POINTER, LONG, LONG, SIZE, SIZE)
view_3d = function("ggml_view_3d", POINTER, POINTER, POINTER, LONG, LONG, LONG, SIZE, SIZE, SIZE)
_set_precision = function("ggml_prec_set_acc", ctypes.c_bool, POINTER, INT)
flash_attention = function("ggml_flash_attn_ext", POINTER, POINTER, POINTER, POINTER, POINTER, POINTER, FLOAT, FLOAT, FLOAT)


def release():
    return f"ggml {_version().decode()} ({_commit().decode().removesuffix('-dirty')})"


def accumulate_in_float(node):
    _set_precision(node, 10)  # GGML_PREC_F32


def context(nodes):
    """Room for so many tensors, without their data, and a graph."""
    ctx = _init(InitParams(nodes * _tensor_overhead() + _graph_overhead(), None, True))
    if not ctx:
        raise MemoryError("ggml has no more contexts")
    return ctx


def tensor(ctx, kind, *shape):
    """`shape` as NumPy has it; ggml's order is the reverse."""
    return _new_tensor(ctx, kind, len(shape), (LONG * len(shape))(*reversed(shape)))


def encoded(rows, kind):
    """float32 rows as the bytes of that type."""
    rows = np.ascontiguousarray(rows, np.float32)
    flat = rows.reshape(-1, rows.shape[-1])
    to = np.empty(len(flat) * _row_bytes(kind, flat.shape[1]), np.uint8)
    if kind == F32:
        return rows.view(np.uint8).reshape(-1)
    _quantize(kind, flat.ctypes.data, to.ctypes.data, 0, len(flat), flat.shape[1], None, None)
    return to


def fill(to, data):
    data = np.ascontiguousarray(data)
    _tensor_set(to, data.ctypes.data, 0, data.nbytes)


def kind(w):
    """The type of a tensor, as in TYPES."""
    return ctypes.cast(w, ctypes.POINTER(INT))[0]


class Backend:
    """The CPU, and the arrangements of weights that it offers beside the plain one."""

    def __init__(self):
        self.handle, self.plain = _cpu_init(), _cpu_buffers()

    def arrangements(self, device):
        find = _address(_registry(device), b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(ctypes.POINTER(POINTER), POINTER)(find)(device) if find else []
        kinds = []
        while extra and extra[len(kinds)]:
            kinds.append(extra[len(kinds)])
        return kinds

    def weights(self, product, kind, *shape):
        """A tensor of weights in the first arrangement with which the node product(ctx, weights) is done, as llama.cpp
        chooses when it loads a model."""
        device = _device(self.handle)
        for buffers in self.arrangements(device):
            ctx = context(8)
            w = tensor(ctx, kind, *shape)
            probe = _buffer_init(buffers, 0)
            ctypes.cast(w + POINTER_TO_BUFFER, ctypes.POINTER(POINTER))[0] = probe
            supported = _supports(device, product(ctx, w))
            _buffer_free(probe)
            _free(ctx)
            if supported:
                return self.place(buffers, kind, *shape)
        return self.place(self.plain, kind, *shape)

    def place(self, buffers, kind, *shape):
        ctx = context(1)
        w = tensor(ctx, kind, *shape)
        if not _alloc_context(ctx, buffers):
            raise MemoryError("ggml could not allocate weights")
        return w

    def threads(self, count):
        _set_threads(self.handle, count)

    def compute(self, graph):
        if _compute(self.handle, graph) != 0:
            raise RuntimeError("ggml could not compute the graph")


POINTER_TO_BUFFER = 8  # of a tensor: its type, then its buffer


class Graphs:
    """Graphs of equal shape, one for every batch, which share the memory of what lies between input and output."""

    def __init__(self, backend):
        self.backend, self.allocator, self.graphs, self.keep = backend, _new_allocator(backend.plain), [], []

    def inputs(self, *kinds_and_shapes):
        """Tensors with memory of their own."""
        ctx = context(len(kinds_and_shapes))
        tensors = [tensor(ctx, kind, *shape) for kind, shape in kinds_and_shapes]
        self.keep.append((ctx, _alloc_context(ctx, self.backend.plain)))
        return tensors

    def append(self, build):
        """`build(ctx)` returns the last node."""
        ctx = context(64)
        last, graph = build(ctx), _new_graph(ctx)
        _expand(graph, last)
        if not _alloc_graph(self.allocator, graph):
            raise MemoryError("ggml could not allocate the graph")
        self.graphs.append((graph, last))
        self.keep.append((ctx, None))

    def run(self, i):
        self.backend.compute(self.graphs[i][0])

    def result(self, i, *shape):
        last = self.graphs[i][1]
        size = _bytes(last) // 4
        return np.ctypeslib.as_array(ctypes.cast(_data(last), ctypes.POINTER(FLOAT)), (size,)).reshape(shape)

    def free(self):
        for ctx, buffer in self.keep:
            if buffer:
                _buffer_free(buffer)
            _free(ctx)
        _free_allocator(self.allocator)
