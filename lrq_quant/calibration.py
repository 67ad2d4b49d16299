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

from .recipe import CalibrationOptions, InputGroup

Progress = Callable[[str, int, int], None]  # (what, done, total)
_DOUBLE_ELEMENTS = 1 << 24  # of the input, converted to fp64 at once


class ActivationStats:
    """Streamed statistics of one input with K channels.

    count tokens seen; absmax fp32 [K]; square_sum, sum fp64 [K]; gram fp32 [K, K] or None; sample
    [R, K] rows in the input's dtype, drawn evenly over all tokens, steps, prompts and guidance
    halves, on the CPU.  The result does not depend on how tokens were batched, up to fp64 rounding.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        options: CalibrationOptions | None = None,
    ) -> None:
        options = options or CalibrationOptions()
        self.name = name
        self.count = 0
        self.absmax = torch.zeros(in_features)
        self.square_sum = torch.zeros(in_features, dtype=torch.float64)
        self.sum = torch.zeros(in_features, dtype=torch.float64)
        self.gram = torch.zeros(in_features, in_features) if options.gram else None
        self.sample = torch.empty(0, in_features)
        self._keys = torch.empty(0, dtype=torch.float64)
        self._limit = options.sample_rows
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
            tokens = rows.float()
            self.gram.addmm_(tokens.T, tokens)
        self.count += rows.shape[0]
        self._draw(rows)

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
        return {key: value.detach().cpu().contiguous() for key, value in out.items()}

    @staticmethod
    def from_tensors(name: str, tensors: dict[str, Tensor]) -> ActivationStats:
        """Inverse of tensors(); the result is for reading, its sample cannot be extended."""
        stats = ActivationStats(name, tensors["absmax"].shape[0])
        stats.count = int(tensors["count"])
        stats.absmax, stats.square_sum = tensors["absmax"], tensors["square_sum"]
        stats.sum, stats.sample = tensors["sum"], tensors["sample"]
        stats.gram = tensors.get("gram")
        return stats


def collect_stats(
    run: Callable[[list[str]], object],
    model: nn.Module,
    groups: Sequence[InputGroup],
    prompts: Sequence[str],
    options: CalibrationOptions | None = None,
    progress: Progress | None = None,
) -> dict[str, ActivationStats]:
    """Statistics of each group's input over run(prompts), by the group's name.

    run draws pictures for a batch of prompts with the pipeline that holds `model`.  Raises
    ValueError when there are no prompts, when an input holds NaN or inf (naming the layer), when
    members of a group do not read the same tensor, and when a group was never reached.
    """
    options = options or CalibrationOptions()
    if not prompts:
        raise ValueError("collect_stats: prompts must hold at least one prompt, got none")
    if isinstance(prompts, str):
        raise TypeError("collect_stats: prompts must be a list of prompts, got a str")
    stats: dict[str, ActivationStats] = {}
    handles: list[RemovableHandle] = []
    try:
        for group in groups:
            entry = ActivationStats(group.name, group.in_features, options)
            stats[group.name] = entry
            handles += _hook_group(model, group, entry)
        with torch.no_grad():
            for start in range(0, len(prompts), options.batch_size):
                batch = list(prompts[start : start + options.batch_size])
                run(batch)
                if progress is not None:
                    progress("calibration", start + len(batch), len(prompts))
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, entry in stats.items() if entry.count == 0]
    if silent:
        raise ValueError(
            f"collect_stats: the run never reached {len(silent)} of {len(stats)} inputs, "
            f"such as {silent[0]}"
        )
    return stats


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
