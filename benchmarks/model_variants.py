"""Ways to run one transformer, for benchmarks.bench_model: what a variant does to the bf16 model.

    bf16-eager, bf16-compiled, bf16-graph
    torchao-fp8-compiled     Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())
    torchao-int8-compiled    Int8DynamicActivationInt8WeightConfig()
    nf4                      bitsandbytes' Linear4bit, multiplied in bf16
    sdnq, sdnq-compiled      SDNQ's int8 weights and tokens, after its Hadamard transform
    SCHEME-loaded            lrq as loaded, q, k and v in one GEMM; SCHEME: w4a8, w4a4, w3a8, ...
    SCHEME-eager             and lrq_quant.fuse_blocks where the model has such blocks
    SCHEME-graph             and lrq_kernels.graph over that
    SCHEME-compiled          as loaded, under torch.compile with lrq's fusion pass

Every peer quantizes the linears that lrq's default recipe quantizes in the blocks (attention and
feed-forward); its modulation and embedders stay in bf16. "compiled" is compile_repeated_blocks for
FLUX and the whole model for others.
"""

from __future__ import annotations

import gc
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lrq_kernels.fusion
from benchmarks.peers import package, sdnq_linear
from lrq_quant.model_memory import tensor_bytes
from lrq_quant.model_source import ModelSource
from lrq_quant.run_modes import MODES, apply_mode

PEER_MODES = {
    "bf16": ("eager", "compiled", "graph"),
    "torchao-fp8": ("eager", "compiled"),
    "torchao-int8": ("eager", "compiled"),
    "nf4": ("eager",),
    "sdnq": ("eager", "compiled"),
}
# Whose name alone means eager.
SHORT_NAMES = ("nf4", "sdnq")
DEFAULT_VARIANTS = (
    "bf16-eager",
    "bf16-compiled",
    "torchao-fp8-compiled",
    "torchao-int8-compiled",
    "nf4",
    "sdnq-compiled",
    *(f"w4a8-{mode}" for mode in MODES),
    "w4a4-graph",
    "w3a8-graph",
)
FACTS_FILE = "bench_model.json"
_SCHEME = re.compile(r"(w[234]a(?:4|8|16))(?:\+rank([1-9]\d*))?(?:\+tables([1-9]\d*))?")


@dataclass(frozen=True)
class Variant:
    """base: a key of PEER_MODES, a scheme such as "w4a8", or one with a low-rank branch as in
    "w4a8+rank32", shared tables as in "w4a8+tables16", or both; mode: how it runs."""

    name: str
    base: str
    mode: str

    @staticmethod
    def parse(name: str) -> Variant:
        """Raises ValueError for what is no variant."""
        if name in SHORT_NAMES:
            return Variant(name, name, "eager")
        base, _, mode = name.rpartition("-")
        is_scheme = _SCHEME.fullmatch(base) is not None
        if mode in PEER_MODES.get(base, MODES if is_scheme else ()):
            return Variant(name, base, mode)
        raise ValueError(
            f"a variant must be one of {peer_names()} or SCHEME-MODE as in w4a8-graph or "
            f"w4a8+rank32+tables16-graph, with a mode of {MODES}, got {name!r}"
        )

    @property
    def is_lrq(self) -> bool:
        return self.base not in PEER_MODES


def peer_names() -> list[str]:
    names = [f"{base}-{mode}" for base, modes in PEER_MODES.items() for mode in modes]
    short = {f"{base}-eager": base for base in SHORT_NAMES}
    return [short.get(name, name) for name in names]


def free() -> None:
    """Give back what deleted models held, so that every variant starts alike."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ---- peers --------------------------------------------------------------------------------------


def block_linears(model: nn.Module) -> set[str]:
    """Names of the attention and feed-forward linears of the blocks, by lrq's default recipe."""
    from lrq_quant import QuantRecipe

    plan = QuantRecipe(modulation=None).resolve(model)
    return {linear.name for group in plan.groups for linear in group.linears}


def _torchao_fp8(model: nn.Module) -> None:
    quantization = package("torchao.quantization")
    rows = quantization.PerRow()
    _torchao(model, quantization.Float8DynamicActivationFloat8WeightConfig(granularity=rows))


def _torchao_int8(model: nn.Module) -> None:
    _torchao(model, package("torchao.quantization").Int8DynamicActivationInt8WeightConfig())


def _torchao(model: nn.Module, config: Any) -> None:
    names = block_linears(model)
    package("torchao.quantization").quantize_(
        model, config, filter_fn=lambda _, name: name in names
    )


def _nf4(model: nn.Module) -> None:
    bitsandbytes = package("bitsandbytes")
    for name in block_linears(model):
        dense = model.get_submodule(name)
        options = {"compute_dtype": dense.weight.dtype, "quant_type": "nf4"}
        linear = bitsandbytes.nn.Linear4bit(
            dense.in_features, dense.out_features, dense.bias is not None, **options
        )
        # Quantized when it comes from the host to the GPU.
        linear.weight = bitsandbytes.nn.Params4bit(
            dense.weight.data.cpu(), requires_grad=False, quant_type="nf4"
        )
        linear.bias = dense.bias
        model.set_submodule(name, linear.to(dense.weight.device))


def _sdnq(model: nn.Module) -> None:
    for name in block_linears(model):
        model.set_submodule(name, sdnq_linear(model.get_submodule(name)))


