"""lrq::qk_norm_rope: its reference against diffusers' processors and torch's norms, its kernel
against the reference (in the interpreter, compiled ahead of time, on a GPU), and its errors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from compiled_kernels import assert_no_spills, qk_kernel
from op_samples import Arguments, call, qk_arguments, qk_parts_arguments
from rotate_cases import INTERPRETED, in_interpreter, not_interpreted
from torch import Tensor
from torch._subclasses import FakeTensorMode

from lrq_kernels import attention_reference as reference
from lrq_kernels import ops
from lrq_kernels.op_checks import HEAD_NORMS, ROPES

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
EPS = 1e-6
# Sums of squares in another order and rsqrt.approx move an fp32 value by about 2e-7 of itself: this
# share of the values then rounds the other way, to the next of its dtype.
FLIP_RATE = {torch.bfloat16: 2e-4, torch.float16: 2e-3, torch.float32: 1.0}
FEW = 3  # flips more, for samples too small to show a rate


@dataclass(frozen=True)
class Case:
    """fused: q, k and v are parts of one projection, of wider rows; else tensors of their own."""

    tokens: int = 5
    context_tokens: int | None = 3
    heads: int = 3
    head_dim: int = 16
    samples: int = 2
    norm: str = "rms"
    rope: str | None = "interleaved"
    weights: bool = True
    fp32_weights: bool = False
    with_v: bool = True
    fused: bool = True


def draw_stream(case: Case, tokens: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    width = case.heads * case.head_dim
    if not case.fused:
        shape = (case.samples, tokens, width)
        return [(torch.randn(shape, device=device) * 3).to(dtype) for _ in range(3)]
    # Behind the projections what else a fused linear makes (FLUX.2), before them other tokens.
    wide = torch.randn(case.samples, tokens + 2, 3 * width + 16, device=device) * 3
    return list(wide.to(dtype)[:, 2:, : 3 * width].chunk(3, dim=-1))


def draw(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[Any, ...]:
    """The arguments of the op."""
    stream = draw_stream(case, case.tokens, dtype, device)
    context: list[Tensor | None] = [None] * 3
    if case.context_tokens is not None:
        context = list(draw_stream(case, case.context_tokens, dtype, device))
    if not case.with_v:
        stream[2], context[2] = None, None
    weights: list[Tensor | None] = [None] * 4
    if case.weights and case.norm != "none":
        across = case.norm == "rms_across_heads"
        size = case.head_dim * (case.heads if across else 1)
        weight_dtype = torch.float32 if case.fp32_weights else dtype
        for index in range(4 if case.context_tokens is not None else 2):
            weights[index] = (torch.randn(size, device=device) + 1).to(weight_dtype)
    cos, sin = None, None
    if case.rope is not None:
        # Of both channels of a pair an angle of its own: no model has it, no kernel may mind.
        angles = torch.rand(case.tokens + (case.context_tokens or 0), case.head_dim) * 6.3
        cos, sin = angles.cos().to(device), angles.sin().to(device)
    numbers = (case.heads, EPS, case.norm, case.rope or "interleaved")
    return (*stream, *context, *weights, cos, sin, *numbers)


def launch(*arguments: Any) -> tuple[Tensor, ...]:
    """The op on a GPU through the dispatcher, or its kernel in the interpreter."""
    if not INTERPRETED:
        return ops.qk_norm_rope(*arguments)
    from lrq_kernels import qk_norm_rope as kernels

    return kernels.qk_norm_rope(*arguments)


def check(case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """The kernel against the reference on the CPU: v exact, q and k but for flips."""
    arguments = draw(case, dtype, device)
    q, k, v = launch(*arguments)
    on_cpu = [value.cpu() if isinstance(value, Tensor) else value for value in arguments]
    expected = reference.qk_norm_rope(*on_cpu)
    assert torch.equal(v.cpu(), expected[2])
    if case.norm == "none":
        assert torch.equal(q.cpu(), expected[0]) and torch.equal(k.cpu(), expected[1])
    for got, want in ((q, expected[0]), (k, expected[1])):
        assert got.dtype == dtype and got.shape == want.shape and got.is_contiguous()
        if got.numel() == 0:
            continue
        assert got.isfinite().all()
        difference = (got.cpu().double() - want.double()).abs()
        # One step of the larger of a pair, times cos + sin, and a rounding of the result.
        row = want.double().abs().amax(-1, keepdim=True).clamp(min=1e-6)
        step = 4 * torch.finfo(dtype).eps * row
        worst = float((difference / step).max())
        assert worst <= 1, f"off by {worst:.1f} times what a flip can do"
        flips = int((difference > 0).sum())
        budget = FLIP_RATE[dtype] * difference.numel() + FEW
        assert flips <= budget, f"{flips} of {difference.numel()} differ, over {budget:.0f}"


def scattered(arguments: tuple[Any, ...], like: Tensor) -> Tensor:
    """The parts, each written to a place of its own in any order."""
    from lrq_kernels import qk_norm_rope as kernels

    parts = like.shape[0]
    size = (like[0].numel() + 15) // 16 * 16
    memory = torch.empty(3 * parts, size, dtype=like.dtype, device=like.device)
    places = torch.randperm(3 * parts)[:parts]
    offsets = ((places - places[-1]) * size).to(like.device)
    outs = [memory[int(place)][: like[0].numel()].view(like.shape[1:]) for place in places]
    kernels.write_parts(arguments, outs[-1], parts, offsets)
    return torch.stack(outs)


def check_parts(device: str, dtype: torch.dtype) -> None:
    """q, k and v where qk_norm_rope has them, for groups of heads within a part and across parts,
    and for heads that go to one process each."""
    for parts, case in (
        (2, Case(5, 3, 24, 16)),
        (3, Case(4, None, 3, 10, rope="half")),
        (4, Case(3, 2, 8, 32, norm="rms_across_heads", fused=False)),
        (2, Case(3, 0, 38, 8, norm="none", samples=3)),
        (2, Case(0, 0, 2)),
    ):
        arguments = draw(case, dtype, device)
        if INTERPRETED:
            from lrq_kernels import qk_norm_rope as kernels

            got = kernels.qk_norm_rope_parts(*arguments, parts)
        else:
            got = torch.ops.lrq.qk_norm_rope_parts(*arguments, parts)
        tokens, heads = case.tokens + (case.context_tokens or 0), case.heads // parts
        if INTERPRETED or device == "cuda":
            assert torch.equal(scattered(arguments, got), got)
        assert got.shape == (parts, case.samples, tokens, 3, heads, case.head_dim)
        whole = launch(*arguments)
        for part, of_part in enumerate(got):
            mine = slice(part * heads, (part + 1) * heads)
            for index in range(3):
                assert torch.equal(of_part[:, :, index], whole[index][:, :, mine])


# ---- the reference, CPU: bit for bit what diffusers computes ------------------------------------


def norms(arguments: tuple, make: Any) -> list[torch.nn.Module]:
    """norm_q, norm_k, norm_added_q and norm_added_k with the weights of the op."""
    made = []
    for weight in arguments[6:10]:
        norm = make()
        if weight is not None:
            norm.weight = torch.nn.Parameter(weight, requires_grad=False)
        made.append(norm)
    return made


def diffusers_chain(arguments: tuple, make_norm: Any) -> list[Tensor]:
    """What FluxAttnProcessor does between the projections and attention, in its order."""
    from diffusers.models.embeddings import apply_rotary_emb

    q, k, v, context_q, context_k, context_v = arguments[:6]
    cos, sin, heads, _, _, rope = arguments[10:]
    norm_q, norm_k, norm_added_q, norm_added_k = norms(arguments, make_norm)
    q, k, v = (x.unflatten(-1, (heads, -1)) for x in (q, k, v))
    q, k = norm_q(q), norm_k(k)
    if context_q is not None:
        before = [x.unflatten(-1, (heads, -1)) for x in (context_q, context_k, context_v)]
        before[0], before[1] = norm_added_q(before[0]), norm_added_k(before[1])
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(before, (q, k, v), strict=True))
    if cos is not None:
        options = {"sequence_dim": 1, "use_real_unbind_dim": -2 if rope == "half" else -1}
        q, k = (apply_rotary_emb(x, (cos, sin), **options) for x in (q, k))
    return [q, k, v]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", [*ROPES, None])
@pytest.mark.parametrize("context_tokens", [None, 3])
@pytest.mark.parametrize("head_dim", [64, 72, 96, 128])
def test_reference_is_the_flux_processor(
    head_dim: int, context_tokens: int | None, rope: str | None, dtype: torch.dtype
) -> None:
    for options in ({}, {"weights": False}, {"fused": False, "samples": 1}):
        case = Case(17, context_tokens, 4, head_dim, rope=rope, **options)
        arguments = draw(case, dtype)

        def make(case: Case = case) -> torch.nn.Module:
            return torch.nn.RMSNorm(case.head_dim, EPS, elementwise_affine=case.weights)

        expected = diffusers_chain(arguments, make)
        assert all(map(torch.equal, ops.qk_norm_rope(*arguments), expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_norm_of_diffusers(dtype: torch.dtype) -> None:
    """rms_rounded: Qwen-Image, SD3.5; without a rotation, as SD3.5 is, and with one."""
    from diffusers.models.normalization import RMSNorm

    for options in ({"rope": None}, {}, {"weights": False}):
        case = Case(17, 5, 4, 64, norm="rms_rounded", **options)
        arguments = draw(case, dtype)

        def make(case: Case = case) -> torch.nn.Module:
            return RMSNorm(case.head_dim, EPS, elementwise_affine=case.weights)

        expected = diffusers_chain(arguments, make)
        assert all(map(torch.equal, ops.qk_norm_rope(*arguments), expected))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_rotation_of_qwen_image(dtype: torch.dtype) -> None:
    """There a stream is rotated by complex numbers before it is joined to the other."""
    from diffusers.models.transformers.transformer_qwenimage import apply_rotary_emb_qwen

    arguments = draw(Case(17, 5, 4, 64, norm="none"), dtype)
    angles = torch.rand(22, 32) * 6.3
    turns = torch.polar(torch.ones_like(angles), angles)
    cos, sin = (part.repeat_interleave(2, dim=-1).contiguous() for part in (turns.real, turns.imag))
    got = ops.qk_norm_rope(*arguments[:10], cos, sin, *arguments[12:])
    for stream, context, joint in zip(arguments[:2], arguments[3:5], got, strict=False):
        parts = (
            apply_rotary_emb_qwen(x.unflatten(-1, (4, -1)), turn, use_real=False)
            for x, turn in ((context, turns[:5]), (stream, turns[5:]))
        )
        assert torch.equal(joint, torch.cat(list(parts), dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_is_the_wan_processor(dtype: torch.dtype) -> None:
    """A norm over all heads; a rotation written out in pairs."""
    arguments = draw(Case(17, None, 4, 96, norm="rms_across_heads", with_v=False), dtype)
    q, k, _ = ops.qk_norm_rope(*arguments)
    cos, sin = arguments[10:12]
    cos, sin = cos[:, ::2].repeat_interleave(2, -1), sin[:, 1::2].repeat_interleave(2, -1)
    got = ops.qk_norm_rope(*arguments[:10], cos, sin, *arguments[12:])
    for x, weight, out in zip(arguments[:2], arguments[6:8], got, strict=False):
        normed = torch.nn.functional.rms_norm(x, (4 * 96,), weight, EPS).unflatten(-1, (4, -1))
        first, second = normed.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = cos[:, None, ::2], sin[:, None, 1::2]
        expected = torch.empty_like(normed)
        expected[..., 0::2] = first * c - second * s
        expected[..., 1::2] = first * s + second * c
        assert torch.equal(out, expected)
    assert q.shape == k.shape == (2, 17, 4, 96)


def test_float64_is_not_rounded_on_the_way() -> None:
    """The oracle: fp32's result lies within fp32 error of it, in every mode."""
    for norm in HEAD_NORMS:
        for rope in ROPES:
            arguments = draw(Case(norm=norm, rope=rope), torch.float32)
            wide = [x.double() if isinstance(x, Tensor) else x for x in arguments[:10]]
            exact = ops.qk_norm_rope(*wide, *arguments[10:])
            for got, expected in zip(ops.qk_norm_rope(*arguments), exact, strict=True):
                assert expected.dtype == torch.float64
                torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


