"""LRQLinear and its shared InputQuantizer: what they compute, share, keep and refuse."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import pickle
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrq_kernels import (
    InputQuantizer,
    LinearState,
    LRQLinear,
    QuantScheme,
    TwinLogCodebook,
    fuse_linears,
    ops,
    unpack_codes,
)
from lrq_kernels import reference as R
from lrq_kernels.input_quantizer import Prepared, PreparedInput
from lrq_kernels.linear import split_linear
from lrq_kernels.testing import assert_at_most_twice, make_state, relative_error

N, K = 40, 256
QUANTIZED = {
    "w4a8": QuantScheme(4, 8),
    "w3a4-rms": QuantScheme(3, 4, "hadamard", 64, "rms", 0.3545),
    "w2a8-block256": QuantScheme(2, 8, "hadamard", 256, "absmax", 0.9),
    "w4a8-plain": QuantScheme(4, 8, "none"),
    "w4a4-dual": QuantScheme(4, 4, "dual"),
}
WEIGHT_ONLY = {
    "w4a16-plain": QuantScheme(4, 16, "none"),
    "w3a16": QuantScheme(3, 16),
    "w2a16-dual": QuantScheme(2, 16, "dual"),
}
ALL = {**QUANTIZED, **WEIGHT_ONLY}
every_scheme = pytest.mark.parametrize("scheme", ALL.values(), ids=ALL.keys())
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(scheme: QuantScheme, **options: object) -> LinearState:
    return make_state(N, K, scheme, permuted=scheme.rotation != "none", **options)  # type: ignore[arg-type]


def tokens(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Activations with a few loud channels."""
    x = torch.randn(*shape, K)
    x[..., ::37] *= 8
    return x.to(dtype)


def channel_scale(state: LinearState) -> Tensor | None:
    """Smoothing and signs in the order that lrq::rotate wants."""
    rotation, scale = state.rotation, state.smooth_scale
    if rotation.kind != "hadamard":
        return scale
    scale = torch.ones(state.in_features) if scale is None else scale
    if rotation.permutation is not None:
        scale = scale[rotation.permutation.long()]
    return scale * rotation.signs


def composed(state: LinearState, x: Tensor) -> Tensor:
    """The two reference functions, one after the other, for x [M, K]."""
    scheme, rotation = state.scheme, state.rotation
    x_q, x_scale = R.rotate_quantize(
        x,
        channel_scale(state),
        rotation.permutation,
        rotation.matrices,
        scheme.rotation,
        scheme.block_size,
        scheme.act_bits,
        scheme.scale_mode,
        scheme.scale_factor,
    )
    weight = R.prepack(state.codes, K, scheme.weight_bits)
    tail = (None, None, scheme.weight_bits, state.out_features, "none", x.dtype)
    return R.gemm(x_q, x_scale, weight, state.levels, state.weight_scale, state.bias, *tail)


def exact(state: LinearState, x: Tensor) -> Tensor:
    """What the linear means, in float64: no activation is quantized."""
    weight = R.prepack(state.codes, state.in_features, state.scheme.weight_bits)
    sizes = (state.out_features, state.in_features, state.scheme.weight_bits)
    level = R.weight_levels(weight, state.levels, *sizes).double()
    wide = x.double()
    if state.smooth_scale is not None:
        wide = wide * state.smooth_scale.double()
    bias = None if state.bias is None else state.bias.double()
    rotated = state.rotation.apply(wide)
    return F.linear(rotated, level * state.weight_scale.double()[:, None], bias)


# ---- what it computes ---------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", QUANTIZED.values(), ids=QUANTIZED.keys())
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extras", [True, False])
def test_is_rotate_quantize_then_gemm(scheme: QuantScheme, dtype: torch.dtype, extras: bool):
    state = draw(scheme, bias=extras, smooth=extras)
    x = tokens(9, dtype=dtype)
    y = LRQLinear.from_state(state)(x)
    assert y.dtype == dtype and torch.equal(y, composed(state, x))


