"""bfloat16 on every instruction set, with those that multiply it: errors against float64, odd shapes, masks,
bits."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, random_case, random_masks

import fastrnn
from fastrnn import functional, kernels, packed
from fastrnn.reference import CELLS

# T, B, I, H: single elements, rows and units beyond a tile, a K that ends within one, more rows than an outer
# product takes at once, one sequence whose x is multiplied before; then few enough rows that the weights are
# read where torch keeps them.
SHAPES = (
    (2, 1, 1, 1),
    (3, 3, 33, 31),
    (4, 33, 31, 33),
    (3, 40, 3, 257),
    (30, 17, 64, 32),
    (2, 1100, 5, 40),
    (20, 1, 40, 48),
)
FEW = ((1, 1, 31, 257), (5, 3, 40, 33))

each_isa = pytest.mark.parametrize("isa", kernels.instruction_sets())
each_cell = pytest.mark.parametrize("cell", CELLS)


def run(backend, cell, case, masks):
    """Every output, and the gradients of their weighted sum, as float64."""
    x, states, params = case
    leaves = [t.detach().clone().requires_grad_() for t in (x, *states, *params)]
    S = len(states)
    with fastrnn.backend(backend):
        y, last, seq = functional.layer(
            cell, leaves[0], leaves[1 : 1 + S], leaves[1 + S :], return_states=True, **masks
        )
    outputs = [y, *last, *seq]
    generator = torch.Generator().manual_seed(1)
    loss = sum((o * torch.randn(o.shape, generator=generator).to(o.dtype)).sum() for o in outputs)
    grads = torch.autograd.grad(loss, leaves)
    return [t.detach().double() for t in (*outputs, *grads)]


def assert_close(cell, case, masks):
    """Root mean square errors, since a rounding of h shows in every later step."""
    x, states, params = case
    ours = run("cpu", cell, case, masks)
    exact = run(
        "reference", cell, (x.double(), [s.double() for s in states], [p.double() for p in params]), masks
    )
    outputs = 2 * len(states)
    for i, (a, e) in enumerate(zip(ours, exact, strict=True)):
        # relu's gradient jumps where rounding takes a unit over its kink.
        tolerance = 0.3 if cell == "rnn_relu" and i >= outputs else 0.02
        assert (a - e).square().mean().sqrt() <= tolerance * e.square().mean().sqrt() + 1e-6
    with torch.no_grad(), fastrnn.backend("cpu"):
        y, last, _ = functional.layer(cell, x, states, params, **masks)
    for a, b in zip((y, *last), ours, strict=False):
        assert torch.equal(a.double(), b), "inference and training must give the same bits"


@each_isa
@pytest.mark.parametrize("shape", SHAPES + FEW, ids=str)
@each_cell
def test_shapes(cell, shape, isa, use_isa):
    use_isa(isa)
    assert_close(cell, random_case(cell, *shape, D=2, dtype=torch.bfloat16), {})


@each_isa
@pytest.mark.parametrize("mask", MASKS)
@each_cell
def test_masks(cell, mask, isa, use_isa):
    use_isa(isa)
    x, states, params = random_case(cell, 7, 21, 5, 37, D=2, dtype=torch.bfloat16)
    x, masks = random_masks(mask, x)
    assert_close(cell, (x, states, params), masks)


@each_isa
@pytest.mark.parametrize("P", [1, 33, 40])
def test_projection(P, isa, use_isa):
    use_isa(isa)
    assert_close("lstm", random_case("lstm", 6, 19, 3, 41, D=2, P=P, dtype=torch.bfloat16), {})


@each_isa
@each_cell
def test_no_units(cell, isa, use_isa):
    use_isa(isa)
    x = torch.randn(3, 2, 5, dtype=torch.bfloat16, requires_grad=True)
    states = [x.new_empty(1, 2, 0) for _ in range(CELLS[cell].states)]
    y, _, _ = functional.layer(cell, x, states, [x.new_empty(0, 5), x.new_empty(0, 0)])
    assert y.shape == (3, 2, 0)
    assert not torch.autograd.grad(y.sum(), x)[0].any()


@each_isa
@pytest.mark.parametrize(("cell", "P"), [*((cell, 0) for cell in CELLS), ("lstm", 33)])
def test_frozen(cell, P, isa, use_isa):
    """The bits of the plain layer, whose weights are packed too where there are so many rows."""
    use_isa(isa)
    x, states, params = random_case(cell, 5, 19, 35, 41, D=2, P=P, dtype=torch.bfloat16)
    with torch.no_grad():
        plain = functional.layer(cell, x, states, params)
    weights = packed.pack(cell, params, [], 2)
    frozen = packed.layer(
        cell, x, states, weights, lengths=None, batch_sizes=None, reset=None, return_states=False
    )
    assert torch.equal(frozen[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(frozen[1], plain[1], strict=True))


@pytest.mark.parametrize("shape", [(40, 7, 16, 64), (20, 40, 33, 96), (5, 1, 8, 300)], ids=str)
@each_cell
def test_bits_do_not_depend_on_threads(cell, shape):
    case = random_case(cell, *shape, D=2, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run("cpu", cell, case, {}))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@each_cell
def test_a_nan_or_infinity_stays_in_its_row(cell):
    x, states, params = random_case(cell, 4, 35, 5, 37, dtype=torch.bfloat16)
    with torch.no_grad(), fastrnn.backend("cpu"):
        clean = functional.layer(cell, x, states, params)[0]
        x[1, 20], x[2, 7] = float("nan"), float("inf")
        y = functional.layer(cell, x, states, params)[0]
    assert y[1:, 20].isnan().all()
    others = [i for i in range(35) if i not in (7, 20)]
    assert torch.equal(y[:, others], clean[:, others])


@each_isa
def test_both_directions_gradients_of_x_are_rounded_once(isa, use_isa):
    """1 + 2^-8 and 2^-8, each direction's, are 1 + 2^-7 together; rounded one after the other, 1."""
    use_isa(isa)
    x = torch.ones(1, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    zeros = x.new_zeros(2, 2)
    params = [x.new_tensor([[1.0], [2**-8]]), zeros, x.new_tensor([[2**-8], [0.0]]), zeros]
    y = functional.layer("rnn_relu", x, [x.new_zeros(2, 1, 2)], params)[0]
    assert torch.autograd.grad(y.sum(), x)[0].item() == 1 + 2**-7