def test_parts() -> None:
    check_parts("cpu", torch.bfloat16)


def test_no_v_no_context_and_no_tokens() -> None:
    case = Case(context_tokens=None, with_v=False)
    q, k, v = ops.qk_norm_rope(*draw(case, torch.bfloat16))
    assert q.shape == k.shape == (2, 5, 3, 16) and v.shape == (0,)
    for tokens, context_tokens in ((0, 0), (0, 2), (2, 0)):
        q, k, v = ops.qk_norm_rope(*draw(Case(tokens, context_tokens), torch.float16))
        assert q.shape == k.shape == v.shape == (2, tokens + context_tokens, 3, 16)


# ---- interpreter, CPU ---------------------------------------------------------------------------


# What a kernel must get right: groups of heads that do not come out even, channels that do not
# fill a tile, every mode, one stream or two, strides.
CASES = [
    Case(),
    Case(2, 1, 19, 72),
    Case(2, 1, 4, 96, rope="half"),
    Case(3, None, 2, 128, rope=None, with_v=False),
    Case(2, 2, 9, 6, norm="rms_rounded", rope="half"),
    Case(2, 1, 5, 10, norm="rms_across_heads"),
    Case(2, 1, 3, 20, norm="rms_across_heads", rope="half", weights=False),
    Case(2, 2, 3, 2, norm="none"),
    Case(2, 2, 1, 250, weights=False, with_v=False),
    Case(2, 0, 2, 64, fused=False),
    Case(0, 2, 2, 64, fp32_weights=True),
    Case(2, 2, 2, 256, 1, norm="none", rope=None),
    Case(0, 0),
    Case(samples=0),
]