@pytest.mark.parametrize("scheme", QUANTIZED.values(), ids=QUANTIZED.keys())
def test_is_the_linear_that_its_codes_mean(scheme: QuantScheme):
    """From the definitions alone, in float64: no op and no reference function on the way."""
    state, x = draw(scheme), tokens(64)
    rotated = state.rotation.apply(x.double() * state.smooth_scale.double())
    if scheme.scale_mode == "rms":
        step = rotated.square().mean(dim=1, keepdim=True).sqrt() * scheme.scale_factor
    else:
        step = rotated.abs().amax(dim=1, keepdim=True) * scheme.scale_factor / scheme.qmax
    rounded = (rotated / step).round().clamp(-scheme.qmax, scheme.qmax) * step
    codes = unpack_codes(state.codes, scheme.weight_bits, K)
    weight = TwinLogCodebook(state.levels, state.weight_scale).decode(codes)
    expected = F.linear(rounded, weight.double(), state.bias.double())
    # Codes at ties differ between fp32 and fp64: one flip of an int4 code makes 0.4 % here.
    assert relative_error(LRQLinear.from_state(state)(x), expected) < 0.02


@pytest.mark.parametrize("scheme", WEIGHT_ONLY.values(), ids=WEIGHT_ONLY.keys())
@pytest.mark.parametrize("rows", [1, 9, 16, 17, 33])  # gemv up to 16, fp32 sums above
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_only_is_as_good_as_torch(scheme: QuantScheme, rows: int, dtype: torch.dtype):
    state, x = draw(scheme), tokens(rows, dtype=dtype)
    linear = LRQLinear.from_state(state)
    rotated = state.rotation.apply(x.float() * state.smooth_scale).to(dtype)
    baseline = F.linear(rotated, linear.dequantize(dtype), state.bias.to(dtype))
    assert_at_most_twice(linear(x), baseline, exact(state, x))


def test_dequantize_is_level_times_scale():
    state = draw(ALL["w4a8"])
    linear = LRQLinear.from_state(state)
    weight = R.prepack(state.codes, K, 4)
    arguments = (weight, state.levels, state.weight_scale, N, K, 4)
    for dtype in DTYPES:
        assert torch.equal(linear.dequantize(dtype), R.dequantize(*arguments, dtype))
    assert torch.equal(linear.codes(), state.codes)


@every_scheme
def test_shapes_and_strides_of_x(scheme: QuantScheme):
    linear = LRQLinear.from_state(draw(scheme))
    x = tokens(12)
    y = linear(x)
    assert torch.equal(linear(x.view(2, 2, 3, K)), y.view(2, 2, 3, N))
    assert linear(x[:0]).shape == (0, N)
    assert linear(x[:0].view(0, 3, K)).shape == (0, 3, N)
    one = linear(x[5])
    assert one.shape == (N,) and torch.equal(one, linear(x[5:6])[0])

    row_strided = torch.cat([x, torch.full((12, 64), float("nan"))], dim=1)[:, :K]
    column_major = x.T.contiguous().T
    samples_last = x.view(3, 4, K).transpose(0, 1).contiguous().transpose(0, 1)
    assert row_strided.stride() == (K + 64, 1) and column_major.stride() == (1, 12)
    assert torch.equal(linear(row_strided), y)
    assert torch.equal(linear(column_major), y)
    assert torch.equal(linear(samples_last), y.view(3, 4, N))


def test_zero_rows_give_the_bias():
    state = draw(ALL["w4a8"])
    y = LRQLinear.from_state(state)(torch.zeros(3, K))
    assert torch.equal(y, state.bias.expand(3, N))


