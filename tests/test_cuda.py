"""The CUDA kernels: their sources run on the CPU (emulated.py), and on the GPU where there is one."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import emulated
import pytest
import torch
from on_gpus import *  # noqa: F403 (all its tests are this file's too, with the engine below)
from on_gpus import case, check, moved, results

import fastrnn
from fastrnn import cuda
from fastrnn.backends import Decision
from fastrnn.bench import gpu as bench
from fastrnn.cuda import Config


def tiles(B, rows=16):
    return -(-B // rows)


# Of a batch of B sequences.
KERNELS = {
    "step": lambda B: Config("step", 16, tiles(B)),
    "grid": lambda B: Config("grid", 16, tiles(B)),
    "block": lambda B: Config("block", 64, tiles(B)),
    "cluster": lambda B: Config("cluster", 16, tiles(B, 7), rows=7),
    "cluster, 16 bits": lambda B: Config("cluster", 16, tiles(B, 7), rows=7),
}
# A block takes all tiles, one after another; in "cache" no register holds weights.
OTHERS = {
    "tall": lambda B: Config("grid", 16, 1),
    "cache": lambda B: Config("grid", 16, 1, False),
}
ON_THE_GPU = {  # what the emulation, whose compiler is slow, has not
    "wide": lambda B: Config("grid", 32, tiles(B)),
    "wide step": lambda B: Config("step", 32, tiles(B)),
    "wide cluster": lambda B: Config("cluster", 32, tiles(B), rows=16),
}


def pytest_generate_tests(metafunc):
    if "kernel" in metafunc.fixturenames:
        metafunc.parametrize(
            "kernel", [*KERNELS, *({**OTHERS, **ON_THE_GPU} if torch.cuda.is_available() else ())]
        )


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
            of = {**KERNELS, **OTHERS, **ON_THE_GPU}[kernel or "grid"]

            def chosen(shape):  # a grid where the device has no room for the cluster
                fewer = of(shape.B).mode == "cluster" and shape.cluster_blocks < cuda.MOST_BLOCKS
                return KERNELS["grid"](shape.B) if fewer else of(shape.B)

            monkeypatch.setattr(cuda, "configure", chosen)
        if kernel in ON_THE_GPU and device == "cpu":
            pytest.skip("wide tiles run on a GPU alone: the emulation's compiler is slow")
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
    if x.dtype in cuda.DTYPES:
        return None
    return f"it takes float32, bfloat16, float16, the input is {cuda.dtype_names([x.dtype])}"


# --- what can go wrong between blocks, in the emulation


@pytest.fixture
def faults(engine, request):
    """Sets what the emulation does wrong: blocks at once that it holds, the number of one that is slow."""
    if engine.device != "cpu":
        pytest.skip("the emulation injects the faults: a GPU has no such switch")
    emulation = request.getfixturevalue("emulation")

    def fault(resident=1 << 20, slow=-1, seed=1):
        cuda.fit.cache_clear()
        emulation.functions.fastrnn_cuda_emulation(resident, slow, seed)

    yield fault
    emulation.functions.fastrnn_cuda_emulation(1 << 20, -1, 1)
    cuda.fit.cache_clear()


@pytest.fixture
def modes(monkeypatch):
    """Of every pass that is started."""
    found = []
    run = cuda.Library.run

    def noted(self, values, *rest):
        found.append(values["mode"])
        return run(self, values, *rest)

    monkeypatch.setattr(cuda.Library, "run", noted)
    return found


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_a_grid_that_the_device_does_not_hold_goes_by_steps(cell, engine, faults, modes, monkeypatch):
    faults(resident=1)
    check(cell, "grid", engine, H=18)
    assert set(modes) == {cuda.MODES["step"]}
    # Nor where the device says so only when asked to start them.
    modes.clear()
    plan = cuda.Library.plan
    with monkeypatch.context() as patch:
        cuda.fit.cache_clear()
        patch.setattr(cuda.Library, "plan", lambda *given: (1 << 20, *plan(*given)[1:]))
        check(cell, "grid", engine, H=18)
    assert modes[:2] == [cuda.MODES["grid"], cuda.MODES["step"]]


def test_a_grid_that_the_device_holds_no_longer_is_an_error(engine, monkeypatch):
    """In a later chunk of inference: by then some steps have run."""
    run = cuda.Library.run
    monkeypatch.setattr(
        cuda.Library, "run", lambda self, values, *rest: values["begin"] == 0 and run(self, values, *rest)
    )
    monkeypatch.setattr(fastrnn.gpu, "CHUNK_BYTES", 1)
    layer = fastrnn.LSTM(4, 18, device=engine.device)
    said = "blocks of a grid until step 1, and does not now"
    with engine.use("grid"), torch.no_grad(), pytest.raises(RuntimeError, match=said):
        layer(torch.randn(3, 2, 4, device=engine.device))


def test_a_device_that_nothing_was_compiled_for(monkeypatch):
    monkeypatch.setattr(cuda, "LIBRARY", SimpleNamespace(has_image=lambda: False))
    monkeypatch.setattr(cuda, "capability", lambda device: 103)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    assert "not compiled for compute capability 10.3" in cuda._device_missing.__wrapped__(0)

    def asked(x):
        return x + 1 if cuda._device_missing(0) is None else x

    assert not torch.compile(asked, fullgraph=True, backend="eager")(torch.zeros(1))
    monkeypatch.setattr(cuda, "LIBRARY", SimpleNamespace(has_image=lambda: True))
    assert cuda._device_missing.__wrapped__(0) is None


def test_a_question_that_failed_for_the_moment_is_asked_again(engine, faults, monkeypatch):
    """As where no memory is left to load a kernel: the call raises, and the next one finds the grid."""
    monkeypatch.setattr(cuda, "LIBRARY", cuda.ENGINE.library)
    for _ in range(2):
        faults(resident=-2)
        for ask in (lambda: check("lstm", "grid", engine), cuda.LIBRARY.has_image):
            with pytest.raises(RuntimeError, match="fastrnn's CUDA kernels: "):
                ask()
        cuda.ENGINE.library.functions.fastrnn_cuda_emulation(1 << 20, -1, 1)
        check("lstm", "grid", engine)
        assert cuda.LIBRARY.has_image()


@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
@pytest.mark.parametrize(("waits", "slow"), [("grid", 0), ("grid", 2), ("cluster", 0), ("cluster", 1)])
def test_a_slow_block_is_waited_for(cell, waits, slow, engine, faults):
    faults(slow=slow)
    check(cell, waits, engine, T=5, dtype=torch.bfloat16)
    if cell == "lstm":  # the second block owns no columns of h
        check(cell, waits, engine, T=5, P=5, dtype=torch.bfloat16)


def test_any_order_of_threads(engine, faults):
    for seed in range(10, 16):
        faults(seed=seed)
        check("lstm", "grid", engine, T=6, H=33, dtype=torch.float16, D=2)
        check("gru_reset_before", "block", engine, T=6, H=33, dtype=torch.float16)
        check("gru_reset_before", "cluster", engine, T=6, H=33, dtype=torch.float16)
        check("lstm", "cluster", engine, T=6, H=33, P=20, D=2)


def test_a_device_without_such_clusters_does_without(engine, faults, modes, monkeypatch):
    check("lstm", "cluster", engine, H=18)
    assert set(modes) == {cuda.MODES["cluster"]}
    faults(resident=1)
    cluster, grid = (KERNELS[name] for name in ("cluster", "grid"))
    modes.clear()
    x, states, params, masks = case("lstm", 4, 3, 4, 18)
    with engine.use("cluster"), monkeypatch.context() as patch:
        patch.setattr(cuda, "configure", lambda of: (cluster if of.cluster_blocks == 16 else grid)(of.B))
        results("lstm", moved((x, *states, *params), torch.float32, "cpu"), 2, masks)
    assert set(modes) == {cuda.MODES["step"]}


@pytest.mark.parametrize("engine", ["emulated"], indirect=True)
@pytest.mark.parametrize(
    ("most", "clusters", "config"),
    [
        (16, 9, Config("cluster", 16, 6, rows=3)),
        (16, 5, Config("cluster", 16, 5, rows=4)),
        (8, 9, Config("cluster", 32, 9, rows=2)),
        (8, 1, Config("grid", 16, 2)),
    ],
    ids=str,
)
def test_clusters_that_the_device_holds(most, clusters, config, engine, faults, monkeypatch):
    """Of at most so many blocks, and so many at once: then of fewer blocks, or of more sequences."""
    found, configure, plan = [], cuda.configure, cuda.Library.plan

    def made_up(self, values):
        blocks = values["grid_y"]
        held = blocks * clusters * (blocks <= most) if values["mode"] == cuda.MODES["cluster"] else 1 << 20
        return (held, *plan(self, values)[1:])

    x, states, params, masks = case("lstm", 1, 18, 4, 250)
    with engine.use(), monkeypatch.context() as patch:
        cuda.fit.cache_clear()
        patch.setattr(cuda, "capability", lambda device: 90)
        patch.setattr(cuda, "processors", lambda device: 132)
        patch.setattr(cuda, "configure", configure)
        patch.setattr(cuda.Library, "plan", made_up)
        patch.setattr(cuda.Library, "run", lambda _, values, *rest: found.append(values) or True)
        said = fastrnn.explain(fastrnn.LSTM(4, 250), torch.empty(1, 18, 4, dtype=torch.bfloat16))
        results("lstm", moved((x, *states, *params), torch.bfloat16, "cpu"), 2, masks)
    assert f"lstm {config.mode} in CUDA" in said.kernel
    assert said.split == str(config)
    launches = {(v["mode"], v["units"], v["grid_x"], v["tile_rows"]) for v in found}
    assert launches == {(cuda.MODES[config.mode], config.units, config.at_once, config.rows)}


def test_a_block_that_never_comes_is_an_error(engine, faults, monkeypatch):
    run = cuda.Library.run

    def without_one(self, values, *rest):
        return run(self, {**values, "grid_y": values["grid_y"] - 1}, *rest)

    monkeypatch.setattr(cuda.Library, "run", without_one)
    monkeypatch.setattr(cuda, "PATIENCE", 200)
    with pytest.raises(RuntimeError, match="CUDA kernels: a block waited in vain"):
        check("gru", "grid", engine)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
def test_numbers_that_are_none_stop_nobody(cell, dtype, kernel, engine):
    """Every bit set: what marks the place of a number that nobody has written yet; and infinity."""
    x, states, params, masks = case(cell, 4, 3, 3, 18)
    leaves = moved((x, *states, *params), dtype, engine.device)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    with torch.no_grad():
        leaves[0].view(bits)[1, 0] = -1
        leaves[1].view(bits)[:, 1] = -1
        leaves[0][2, 2] = float("inf")
    with engine.use(kernel):
        (y, *_), grads = results(cell, leaves, len(states), masks)
    assert y[1:, 0].isnan().all()
    assert y[:, 1].isnan().all()
    assert y[0, 0].isfinite().all()
    assert y[:2, 2].isfinite().all()
    assert grads[0][:, 1].isnan().all()


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_weights_that_no_register_holds(cell, dtype, engine, monkeypatch):
    """Some lie in shared memory, the others stay in the cache."""
    plan = []
    run = cuda.Library.run

    def cramped(self, values, *rest):
        least = self.plan({**values, "shared_limit": 1})[1]
        values = {**values, "in_registers": 0, "shared_limit": least + (8 << 10)}
        plan.append(self.plan(values))
        return run(self, values, *rest)

    monkeypatch.setattr(cuda.Library, "run", cramped)
    check(cell, "grid", engine, T=3, B=2, I=2, H=520 if dtype != torch.float32 else 264, dtype=dtype)
    assert any(0 < shared < pieces for _, _, pieces, _, shared, *_ in plan)


def test_steps_of_several_launches(engine, monkeypatch):
    """Of a grid, whose exchange is fresh memory for some steps at a time."""
    monkeypatch.setattr(cuda, "EXCHANGE_BYTES", 1)
    monkeypatch.setattr(cuda, "LEAST_STEPS", 2)
    for mask in ("none", "lengths+reset", "packed"):
        for cell in ("lstm", "gru_reset_before"):
            check(cell, "grid", engine, T=7, D=2, mask=mask)
    check("lstm", "grid", engine, T=5, P=5, mask="lengths+reset")


# --- what the outside sees


def test_modules_and_the_compiler(engine):
    torch.manual_seed(3)
    for kind, options in ((fastrnn.LSTM, {"proj_size": 3}), (fastrnn.GRU, {}), (fastrnn.RNN, {})):
        ours = kind(4, 7, num_layers=2, bidirectional=True, batch_first=True, device=engine.device, **options)
        x = torch.randn(2, 5, 4, device=engine.device)
        with fastrnn.backend("reference"):
            expected = ours(x)[0]
        with engine.use("grid"):
            torch.testing.assert_close(ours(x)[0], expected)
            compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
            y = compiled(x)[0]
            torch.testing.assert_close(y, expected)
            y.sum().backward()
            said = fastrnn.explain(ours, x)
        assert said.backend == "cuda"
        assert "grid in CUDA, a launch for many steps, float32 products" in said.kernel
        assert "blocks of 16 units, 1 tile of 16 sequences at once" in said.split


def test_explain_without_a_gpu(monkeypatch):
    x = torch.randn(2, 1, 4)
    with fastrnn.backend("cuda"):
        monkeypatch.setattr(cuda, "LIBRARY", None)
        assert "no CUDA kernels (FASTRNN_CUDA=1" in str(fastrnn.explain(fastrnn.LSTM(4, 7), x))
        monkeypatch.setattr(cuda, "LIBRARY", object())
        assert "it takes CUDA tensors, the input is on cpu" in str(fastrnn.explain(fastrnn.LSTM(4, 7), x))
        x = x.to("meta", torch.float64)
        assert "it takes float32, bfloat16, float16" in str(fastrnn.explain(fastrnn.LSTM(4, 7), x))
        said = fastrnn.explain(fastrnn.LSTM(4, 700), x.bfloat16())
        assert said.kernel == "lstm step in CUDA, a launch a step, bfloat16 products"
        # A batch of nobody, where programs share it out.
        for capability in (80, 90):
            monkeypatch.setattr(cuda, "processors", lambda device: 132)
            monkeypatch.setattr(cuda, "capability", lambda device, capability=capability: capability)
            empty = torch.empty(2, 0, 4, device="meta")
            assert "a launch for many steps" in str(fastrnn.explain(fastrnn.LSTM(4, 7), empty))
            assert "in CUDA" in str(fastrnn.explain(fastrnn.LSTMCell(4, 0), torch.empty(2, 4, device="meta")))


def test_a_parameter_is_asked_for_its_device(monkeypatch):
    """Not only a plain tensor."""

    class Parameter(SimpleNamespace):
        device, dtype = torch.device("cuda", 0), torch.float32

    monkeypatch.setattr(torch.nn, "Parameter", Parameter)
    monkeypatch.setattr(cuda, "LIBRARY", object())
    monkeypatch.setattr(cuda, "_device_missing", lambda index: "it takes newer GPUs")
    assert cuda.why_not(Parameter()) == "it takes newer GPUs"


def test_who_calls_the_operator_is_told_why_not(monkeypatch):
    monkeypatch.setattr(cuda, "why_not", lambda x: "it takes newer GPUs")
    layer = fastrnn.GRU(3, 4)
    with pytest.raises(RuntimeError, match="CUDA kernels cannot serve this call: it takes newer GPUs"):
        torch.ops.fastrnn.cuda_layer(
            "gru",
            torch.randn(2, 2, 3),
            [torch.zeros(1, 2, 4)],
            list(layer.parameters()),
            *(None, None, None, False, False),
        )


def test_a_decoder_says_which_layers_it_has(monkeypatch):
    monkeypatch.setattr(fastrnn.decoder, "decide", lambda x: Decision("cuda", "the fastest"))
    decoder = fastrnn.AttentionDecoder(3, 4, 4, input_feeding=False)
    assert "lstm scan in CUDA, then dot attention" in str(fastrnn.explain(decoder, torch.randn(5, 2, 3)))


def test_the_choice_fits_the_device():
    """Of every shape: a block has a multiprocessor, or none waits for another."""
    for cell, projected in (("lstm", False), ("lstm", True), ("gru", False), ("gru_reset_before", False)):
        for H in (1, 64, 128, 256, 1000, 2048, 5000):
            for B in (1, 16, 100, 1000):
                for groups in (1, 2, 16):
                    for backward in (False, True):
                        for itemsize in (2, 4):
                            for device in ((132, 80, 16), *((132, 90, n) for n in (16, 8, 7, 0))):
                                sizes = (H, H, groups, B, itemsize, projected, backward, *device)
                                config = cuda.configure(cuda.Shape(cell, *sizes))
                                of_units = -(-H // config.units)
                                tiles = -(-B // config.rows)
                                blocks = config.at_once * of_units * groups
                                assert 1 <= config.at_once <= tiles
                                assert config.mode not in ("grid", "cluster") or blocks <= 132
                                assert config.mode != "block" or config.units >= H
                                assert config.mode != "cluster" or (of_units <= device[2] and device[1] == 90)
                                assert config.mode == "cluster" or config.rows == 16
                                assert config.mode == "grid" or config.at_once == tiles


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before", "rnn_tanh"])
def test_a_block_of_several_tiles(cell, engine, monkeypatch):
    """Whose loads run ahead of its products, of all that is there and of a part."""
    for most in (1, cuda.EAGER_BYTES):
        monkeypatch.setattr(cuda, "EAGER_BYTES", most)
        for kernel in ("tall", "cache"):
            check(cell, kernel, engine, T=4, B=50, I=3, H=40, dtype=torch.bfloat16, mask="lengths+reset")


# Units of a block, sequences of a tile, H, B: of every kernel that clusters have, with pairs of warps and
# tiles that have nothing, and the last tile of eight sequences and fewer.
CLUSTERS = [(16, 8, 40, 9), (16, 16, 120, 11), (16, 7, 136, 8), (16, 16, 150, 17)]
WIDE_CLUSTERS = [(32, 8, 250, 9), (32, 8, 300, 9), (32, 16, 384, 13), (32, 16, 400, 17), (32, 7, 500, 16)]


@pytest.mark.parametrize("mask", ["none", "lengths+reset", "packed"])
@pytest.mark.parametrize("cell", ["lstm", "gru", "rnn_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_clusters_of_every_size(cell, dtype, mask, engine, monkeypatch):
    sizes = CLUSTERS if engine.device == "cpu" else CLUSTERS + WIDE_CLUSTERS
    for units, rows, H, B in sizes:
        of = Config("cluster", units, tiles(B, rows), rows=rows)
        monkeypatch.setitem(OTHERS, "sized", lambda B, of=of: of)
        check(cell, "sized", engine, T=3, B=B, I=3, H=H, dtype=dtype, mask=mask)


def test_the_benchmark_on_another_device(monkeypatch, tmp_path):
    """Of several: its streams and graphs are of that one, and the machine has one driver."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr(bench, "cases", lambda args: [])
    lines = SimpleNamespace(stdout="580.159\n580.159\n")
    monkeypatch.setattr(bench.subprocess, "run", lambda *args, **options: lines)
    file = tmp_path / "gpu.json"
    assert bench.main(["--device", "cuda:1", "--json", str(file)]) == 0
    assert chosen == [torch.device("cuda", 1)]
    machine = json.loads(file.read_text())["machine"]
    assert (machine["device"], machine["driver"]) == ("cuda:1", "580.159")
