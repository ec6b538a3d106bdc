"""Generated cases: the operators with what no module would pass give the right answer or an exception."""

from __future__ import annotations

import pytest
import torch
from helpers import MASKS, random_case, random_masks
from test_kernels import assert_agree as assert_agree_with_reference

import fastrnn
from fastrnn import functional, reference
from fastrnn.reference import CELLS

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

INT64 = torch.iinfo(torch.int64)
WILD = st.sampled_from([INT64.min, -7, -1, 0, 1, 2, 3, 7, 2**31, 2**40, INT64.max])


def spoiled(draw, tensor):
    """The tensor, changed in one way: some ways are harmless, most are not."""
    way = draw(
        st.sampled_from(
            [
                "grow",
                "shrink",
                "empty",
                "flat",
                "deeper",
                "float32",
                "meta",
                "int",
                "strided",
                "expanded",
                "transposed",
                "nan",
            ]
        )
    )
    dim = draw(st.integers(0, max(tensor.dim() - 1, 0)))
    if way == "grow":
        return torch.cat([tensor, tensor.narrow(dim, 0, min(1, tensor.size(dim)))], dim)
    if way == "shrink":
        return tensor.narrow(dim, 0, max(tensor.size(dim) - 1, 0))
    if way == "empty":
        return tensor.narrow(dim, 0, 0)
    if way == "flat":
        return tensor.flatten()
    if way == "deeper":
        return tensor.unsqueeze(dim)
    if way == "float32":
        return tensor.float()
    if way == "meta":
        return tensor.to("meta")
    if way == "int":
        return tensor.long()
    if way == "strided":  # the same values, every second element of a larger one
        wide = tensor.new_full((*tensor.shape, 2), 99)
        wide[..., 0] = tensor
        return wide[..., 0]
    if way == "expanded":
        return tensor.narrow(dim, 0, min(1, tensor.size(dim))).expand_as(tensor) if tensor.numel() else tensor
    if way == "transposed":
        return tensor.transpose(0, -1)
    return tensor / 0


@st.composite
def calls(draw):
    torch.manual_seed(draw(st.integers(0, 99)))
    cell = draw(st.sampled_from(sorted(CELLS)))
    T, B, I, H, D = (draw(st.integers(1, n)) for n in (5, 5, 4, 18, 2))
    P = draw(st.integers(0, 3)) if cell == "lstm" and H > 3 else 0
    x, states, params = random_case(cell, T, B, I, H, D=D, P=P)
    form = draw(st.sampled_from(["plain", "lengths", "packed", "reset"]))
    lengths = batch_sizes = reset = None
    if form == "lengths":
        lengths = torch.tensor(draw(st.lists(WILD, min_size=B - (B > 1), max_size=B + 1)), dtype=torch.int64)
    if form == "packed":
        batch_sizes = torch.tensor(draw(st.lists(WILD, min_size=1, max_size=T)), dtype=torch.int64)
        if draw(st.booleans()):
            batch_sizes = torch.sort(torch.randint(1, B + 1, (T,)), descending=True)[0]
            if draw(st.booleans()):
                batch_sizes = torch.stack([batch_sizes, batch_sizes * 0 - 5], 1)[:, 0]
        rows = draw(st.sampled_from([int(batch_sizes.clamp(0, 99).sum()), T * B]))
        x = torch.randn(rows, I, dtype=x.dtype)
    if form == "reset":
        reset = torch.rand(T, B + draw(st.integers(0, 1))) < 0.3
        reset = draw(st.sampled_from([reset, reset.float(), reset.t().contiguous().t()]))
    for _ in range(draw(st.integers(0, 2))):
        k = draw(st.integers(0, len(states) + len(params)))
        if k == 0:
            x = spoiled(draw, x)
        elif k <= len(states):
            states[k - 1] = spoiled(draw, states[k - 1])
        else:
            params[k - 1 - len(states)] = spoiled(draw, params[k - 1 - len(states)])
    if draw(st.integers(0, 9)) == 0:
        params = params[: draw(st.integers(0, len(params)))]
    if draw(st.integers(0, 9)) == 0:
        states = states[: draw(st.integers(0, len(states)))]
    return cell, x, states, params, lengths, batch_sizes, reset


def assert_same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


quickly = settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))


