"""The Triton backend: fused scans on GPUs that Triton reaches, NVIDIA's from capability 8.0, without nvcc.

Imported at the first call that runs on it; `fastrnn.backends` knows whether Triton is there.
"""

from .ahead import describe
from .layer import Triton

__all__ = ["Triton", "describe"]
