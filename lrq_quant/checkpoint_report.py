"""The report of a checkpoint whose folder keeps none, as save_pretrained writes it: from the files
alone, so without what only quantizing could measure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from lrq_kernels import checkpoint
from lrq_kernels.checkpoint import Header
from lrq_kernels.scheme import QuantScheme

from .recipe import KeptLinear
from .report import LinearReport, QuantReport
from .rotation_search import PERMUTED

NO_REPORT = "no report was kept"


def report_of_checkpoint(folder: Path) -> QuantReport:
    """Schemes, rotations, bits and coverage of a transformer folder. SQNR is NaN, roles are empty,
    and what is kept are the dense matrices, of which some may be tables of embeddings.

    Raises FileNotFoundError or CheckpointError."""
    header = checkpoint.read_header(checkpoint.checkpoint_files(folder))
    shapes = _shapes(header)
    linears = tuple(
        _linear(name, dict(description), header, shapes)
        for name, description in header.layers.items()
    )
    kept = tuple(
        KeptLinear(name.removesuffix(".weight"), math.prod(shapes[name][0]), "a dense matrix")
        for name in sorted(header.dense())
        if name.endswith(".weight") and len(shapes[name][0]) == 2
    )
    quantized = sum(linear.weights for linear in linears)
    biases = sum(linear.out_features for linear in linears if f"{linear.name}.bias" in shapes)
    dense = sum(math.prod(shapes[name][0]) for name in header.dense())
    ranks = [layer.get("low_rank") or 0 for layer in header.layers.values()]
    return QuantReport(
        model_class=header.model_class,
        recipe={"low_rank": max(ranks, default=0)},
        calibrated=False,
        coverage=quantized / max(1, quantized + sum(linear.weights for linear in kept)),
        parameters=quantized + biases + dense,
        linears=linears,
        kept=kept,
    )


def _shapes(header: Header) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name of each tensor -> its shape and the bits of an element, without reading it."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for file in sorted(set(header.files.values())):
        with safe_open(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118
                part = handle.get_slice(name)
                # "BF16", "I8", "F8_E4M3"
                bits = re.search(r"\d+", str(part.get_dtype()))
                found[name] = tuple(part.get_shape()), int(bits[0]) if bits else 8
    return found


def _linear(
    name: str,
    description: dict[str, Any],
    header: Header,
    shapes: Mapping[str, tuple[tuple[int, ...], int]],
) -> LinearReport:
    owner = description.pop("shared_input", name)
    out_features, in_features = description.pop("out_features"), description.pop("in_features")
    description.pop("low_rank", None)
    scheme = QuantScheme.from_dict(description)
    own, of_input = header.fields(name), header.fields(owner)
    stored = [shapes[tensor] for field, tensor in own.items() if field != "bias"]
    return LinearReport(
        name=name,
        role="",
        scheme=scheme,
        shared_input=owner,
        out_features=out_features,
        in_features=in_features,
        rotation=_rotation(scheme, of_input),
        why=NO_REPORT,
        alpha=None,
        j=None,
        peak_ratio=None,
        weight_sqnr_db=math.nan,
        output_sqnr_db=None,
        stored_bits=sum(math.prod(shape) * bits for shape, bits in stored),
        candidates={},
    )


def _rotation(scheme: QuantScheme, fields: Mapping[str, str]) -> str:
    kind = scheme.rotation
    if kind == "hadamard" and "permutation" in fields:
        kind = PERMUTED
    block = "" if kind == "none" else str(scheme.block_size)
    return f"{kind}{block}{' smoothed' if 'smooth_scale' in fields else ''}"
