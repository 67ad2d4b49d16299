"""torch.compile and torch.export on quantized models: one graph, no recompiles, the same output.

On the CPU, through aot_eager: what dynamo traces, guards and functionalizes is what it does for a
GPU. Models have one block of each kind, since tracing takes most of the time.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from test_lora import lora_of
from tiny_families import forward
from tiny_models import tiny_flux, tiny_pixart, tiny_sd3, tiny_wan
from torch import Tensor, nn
from torch.fx.experimental import _config as symbolic_config

from lrq_kernels import fusion, load_quantized
from lrq_kernels.testing import relative_error
from lrq_quant import QuantRecipe, fuse_projections, fused_projections, quantize_model

pytestmark = pytest.mark.slow


def shortened(model: nn.Module, **changes: Any) -> nn.Module:
    """With one block of each kind."""
    return type(model).from_config({**model.config, "num_layers": 1, **changes})


def flux() -> nn.Module:
    return shortened(tiny_flux(), num_single_layers=1)


def flux_inputs(side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, side**2, 16),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([0.5, 0.7]),
        "guidance": torch.tensor([3.5, 3.5]),
        "img_ids": torch.randint(0, 3, (side**2, 3)).float(),
        "txt_ids": torch.zeros(12, 3),
    }


def pixart() -> nn.Module:
    return shortened(tiny_pixart())


def pixart_inputs(side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 3, side * 8, side * 8),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "encoder_attention_mask": torch.ones(2, 12),
        "timestep": torch.tensor([500.0, 500.0]),
    }


def sd3() -> nn.Module:
    return shortened(tiny_sd3(), sample_size=16, patch_size=1, pos_embed_max_size=16)


def sd3_inputs(side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, side, side),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "pooled_projections": torch.randn(2, 32),
        "timestep": torch.tensor([500.0, 500.0]),
    }


def wan() -> nn.Module:
    return shortened(tiny_wan())


def wan_inputs(side: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(2, 4, 2, 2 * side, 2 * side),
        "encoder_hidden_states": torch.randn(2, 12, 64),
        "timestep": torch.tensor([500.0, 500.0]),
    }


MODELS = {
    "flux": (flux, flux_inputs),
    "pixart": (pixart, pixart_inputs),
    "sd3": (sd3, sd3_inputs),
    "wan": (wan, wan_inputs),
}
every_model = pytest.mark.parametrize("kind", MODELS)
# Tokens of a picture: 25 and 36, above the 8 rows of gemv. PixArt has another path for 4.
SIDES = (5, 6)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], nn.Module]:
    done: dict[str, nn.Module] = {}

    def get(kind: str) -> nn.Module:
        if kind not in done:
            model = MODELS[kind][0]().eval()
            path = quantize_model(model, QuantRecipe.from_name("w4a8")).save(
                tmp_path_factory.mktemp(kind)
            )
            done[kind] = load_quantized(model, path)
        return copy.deepcopy(done[kind])

    return get


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model: nn.Module, **options: object) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend="aot_eager", **options)


# ---- torch.compile ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "fused"),
    [("flux", False), ("pixart", True), ("sd3", False), ("wan", True)],
)
def test_one_graph_that_does_not_recompile_over_resolutions(kind: str, fused: bool, made: Callable):
    """In the shape of diffusers' test of different shapes."""
    model, inputs = made(kind), MODELS[kind][1]
    if fused:
        assert fused_projections(fuse_projections(model))
    fast = compiled(model, dynamic=True)
    strict = torch._dynamo.config.patch(error_on_recompile=True)
    with strict, symbolic_config.patch(use_duck_shape=False):
        for side in SIDES:
            given = inputs(side)
            assert torch.equal(forward(fast, given), forward(model, given))
    assert graphs() == 1


def test_repeated_blocks_compile_once(made: Callable):
    """compile_repeated_blocks: one graph for all blocks and all resolutions. (FLUX's first blocks
    get other strides than the later ones, dense or not, and compile twice.)"""
    model = made("wan")
    model.blocks.append(copy.deepcopy(model.blocks[0]))
    given = [wan_inputs(side) for side in SIDES]
    expected = [forward(model, each) for each in given]
    with symbolic_config.patch(use_duck_shape=False):
        model.compile_repeated_blocks(fullgraph=True, dynamic=True, backend="aot_eager")
        for each, wanted in zip(given, expected, strict=True):
            assert torch.equal(forward(model, each), wanted)
    assert graphs() == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_of_a_pipeline(dtype: torch.dtype, made: Callable):
    model = made("pixart").to(dtype)
    given = {n: x.to(dtype) if n != "timestep" else x for n, x in pixart_inputs(5).items()}
    assert torch.equal(forward(compiled(model), given), forward(model, given))


