"""What holds of a layer by any kernels for GPUs, against the float64 reference: tests that files which have
an engine take over, `from on_gpus import *`. They bring the fixture `engine` (on_gpus.Engine), and by
pytest_generate_tests a `kernel` of each of its kinds."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import pytest
import torch
from helpers import F64, MASKS, random_case, random_masks

import fastrnn
from fastrnn import functional, gpu, kernels
from fastrnn.reference import CELLS

EPSILON = {torch.float32: 5e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
each_cell = pytest.mark.parametrize("cell", CELLS)


class Engine(Protocol):
    """name: the backend's; layer, layer_backward: its operators."""

    name: str
    device: str
    layer: Any
    layer_backward: Any

    def use(self, kernel: str | None = None) -> AbstractContextManager[Any]:
        """The backend with small tiles of this kernel, several a layer, or as it would choose."""


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


def moved(tensors, dtype, device):
    return [t.to(device, dtype).detach().requires_grad_() for t in tensors]


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


def usual(kernel):
    """The type that tests of all kernels take: what another one is for."""
    return torch.float16 if "16 bits" in kernel else torch.float32


def check(cell, kernel, engine, T=4, B=3, I=4, H=18, dtype=None, epsilon=None, **options):
    dtype = dtype or usual(kernel)
    epsilon = epsilon or EPSILON[dtype]
    x, states, params, masks = case(cell, T, B, I, H, **options)
    flat = [t.to(dtype).to(F64) for t in (x, *states, *params)]  # the same numbers for both
    with fastrnn.backend("reference"):
        expected = results(cell, [t.requires_grad_() for t in flat], len(states), masks)
    masks = {k: v if k == "batch_sizes" else v.to(engine.device) for k, v in masks.items()}
    with engine.use(kernel):
        leaves = moved(flat, dtype, engine.device)
        outputs, grads = results(cell, leaves, len(states), masks)
        with torch.no_grad():
            S = len(states)
            y, last, _ = functional.layer(cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], **masks)
    assert outputs[0].dtype == dtype
    assert worst(outputs, expected[0]) < epsilon
    assert worst(grads, expected[1]) < epsilon * (4 if dtype == torch.float32 else 2)
    # Inference saves nothing, and gives the same.
    assert worst([y, *last], [o.detach().cpu().to(F64) for o in outputs[: 1 + S]]) < epsilon / 4


@pytest.mark.parametrize("mask", MASKS)
@each_cell
def test_masks_and_both_directions(cell, mask, kernel, engine):
    check(cell, kernel, engine, mask=mask, D=2)


@pytest.mark.parametrize("mask", ["none", "lengths+reset", "packed"])
def test_projection(mask, kernel, engine):
    check("lstm", kernel, engine, mask=mask, D=2, P=5)


@each_cell
def test_heads(cell, kernel, engine):
    check(cell, kernel, engine, D=2, H=51, heads=3, mask="lengths")


@each_cell
def test_several_tiles(cell, kernel, engine):
    """Of the batch, of units, of sums; without bias."""
    check(cell, kernel, engine, T=3, B=18, I=2, H=35, bias=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_cell
def test_16_bits(cell, dtype, kernel, engine):
    check(cell, kernel, engine, dtype=dtype, D=2)


def test_an_infinite_gradient_ends_where_relu_cuts_off(kernel, engine):
    """In all steps, also where it reaches the step before past R."""
    x, states, params, _ = case("rnn_relu", T=3, B=3, I=4, H=18)
    with engine.use(kernel):
        leaves = moved((x, *states, *params), usual(kernel), engine.device)
        y, _, _ = functional.layer("rnn_relu", leaves[0], leaves[1:2], leaves[2:])
        cut_off = y <= 0
        assert cut_off.flatten(1).any(1).all()
        grads = torch.autograd.grad(y, leaves, torch.where(cut_off, torch.inf, 1.0).to(y))
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cell_state_is_float32(dtype, kernel, engine):
    """Additions too small for 16 bits add up in it: with the forget gate at 1, c grows by an eighth of what
    lies between two numbers a step."""
    T, H, eps = 64, 18, torch.finfo(dtype).eps
    bias = torch.tensor([0.0, 40.0, eps / 4, 0.0]).repeat_interleave(H)  # i = 1/2
    given = (torch.zeros(T, 1, 1), torch.zeros(1, 1, H), torch.ones(1, 1, H))
    weights = (torch.zeros(4 * H, 1), torch.zeros(4 * H, H), bias, torch.zeros(4 * H))
    x, h, c, *params = (t.to(engine.device, dtype) for t in (*given, *weights))
    with engine.use(kernel), torch.no_grad():
        last = functional.layer("lstm", x, [h, c], params)[1]
    assert (last[1].double() - (1 + T * eps / 8)).abs().max() <= eps / 2


@pytest.mark.parametrize(
    ("T", "B", "I", "H"), [(1, 1, 1, 1), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0), (2, 0, 0, 0)]
)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_smallest_sizes(cell, T, B, I, H, kernel, engine):
    check(cell, kernel, engine, T=T, B=B, I=I, H=H, D=2)


