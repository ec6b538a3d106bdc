"""The CUDA kernels: their sources run on the CPU (emulated.py), on the GPU where there is one, and compiled for
every architecture."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import emulated
import pytest
import torch
from on_gpus import *  # noqa: F403
from on_gpus import EPSILON, case, check, moved, results, worst

import fastrnn
from fastrnn import backends, cuda
from fastrnn.cuda import Config
from fastrnn.reference import CELLS

# Of a batch in so many tiles. "cache": weights in no register, and little shared memory; "taller": two tiles of the
# batch, one after another.
KERNELS = {
    "step": lambda tiles: Config("step", 8, tiles),
    "grid": lambda tiles: Config("grid", 8, tiles),
    "cache": lambda tiles: Config("grid", 16, 1, False),
    "block": lambda tiles: Config("block", 64, tiles),
}
ON_THE_GPU = {  # what the emulation, whose compiler is slow, has not
    "wide": lambda tiles: Config("grid", 32, tiles),
    "wide step": lambda tiles: Config("step", 32, tiles),
    "large block": lambda tiles: Config("block", 128, tiles),
}


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", [*KERNELS, *(ON_THE_GPU if torch.cuda.is_available() else ())])


@pytest.fixture(scope="session")
def emulation():
    return cuda.Library(emulated.build())


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def engine(request, monkeypatch):
    """The engine, on the CPU by its emulation, or on the GPU."""
    device = "cpu" if request.param == "emulated" else "cuda"
    if device == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("there is no CUDA device")
        if cuda.missing():
            pytest.fail(cuda.missing())
    else:
        monkeypatch.setattr(cuda.ENGINE, "library", request.getfixturevalue("emulation"))
        monkeypatch.setattr(cuda, "why_not", emulated_why_not)
        monkeypatch.setattr(cuda, "PATIENCE", 100_000)

    @contextlib.contextmanager
    def use(kernel=None):
        if kernel is not None or device == "cpu":
            of = {**KERNELS, **ON_THE_GPU}[kernel or "grid"]
            monkeypatch.setattr(cuda, "configure", lambda shape: of(-(-shape.B // 16)))
        if kernel in ON_THE_GPU and device == "cpu":
            pytest.skip("the emulation is built without it")
        with fastrnn.backend("cuda"):
            yield

    return SimpleNamespace(
        name="cuda",
        device=device,
        use=use,
        layer=torch.ops.fastrnn.cuda_layer,
        layer_backward=torch.ops.fastrnn.cuda_layer_backward,
    )


def emulated_why_not(x):
    return None if x.dtype in cuda.DTYPES else "it takes float32, bfloat16, float16"
