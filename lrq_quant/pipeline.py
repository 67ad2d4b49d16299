"""Quantizing a linear and a model: statistics -> [low-rank branch ->] rotation -> twin-log fit ->
codes -> checkpoint.

Linears are handled one input group at a time on the device of their weight, so the working set is a
few copies of one weight in fp32.  With a work folder every finished group, and the statistics, are
kept on disk: a killed run continues where it stopped.  Processes that share a work folder share the
prompts and the groups (sharding).
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from lrq_kernels import LRQLinear, checkpoint
from lrq_kernels.checkpoint import LinearState
from lrq_kernels.rotation import Rotation
from lrq_kernels.scheme import QuantScheme

from .auto_family import with_family
from .calibration import ActivationStats, Progress, name_seed
from .error_feedback import codebook_nearest
from .full_precision import full_precision
from .input_makers import makers_by_name
from .layer_statistics import ChannelSpread, WeightHistogram
from .low_rank import LowRankBranch, low_rank_branch
from .model_stats import GramPasses, calibrate, check_stats, strided_sample
from .quantized_input import QuantizedInput
from .recipe import InputGroup, LinearPlan, QuantPlan, QuantRecipe
from .report import LinearReport, MeasuredLinear, QuantReport
from .rotation_search import (
    RotationChoice,
    SearchedLinear,
    choose_rotation,
    choose_rotation_paper,
    data_free_rotation,
    dequantized_activation,
)
from .row_codes import decoded_weight, packed_codes
from .sharding import OtherProcessError, Shards, alone, processes
from .shared_tables import fit_shared_tables
from .twin_log import fit_twin_log, fit_twin_log_paper, lost_gain, sensible_gain
from .work_folder import WorkFolder

logger = logging.getLogger(__name__)

# Token rows on which the output of the finished layer is compared.
_OUTPUT_ROWS = 256


@dataclass(frozen=True)
class QuantizedModel:
    """Result of quantize_model: states of the quantized linears, every other tensor of the model
    (not copied), and the report.  Of several processes the first alone has it whole; the others
    have the report."""

    states: dict[str, LinearState]
    dense: dict[str, Tensor]
    model_class: str
    report: QuantReport
    work_folder: WorkFolder | None = None
    whole: bool = True

    def save(self, path: str | os.PathLike) -> Path:
        """Write the checkpoint (atomically) to a file, or into an existing folder.  Raises
        RuntimeError in a process that does not have the states."""
        if not self.whole:
            raise RuntimeError("QuantizedModel.save: only the first process has the whole result")
        return checkpoint.save(path, self.states, self.dense, self.model_class)

    def remove_work_folder(self) -> None:
        """Delete what a killed run would have continued from; call it once the result is safe."""
        if self.work_folder is not None:
            self.work_folder.remove()


def quantize_model(
    model: nn.Module,
    recipe: QuantRecipe | None = None,
    *,
    run: Callable[[list[str]], object] | None = None,
    prompts: Sequence[str] = (),
    stats: dict[str, ActivationStats] | None = None,
    work_folder: str | os.PathLike | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Quantize the transformer `model` by `recipe` (default: W4A8 blocks, W4A16 modulation).

    Calibrated when `run` (draws pictures for a batch of prompts with the pipeline that holds the
    model) and `prompts` are given, or `stats` from collect_stats; without either only the weights
    are looked at: signs and Hadamard as the scheme says, no smoothing.  device: where to compute,
    by default where each weight is.  progress(what, done, total) counts prompts, then weights.

    work_folder keeps finished groups and statistics; calling again with the same model, recipe and
    prompts continues.  It is not removed here: see QuantizedModel.remove_work_folder.

    Where torch.distributed is initialised and a work_folder is given, on a file system that all
    processes share, all must call this with the same model, recipe and prompts and share the work;
    sharding.alone() keeps them apart.  Without a work folder each process does everything.

    A model of an unknown family is watched for one forward of run (auto_family).

    Raises before anything is written: ValueError for such a model, or prompts, without run, a model
    that is quantized already, schemes of one input that differ in more than weight_bits where
    nothing is calibrated, NaN or inf weights and parameters on the meta device (naming the
    tensor), or missing statistics; OSError for a work folder that cannot be written.  The model is
    not changed.
    """
    if prompts and run is None:
        raise ValueError("quantize_model: run must be given with prompts, it draws them, got None")
    check_dense(model)
    recipe = recipe or QuantRecipe()
    started = time.perf_counter()
    with alone() if work_folder is None else processes() as shards:
        if run is not None and prompts:
            recipe = with_family(recipe, model, lambda: run(list(prompts[:1])))
        plan = recipe.resolve(model)
        if stats is None and run is None:
            plan.check_weights_only()
        _check_parameters(model)
        if stats is None and run is None and recipe.mode == "paper":
            raise ValueError(
                "quantize_model: mode 'paper' needs calibration, got neither run nor stats"
            )
        _check_same(model, plan, recipe, prompts, shards)
        work = WorkFolder(Path(work_folder)) if work_folder is not None else None
        if stats is None and run is not None:
            stats = calibrate(model, plan, recipe, run, prompts, work, progress)
        if stats is not None:
            check_stats(plan, stats)
        grams = None
        if stats is not None and recipe.needs_gram:
            grams = GramPasses(model, plan, recipe, stats, run, prompts, progress)
        jobs = [
            _GroupJob(model, group, recipe, None if stats is None else stats[group.name], device)
            for group in plan.groups
        ]
        states, reports = _run_jobs(jobs, grams, work, progress)
        # Every process has the reports.
        reports = shards.of_first(reports)
    quantized = tuple(f"{linear.name}." for linear in plan.linears)
    whole = shards.rank == 0
    dense = {}
    if whole:
        dense = {n: t for n, t in model.state_dict().items() if not n.startswith(quantized)}
    report = QuantReport.of(plan, recipe, reports, calibrated=stats is not None)
    logger.info("quantized %s in %.1f s", plan.model_class, time.perf_counter() - started)
    return QuantizedModel(states, dense, plan.model_class, report, work, whole)


