"""Fusion under torch.compile: a pass over inductor's post-grad graph that hands what stands around
a quantized linear to the ops that do it in one launch.

    pattern        found                                             becomes
    shared_input   rotate_quantize(x), x @ low_rank_down.T twice     one of them
    gemm_gelu      gelu_tanh(gemm(x_q))                              gemm(..., "gelu_tanh")
    norm_modulate  rotate_quantize(norm(x) * (1 + scale) + shift)    norm_modulate_rotate_quantize
    activation     rotate_quantize(act(x)), of act(gate) * x         activation_rotate_quantize
    concat         rotate_quantize(cat([a, b], -1))                  concat_rotate_quantize
    gemm_residual  residual + gate * gemm(x_q), residual + gemm      gemm(..., residual, gate)

It finds them in the graph of any model: nothing is said of blocks or their names. Roundings: what
was rounded to the model's type between the steps (the activation, the linear's output before its
gate and residual) stays in fp32 within the fused op, so that codes differ where a value is near a
tie; a norm and its modulation are rounded as eager torch rounds them (reference.norm_modulate); a
shared input and a concatenation change nothing.

    enable(), disable()   for every torch.compile of this process from here on; compiling a
                          quantized linear enables it, unless disable() was called or LRQ_FUSION=0
    counts()              how often each pattern matched since reset_counts(); logged by graph
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, Node

from . import fusion_patterns
from .fusion_patterns import (
    above_views,
    activated_or_gated,
    gelu_tanh,
    is_call,
    is_sample_vector,
    modulated_norm,
    only_user,
    peel,
    same_number,
    same_shape,
    shape_of,
    value_of,
)

logger = logging.getLogger(__name__)

aten = torch.ops.aten


def _lrq(name: str) -> Any:
    """The overload of an op, which exists once lrq_kernels.ops is imported."""
    return getattr(torch.ops.lrq, name).default


# ---- rewriting ----------------------------------------------------------------------------------


def _call(graph: Graph, target: Any, args: tuple, value: Any) -> Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def _in_one_piece(graph: Graph, node: Node) -> Node:
    """The node, or a copy with its channels side by side, which the ops ask for."""
    value = value_of(node)
    if value.stride(-1) == 1:
        return node
    copied = value.clone(memory_format=torch.contiguous_format)
    copy = _call(graph, aten.clone.default, (node,), copied)
    copy.kwargs = {"memory_format": torch.contiguous_format}
    return copy


def _as_rows(graph: Graph, vector: Node) -> Node:
    """[B, K] of a node [B, 1, K], or the node that was unsqueezed."""
    if value_of(vector).dim() == 2:
        return _in_one_piece(graph, vector)
    if is_call(vector, aten.unsqueeze.default) and value_of(vector.args[0]).dim() == 2:
        rows = vector.args[0]
    else:
        rows = _call(graph, aten.select.int, (vector, 1, 0), value_of(vector).select(1, 0))
    return _in_one_piece(graph, rows)


def _sources_of(graph: Graph, op: str) -> list[Node]:
    return list(graph.find_nodes(op="call_function", target=_lrq(op)))


_RESHAPES = (aten.view.default, aten.reshape.default, aten.permute.default)
_CONVERSIONS = (aten.view.dtype, torch.ops.prims.convert_element_type.default)


def _origin(argument: Any) -> Any:
    """What an argument is whichever node says it: views and conversions of one tensor are equal."""
    if isinstance(argument, list | tuple):
        return tuple(map(_origin, argument))
    if is_call(argument, aten.alias.default):
        return _origin(argument.args[0])
    if is_call(argument, *_RESHAPES, *_CONVERSIONS):
        return (argument.target, *map(_origin, argument.args))
    return argument


def _branch_products(graph: Graph) -> list[Node]:
    """Products with a factor of a low-rank branch, which is kept as int16."""
    found = []
    for product in graph.find_nodes(op="call_function", target=aten.mm.default):
        factor = product.args[1]
        while is_call(factor, aten.alias.default, *_RESHAPES, *_CONVERSIONS):
            factor = factor.args[0]
        if isinstance(factor, Node) and value_of(factor).dtype == torch.int16:
            found.append(product)
    return found


def _share_inputs(graph: Graph) -> int:
    """Equal calls become the first of them: all ops are functional."""
    matched = 0
    calls = [_sources_of(graph, op) for op in ("rotate_quantize", "rotate")]
    for nodes in (*calls, _branch_products(graph)):
        first: dict[tuple, Node] = {}
        for node in nodes:
            key = tuple(map(_origin, node.args))
            earlier = first.setdefault(key, node)
            if earlier is node:
                continue
            node.replace_all_uses_with(earlier)
            graph.erase_node(node)
            matched += 1
    return matched


def _replace_quantize(graph: Graph, node: Node, op: str, arguments: tuple, x: Node) -> None:
    """By a fused op of `arguments` and those of rotate_quantize after its x, all of which a graph
    gives by position; nothing is kept."""
    quantized = value_of(node)
    with graph.inserting_before(node):
        value = (*quantized, quantized[0].new_empty(0, dtype=value_of(x).dtype))
        fused = _call(graph, _lrq(op), (*arguments, *node.args[1:], False), value)
    node.replace_all_uses_with(fused)
    graph.erase_node(node)


def _fuse_norms(graph: Graph) -> int:
    matched = 0
    for node in _sources_of(graph, "rotate_quantize"):
        found = modulated_norm(node.args[0])
        if found is None:
            continue
        norm, scale, shift = found
        y, x = node.args[0], norm.x
        if not same_shape(shape_of(y), shape_of(x)) or len(shape_of(x)) not in (2, 3):
            continue
        with graph.inserting_before(node):
            rows = [None if v is None else _as_rows(graph, v) for v in (scale, shift)]
            x = _in_one_piece(graph, x)
        arguments = (x, norm.weight, norm.bias, *rows, norm.kind, norm.eps)
        _replace_quantize(graph, node, "norm_modulate_rotate_quantize", arguments, x)
        matched += 1
    return matched


def _fuse_gated_activations(graph: Graph) -> int:
    return _fuse_activations(graph, gated=True)


def _fuse_activations(graph: Graph, gated: bool = False) -> int:
    matched = 0
    for node in _sources_of(graph, "rotate_quantize"):
        found = activated_or_gated(node.args[0])
        if found is None:
            continue
        activation, x, gate = found
        if gated and gate is None:
            continue
        y = node.args[0]
        if not same_shape(shape_of(y), shape_of(x)) or value_of(y).dtype != value_of(x).dtype:
            continue
        if gate is not None and value_of(gate).dtype != value_of(x).dtype:
            continue
        with graph.inserting_before(node):
            x = _in_one_piece(graph, x)
            gate = None if gate is None else _in_one_piece(graph, gate)
        arguments = (x, gate, activation)
        _replace_quantize(graph, node, "activation_rotate_quantize", arguments, x)
        matched += 1
    return matched


def _fuse_concatenations(graph: Graph) -> int:
    matched = 0
    for node in _sources_of(graph, "rotate_quantize"):
        cat = node.args[0]
        if not is_call(cat, aten.cat.default) or len(cat.args[0]) != 2:
            continue
        first, second = cat.args[0]
        dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
        if dim not in (-1, len(shape_of(cat)) - 1):
            continue
        if value_of(first).dtype != value_of(second).dtype:
            continue
        with graph.inserting_before(node):
            sources = [_in_one_piece(graph, source) for source in (first, second)]
            arguments = (*sources, *node.args[1:])
            fused = _call(graph, _lrq("concat_rotate_quantize"), arguments, value_of(node))
        node.replace_all_uses_with(fused)
        graph.erase_node(node)
        matched += 1
    return matched


# Places of lrq::gemm's arguments.
_RESIDUAL, _GATE, _OUT_FEATURES, _ACTIVATION, _OUT_DTYPE = 6, 7, 9, 10, 11


def _with(gemm: Node, **changes: Any) -> tuple:
    arguments = list(gemm.args)
    for place, value in changes.items():
        arguments[{"residual": _RESIDUAL, "gate": _GATE, "activation": _ACTIVATION}[place]] = value
    return tuple(arguments)


def _has_plain_epilogue(gemm: Node) -> bool:
    return gemm.args[_RESIDUAL] is None and gemm.args[_ACTIVATION] == "none"


def _fuse_gelu(graph: Graph) -> int:
    """Into the GEMM before it, where nothing else reads what the GEMM gives."""
    matched = 0
    for tanh in list(graph.find_nodes(op="call_function", target=aten.tanh.default)):
        after = only_user(tanh)
        root = None if after is None else only_user(after)
        x = None if root is None else gelu_tanh(root)
        if root is None or x is None:
            continue
        gemm = x
        while is_call(gemm, aten.reshape.default, aten.view.default):
            gemm = gemm.args[0]
        if not is_call(gemm, _lrq("gemm")) or not _has_plain_epilogue(gemm):
            continue
        dtype = gemm.args[_OUT_DTYPE]
        # The result in the type of the linear: the conversion after the product, if there is one.
        result = root
        user = only_user(root)
        if value_of(result).dtype != dtype and user is not None and peel(user) is root:
            result = user
        if value_of(result).dtype != dtype or not _read_only_by(gemm, root):
            continue
        gemm.args = _with(gemm, activation="gelu_tanh")
        result.replace_all_uses_with(x)
        matched += 1
    return matched


def _read_only_by(node: Node, root: Node) -> bool:
    """Whether all that reads `node` ends in `root`."""
    waiting, seen = [node], set()
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return False
            if user is not root and user not in seen:
                seen.add(user)
                waiting.append(user)
                if len(seen) > 32:
                    return False
    return True


def _fuse_residuals(graph: Graph) -> int:
    matched = 0
    for gemm in _sources_of(graph, "gemm"):
        value = above_views(gemm)
        shape, dtype = shape_of(value), gemm.args[_OUT_DTYPE]
        fits = value_of(value).dtype == dtype and same_number(shape[-1], gemm.args[_OUT_FEATURES])
        if not fits or not _has_plain_epilogue(gemm):
            continue
        gate, product = _gate_of(value)
        add = only_user(product)
        if add is None or not is_call(add, aten.add.Tensor) or add.kwargs:
            continue
        residual = next((other for other in add.args if other is not product), None)
        if not isinstance(residual, Node) or not same_shape(shape_of(residual), shape):
            continue
        if value_of(residual).dtype != dtype or not same_shape(shape_of(add), shape):
            continue
        _write_residual(graph, gemm, add, residual, gate)
        matched += 1
    return matched


def _gate_of(value: Node) -> tuple[Node | None, Node]:
    """(gate, gate * value) for value [B, T, N] and gate [B, 1, N], or (None, value)."""
    product = only_user(value)
    if product is None or not is_call(product, aten.mul.Tensor):
        return None, value
    gate: Any = next((other for other in product.args if other is not value), None)
    fits = is_sample_vector(gate, value) and value_of(gate).dtype == value_of(value).dtype
    return (gate, product) if fits else (None, value)


def _write_residual(graph: Graph, gemm: Node, add: Node, residual: Node, gate: Node | None) -> None:
    """A GEMM with its epilogue in the place of `add`, where all its operands are known."""
    features = gemm.args[_OUT_FEATURES]
    with graph.inserting_before(add):
        rows = residual
        if value_of(residual).dim() != 2:
            flat = value_of(residual).reshape(-1, features)
            rows = _call(graph, aten.reshape.default, (residual, [-1, features]), flat)
        rows = _in_one_piece(graph, rows)
        vector = None if gate is None else _as_rows(graph, gate)
        arguments = _with(gemm, residual=rows, gate=vector)
        result = fused = _call(graph, gemm.target, arguments, value_of(gemm))
        if value_of(add).dim() != 2:
            view: Any = above_views(gemm)
            while not is_call(view, aten.reshape.default, aten.view.default):
                view = view.args[0]
            # Its sizes may be symbolic: nodes that are there already.
            result = _call(graph, aten.reshape.default, (fused, view.args[1]), value_of(add))
    add.replace_all_uses_with(result)


_REWRITES: tuple[tuple[str, Callable[[Graph], int]], ...] = (
    ("shared_input", _share_inputs),
    # One launch for a gated activation, before a GEMM takes the GELU of its gate; a GELU that
    # stands alone costs nothing in a GEMM, before a launch of its own would take it.
    ("activation", _fuse_gated_activations),
    ("gemm_gelu", _fuse_gelu),
    ("activation", _fuse_activations),
    ("norm_modulate", _fuse_norms),
    ("concat", _fuse_concatenations),
    ("gemm_residual", _fuse_residuals),
)


def fuse(graph: Graph) -> dict[str, int]:
    """Rewrite a functional aten graph with fake values in meta["val"]; how often each pattern
    matched, those that did not left out."""
    matched: Counter[str] = Counter()
    for pattern, rewrite in _REWRITES:
        count = rewrite(graph)
        if count:
            matched[pattern] += count
            graph.eliminate_dead_code()
    if matched:
        graph.lint()
    return dict(matched)


# ---- registration -------------------------------------------------------------------------------


def _inductor_counters() -> Counter[str]:
    """inductor's own, which it keeps with a graph in its cache and adds again on a hit: the pass
    does not run on a graph that comes from there."""
    from torch._dynamo.utils import counters

    return counters["inductor"]


def _counter(pattern: str) -> str:
    return f"lrq_fusion.{pattern}"


def counts() -> dict[str, int]:
    """How often each pattern matched since reset_counts(), in all graphs compiled by inductor or
    taken from its cache."""
    counters = _inductor_counters()
    return {pattern: counters[_counter(pattern)] for pattern, _ in _REWRITES}


def reset_counts() -> None:
    counters = _inductor_counters()
    for pattern, _ in _REWRITES:
        counters.pop(_counter(pattern), None)


def _run(graph: Graph) -> None:
    if not any(node.op == "call_function" and _is_ours(node.target) for node in graph.nodes):
        return
    matched = fuse(graph)
    _inductor_counters().update({_counter(pattern): count for pattern, count in matched.items()})
    logger.info("lrq fusion: %s", matched or "nothing matched")


def _is_ours(target: Any) -> bool:
    return getattr(target, "namespace", None) == "lrq"


_wanted = os.environ.get("LRQ_FUSION", "1") != "0"


def enable_by_default() -> None:
    """enable(), unless the user said no."""
    if _wanted:
        enable()


def enable() -> None:
    """Run the pass in every torch.compile with inductor from here on, after a
    post_grad_custom_pre_pass that is already set. Done once: more calls change nothing."""
    global _wanted
    _wanted = True
    config, kind = _inductor()
    current = config.post_grad_custom_pre_pass
    if not isinstance(current, kind):
        config.post_grad_custom_pre_pass = kind(current)


def disable() -> None:
    """Undo enable(), and do not enable it by default again."""
    global _wanted
    _wanted = False
    config, kind = _inductor()
    current = config.post_grad_custom_pre_pass
    if isinstance(current, kind):
        config.post_grad_custom_pre_pass = current.before


def is_enabled() -> bool:
    config, kind = _inductor()
    return isinstance(config.post_grad_custom_pre_pass, kind)


_FILES = (__file__, fusion_patterns.__file__)
_pass_type: Any = None


def _inductor() -> tuple[Any, Any]:
    """inductor's config and the class of our pass. Imported here: inductor takes a second."""
    import torch._inductor.config as config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    global _pass_type
    if _pass_type is None:

        class FusionPass(CustomGraphPass):
            def __init__(self, before: Any) -> None:
                self.before = before

            def __call__(self, graph: Graph) -> None:
                if self.before is not None:
                    self.before(graph)
                _run(graph)

            def uuid(self) -> Any:
                """Of what inductor caches: these files, and the pass before it (None: no cache)."""
                if self.before is None:
                    return get_hash_for_files(_FILES)
                uuid = getattr(self.before, "uuid", lambda: None)()
                return None if uuid is None else (get_hash_for_files(_FILES), uuid)

        _pass_type = FusionPass
    return config, _pass_type
