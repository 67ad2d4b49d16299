"""What fuses in front of rotate_quantize (norm and modulation, activation, two sources) in Triton,
against the float64 oracle of reference.py: in the interpreter, compiled ahead of time, on a GPU.
"""

from __future__ import annotations

import pytest
import torch
from compiled_kernels import (
    activation_kernel,
    assert_no_spills,
    assert_nothing_moves,
    lane_shuffles,
    norm_kernel,
)
from rotate_cases import (
    Case,
    assert_codes_of_rounded_norm,
    assert_codes_within_tie_budget,
    assert_rounded_norm,
    assert_rounded_once,
    check_quantize,
    check_rotate,
    draw,
    in_interpreter,
    launch,
    norm_oracle,
    not_interpreted,
)

from lrq_kernels import activation_path, ops, reference

# kernels.md section 6, with a norm or an activation in front.
TIE_RATE = 300e-6
# ex2.approx and rsqrt.approx are good to 2^-22, and each is used once on the way to y.
SCALE_ERROR = 2e-6
Tensor = torch.Tensor
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def other_arguments(case: Case, tensors: tuple) -> tuple:
    """What the ops take after the sources: vectors of the rotation, then its numbers."""
    return (*tensors[1:], *case.arguments)


def check(result: tuple, y: Tensor, tensors: tuple, case: Case, dtype: torch.dtype) -> None:
    """x_q, x_scale (and y if kept) of an op, against y in float64."""
    x_q, x_scale, *kept = result
    assert_codes_within_tie_budget(
        x_q, x_scale, (y, *tensors[1:]), case, tie_rate=TIE_RATE, scale_error=SCALE_ERROR
    )
    if kept and kept[0].numel():
        assert kept[0].dtype == dtype
        assert_rounded_once(kept[0], y)


def check_rounded_norm(result: tuple, y: Tensor, tensors: tuple, case: Case) -> None:
    """The same of a norm, against y in the type that it is rounded to."""
    if y.dtype == torch.float32:
        check(result, y.double(), tensors, case, y.dtype)
        return
    x_q, x_scale, kept = result
    assert_codes_of_rounded_norm(x_q, x_scale, (y, *tensors[1:]), case)
    if kept.numel():
        assert_rounded_norm(kept, y)


