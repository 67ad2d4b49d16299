"""The methods of the comparison, each with its source."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.baselines import acts, transforms, weights
from benchmarks.baselines.method import Method, TransformRule

_TOKEN = acts.fixed(acts.Absmax())
_GROUP64 = acts.fixed(acts.Absmax(group=64))
_SVDQUANT_ALPHAS = (0.3, 0.4, 0.5, 0.6, 0.7)


def _branch_bits(rank: int) -> float:
    """Of a branch in 16 bits beside a 3072 x 3072 weight, as on FLUX, in bits a weight.  Those of a
    small testbed get the same share, for rank 32 there would double its weights."""
    return 16 * rank * 2 / 3072


def _quarot_gptq(name: str, group: int | None) -> Method:
    grouped = f", groups of {group}" if group else ""
    return Method(
        name,
        f"QuaRot, arXiv 2404.00456: full Hadamard, GPTQ, activation clip 0.9{grouped}",
        transforms.full_hadamard(),
        weights.Uniform(symmetric=True, clip="mse", group=group, feedback=True),
        acts.fixed(acts.Absmax(0.9)),
    )


def _svdquant(name: str, feedback: bool, group: int = 64, rank: int = 32) -> Method:
    plain = weights.Uniform(symmetric=True, group=group)
    changed = "" if (group, rank) == (64, 32) else f", groups of {group}, rank {rank}"
    with_gptq = ", with GPTQ as in deepcompressor" if feedback else ""
    return Method(
        name,
        f"SVDQuant, arXiv 2411.05007{with_gptq}{changed}",
        transforms.smoothed_by_error(_SVDQUANT_ALPHAS, plain, acts.Absmax(group=64)),
        replace(plain, feedback=feedback),
        _GROUP64,
        low_rank_bits=_branch_bits(rank),
    )


_METHODS = (
    Method("rtn-minmax", "round to nearest", transforms.nothing, weights.Uniform(), _TOKEN),
    Method(
        "rtn-mse",
        "round to nearest, ranges of least squared error, of weights weighted by E[x^2]",
        transforms.nothing,
        weights.Uniform(clip="weighted"),
        acts.clip_searched(),
    ),
    Method(
        "smoothquant",
        "SmoothQuant, arXiv 2211.10438: alpha 0.5, per token and per row",
        transforms.smoothed(0.5),
        weights.Uniform(symmetric=True),
        _TOKEN,
    ),
    Method(
        "quarot",
        "QuaRot, arXiv 2404.00456: full Hadamard, clipped RTN, activation clip 0.9",
        transforms.full_hadamard(),
        weights.Uniform(symmetric=True, clip="mse"),
        acts.fixed(acts.Absmax(0.9)),
    ),
    _quarot_gptq("quarot-gptq", None),
    Method(
        "duquant",
        "DuQuant, arXiv 2406.01721: dual rotation, clips 0.9 and 0.8",
        transforms.duquant(0.5),
        weights.Uniform(clip=0.8),
        acts.fixed(acts.MinMax(0.9)),
    ),
    Method(
        "viditq",
        "ViDiT-Q, arXiv 2406.02540: static mask, full Hadamard, min-max; no mixed precision",
        transforms.full_hadamard(0.5),
        weights.Uniform(),
        acts.fixed(acts.MinMax()),
    ),
    _svdquant("svdquant", False),
    _svdquant("svdquant-gptq", True),
    # The two that come nearest, at the real bits of this package's default on inputs of 512: one
    # given groups for what its rows lack, the other less of both for what it has more.
    _quarot_gptq("quarot-gptq-g64", 64),
    _svdquant("svdquant-gptq-g128-r8", True, group=128, rank=8),
    Method(
        "nf",
        "NormalFloat of QLoRA, arXiv 2305.14314, groups of 64",
        transforms.nothing,
        weights.NormalFloat(64),
        _TOKEN,
    ),
    Method(
        "gptq",
        "GPTQ, arXiv 2210.17323: min-max grid, act-order",
        transforms.nothing,
        weights.Uniform(feedback=True),
        _TOKEN,
    ),
    Method(
        "gptq-g32",
        "GPTQ on groups of 32, act-order",
        transforms.nothing,
        weights.Uniform(group=32, feedback=True),
        _TOKEN,
    ),
    Method(
        "lrq-dit-described",
        "LRQ-DiT, arXiv 2508.03485, equations 1-7, 11 and 12 as they stand",
        transforms.lrq_paper,
        weights.PureLog(),
        _TOKEN,
    ),
    # This package's rotations with other weights: what the codebook alone brings.
    Method(
        "rotated-minmax",
        "this package's rotations, min-max weights",
        transforms.lrq_search(),
        weights.Uniform(),
        _TOKEN,
    ),
    Method(
        "rotated-mse",
        "this package's rotations, weight range of least weighted squared error",
        transforms.lrq_search(),
        weights.Uniform(clip="weighted"),
        _TOKEN,
    ),
    Method(
        "rotated-nf",
        "this package's rotations, NormalFloat weights in groups of 64",
        transforms.lrq_search(),
        weights.NormalFloat(64),
        _TOKEN,
    ),
    Method(
        "rotated-gptq-g32",
        "this package's rotations, GPTQ on range-searched groups of 32",
        transforms.lrq_search(),
        weights.Uniform(group=32, clip="weighted", feedback=True),
        _TOKEN,
        bias_correction=True,
    ),
)
METHODS = {method.name: method for method in _METHODS}


def _variant(
    name: str,
    what: str,
    quantizer: weights.TwinLog,
    transform: TransformRule | None = None,
    low_rank_bits: float = 0.0,
    bias_correction: bool = True,
) -> Method:
    return Method(
        name,
        f"this package, {what}",
        transform or transforms.lrq_search(),
        quantizer,
        _TOKEN,
        low_rank_bits,
        bias_correction,
    )


_OURS = weights.TwinLog(target="own")
# Variants of this package's method: less one part that it has, or with one that it does not ship.
EXPERIMENTS = {
    method.name: method
    for method in (
        _variant("lrq-no-target", "weights not fitted to the noise", weights.TwinLog(target=0.0)),
        _variant(
            "lrq-lost-gain",
            "rows keep the scale of the fit",
            weights.TwinLog(target="own", full_gain=False),
        ),
        _variant(
            "lrq-whole-target",
            "weights fitted to the noise as is best for one product",
            weights.TwinLog(target=1.0),
        ),
        _variant("lrq-nearest", "weights rounded one by one", weights.TwinLog()),
        _variant("lrq-unweighted", "rounded one by one, fit unweighted", weights.TwinLog(False)),
        _variant("lrq+centred", "static centring", _OURS, transforms.lrq_search(centred=True)),
        _variant(
            "lrq+lowrank", "a branch of rank 32's share", _OURS, low_rank_bits=_branch_bits(32)
        ),
    )
}