def quantize_linear(
    weight: Tensor,
    bias: Tensor | None,
    scheme: QuantScheme,
    *,
    smooth_scale: Tensor | None = None,
    rotation: Rotation | None = None,
    quantized_input: QuantizedInput | None = None,
    importance: Tensor | None = None,
    mode: str = "default",
    shared_tables: int = 0,
) -> LinearState:
    """One linear in canonical form: rotation.apply(weight / smooth_scale), fitted and coded.

    weight [N, K], bias [N]; scheme must name the rotation that is given.  quantized_input: of the
    smoothed, rotated and quantized tokens; the weight then makes up for their noise and is rounded
    with error feedback.  Without it weights are rounded to nearest, importance [K] weighing the
    columns in the fit.  Either way rows are then scaled so that their products lose no gain.  mode
    "paper" fits the published grid and leaves it.  shared_tables: the rows share so many tables of
    levels; 0: each has its own.  Tensors of the result are on the weight's
    device.  Raises ValueError or TypeError on NaN, inf and shapes that do not fit.
    """
    rotation = rotation or Rotation.none()
    rotation.validate(weight.shape[1])
    if rotation.kind != scheme.rotation:
        raise ValueError(
            f"quantize_linear: rotation must be {scheme.rotation!r} as in the scheme, "
            f"got {rotation.kind!r}"
        )
    exact = rotated = _rotated_weight(weight, smooth_scale, rotation)
    if quantized_input is not None:
        importance = quantized_input.importance
        rotated = quantized_input.target(exact, scheme.act_bits)
    if mode == "paper":
        codebook = fit_twin_log_paper(rotated, scheme.weight_bits)
    elif shared_tables:
        codebook = fit_shared_tables(
            rotated, scheme.weight_bits, shared_tables, importance=importance
        )
    else:
        codebook = fit_twin_log(rotated, scheme.weight_bits, importance=importance)
    if quantized_input is not None:
        # Every value is a level of its row, so the nearest level below is the one chosen here.
        rotated = quantized_input.round(rotated, codebook_nearest(codebook))
    state = LinearState(
        codes=packed_codes(rotated, codebook),
        levels=codebook.levels,
        table_of_row=codebook.table_of_row,
        weight_scale=codebook.scale,
        bias=None if bias is None else bias.detach().float().contiguous(),
        scheme=scheme,
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        smooth_scale=smooth_scale,
        rotation=rotation,
    )
    if quantized_input is not None:
        gain = quantized_input.lost_gain(exact, rotated)
    elif mode == "paper":
        return state
    else:
        gain = lost_gain(exact, decoded_weight(state), importance)
    return replace(state, weight_scale=state.weight_scale * gain)


