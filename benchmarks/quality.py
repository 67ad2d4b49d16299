"""Image quality of quantized models: this package's recipes and published methods, like for like.

    python -m benchmarks.quality --prompts 32 --seeds 1 --json quality.json              a CPU
    python -m benchmarks.quality --testbeds demo demo+mild demo+salient --prompts 256 --seeds 3 \
        --device cuda --processes 8 --json quality.json --plot quality.png         GPUs
    python -m benchmarks.quality --from-json quality.json --plot quality.png             a table

Every method quantizes the same linears from the same statistics and draws the same captions from
the same noise as the bf16 model.  Rows count real bits: codes, scales, codebooks, smoothing,
rotations, branches.  A row that is in the JSON file already, measured the same way, is not measured
again.  A row is many small launches and some seconds of one core: --processes measures several at
once on each GPU (on two H200, five to ten on each under NVIDIA's MPS, 363 rows of 768 pictures took
14 minutes).  PSNR is the median over pictures of all seeds; a difference of medians within the
spread of the seeds is a tie; redrawn is the share of pictures with another layout (REDRAWN_DB).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.baselines.acts import scale_rule
from benchmarks.baselines.apply import FakeLinear, QuantizedLayer, apply_method
from benchmarks.baselines.method import InputTransform, Method, Setting
from benchmarks.baselines.registry import EXPERIMENTS, METHODS
from benchmarks.quality_metrics import FeatureNet, feature_net, psnr_db, ssim
from benchmarks.quality_report import BF16, at_equal_bits, plot, row_line, table
from benchmarks.row_processes import devices_of, rows_in_processes
from benchmarks.rows import Row, write_json
from benchmarks.testbeds import Testbed, load_testbed
from lrq_kernels.checkpoint import LinearState
from lrq_kernels.loader import build_linears
from lrq_kernels.packing import unpack_codes
from lrq_kernels.scheme import ACT_BITS, WEIGHT_BITS
from lrq_quant.calibration import ActivationStats, collect_stats
from lrq_quant.demo.pipeline import prompt_generators
from lrq_quant.families import MODULATION
from lrq_quant.mixed_precision import (
    DENSE_BITS,
    BitBudget,
    capture_inputs,
    choose_widths,
    mixed_recipe,
)
from lrq_quant.pipeline import quantize_model
from lrq_quant.recipe import CalibrationOptions, QuantPlan, QuantRecipe, SearchOptions

Job = tuple[str, str, str]  # testbed, recipe, setting
SETTINGS = ("w8a8", "w4a8", "w4a4", "w3a8", "w3a4", "w2a8")
CAPTION_SEED = 2025
# Pictures drawn at once.
_BATCH = {"cpu": 64, "cuda": 256}
_SQNR_ROWS = 256
# Below this a picture has another layout than that of bf16: between the two modes of PSNR.
REDRAWN_DB = 30.0
# Figures of another version are not mixed with these; raise it when a measurement changes.
_VERSION = 3  # 3: rows hold the share of redrawn pictures


def _search(**changes: Any) -> Callable[[str], QuantRecipe]:
    return lambda name: QuantRecipe.from_name(name, search=SearchOptions(**changes))


def _recipe(**changes: Any) -> Callable[[str], QuantRecipe]:
    return lambda name: QuantRecipe.from_name(name, **changes)


def _bare(
    rotations: tuple[str, ...] = ("none",), alphas: tuple[float, ...] = (), **changes: Any
) -> Callable[[str], QuantRecipe]:
    """Twin-log codes rounded to nearest, and one part of the default beside them."""
    alone = {"rounding": "nearest", "bias_correction": False} | changes
    return _recipe(search=SearchOptions(rotations=rotations, alphas=alphas), **alone)


# The bits of the default, dealt out over widths by what they do to the output.
MIXED = "lrq+mixed"
# This package's own: the default, the published method, the default with another part or less one,
# and each part alone.
PRODUCT_RECIPES: dict[str, Callable[[str], QuantRecipe]] = {
    "lrq": QuantRecipe.from_name,
    "lrq-dit": _recipe(mode="paper"),
    "lrq-no-rotation": _search(rotations=("none",)),
    "lrq-no-smoothing": _search(alphas=()),
    "lrq-no-permutation": _search(rotations=("none", "hadamard")),
    "lrq+regular": _search(rotations=("none", "hadamard", "permuted", "dual", "regular")),
    "lrq-regular-alone": _search(rotations=("regular",)),
    "lrq-hadamard-alone": _search(rotations=("hadamard",)),
    "lrq-no-bias-correction": _recipe(bias_correction=False),
    "lrq-no-refinement": _recipe(refinement=0),
    # With the branch that --low-rank adds: on inputs of 512, about the bits of rank 36 on 3072.
    "lrq+rank6": _recipe(low_rank=6),
    "lrq+tables16": _recipe(shared_tables=16),
    "lrq+rank6+tables16": _recipe(low_rank=6, shared_tables=16),
    MIXED: QuantRecipe.from_name,
    "bare": _bare(),
    "bare+rotation": _bare(rotations=SearchOptions().rotations),
    "bare+smoothing": _bare(alphas=SearchOptions().alphas),
    "bare+feedback": _bare(rounding="feedback"),
    "bare+bias-correction": _bare(bias_correction=True),
}
ALL_METHODS: dict[str, Method] = {**METHODS, **EXPERIMENTS}
# Names of several recipes; ablation: the default, and with a part more or less, each alone.
RECIPE_GROUPS: dict[str, tuple[str, ...]] = {
    "published": ("lrq-dit", *METHODS),
    "ablation": (*(name for name in PRODUCT_RECIPES if name != "lrq-dit"), *EXPERIMENTS),
}
DEFAULT_RECIPES = ("lrq", "published")


@dataclass(frozen=True)
class Protocol:
    """How rows are measured; rows of another protocol are not the same row."""

    prompts: int = 256
    seeds: int = 3
    calibration: int = 16
    sample_rows: int = 512
    steps: int = 20
    kernels: bool = False

    def to_dict(self) -> Row:
        return {
            "prompts": self.prompts,
            "seeds": list(range(self.seeds)),
            "calibration_prompts": self.calibration,
            "sampler_steps": self.steps,
            "path": "kernels" if self.kernels else "dequantized",
            "version": _VERSION,
        }


class Bench:
    """One testbed: its statistics and its bf16 pictures, made once."""

    def __init__(
        self, testbed: Testbed, protocol: Protocol, device: torch.device, cache: Path
    ) -> None:
        self.testbed, self.protocol, self.device = testbed, protocol, device
        self.model = testbed.pipeline.transformer
        self.plan: QuantPlan = QuantRecipe().resolve(self.model)
        self.stats = statistics(testbed, self.plan, protocol)
        self.features: FeatureNet = network(testbed, device, cache)
        self.captions = [
            testbed.heldout_captions(protocol.prompts, CAPTION_SEED + seed)
            for seed in range(protocol.seeds)
        ]
        self.reference = self.draw()

    def draw(self, transformer: nn.Module | None = None) -> list[np.ndarray]:
        """Pictures fp32 [P, H, W, 3] of every seed, by `transformer` in place of the bf16 one."""
        pipeline = self.testbed.pipeline
        if transformer is not None:
            pipeline = copy.copy(pipeline)
            pipeline.transformer = transformer
        pictures = []
        for seed, captions in enumerate(self.captions):
            generators = prompt_generators(len(captions), CAPTION_SEED + seed)
            batches = []
            batch = _BATCH[self.device.type]
            for first in range(0, len(captions), batch):
                rows = slice(first, first + batch)
                drawn = pipeline(
                    captions[rows],
                    self.protocol.steps,
                    generator=generators[rows],
                    output_type="np",
                )
                batches.append(drawn.images)
            pictures.append(np.concatenate(batches))
        return pictures

    def row(self, recipe: str, setting: str) -> Row:
        """Quantize, draw, compare."""
        started = time.perf_counter()
        if recipe == BF16:
            figures = {"weight_bits": 16.0, "act_bits": 16, "coverage": 0.0, "source": "the model"}
            pictures = self.reference
        else:
            model = copy.deepcopy(self.model)
            figures = self._quantize(model, recipe, setting)
            figures["quantize_seconds"] = time.perf_counter() - started
            figures["layers"] = self._layers(model, figures["layers"])
            pictures = self.draw(model)
        return {
            "recipe": recipe,
            "setting": setting,
            "testbed": self.testbed.name,
            **self._compare(pictures),
            **figures,
            **self.protocol.to_dict(),
            "seconds": time.perf_counter() - started,
            "device": _device_name(self.device),
        }

    def _quantize(self, model: nn.Module, recipe: str, setting: str) -> Row:
        bits = Setting.parse(setting)
        if recipe in PRODUCT_RECIPES:
            made = PRODUCT_RECIPES[recipe](setting)
            if recipe == MIXED:
                made = self._mixed(model, made)
            quantized = quantize_model(model, made, stats=self.stats)
            dtype = next(model.parameters()).dtype
            self._replace(model, quantized.states, dtype)
            report = quantized.report
            # A budget may leave linears dense: they count with their 16 bits.
            dense = [x for x in self.plan.linears if x.name not in quantized.states]
            dense_weights = sum(x.out_features * x.in_features for x in dense)
            stored = report.weight_bits * report.weights + DENSE_BITS * dense_weights
            weights, coverage = stored / (report.weights + dense_weights), report.coverage
            layers = [
                QuantizedLayer(x.name, x.weights, x.stored_bits, x.weight_sqnr_db)
                for x in report.linears
            ]
            source = "this package"
        else:
            method = ALL_METHODS[recipe]
            layers = apply_method(model, self.plan, self.stats, method, bits)
            stored, count = (sum(getattr(x, n) for x in layers) for n in ("stored_bits", "weights"))
            weights, coverage, source = stored / count, self.plan.coverage, method.source
        return {
            "weight_bits": weights,
            "act_bits": bits.act_bits,
            "coverage": coverage,
            "source": source,
            "layers": layers,
        }

    def _mixed(self, model: nn.Module, recipe: QuantRecipe) -> QuantRecipe:
        report = quantize_model(model, recipe, stats=self.stats).report
        blocks = [x for x in report.linears if x.role != MODULATION]
        bits = sum(x.stored_bits for x in blocks) / sum(x.weights for x in blocks)
        budget = BitBudget(bits, forwards=16)  # of 64 tokens: few forwards tell little
        run = calibration_run(self.testbed, self.protocol)
        captions = self.testbed.calibration_captions(self.protocol.calibration)
        calls = capture_inputs(self.model, run, captions, budget.forwards)
        acts, weights = choose_widths(model, recipe, budget, self.stats, calls)
        return mixed_recipe(recipe, recipe.resolve(model), acts, weights)

    def _replace(
        self, model: nn.Module, states: dict[str, LinearState], dtype: torch.dtype
    ) -> None:
        states = {name: state.to(self.device) for name, state in states.items()}
        if self.protocol.kernels:
            for name, linear in build_linears(states, dtype).items():
                model.set_submodule(name, linear)
        else:
            for name, state in states.items():
                model.set_submodule(name, dequantized_linear(state))

    @torch.no_grad()
    def _layers(self, model: nn.Module, layers: list[QuantizedLayer]) -> list[Row]:
        """Per linear: real bits, weight SQNR, output SQNR on calibration tokens."""
        owner = {x.name: group.name for group in self.plan.groups for x in group.linears}
        rows = []
        for layer in layers:
            tokens = self.stats[owner[layer.name]].sample[:_SQNR_ROWS].to(self.device).float()
            original = self.model.get_submodule(layer.name)
            exact = tokens @ original.weight.float().T
            bias = 0.0 if original.bias is None else original.bias.float()
            noise = model.get_submodule(layer.name)(tokens).float() - exact - bias
            ratio = exact.double().square().sum() / noise.double().square().sum().clamp_min(1e-30)
            rows.append(
                {
                    "name": layer.name,
                    "bits": round(layer.stored_bits / layer.weights, 4),
                    "weight_sqnr_db": _finite(layer.weight_sqnr_db),
                    "output_sqnr_db": _finite(10 * math.log10(max(float(ratio), 1e-30))),
                }
            )
        return rows

    def _compare(self, pictures: list[np.ndarray]) -> Row:
        pairs = list(zip(pictures, self.reference, strict=True))
        psnr = [psnr_db(a, b) for a, b in pairs]
        right = [self.testbed.right(a, c) for a, c in zip(pictures, self.captions, strict=True)]
        every, reference = np.concatenate(pictures), np.concatenate(self.reference)
        quartiles = np.percentile(np.concatenate(psnr), [25, 75])
        return {
            "psnr_db": float(np.median(np.concatenate(psnr))),
            "psnr_db_by_seed": [float(np.median(values)) for values in psnr],
            "psnr_db_quartiles": [float(value) for value in quartiles],
            "redrawn": float((np.concatenate(psnr) < REDRAWN_DB).mean()),
            "ssim": float(np.median(ssim(every, reference, self.device))),
            "feature_distance": float(np.median(self.features.distance(every, reference))),
            "frechet_distance": self.features.frechet(every, reference),
            "prompt_accuracy": float(np.concatenate(right).mean()),
            "prompt_accuracy_by_seed": [float(values.mean()) for values in right],
        }


def network(testbed: Testbed, device: torch.device, cache: Path) -> FeatureNet:
    """The one that compares pictures of this testbed, from the cache or trained for it."""
    file = cache / f"features-{testbed.base}-{_VERSION}.safetensors"
    return feature_net(testbed.scenes(device), file, device=device)


def statistics(testbed: Testbed, plan: QuantPlan, protocol: Protocol) -> dict[str, ActivationStats]:
    """Of every input of the plan, with gram matrices, over the calibration captions."""
    options = CalibrationOptions(batch_size=8, gram=True, sample_rows=protocol.sample_rows)
    run, model = calibration_run(testbed, protocol), testbed.pipeline.transformer
    captions = testbed.calibration_captions(protocol.calibration)
    return collect_stats(run, model, plan.groups, captions, options)


def calibration_run(testbed: Testbed, protocol: Protocol) -> Callable[[list[str]], None]:
    """Draws a batch of captions, each from a noise of its own."""

    def run(batch: list[str]) -> None:
        seeds = [zlib.crc32(text.encode()) for text in batch]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        testbed.pipeline(batch, protocol.steps, generator=generators, output_type="pt")

    return run


def dequantized_linear(state: LinearState) -> FakeLinear:
    """The layer that LRQLinear is, in fp32 torch: for machines on which its kernels are slow."""
    scheme = state.scheme
    codes = unpack_codes(state.codes, scheme.weight_bits, state.in_features)
    weight = state.codebook().decode(codes)
    transform = InputTransform(smooth=state.smooth_scale, rotation=state.rotation)
    act = scale_rule(scheme.scale_mode, scheme.scale_factor)
    return FakeLinear(weight, state.bias, transform, act, scheme.act_bits)


def expanded(recipes: Sequence[str]) -> list[str]:
    """Recipes with groups replaced by what is in them, each once."""
    names = (name for recipe in recipes for name in RECIPE_GROUPS.get(recipe, (recipe,)))
    return list(dict.fromkeys(names))


def is_possible(recipe: str, setting: str) -> bool:
    """This package's format holds 2 to 4 bits a weight; so does its codebook in experiments."""
    bits = Setting.parse(setting)
    own = recipe in PRODUCT_RECIPES or recipe in EXPERIMENTS
    return not own or (bits.weight_bits in WEIGHT_BITS and bits.act_bits in ACT_BITS)