@in_interpreter
@pytest.mark.parametrize("case", CASES, ids=str)
def test_interpreted(case: Case) -> None:
    check(case, torch.float32)


@in_interpreter
@pytest.mark.parametrize("norm", HEAD_NORMS)
def test_interpreted_roundings(norm: str) -> None:
    """fp16, which numpy has: a rounding too few or too many shows in more than a few values."""
    for rope in (*ROPES, None):
        for fp32_weights in (False, True):
            case = Case(3, 2, 4, 32, norm=norm, rope=rope, fp32_weights=fp32_weights)
            check(case, torch.float16)


@in_interpreter
def test_interpreted_parts() -> None:
    check_parts("cpu", torch.float32)


@in_interpreter
def test_interpreted_streams_of_different_strides() -> None:
    check_streams_of_different_strides("cpu", torch.float32)


def check_streams_of_different_strides(device: str, dtype: torch.dtype) -> None:
    """q apart from k and v of one projection; results as if all were of one."""
    case = Case(4, 3, 3, 16)
    arguments = list(draw(case, dtype, device))
    expected = launch(*arguments)
    for index in (0, 5):
        arguments[index] = arguments[index].contiguous()
    assert all(map(torch.equal, launch(*arguments), expected))


# ---- ahead-of-time compilation, CPU -------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_compiles_ahead_of_time(arch: int) -> None:
    """No GPU needed: a kernel that an architecture cannot take, or that spills, fails here."""
    assert_no_spills(qk_kernel(24, 128, arch))
    assert_no_spills(qk_kernel(40, 128, arch, norm="rms_across_heads", context=False))


