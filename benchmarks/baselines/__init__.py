"""Published quantization methods as recipes of one pipeline, to compare this project's with.

A method is an input transform, a weight quantizer, an activation quantizer and, where it has one,
a low-rank branch; `apply_method` puts it into a model.  They live here and not in the package: what
is shipped quantizes one way.  All runs dequantized in torch, so any codebook and width goes.
"""

from benchmarks.baselines.apply import apply_method
from benchmarks.baselines.method import Method, Setting
from benchmarks.baselines.registry import METHODS

__all__ = ["METHODS", "Method", "Setting", "apply_method"]
