"""The cases that compute-sanitizer runs pass by themselves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.gpu
@pytest.mark.slow
def test_sanitizer_cases_run():
    script = Path(__file__).with_name("sanitizer_cases.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("cases done")
