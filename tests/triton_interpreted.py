"""The Triton kernels against the float64 reference. test_triton.py runs these in processes of their own: on
the CPU with TRITON_INTERPRET=1, and on the GPU where there is one."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from on_gpus import *  # noqa: F403 (all its tests are this file's too, with the engine below)

import fastrnn
from fastrnn.triton_kernels import heuristics, layer

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
KERNELS = {"scan": None, **{name: heuristics.Config(name, 16, 16, 16, 4, 2) for name in ("step", "grid")}}


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
    shape = layer.shape_of("gru", torch.empty(0, device=DEVICE), 5, 5, 2, 2, 1, False)
    options = ["--hidden", "5", "--batch", "2", "--steps", "2", "--dtype", "float32", "--bidirectional"]
    was = heuristics.configure(shape)
    assert main(["tune", "--cell", "gru", *options]) == 0
    said = capsys.readouterr().out
    assert "gru H=5 B=2: 500000.00 us a step, step in 16 sequences x 16 units" in said
    assert str(file) in said
    assert fresh() == {shape: KERNELS["step"]}
    assert heuristics.configure(shape) == KERNELS["step"] != was
    other = layer.shape_of("gru", torch.empty(0, device=DEVICE), 5, 5, 3, 2, 1, False)
    assert heuristics.configure(other) == was
    assert main(["tune", "--cell", "rnn_tanh", "--proj-size", "2", *options]) == 2
    assert "--proj-size goes with --cell lstm alone" in capsys.readouterr().err
    file.write_text('[{"shape": {}}]')
    with pytest.warns(UserWarning, match=r"tuned\.json is left out, .*tune"):
        assert fresh() == {}
    assert heuristics.configure(shape) == was
    monkeypatch.undo()
    fresh()


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