_QUANTIZE: dict[str, Callable[[nn.Module], None]] = {
    "torchao-fp8": _torchao_fp8,
    "torchao-int8": _torchao_int8,
    "nf4": _nf4,
    "sdnq": _sdnq,
}


def weight_bytes(model: nn.Module) -> int:
    """tensor_bytes, and the scales that bitsandbytes keeps beside its parameters."""
    states = (getattr(parameter, "quant_state", None) for parameter in model.parameters())
    return tensor_bytes(model) + sum(_state_bytes(state) for state in states if state is not None)


def _state_bytes(state: Any) -> int:
    """Of the scales of one weight; tables that all weights share are not counted."""
    total = state.absmax.numel() * state.absmax.element_size()
    nested = getattr(state, "state2", None)
    return total if nested is None else total + _state_bytes(nested)


# ---- models of a run ----------------------------------------------------------------------------


class Models:
    """Makes the models of one run on `device`: the bf16 model once for variants in a row that do
    not change it, a quantized checkpoint once for each scheme, kept in `folder`. model: as of a
    ModelSource, of which a quantized folder has variants of its scheme alone. dtype: of what is not
    quantized, and of the weights that are."""

    def __init__(
        self, model: str, device: str, folder: Path, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        self.source = ModelSource(model)
        self.device, self.folder, self.dtype = device, folder, dtype
        self._dense: nn.Module | None = None

    def release(self) -> None:
        """Free the bf16 model: beside it nothing is measured."""
        self._dense = None
        free()

    def dense(self) -> nn.Module:
        if self._dense is None:
            self._dense = self.source.dense(self.device, self.dtype)
        return self._dense

    def make(self, variant: Variant) -> tuple[nn.Module, dict[str, Any]]:
        """The model before it is fused, compiled or captured, and what making it took."""
        if variant.base == "bf16":
            return self.dense(), {"weight_bits": 16.0}
        if variant.is_lrq and variant.base == self.source.held_scheme:
            self.release()
            return self._load(self.source.folder, {})
        if variant.is_lrq:
            folder, facts = self._checkpoint(variant.base)
            self.release()
            return self._load(folder, facts)
        model = self.dense()
        self._dense = None  # changed in place
        start = time.perf_counter()
        with torch.no_grad():
            _QUANTIZE[variant.base](model)
        self._wait()
        return model, {"quantize_s": time.perf_counter() - start}

    def _load(self, folder: Path, facts: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
        from lrq_quant.pipeline_io import load_transformer

        start = time.perf_counter()
        model = load_transformer(folder, device=self.device, dtype=self.dtype)
        self._wait()
        model = model.eval().requires_grad_(False)
        return model, {**facts, "load_s": time.perf_counter() - start}

    def _checkpoint(self, base: str) -> tuple[Path, dict[str, Any]]:
        """Quantized from the weights alone, or found from before: a folder is complete or not
        there."""
        from lrq_quant import quantize_model
        from lrq_quant.pipeline_io import save_transformer

        kind = "" if self.dtype == torch.bfloat16 else f"-{str(self.dtype).removeprefix('torch.')}"
        folder = self.folder / f"{self.source.label}-{base}{kind}"
        facts_file = folder / FACTS_FILE
        if facts_file.is_file():
            return folder, json.loads(facts_file.read_text())
        model = self.dense()
        start = time.perf_counter()
        result = quantize_model(model, _recipe(base))
        self._wait()
        facts = {
            "quantize_s": time.perf_counter() - start,
            "weight_bits": result.report.weight_bits,
            "coverage": result.report.coverage,
        }
        temporary = folder.with_name(f"{folder.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        save_transformer(model, result, temporary)
        facts["file_gb"] = sum(file.stat().st_size for file in temporary.iterdir()) / 1e9
        (temporary / FACTS_FILE).write_text(json.dumps(facts))
        temporary.rename(folder)
        return folder, facts

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()


def _recipe(base: str) -> Any:
    from lrq_quant import QuantRecipe

    match = _SCHEME.fullmatch(base)
    if match is None:
        raise ValueError(f"a scheme must be as w4a8 or w4a8+rank32+tables16, got {base!r}")
    scheme, rank, tables = match.groups()
    return QuantRecipe.from_name(scheme, low_rank=int(rank or 0), shared_tables=int(tables or 0))


# ---- ways to run --------------------------------------------------------------------------------


def prepare(
    model: nn.Module, variant: Variant, *, compile: str | None = None, fusion: bool = True
) -> dict[str, Any]:
    """Put `model` into the mode of the variant, with or without our pass; facts for the row."""
    if variant.mode == "compiled":
        torch._dynamo.reset()
        (lrq_kernels.fusion.enable if fusion else lrq_kernels.fusion.disable)()
        lrq_kernels.fusion.reset_counts()
    return apply_mode(model, variant.mode, compile)


def fusion_counts() -> dict[str, int]:
    """Pattern -> matches since the last compiled lrq variant began."""
    return {name: n for name, n in lrq_kernels.fusion.counts().items() if n}


@contextmanager
def cold_compiles() -> Iterator[None]:
    """torch.compile without what earlier processes left: compile_s is that of a first compilation,
    and the fusion pass runs over every graph, which it does not over one from the cache."""
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    with inductor.patch(fx_graph_cache=False), functorch.patch(enable_autograd_cache=False):
        yield
