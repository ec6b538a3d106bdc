"""What the tests share: the seed and the one table of tolerances."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

# What the user's `fastrnn tune` has found is not what the tests are about.
os.environ["FASTRNN_TUNED"] = os.devnull


@dataclass(frozen=True)
class Tolerance:
    """For `torch.testing.assert_close`; the gradients' sums are longer than the outputs'."""

    rtol: float
    atol: float
    grad_rtol: float
    grad_atol: float

    @property
    def output(self) -> dict[str, float]:
        return {"rtol": self.rtol, "atol": self.atol}

    @property
    def grad(self) -> dict[str, float]:
        return {"rtol": self.grad_rtol, "atol": self.grad_atol}


# For H and T up to some hundreds and inputs of unit variance. Where a test has a float64 run to compare
# with, twice torch.nn's own error is the better judge.
TOLERANCES = {
    torch.float64: Tolerance(1e-12, 1e-12, 1e-11, 1e-11),
    torch.float32: Tolerance(1e-5, 2e-6, 1e-4, 2e-5),
    torch.bfloat16: Tolerance(2e-2, 2e-2, 5e-2, 5e-2),
    torch.float16: Tolerance(2e-3, 2e-3, 1e-2, 1e-2),
    torch.complex64: Tolerance(1e-5, 2e-6, 1e-4, 2e-5),
    torch.complex128: Tolerance(1e-12, 1e-12, 1e-11, 1e-11),
}


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random numbers."""
    torch.manual_seed(20)
    return 20


@pytest.fixture
def use_isa() -> Iterator[Callable[[str], str]]:
    """Has the kernels of an instruction set do the rest of the test."""
    from fastrnn.kernels import instruction_set

    before = instruction_set()
    yield torch.ops.fastrnn.use_instruction_set
    torch.ops.fastrnn.use_instruction_set(before)


@pytest.fixture
def tolerances() -> dict[torch.dtype, Tolerance]:
    return TOLERANCES


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """What a test compiled does not count towards the next one's limit of recompilations."""
    yield
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