@not_interpreted
def test_every_variant_compiles_for_hopper() -> None:
    for compiled in (
        qk_kernel(24, 128, 90, context=False),
        qk_kernel(16, 72, 90),
        qk_kernel(12, 96, 90, rope="half", dtype="fp16", weights="fp16"),
        qk_kernel(38, 64, 90, norm="rms_rounded", rope=None),
        qk_kernel(24, 128, 90, norm="rms_rounded", weights="fp32"),
        qk_kernel(12, 128, 90, norm="rms_across_heads"),
        qk_kernel(8, 250, 90, dtype="fp32", weights="fp32"),
        qk_kernel(8, 256, 90, norm="none", weights=None),
        qk_kernel(24, 128, 90, parts=2),
        qk_kernel(24, 128, 90, parts=4, context=False),
    ):
        assert_no_spills(compiled)


@not_interpreted
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("heads, head_dim", [(24, 128), (48, 128), (38, 64), (16, 72), (20, 96)])
def test_values_stay_where_they_were_loaded(heads: int, head_dim: int, rope: str) -> None:
    """Between threads go the sums of squares alone, within a warp; loads and stores are wide."""
    for parts in (1, 2):
        compiled = qk_kernel(heads, head_dim, 90, rope=rope, parts=parts)
        assert "convert_layout" not in compiled.asm["ttgir"] and compiled.metadata.shared == 0
        ptx = compiled.asm["ptx"]
        assert "bar.sync" not in ptx and "fma.rn.f32" not in ptx
        if rope == "interleaved":
            narrow = re.findall(r"(?:ld|st)\.global\.b(?:16|32)", ptx)
            assert not narrow, narrow


# ---- errors -------------------------------------------------------------------------------------


def changed(**values: Any) -> Any:
    """Arguments replaced by values, or by what a function of the old value gives."""

    def change(arguments: Arguments) -> Arguments:
        new = {
            name: value(arguments[name]) if callable(value) else value
            for name, value in values.items()
        }
        return {**arguments, **new}

    return change


