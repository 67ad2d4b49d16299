"""check: what of a quantized pipeline is in effect, and what only seems to be.

print(lrq_quant.check(pipeline)) lists the kernels that will run, the linears that are dense and
why, fused projections and adapters. Checkup.problems holds what is silently not in effect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import lrq_kernels
from lrq_kernels import LRQLinear, get_act_bits
from lrq_kernels.linear import has_hooks

from .config import LRQConfig
from .families import MODULATION, find_family
from .folded_permutations import folded_permutations
from .fused_blocks import fused_blocks
from .fused_modulation import is_stacked, modulation_obstacle
from .fused_projections import fusable_attentions, fused_projections
from .fused_readiness import HAS_BRANCH
from .info import MIN_CAPABILITY
from .recipe import QuantPlan, QuantRecipe


@dataclass(frozen=True)
class Checkup:
    """lines: what was found, component by component; problems: what has no effect or the wrong one;
    empty when all is well. str() is both."""

    lines: tuple[str, ...]
    problems: tuple[str, ...]

    def __str__(self) -> str:
        problems = [f"PROBLEM: {problem}" for problem in self.problems]
        return "\n".join([*self.lines, *(problems or ["nothing is silently out of effect"])])


def check(pipeline: Any) -> Checkup:
    """Look at a diffusers pipeline, or at one model. Nothing is run and nothing is changed."""
    if isinstance(pipeline, nn.Module):
        components: Mapping[str, Any] = {"model": pipeline}
    else:
        components = getattr(pipeline, "components", None) or {}
    models = {name: c for name, c in components.items() if isinstance(c, nn.Module)}
    if not models:
        raise TypeError(f"check: expected a pipeline or a model, got {type(pipeline).__name__}")
    lines: list[str] = []
    problems: list[str] = []
    for name, model in models.items():
        own = _ModelCheck(name, model)
        lines += own.lines
        problems += own.problems
    if not any(isinstance(m, LRQLinear) for model in models.values() for m in model.modules()):
        problems.append("no component holds a quantized linear")
    return Checkup(tuple(lines), tuple(problems))


_YET_DENSE = "part of the family's recipe, yet dense"


class _ModelCheck:
    def __init__(self, name: str, model: nn.Module) -> None:
        self.name, self.model = name, model
        self.lines: list[str] = []
        self.problems: list[str] = []
        self.quantized = {n: m for n, m in model.named_modules() if isinstance(m, LRQLinear)}
        title = f"{name} ({type(model).__name__})"
        if not self.quantized:
            self.lines.append(f"{title}: not quantized")
            if getattr(model, "is_quantized", False) and hasattr(model, "hf_quantizer"):
                method = model.hf_quantizer.quantization_config.quant_method
                if method == "lrq":
                    self.problems.append(f"{name} says it is quantized and has no quantized linear")
            return
        schemes = Counter(linear.scheme.name for linear in self.quantized.values())
        kinds = ", ".join(f"{count} {scheme}" for scheme, count in schemes.items())
        self.lines.append(f"{title}: {len(self.quantized)} quantized linears ({kinds})")
        ranks = [q.input_quantizer.low_rank for q in self.quantized.values() if q.has_low_rank]
        if ranks:
            self._say(f"{len(ranks)} of them have a low-rank branch, of rank {max(ranks)} at most")
        if (act_bits := get_act_bits(self.model)) is not None:
            self._say(f"activations run at {act_bits} bits for now (lrq_act_bits)")
        self._kernels()
        self._dense()
        self._meta()
        self._fused()
        self._blocks()
        self._permutations()
        self._scales()
        self._adapters()

    def _say(self, text: str) -> None:
        self.lines.append(f"  {text}")

    def _kernels(self) -> None:
        devices = Counter(linear.packed_weight.device for linear in self.quantized.values())
        dtypes = sorted({str(linear.dtype) for linear in self.quantized.values()})
        self._say(f"dtype of the model around them: {', '.join(dtypes)}")
        for device, count in devices.items():
            kernels, problem = kernels_of(device)
            self._say(f"{count} on {device}: {kernels}")
            if problem:
                self.problems.append(f"{self.name}: {problem}")
        if len(devices) > 1 and not _is_offloaded(self.model):
            self._say("linears of one model are on several devices")

    def _dense(self) -> None:
        dense = {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
            and not isinstance(module, LRQLinear)
            and ".lora_" not in name
        }
        known = find_family(self.model) is not None
        plan = QuantRecipe().resolve(self.model) if known else None
        reasons = _reasons(dense, plan)
        excluded = _excluded(self.model, dense, plan)
        counts: Counter[str] = Counter()
        unexplained = []
        for name in dense:
            why = reasons.get(name, _YET_DENSE)
            if name in excluded:
                why = "excluded by the quantization config"
            elif name.endswith(".base_layer"):
                why = "dense under an adapter"
            counts[why] += 1
            unexplained += [name] if why == _YET_DENSE else []
        for why, count in counts.items():
            self._say(f"{count} dense linears: {why}")
        # Without a configuration nobody knows whether it was meant.
        if unexplained and _configuration(self.model) is not None:
            more = "" if len(unexplained) <= 5 else f" and {len(unexplained) - 5} more"
            self.problems.append(
                f"{self.name}: dense, which the configuration does not say: "
                f"{', '.join(unexplained[:5])}{more}"
            )

    def _meta(self) -> None:
        if _is_offloaded(self.model):
            self._say("offloaded by hooks")
            return
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        meta = [name for name, tensor in tensors.items() if tensor.is_meta]
        if meta:
            self.problems.append(f"{self.name}: on the meta device, without values: {meta[:5]}")

    def _blocks(self) -> None:
        blocks = fused_blocks(self.model)
        if not blocks:
            return
        left = {name: why for name, why in blocks.items() if why is not None}
        branched = [f"{name}: {why}" for name, why in left.items() if why.endswith(HAS_BRANCH)]
        if len(branched) == len(blocks):
            self._say(f"{len(blocks)} blocks run unfused, by their own forward: {branched[0]}")
            return
        if len(left) == len(blocks):
            self._say(f"{len(blocks)} blocks run unfused: lrq_quant.fuse_blocks(model)")
            return
        text = f"{len(blocks) - len(left)} of {len(blocks)} blocks run fused"
        examples = [f"{name}: {why}" for name, why in left.items()]
        self._say("; not ".join([text, *examples[:3]]) + ("; ..." if len(examples) > 3 else ""))
        if is_stacked(self.model):
            self._say("the modulation of all blocks is one linear")
        elif (why := modulation_obstacle(self.model)) is not None:
            self._say(f"each block computes its modulation: {why}")

    def _permutations(self) -> None:
        inputs = folded_permutations(self.model)
        if not inputs:
            return
        folded = {name: place.why for name, place in inputs.items() if place.into}
        gathered = Counter(place.why for place in inputs.values() if not place.into)
        self._say(f"{len(inputs)} inputs are permuted, {len(folded)} of them by what makes them")
        for why, count in gathered.items():
            self._say(f"{count} are gathered in front of the rotation: {why}")
        for name, why in folded.items():
            if why is not None:
                self.problems.append(
                    f"{self.name}: the input of {name} comes permuted, and {why}; call "
                    "lrq_quant.unfold_permutations(model)"
                )

    def _scales(self) -> None:
        quantizers = {linear.input_quantizer for linear in self.quantized.values()}
        wide = sum(quantizer.rotates_in_triton for quantizer in quantizers)
        if wide:
            self._say(
                f"{wide} inputs have smoothing that bf16 does not hold, made by an earlier "
                "calibration: on a GPU Triton rotates them, not the faster CUDA kernel"
            )

    def _fused(self) -> None:
        fused, open_ones = fused_projections(self.model), fusable_attentions(self.model)
        self._say(f"{len(fused)} fused projections")
        if open_ones:
            self._say(
                f"{len(open_ones)} attentions could be fused: lrq_quant.fuse_projections(model)"
            )
        for name, module in self.model.named_modules():
            stray = getattr(module, "to_qkv", None) or getattr(module, "to_kv", None)
            if isinstance(stray, nn.Linear) and not isinstance(stray, LRQLinear):
                separate = getattr(module, "to_k", None)
                if isinstance(separate, LRQLinear):
                    self.problems.append(
                        f"{self.name}: {name} runs a dense fused projection made from placeholders"
                    )

    def _adapters(self) -> None:
        layers = {n: m for n, m in self.model.named_modules() if _is_adapter_layer(m)}
        loaded = set(getattr(self.model, "peft_config", None) or ())
        if not layers:
            for adapter in sorted(loaded):
                self.problems.append(f"{self.name}: adapter {adapter!r} is loaded and on no linear")
            return
        found = sorted(loaded.union(*map(_adapters_of, layers.values())))
        for adapter in found:
            with_it = [layer for layer in layers.values() if adapter in _adapters_of(layer)]
            strengths = [getattr(layer, "scaling", {}).get(adapter, 1.0) for layer in with_it]
            scales = sorted({round(float(strength), 4) for strength in strengths})
            active = [
                layer
                for layer in with_it
                if adapter in layer.active_adapters and not layer.disable_adapters
            ]
            self._say(f"adapter {adapter!r}: active on {len(active)} of {len(with_it)}, {scales=}")
            if not with_it:
                self.problems.append(f"{self.name}: adapter {adapter!r} is loaded and on no linear")
            elif not active:
                self.problems.append(f"{self.name}: adapter {adapter!r} is loaded and not active")
            elif scales == [0.0]:
                self.problems.append(f"{self.name}: adapter {adapter!r} is active with scale 0")
        if fused_projections(self.model):
            self.problems.append(
                f"{self.name}: adapters and fused projections: what the adapters do to q, k and v "
                "is lost; call lrq_quant.unfuse_projections(model) and load them again"
            )


def kernels_of(device: torch.device) -> tuple[str, str | None]:
    """What runs a quantized linear on `device`, and the problem if nothing or the wrong does."""
    if device.type == "cpu":
        return "reference kernels in PyTorch, exact and slow", None
    if device.type == "meta":
        return "placed by offloading hooks", None
    if device.type != "cuda":
        return "no kernels", f"there are no kernels for {device}"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return "no kernels", f"{device} is sm_{capability[0]}{capability[1]}, below sm_80"
    status = lrq_kernels.cuda_library_status()
    if not status.startswith("loaded from"):
        return "no CUDA kernels", f"the CUDA kernels are not there: {status}"
    return f"CUDA and Triton kernels ({status})", None


def _reasons(dense: Iterable[str], plan: QuantPlan | None) -> dict[str, str]:
    """Linear -> why the default recipe keeps it; those that it quantizes are not in it. plan: the
    recipe's for the model, None where its class is of no known family."""
    if plan is None:
        return dict.fromkeys(dense, "the class is of no known family")
    return {kept.name: kept.why for kept in plan.kept}