@pytest.mark.parametrize("mask", ["lengths+reset", "packed"])
@pytest.mark.parametrize("cell", ["lstm", "gru_reset_before"])
def test_inference_in_chunks_of_time(cell, mask, kernel, engine, monkeypatch):
    """Of which each has the gates of a step or two."""
    monkeypatch.setattr(gpu, "CHUNK_BYTES", 2 * 2 * 3 * 4 * 18 * usual(kernel).itemsize)
    check(cell, kernel, engine, mask=mask, D=2)


def test_each_output_alone(kernel, engine):
    """A gradient that reaches one output only, the others undefined."""
    x, states, params, masks = case("lstm", 4, 2, 3, 5, "lengths")
    masks = {k: v.to(engine.device) for k, v in masks.items()}
    with engine.use(kernel):
        leaves = moved((x, *states, *params), usual(kernel), engine.device)

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


@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("lstm", 3)])
def test_what_lies_past_an_end_is_not_read(cell, P, kernel, engine):
    x, states, params, _ = case(cell, 4, 2, 3, 5, P=P)
    lengths = torch.tensor([2, 4])
    x[2:, 0] = float("nan")
    with engine.use(kernel):
        leaves = moved((x, *states, *params), usual(kernel), engine.device)
        outputs, grads = results(cell, leaves, len(states), {"lengths": lengths.to(engine.device)})
    assert all(t.isfinite().all() for t in (*outputs, *grads))
    assert (grads[0][2:, 0] == 0).all()


def test_double_backward_and_transforms(engine):
    x, states, params, _ = case("gru", 3, 2, 3, 4)
    found = []
    for name, dtype, device in (("reference", F64, "cpu"), (engine.name, torch.float32, engine.device)):
        leaves = [t.to(device, dtype).requires_grad_() for t in (x, *states, *params)]

        def f(*flat, name=name):
            with engine.use() if name == engine.name else fastrnn.backend(name):
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


@each_cell
def test_opcheck(cell, engine):
    x, states, params, _ = case(cell, 3, 2, 3, 4, D=2)
    leaves = moved((x, *states, *params), torch.float32, engine.device)
    S = len(states)
    args = (cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], None, None, None)
    torch.library.opcheck(engine.layer.default, (*args, True, True))
    torch.library.opcheck(engine.layer.default, (*args, False, False))
    with torch.no_grad():
        y, last, seq, saved = engine.layer(*args, True, True)
        rest = (*args[1:], y, seq, saved)
        for need in (True, False):
            torch.library.opcheck(engine.layer_backward.default, (cell, y, last, [], *rest, need, not need))


def test_the_operators_trust_nobody(engine):
    x, states, params, _ = case("lstm", 3, 2, 3, 4)
    x, h, c, *params = (t.to(engine.device, torch.float32) for t in (x, *states, *params))
    call = engine.layer
    with pytest.raises(ValueError, match="state 1 must be"):
        call("lstm", x, [h, c[:, :1]], params, None, None, None, True, True)
    with pytest.raises(ValueError, match="w_hh must be"):
        call("lstm", x, [h, c], [params[0], params[1][:, :3], *params[2:]], None, None, None, True, True)
    with pytest.raises(RuntimeError, match=r"float32, bfloat16, float16.*(got torch\.|is )float64"):
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
    back = engine.layer_backward
    given = (x, [h, c], params, None, None, None)
    with pytest.raises(ValueError, match="saved gates must be"):
        back("lstm", y, [], [], *given, y, seq, [saved[0][:, 1:]], True, True)
    with pytest.raises(ValueError, match="seq and saved must be as"):
        back("lstm", y, [], [], *given, y, [], saved, True, True)
    with pytest.raises(ValueError, match="seq and saved must be as"):
        back("lstm", y, [], [], *given, y, seq, [], True, True)
    with pytest.raises(ValueError, match="dlast must be 2 tensors or none, got 1"):
        back("lstm", y, [h], [], *given, y, seq, saved, True, True)
    with pytest.raises(ValueError, match="dseq must be 1 tensors or none, got 2"):
        back("lstm", y, [], [*seq, *seq], *given, y, seq, saved, True, True)
    with pytest.raises(ValueError, match="dy must be"):
        back("lstm", y[1:], [], [], *given, y, seq, saved, True, True)
    with pytest.raises(ValueError, match=r"dy must be torch.float32 \[3, 2, 4\].*got torch.bfloat16"):
        back("lstm", y.bfloat16(), [], [], *given, y, seq, saved, True, True)
    with pytest.raises(ValueError, match=r"dlast must be torch\.float32"):
        back("lstm", y, [h.bfloat16(), c], [], *given, y, seq, saved, True, True)
    with pytest.raises(ValueError, match=r"dseq must be torch\.float32"):
        back("lstm", y, [], [seq[0].double()], *given, y, seq, saved, True, True)
    w_hr = torch.ones(2, 4, device=engine.device)
    projected = (x, [h[..., :2].contiguous(), c], [params[0], params[1][:, :2], *params[2:], w_hr])
    y, _, seq, saved = call("lstm", *projected, None, None, None, True, True)
    narrow = [saved[0], saved[1][:, 1:]]
    with pytest.raises(ValueError, match="saved mid must be"):
        back("lstm", y, [], [], *projected, None, None, None, y, seq, narrow, True, True)
    for sizes in ([2, 2, 1], [2, 2, 2, 2], [1, 2, 2, 1], [3, 2, 1], [2, 2, 2, 0], [2, 2, 3, -1]):
        rows, steps = x.reshape(6, 3), torch.tensor(sizes)
        with pytest.raises(ValueError, match="batch_sizes must be positive"):
            call("lstm", rows, [h, c], params, None, steps, None, True, True)


