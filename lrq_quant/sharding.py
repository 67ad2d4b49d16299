"""Work shared by the processes of torch.distributed: all that this package knows of it.

    with processes() as shards:                  several processes, or this one alone
        with shards.stage("fit", total) as advance:
            for item, owner in zip(items, shards.share(costs)):
                if owner == shards.rank: ...; advance(amount)

Processes meet before every exchange, by counters in the store of the process group. Who waits there
sees what went wrong in another process, and gives up when nobody has moved for SILENCE_SECONDS: a
collective, which could only hang, is entered when all have arrived.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed

Progress = Callable[[str, int, int], None]  # (what, done, total)
Advance = Callable[[int], None]

# Longer than one batch of prompts, one group of linears or saving a model may take.
SILENCE_SECONDS = 3600.0
# Between two looks at the store: at first, and at most.
_POLL_SECONDS = (0.001, 0.1)
# How long the process that keeps the store waits for the others to read its last word.
_FAREWELL_SECONDS = 10.0


class OtherProcessError(OSError):
    """Another process failed, is gone, or works on something else."""


class Shards:
    """This process alone: every exchange gives back what was given.

    rank and count as in torch.distributed. Exchanged tensors have the same shape and dtype in every
    process; results are lists in rank order, on the device of what was given or on that of the
    process group.
    """

    rank, count = 0, 1

    @contextmanager
    def stage(
        self, what: str, total: int, progress: Progress | None = None, done: int = 0
    ) -> Iterator[Advance]:
        """Work that is counted: advance(amount) after each piece shows what all have done together,
        on top of `done`, by calling progress in the first process. All have met when it ends."""
        shown = done

        def advance(amount: int) -> None:
            nonlocal shown
            shown += amount
            if progress is not None:
                progress(what, shown, total)

        yield advance

    def share(self, costs: Sequence[int]) -> list[int]:
        """Rank that does each piece of work: the dearest first, each to who has least to do."""
        load, owners = [0] * self.count, [0] * len(costs)
        for i in sorted(range(len(costs)), key=lambda i: -costs[i]):
            owners[i] = load.index(min(load))
            load[owners[i]] += costs[i]
        return owners

    def meet(self) -> None:
        """Returns when every process is here. Raises OtherProcessError when one will not come."""

    def agree(self, what: str, value: str) -> None:
        """Raises OtherProcessError where value differs between processes."""

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process."""
        return [tensor]

    def gathered_at(self, owner: int, tensor: Tensor) -> list[Tensor]:
        """The tensor of every process in the process `owner`, an empty list in the others."""
        return [tensor]

    def broadcast(self, owner: int, tensor: Tensor) -> Tensor:
        """The tensor of the process `owner`; that of another one may be overwritten."""
        return tensor

    def objects(self, value: Any) -> list[Any]:
        """A small value of every process."""
        return [value]

    def of_first(self, value: Any) -> Any:
        """The value of the first process."""
        return value

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        pass