# Of qk_arguments: samples 2, tokens 4 behind 2, heads 3 of 16.
ERRORS = [
    (changed(norm="layer"), "norm", "one of ('none', 'rms'", "'layer'"),
    (changed(rope="neox"), "rope", "one of ('interleaved', 'half')", "'neox'"),
    (changed(eps=-1.0), "eps", "finite and not negative", "-1.0"),
    (changed(eps=float("nan")), "eps", "finite and not negative", "nan"),
    (changed(heads=0), "heads", "at least 1", "0"),
    (changed(heads=5), "q", "of heads = 5 times an even D of 2 to 256", "[2, 4, 48]"),
    (changed(heads=16), "q", "of heads = 16 times an even D of 2 to 256", "[2, 4, 48]"),
    (changed(q=lambda q: q[0]), "q", "[B, S, H*D]", "shape [4, 48]"),
    (changed(q=lambda q: q.int()), "dtype of q", "one of", "torch.int32"),
    (changed(q=lambda q: q.mT.contiguous().mT), "q", "of last stride 1", "strides"),
    (changed(k=lambda k: k.float()), "k", "torch.bfloat16 [2, 4, 48]", "torch.float32 [2, 4, 48]"),
    (changed(k=lambda k: k[:, :3]), "k", "torch.bfloat16 [2, 4, 48]", "torch.bfloat16 [2, 3, 48]"),
    (changed(v=lambda v: v.to("meta")), "v", "on ", "a tensor on meta"),
    (changed(v=lambda v: v[:1]), "v", "torch.bfloat16 [2, 4, 48]", "torch.bfloat16 [1, 4, 48]"),
    (changed(context_k=None), "context_k", "given exactly when context_q is", "None"),
    (changed(context_q=None), "context_k", "given exactly when context_q is", "a tensor"),
    (changed(context_v=None), "context_v", "given exactly when context_q and v are", "None"),
    (changed(v=None), "context_v", "given exactly when context_q and v are", "a tensor"),
    (changed(context_q=lambda q: q[0]), "context_q", "torch.bfloat16 [2, 0, 48]", "[2, 48]"),
    (changed(context_q=lambda q: q[..., :16]), "context_q", "[2, 2, 48]", "[2, 2, 16]"),
    (changed(context_k=lambda k: k[:, :1]), "context_k", "[2, 2, 48]", "[2, 1, 48]"),
    (changed(k_weight=None), "k_weight", "given exactly when q_weight is", "None"),
    (changed(q_weight=None), "k_weight", "given exactly when q_weight is", "a tensor"),
    (changed(context_q_weight=None), "context_q_weight", "given exactly when q_weight is and there"
     " is a context", "None"),
    (changed(q_weight=lambda w: w.half()), "q_weight", "of dtype torch.bfloat16 or torch.float32",
     "torch.float16"),
    (changed(k_weight=lambda w: w.float()), "k_weight", "torch.bfloat16 [16]",
     "torch.float32 [16]"),
    (changed(q_weight=lambda w: w[:-1]), "q_weight", "torch.bfloat16 [16]", "torch.bfloat16 [15]"),
    (changed(norm="rms_across_heads"), "q_weight", "torch.bfloat16 [48]", "torch.bfloat16 [16]"),
    (changed(norm="none"), "q_weight", "None for norm 'none'", "a tensor"),
    (changed(sin=None), "sin", "given exactly when cos is", "one without the other"),
    (changed(cos=lambda c: c[2:]), "cos", "torch.float32 [6, 16]", "torch.float32 [4, 16]"),
    (changed(sin=lambda s: s.bfloat16()), "sin", "torch.float32 [6, 16]", "torch.bfloat16 [6, 16]"),
    (changed(cos=lambda c: c.T.contiguous().T), "cos", "contiguous", "strides"),
]  # fmt: skip


@pytest.mark.parametrize("fake", [False, True], ids=["cpu", "fake"])
@pytest.mark.parametrize(("change", "argument", "expected", "got"), ERRORS)
def test_error_names_argument_expected_and_got(
    change: Any, argument: str, expected: str, got: str, fake: bool
) -> None:
    """Under torch.compile the error must come while tracing, not from a kernel later."""
    arguments = change(qk_arguments("cpu"))
    if fake:
        mode = FakeTensorMode()
        arguments = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value
            for name, value in arguments.items()
        }
    pattern = f"lrq::qk_norm_rope: {argument} must be .*{re.escape(expected)}.*, got .*"
    with pytest.raises(ValueError, match=pattern + re.escape(got)):
        call("qk_norm_rope", arguments)


