"""What LRQLinear.weight is: a tensor that knows its shape, dtype and device and has no values.

Code around a linear asks for weight.dtype and weight.device (PEFT places its adapters by them) and
also computes with the weight: PEFT merges into it, diffusers concatenates q, k and v. A zero-stride
tensor would let the second kind run on garbage and say nothing, so this one refuses by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PROPERTIES = (
    "shape dtype device layout ndim itemsize nbytes grad grad_fn is_leaf requires_grad names "
    "is_cpu is_cuda is_meta is_mps is_xpu is_nested is_quantized is_sparse is_sparse_csr "
    "is_mkldnn is_vulkan is_ipu is_xla is_maia is_mtia"
).split()
_METHODS = (
    "size dim ndimension numel nelement element_size stride storage_offset is_contiguous "
    "is_floating_point is_complex is_signed is_inference is_pinned get_device __len__"
).split()


def _without_values() -> set[Callable]:
    """Functions whose result depends on no value of the tensor."""
    known: set[Callable] = {torch.is_floating_point, torch.is_complex, torch.numel}
    for name in _PROPERTIES:
        if hasattr(Tensor, name):
            known.add(getattr(Tensor, name).__get__)
    return known | {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}


_ALLOWED = _without_values()
_RETURNS_ITSELF = {Tensor.data.__get__, Tensor.detach, Tensor.clone}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}


class WeightPlaceholder(Tensor):
    """Shape, dtype and device of a weight that is held as codes; anything else raises."""

    @staticmethod
    def of(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        empty = torch.empty((), dtype=dtype, device=device).expand(*shape)
        if torch.compiler.is_compiling():  # a traced graph may look at the dtype, nothing else
            return empty
        return empty.as_subclass(WeightPlaceholder)

    @classmethod
    def __torch_function__(
        cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func in _RETURNS_ITSELF:
            return args[0]
        if func in _MOVES:
            # Offloading moves all of a state dict; the like of it under the dtype and device asked.
            like = torch.empty(0, dtype=args[0].dtype, device=args[0].device)
            moved = func(like, *args[1:], **(kwargs or {}))
            return WeightPlaceholder.of(args[0].shape, moved.dtype, moved.device)
        if func in _ALLOWED:
            return super().__torch_function__(func, types, args, kwargs or {})
        name = getattr(func, "__qualname__", None) or getattr(func, "__name__", str(func))
        raise RuntimeError(
            f"LRQLinear.weight: {name} needs the values of a dense weight, and this linear holds "
            "codes. A LoRA stays beside it: do not fuse it (fuse_lora), and undo a fusion that got "
            "this far with unfuse_lora. q, k and v are fused by lrq_quant.fuse_projections(model). "
            "LRQLinear.dense_weight() makes the values"
        )

    def __deepcopy__(self, memo: dict) -> WeightPlaceholder:
        return self

    def __reduce_ex__(self, protocol: Any) -> Any:
        return make_placeholder, (tuple(self.shape), self.dtype, self.device)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"WeightPlaceholder({list(self.shape)}, dtype={self.dtype}, device={self.device})"


def make_placeholder(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """WeightPlaceholder.of, for pickle."""
    return WeightPlaceholder.of(shape, dtype, device)


# torch.save of a state dict writes it; torch.load(weights_only=True) may read it.
torch.serialization.add_safe_globals([make_placeholder])
