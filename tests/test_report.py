"""What `inspect` says beyond the figures of a layer."""

from __future__ import annotations

import json

from lrq_kernels import QuantScheme
from lrq_quant.report import LinearReport, QuantReport


def linear(name: str, rotation: str, shared_input: str | None = None) -> LinearReport:
    return LinearReport(
        name=name,
        role="attention",
        scheme=QuantScheme(4, 8),
        shared_input=shared_input or name,
        out_features=128,
        in_features=256,
        rotation=rotation,
        why="least error",
        alpha=0.5,
        j=None,
        peak_ratio=None,
        weight_sqnr_db=20.0,
        output_sqnr_db=None,
        stored_bits=128 * 256 * 4,
        candidates={},
    )


def report(*linears: LinearReport) -> QuantReport:
    return QuantReport("Tiny", {}, True, 1.0, 1000, linears, ())


def test_inputs_that_are_gathered_are_named_once():
    made = report(
        linear("q", "permuted128 alpha=0.5"),
        linear("k", "permuted128 alpha=0.5", "q"),
        linear("out", "hadamard128 alpha=none"),
        linear("up", "dual128 alpha=0.5"),
        linear("down", "permuted1024 alpha=none"),
    )
    assert made.gathered == ("q", "down")
    assert made.table().splitlines()[-1].endswith("in front of the rotation: q, down")
    values = json.loads(json.dumps(made.to_dict()))
    assert values["gathered"] == ["q", "down"]
    assert QuantReport.from_dict(values) == made


def test_nothing_is_said_where_nothing_is_gathered():
    table = report(linear("q", "hadamard128 alpha=0.5")).table()
    assert "gather" not in table
