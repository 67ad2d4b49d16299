"""Calibration: statistics of the inputs of linears over a real pipeline, streamed.

Every denoising step and both guidance halves pass through the model and are counted; nothing is
kept but the statistics and a bounded sample of token rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .full_precision import full_precision
from .recipe import CalibrationOptions, InputGroup
from .sharding import Progress, Shards, processes

_DOUBLE_ELEMENTS = 1 << 24  # of the input, converted to fp64 at once
# Of a product of 16-bit tokens: see _add_products.
_TOKENS_TOGETHER, _COLUMNS_TOGETHER = 8192, 4096


class ActivationStats:
    """Streamed statistics of one input with K channels.

    count tokens seen; absmax fp32 [K]; square_sum, sum fp64 [K]; gram fp32 [K, K] or None; sample
    [R, K] rows in the input's dtype, drawn evenly over all tokens, steps, prompts and guidance
    halves, on the CPU.  The result does not depend on how tokens were batched, up to fp64 rounding.

    by_batch: the sums of every batch of prompts were made for themselves and added in the order of
    the batches, and tokens were drawn for each batch anew, so that the result does not depend on
    the number of processes (BatchSums).
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        options: CalibrationOptions | None = None,
    ) -> None:
        options = options or CalibrationOptions()
        self.name = name
        self.by_batch = False
        self.count = 0
        self.absmax = torch.zeros(in_features)
        self.square_sum = torch.zeros(in_features, dtype=torch.float64)
        self.sum = torch.zeros(in_features, dtype=torch.float64)
        self.gram = torch.zeros(in_features, in_features) if options.gram else None
        self.sample = torch.empty(0, in_features)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._limit = options.sample_rows
        self._seed = options.seed
        self._generator = torch.Generator().manual_seed(name_seed(name, options.seed))

    def update(self, x: Tensor) -> None:
        """Count the tokens of x [..., K].  Raises ValueError on another K and on NaN or inf."""
        if x.shape[-1] != self.absmax.shape[0]:
            raise ValueError(
                f"calibration: input of {self.name} must have K = {self.absmax.shape[0]} channels, "
                f"got shape {tuple(x.shape)}"
            )
        rows = x.detach().reshape(-1, x.shape[-1])
        if rows.shape[0] == 0:
            return
        absmax = rows.abs().amax(0).float()
        if not bool(torch.isfinite(absmax).all()):
            raise ValueError(f"calibration: the input of {self.name} holds NaN or inf")
        self._follow(rows.device)
        self.absmax = torch.maximum(self.absmax, absmax)
        for chunk in rows.split(max(1, _DOUBLE_ELEMENTS // rows.shape[1])):
            wide = chunk.double()
            self.sum += wide.sum(0)
            self.square_sum += wide.square_().sum(0)
        if self.gram is not None:
            _add_products(self.gram, rows)
        self.count += rows.shape[0]
        self._draw(rows)

    def begin(self, batch: int) -> None:
        """Sums to come are of this batch alone; count, absmax and sample go on."""
        self.by_batch = True
        for total in (self.sum, self.square_sum, self.gram):
            if total is not None:
                total.zero_()
        self._generator.manual_seed(name_seed(f"{self.name}#{batch}", self._seed))

    def _follow(self, device: torch.device) -> None:
        """Sums live where the input is: with offloading the model may have been elsewhere."""
        if self.absmax.device != device:
            self.absmax, self.sum = self.absmax.to(device), self.sum.to(device)
            self.square_sum = self.square_sum.to(device)
            self.gram = None if self.gram is None else self.gram.to(device)

    def _draw(self, rows: Tensor) -> None:
        """Reservoir: every token gets a random key, the rows of the smallest keys stay."""
        keys = torch.rand(rows.shape[0], generator=self._generator, dtype=torch.float64)
        if self._keys.numel() >= self._limit:
            chosen = (keys < self._keys.max()).nonzero().flatten()
        else:
            chosen = torch.arange(rows.shape[0])
        if chosen.numel() > self._limit:
            chosen = chosen[keys[chosen].topk(self._limit, largest=False, sorted=False).indices]
        if chosen.numel() == 0:
            return
        taken = rows[chosen.to(rows.device)].cpu()
        sample = torch.cat([self.sample.to(taken.dtype), taken])
        keys = torch.cat([self._keys, keys[chosen]])
        if keys.numel() > self._limit:
            keep = keys.topk(self._limit, largest=False, sorted=False).indices
            sample, keys = sample[keep], keys[keep]
        self.sample, self._keys = sample, keys

    @property
    def in_features(self) -> int:
        return self.absmax.shape[0]

    @property
    def rms(self) -> Tensor:
        """fp32 [K]."""
        return (self.square_sum / max(self.count, 1)).sqrt().float()

    @property
    def mean(self) -> Tensor:
        """fp32 [K]."""
        return (self.sum / max(self.count, 1)).float()

    @property
    def j(self) -> float:
        """J = ||X||_F / sqrt(B N C) of the raw input (LRQ-DiT equation 11): its RMS."""
        return float((self.square_sum.sum() / max(self.count * self.in_features, 1)).sqrt())

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the state of the sampler, on the CPU: for saving."""
        out = {
            "count": torch.tensor(self.count),
            "absmax": self.absmax,
            "square_sum": self.square_sum,
            "sum": self.sum,
            "sample": self.sample,
        }
        if self.gram is not None:
            out["gram"] = self.gram
        if self.by_batch:
            out["by_batch"] = torch.tensor(True)
        return {key: value.detach().cpu().contiguous() for key, value in out.items()}

    @staticmethod
    def from_tensors(name: str, tensors: dict[str, Tensor]) -> ActivationStats:
        """Inverse of tensors(); the result is for reading, its sample cannot be extended."""
        stats = ActivationStats(name, tensors["absmax"].shape[0])
        stats.count = int(tensors["count"])
        stats.absmax, stats.square_sum = tensors["absmax"], tensors["square_sum"]
        stats.sum, stats.sample = tensors["sum"], tensors["sample"]
        stats.gram = tensors.get("gram")
        stats.by_batch = "by_batch" in tensors
        return stats


class BatchSums:
    """Totals over the batches that processes draw side by side, a round of one batch each.

    After every round sums and gram matrices are added in the order of the batches, each gram in
    one of the processes.  finish() leaves the same totals and sample in the entries of all: what
    one process alone would have by this way, bit for bit.
    """

    def __init__(self, stats: dict[str, ActivationStats], shards: Shards) -> None:
        self._entries, self._shards = list(stats.values()), shards
        width = sum(entry.in_features for entry in self._entries)
        self._sums = torch.zeros(2 * width, dtype=torch.float64)
        self._owners = [i % shards.count for i in range(len(self._entries))]
        self._grams: dict[str, Tensor] = {}

    def begin(self, batch: int) -> None:
        """Before this process draws a batch, or has none left to draw in a last round."""
        for entry in self._entries:
            entry.begin(batch)

    def add(self) -> None:
        """After a round.  Raises OtherProcessError where another process failed in it."""
        self._shards.meet()
        sums = [total.cpu() for entry in self._entries for total in (entry.sum, entry.square_sum)]
        for part in self._shards.gathered(torch.cat(sums)):
            self._sums += part.cpu()
        for entry, owner in zip(self._entries, self._owners, strict=True):
            if entry.gram is not None:
                self._add_gram(entry, owner)

    def _add_gram(self, entry: ActivationStats, owner: int) -> None:
        assert entry.gram is not None
        chunks = entry.gram.view(-1).split(_DOUBLE_ELEMENTS)
        for i, chunk in enumerate(chunks):
            for part in self._shards.gathered_at(owner, chunk):
                if entry.name not in self._grams:
                    self._grams[entry.name] = torch.zeros_like(entry.gram, device=part.device)
                self._grams[entry.name].view(-1).split(_DOUBLE_ELEMENTS)[i].add_(part)

    def finish(self) -> None:
        """After the last round."""
        shards = self._shards
        shards.meet()
        widths = [entry.in_features for entry in self._entries for _ in range(2)]
        sums = iter(self._sums.split(widths))
        absmax = shards.gathered(torch.cat([entry.absmax.cpu() for entry in self._entries]))
        most = torch.stack([part.cpu() for part in absmax]).amax(0)
        counts = torch.tensor(shards.objects([entry.count for entry in self._entries])).sum(0)
        keys = shards.objects([(entry._keys, entry.sample.dtype) for entry in self._entries])
        for i, entry in enumerate(self._entries):
            entry.count = int(counts[i])
            entry.absmax, most = most[: entry.in_features], most[entry.in_features :]
            entry.sum, entry.square_sum = next(sums), next(sums)
            self._merge_sample(entry, [part[i] for part in keys])
            if entry.gram is not None:
                own = self._grams.pop(entry.name, entry.gram)
                entry.gram = shards.broadcast(self._owners[i], own)

    def _merge_sample(
        self, entry: ActivationStats, drawn: list[tuple[Tensor, torch.dtype]]
    ) -> None:
        """The rows of the smallest keys of all processes, by ascending key."""
        longest = max(len(keys) for keys, _ in drawn)
        # A process without a batch has no rows and does not know their dtype.
        dtype = next((dtype for keys, dtype in drawn if len(keys)), entry.sample.dtype)
        rows = torch.zeros(longest, entry.in_features, dtype=dtype)
        rows[: len(entry.sample)] = entry.sample
        parts = self._shards.gathered(rows)
        sample = torch.cat([p[: len(k)].cpu() for p, (k, _) in zip(parts, drawn, strict=True)])
        keys = torch.cat([keys for keys, _ in drawn])
        order = keys.argsort()[: entry._limit]
        entry.sample, entry._keys = sample[order], keys[order]


def collect_stats(
    run: Callable[[list[str]], object],
    model: nn.Module,
    groups: Sequence[InputGroup],
    prompts: Sequence[str],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
    by_batch: bool = False,
) -> dict[str, ActivationStats]:
    """Statistics of each group's input over run(prompts), by the group's name.

    run draws pictures for a batch of prompts with the pipeline that holds `model`.  Where
    torch.distributed is initialised all processes must call this: each draws a part of the batches,
    and all return the same.  That is always by_batch (ActivationStats).

    Raises ValueError when there are no prompts, when an input holds NaN or inf (naming the layer),
    when members of a group do not read the same tensor, and when a group was never reached.
    """
    options = options or CalibrationOptions()
    if not prompts:
        raise ValueError("collect_stats: prompts must hold at least one prompt, got none")
    if isinstance(prompts, str):
        raise TypeError("collect_stats: prompts must be a list of prompts, got a str")
    stats: dict[str, ActivationStats] = {}
    handles: list[RemovableHandle] = []
    size = options.batch_size
    batches = [list(prompts[i : i + size]) for i in range(0, len(prompts), size)]
    with processes() as shards, torch.no_grad():
        try:
            for group in groups:
                entry = ActivationStats(group.name, group.in_features, options)
                stats[group.name] = entry
                handles += _hook_group(model, group, entry)
            sums = BatchSums(stats, shards) if by_batch or shards.count > 1 else None
            with shards.stage("calibration", len(prompts), progress) as advance:
                for first in range(0, len(batches), shards.count):  # a round
                    index = first + shards.rank
                    if sums is not None:
                        sums.begin(index)
                    if index < len(batches):
                        run(batches[index])
                        advance(len(batches[index]))
                    if sums is not None:
                        sums.add()
        finally:
            for handle in handles:
                handle.remove()
        if sums is not None:
            sums.finish()
    silent = [name for name, entry in stats.items() if entry.count == 0]
    if silent:
        raise ValueError(
            f"collect_stats: the run never reached {len(silent)} of {len(stats)} inputs, "
            f"such as {silent[0]}"
        )
    return stats


def _add_products(gram: Tensor, rows: Tensor) -> None:
    """gram fp32 [K, K] += X^T X of rows [M, K] in any floating dtype.

    Tensor cores take rows of 16 bits as they are: products of two such numbers are exact in fp32.
    They truncate as they add, which is why no more than _TOKENS_TOGETHER are added in them: a share
    of about 3e-5 of a sum of numbers of one sign.
    """
    with full_precision():
        if not rows.is_cuda or rows.dtype not in (torch.bfloat16, torch.float16):
            tokens = rows.float()
            gram.addmm_(tokens.T, tokens)
            return
        for tokens in rows.split(_TOKENS_TOGETHER):
            # In parts, since what a part adds is in memory beside it.
            for part, columns in zip(
                gram.split(_COLUMNS_TOGETHER, 1), tokens.split(_COLUMNS_TOGETHER, 1), strict=True
            ):
                part += torch.mm(tokens.T, columns, out_dtype=torch.float32)


def name_seed(name: str, seed: int) -> int:
    """Seed of everything random about a layer: the same on every machine and in every order."""
    return (zlib.crc32(name.encode()) ^ (seed * 0x9E3779B1)) & 0xFFFFFFFF


def _hook_group(
    model: nn.Module, group: InputGroup, stats: ActivationStats
) -> list[RemovableHandle]:
    """Count the input of the first member; check on the first forward that all read one tensor."""
    reference: dict[str, Tensor] = {}
    unchecked = {linear.name for linear in group.linears}

    def check(name: str, x: Tensor) -> None:
        if "x" not in reference:
            reference["x"] = x.detach()
        elif not _same(reference["x"], x):
            raise ValueError(
                f"collect_stats: {name} must read the same tensor as the others of the group of "
                f"{group.name}, but the pipeline gave it another"
            )
        unchecked.discard(name)
        if not unchecked:
            reference.clear()

    def hook_for(name: str) -> Callable[[nn.Module, tuple, dict], None]:
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else kwargs["input"]
            if name == group.name:
                stats.update(x)
            if name in unchecked:
                check(name, x)

        return hook

    return [
        model.get_submodule(linear.name).register_forward_pre_hook(
            hook_for(linear.name), with_kwargs=True
        )
        for linear in group.linears
    ]


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)
