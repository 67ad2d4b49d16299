"""Exchange among the GPUs of one host: each process writes into the memory of the others (torch's
symmetric memory) and waits for them on the GPU. Nothing but copies and one small kernel, so that a
CUDA graph can hold it, which replays of NCCL's exchange hang in.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, distributed

_buffers: dict[tuple[str, str, int, torch.device], Any] = {}


def is_one_host(group: Any) -> bool:
    """Whether torchrun started all processes of `group` on this host."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(distributed.get_world_size(group))


def exchange(x: Tensor, group: Any, use: str) -> Tensor:
    """x [W, ...], one part for each process, to what each process has for this one, [W, ...].

    The result is in memory that the next exchange for the same `use` and of as many bytes writes
    to. That must come after an exchange for another use: its wait tells the others that this one's
    result was read. All processes of `group` call it with the same shape; the first call allocates,
    so it cannot be captured.
    """
    x = x.contiguous()
    key = (group.group_name, use, x.nbytes, x.device)
    if key not in _buffers:
        from torch.distributed import _symmetric_memory as symmetric

        buffer = symmetric.empty(x.nbytes, dtype=torch.uint8, device=x.device)
        _buffers[key] = symmetric.rendezvous(buffer, group)
    handle = _buffers[key]
    for step in range(1, handle.world_size + 1):  # its own part last, while others are under way
        peer = (handle.rank + step) % handle.world_size
        handle.get_buffer(peer, x.shape, x.dtype)[handle.rank].copy_(x[peer])
    handle.barrier()
    return handle.get_buffer(handle.rank, x.shape, x.dtype)