def draw_vectors(
    samples: int, in_features: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """norm_weight, norm_bias, and scale and shift as chunks of one modulation vector."""
    weight = (torch.rand(in_features, device=device) + 0.5).to(dtype)
    bias = torch.randn(in_features, device=device)
    modulation = torch.randn(samples, 6 * in_features, device=device)
    scale, shift = modulation.chunk(6, dim=1)[1], modulation.to(dtype).chunk(6, dim=1)[0]
    return weight, bias, scale, shift


def check_norm(
    x: Tensor, vectors: tuple, norm: str, tensors: tuple, case: Case, keep: bool = True
) -> None:
    front = (*vectors, norm, 1e-6)
    arguments = other_arguments(case, tensors)
    result = launch("norm_modulate_rotate_quantize", x, *front, *arguments, keep)
    channel_scale, joined = tensors[1], None
    if not keep and reference.joins_modulation(x, *vectors[2:], channel_scale):
        order = torch.arange(x.shape[-1]) if tensors[2] is None else tensors[2].long()
        joined = channel_scale[order.argsort().to(channel_scale.device)]
        tensors = (tensors[0], None, *tensors[2:])
    y = norm_oracle(x, vectors, norm, 1e-6, joined)
    check_rounded_norm(result, y, tensors, case)
    assert result[2].shape == (x.shape if keep else (0,))


def check_activation(
    x: Tensor, gate: Tensor | None, name: str, tensors: tuple, case: Case, keep: bool = True
) -> None:
    arguments = other_arguments(case, tensors)
    result = launch("activation_rotate_quantize", x, gate, name, *arguments, keep)
    wide = None if gate is None else gate.double()
    check(result, reference.activate(x.double(), wide, name), tensors, case, x.dtype)
    assert result[2].shape == (x.shape if keep else (0,))


def check_concat(first: Tensor, second: Tensor, tensors: tuple, case: Case) -> None:
    result = launch("concat_rotate_quantize", first, second, *other_arguments(case, tensors))
    check(result, torch.cat([first, second], dim=-1), tensors, case, first.dtype)


def check_special_rows(device: str, dtype: torch.dtype, rotation: str) -> None:
    """Rows with NaN or inf next to ordinary ones that must not notice; zero rows."""
    case = Case(rotation)
    tensors = draw(6, 384, dtype, case, device=device)
    x, finite = tensors[0], torch.tensor([0, 2, 5], device=device)
    x[1] = 0.0
    x[3, 200] = float("nan")
    x[4, 7] = float("-inf")
    arguments = other_arguments(case, tensors)
    part = x[finite]

    none = (None, None, None, None, "layer", 1e-6)
    x_q, x_scale, _ = launch("norm_modulate_rotate_quantize", x, *none, *arguments, False)
    assert float(x_scale[1]) == 0.0 and not x_q[1].any()
    assert not x_scale[3:5].isfinite().any() and not x_q[3:5].any()
    y = norm_oracle(part, none[:4], *none[4:])
    check_rounded_norm((x_q[finite], x_scale[finite], y[:0]), y, tensors, case)

    for name in ("gelu_tanh", "gelu_erf", "silu"):
        x_q, x_scale, _ = launch("activation_rotate_quantize", x, None, name, *arguments, False)
        assert float(x_scale[1]) == 0.0 and not x_q[1].any()
        # -inf * 0 on the way, as in torch; +inf stays inf.
        assert not x_scale[3:5].isfinite().any() and not x_q[3:5].any()
        y = reference.activate(part.double(), None, name)
        check((x_q[finite], x_scale[finite]), y, tensors, case, dtype)

    halves = x[:, :128], x[:, 128:]
    x_q, x_scale = launch("concat_rotate_quantize", *halves, *arguments)
    assert float(x_scale[1]) == 0.0 and not x_q[1].any()
    assert not x_scale[3:5].isfinite().any() and not x_q[3:5].any()
    check((x_q[finite], x_scale[finite]), part.double(), tensors, case, dtype)


def check_narrow_scale(device: str, in_features: int, dtype: torch.dtype, permuted: bool) -> None:
    """A channel scale of bf16 in every form: its products are rounded to the type of the tokens,
    those with a modulation before it meets the norm."""
    case = Case()
    tensors = draw(6, in_features, dtype, case, permuted=permuted, device=device, narrow=True)
    check_quantize(tensors, case)
    check_rotate(tensors, case)
    x = tensors[0].view(2, 3, -1)
    *_, scale, shift = draw_vectors(2, in_features, dtype, device)
    by_sample = (tensors[0].view(x.shape), *tensors[1:])
    for vectors in ((scale.to(dtype), shift), (scale, shift), (None, shift)):
        for keep in (False, True):
            check_norm(x, (None, None, *vectors), "layer", by_sample, case, keep)
    check_activation(x, None, "silu", by_sample, case, True)
    check_concat(x[..., :64], x[..., 64:], by_sample, case)


# ---- the reference, CPU -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_reference_norm_is_that_of_torch(norm: str, dtype: torch.dtype) -> None:
    """Composed of torch's own operators, in float64; x of samples and x of one."""
    x = (torch.randn(2, 5, 96) * 3 + 1).to(dtype)
    weight, bias, scale, shift = draw_vectors(2, 96, dtype)
    wide, w = x.double(), weight.double()
    if norm == "layer":
        normed = torch.nn.functional.layer_norm(wide, (96,), w, bias.double(), 1e-5)
    else:
        normed = torch.nn.functional.rms_norm(wide, (96,), w, 1e-5) + bias
    expected = normed * (1 + scale.double()[:, None]) + shift.double()[:, None]
    got = reference.norm_modulate(x, weight, bias, scale, shift, norm, 1e-5)
    assert got.dtype == dtype  # scale is fp32: rounded once
    torch.testing.assert_close(got, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5)
    one = reference.norm_modulate(x[1], weight, bias, scale[1:], shift[1:], norm, 1e-5)
    assert torch.equal(one, got[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_reference_rounds_a_modulation_as_torch_does(dtype: torch.dtype) -> None:
    """Each step of it, in the type of the model; but for norms that fp32 rounds the other way."""
    x = (torch.randn(2, 50, 96) * 3 + 1).to(dtype)
    scale, shift = torch.randn(2, 96).to(dtype), torch.randn(2, 96).to(dtype)
    eager = torch.nn.functional.layer_norm(x, (96,), None, None, 1e-5)
    eager = eager * (1 + scale[:, None]) + shift[:, None]
    got = reference.norm_modulate(x, None, None, scale, shift, "layer", 1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(got, eager, rtol=1e-5, atol=1e-5)
    else:
        assert_rounded_norm(got, eager)


def test_reference_keeps_what_it_quantizes() -> None:
    x, gate = torch.randn(4, 128).bfloat16(), torch.randn(4, 128).bfloat16()
    arguments = (None, None, None, "none", 128, 8, "absmax", 1.0, True)
    x_q, x_scale, kept = reference.activation_rotate_quantize(x, gate, "silu", *arguments)
    expected = torch.nn.functional.silu(gate.float()) * x.float()
    assert torch.equal(kept, expected.bfloat16())
    # Codes come of the value before it is rounded to bf16: half a step from it, not more.
    error = (x_q * x_scale[:, None] - expected).abs()
    assert bool((error <= 0.5001 * x_scale[:, None]).all())


# ---- interpreter, CPU ---------------------------------------------------------------------------


RMS_INT4 = {"act_bits": 4, "scale_mode": "rms", "scale_factor": 0.35}
INTERPRETED_CASES = [
    (384, Case()),
    (1152, Case(block_size=128)),  # 36 values a thread, no padding
    (192, Case(block_size=64, **RMS_INT4)),  # padded: a mean must not count what is not there
    (75, Case(rotation="none")),  # padded within the columns of a thread
    (256, Case(rotation="dual")),  # y by a launch of its own
]


@in_interpreter
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("in_features, case", INTERPRETED_CASES)
def test_interpreted_norm(in_features: int, case: Case, permuted: bool) -> None:
    tensors = draw(2, in_features, torch.float32, case, permuted=permuted)
    x = (tensors[0] + 2.0).view(2, 1, -1)
    vectors = draw_vectors(2, in_features, torch.float32)
    check_norm(x, vectors, "layer", tensors, case)
    check_norm(x, vectors, "rms", tensors, case, False)
    check_norm(x.view(2, -1), (None, None, None, None), "layer", tensors, case, False)
    check_norm(x[1], (None, vectors[1], vectors[2][1:], None), "rms", tensors, case)


@in_interpreter
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:])  # the interpreter cuts digits off to make bf16
def test_interpreted_scale_of_bf16(dtype: torch.dtype, permuted: bool) -> None:
    check_narrow_scale("cpu", 384, dtype, permuted)


@in_interpreter
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("in_features, case", INTERPRETED_CASES)
def test_interpreted_activation(in_features: int, case: Case, permuted: bool) -> None:
    pair = torch.randn(2, 2 * in_features) * 3
    tensors = draw(1, in_features, torch.float32, case, permuted=permuted)
    x, gate = pair.chunk(2, dim=1)
    check_activation(x, gate, "silu", tensors, case)
    check_activation(x, None, "gelu_erf", tensors, case, False)
    check_activation(x.contiguous(), None, "gelu_tanh", tensors, case)


@in_interpreter
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize(
    "split, in_features, case",
    [
        (128, 384, Case()),
        (72, 384, Case()),  # inside a block
        (45, 384, Case()),  # inside the columns of a thread
        (1024, 1152, Case()),  # where a chunk ends
        (1100, 1152, Case()),
        (30, 75, Case(rotation="none")),
        (40, 128, Case(rotation="dual")),
        (0, 128, Case()),
        (128, 128, Case()),
    ],
)
def test_interpreted_concat(split: int, in_features: int, case: Case, permuted: bool) -> None:
    tensors = draw(2, in_features, torch.float32, case, permuted=permuted)
    x = tensors[0]
    check_concat(x[:, :split], x[:, split:].contiguous(), tensors, case)


@in_interpreter
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_interpreted_special_rows(rotation: str) -> None:
    check_special_rows("cpu", torch.float32, rotation)


@in_interpreter
def test_interpreted_strides_of_samples_and_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of a sample that follow others, as FLUX cuts text off; parts of less than a sample."""
    from lrq_kernels import rotate_quantize as kernels

    monkeypatch.setattr(kernels, "_PART_ELEMENTS", 2 * 128)
    for rotation in ("hadamard", "dual"):
        case = Case(rotation)
        tensors = draw(1, 128, torch.float32, case, permuted=True)
        vectors = draw_vectors(2, 128, torch.float32)
        for tokens in (3, 1, 0):
            x = torch.randn(2, 8, 140)[:, 4 : 4 + tokens, 6:134]
            for keep in (False, True) if tokens == 3 else (True,):
                check_norm(x, vectors, "layer", tensors, case, keep)
                check_activation(x, None, "silu", tensors, case, keep)
            check_concat(x[..., :40], x[..., 40:], tensors, case)


# ---- selection, CPU -----------------------------------------------------------------------------


def rotate_rows_by_reference(
    x: Tensor, second: Tensor | None, scale, shift, norm: str, eps: float, channel_scale, *rest
) -> tuple[Tensor, Tensor]:
    """What lrq::_rotate_rows computes."""
    y = x if second is None else torch.cat([x, second], dim=-1)
    if norm != "none":
        y = reference.norm_modulate(y, None, None, scale, shift, norm, eps)
    block_size, *step = rest
    return reference.rotate_quantize(y, channel_scale, None, None, "hadamard", block_size, *step)


@pytest.fixture
def cuda_for_every_form(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Chooses CUDA where it can; the list grows by a word for each call of the kernel."""
    pytest.importorskip("lrq_kernels._planner")
    calls: list[str] = []

    def called(*arguments):
        calls.append("called")
        return rotate_rows_by_reference(*arguments)

    monkeypatch.setattr(activation_path, "CUDA_FORMS", {"plain", "concat", "norm_modulate"})
    monkeypatch.setattr(activation_path, "_rotate_rows", called)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_kernel_gets_the_same_problem(
    cuda_for_every_form: list[str], dtype: torch.dtype
) -> None:
    case = Case(act_bits=4, scale_mode="rms", scale_factor=0.3)
    tensors = draw(6, 256, dtype, case, narrow=True)
    arguments, x = other_arguments(case, tensors), tensors[0].view(2, 3, -1)
    _, _, scale, shift = draw_vectors(2, 256, dtype)
    for op, sources in (
        ("rotate_quantize", (x,)),
        ("concat_rotate_quantize", (x[..., :128], x[..., 128:])),
        ("norm_modulate_rotate_quantize", (x, None, None, scale, shift, "layer", 1e-5)),
        ("norm_modulate_rotate_quantize", (x[1], None, None, scale[1:], None, "rms", 1e-5)),
    ):
        keep = (False,) if op.startswith("norm") else ()
        got = getattr(activation_path, op)(*sources, *arguments, *keep)
        expected = getattr(reference, op)(*sources, *arguments, *keep)
        assert all(map(torch.equal, got, expected)), op
    assert len(cuda_for_every_form) == 4


def test_what_cuda_cannot_do_stays_in_triton(
    cuda_for_every_form: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrq_kernels import rotate_quantize as kernels

    names = ("rotate_quantize", "concat_rotate_quantize", "norm_modulate_rotate_quantize")
    for name in names:
        monkeypatch.setattr(kernels, name, lambda *_: "triton")
    plain, concat, norm = (getattr(activation_path, name) for name in names)
    wide, vector = torch.randn(2, 256).bfloat16(), torch.ones(128)
    x = wide[:, :128]
    index, step = torch.arange(128, dtype=torch.int32), (8, "absmax", 1.0)
    hadamard = (None, None, None, "hadamard", 128, *step)
    for call in (
        lambda: plain(x.float(), *hadamard),
        lambda: plain(x[0], *hadamard),
        lambda: plain(x, vector, *hadamard[1:]),  # fp32: products may need more than 16 bits
        lambda: concat(x, x, torch.ones(256), *hadamard[1:]),
        lambda: norm(x, None, None, None, None, "layer", 1e-6, vector, *hadamard[1:], False),
        lambda: plain(wide[:, 4:132], *hadamard),  # not on 16 bytes
        lambda: concat(x[:, :64], x[:, 64:], *hadamard),
        lambda: plain(x, None, index, None, "hadamard", 128, *step),
        lambda: plain(x, None, None, None, "none", 128, *step),
        lambda: plain(x, None, None, torch.ones(2, 128, 128), "dual", 128, *step),
        lambda: plain(x, None, None, None, "hadamard", 32, *step),
        lambda: concat(x, x, None, index, None, "hadamard", 128, *step),
        lambda: norm(x, vector, None, None, None, "layer", 1e-6, *hadamard, False),
        lambda: norm(x, None, vector, None, None, "layer", 1e-6, *hadamard, False),
        lambda: norm(x, None, None, None, None, "layer", 1e-6, *hadamard, True),
    ):
        assert call() == "triton"
    assert cuda_for_every_form == []


# ---- ahead-of-time compilation, CPU -------------------------------------------------------------


@not_interpreted
@pytest.mark.parametrize("arch", [80, 89, 90, 100, 120])
def test_compiles_ahead_of_time(arch: int) -> None:
    """No GPU needed: a kernel that an architecture cannot take, or that spills, fails here."""
    for compiled, _ in (
        norm_kernel("layer", False, False, 3072, arch),
        activation_kernel("gelu_tanh", False, False, 12288, arch),
    ):
        assert_no_spills(compiled)


@not_interpreted
def test_every_variant_compiles_for_hopper() -> None:
    rms = Case(block_size=512, scale_mode="rms", scale_factor=0.03)
    for compiled, _ in (
        norm_kernel("layer", True, True, 3072, 90, dtype="fp16"),
        norm_kernel("rms", True, False, 5120, 90, case=rms, permuted=True),
        norm_kernel("layer", False, False, 1001, 90, case=Case("none")),
        norm_kernel("layer", False, False, 1152, 90, case=Case("none"), quantize=False),
        activation_kernel("gelu_erf", False, True, 4608, 90, dtype="fp32"),
        activation_kernel("silu", True, True, 12288, 90),
        activation_kernel("silu", True, False, 10240, 90, case=rms, permuted=True),
    ):
        assert_no_spills(compiled)


@not_interpreted
def test_values_stay_where_they_were_loaded() -> None:
    affine, num_warps = norm_kernel("layer", True, True, 3072, 90)
    assert_nothing_moves(affine, num_warps, lane_shuffles(96, 128), 3)
    plain, num_warps = norm_kernel("rms", False, False, 4608, 90)
    assert_nothing_moves(plain, num_warps, lane_shuffles(72, 128), 2)
    gelu, num_warps = activation_kernel("gelu_tanh", False, False, 12288, 90)
    assert_nothing_moves(gelu, num_warps, lane_shuffles(96, 128))
    gated, num_warps = activation_kernel("silu", True, True, 1152, 90)
    assert_nothing_moves(gated, num_warps, lane_shuffles(36, 128))


# ---- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [1152, 1536, 2432, 3072, 3840, 4096, 5120, 6144])
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norm_of_every_width(norm: str, in_features: int) -> None:
    case = Case()
    tensors = draw(2 * 129, in_features, torch.bfloat16, case, device="cuda")
    x = tensors[0].view(2, 129, -1)
    vectors = draw_vectors(2, in_features, torch.bfloat16, "cuda")
    check_norm(x, vectors, norm, tensors, case)
    check_norm(x, (None, None, *vectors[2:]), norm, tensors, case, False)
    check_norm(x[1], (vectors[0], None, None, None), norm, tensors, case, False)


@pytest.mark.gpu
@pytest.mark.parametrize("in_features", [3072, 4608, 8960, 10240, 12288, 13824, 15360])
@pytest.mark.parametrize("name", ["gelu_tanh", "gelu_erf", "silu"])
def test_activation_of_every_width(name: str, in_features: int) -> None:
    case = Case()
    _, *rest = draw(1, in_features, torch.bfloat16, case, device="cuda")
    pair = (torch.randn(129, 2 * in_features, device="cuda") * 3).bfloat16()
    tensors = (pair, *rest)
    x, gate = pair.chunk(2, dim=1)
    check_activation(x, gate, name, tensors, case)
    check_activation(x, None, name, tensors, case, False)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "split, in_features",
    [(3072, 15360), (6144, 24576), (1024, 3072), (3000, 3072), (37, 1152), (0, 3072), (3072, 3072)],
)
def test_concat_at_every_kind_of_split(split: int, in_features: int) -> None:
    """24576: FLUX.2 is 6144 + 18432 wide."""
    case = Case()
    for permuted in (False, True):
        tensors = draw(65, in_features, torch.bfloat16, case, permuted=permuted, device="cuda")
        x = tensors[0]
        check_concat(x[:, :split].contiguous(), x[:, split:].contiguous(), tensors, case)
        check_concat(x[:, :split], x[:, split:], tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_every_form_in_every_mode(rotation: str, dtype: torch.dtype) -> None:
    """Scale modes, permutation, kept or not, three sorts of floats."""
    for options in ({}, RMS_INT4):
        case = Case(rotation, **options)
        for permuted in (False, True):
            tensors = draw(100, 1152, dtype, case, permuted=permuted, device="cuda")
            x, vectors = tensors[0].view(2, 50, -1), draw_vectors(2, 1152, dtype, "cuda")
            for keep in (False, True):
                check_norm(x, vectors, "layer", tensors, case, keep)
                check_activation(x, x.flip(1), "silu", tensors, case, keep)
            check_concat(x[..., :384], x[..., 384:], tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("rotation", ["hadamard", "dual"])
def test_every_number_of_tokens_and_samples(rotation: str) -> None:
    """Samples that follow other tokens in memory; one token, none, odd numbers."""
    case = Case(rotation)
    _, *rest = draw(1, 3072, torch.bfloat16, case, permuted=True, device="cuda")
    for samples, tokens in ((1, 1), (3, 1), (2, 0), (0, 5), (3, 85), (1, 257)):
        base = torch.randn(samples, tokens + 7, 3200, device="cuda").bfloat16()
        vectors = draw_vectors(samples, 3072, torch.bfloat16, "cuda")
        x = base[:, 7:, 64:3136]
        tensors = (x, *rest)
        check_norm(x, vectors, "layer", tensors, case)
        check_activation(x, None, "gelu_tanh", tensors, case)
        check_concat(x[..., :1000], x[..., 1000:], tensors, case)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotation", ["none", "hadamard", "dual"])
def test_special_rows(rotation: str, dtype: torch.dtype) -> None:
    check_special_rows("cuda", dtype, rotation)


@pytest.mark.gpu
@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", [384, 3072])
def test_scale_of_bf16(in_features: int, dtype: torch.dtype, permuted: bool) -> None:
    """By CUDA where it takes them, by Triton elsewhere."""
    check_narrow_scale("cuda", in_features, dtype, permuted)


@pytest.mark.gpu
def test_tie_rate_at_size() -> None:
    """A sample large enough that 300 per million means something."""
    case = Case()
    tensors = draw(1024, 3072, torch.bfloat16, case, device="cuda")
    check_norm(tensors[0], (None,) * 4, "layer", tensors, case)
    check_activation(tensors[0], None, "gelu_tanh", tensors, case)


@pytest.mark.gpu
def test_modulation_of_odd_strides_and_starts() -> None:
    """Vectors that wide loads cannot take."""
    case = Case()
    tensors = draw(6, 384, torch.bfloat16, case, device="cuda")
    modulation = torch.randn(2, 3 * 384 + 5, device="cuda").bfloat16()
    vectors = (None, None, modulation[:, 3:387], modulation[:, 401:785])
    check_norm(tensors[0].view(2, 3, -1), vectors, "layer", tensors, case)


@pytest.mark.gpu
def test_outputs_are_repeatable() -> None:
    case = Case()
    tensors = draw(300, 3072, torch.bfloat16, case, device="cuda")
    arguments = (tensors[0], None, "gelu_tanh", *other_arguments(case, tensors), True)
    first = ops.activation_rotate_quantize(*arguments)
    for _ in range(3):
        again = ops.activation_rotate_quantize(*arguments)
        assert all(map(torch.equal, first, again))