def _excluded(model: nn.Module, dense: Mapping[str, nn.Linear], plan: QuantPlan | None) -> set[str]:
    """Dense linears that the configuration in config.json keeps, as far as it tells."""
    from .recipe_patterns import matches

    config = _configuration(model)
    if config is None:
        return set()
    patterns = [*config.modules_to_not_convert]
    patterns += [pattern for pattern, scheme in config.overrides.items() if scheme is None]
    names = {name for name in dense if any(matches(pattern, name) for pattern in patterns)}
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    names |= {name for name in dense if kept & set(name.split("."))}
    if config.modulation is None and plan is not None:
        names |= {linear.name for linear in plan.linears if linear.role == MODULATION}
    return names


def _configuration(model: nn.Module) -> LRQConfig | None:
    """That of config.json, where the model was loaded or quantized by from_pretrained."""
    config = getattr(getattr(model, "hf_quantizer", None), "quantization_config", None)
    return config if isinstance(config, LRQConfig) else None


def _is_adapter_layer(module: nn.Module) -> bool:
    """A layer of PEFT, of any kind: LoRA, LoKr, ..."""
    return hasattr(module, "base_layer") and hasattr(module, "adapter_layer_names")


def _adapters_of(layer: Any) -> set[str]:
    """Names of the adapters that have weights on a layer."""
    kinds = [getattr(layer, name, {}) for name in layer.adapter_layer_names]
    return {adapter for kind in kinds for adapter in kind.keys()}  # noqa: SIM118


def _is_offloaded(model: nn.Module) -> bool:
    return any(map(has_hooks, model.modules()))
