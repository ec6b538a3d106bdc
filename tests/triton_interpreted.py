"""The Triton kernels against the float64 reference. test_triton.py runs these in processes of their own: on
the CPU with TRITON_INTERPRET=1, and on the GPU where there is one."""

from __future__ import annotations

import contextlib
import os

import pytest
import torch
from helpers import F64, MASKS, random_case, random_masks

import fastrnn
from fastrnn import functional, kernels
from fastrnn.reference import CELLS
from fastrnn.triton_kernels import heuristics, layer

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
EPSILON = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
KERNELS = {"scan": None, **{name: heuristics.Config(name, 16, 16, 16, 4, 2) for name in ("step", "grid")}}
each_cell = pytest.mark.parametrize("cell", CELLS)
each_kernel = pytest.mark.parametrize("kernel", KERNELS)


@pytest.fixture(autouse=True)
def exact_products():
    """No TF32, which torch allows cuDNN unless told otherwise."""
    with torch.backends.cudnn.flags(allow_tf32=False):
        yield


@pytest.fixture(autouse=True)
def memory_that_nobody_filled_is_nan():
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch then fills what is allocated
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def programs_that_meet(monkeypatch):
    """Run side by side in the interpreter too."""
    if layer.INTERPRETED:
        import side_by_side
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "__call__", side_by_side.run)


@contextlib.contextmanager
def backend(kernel, monkeypatch):
    """The Triton backend with small tiles of this kernel: several a layer."""
    if KERNELS[kernel] is not None:
        monkeypatch.setattr(heuristics, "configure", lambda *args: KERNELS[kernel])
    with fastrnn.backend("triton"):
        yield


def case(cell, T, B, I, H, mask="none", D=1, P=0, bias=True, heads=1):
    x, states, params = random_case(cell, T, B, I, H, D=D, P=P, bias=bias)
    x, masks = random_masks(mask, x)
    if heads > 1:
        per = len(params) // D
        params = [p[:, : H // heads] if i % per == 1 else p for i, p in enumerate(params)]
    return x, states, params, masks


def results(cell, leaves, S, masks, weights=None):
    """Outputs, and the gradients of their sum weighted by `weights`, of x, states and params."""
    y, last, seq = functional.layer(
        cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], return_states=True, **masks
    )
    outputs = (y, *last, *seq)
    if weights is None:
        torch.manual_seed(5)
        weights = [torch.randn(o.shape, dtype=F64) for o in outputs]
    loss = sum((o * w.to(o)).sum() for o, w in zip(outputs, weights, strict=True))
    return outputs, torch.autograd.grad(loss, leaves)


def moved(tensors, dtype):
    return [t.to(DEVICE, dtype).detach().requires_grad_() for t in tensors]


def worst(ours, reference):
    """The largest error, of the largest entry."""
    worst = 0.0
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape
        assert a.isfinite().all()  # max() below would pass over a NaN
        if b.numel():
            scale = max(b.abs().max().item(), 1e-3)
            worst = max(worst, (a.detach().cpu().to(F64) - b).abs().max().item() / scale)
    return worst


def check(cell, kernel, monkeypatch, T=4, B=3, I=4, H=18, dtype=torch.float32, **options):
    x, states, params, masks = case(cell, T, B, I, H, **options)
    flat = [t.to(dtype).to(F64) for t in (x, *states, *params)]  # the same numbers for both
    with fastrnn.backend("reference"):
        expected = results(cell, [t.requires_grad_() for t in flat], len(states), masks)
    masks = {k: v if k == "batch_sizes" else v.to(DEVICE) for k, v in masks.items()}
    with backend(kernel, monkeypatch):
        leaves = moved(flat, dtype)
        outputs, grads = results(cell, leaves, len(states), masks)
        with torch.no_grad():
            S = len(states)
            y, last, _ = functional.layer(cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], **masks)
    assert outputs[0].dtype == dtype
    assert worst(outputs, expected[0]) < EPSILON[dtype]
    assert worst(grads, expected[1]) < EPSILON[dtype] * (4 if dtype == torch.float32 else 2)
    # Inference saves nothing, and gives the same.
    assert worst([y, *last], [o.detach().cpu().to(F64) for o in outputs[: 1 + S]]) < EPSILON[dtype] / 4


@each_kernel
@pytest.mark.parametrize("mask", MASKS)
@each_cell
def test_masks_and_both_directions(cell, mask, kernel, monkeypatch):
    check(cell, kernel, monkeypatch, mask=mask, D=2)


@each_kernel
@pytest.mark.parametrize("mask", ["none", "lengths+reset", "packed"])
def test_projection(mask, kernel, monkeypatch):
    check("lstm", kernel, monkeypatch, mask=mask, D=2, P=5)


@each_kernel
@each_cell
def test_heads(cell, kernel, monkeypatch):
    check(cell, kernel, monkeypatch, D=2, H=51, heads=3, mask="lengths")


@each_kernel
@each_cell
def test_several_tiles(cell, kernel, monkeypatch):
    """Of the batch, of units, of sums; without bias."""
    check(cell, kernel, monkeypatch, T=3, B=18, I=2, H=35, bias=False)


@each_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_cell
def test_16_bits(cell, dtype, kernel, monkeypatch):
    check(cell, kernel, monkeypatch, dtype=dtype, D=2)


@each_kernel
@pytest.mark.parametrize(("T", "B", "I", "H"), [(1, 1, 1, 1), (2, 0, 3, 4)])
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_smallest_sizes(cell, T, B, I, H, kernel, monkeypatch):
    check(cell, kernel, monkeypatch, T=T, B=B, I=I, H=H, D=2)