def test_autocast_changes_nothing():
    for scheme in QUANTIZED.values():
        linear, x = LRQLinear.from_state(draw(scheme)), tokens(5)
        expected = linear(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(linear(x), expected)


def test_input_that_wants_a_gradient_is_refused():
    linear = LRQLinear.from_state(draw(ALL["w4a8"]))
    x = tokens(2).requires_grad_()
    with pytest.raises(RuntimeError, match="no backward.*torch.no_grad"):
        linear(x)
    with torch.no_grad():
        expected = linear(x)
    with torch.inference_mode():
        assert torch.equal(linear(x), expected)
    assert torch.equal(linear(x.detach()), expected)


# ---- linears that share an input ----------------------------------------------------------------


def sharing(scheme: QuantScheme, count: int = 3) -> tuple[list[LinearState], list[LRQLinear]]:
    first = draw(scheme)
    states = [first] + [draw(scheme, shared_with=("q", first)) for _ in range(count - 1)]
    shared = InputQuantizer(K, scheme, first.smooth_scale, first.rotation)
    names = ("q", "k", "v", "mlp")
    linears = [
        LRQLinear.from_state(s, shared, n) for s, n in zip(states, names[:count], strict=True)
    ]
    return states, linears


@pytest.fixture
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref]:
    """Weak references to the first output of every rotate_quantize and rotate call."""
    results: list[weakref.ref] = []
    for name in ("rotate_quantize", "rotate"):
        real = getattr(ops, name)

        def counted(*arguments: object, real: Callable = real) -> object:
            result = real(*arguments)
            results.append(weakref.ref(result[0] if isinstance(result, tuple) else result))
            return result

        monkeypatch.setattr(ops, name, counted)
    return results


def alone(states: list[LinearState], x: Tensor) -> list[Tensor]:
    return [LRQLinear.from_state(dataclasses.replace(s, shared_input=None))(x) for s in states]


