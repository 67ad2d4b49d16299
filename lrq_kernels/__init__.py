"""lrq_kernels: low-bit linears for diffusion transformers, at run time.

QuantScheme, TwinLogCodebook and Rotation describe a quantized linear; `ops` holds the torch ops
`lrq::*`; LRQLinear runs them; `checkpoint` is the file format and load_quantized puts a file into
a model. Importing needs torch and safetensors only: Triton is imported on the first CUDA call.
"""

from __future__ import annotations

from . import ops, reference
from .checkpoint import CheckpointError, LinearState, load, save
from .codebook import TwinLogCodebook
from .cuda_graph import graph, ungraph
from .input_quantizer import InputQuantizer, get_act_bits, set_act_bits
from .library import cuda_library_status, load_cuda_library
from .linear import LRQLinear, fuse_linears
from .loader import load_quantized, model_states
from .packing import pack_codes, unpack_codes
from .rotation import Rotation
from .scheme import QuantScheme
from .stacked_linear import StackedLinear, StackedRows, stack_linears

__all__ = [
    "CheckpointError",
    "InputQuantizer",
    "LRQLinear",
    "LinearState",
    "QuantScheme",
    "Rotation",
    "StackedLinear",
    "StackedRows",
    "TwinLogCodebook",
    "cuda_library_status",
    "fuse_linears",
    "get_act_bits",
    "graph",
    "load",
    "load_quantized",
    "model_states",
    "ops",
    "pack_codes",
    "reference",
    "save",
    "set_act_bits",
    "stack_linears",
    "ungraph",
    "unpack_codes",
]

load_cuda_library()