# ---- one input group ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Sampled tokens fp32 [M, K], smoothed and rotated, and what their codes stand for."""

    exact: Tensor
    quantized: Tensor

    @cached_property
    def kept_gain(self) -> Tensor:
        """E[v v_q] / E[v^2], fp32 scalar: clipping takes some; 1 where that is not a positive
        number."""
        exact = self.exact.double()
        return sensible_gain((exact * self.quantized).sum() / exact.square().sum())

    @cached_property
    def mean_error(self) -> Tensor:
        """E[v_q - v], fp32 [K]."""
        return (self.quantized - self.exact).mean(0)


@dataclass(frozen=True)
class _Member:
    """One linear of a group on the working device: weight and bias of the model, and what of the
    weight is quantized: all of it, or what a low-rank branch leaves."""

    plan: LinearPlan
    weight: Tensor
    rest: Tensor
    bias: Tensor | None


class _GroupJob:
    """Everything about the linears of one input: take off the low-rank branch, choose the rotation,
    quantize, measure."""

    def __init__(
        self,
        model: nn.Module,
        group: InputGroup,
        recipe: QuantRecipe,
        stats: ActivationStats | None,
        device: torch.device | str | None,
    ) -> None:
        self.group, self.recipe, self.stats = group, recipe, stats
        self.modules = [model.get_submodule(linear.name) for linear in group.linears]
        self.device = torch.device(device) if device else self.modules[0].weight.device
        rows = {n: m.out_features for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self.first_made = makers_by_name(group.name, rows, group.in_features)[1]

    @property
    def cost(self) -> int:
        """How long it takes beside others: second moments are K x K, rows are rounded by them."""
        width = self.group.in_features
        return width * (self.group.weights + width**2)

    def fingerprint(self) -> str:
        """Changes with anything that the result depends on."""
        tensors = [strided_sample(module.weight) for module in self.modules]
        if self.stats is not None:
            tensors += [self.stats.absmax, self.stats.square_sum, self.stats.sum]
        facts: dict[str, object] = {
            "recipe": self.recipe.to_dict(),
            "linears": repr(self.group.linears),
        }
        if self.first_made:
            facts["first_made"] = self.first_made
        return WorkFolder.fingerprint(facts, tensors)

    @torch.no_grad()
    @full_precision()
    def run(self) -> tuple[dict[str, LinearState], list[LinearReport]]:
        weights = [module.weight.detach().to(self.device) for module in self.modules]
        branch = self._branch(weights)
        members = self._members(weights, weights if branch is None else branch.rest(weights))
        choice = self._choose(members).to(self.device)
        sample = self._sampled_tokens(choice)
        quantized_input = self._quantized_input(choice)
        # One copy for all members, as they are stored.
        kept = choice.to("cpu")
        down = None if branch is None else branch.down.cpu()
        states, reports = {}, []
        for i, member in enumerate(members):
            state, measured = self._quantize(member, choice, sample, quantized_input)
            # The working device may be a GPU with no room for all results.
            state = replace(
                state.to("cpu"),
                smooth_scale=kept.smooth_scale,
                rotation=kept.rotation,
                low_rank_down=down,
                low_rank_up=None if branch is None else branch.ups[i].cpu(),
            )
            channels = None if self.stats is None else ChannelSpread.of(self.stats)
            states[member.plan.name] = state
            reports.append(LinearReport.of(member.plan, state, choice, measured, channels))
        logger.info("%s: %s (%s)", self.group.name, choice.label, choice.why)
        return states, reports

    def _branch(self, weights: list[Tensor]) -> LowRankBranch | None:
        rank = self.recipe.low_rank_of(self.group)
        if rank == 0:
            return None
        rms = None if self.stats is None else self.stats.rms
        seed = name_seed(self.group.name, self.recipe.search.seed)
        return low_rank_branch(weights, rank, rms, seed=seed)

    def _members(self, weights: list[Tensor], rests: list[Tensor]) -> list[_Member]:
        biases = [
            None if module.bias is None else module.bias.detach().to(self.device)
            for module in self.modules
        ]
        linears = self.group.linears
        return [_Member(*of) for of in zip(linears, weights, rests, biases, strict=True)]

    def _choose(self, members: list[_Member]) -> RotationChoice:
        first = self.group.linears[0]
        search = self.recipe.search
        if self.stats is None:
            return data_free_rotation(first.name, first.in_features, first.scheme, search.seed)
        if self.recipe.mode == "paper":
            return choose_rotation_paper(self.stats, [member.rest for member in members], search)
        linears = [
            SearchedLinear(member.rest, member.plan.scheme, self._corrects(member))
            for member in members
        ]
        return choose_rotation(self.stats, linears, search, first_made=self.first_made)

    def _quantized_input(self, choice: RotationChoice) -> QuantizedInput | None:
        recipe = self.recipe
        if self.stats is None or recipe.mode == "paper" or recipe.rounding == "nearest":
            return None
        scheme = choice.scheme(self.group.linears[0].scheme)
        return QuantizedInput(
            self.stats,
            choice.smooth_scale,
            choice.rotation.apply,
            lambda tokens: dequantized_activation(
                tokens, scheme.act_bits, scheme.scale_mode, scheme.scale_factor
            ),
            device=self.device,
            damping=recipe.damping,
            passes=recipe.refinement,
        )

    def _corrects(self, member: _Member) -> bool:
        return (
            self.recipe.bias_correction
            and self.recipe.mode == "default"
            and self.stats is not None
            and member.bias is not None
        )

    def _sampled_tokens(self, choice: RotationChoice) -> _Sample | None:
        if self.stats is None:
            return None
        x = self.stats.sample.to(self.device, torch.float32)
        x = choice.rotation.apply(x if choice.smooth_scale is None else x * choice.smooth_scale)
        scheme = choice.scheme(self.group.linears[0].scheme)
        return _Sample(
            x,
            dequantized_activation(x, scheme.act_bits, scheme.scale_mode, scheme.scale_factor),
        )

    def _quantize(
        self,
        member: _Member,
        choice: RotationChoice,
        sample: _Sample | None,
        quantized_input: QuantizedInput | None,
    ) -> tuple[LinearState, MeasuredLinear]:
        """What is coded of the linear, without its branch."""
        name = member.plan.name
        state = quantize_linear(
            member.rest,
            member.bias,
            choice.scheme(member.plan.scheme),
            smooth_scale=choice.smooth_scale,
            rotation=choice.rotation,
            quantized_input=quantized_input,
            importance=self._importance(choice, sample),
            mode=self.recipe.mode,
            shared_tables=self.recipe.shared_tables_of(member.plan),
        )
        if quantized_input is None and sample is not None and self.recipe.mode != "paper":
            state = replace(state, weight_scale=state.weight_scale / sample.kept_gain)
        shared = None if name == self.group.name else self.group.name
        state = replace(state, shared_input=shared)
        state, offset = self._corrected(state, member, sample, quantized_input)
        return state, self._measure(state, member, sample, offset)

    def _importance(self, choice: RotationChoice, sample: _Sample | None) -> Tensor | None:
        """E[x_k^2] of the rotated input; exact over all tokens where nothing is rotated."""
        if self.stats is None or sample is None or self.recipe.mode == "paper":
            return None
        if choice.rotation.kind != "none":
            return sample.exact.square().mean(0)
        rms = self.stats.rms.to(self.device)
        return (rms if choice.smooth_scale is None else rms * choice.smooth_scale).square()

    def _corrected(
        self,
        state: LinearState,
        member: _Member,
        sample: _Sample | None,
        quantized_input: QuantizedInput | None,
    ) -> tuple[LinearState, Tensor | None]:
        """The state with its bias taking up the mean error, and what was added to it."""
        if self.stats is None or sample is None or state.bias is None or not self._corrects(member):
            return state, None
        rotated = _rotated_weight(member.rest, state.smooth_scale, state.rotation)
        decoded = decoded_weight(state)
        if quantized_input is not None:
            offset = quantized_input.bias_offset(rotated, decoded)
        else:
            mean = self.stats.mean.to(self.device)
            if state.smooth_scale is not None:
                mean = mean * state.smooth_scale
            mean = state.rotation.apply(mean)
            offset = rotated @ mean - decoded @ (mean + sample.mean_error)
        return replace(state, bias=state.bias + offset), offset

    def _measure(
        self, state: LinearState, member: _Member, sample: _Sample | None, offset: Tensor | None
    ) -> MeasuredLinear:
        """Weight SQNR in the rotated domain, in which the original one equals it when nothing is
        smoothed; output SQNR on the sampled tokens, offset being what the bias took up.  A branch
        makes no error: errors are those of the rest, powers those of the whole."""
        rotated = _rotated_weight(member.rest, state.smooth_scale, state.rotation)
        whole = rotated
        if member.rest is not member.weight:
            whole = _rotated_weight(member.weight, state.smooth_scale, state.rotation)
        decoded = decoded_weight(state)
        error = rotated - decoded
        weight_db = _decibel(whole.double().square().sum(), error.double().square().sum())
        histogram = WeightHistogram.of(rotated, state)
        if sample is None:
            return MeasuredLinear(weight_db, None, histogram)
        tokens = sample.exact[:_OUTPUT_ROWS]
        exact = tokens @ whole.T
        missing = tokens @ rotated.T - sample.quantized[:_OUTPUT_ROWS] @ decoded.T
        if offset is not None:
            missing -= offset
        signal, noise = exact.double().square().sum(), missing.double().square().sum()
        return MeasuredLinear(weight_db, _decibel(signal, noise), histogram)


def _rotated_weight(weight: Tensor, smooth_scale: Tensor | None, rotation: Rotation) -> Tensor:
    """What is fitted, fp32 [N, K]."""
    wide = weight.detach().float()
    return rotation.apply(wide if smooth_scale is None else wide / smooth_scale)


def _decibel(signal: Tensor, noise: Tensor) -> float:
    if noise == 0:
        return math.inf
    return float(10 * torch.log10(signal / noise)) if signal > 0 else -math.inf


def _run_jobs(
    jobs: list[_GroupJob],
    grams: GramPasses | None,
    work: WorkFolder | None,
    progress: Progress | None,
) -> tuple[dict[str, LinearState], list[LinearReport]]:
    """States and reports of all groups in the first process, and nothing in the others, in the
    order of the jobs; each process does some and leaves them in the work folder."""
    finished: dict[str, tuple[dict[str, LinearState], list[LinearReport]]] = {}
    total = sum(job.group.weights for job in jobs)
    with processes() as shards:
        keys = {} if work is None else {job.group.name: job.fingerprint() for job in jobs}
        if work is not None and shards.rank == 0:
            for name, key in keys.items():
                if (kept := work.load_group(name, key)) is not None:
                    finished[name] = kept
        before = set(shards.of_first(list(finished)))
        todo = {job.group.name: job for job in jobs if job.group.name not in before}
        done = total - sum(job.group.weights for job in todo.values())
        if done and progress is not None and shards.rank == 0:
            progress("quantization", done, total)
        groups = [job.group for job in todo.values()]
        for part in [groups] if grams is None else grams.parts(groups):
            owners = shards.share([todo[group.name].cost for group in part])
            with shards.stage("quantization", total, progress, done) as advance:
                for group, owner in zip(part, owners, strict=True):
                    name, job = group.name, todo[group.name]
                    if grams is not None:
                        job.stats = grams.take(group)
                    if owner == shards.rank:
                        result = job.run()
                        if work is not None:
                            work.save_group(name, keys[name], *result)
                        if shards.rank == 0:
                            finished[name] = result
                        advance(group.weights)
                    job.stats = None  # the gram matrix is large
            done += sum(group.weights for group in part)
        if shards.rank > 0:
            return {}, []
        for name, key in keys.items():
            if name not in finished and work is not None:
                finished[name] = _of_other_process(work, name, key)
    states: dict[str, LinearState] = {}
    reports: list[LinearReport] = []
    for job in jobs:
        states.update(finished[job.group.name][0])
        reports += finished[job.group.name][1]
    return states, reports


def _of_other_process(
    work: WorkFolder, name: str, key: str
) -> tuple[dict[str, LinearState], list[LinearReport]]:
    result = work.load_group(name, key)
    if result is None:
        raise OtherProcessError(
            f"{name}, which another process quantized, is not in {work.folder}: the work folder "
            "must be on a file system that all processes share"
        )
    return result


# ---- checks ------------------------------------------------------------------------------------


def _check_same(
    model: nn.Module, plan: QuantPlan, recipe: QuantRecipe, prompts: Sequence[str], shards: Shards
) -> None:
    """Raises OtherProcessError where processes that are to share the work do not have the same."""
    if shards.count == 1:
        return
    facts = {"plan": repr(plan), "recipe": recipe.to_dict(), "prompts": list(prompts)}
    samples = [strided_sample(parameter) for parameter in model.parameters()]
    shards.agree("model, recipe and prompts", WorkFolder.fingerprint(facts, samples))


def check_dense(model: nn.Module, name: str = "model") -> None:
    """Raises ValueError where linears of the model, called `name`, are quantized already."""
    quantized = [linear for linear, m in model.named_modules() if isinstance(m, LRQLinear)]
    if quantized:
        raise ValueError(
            f"{name} must be dense, got {type(model).__name__} with {len(quantized)} linears that "
            f"are already quantized, {quantized[0]} the first; the original checkpoint has dense "
            "ones, and so has model.dequantize(), less exact"
        )


def _check_parameters(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"quantize_model: {name} is on the meta device and has no values")
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            raise ValueError(f"quantize_model: {name} must be finite, got NaN or inf")
