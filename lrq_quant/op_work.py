"""How much a forward asks of the ops of lrq, of attention and of other products: operations and
bytes, counted as the ops are called."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from .kernel_families import (
    ATTENTION,
    OTHER_GEMM,
    OUR_A16,
    OUR_GEMM,
    OUR_QK,
    OUR_QUANTIZATION,
)

_KIND = {
    "gemm": OUR_GEMM,
    "gemm_a16": OUR_A16,
    "gemv": OUR_A16,
    "rotate": OUR_QUANTIZATION,
    "rotate_quantize": OUR_QUANTIZATION,
    "concat_rotate_quantize": OUR_QUANTIZATION,
    "activation_rotate_quantize": OUR_QUANTIZATION,
    "norm_modulate_rotate_quantize": OUR_QUANTIZATION,
    "qk_norm_rope": OUR_QK,
    "qk_norm_rope_parts": OUR_QK,
}


@dataclass
class Work:
    """operations: multiplications and additions; bytes: of all operands and results, each once; 0
    where it is not known."""

    calls: int = 0
    operations: int = 0
    bytes: int = 0


class OpWork(TorchDispatchMode):
    """Counts while it is active. It sees calls from Python: nothing that is compiled or replayed.

    work: kind (kernel_families.counted_work) -> Work.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(func, torch._ops.OpOverload):  # a higher-order one, which has no schema
            return result
        kind, operations = None, 0
        if func.namespace == "lrq":
            kind = _KIND.get(func._opname)
            operations = _operations(dict(_named_arguments(func, args, kwargs or {})))
        elif "scaled_dot_product" in func._opname:
            kind, operations = ATTENTION, _attention_operations(*args[:3])
        elif func.overloadpacket in flop_registry:
            count = flop_registry[func.overloadpacket]
            kind, operations = OTHER_GEMM, count(*args, **(kwargs or {}), out_val=result)
        if kind is not None:
            work = self.work.setdefault(kind, Work())
            work.calls += 1
            work.operations += operations
            work.bytes += sum(_nbytes(leaf) for leaf in tree_leaves((args, kwargs, result)))
        return result


def _named_arguments(func: Any, args: Any, kwargs: Any) -> Iterator[tuple[str, Any]]:
    yield from zip((argument.name for argument in func._schema.arguments), args, strict=False)
    yield from kwargs.items()


def _operations(given: dict[str, Any]) -> int:
    """2 M N K of a product, 0 of what has no out_features: a rotation is bound by its bytes."""
    if "out_features" not in given:
        return 0
    x = given["x_q"] if "x_q" in given else given["x"]
    return 2 * x.numel() * given["out_features"]


def _attention_operations(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Of both products, [B, H, S, D] each; a mask leaves none out."""
    rows = query.numel() // query.shape[-1]
    return 2 * rows * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _nbytes(leaf: Any) -> int:
    return leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else 0


@torch.no_grad()
def count_work(model: torch.nn.Module, inputs: dict[str, Any]) -> dict[str, Work]:
    """Of one forward, which runs."""
    with OpWork() as counted:
        model(**inputs, return_dict=False)
    return counted.work