class _ManyShards(Shards):
    """The processes of the default process group."""

    _opened = 0

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        on_gpu = "nccl" in str(distributed.get_backend_config())
        current = torch.cuda.current_device() if on_gpu else None
        self._device = torch.device("cpu") if current is None else torch.device("cuda", current)
        _ManyShards._opened += 1
        # torch has no public name for the store that every process group has.
        store = distributed.distributed_c10d._get_default_store()
        self._store = distributed.PrefixStore(f"lrq/{_ManyShards._opened}", store)
        self._meetings = self._stages = 0
        self._show: Callable[[], None] = _nothing

    # -- working together

    @contextmanager
    def stage(
        self, what: str, total: int, progress: Progress | None = None, done: int = 0
    ) -> Iterator[Advance]:
        self._stages += 1
        counter, shown = f"done/{self._stages}", done

        def show() -> None:
            nonlocal shown
            together = done + self._ask("add", counter, 0)
            if together != shown and progress is not None:
                progress(what, together, total)
            shown = together

        def advance(amount: int) -> None:
            self._ask("add", counter, amount)
            self._ask("add", "moves", 1)
            self._raise_failure()
            self._show()

        self._show = show if self.rank == 0 and progress is not None else _nothing
        try:
            yield advance
            self.meet()
            self._show()
        finally:
            self._show = _nothing

    def meet(self) -> None:
        self._meetings += 1
        here = f"met/{self._meetings}"
        self._ask("add", here, 1)
        self._ask("add", "moves", 1)
        self._wait(lambda: self._ask("add", here, 0) == self.count)

    def agree(self, what: str, value: str) -> None:
        key = f"agree/{self._meetings}"
        self._ask("set", f"{key}/{self.rank}", value)
        self.meet()
        for rank in range(self.count):
            if self._ask("get", f"{key}/{rank}").decode() != value:
                raise OtherProcessError(
                    f"{what} must be the same in all {self.count} processes, but that of process "
                    f"{rank} differs from that of process {self.rank}"
                )

    def _wait(self, ready: Callable[[], bool]) -> None:
        pause, longest = _POLL_SECONDS
        moves, since = -1, time.monotonic()
        while not ready():
            self._raise_failure()
            self._show()
            now = self._ask("add", "moves", 0)
            if now != moves:
                moves, since = now, time.monotonic()
            elif time.monotonic() - since > SILENCE_SECONDS:
                raise OtherProcessError(
                    f"process {self.rank} of {self.count} has waited for the others for "
                    f"{SILENCE_SECONDS:.0f} s, in which none of them got anything done"
                )
            time.sleep(pause)
            pause = min(2 * pause, longest)

    def _raise_failure(self) -> None:
        if self._ask("check", ["failure"]):
            raise OtherProcessError(self._ask("get", "failure").decode())

    def _ask(self, what: str, *arguments: Any) -> Any:
        try:
            return getattr(self._store, what)(*arguments)
        except RuntimeError as error:  # torch's errors of the store and of its connection
            raise OtherProcessError(
                f"process {self.rank} of {self.count} lost the store of the process group: the "
                f"process that keeps it has ended ({str(error).splitlines()[0]})"
            ) from error

    # -- exchanges: bytes, which every backend carries as they are

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        if tensor.numel() == 0:
            return [tensor] * self.count
        sent = self._bytes(tensor)
        received = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.all_gather(received, sent)
        return [part.view(tensor.dtype).view(tensor.shape) for part in received]

    def gathered_at(self, owner: int, tensor: Tensor) -> list[Tensor]:
        sent = self._bytes(tensor)
        received = None
        if owner == self.rank:
            received = [torch.empty_like(sent) for _ in range(self.count)]
        distributed.gather(sent, received, dst=owner)
        return [part.view(tensor.dtype).view(tensor.shape) for part in received or []]

    def broadcast(self, owner: int, tensor: Tensor) -> Tensor:
        moved = self._bytes(tensor)
        distributed.broadcast(moved, src=owner)
        return moved.view(tensor.dtype).view(tensor.shape)

    def objects(self, value: Any) -> list[Any]:
        self.meet()
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value)
        return values

    def of_first(self, value: Any) -> Any:
        self.meet()
        values = [value]
        distributed.broadcast_object_list(values, src=0)
        return values[0]

    def _bytes(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(self._device).contiguous().view(-1).view(torch.uint8)

    # -- the end

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self.meet()
        try:
            self._leave(error)
        except RuntimeError:
            if error is None:
                raise  # else the store is gone, and the error that is on its way says more

    def _leave(self, error: BaseException | None) -> None:
        told = error is None or isinstance(error, OtherProcessError)
        if not told and not self._store.check(["failure"]):
            reason = f"{type(error).__name__}: {error}"
            self._store.set("failure", f"process {self.rank} of {self.count} failed: {reason}")
        # The first process may keep the store: it must not end while others have yet to look.
        self._store.add("left", 1)
        deadline = time.monotonic() + _FAREWELL_SECONDS
        while self.rank == 0 and time.monotonic() < deadline:
            if self._store.add("left", 0) == self.count:
                break
            time.sleep(_POLL_SECONDS[0])


_active: ContextVar[Shards | None] = ContextVar("lrq_shards", default=None)


@contextmanager
def processes() -> Iterator[Shards]:
    """Those that share the work of the block: all of torch.distributed where it is initialised,
    else this one. Each of them must come here. An error that leaves the block in one of them is
    raised as OtherProcessError in the others. Within another such block, the same object."""
    active = _active.get()
    if active is not None:
        yield active
        return
    several = distributed.is_available() and distributed.is_initialized()
    several = several and distributed.get_world_size() > 1
    with _activated(_ManyShards() if several else Shards()) as shards, shards:
        yield shards


@contextmanager
def alone() -> Iterator[Shards]:
    """In this block nothing is shared with other processes: for those of torch.distributed that
    each quantize something else."""
    with _activated(Shards()) as shards:
        yield shards


@contextmanager
def _activated(shards: Shards) -> Iterator[Shards]:
    token = _active.set(shards)
    try:
        yield shards
    finally:
        _active.reset(token)


@contextmanager
def launched(device: str) -> Iterator[str]:
    """Join the processes that torchrun started, if it did, over nccl for "cuda" and gloo for "cpu";
    yields the device of this process, cuda:LOCAL_RANK.  Raises ValueError where there are more
    processes than GPUs, and for a device with a number."""
    several = distributed.is_available() and distributed.is_torchelastic_launched()
    several = several and int(os.environ["WORLD_SIZE"]) > 1
    if not several or distributed.is_initialized():
        yield device
        return
    backend = "gloo"
    if device != "cpu":
        local, found = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if device != "cuda":
            raise ValueError(f"--device must be cuda or cpu under torchrun, got {device}")
        if local >= found:
            raise ValueError(f"torchrun must start at most one process a GPU, of which {found} are")
        torch.cuda.set_device(local)
        backend, device = "cpu:gloo,cuda:nccl", f"cuda:{local}"
    distributed.init_process_group(backend, timeout=timedelta(seconds=SILENCE_SECONDS))
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def _nothing() -> None:
    pass
