"""What the parameters and buffers of a model take in memory, in all and by kind.

Each storage counts once, whole, however many tensors see it; a tensor subclass that wraps others
(torchao's quantized weights) counts as what it wraps.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lrq_kernels import InputQuantizer, LRQLinear

PACKED, LEVELS, ROTATIONS = "packed weights", "levels, scales, biases", "smoothing and rotations"
BRANCHES = "low-rank branches"
_KIND_OF_BUFFER = {
    (LRQLinear, "packed_weight"): PACKED,
    (LRQLinear, "levels"): LEVELS,
    (LRQLinear, "table_of_row"): LEVELS,
    (LRQLinear, "weight_scale"): LEVELS,
    (LRQLinear, "bias_bits"): LEVELS,
    (LRQLinear, "low_rank_up"): BRANCHES,
    (LRQLinear, "row_order"): ROTATIONS,
    (InputQuantizer, "channel_scale"): ROTATIONS,
    (InputQuantizer, "permutation"): ROTATIONS,
    (InputQuantizer, "folded_permutation"): ROTATIONS,
    (InputQuantizer, "matrices"): ROTATIONS,
    (InputQuantizer, "low_rank_down"): BRANCHES,
}


def tensor_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers."""
    return sum(memory_by_kind(model).values())


def memory_by_kind(model: nn.Module) -> dict[str, int]:
    """Kind -> bytes: of quantized linears packed weights, levels, rotations, low-rank branches; all
    else by its dtype, as "bfloat16"."""
    kinds: dict[str, int] = {}
    seen: set[tuple[torch.device, int]] = set()
    for module, name, tensor in _own_tensors(model):
        for plain in _plain_tensors(tensor):
            storage = plain.untyped_storage()
            # Without memory (meta, empty) there is no address to tell storages apart by.
            key = (plain.device, storage.data_ptr())
            if storage.data_ptr() == 0 or key in seen:
                continue
            seen.add(key)
            kind = _kind(module, name) or str(plain.dtype).removeprefix("torch.")
            kinds[kind] = kinds.get(kind, 0) + storage.nbytes()
    return kinds


def _own_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield module, name, tensor


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))


def _kind(module: nn.Module, name: str) -> str | None:
    for (owner, buffer), kind in _KIND_OF_BUFFER.items():
        if name == buffer and isinstance(module, owner):
            return kind
    return None