def equal_lists(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("scheme", [ALL["w4a8"], ALL["w3a16"], ALL["w4a4-dual"]])
def test_shared_input_is_computed_once_and_released(
    scheme: QuantScheme, prepared: list[weakref.ref]
):
    states, linears = sharing(scheme)
    for x in (tokens(5), tokens(5).T.contiguous().T):
        expected = alone(states, x)
        prepared.clear()
        assert equal_lists([linear(x) for linear in linears], expected)
        assert len(prepared) == 1
        gc.collect()
        assert prepared[0]() is None


def test_every_forward_computes_anew(prepared: list[weakref.ref]):
    states, linears = sharing(ALL["w4a8"])
    x = tokens(5)
    first = [linear(x) for linear in linears]
    x.mul_(torch.rand(K))
    second = [linear(x) for linear in linears]
    assert len(prepared) == 2
    assert equal_lists(second, alone(states, x))
    assert not equal_lists(first, second)


def test_x_changed_in_place_between_two_readers_is_seen():
    states, linears = sharing(ALL["w4a8"])
    x = tokens(5)
    linears[0](x)
    x[2].mul_(3.0)  # through a view
    expected = alone(states, x)
    assert torch.equal(linears[1](x), expected[1])
    assert torch.equal(linears[2](x), expected[2])


def test_x_changed_in_place_under_inference_mode_is_seen():
    """Inference tensors have no version by which to notice."""
    states, linears = sharing(ALL["w4a8"])
    with torch.inference_mode():
        x = tokens(5)
        linears[0](x)
        x.mul_(torch.rand(K))
        expected = alone(states, x)
        assert equal_lists([linear(x) for linear in linears], expected)


def test_another_x_between_two_readers_is_seen(prepared: list[weakref.ref]):
    states, linears = sharing(ALL["w4a8"])
    x, other = tokens(5), tokens(5)
    expected, expected_other = alone(states, x), alone(states, other)
    assert torch.equal(linears[0](x), expected[0])
    assert torch.equal(linears[1](other), expected_other[1])
    assert torch.equal(linears[2](x), expected[2])
    # A new tensor may get the address, and in CPython the id, of one that died.
    for _ in range(5):
        fresh = tokens(5)
        assert torch.equal(linears[0](fresh), alone(states[:1], fresh)[0])
        del fresh


def test_one_reader_that_reads_twice_gets_the_same(prepared: list[weakref.ref]):
    states, linears = sharing(ALL["w4a8"])
    x = tokens(5)
    expected = alone(states, x)
    order = [0, 0, 1, 2, 2, 1, 0, 1, 2, 0]
    assert all(torch.equal(linears[i](x), expected[i]) for i in order)


def test_fused_linear_is_bit_identical_to_its_parts(prepared: list[weakref.ref]):
    states, linears = sharing(ALL["w4a8"])
    x = tokens(5, dtype=torch.bfloat16)
    separate = torch.cat([linear(x) for linear in linears], dim=-1)
    fused = fuse_linears(linears)
    prepared.clear()
    assert torch.equal(fused(x), separate)
    assert len(prepared) == 1
    assert (fused.out_features, len(fused.input_quantizer.shared.readers)) == (3 * N, 1)
    assert fused.parts == [("q", N), ("k", N), ("v", N)]
    parts = fused.part_states()
    for name, state in zip("qkv", states, strict=True):
        assert torch.equal(parts[name].codes, state.codes)
        assert torch.equal(parts[name].levels, state.levels)
        assert torch.equal(parts[name].weight_scale, state.weight_scale)
        assert torch.equal(parts[name].bias, state.bias)


def test_fused_and_another_reader_share():
    states, linears = sharing(ALL["w4a8"], 4)
    x = tokens(5)
    expected = alone(states, x)
    fused = fuse_linears(linears[:3])
    assert len(fused.input_quantizer.shared.readers) == 2
    for _ in range(2):
        assert torch.equal(fused(x), torch.cat(expected[:3], dim=-1))
        assert torch.equal(linears[3](x), expected[3])
    parts = split_linear(fused)
    assert len(parts[0].input_quantizer.shared.readers) == 4
    assert [part.parts for part in parts] == [[("q", N)], [("k", N)], [("v", N)]]
    assert equal_lists([part(x) for part in [*parts, linears[3]]], expected)


def test_fusing_what_does_not_belong_together_is_refused():
    _, linears = sharing(ALL["w4a8"])
    stranger = LRQLinear.from_state(draw(ALL["w4a8"]), name="stranger")
    with pytest.raises(ValueError, match="stranger must share its input and scheme with q"):
        fuse_linears([linears[0], stranger])
    other_bits = draw(QuantScheme(3, 8), shared_with=("q", linears[0].to_state()))
    narrower = LRQLinear.from_state(other_bits, linears[0].input_quantizer, "narrower")
    with pytest.raises(ValueError, match="narrower must share"):
        fuse_linears([linears[0], narrower])
    no_bias = draw(ALL["w4a8"], bias=False, shared_with=("q", linears[0].to_state()))
    with pytest.raises(ValueError, match="either all linears have a bias or none"):
        fuse_linears([linears[0], LRQLinear.from_state(no_bias, linears[0].input_quantizer)])


def test_linears_of_different_weight_bits_may_share():
    first = draw(QuantScheme(4, 8))
    second = draw(QuantScheme(2, 8), shared_with=("q", first))
    shared = InputQuantizer(K, first.scheme, first.smooth_scale, first.rotation)
    linears, x = [LRQLinear.from_state(state, shared) for state in (first, second)], tokens(5)
    assert equal_lists([linear(x) for linear in linears], alone([first, second], x))


@pytest.mark.parametrize(
    ("change", "field"),
    [({"act_bits": 4}, "act_bits"), ({"scale_mode": "rms"}, "scale_mode"),
     ({"scale_factor": 0.5}, "scale_factor"), ({"block_size": 64}, "block_size")],
)  # fmt: skip
def test_sharing_with_another_scheme_is_refused(change: dict, field: str):
    first = draw(ALL["w4a8"])
    shared = InputQuantizer(K, first.scheme, first.smooth_scale, first.rotation)
    other = draw(dataclasses.replace(first.scheme, **change))
    with pytest.raises(ValueError, match=f"LRQLinear k: {field} must be"):
        LRQLinear.from_state(other, shared, "k")


def test_sharing_with_another_width_is_refused():
    first = draw(ALL["w4a8"])
    shared = InputQuantizer(K, first.scheme, first.smooth_scale, first.rotation)
    other = make_state(N, 2 * K, first.scheme)
    with pytest.raises(ValueError, match="LRQLinear k: in_features must be 256 .* got 512"):
        LRQLinear.from_state(other, shared, "k")


def test_rotation_of_another_kind_than_the_scheme_is_refused():
    state = draw(ALL["w4a8"])
    plain = dataclasses.replace(state.scheme, rotation="none")
    with pytest.raises(ValueError, match="rotation is 'hadamard', the scheme says 'none'"):
        LRQLinear.from_state(dataclasses.replace(state, scheme=plain))


# ---- what it keeps ------------------------------------------------------------------------------


def bits_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@every_scheme
def test_casting_the_model_leaves_the_scales_alone(scheme: QuantScheme):
    model = nn.Sequential(LRQLinear.from_state(draw(scheme)), nn.LayerNorm(N))
    x = tokens(5)
    before, y = bits_of(model[0]), model[0](x)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.double()):
        cast(model)
        after = bits_of(model[0])
        assert before.keys() == after.keys()
        assert all(torch.equal(before[n], after[n]) for n in before)
        assert torch.equal(model[0](x), y)
    assert not any(buffer.is_floating_point() for buffer in model[0].buffers())


