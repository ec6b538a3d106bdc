"""The Triton backend: its kernels interpreted on the CPU, compiled ahead for several architectures, and run
on a GPU where there is one."""

from __future__ import annotations

import ast
import contextlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata, util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastrnn.__main__ import main

pytestmark = pytest.mark.skipif(util.find_spec("triton") is None, reason="Triton is not installed")

HERE = Path(__file__).parent


def version(package: str) -> tuple[int, ...]:
    return tuple(int(n) for n in metadata.version(package).split(".")[:2])


def run(name: str, expression: str, *options: str, **environment: str) -> subprocess.Popen[str]:
    """pytest on a file, in a process of its own: Triton decides at import whether it interprets."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON_INTERPRET", "PYTEST_XDIST"))}
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            str(HERE / name),
            "-k",
            expression,
            *options,
        ],
        env={**kept, "PYTHONPATH": os.pathsep.join(sys.path), **environment},
        cwd=HERE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        out = process.communicate()[0]
        assert process.returncode == 0, out
        assert re.search(r"\d+ passed", out), out


@pytest.mark.slow
def test_interpreted():
    if version("triton") < (3, 8) and version("numpy") >= (2, 4):
        pytest.skip("Triton before 3.8 interprets no loop with numpy 2.4 or newer")
    finish(
        run("triton_interpreted.py", "step or scan", TRITON_INTERPRET="1"),
        run("triton_interpreted.py", "not (step or scan)", TRITON_INTERPRET="1"),
        run("triton_attention.py", "float32 or queries or not values", TRITON_INTERPRET="1"),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_the_gpu():
    """In as many processes as there are processors, at most 12, where pytest-xdist is installed."""
    many = min(os.cpu_count() or 1, 12)
    parallel = ("-n", str(many)) if util.find_spec("xdist") else ()
    for name in ("triton_interpreted.py", "triton_attention.py"):
        finish(run(name, "step or not step", *parallel))


def test_no_kernel_is_compiled_anew_for_other_sequences():
    """A kernel's compilation is of the layer's widths, not of T, B or the rows of a call."""
    kernels = 0
    for file in ("scan.py", "step.py", "attend.py"):
        tree = ast.parse((HERE.parent / "triton_kernels" / file).read_text())
        home = ast.parse((HERE.parent / "triton_kernels/scan.py").read_text()) if file == "step.py" else tree
        free = next(
            ast.literal_eval(node.value)
            for node in home.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FREE"
        )
        for function in tree.body:
            decorators = [ast.unparse(d) for d in getattr(function, "decorator_list", [])]
            if not isinstance(function, ast.FunctionDef) or "do_not_specialize" not in "".join(decorators):
                continue
            kernels += 1
            plain = {a.arg for a in function.args.args if a.annotation is None}
            sizes = plain & {"T", "B", "N", "Tq", "S", "rows", "begin", "end"}
            assert len(sizes) >= 2
            assert sizes <= set(free), (function.name, sizes)
    assert kernels == 10


def test_tuning_wants_a_gpu(capsys):
    """An interpreter that measures nothing, and a process that sees no GPU."""
    if torch.cuda.is_available():
        pytest.skip("tuning would run: there is a GPU")
    assert main(["tune", "--hidden", "8"]) == 2
    assert capsys.readouterr().err == "fastrnn: tune measures on a GPU, and torch sees none here\n"


def test_tuned_without_a_home(monkeypatch, tmp_path):
    """A user without a name has none; nothing was tuned there, nor is it read or written elsewhere."""
    from fastrnn.triton_kernels import heuristics

    def nobody(uid):
        raise KeyError(uid)

    for name in ("FASTRNN_TUNED", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.chdir(tmp_path)
    stray = tmp_path / "~/.cache/fastrnn/triton.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("no JSON")
    assert heuristics.tuned.__wrapped__() == {}
    with pytest.raises(RuntimeError, match=r"no home folder .* set FASTRNN_TUNED"):
        heuristics.save()
    assert stray.read_text() == "no JSON"


def test_rows_that_begin_anywhere():
    """Of a projected layer either width may be the one."""
    from fastrnn.triton_kernels.heuristics import Shape, configure

    for processors in (0, 132):
        for B in (16, 128):
            shapes = (
                Shape("lstm", H, P, 1, B, 2, True, 90, processors)
                for H, P in ((500, 512), (512, 500), (500, 500))
            )
            assert len({configure(shape) for shape in shapes}) == 1


def test_explain_compiles_for_the_inputs_device_and_widths(monkeypatch):
    from fastrnn.triton_kernels import ahead

    devices, found = [], []

    @contextlib.contextmanager
    def on(device):
        devices.append(device)
        yield

    driver = SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: "of this device"))
    monkeypatch.setattr(ahead.triton.runtime, "driver", driver)
    monkeypatch.setattr(ahead, "alone", on)

    def compile(name, dtype, target, options, aligned=True):
        found.append((target, aligned))
        return SimpleNamespace(metadata=SimpleNamespace(shared=2048))

    monkeypatch.setattr(ahead, "compile", compile)
    x = torch.empty(2, 3, 4)
    for H, P in ((500, 0), (512, 0), (512, 100), (512, 128)):
        assert "2 KB of shared memory" in ahead.describe("lstm", H, P, 3, 1, x)[1]
    assert "2 KB of shared memory" in ahead.describe_attention(x, False, 20)
    assert found == [("of this device", aligned) for aligned in (False, True, False, True, False)]
    assert devices == [x.device] * 5


# --- ahead of time

# Of a block's shared memory, in KB.
SHARED = {80: 163, 90: 227, 100: 227, 120: 99}
# The one with the most configurations and the one with the least memory, unless FASTRNN_ALL_ARCHS is set.
ARCHITECTURES = (*SHARED,) if os.environ.get("FASTRNN_ALL_ARCHS") else (90, 120)
# The stack's bytes a thread that ptxas spends on registers it has not got.
MOST_SPILLED = 64


def compile_all(job):
    """Of one configuration, each kernel's (name, shared memory, registers, stack, local memory)."""
    from triton.backends.compiler import GPUTarget

    from fastrnn.triton_kernels import ahead, layer

    capability, config, cell, dtype, H, projected, options, special = job
    target = GPUTarget("cuda", capability, 32) if capability else GPUTarget("hip", "gfx942", 64)
    given = {"precision": ahead.precision(dtype, target), **options}
    common = layer.options(cell, config, dtype, projected=projected, **given)
    found = []
    for name, more in ahead.kernels(cell, config, projected=projected, **special):
        compiled = ahead.compile(name, dtype, target, {**common, **more}, aligned=H % 16 == 0)
        usage = (0, 0, 0)
        if capability:
            usage = resources(compiled.asm["cubin"])
        found.append((name, compiled.metadata.shared, *usage))
    return job, found


