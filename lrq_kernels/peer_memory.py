"""Exchange among the GPUs of one host: each process writes into the memory of the others, then all
wait for each other on the GPU (torch's symmetric memory). No copy before or after, no host, and
unlike NCCL's exchange a CUDA graph can hold it.

    heads    q, k, v of my tokens, all heads     -> to each peer its heads          (send_heads)
    tokens   attention of all tokens, my heads   -> to each peer its tokens         (send_tokens)

What is sent lands in an Inbox of the peer, which a later message overwrites: see inbox().
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from . import op_checks
from .qk_norm_rope import write_parts

_logger = logging.getLogger(__name__)
# Anything but "0" or nothing: NCCL exchanges. For comparisons, and where this fails.
OFF_VARIABLE = "LRQ_NO_PEER_MEMORY"
_available: dict[Any, str | None] = {}
_memories: dict[tuple[Any, str, int, torch.device], _Memory] = {}


class Inbox(NamedTuple):
    """mine [W, ...] or [B, T, W, ...]: what arrives, by rank of the sender; offsets int64 [W]: from
    there to the same of each peer, in elements; wait(): until all have sent theirs."""

    mine: Tensor
    offsets: Tensor
    memory: _Memory

    def wait(self) -> None:
        self.memory.handle.barrier()


class _Memory:
    """Memory of one size in each process of a group."""

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(buffer, group)
        self._offsets: dict[int, Tensor] = {}

    def inbox(self, shape: tuple[int, ...], dtype: torch.dtype) -> Inbox:
        handle = self.handle
        if dtype.itemsize not in self._offsets:
            peers = [handle.get_buffer(rank, shape, dtype) for rank in range(handle.world_size)]
            mine = peers[handle.rank].data_ptr()
            offsets = [(peer.data_ptr() - mine) // dtype.itemsize for peer in peers]
            self._offsets[dtype.itemsize] = torch.tensor(offsets, device=peers[handle.rank].device)
        mine = handle.get_buffer(handle.rank, shape, dtype)
        return Inbox(mine, self._offsets[dtype.itemsize], self)


def obstacle(group: Any) -> str | None:
    """Why the processes of `group` cannot write into each other's memory, None where they can. All
    of them call it; the first call communicates."""
    if group not in _available:
        host = Path("/proc/sys/kernel/random/boot_id")
        mine = (host.read_text() if host.exists() else None, _own_obstacle())
        all_of_them: list[Any] = [None] * group.size()
        distributed.all_gather_object(all_of_them, mine, group=group)
        hosts, obstacles = zip(*all_of_them, strict=True)
        found = next(filter(None, obstacles), None)
        if found is None and (None in hosts or len(set(hosts)) > 1):
            found = "the processes are not on one host"
        if found is not None:
            _logger.warning("tokens are exchanged through NCCL: %s", found)
        _available[group] = found
    return _available[group]


def _own_obstacle() -> str | None:
    if os.environ.get(OFF_VARIABLE, "0") not in ("", "0"):
        return f"{OFF_VARIABLE} is set"
    if not torch.cuda.is_available():
        return "no GPU"
    device = torch.cuda.current_device()
    others = [other for other in range(torch.cuda.device_count()) if other != device]
    if not all(torch.cuda.can_device_access_peer(device, other) for other in others):
        return f"GPU {device} has no access to the memory of the others"
    return None


def inbox(
    group: Any, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Inbox:
    """Where messages for `use` arrive. All processes of `group` ask for the same.

    The next message for the same use may overwrite it, whatever its shape. So between two of them
    there must be one for another use: its wait() tells the others that the first was read. That
    holds for what runs in order, so one stream at a time. The first call of a size allocates, so it
    cannot be captured.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    size = triton.next_power_of_2(max(size, 1 << 16))  # few sizes, one memory each
    key = (group, use, size, device)
    if key not in _memories:
        _memories[key] = _Memory(group, size, device)
    return _memories[key].inbox(shape, dtype)


def send_heads(group: Any, *arguments: Any) -> Inbox:
    """ops.qk_norm_rope_parts of the arguments (from q to rope, then parts), each part written to
    the process whose heads it has. mine: [W, B, T, 3, H / W, D]."""
    *given, parts = arguments
    heads, tokens = op_checks.check_qk_norm_rope_parts(*arguments)
    q = given[0]
    op_checks.check_cuda_dtype("qk_norm_rope_parts", "q", q)
    shape = (parts, q.shape[0], tokens, 3, heads // parts, q.shape[2] // heads)
    arrives = inbox(group, "heads", shape, q.dtype, q.device)
    write_parts(given, arrives.mine[group.rank()], parts, arrives.offsets)
    return arrives


def send_tokens(group: Any, x: Tensor) -> Inbox:
    """x [B, W * T, C]: T tokens for each process. mine: [B, T, W, C]."""
    batch, tokens, channels = x.shape
    parts = group.size()
    shape = (batch, tokens // parts, parts, channels)
    arrives = inbox(group, "tokens", shape, x.dtype, x.device)
    write_tokens(x, arrives.mine, group.rank(), arrives.offsets)
    return arrives


def write_tokens(x: Tensor, mine: Tensor, rank: int, offsets: Tensor) -> None:
    """x [B, W * T, C] to [B, T, rank, C] of each of W tensors as mine [B, T, W, C]; offsets int64
    [W]: elements from mine to each, multiples of 16."""
    batch, tokens, parts, channels = mine.shape
    if mine.numel() == 0:
        return
    with torch.cuda.device_of(x):
        write_tokens_kernel[(batch * tokens * parts,)](
            x.contiguous(),
            mine,
            offsets,
            rank,
            tokens,
            CHANNELS=channels,
            PARTS=parts,
            BLOCK=triton.next_power_of_2(channels),
            num_warps=4,
        )


@triton.jit(do_not_specialize=["rank", "tokens"])
def write_tokens_kernel(
    x_ptr,  # [B, PARTS * tokens, CHANNELS]
    out_ptr,  # [B, tokens, PARTS, CHANNELS], of this process
    offsets_ptr,  # int64 [PARTS], from there to that of each process
    rank,
    tokens,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One token. Neighbours go to different processes: links are busy from the start to the end."""
    part, row = tl.program_id(0) % PARTS, (tl.program_id(0) // PARTS).to(tl.int64)
    sample, token = row // tokens, row % tokens
    columns = tl.arange(0, BLOCK)
    inside = columns < CHANNELS
    source = (sample * PARTS + part) * tokens + token
    x = tl.load(x_ptr + source * CHANNELS + columns, mask=inside)
    offset = tl.multiple_of(tl.load(offsets_ptr + part), 16)
    out = out_ptr + offset + (row * PARTS + rank) * CHANNELS
    tl.store(out + columns, x, mask=inside)
