"""The report of a checkpoint whose folder keeps none, as save_pretrained writes it: from the files
alone, so without what only quantizing could measure."""

from __future__ import annotations

import math

from safetensors import safe_open

from lrq_kernels.checkpoint import FIELDS, Header
from lrq_kernels.scheme import QuantScheme

from .recipe import KeptLinear
from .report import LinearReport, QuantReport
from .rotation_search import PERMUTED

NO_REPORT = "no report was kept"


def report_of_checkpoint(header: Header) -> QuantReport:
    """Schemes, rotations, bits and coverage. SQNR is NaN, roles are empty, and what is kept are the
    dense matrices, of which some may be tables of embeddings. Raises CheckpointError."""
    linears = tuple(_linear(name, header) for name in header.layers)
    shapes = _dense_shapes(header)
    kept = tuple(
        KeptLinear(name.removesuffix(".weight"), math.prod(shape), "a dense matrix")
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    )
    quantized = sum(linear.weights for linear in linears)
    biases = sum(linear.out_features for linear in linears if "bias" in header.fields(linear.name))
    sizes = [header.facts(name).sizes for name in header.layers]
    recipe = {
        "low_rank": max((of.rank for of in sizes), default=0),
        "shared_tables": max((of.shared_tables for of in sizes), default=0),
    }
    return QuantReport(
        model_class=header.model_class,
        recipe=recipe,
        calibrated=False,
        coverage=quantized / max(1, quantized + sum(linear.weights for linear in kept)),
        parameters=quantized + biases + sum(map(math.prod, shapes.values())),
        linears=linears,
        kept=kept,
    )


def _dense_shapes(header: Header) -> dict[str, tuple[int, ...]]:
    """By name, in order; no tensor is read."""
    dense, found = header.dense(), {}
    for file in sorted({header.files[name] for name in dense}):
        with safe_open(str(file), framework="pt") as handle:
            here = [name for name in dense if header.files[name] == file]
            found.update({name: tuple(handle.get_slice(name).get_shape()) for name in here})
    return {name: found[name] for name in sorted(found)}


def _linear(name: str, header: Header) -> LinearReport:
    facts = header.facts(name)
    owner = header.layers[name].get("shared_input", name)
    stored = [FIELDS[field] for field in header.fields(name) if field != "bias"]
    sizes = (math.prod(field.shape(facts.sizes)) for field in stored)
    return LinearReport(
        name=name,
        role="",
        scheme=facts.scheme,
        shared_input=owner,
        out_features=facts.sizes.n,
        in_features=facts.sizes.k,
        rotation=_rotation(facts.scheme, header.fields(owner)),
        why=NO_REPORT,
        alpha=None,
        j=None,
        peak_ratio=None,
        weight_sqnr_db=math.nan,
        output_sqnr_db=None,
        stored_bits=sum(
            8 * size * field.dtype.itemsize for size, field in zip(sizes, stored, strict=True)
        ),
        candidates={},
    )


def _rotation(scheme: QuantScheme, fields: dict[str, str]) -> str:
    kind = scheme.rotation
    if kind == "hadamard" and "permutation" in fields:
        kind = PERMUTED
    block = "" if kind == "none" else str(scheme.block_size)
    return f"{kind}{block}{' smoothed' if 'smooth_scale' in fields else ''}"
