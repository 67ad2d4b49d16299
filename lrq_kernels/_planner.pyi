# Built from csrc/planner.cpp, where every name has its docstring; here so that mypy knows the module.
from typing import Any

def __getattr__(name: str) -> Any: ...