@each_kernel
@pytest.mark.parametrize("mask", ["lengths+reset", "packed"])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_inference_in_chunks_of_time(cell, mask, kernel, monkeypatch):
    """Of which each has the gates of a step or two."""
    monkeypatch.setattr(layer, "CHUNK_BYTES", 2 * 2 * 3 * 4 * 18 * 4)
    check(cell, kernel, monkeypatch, mask=mask, D=2)


@each_kernel
def test_each_output_alone(kernel, monkeypatch):
    """A gradient that reaches one output only, the others undefined."""
    x, states, params, masks = case("lstm", 4, 2, 3, 5, "lengths")
    masks = {k: v.to(DEVICE) for k, v in masks.items()}
    with backend(kernel, monkeypatch):
        leaves = moved((x, *states, *params), torch.float32)

        def outputs():
            y, last, seq = functional.layer(
                "lstm", leaves[0], leaves[1:3], leaves[3:], return_states=True, **masks
            )
            return (y, *last, *seq)

        given = outputs()
        for i, out in enumerate(given):
            alone = torch.autograd.grad(out.square().sum(), leaves, allow_unused=True, retain_graph=True)
            weights = [torch.zeros_like(o) for o in given]
            weights[i] = 2 * out.detach()
            dense = torch.autograd.grad(given, leaves, weights, retain_graph=True)
            for a, b in zip(alone, dense, strict=True):
                torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@each_kernel
@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("lstm", 3)])
def test_what_lies_past_an_end_is_not_read(cell, P, kernel, monkeypatch):
    x, states, params, _ = case(cell, 4, 2, 3, 5, P=P)
    lengths = torch.tensor([2, 4])
    x[2:, 0] = float("nan")
    with backend(kernel, monkeypatch):
        leaves = moved((x, *states, *params), torch.float32)
        outputs, grads = results(cell, leaves, len(states), {"lengths": lengths.to(DEVICE)})
    assert all(t.isfinite().all() for t in (*outputs, *grads))
    assert (grads[0][2:, 0] == 0).all()


def test_double_backward_and_transforms():
    x, states, params, _ = case("gru", 3, 2, 3, 4)
    found = []
    for name, dtype, device in (("reference", F64, "cpu"), ("triton", torch.float32, DEVICE)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, *states, *params)]

        def f(*flat, name=name):
            with fastrnn.backend(name):
                y, last, _ = functional.layer("gru", flat[0], flat[1:2], flat[2:])
            return y.square().sum() + last[0].sum()

        first = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
        plain = [t.detach() for t in leaves]
        _, tangent = torch.func.jvp(f, tuple(plain), tuple(plain))
        many = torch.stack([plain[0], 2 * plain[0]])
        mapped = torch.func.vmap(lambda x, f=f, plain=plain: f(x, *plain[1:]))(many)
        each = torch.func.vmap(lambda x, f=f, plain=plain: torch.func.grad(f)(x, *plain[1:]))(many)
        found.append([*second, tangent, mapped, each])
    assert worst(found[1], [t.detach() for t in found[0]]) < 1e-4


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


@each_cell
def test_opcheck(cell):
    x, states, params, _ = case(cell, 3, 2, 3, 4, D=2)
    leaves = moved((x, *states, *params), torch.float32)
    S = len(states)
    args = (cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], None, None, None)
    torch.library.opcheck(torch.ops.fastrnn.triton_layer.default, (*args, True, True))
    torch.library.opcheck(torch.ops.fastrnn.triton_layer.default, (*args, False, False))
    with torch.no_grad():
        y, last, seq, saved = torch.ops.fastrnn.triton_layer(*args, True, True)
        rest = (*args[1:], y, seq, saved)
        for need in (True, False):
            torch.library.opcheck(
                torch.ops.fastrnn.triton_layer_backward.default, (cell, y, last, [], *rest, need, not need)
            )


def test_the_operators_trust_nobody():
    x, states, params, _ = case("lstm", 3, 2, 3, 4)
    x, h, c, *params = (t.to(DEVICE, torch.float32) for t in (x, *states, *params))
    call = torch.ops.fastrnn.triton_layer
    with pytest.raises(ValueError, match="state 1 must be"):
        call("lstm", x, [h, c[:, :1]], params, None, None, None, True, True)
    with pytest.raises(ValueError, match="w_hh must be"):
        call("lstm", x, [h, c], [params[0], params[1][:, :3], *params[2:]], None, None, None, True, True)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16, float16 on a GPU.*got torch\.float64"):
        call(
            "lstm",
            x.double(),
            [h.double(), c.double()],
            [p.double() for p in params],
            None,
            None,
            None,
            True,
            True,
        )
    y, _, seq, saved = call("lstm", x, [h, c], params, None, None, None, True, True)
    back = torch.ops.fastrnn.triton_layer_backward
    given = (x, [h, c], params, None, None, None)
    with pytest.raises(ValueError, match="saved gates must be"):
        back("lstm", y, [], [], *given, y, seq, [saved[0][:, 1:]], True, True)
    with pytest.raises(ValueError, match="seq and saved must be as triton_layer"):
        back("lstm", y, [], [], *given, y, [], saved, True, True)
    with pytest.raises(ValueError, match="dy must be"):
        back("lstm", y[1:], [], [], *given, y, seq, saved, True, True)


def test_heads_of_a_projected_layer_are_refused():
    x, states, params, _ = case("lstm", 3, 2, 3, 4, P=2)
    params[1] = params[1][:, :1]
    flat = [t.to(DEVICE, torch.float32) for t in (x, *states, *params)]
    with pytest.raises(ValueError, match="w_hh must be"):
        kernels.check(kernels.Inputs("lstm", flat[0], flat[1:3], flat[3:], None, None, None), heads=True)


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