# ---- rows ---------------------------------------------------------------------------------------


def measure(
    testbeds: Sequence[str],
    recipes: Sequence[str],
    settings: Sequence[str],
    protocol: Protocol,
    device: torch.device,
    *,
    json_file: Path | None = None,
    cache: Path = Path("build/quality"),
    folder: Path | None = None,
    processes: int = 1,
) -> list[Row]:
    """Rows of every testbed, recipe and setting, those in json_file among them as they are.

    processes: on `device`, or on each GPU where that is "cuda"; with several, rows come in the
    order in which they are done. Raises RuntimeError where one of them fails.
    """
    rows: list[Row] = _read(json_file)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
    have = {_key(row) for row in rows}
    jobs = [(testbed, BF16, BF16) for testbed in testbeds]
    for testbed in testbeds:
        pairs = [(r, s) for s in settings for r in recipes if is_possible(r, s)]
        jobs += [(testbed, r, s) for r, s in pairs]
    facts = protocol.to_dict()
    missing = [
        job
        for job in jobs
        if _key(dict(zip(("testbed", "recipe", "setting"), job, strict=True)) | facts) not in have
    ]
    missing.sort(key=lambda job: testbeds.index(job[0]))
    print(f"{len(jobs) - len(missing)} of {len(jobs)} rows are there already", flush=True)
    devices = devices_of(device) if processes > 1 else [device]
    workers = min(processes * len(devices), len(missing))
    measured: Iterable[Row]
    if workers > 1:
        for base in dict.fromkeys(testbed.partition("+")[0] for testbed, _, _ in missing):
            network(load_testbed(base, device, folder), device, cache)  # one for all processes
        measure_rows = functools.partial(_rows_of, protocol=protocol, cache=cache, folder=folder)
        measured = rows_in_processes(measure_rows, missing, devices, workers)
    else:
        measured = _rows_of(missing, device, protocol, cache, folder)
    started = time.perf_counter()
    for done, row in enumerate(measured):
        rows.append(row)
        if json_file is not None:
            write_json(rows, json_file)
        left = (time.perf_counter() - started) / (done + 1) * (len(missing) - done - 1)
        print(f"[{done + 1}/{len(missing)}] {row_line(row)}  {_minutes(left)} left", flush=True)
    return rows


