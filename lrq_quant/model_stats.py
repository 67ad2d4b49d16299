"""Statistics of all inputs of a model: kept in the work folder, and gram matrices in parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from torch import Tensor, nn

from .calibration import ActivationStats, Progress, collect_stats
from .recipe import InputGroup, QuantPlan, QuantRecipe
from .sharding import processes
from .work_folder import WorkFolder


def calibrate(
    model: nn.Module,
    plan: QuantPlan,
    recipe: QuantRecipe,
    run: Callable[[list[str]], object],
    prompts: Sequence[str],
    work: WorkFolder | None,
    progress: Progress | None,
) -> dict[str, ActivationStats]:
    """Statistics of every group's input, from the work folder when it has those of this model,
    recipe and prompts, else collected and put there."""
    options = recipe.calibration
    facts = {"options": repr(options), "prompts": list(prompts), "groups": repr(plan.groups)}
    samples = [strided_sample(p) for p in model.parameters()]
    key = None if work is None else WorkFolder.fingerprint(facts, samples)
    with processes() as shards:
        stats = None if work is None else work.load_stats(key)
        # The first process writes what all have collected, when all have looked for it here.
        shards.agree("what the work folder holds", str(stats is not None))
        if stats is None:
            stats = collect_stats(run, model, plan.groups, prompts, options, progress)
            if work is not None and shards.rank == 0:
                work.save_stats(key, stats)
    return stats


class GramPasses:
    """Statistics with gram matrices, a few groups at a time: those of a large model do not fit into
    memory together, so the calibration prompts are run again for every part of the groups."""

    def __init__(
        self,
        model: nn.Module,
        plan: QuantPlan,
        recipe: QuantRecipe,
        stats: dict[str, ActivationStats],
        run: Callable[[list[str]], object] | None,
        prompts: Sequence[str],
        progress: Progress | None,
    ) -> None:
        missing = [group for group in plan.groups if stats[group.name].gram is None]
        if missing and run is None:
            raise ValueError(
                f"quantize_model: rounding 'feedback' needs the gram matrix of {missing[0].name} "
                "in stats (CalibrationOptions.gram), or run and prompts to collect it"
            )
        self.model, self.plan, self.recipe, self.stats = model, plan, recipe, stats
        self.run, self.prompts, self.progress = run, prompts, progress
        self._ready: dict[str, ActivationStats] = {}

    def parts(self, groups: Sequence[InputGroup]) -> Iterator[list[InputGroup]]:
        """The groups in parts whose gram matrices fit; those of a part given are ready to take."""
        limit = self.recipe.calibration.gram_bytes
        part: list[InputGroup] = []
        size = 0
        for group in groups:
            missing = self.stats[group.name].gram is None
            added = 4 * group.in_features**2 if missing else 0
            if size and added and size + added > limit:
                self._collect(part)
                yield part
                part, size = [], 0
            part.append(group)
            size += added
        if part:
            self._collect(part)
            yield part

    def take(self, group: InputGroup) -> ActivationStats:
        """Statistics of the group with its gram matrix, which is forgotten here; all but the sample
        from the same run, so that mean and gram belong together."""
        stats = self.stats[group.name]
        if stats.gram is not None:
            return stats
        again = self._ready.pop(group.name)
        again.sample = stats.sample
        return again

    def _collect(self, part: list[InputGroup]) -> None:
        groups = [group for group in part if self.stats[group.name].gram is None]
        if not groups:
            return
        options = replace(self.recipe.calibration, gram=True, sample_rows=1)

        def report(what: str, done: int, total: int) -> None:
            if self.progress is not None:
                self.progress("second moments", done, total)

        assert self.run is not None
        # As the other statistics were made, perhaps by several processes before a kill.
        by_batch = any(stats.by_batch for stats in self.stats.values())
        self._ready = collect_stats(
            self.run, self.model, groups, self.prompts, options, report, by_batch
        )


def check_stats(plan: QuantPlan, stats: dict[str, ActivationStats]) -> None:
    """Raises ValueError where statistics of a group are missing or of another K."""
    for group in plan.groups:
        if group.name not in stats:
            raise ValueError(f"quantize_model: stats must hold {group.name}, got none of it")
        if stats[group.name].in_features != group.in_features:
            raise ValueError(
                f"quantize_model: stats of {group.name} must have K = {group.in_features}, "
                f"got {stats[group.name].in_features}"
            )


def strided_sample(tensor: Tensor, limit: int = 1024) -> Tensor:
    """At most `limit` values from all over a tensor: enough to tell it from another."""
    flat = tensor.detach().reshape(-1)
    step = max(1, -(-flat.numel() // limit))
    # A step that divides a row, or shares a factor with it, comes back to the same columns.
    while flat.numel() and math.gcd(step, tensor.shape[-1]) > 1 and tensor.dim() > 1:
        step += 1
    return flat[::step].cpu()