def test_act_bits_by_step_compile_once_each(made: Callable):
    model, given = made("pixart"), pixart_inputs(5)
    expected = {}
    for bits in (None, 16):
        model.lrq_act_bits = bits
        expected[bits] = forward(model, given)
    fast = compiled(model)
    for bits in (None, 16):
        model.lrq_act_bits = bits
        assert torch.equal(forward(fast, given), expected[bits])
    assert graphs() == 2
    with torch._dynamo.config.patch(error_on_recompile=True):
        for bits in (None, 16) * 2:
            fast.lrq_act_bits = bits  # through the compiled module as well
            assert model.lrq_act_bits == bits
            assert torch.equal(forward(fast, given), expected[bits])


def test_a_lora_compiles_and_its_hot_swap_does_not_recompile(made: Callable):
    model, given = made("flux"), flux_inputs(4)
    one, two = lora_of(model, 1), lora_of(model, 2)
    model.enable_lora_hotswap(target_rank=4)
    model.load_lora_adapter(one, prefix=None, adapter_name="style")
    first = forward(model, given)
    fast = compiled(model)
    assert torch.equal(forward(fast, given), first)
    with torch._dynamo.config.patch(error_on_recompile=True):
        model.load_lora_adapter(two, prefix=None, adapter_name="style", hotswap=True)
        second = forward(fast, given)
    assert torch.equal(second, forward(model, given)) and not torch.equal(first, second)


# ---- torch.export -------------------------------------------------------------------------------


@every_model
def test_export_saves_loads_and_runs(kind: str, made: Callable):
    """The program holds lrq ops and packed weights, and runs for the exported shapes."""
    model, given = made(kind), {**MODELS[kind][1](4), "return_dict": False}
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        used = {str(node.target) for node in program.graph.nodes if "lrq" in str(node.target)}
        assert {"lrq.rotate_quantize.default", "lrq.gemm.default"} <= used
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        again = torch.export.load(file).module()
        other = {**MODELS[kind][1](4), "return_dict": False}
        got: tuple[Tensor, ...] = again(**other)
        assert torch.equal(got[0], model(**other)[0])


@pytest.mark.skipif(
    Version(torch.__version__) < Version("2.13"),
    reason="torch 2.10 and 2.11 hand an op in a package another dtype than the program says",
)
def test_aot_inductor_packages_a_program(made: Callable, tmp_path: Path):
    """With the fused ops in it, called by name; for other inputs than those it was made with."""
    model, given = made("pixart"), {**MODELS["pixart"][1](4), "return_dict": False}
    fusion.reset_counts()
    with torch.no_grad():
        program = torch.export.export(model, (), given, strict=False)
        file = str(tmp_path / "pixart.pt2")
        # One file is compiled: headers of its own, and no optimization of what calls the ops.
        options = {"precompile_headers": False, "compile_wrapper_opt_level": "O0"}
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=file,
            inductor_configs={f"aot_inductor.{name}": value for name, value in options.items()},
        )
        assert fusion.counts()["norm_modulate"] > 0
        other = {**MODELS["pixart"][1](4), "return_dict": False}
        (got,) = torch._inductor.aoti_load_package(file)(**other)
        assert relative_error(got, model(**other)[0]) < 0.01


# ---- on a GPU -----------------------------------------------------------------------------------


def on_gpu(value: Any, dtype: torch.dtype = torch.bfloat16) -> Any:
    return value.to("cuda", dtype) if isinstance(value, Tensor) else value


def assert_as_near_as_eager(got: Tensor, model: nn.Module, given: dict[str, Any]) -> None:
    """To the model in fp32. Inductor rounds less often to bf16 than the eager model, and codes turn
    with it, so that the two need not be near each other."""
    wide = {name: on_gpu(x, torch.float32) for name, x in given.items()}
    expected = forward(copy.deepcopy(model).to("cuda", torch.float32), wide)
    eager = forward(copy.deepcopy(model).to("cuda"), given)
    error, allowed = (relative_error(y.float(), expected) for y in (got, eager))
    assert error < 1.5 * allowed < 0.15


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["flux", "pixart"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor_and_cuda_graphs(kind: str, mode: str, made: Callable):
    model = made(kind).to("cuda", torch.bfloat16)
    fast = torch.compile(copy.deepcopy(model), fullgraph=True, mode=mode)
    for _ in range(3):
        given = {name: on_gpu(x) for name, x in MODELS[kind][1](8).items()}
        torch.compiler.cudagraph_mark_step_begin()
        assert_as_near_as_eager(forward(fast, given).clone(), model, given)


@pytest.mark.gpu
@pytest.mark.parametrize("use_stream", [False, True])
def test_compiled_blocks_under_group_offload(use_stream: bool, made: Callable):
    """In the shape of diffusers' test of compilation with group offloading."""
    model = made("flux").to(torch.bfloat16)
    given = {name: on_gpu(x) for name, x in flux_inputs(8).items()}
    offloaded = copy.deepcopy(model)
    offloaded.enable_group_offload(
        onload_device=torch.device("cuda"), offload_type="leaf_level", use_stream=use_stream
    )
    with torch._dynamo.config.patch(cache_size_limit=10000):
        fast = torch.compile(offloaded)
        for _ in range(2):
            assert_as_near_as_eager(forward(fast, given), model, given)
