"""Fused blocks: the launches they make, what they change, what they leave alone, the way back."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_lora import lora_of
from tiny_families import forward
from tiny_models import TINY, as_near, load, shared_folder
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import lrq_quant
from lrq_kernels import model_states, set_act_bits
from lrq_kernels.testing import sqnr_db
from lrq_quant import fuse_blocks, fused_blocks, unfuse_blocks
from lrq_quant.fused_flux import joined
from lrq_quant.fused_modulation import unstack_modulation

KINDS = ("flux", "pixart")
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def made() -> Callable[..., nn.Module]:
    def get(kind: str, dtype: torch.dtype = torch.float32) -> nn.Module:
        return load(kind, shared_folder(kind, torch.float32), torch_dtype=dtype)

    return get


def inputs_of(kind: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Any]:
    torch.manual_seed(0)
    given = TINY[kind][1](torch.float32).items()
    return {n: x.to(device, dtype) if isinstance(x, Tensor) else x for n, x in given}


class LrqCalls(TorchDispatchMode):
    """Counts the ops of ours that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace == "lrq":
            self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


# Two double and two single blocks; modulation is 4 + 2 linears.
CALLS = {
    "flux": {
        "norm_modulate_rotate_quantize": 2 * 4 + 2,
        "rotate_quantize": 2 * 4,
        "concat_rotate_quantize": 2,
        "gemm": 2 * 8 + 2 * 3,
        "gemm_a16": 2 * 2 + 2,
        "qk_norm_rope": 2 + 2,
    },
    # Two blocks, and one modulation for all. Of the caption, of both attentions' output, of the
    # query's and the last linear's input.
    "pixart": {
        "norm_modulate_rotate_quantize": 2 * 2,
        "rotate_quantize": 2 * 5,
        "gemm": 2 * 7,
        "gemm_a16": 1,
    },
}


@every_kind
def test_the_launches_of_a_forward(kind: str, made: Callable):
    model, given = fuse_blocks(made(kind)), inputs_of(kind)
    assert set(fused_blocks(model).values()) == {None}
    with LrqCalls() as calls:
        forward(model, given)
    assert calls.counts == CALLS[kind]


@every_kind
def test_fusing_twice_is_fusing_once(kind: str, made: Callable):
    model, given = fuse_blocks(made(kind)), inputs_of(kind)
    expected = forward(model, given)
    fuse_blocks(model)
    with LrqCalls() as calls:
        assert torch.equal(forward(model, given), expected)
    assert calls.counts == CALLS[kind]


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_computes_what_unfused_does(kind: str, dtype: torch.dtype, made: Callable):
    model, given = made(kind, dtype), inputs_of(kind, dtype)
    eager = forward(model, given)
    fused = forward(fuse_blocks(model), given)
    if dtype == torch.float32:
        assert sqnr_db(eager, fused) > 45
    else:  # of fewer roundings: as near to the model in fp32 as the unfused blocks
        exact = forward(made(kind), inputs_of(kind))
        assert as_near(exact, fused, eager)


@pytest.mark.parametrize("batch", [1, 2])
def test_pixart_of_several_patches(batch: int, made: Callable):
    """Their embedding leaves tokens side by side instead of channels."""
    model = made("pixart")
    given = {**inputs_of("pixart"), "hidden_states": torch.randn(2, 3, 64, 64)}
    given = {n: x[:batch] if isinstance(x, Tensor) else x for n, x in given.items()}
    eager = forward(model, given)
    assert sqnr_db(eager, forward(fuse_blocks(model), given)) > 45


@every_kind
def test_unfusing_and_copies(kind: str, made: Callable):
    model, given = made(kind), inputs_of(kind)
    eager = forward(model, given)
    before, dense = model_states(model)
    fused = forward(fuse_blocks(model), given)
    twin = copy.deepcopy(model)
    after, dense_after = model_states(twin)  # what a checkpoint holds does not change
    assert before.keys() == after.keys() and dense.keys() == dense_after.keys()
    assert all(torch.equal(before[n].codes, after[n].codes) for n in before)
    unfuse_blocks(model)
    assert set(fused_blocks(model).values()) == {"fuse_blocks was not called"}
    assert torch.equal(forward(model, given), eager)
    for parameter in model.parameters():  # the copy runs its own blocks
        parameter.data.zero_()
    assert torch.equal(forward(twin, given), fused)


