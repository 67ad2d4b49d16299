"""QuantScheme: what is accepted, what is refused, and its two text forms."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from lrq_kernels import QuantScheme
from lrq_kernels.scheme import ACT_BITS, WEIGHT_BITS

ALL_BITS = list(itertools.product(WEIGHT_BITS, ACT_BITS))


@pytest.mark.parametrize(("weight_bits", "act_bits"), ALL_BITS)
def test_name_and_from_name_are_inverse(weight_bits: int, act_bits: int):
    scheme = QuantScheme(weight_bits=weight_bits, act_bits=act_bits, rotation="none")
    assert scheme.name == f"w{weight_bits}a{act_bits}"
    assert QuantScheme.from_name(scheme.name, rotation="none") == scheme
    assert QuantScheme.from_name(scheme.name.upper(), rotation="none") == scheme


def test_json_round_trip_keeps_every_field():
    scheme = QuantScheme(3, 4, "hadamard", 512, "rms", 0.3545)
    assert QuantScheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_qmax_is_symmetric_and_absent_for_16_bits():
    assert QuantScheme(act_bits=8).qmax == 127
    assert QuantScheme(act_bits=4).qmax == 7
    with pytest.raises(ValueError, match="act_bits 4 and 8, got 16"):
        QuantScheme(act_bits=16).qmax  # noqa: B018


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantScheme().weight_bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight_bits", 1),
        ("weight_bits", 5),
        ("weight_bits", 4.0),  # equal to a valid width, but no integer
        ("weight_bits", "4"),
        ("act_bits", 6),
        ("act_bits", 8.0),
        ("rotation", "fourier"),
        ("rotation", None),
        ("block_size", 96),
        ("block_size", 2048),
        ("scale_mode", "max"),
        ("scale_factor", 0.0),
        ("scale_factor", -1.0),
        ("scale_factor", float("nan")),
        ("scale_factor", float("inf")),
        ("scale_factor", "1"),
    ],
)
def test_refuses_a_value_and_names_the_field(field: str, value: object):
    with pytest.raises(ValueError, match=field) as error:
        QuantScheme(**{field: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value)


def test_dual_has_blocks_of_128_only():
    QuantScheme(rotation="dual", block_size=128)
    with pytest.raises(ValueError, match="block_size of rotation 'dual' must be 128, got 256"):
        QuantScheme(rotation="dual", block_size=256)


@pytest.mark.parametrize("name", ["4a8", "w4", "w4a8x", "w-4a8", ""])
def test_from_name_refuses_other_text(name: str):
    with pytest.raises(ValueError, match="name must look like 'w4a8'"):
        QuantScheme.from_name(name)


def test_from_dict_refuses_fields_of_a_newer_version():
    with pytest.raises(ValueError, match="unknown fields .*'low_rank'"):
        QuantScheme.from_dict({**QuantScheme().to_dict(), "low_rank": 32})
