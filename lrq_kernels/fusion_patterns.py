"""What lrq_kernels.fusion looks for in an aten graph: norms, modulation, activations.

Each function takes a node and returns the operands of what it computes, or None. Conversions
between floating types are looked through: a fused op has roundings of its own (fusion.py).
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.fx import Node

aten, prims = torch.ops.aten, torch.ops.prims
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_GELU_TANH, _GELU_CUBE = 0.7978845608028654, 0.044715  # sqrt(2 / pi), and as in the GELU paper
_SQRT_HALF = 0.7071067811865476


def is_call(node: object, *targets: object) -> bool:
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def value_of(node: Node) -> torch.Tensor:
    return node.meta["val"]


def shape_of(node: Node) -> torch.Size:
    return value_of(node).shape


def same_number(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be equal, without a new guard on symbolic ones."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return a is b or statically_known_true(a == b)


def same_shape(a: torch.Size, b: torch.Size) -> bool:
    return len(a) == len(b) and all(map(same_number, a, b))


def peel(node: Any) -> Any:
    """The node below conversions between floating types, clones and divisions by one."""
    while isinstance(node, Node):
        if is_call(node, prims.convert_element_type.default, aten.clone.default):
            below = node.args[0]
            if value_of(below).dtype not in _FLOATS:
                break
        elif is_call(node, aten.div.Tensor, aten.mul.Tensor) and node.args[1] == 1:
            below = node.args[0]
        else:
            break
        node = below
    return node


def in_type(node: Node, dtype: torch.dtype) -> Node | None:
    """The lowest node of this type among `node` and those that peel() goes through."""
    found = None
    while isinstance(node, Node):
        if value_of(node).dtype == dtype:
            found = node
        if peel(node) is node:
            break
        node = node.args[0]
    return found


def _factors(node: Any, *targets: Any) -> Iterator[tuple[Any, Any]]:
    """Both orders of the two operands, conversions peeled, of a call of one of the targets."""
    node = peel(node)
    if is_call(node, *targets):
        one, other = peel(node.args[0]), peel(node.args[1])
        yield one, other
        yield other, one


def _sums(node: Any) -> Iterator[tuple[Any, Any]]:
    return _factors(node, aten.add.Tensor, aten.add.Scalar)


def _products(node: Any) -> Iterator[tuple[Any, Any]]:
    return _factors(node, aten.mul.Tensor, aten.mul.Scalar)


def _close(value: object, number: float) -> bool:
    return isinstance(value, (int, float)) and abs(value - number) <= 1e-4 * abs(number)


def only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def above_views(node: Node) -> Node:
    """The last node of the chain of reshapes, conversions and divisions by one above `node` that
    nothing else reads."""
    while (user := only_user(node)) is not None:
        passes = is_call(user, aten.reshape.default, aten.view.default) or peel(user) is peel(node)
        if not passes:
            break
        node = user
    return node


# ---- norms and modulation -----------------------------------------------------------------------


class _Norm(NamedTuple):
    x: Node
    kind: str
    eps: float
    weight: Node | None = None
    bias: Node | None = None


def _plain_norm(node: Any) -> _Norm | None:
    """(x - mean) * rsqrt(var + eps) or x * rsqrt(mean(x^2) + eps) over the last dimension, of x
    as it is read: mostly a conversion to fp32."""
    for value, root in _products(node):
        if not is_call(root, aten.rsqrt.default):
            continue
        for variance, eps in _sums(root.args[0]):
            if not isinstance(eps, (int, float)):
                continue
            if is_call(value, aten.sub.Tensor) and is_call(variance, operator.getitem):
                moments = variance.args[0]
                mean = peel(value.args[1])
                x = peel(value.args[0])
                matches = (
                    is_call(moments, aten.var_mean.correction)
                    and variance.args[1] == 0
                    and is_call(mean, operator.getitem)
                    and mean.args == (moments, 1)
                    and peel(moments.args[0]) is x
                    and moments.kwargs.get("correction") == 0
                    and _over_last(moments.args[1], x)
                )
                if matches:
                    return _Norm(moments.args[0], "layer", float(eps))
            elif is_call(variance, aten.mean.dim) and _is_square(variance.args[0], value):
                if _over_last(variance.args[1], value):
                    square = peel(variance.args[0])
                    return _Norm(square.args[0], "rms", float(eps))
    return None


def _over_last(dims: Any, x: Node) -> bool:
    return list(dims) in ([-1], [len(shape_of(x)) - 1])


def _is_square(node: Any, x: Node) -> bool:
    node = peel(node)
    if is_call(node, aten.pow.Tensor_Scalar):
        return node.args[1] == 2 and peel(node.args[0]) is x
    return is_call(node, aten.mul.Tensor) and all(peel(factor) is x for factor in node.args)


def _is_channel_vector(node: Any, x: Node) -> bool:
    return (
        isinstance(node, Node)
        and value_of(node).dim() == 1
        and same_number(shape_of(node)[0], shape_of(x)[-1])
        and value_of(node).dtype in (torch.float32, value_of(x).dtype)
    )


def _norm(node: Any, dtype: torch.dtype) -> _Norm | None:
    """A norm over the last dimension of x in `dtype`, with its weight and bias if it has them."""
    for scaled, bias in (*_sums(node), (node, None)):
        for value, weight in (*_products(scaled), (scaled, None)):
            norm = _plain_norm(value)
            x = None if norm is None else in_type(norm.x, dtype)
            if norm is None or x is None:
                continue
            vectors = [vector for vector in (weight, bias) if vector is not None]
            if all(_is_channel_vector(vector, x) for vector in vectors):
                return norm._replace(x=x, weight=weight, bias=bias)
    return None


def is_sample_vector(node: Any, x: Node) -> bool:
    """Whether a node holds one row of channels for each sample of x [B, T, K]: [B, 1, K]."""
    if not isinstance(node, Node) or "val" not in node.meta or len(shape_of(x)) != 3:
        return False
    batch, _, channels = shape_of(x)
    expected = torch.Size((batch, 1, channels))
    fits = value_of(node).dtype in (value_of(x).dtype, torch.float32)
    return fits and same_shape(shape_of(node), expected)


def _scale_of(factor: Any, x: Node) -> Node | None:
    """scale of a factor 1 + scale, of which every sample of x has one."""
    for scale, one in _sums(factor):
        if one == 1 and is_sample_vector(scale, x):
            return scale
    # (1 + scale)[:, None]
    if is_call(factor, aten.unsqueeze.default) and factor.args[1] in (1, -2):
        for scale, one in _sums(factor.args[0]):
            if one == 1 and isinstance(scale, Node) and is_sample_vector(factor, x):
                return scale
    return None


class _Modulated(NamedTuple):
    norm: _Norm
    scale: Node | None
    shift: Node | None


def modulated_norm(node: Node) -> _Modulated | None:
    """norm(x) * (1 + scale) + shift in the type of x; scale, or both, may be missing."""
    dtype = value_of(node).dtype
    for scaled, shift in (*_sums(node), (node, None)):
        for value, factor in _products(scaled):
            norm = _norm(value, dtype)
            if norm is None or (shift is not None and not is_sample_vector(shift, norm.x)):
                continue
            scale = _scale_of(factor, norm.x)
            if scale is not None:
                return _Modulated(norm, scale, shift)
    norm = _norm(node, dtype)
    return None if norm is None else _Modulated(norm, None, None)


# ---- activations --------------------------------------------------------------------------------


def gelu_tanh(node: Any) -> Node | None:
    """x of 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))."""
    for half, sum_ in _products(node):
        for tanh, one in _sums(sum_):
            if one != 1 or not is_call(tanh, aten.tanh.default):
                continue
            x = _half_of(half)
            for inner, factor in _products(tanh.args[0]):
                if x is None or not _close(factor, _GELU_TANH):
                    continue
                for linear, cubic in _sums(inner):
                    if linear is x and _is_cube(cubic, x):
                        return x
    return None


def _half_of(node: Any) -> Node | None:
    for x, half in _products(node):
        if half == 0.5 and isinstance(x, Node):
            return x
    return None


def _is_cube(node: Any, x: Node) -> bool:
    """0.044715 x^3."""
    for power, factor in _products(node):
        if not _close(factor, _GELU_CUBE):
            continue
        if is_call(power, aten.pow.Tensor_Scalar):
            return power.args[1] == 3 and peel(power.args[0]) is x
        return any(other is x and _is_square(square, x) for square, other in _products(power))
    return False


def _gelu_erf(node: Any) -> Node | None:
    """x of 0.5 x (1 + erf(x / sqrt 2))."""
    for half, sum_ in _products(node):
        for erf, one in _sums(sum_):
            if one != 1 or not is_call(erf, aten.erf.default):
                continue
            x = _half_of(half)
            for inner, factor in _products(erf.args[0]):
                if x is not None and inner is x and _close(factor, _SQRT_HALF):
                    return x
    return None


def _silu(node: Any) -> Node | None:
    """x of x / (1 + exp(-x)) or x * sigmoid(x)."""
    node = peel(node)
    if is_call(node, aten.div.Tensor):
        x = peel(node.args[0])
        for exp, one in _sums(node.args[1]):
            if one == 1 and is_call(exp, aten.exp.default):
                negative = peel(exp.args[0])
                if is_call(negative, aten.neg.default) and peel(negative.args[0]) is x:
                    return x
    for x, sigmoid in _products(node):
        if is_call(sigmoid, aten.sigmoid.default) and peel(sigmoid.args[0]) is x:
            return x
    return None


_ACTIVATIONS: dict[str, Callable[[Any], Node | None]] = {
    "gelu_tanh": gelu_tanh,
    "gelu_erf": _gelu_erf,
    "silu": _silu,
}


def _activated(node: Any) -> tuple[str, Node] | None:
    for name, match in _ACTIVATIONS.items():
        x = match(node)
        if x is not None:
            return name, x
    return None


def activated_or_gated(node: Any) -> tuple[str, Node, Node | None] | None:
    """(activation, x, gate) of act(x), or of act(gate) * x."""
    alone = _activated(node)
    if alone is not None:
        return *alone, None
    for value, x in _products(node):
        gated = _activated(value)
        if gated is not None and isinstance(x, Node) and "val" in x.meta:
            if same_shape(shape_of(x), shape_of(gated[1])):
                return gated[0], x, gated[1]
    return None