@every_kind
def test_other_widths_of_activations_run_the_blocks_own_forward(kind: str, made: Callable):
    model, given = made(kind), inputs_of(kind)
    set_act_bits(model, 16)
    eager = forward(model, given)
    set_act_bits(model, None)
    quantized = forward(fuse_blocks(model), given)
    set_act_bits(model, 16)
    assert all("16 bit" in why for why in fused_blocks(model).values())
    assert torch.equal(forward(model, given), eager)
    set_act_bits(model, None)
    assert torch.equal(forward(model, given), quantized)


def test_adapters_run_the_blocks_own_forward(made: Callable):
    """Loading one splits the projections again; unloading and fusing brings the kernels back."""
    model, given = made("flux"), inputs_of("flux")
    adapter = lora_of(model)
    fused = forward(fuse_blocks(model), given)
    plain = made("flux")
    plain.load_lora_adapter(adapter, prefix=None, adapter_name="style")
    model.load_lora_adapter(adapter, prefix=None, adapter_name="style")
    assert None not in fused_blocks(model).values()
    assert torch.equal(forward(model, given), forward(plain, given))
    model.unload_lora()
    assert torch.equal(forward(fuse_blocks(model), given), fused)


def test_image_prompts_and_masks_run_the_blocks_own_forward(made: Callable):
    model, given = fuse_blocks(made("flux")), inputs_of("flux")
    seen = Counter()
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        original = type(block).forward

        def spy(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen[type(self).__name__] += 1
            return original(self, *args, **kwargs)

        block.__class__ = type(type(block).__name__, (type(block),), {"forward": spy})
    forward(model, given)
    assert not seen
    forward(model, {**given, "joint_attention_kwargs": {"attention_mask": None}})
    assert seen == {"FluxTransformerBlock": 2, "FluxSingleTransformerBlock": 2}


def test_one_sequence_is_joined_without_a_copy():
    joint = torch.randn(1, 9, 8)
    assert joined(joint[:, :4], joint[:, 4:]).data_ptr() == joint.data_ptr()
    assert torch.equal(joined(joint[:, :4], joint[:, 4:]), joint)
    batch = torch.randn(2, 9, 8)
    assert joined(batch[:, :4], batch[:, 4:]).data_ptr() == batch.data_ptr()
    assert torch.equal(joined(batch[:, :4], batch[:, 4:]), batch)
    others = (
        (joint[:, :4], joint[:, 5:]),  # a token between them
        (joint[:, 5:], joint[:, :4]),  # the other way round
        (joint[:, :4], joint[:, 4:].clone()),
        (batch[:1, :4], batch[1:, 4:]),
        (batch[:, :4], batch[:, 4:8]),  # not to the end, of two samples
        (joint[..., :4][:, :4], joint[..., :4][:, 4:]),
    )
    for context, image in others:
        expected = torch.cat([context, image], dim=1)
        assert torch.equal(joined(context, image), expected)
    one = torch.randn(2, 9, 8).transpose(0, 1)
    assert torch.equal(joined(one[:, :1], one[:, 1:]), one)


@every_kind
def test_fused_blocks_compile(kind: str, made: Callable):
    model, given = fuse_blocks(made(kind)), inputs_of(kind)
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(forward(fast, given), forward(model, given))


def test_what_cannot_be_fused_is_said(made: Callable):
    with pytest.raises(ValueError, match="fuse_blocks: .* has no quantized linear"):
        fuse_blocks(TINY["flux"][0]())
    with pytest.raises(ValueError, match="has none of the blocks"):
        fuse_blocks(load("wan", shared_folder("wan")))
    model = made("flux")
    assert "4 blocks run unfused" in str(lrq_quant.check(model))
    assert "4 of 4 blocks run fused" in str(lrq_quant.check(fuse_blocks(model)))
    model.transformer_blocks[0].train()
    assert fused_blocks(model)["transformer_blocks.0"] == "it is in training mode"
    assert "3 of 4 blocks run fused; not transformer_blocks.0: it is in training" in str(
        lrq_quant.check(model)
    )


@pytest.mark.gpu
@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_a_gpu_and_in_a_cuda_graph(kind: str, dtype: torch.dtype, made: Callable):
    model, given = made(kind, dtype).to("cuda"), inputs_of(kind, dtype, "cuda")
    eager = forward(model, given)
    exact = forward(made(kind).to("cuda"), inputs_of(kind, torch.float32, "cuda"))
    fuse_blocks(model)
    for _ in range(2):
        fused = forward(model, given)
    assert as_near(exact, fused, eager)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = forward(model, given)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(replayed, fused)


@every_kind
def test_a_fused_model_is_given_up(kind: str, made: Callable):
    """What a block remembers of itself must not keep it, and its weights, alive."""
    model = fuse_blocks(made(kind).eval())
    forward(model, inputs_of(kind))
    blocks = [weakref.ref(block) for block in model.transformer_blocks]
    del model
    gc.collect()
    assert [block() for block in blocks] == [None, None]


@every_kind
def test_what_is_in_the_way_may_pass(kind: str, made: Callable):
    model, given = made(kind).eval(), inputs_of(kind)
    expected = forward(fuse_blocks(copy.deepcopy(model)), given)
    set_act_bits(model, 16)
    model.train()
    fuse_blocks(model)
    assert None not in fused_blocks(model).values()
    set_act_bits(model, None)
    model.eval()
    assert set(fused_blocks(model).values()) == {None}
    assert torch.equal(forward(model, given), expected)


@every_kind
def test_hooks_are_never_passed_over(kind: str, made: Callable):
    model, given = made(kind).eval(), inputs_of(kind)
    seen: list[str] = []
    block, wrapped = model.transformer_blocks[0], model.transformer_blocks[1]
    own = wrapped.forward

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seen.append("wrapper")
        return own(*args, **kwargs)

    wrapped.forward = wrapper
    forward(fuse_blocks(model), given)
    handle = block.ff.register_forward_hook(lambda *_: seen.append("hook"))
    assert "forward hook" in fused_blocks(model)["transformer_blocks.0"]
    assert "replaced" in fused_blocks(model)["transformer_blocks.1"]
    forward(model, given)
    assert seen == ["wrapper", "hook", "wrapper"]
    handle.remove()
    assert fused_blocks(model)["transformer_blocks.0"] is None


@every_kind
def test_a_fused_model_is_pickled(kind: str, made: Callable):
    model, given = fuse_blocks(made(kind).eval()), inputs_of(kind)
    expected = forward(model, given)
    twin = pickle.loads(pickle.dumps(model))
    assert set(fused_blocks(twin).values()) == {None}
    assert torch.equal(forward(twin, given), expected)


@pytest.mark.parametrize("samples", [1, 2])
def test_the_modulation_of_flux_is_one_launch(samples: int, made: Callable):
    """And bit for bit what each block computes by itself."""
    model = made("flux", torch.bfloat16).eval()
    given = {
        n: torch.cat([x] * samples) if isinstance(x, Tensor) and not n.endswith("_ids") else x
        for n, x in inputs_of("flux", torch.bfloat16).items()
    }
    before, _ = model_states(model)
    fuse_blocks(model)
    after, _ = model_states(model)
    assert before.keys() == after.keys()
    with LrqCalls() as calls:
        fused = forward(model, given)
    assert calls.counts["gemm_a16"] == 1
    unstack_modulation(model)
    with LrqCalls() as calls:
        assert torch.equal(forward(model, given), fused)
    assert calls.counts["gemm_a16"] == 6
    for name, state in before.items():
        again = model_states(model)[0][name]
        assert torch.equal(again.codes, state.codes) and torch.equal(again.levels, state.levels)
