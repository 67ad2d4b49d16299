"""What every test shares: which tests run here, and data that is fresh in each run and repeatable.

Each test starts with torch, numpy and random seeded from LRQ_TEST_SEED (drawn anew for a run unless
it is set) and the test's own name. A failing test prints the seed: with LRQ_TEST_SEED=... the same
data is drawn again, for that test alone or in the whole suite.
"""

from __future__ import annotations

import os
import random
import zlib
from collections.abc import Iterator

# Before torch is imported. Threads that spin while they wait make small matrix products on busy
# cores thousands of times slower; tests are small, so one thread is enough.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Processes that compile in the background cost the import of torch, and finding out which vector
# instructions g++ knows twelve runs of it; inductor's loops on a CPU are not what is tested here.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "0")

import numpy as np
import pytest
import torch

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # tests run in one process
    LoadScopeScheduling = None

# Files of many tests that share nothing: these may go to any process, so that such a file is not
# the last to end. Of others one process runs the whole file, which makes its models once.
SPREAD = (
    "test_fused_rotate_quantize.py",
    "test_gemm.py",
    "test_ops.py",
    "test_rotate_quantize.py",
    "test_rotate_rows.py",
)
# Files that take long, first: the others then fill the time until every process is done.
LONG = (
    "test_interpreted_kernels.py",
    "test_compile.py",
    "test_folded_permutations.py",
    "test_fused_projections.py",
    "test_family_models.py",
    "test_fusion.py",
    "test_wheel.py",
    "test_sharding.py",
    "test_parallel.py",
    "test_quality.py",
    "test_diffusers_backend.py",
    "test_compiled_ptx.py",
    "test_pipeline.py",
    "test_lora.py",
    "test_low_rank.py",
    "test_docs.py",
)
# These quantize every family, once in the process that has all of them.
TOGETHER = ("test_folded_permutations.py", "test_fused_projections.py", "test_family_models.py")
RUN_SEED = int(os.environ.get("LRQ_TEST_SEED") or random.SystemRandom().getrandbits(31))


def why_no_gpu() -> str | None:
    """Why tests marked gpu cannot run here, or None where they can."""
    if not torch.cuda.is_available():
        return "needs a CUDA device; torch.cuda.is_available() is False"
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        return f"needs compute capability >= 8.0, {torch.cuda.get_device_name()} has {capability}"
    return None


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.hasplugin("timeout"):  # without pytest-timeout the marks do nothing
        config.addinivalue_line("markers", "timeout(seconds): limit of pytest-timeout")
        config.addinivalue_line("filterwarnings", "ignore:Unknown config option. timeout")


if LoadScopeScheduling is not None:

    class FileScheduling(LoadScopeScheduling):
        """Like --dist loadfile, but for SPREAD and TOGETHER."""

        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            if file.endswith(TOGETHER):
                return " ".join(TOGETHER)
            return nodeid if file.endswith(SPREAD) else file

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> FileScheduling:
        return FileScheduling(config, log)


def pytest_report_header() -> str:
    return f"LRQ_TEST_SEED={RUN_SEED}"


def _place(item: pytest.Item) -> int:
    """Of its file: LONG, the others, SPREAD, each in their own order."""
    name = item.path.name
    if name in LONG:
        return LONG.index(name)
    return len(LONG) + (name in SPREAD)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := why_no_gpu()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:
        report.sections.append(("data", f"repeat it with LRQ_TEST_SEED={RUN_SEED}"))
    return report


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """Of the run and of the test's name, so that running a test alone changes nothing."""
    return (RUN_SEED + zlib.crc32(request.node.nodeid.encode())) % 2**31


@pytest.fixture(autouse=True)
def _seeded(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    """A CPU generator of this test's own, apart from what else draws numbers."""
    return torch.Generator().manual_seed(seed)