@every_scheme
def test_deepcopy_and_pickle_between_two_readers(scheme: QuantScheme):
    states, linears = sharing(scheme)
    model = nn.ModuleList(linears)
    x = tokens(5)
    expected = alone(states, x)
    model[0](x)  # the shared result is now waiting for two more readers
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len({id(linear.input_quantizer.shared) for linear in twin}) == 1
        assert equal_lists([linear(x) for linear in twin], expected)
        twin[0].levels.zero_()
    assert equal_lists([linear(x) for linear in model], expected)


@every_scheme
@pytest.mark.parametrize("extras", [True, False])
def test_state_dict_round_trips(scheme: QuantScheme, extras: bool):
    state, other = (
        draw(scheme, bias=extras, smooth=extras),
        draw(scheme, bias=extras, smooth=extras),
    )
    source, target = LRQLinear.from_state(state), LRQLinear.from_state(other)
    tensors = source.state_dict()
    # Offloading hooks find every buffer in the state dict by its name, and nothing is copied.
    pointers = {n: t.data_ptr() for n, t in tensors.items() if n != "weight"}
    assert pointers == {n: t.data_ptr() for n, t in source.named_buffers()}

    file = io.BytesIO()
    torch.save(tensors, file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))
    x = tokens(5)
    assert torch.equal(target(x), source(x))
    assert equal_lists(list(target.buffers()), list(source.buffers()))


def test_loading_a_state_dict_touches_no_other_module():
    state = draw(ALL["w4a8"])
    first, second = LRQLinear.from_state(state), LRQLinear.from_state(state)
    x = tokens(5)
    expected = second(x)
    first.load_state_dict(LRQLinear.from_state(draw(ALL["w4a8"])).state_dict())
    assert torch.equal(second(x), expected)
    assert torch.equal(LRQLinear.from_state(state)(x), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("levels"), 'Missing key.*"levels"'),
        (lambda t: t.update(lora=torch.zeros(1)), 'Unexpected key.*"lora"'),
        (lambda t: t.update(levels=t["levels"][:-1]), r"size mismatch for levels"),
        (
            lambda t: t.update(weight_scale=t["weight_scale"].view(torch.float32)),
            "weight_scale must be torch.int32, got torch.float32",
        ),
    ],
)
def test_a_state_dict_that_does_not_fit_is_refused(change: Callable, message: str):
    linear = LRQLinear.from_state(draw(ALL["w4a8"]))
    tensors = {name: tensor.clone() for name, tensor in linear.state_dict().items()}
    change(tensors)
    before = bits_of(linear)
    with pytest.raises(RuntimeError, match=message):
        linear.load_state_dict(tensors)
    if "must be" in message:
        assert equal_lists(list(bits_of(linear).values()), list(before.values()))


def test_to_state_is_the_state_it_came_from():
    for scheme in ALL.values():
        state = draw(scheme)
        again = LRQLinear.from_state(state).to_state()
        for field in ("codes", "levels", "weight_scale", "bias", "smooth_scale"):
            assert torch.equal(getattr(again, field), getattr(state, field)), field
        for field in ("signs", "permutation", "matrices"):
            one, other = getattr(again.rotation, field), getattr(state.rotation, field)
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
        assert (again.scheme, again.rotation.kind) == (scheme, state.rotation.kind)


