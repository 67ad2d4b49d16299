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
import socket
import tempfile
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from . import op_checks
from .qk_norm_rope import write_parts

_logger = logging.getLogger(__name__)
# Anything but "0" or nothing: torch.distributed exchanges. For comparisons, and where this fails.
OFF_VARIABLE = "LRQ_NO_PEER_MEMORY"
# As NCCL's: then the GPU that waits stops with an error, rather than for ever.
WAIT_MS = 600_000
_SMALLEST = 1 << 16


class Inbox(NamedTuple):
    """mine [W, ...] or [B, T, W, ...]: what arrives, by rank of the sender; offsets int64 [W]: from
    there to the same of each peer, in elements; wait(): until all have sent theirs."""

    mine: Tensor
    offsets: Tensor
    memory: _Memory

    def wait(self) -> None:
        self.memory.handle.barrier(timeout_ms=WAIT_MS)


class _Memory:
    """Memory of one size in each process of a group. All of them make it."""

    def __init__(self, group: Any, size: int, device: torch.device) -> None:
        from torch.distributed import _symmetric_memory as symmetric

        self.size = size
        self._buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        self.handle = symmetric.rendezvous(self._buffer, group)
        self._offsets: dict[int, Tensor] = {}
        mine = self.handle.get_buffer(self.handle.rank, (size,), torch.uint8)
        if mine.data_ptr() != self._buffer.data_ptr():
            raise RuntimeError("torch put the buffer elsewhere than peers write to")

    def inbox(self, shape: tuple[int, ...], dtype: torch.dtype) -> Inbox:
        mine = self.handle.get_buffer(self.handle.rank, shape, dtype)
        offsets = self._offsets.get(dtype.itemsize)
        if offsets is None:
            offsets = self._offsets[dtype.itemsize] = self._to_peers(mine)
        return Inbox(mine, offsets, self)

    def _to_peers(self, mine: Tensor) -> Tensor:
        ranks = range(self.handle.world_size)
        peers = [self.handle.get_buffer(rank, mine.shape, mine.dtype) for rank in ranks]
        apart = [peer.data_ptr() - mine.data_ptr() for peer in peers]
        return torch.tensor([bytes_ // mine.itemsize for bytes_ in apart], device=mine.device)


class _Peers:
    """What is known of a group, which it does not keep. obstacle: why its processes cannot write
    into each other's memory."""

    def __init__(self, group: Any, device: torch.device) -> None:
        self.device = device
        self._memories: dict[tuple[str, int], _Memory] = {}
        self.obstacle = self._agreed(group, _own_obstacle(device))
        if self.obstacle is None:
            self.obstacle = self._agreed(group, self._probe(group))
        if self.obstacle is not None:
            _logger.warning("lrq exchanges through torch.distributed: %s", self.obstacle)

    def memory(self, group: Any, use: str, size: int) -> _Memory:
        if (use, size) not in self._memories:
            self._memories[use, size] = _Memory(group, size, self.device)
        return self._memories[use, size]

    def allocated_bytes(self) -> int:
        return sum(memory.size for memory in self._memories.values())

    def _agreed(self, group: Any, mine: str | None) -> str | None:
        """The first obstacle of any process: all decide alike."""
        everyone: list[Any] = [None] * group.size()
        with torch.cuda.device(self.device):
            facts = (mine, _place(), self.device.index)
            distributed.all_gather_object(everyone, facts, group=group)
        obstacles, places, devices = zip(*everyone, strict=True)
        if any(obstacles):
            return str(next(filter(None, obstacles)))
        if len(set(places)) > 1:
            return "the processes are not on one host, or in several containers"
        if len(set(devices)) < len(devices):  # torch tells GPUs apart by number
            return f"each process must see all GPUs, the processes call theirs {list(devices)}"
        return None

    def _probe(self, group: Any) -> str | None:
        try:
            self.memory(group, "probe", _SMALLEST)
        except RuntimeError as error:
            return f"torch's symmetric memory: {str(error).splitlines()[0]}"
        return None


_peers: WeakKeyDictionary[Any, _Peers] = WeakKeyDictionary()


def obstacle(group: Any, device: torch.device) -> str | None:
    """Why the processes of `group` cannot write into each other's memory, None where they can. All
    of them call it, each with its own GPU; the first call communicates."""
    if group not in _peers:
        _peers[group] = _Peers(group, device)
    peers = _peers[group]
    if peers.device != device:
        raise ValueError(f"peer_memory: tensors must be on {peers.device}, as before, got {device}")
    return peers.obstacle


def allocated_bytes() -> int:
    """Of inboxes on this GPU, which torch.cuda's statistics do not count."""
    return sum(peers.allocated_bytes() for peers in _peers.values())


def _place() -> tuple[str, ...]:
    """Alike for processes that can hand each other memory: torch sends handles through a socket in
    the temporary folder."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespaces = [Path(f"/proc/self/ns/{kind}") for kind in ("mnt", "pid")]
    names = [os.readlink(path) for path in namespaces if path.exists()]
    host = boot.read_text().strip() if boot.exists() else socket.gethostname()
    return (host, *names, tempfile.gettempdir())


def _own_obstacle(device: torch.device) -> str | None:
    from torch.distributed import _symmetric_memory as symmetric

    if os.environ.get(OFF_VARIABLE, "0") not in ("", "0"):
        return f"{OFF_VARIABLE} is set"
    others = [other for other in range(torch.cuda.device_count()) if other != device.index]
    if not all(torch.cuda.can_device_access_peer(device, other) for other in others):
        return f"GPU {device.index} has no access to the memory of the others"
    # Others may wait on the host, or not at all.
    backend = symmetric.get_backend(device)
    return None if backend in (None, "CUDA") else f"symmetric memory is of {backend}, not CUDA"


def inbox(
    group: Any, use: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Inbox:
    """Where messages for `use` arrive. All processes of `group` ask for the same, after obstacle().

    The next message for the same use may overwrite it, whatever its shape. So between two of them
    there must be one for another use: its wait() tells the others that the first was read. That
    holds for what runs in order, so one stream at a time. The first call of a size allocates, so it
    cannot be captured.
    """
    size = torch.Size(shape).numel() * dtype.itemsize
    size = triton.next_power_of_2(max(size, _SMALLEST))  # few sizes, one memory each
    return _peers[group].memory(group, use, size).inbox(shape, dtype)


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
