"""The tests marked in_interpreter, in one process where Triton interprets its kernels: it is chosen
before triton is imported, and importing takes longer than most of the tests."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
FILES = (
    "test_rotate_quantize.py",
    "test_fused_rotate_quantize.py",
    "test_qk_norm_rope.py",
    "test_peer_memory.py",
)


def test_kernels_in_interpreter() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    files = [str(TESTS / name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "interpreted", *files]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=TESTS.parent
    )
    passed = re.search(r"(\d+) passed", result.stdout)
    assert result.returncode == 0 and passed, result.stdout + result.stderr
    assert int(passed[1]) > 50 and " skipped" not in result.stdout, result.stdout