# ---- torch.compile ------------------------------------------------------------------------------


@every_scheme
def test_compiles_without_a_graph_break(scheme: QuantScheme):
    torch._dynamo.reset()
    linear = LRQLinear.from_state(draw(scheme))
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for rows in (3, 12):
        x = tokens(rows, dtype=torch.bfloat16)
        assert torch.equal(compiled(x), linear(x))


def test_sharers_compile_into_one_graph():
    torch._dynamo.reset()
    states, linears = sharing(ALL["w4a8"])

    def attention(x: Tensor) -> list[Tensor]:
        return [linear(x) for linear in linears]

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = tokens(5)
        assert equal_lists(compiled(x), alone(states, x))
        # Eager and compiled runs between each other leave nothing behind.
        linears[0](x)
        x = x * 2
        assert equal_lists(compiled(x), alone(states, x))


# ---- GPU ----------------------------------------------------------------------------------------


@pytest.mark.gpu
@every_scheme
def test_gpu_is_as_near_as_the_cpu(scheme: QuantScheme):
    state = draw(scheme)
    linear = LRQLinear.from_state(state)
    for rows in (5, 33):
        x = tokens(rows, dtype=torch.bfloat16)
        linear.cpu()
        on_cpu = linear(x)
        on_gpu = linear.cuda()(x.cuda()).cpu()
        # Activation codes may differ at ties, so the outputs need not be equal.
        assert_at_most_twice(on_gpu, on_cpu, exact(state, x))


@pytest.mark.gpu
@every_scheme
def test_cpu_to_gpu_to_cpu_is_bit_identical(scheme: QuantScheme):
    linear, x = LRQLinear.from_state(draw(scheme)), tokens(5)
    before, y = bits_of(linear), linear(x)
    linear.cuda()
    assert all(buffer.is_cuda for buffer in linear.buffers())
    # What prepack makes on the GPU is what it made on the CPU.
    assert torch.equal(
        LRQLinear.from_state(linear.to_state()).packed_weight.cpu(), before["packed_weight"]
    )
    linear.cpu()
    assert equal_lists(list(bits_of(linear).values()), list(before.values()))
    assert torch.equal(linear(x), y)


@pytest.mark.gpu
@every_scheme
@pytest.mark.parametrize("smooth", [True, False])
def test_state_on_the_gpu_builds_a_linear_on_the_gpu(scheme: QuantScheme, smooth: bool):
    state = draw(scheme, smooth=smooth)
    built_there = LRQLinear.from_state(state.to("cuda"))
    moved_there = LRQLinear.from_state(state).cuda()
    assert equal_lists(list(built_there.buffers()), list(moved_there.buffers()))


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", [ALL["w4a8"], ALL["w3a16"]])
def test_shared_input_on_the_gpu(scheme: QuantScheme, prepared: list[weakref.ref]):
    states, linears = sharing(scheme)
    linears = [linear.cuda() for linear in linears]
    x = tokens(12, dtype=torch.bfloat16).cuda()
    expected = alone([state.to("cuda") for state in states], x)
    prepared.clear()
    assert equal_lists([linear(x) for linear in linears], expected)
    assert len(prepared) == 1


def test_a_reader_gets_its_own_input_whoever_reads_meanwhile():
    """As where another thread runs the model between the computation and its use."""
    shared = PreparedInput(8)

    class Readers(list):
        """Its length is asked for within a read."""

        def __len__(self) -> int:
            if self.other is not None:
                x, self.other = self.other, None
                assert shared.read(x, prepare).tokens is x
            return 2

    def prepare(x: torch.Tensor) -> Prepared:
        return Prepared(x, None, None)

    shared.readers = readers = Readers()
    for _ in range(3):
        x, readers.other = torch.randn(2), torch.randn(2)
        assert shared.read(x, prepare).tokens is x
        assert shared.read(x, prepare).tokens is x