def _rows_of(
    jobs: Iterable[Job], device: torch.device, protocol: Protocol, cache: Path, folder: Path | None
) -> Iterator[Row]:
    """The row of each job; a testbed is loaded when it differs from that of the job before."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # for drawing: calibration does not heed it
    bench: Bench | None = None
    for testbed, recipe, setting in jobs:
        if bench is None or bench.testbed.name != testbed:
            bench = Bench(load_testbed(testbed, device, folder), protocol, device, cache)
        yield bench.row(recipe, setting)


def _key(row: Row) -> str:
    names = ("testbed", "recipe", "setting", *Protocol().to_dict())
    return json.dumps([row.get(name) for name in names])


def _read(file: Path | None) -> list[Row]:
    if file is None or not file.is_file():
        return []
    rows = json.loads(file.read_text())
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{file} must hold rows of this benchmark, got something else")
    return rows


def _finite(value: float) -> float | None:
    return round(value, 3) if math.isfinite(value) else None


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _arguments() -> argparse.Namespace:
    default = Protocol()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*PRODUCT_RECIPES, *ALL_METHODS, *RECIPE_GROUPS]
    parser.add_argument("--testbeds", nargs="+", default=["demo"])
    parser.add_argument(
        "--recipes", nargs="+", choices=known, default=DEFAULT_RECIPES, metavar="RECIPE"
    )
    parser.add_argument("--settings", nargs="+", default=SETTINGS, metavar="wXaY")
    parser.add_argument("--prompts", type=int, default=default.prompts)
    parser.add_argument("--seeds", type=int, default=default.seeds)
    parser.add_argument("--calibration", type=int, default=default.calibration)
    parser.add_argument("--steps", type=int, default=default.steps, help="of the sampler")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--processes", type=int, default=1, help="at once, on each GPU")
    parser.add_argument("--cache", type=Path, default=Path("build/quality"))
    parser.add_argument("--folder", type=Path, help="of the trained testbed")
    parser.add_argument("--json", type=Path, help="rows, read and continued when it is there")
    parser.add_argument("--from-json", type=Path, help="report rows measured before")
    parser.add_argument("--plot", type=Path, help="draw PSNR against bits into this file")
    parser.add_argument("--list", action="store_true", help="the recipes and their sources")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    if arguments.list:
        for name in PRODUCT_RECIPES:
            print(f"{name:<24} this package")
        for method in ALL_METHODS.values():
            print(f"{method.name:<24} {method.source}")
        for group, names in RECIPE_GROUPS.items():
            print(f"{group:<24} {' '.join(names)}")
        return
    if arguments.from_json:
        rows = _read(arguments.from_json)
    else:
        device = torch.device(arguments.device)
        protocol = Protocol(
            arguments.prompts,
            arguments.seeds,
            arguments.calibration,
            steps=arguments.steps,
            kernels=device.type == "cuda",
        )
        rows = measure(
            arguments.testbeds,
            expanded(arguments.recipes),
            [Setting.parse(name).name for name in arguments.settings],
            protocol,
            device,
            json_file=arguments.json,
            cache=arguments.cache,
            folder=arguments.folder,
            processes=arguments.processes,
        )
    if arguments.plot:
        plot(rows, arguments.plot)
    print(table(rows))
    print(at_equal_bits(rows, "lrq", RECIPE_GROUPS["published"]))


if __name__ == "__main__":
    main()