def test_batch_sizes_on_the_device(engine):
    """As an operator's caller may have them; a PackedSequence's lie on the CPU. It tells on a GPU alone."""
    x, states, params, masks = case("lstm", 4, 3, 3, 4, "packed", D=2)
    flat = [t.to(engine.device, torch.float32) for t in (x, *states, *params)]
    sizes = masks["batch_sizes"]
    found = []
    for given in (sizes, sizes.to(engine.device)):
        args = (flat[0], flat[1:3], flat[3:], None, given, None)
        y, last, seq, saved = engine.layer("lstm", *args, True, True)
        back = engine.layer_backward("lstm", y, last, [], *args, y, seq, saved, True, True)
        found.append([y, *last, back[0], *back[1], *back[2]])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_more_heads_than_a_launch_has_blocks(engine):
    heads = gpu.GRID_LIMIT + 1
    x, h = torch.zeros(1, 1, 1, device=engine.device), torch.zeros(1, 1, heads, device=engine.device)
    weight = torch.zeros(heads, 1, device=engine.device)
    with pytest.raises(RuntimeError, match="at most 65535 directions x heads, got 65536"):
        engine.layer("rnn_tanh", x, [h], [weight, weight], None, None, None, False, False)


def test_heads_of_a_projected_layer_are_refused(engine):
    x, states, params, _ = case("lstm", 3, 2, 3, 4, P=2)
    params[1] = params[1][:, :1]
    flat = [t.to(engine.device, torch.float32) for t in (x, *states, *params)]
    with pytest.raises(ValueError, match="w_hh must be"):
        kernels.check(kernels.Inputs("lstm", flat[0], flat[1:3], flat[3:], None, None, None), heads=True)


def test_strides(engine):
    """Of whatever the operators take: the bits of dense tensors."""
    x, states, params, _ = case("lstm", 4, 3, 3, 18, D=2, P=5)
    flat = [t.to(engine.device, torch.float32) for t in (x, *states, *params)]

    def strided(t):
        return torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]

    found = []
    for laid in (torch.clone, strided):
        x, h, c, *params = map(laid, flat)
        args = (x, [h, c], params, None, None, None)
        y, last, seq, saved = engine.layer("lstm", *args, True, True)
        dlast, dseq, gates = (list(map(laid, group)) for group in (last, seq, saved))
        back = engine.layer_backward("lstm", laid(y), dlast, dseq, *args, laid(y), dseq, gates, True, True)
        found.append([y, *last, *seq, back[0], *back[1], *back[2]])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


@each_cell
def test_gradients_share_no_memory(cell, engine):
    """The biases' are the same numbers, except the GRU's: training goes on in place."""
    x, states, params, _ = case(cell, 3, 2, 3, 4, D=2)
    leaves = moved((x, *states, *params), torch.float32, engine.device)
    with engine.use():
        _, grads = results(cell, leaves, len(states), {})
    assert len({g.untyped_storage().data_ptr() for g in grads}) == len(grads)


def test_autocast_rounds_no_gradient(engine):
    """Of a forward pass outside of it."""
    x, states, params, _ = case("gru", 3, 2, 3, 4)
    leaves = moved((x, *states, *params), torch.float32, engine.device)
    found = []
    with engine.use():
        y = functional.layer("gru", leaves[0], leaves[1:2], leaves[2:])[0]
        for enabled in (False, True):
            with torch.autocast(engine.device, torch.bfloat16, enabled=enabled):
                found.append(torch.autograd.grad(y, leaves, torch.ones_like(y), retain_graph=True))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