@quickly
@given(calls(), st.booleans(), st.booleans())
def test_layer(call, save, return_states):
    try:
        y, last, *_ = torch.ops.fastrnn.layer(*call, save, return_states)
    except (RuntimeError, ValueError, IndexError):
        return
    expected, expected_last, _ = reference.layer(*call)
    assert_same(y, expected)
    for a, b in zip(last, expected_last, strict=True):
        assert_same(a, b)


@quickly
@given(st.data())
def test_layer_backward(data):
    """What `layer` saved, spoiled, before it comes back."""
    draw = data.draw
    cell, *args = draw(calls())
    try:
        y, last, seq, saved = torch.ops.fastrnn.layer(cell, *args, True, False)
    except (RuntimeError, ValueError, IndexError):
        return
    x, states, params, *masks = args
    groups = [[torch.randn_like(y)], [torch.randn_like(s) for s in last], [torch.randn_like(s) for s in seq]]
    groups += [[y], list(seq), list(saved)]
    kinds = [[(t.shape, t.dtype) for t in group] for group in groups]
    for _ in range(draw(st.integers(0, 2))):
        group = groups[draw(st.integers(0, 5))]
        if group:
            k = draw(st.integers(0, len(group) - 1))
            group[k] = spoiled(draw, group[k])
            if draw(st.integers(0, 4)) == 0:
                del group[k]
    dy, dlast, dseq, y, seq, saved = groups
    try:
        dx, dstates, dparams = torch.ops.fastrnn.layer_backward(
            cell,
            dy[0] if dy else None,
            dlast,
            dseq,
            x,
            states,
            params,
            *masks,
            *(y or [x]),
            seq,
            saved,
            True,
            True,
        )
    except (RuntimeError, ValueError, IndexError):
        return
    present = [kind for group, kind in zip(groups, kinds, strict=True) if group]
    assert [[(t.shape, t.dtype) for t in group] for group in groups if group] == present
    assert dx.shape == x.shape
    assert [d.shape for d in (*dstates, *dparams)] == [t.shape for t in (*states, *params)]


def test_strided_batch_sizes():
    x, states, params = random_case("gru", 3, 2, 2, 3)
    batch_sizes = torch.tensor([[2, -5], [2, -5], [1, -5]])[:, 0]
    y = torch.ops.fastrnn.layer(
        "gru", x.flatten(0, 1)[:5], states, params, None, batch_sizes, None, False, False
    )[0]
    assert_same(y, reference.layer("gru", x.flatten(0, 1)[:5], states, params, None, batch_sizes)[0])


@pytest.fixture
def number_of_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cell=st.sampled_from(sorted(CELLS)),
    T=st.integers(1, 9),
    B=st.integers(0, 20),
    I=st.integers(1, 20),
    H=st.integers(1, 70),
    D=st.integers(1, 2),
    bias=st.booleans(),
    mask=st.sampled_from(MASKS),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
# A single column, which matrix products treat by other paths.
@example(cell="rnn_relu", T=1, B=2, I=5, H=1, D=2, bias=False, mask="none", threads=1, seed=0)
def test_parity_generated(number_of_threads, cell, T, B, I, H, D, bias, mask, threads, seed):
    torch.manual_seed(seed)
    number_of_threads(threads)
    mask = "none" if B == 0 else mask
    x, states, params = random_case(cell, T, B, I, H, D=D, bias=bias)
    x, masks = random_masks(mask, x)
    if B == 0:
        with fastrnn.backend("cpu"):
            y, last, _ = functional.layer(cell, x.requires_grad_(), states, params)
        (y.sum() + sum(s.sum() for s in last)).backward()
        assert y.shape == (T, 0, D * H)
        assert x.grad.shape == x.shape
        return
    assert_agree_with_reference(cell, x, states, params, masks)


def test_what_the_operator_refuses():
    """Calls that would be another layer's, or one of no kernel."""
    x, states, params = random_case("gru", 3, 2, 4, 5)
    sizes, lengths, reset = torch.tensor([2, 2, 2]), torch.tensor([3, 1]), torch.zeros(3, 2).bool()
    for args, words in (
        ((x.flatten(0, 1), states, params, lengths, sizes, None), "takes neither lengths nor reset"),
        ((x.flatten(0, 1), states, params, None, sizes, reset), "takes neither lengths nor reset"),
        (
            (x, states, [*params[:2], torch.randn(5, 5).double()], None, None, None),
            "only the LSTM can be projected",
        ),
        (
            (x, [s.repeat(3, 1, 1) for s in states], params * 3, None, None, None),
            "h must be of 1 or 2 directions, got 3",
        ),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fastrnn.layer("gru", *args, False, False)
