"""The Triton kernels against the float64 reference. test_triton.py runs these in processes of their own: on
the CPU with TRITON_INTERPRET=1, and on the GPU where there is one."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from on_gpus import *  # noqa: F403 (all its tests are this file's too, with the engine below)
from on_gpus import check

import fastrnn
from fastrnn.reference import DirectionParams
from fastrnn.triton_kernels import heuristics, layer

STEPS = ("step_forward", "step_backward")
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = {
    "scan": None,
    "step": heuristics.Config("step", 16, 16, 16, 4, 2),
    "grid": heuristics.Config("grid", 16, 16, 16, 4, 2, early=True),
}


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def programs_that_meet(monkeypatch):
    """Run side by side in the interpreter too."""
    if layer.INTERPRETED:
        import side_by_side

        side_by_side.install(monkeypatch)


@pytest.fixture
def engine(monkeypatch):
    class Triton:
        name, device = "triton", DEVICE
        layer, layer_backward = torch.ops.fastrnn.triton_layer, torch.ops.fastrnn.triton_layer_backward

        @contextlib.contextmanager
        def use(self, kernel="scan"):
            if KERNELS[kernel] is not None:
                monkeypatch.setattr(heuristics, "configure", lambda *args: KERNELS[kernel])
            with fastrnn.backend("triton"):
                yield

    return Triton()


# H, B and multiprocessors, so few that each of the heuristics' tiles of 16 bits has its turn: these. On a
# GPU H, B, and what it takes itself.
SHIPPED = (
    [
        (144, 20, 132, "grid", 16, 16),
        (144, 20, 12, "grid", 16, 32),
        (144, 70, 18, "grid", 64, 16),
        (144, 70, 12, "grid", 64, 32),
        (144, 70, 0, "step", 64, 32),
    ]
    if layer.INTERPRETED
    else [(H, B, None, None, None, None) for H, B in ((1024, 16), (1024, 64), (500, 64), (2048, 128))]
)


def as_shipped(monkeypatch, processors):
    """Configurations are those of this GPU, interpreted of an H100, with so many multiprocessors."""
    shape_of = layer.shape_of

    def shape(*args):
        found = shape_of(*args)
        found = replace(found, capability=90) if layer.INTERPRETED else found
        return found if processors is None else replace(found, processors=processors)

    monkeypatch.setattr(layer, "shape_of", shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16] if layer.INTERPRETED else [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("H", "B", "processors", "kind", "block_b", "block_u"), SHIPPED)
def test_configurations_that_ship(H, B, processors, kind, block_b, block_u, dtype, engine, monkeypatch):
    as_shipped(monkeypatch, processors)
    if kind is not None:
        x = torch.empty(0, dtype=dtype)
        config = heuristics.configure(layer.shape_of("lstm", x, H, H, B, 1, 1, False))
        assert (config.kernel, config.block_b, config.block_u) == (kind, block_b, block_u)
    check("lstm", "scan", engine, T=3 if layer.INTERPRETED else 16, B=B, H=H, dtype=dtype)


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter multiplies in numpy's float32: TF32 needs a GPU")
@pytest.mark.parametrize("H", [64, 512])
def test_tf32(H, engine):
    """What torch lets cuDNN do unless told otherwise."""
    with torch.backends.cudnn.flags(allow_tf32=True):
        assert layer.precision(torch.empty(0, device=DEVICE)) == "tf32"
        check("lstm", "scan", engine, B=20, H=H, dtype=torch.float32, epsilon=5e-3)


def test_modules_and_the_compiler():
    torch.manual_seed(3)
    for kind, options in ((fastrnn.LSTM, {"proj_size": 3}), (fastrnn.GRU, {}), (fastrnn.RNN, {})):
        ours = kind(4, 7, num_layers=2, bidirectional=True, batch_first=True, device=DEVICE, **options)
        x = torch.randn(2, 5, 4, device=DEVICE)
        with fastrnn.backend("reference"):
            expected = ours(x)[0]
        with fastrnn.backend("triton"):
            torch.testing.assert_close(ours(x)[0], expected)
            compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
            y = compiled(x)[0]
            torch.testing.assert_close(y, expected)
            y.sum().backward()
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(n, 4, device=DEVICE) for n in (2, 5)], False)
    with fastrnn.backend("triton"):
        torch.testing.assert_close(ours(packed)[0].data.shape[0], 7)
        assert fastrnn.explain(ours, x).backend == "triton"
        assert "rnn_tanh scan in Triton" in str(fastrnn.explain(ours, packed))


def test_tuning(monkeypatch, tmp_path, capsys):
    """Tries the candidates, keeps the fastest, and calls of that shape take it from then on."""
    from triton.runtime.errors import OutOfResources

    from fastrnn.__main__ import main
    from fastrnn.triton_kernels import tune

    def fresh():
        heuristics.tuned.cache_clear()
        return heuristics.tuned()

    file = tmp_path / "made" / "tuned.json"
    monkeypatch.setenv("FASTRNN_TUNED", str(file))
    fresh()
    tried = [heuristics.Config("scan", 16, 16, 16, 4, 1), *(KERNELS[name] for name in ("step", "grid"))]
    times = dict(zip(tried, (3.0, 1.0, 2.0), strict=True))
    monkeypatch.setattr(tune, "candidates", lambda shape: iter(tried))

    def seconds(call, device):
        call()
        return times[heuristics.configure(shape)]

    monkeypatch.setattr(tune, "seconds", seconds)
    x = torch.empty(0, device=DEVICE, dtype=torch.bfloat16)
    shape = layer.shape_of("gru", x, 5, 5, 2, 2, 1, False)
    options = ["--hidden", "5", "--batch", "2", "--steps", "2", "--dtype", "bfloat16", "--bidirectional"]
    was = heuristics.configure(shape)
    assert main(["tune", "--cell", "gru", *options]) == 0
    said = capsys.readouterr().out
    assert "gru H=5 B=2: 500000.00 us a step, step in 16 sequences x 16 units" in said
    assert str(file) in said
    assert fresh() == {shape: KERNELS["step"]}
    assert heuristics.configure(shape) == KERNELS["step"] != was
    assert heuristics.configure(replace(shape, precision="tf32")) == was
    with monkeypatch.context() as patch:
        patch.setattr(heuristics.triton, "__version__", "another")
        assert fresh() == {}
        heuristics.save()  # which keeps those of other versions
    assert fresh() == {shape: KERNELS["step"]}
    # One that only inference has room for is not kept, though training is not what is timed.
    back = layer.Triton.backward

    def cramped(self, *given):
        if heuristics.configure(shape) == KERNELS["step"]:
            raise OutOfResources(300_000, 232_448, "shared memory")
        back(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(layer.Triton, "backward", cramped)
        assert main(["tune", "--cell", "gru", "--forward", *options]) == 0
    capsys.readouterr()
    assert fresh() == {shape: KERNELS["grid"]}
    other = layer.shape_of("gru", x, 5, 5, 3, 2, 1, False)
    assert heuristics.configure(other) == was
    assert main(["tune", "--cell", "rnn_tanh", "--proj-size", "2", *options]) == 2
    assert "--proj-size goes with --cell lstm alone" in capsys.readouterr().err
    file.write_text(f'[{{"triton": "{heuristics.triton.__version__}", "shape": {{}}}}]')
    with pytest.warns(UserWarning, match=r"tuned\.json is left out, .*tune"):
        assert fresh() == {}
    assert heuristics.configure(shape) == was
    monkeypatch.undo()
    fresh()


def test_float32_is_tuned_for_both_precisions(monkeypatch, tmp_path):
    """As torch's user may ask for either. Interpreted, the products are the same."""
    from fastrnn.__main__ import main
    from fastrnn.triton_kernels import tune

    def asked(x):
        return "tf32" if torch.backends.cudnn.rnn.fp32_precision == "tf32" else "tf32x3"

    if layer.INTERPRETED:
        monkeypatch.setattr(layer, "precision", asked)
    monkeypatch.setenv("FASTRNN_TUNED", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(tune, "candidates", lambda shape: iter([KERNELS["step"]]))
    heuristics.tuned.cache_clear()
    assert main(["tune", "--hidden", "20", "--batch", "2", "--steps", "2", "--dtype", "float32"]) == 0
    assert {shape.precision for shape in heuristics.tuned()} == {"tf32", "tf32x3"}
    monkeypatch.undo()
    heuristics.tuned.cache_clear()


@pytest.mark.parametrize("projected", [0, 3])
def test_pointers_that_no_kernel_reads_are_aligned(projected, kernel, engine, monkeypatch):
    """Those in place of what a call lacks: else a slice of an input would compile every kernel anew."""
    x = torch.randn(4 * 2 * 4 + 1, device=DEVICE)[1:].view(4, 2, 4)
    given = []

    class Noted:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **options):
                given.extend(t.data_ptr() for t in args if isinstance(t, torch.Tensor))
                return self.kernel[grid](*args, **options)

            return launch

    for home, names in ((layer.scan, ("scan_forward", "scan_backward")), (layer.step, STEPS)):
        for name in names:
            monkeypatch.setattr(home, name, Noted(getattr(home, name)))
    kind = fastrnn.LSTM(4, 7, bias=False, proj_size=projected, device=DEVICE)
    with engine.use(kernel):
        y = kind(x)[0]
        with torch.no_grad():
            kind(x)
        torch.autograd.grad(y.sum(), list(kind.parameters()))
    assert len(given) > 30
    assert x.data_ptr() % 16 != 0
    assert x.data_ptr() not in given


def test_more_weights_than_an_int_counts():
    weight = torch.empty(1 << 16, 1 << 15, device="meta")
    small = torch.empty(1, 1, device="meta")
    x = torch.empty(0, device=DEVICE)
    for w_hh, w_hr in ((weight, None), (small, weight)):
        params = DirectionParams(small, w_hh, None, None, w_hr)
        with pytest.raises(RuntimeError, match=r"fewer than 2\*\*31 numbers .*\[65536, 32768\]"):
            layer.Triton().check(SimpleNamespace(x=x, params=[params]))


def test_what_tuning_tries():
    from fastrnn.triton_kernels.tune import candidates

    for H, B, processors, kinds in (
        (64, 16, 132, {"scan", "grid"}),
        (1024, 128, 132, {"grid", "step"}),
        (512, 4, 0, {"step"}),
    ):
        shape = heuristics.Shape("lstm", H, H, 1, B, 2, False, 90, processors)
        tried = list(candidates(shape))
        assert len(set(tried)) == len(tried)
        assert tried[0] == heuristics.configure(shape)
        assert {config.kernel for config in tried} == kinds
        for config in tried:
            met = heuristics.programs(shape, config.block_b, config.block_u)
            assert config.kernel != "grid" or met <= processors
