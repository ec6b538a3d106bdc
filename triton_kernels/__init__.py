"""The Triton backend: fused scans on every GPU that Triton reaches, with no compiler on the user's machine.

Imported at the first call that runs on it; `fastrnn.backends` knows whether Triton is there.
"""

from .ahead import describe
from .layer import Triton

__all__ = ["Triton", "describe"]