def resources(cubin: bytes) -> tuple[int, ...]:
    """Registers, stack and local memory a thread."""
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [cuobjdump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", said)
    assert match, said
    return tuple(map(int, match.groups()))


# Units, batches and multiprocessors (0: programs cannot meet) that have every configuration between them of
# rows that begin at multiples of 16; others lack registers for some tiles on some architectures.
SIZES, BATCHES, PROCESSORS = (16, 32, 64, 128, 256, 512, 1024, 2048), (16, 128), (0, 132)


def jobs():
    """Every configuration of each cell, type and architecture whose rows are aligned, with the last launch of
    an LSTM's; each option with one of each kernel, float32 as TF32 too, torch's default."""
    from fastrnn.triton_kernels.heuristics import Shape, configure

    def job(capability, cell, dtype, H, B, processors, special, P=0, **options):
        shape = Shape(
            cell, H, P or H, 1, B, dtype.itemsize, P > 0, capability or None, processors if capability else 0
        )
        return capability, configure(shape), cell, dtype, H, P > 0, options, special

    for capability in ARCHITECTURES:
        for dtype in (torch.bfloat16, torch.float32):
            for cell in ("lstm", "gru", "gru_reset_before", "rnn_tanh"):
                sizes = itertools.product(SIZES, BATCHES, PROCESSORS)
                every = [job(capability, cell, dtype, *size, {}) for size in sizes]
                yield from {job[1]: job for job in every}.values()
            for processors in PROCESSORS:
                yield job(capability, "lstm", dtype, 1024, 128, processors, {"final": True})
    half, brain = torch.float16, torch.bfloat16
    for capability, H, processors in itertools.product({80, 90} & {*ARCHITECTURES}, (64, 1024), PROCESSORS):
        yield job(capability, "lstm", torch.float32, H, 128, processors, {}, precision="tf32")
    for capability in {90, 100} & {*ARCHITECTURES}:
        yield job(capability, "lstm", brain, 2048, 128, 132, {}, masked=True)
    for H, processors in ((64, 0), (500, 0), (500, 132)):
        for dtype in (half, torch.float32):
            yield job(90, "rnn_relu", dtype, H, 128, processors, {})
        for cell in ("lstm", "gru", "gru_reset_before"):
            inference = {"SAVE": False, "SEQ": False, "BIAS": False}
            yield job(90, cell, half, H, 128, processors, inference)
            yield job(90, cell, brain, H, 64, processors, {"DY": False}, masked=True)
            yield job(90, cell, brain, H, 64, processors, {}, packed=True)
            yield job(90, cell, brain, H, 64, processors, {}, heads=4)
        yield job(90, "lstm", brain, H, 64, processors, {"DSEQ": True}, P=H // 4)
        if processors == 0:
            yield job(0, "lstm", brain, H, 64, 0, {})
            yield job(0, "gru", torch.float32, H, 64, 0, {})


def attention_jobs():
    for job in itertools.product(ARCHITECTURES, (torch.bfloat16, torch.float32), (False, True)):
        yield *job, True, 512
    yield 90, torch.float16, False, False, 20


def compile_attention(job):
    """As compile_all."""
    from triton.backends.compiler import GPUTarget

    from fastrnn.triton_kernels import ahead

    capability, dtype, additive, masked, width = job
    target = GPUTarget("cuda", capability, 32)
    found = []
    kernels = [
        (name, options, ahead.FLOAT32)
        for name, options in ahead.attention_kernels(dtype, target, additive, masked, width)
    ]
    if additive and dtype != torch.float32:  # the backward pass in pieces sums in float32
        kernels += [(*k[:2], (*ahead.FLOAT32, "dkeys")) for k in kernels if k[0] == "attend_dkeys"]
    for name, options, float32 in kernels:
        compiled = ahead.compile(name, dtype, target, options, width % 16 == 0, float32=float32)
        found.append((name, compiled.metadata.shared, *resources(compiled.asm["cubin"])))
    return job, found


def _without_interpreter() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


@pytest.mark.slow
def test_one_direction_begins_beyond_an_int():
    """Of inference in chunks, the reverse one of a layer of many rows, in scans and in steps."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _without_interpreter) as pool:
        assert pool.submit(compile_beyond).result() == ["scan_forward", "step_forward"]


def compile_beyond():
    from triton.backends.compiler import GPUTarget

    from fastrnn.triton_kernels import ahead, layer
    from fastrnn.triton_kernels.heuristics import Config

    found = []
    for config in (Config("scan", 16, 16, 16, 4, 1), Config("step", 16, 16, 16, 4, 2)):
        common = layer.options("rnn_tanh", config, torch.bfloat16, "ieee")
        name, more = ahead.kernels("rnn_tanh", config)[0]
        target = GPUTarget("cuda", 90, 32)
        ahead.compile(name, torch.bfloat16, target, {**common, **more}, beyond=("base_1",))
        found.append(name)
    return found


@pytest.mark.slow
def test_compiled_ahead():
    """For NVIDIA's capabilities 9.0 and 12.0 (all: 8.0, 10.0 too), some for AMD's gfx942, without a GPU: see
    ARCHITECTURES and jobs."""
    seen = set()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=context, initializer=_without_interpreter) as pool:
        layers = pool.map(compile_all, jobs())
        for job, found in itertools.chain(layers, pool.map(compile_attention, attention_jobs())):
            for name, shared, registers, stack, local in found:
                assert shared <= SHARED.get(job[0], 64) * 1024, (job, name, shared)
                assert stack + local <= MOST_SPILLED, (job, name, registers, stack, local)
                seen.add((getattr(job[1], "kernel", None), name))
    kernels = {"scan": "scan", "grid": "step", "step": "step"}
    ways = ("forward", "backward")
    expected = {(kind, f"{name}_{way}") for kind, name in kernels.items() for way in ways}
    parts = ("forward", "weights", "dscores", "dquery", "dkeys", "dvalues")
    assert seen == expected | {(None, f"attend_{part}") for part in parts}