@pytest.mark.parametrize(("change", "argument", "expected", "got"), [
    (changed(parts=2), "parts", "at least 2 and a divisor of heads = 3", "2"),
    (changed(parts=1), "parts", "at least 2 and a divisor of heads = 3", "1"),
    (changed(v=None, context_v=None), "v", "a tensor", "None"),
    (changed(k_weight=None), "k_weight", "given exactly when q_weight is", "None"),
])  # fmt: skip
def test_errors_of_parts(change: Any, argument: str, expected: str, got: str) -> None:
    pattern = f"lrq::qk_norm_rope_parts: {argument} must be .*{re.escape(expected)}.*, got .*"
    with pytest.raises(ValueError, match=pattern + re.escape(got)):
        call("qk_norm_rope_parts", change(qk_parts_arguments("cpu")))


def test_one_compiled_graph_serves_every_number_of_tokens() -> None:
    case = Case(5, 3, rope=None)
    arguments = draw(case, torch.bfloat16)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return ops.qk_norm_rope(q, k, v, *arguments[3:])

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    stream = draw_stream(Case(fused=False), 5, torch.bfloat16, "cpu")
    for x in stream:
        torch._dynamo.mark_dynamic(x, 1)
    assert all(map(torch.equal, compiled(*stream), run(*stream)))
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (64, 4, 17):
            stream = draw_stream(Case(fused=False), tokens, torch.bfloat16, "cpu")
            assert all(map(torch.equal, compiled(*stream), run(*stream)))


# ---- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_gpu(case: Case, dtype: torch.dtype) -> None:
    check(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("norm", HEAD_NORMS)
@pytest.mark.parametrize("rope", [*ROPES, None])
@pytest.mark.parametrize("heads, head_dim", [(24, 128), (38, 64), (16, 72), (20, 96), (40, 128)])
def test_every_mode_at_size(heads: int, head_dim: int, rope: str | None, norm: str) -> None:
    """Large enough that the rate of flips means something."""
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(65, 31, heads, head_dim, norm=norm, rope=rope)
        check(case, dtype, "cuda")
        check(Case(33, None, heads, head_dim, 1, norm, rope, with_v=False), dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_on_gpu(dtype: torch.dtype) -> None:
    check_parts("cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_streams_of_different_strides(dtype: torch.dtype) -> None:
    check_streams_of_different_strides("cuda", dtype)


@pytest.mark.gpu
def test_addresses_and_strides_that_wide_loads_cannot_take() -> None:
    case = Case(7, None, 3, 64, with_v=False)
    arguments = list(draw(case, torch.bfloat16, "cuda"))
    expected = launch(*arguments)
    for index in (0, 1):
        wide = arguments[index].new_zeros(2, 7, 3 * 64 + 3)
        wide[..., 1:-2] = arguments[index]
        arguments[index] = wide[..., 1:-2]
    assert all(map(torch.equal, launch(*arguments), expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_is_what_diffusers_computes_on_the_gpu(dtype: torch.dtype) -> None:
    arguments = draw(Case(257, 129, 24, 128), dtype, "cuda")
    expected = diffusers_chain(arguments, lambda: torch.nn.RMSNorm(128, EPS, device="cuda"))
    got = ops.qk_norm_rope(*arguments)
    assert torch.equal(got[2], expected[2])
    for one, other in zip(got[:2], expected[:2], strict=True):
        different = float((one != other).float().mean())
        assert different <= FLIP_RATE[dtype], f"{different:.1e} of the values differ"


@pytest.mark.gpu
def test_nan_and_inf_stay_in_their_heads() -> None:
    arguments = draw(Case(6, None, 3, 64, 1, with_v=False), torch.bfloat16, "cuda")
    q = arguments[0]
    q[0, 1, 3], q[0, 4, 70] = float("nan"), float("inf")
    finite = ops.qk_norm_rope(*arguments)[0].isfinite()
    assert not finite[0, 1, 0].any() and not finite[0, 4, 1].all()
    finite[0, 1, 0], finite[0, 4, 1] = True, True
    assert finite.all()


@pytest.mark.gpu
def test_float64_is_for_the_cpu_alone() -> None:
    arguments = draw(Case(), torch.float64, "cuda")
    pattern = "lrq::qk_norm_rope: dtype of q on CUDA must be .*torch.float64"
    with pytest.raises(ValueError, match=pattern):
        ops.qk_norm_rope(*arguments)
