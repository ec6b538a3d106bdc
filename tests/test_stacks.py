"""Layers of a stack at once, in inference (docs/cpu.md): the bits are those of one layer after another."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import random_masks
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn
from fastrnn import functional, kernels
from fastrnn.bench import memory
from fastrnn.bench.grid import Case, Shape

LAYERS = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 24}),
    "lstm_no_bias": (fastrnn.LSTM, {"bias": False}),
    "gru": (fastrnn.GRU, {}),
    "gru_reset_before": (fastrnn.GRU, {"reset_after": False}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
}
T, B, I, H = 130, 3, 40, 80
each_layer = pytest.mark.parametrize("name", LAYERS)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def stacked(monkeypatch):
    """The results of functional.stack, call after call: None where it left the call to the layers."""
    results, stack = [], functional.stack

    def noted(*args, **options):
        results.append(stack(*args, **options))
        return results[-1]

    monkeypatch.setattr(functional, "stack", noted)
    return results


def stack(name, layers=3, dtype=torch.float32):
    kind, own = LAYERS[name]
    torch.manual_seed(3)
    return kind(I, H, layers, **own).to(dtype).eval()


def first_states(module, dtype=torch.float32):
    widths = [module.proj_size or H, H][: 2 if module.mode == "LSTM" else 1]
    states = tuple(torch.randn(module.num_layers, B, width).to(dtype) for width in widths)
    return states if len(states) == 2 else states[0]


def flat(output, hidden):
    hidden = hidden if isinstance(hidden, tuple) else (hidden,)
    return [output.data if isinstance(output, PackedSequence) else output, *hidden]


def one_by_one(module, *args, **options):
    """Where every step's states are wanted, the layers run one after another."""
    return flat(*module(*args, **options, return_states=True)[:2])


def assert_same_bits(ours, theirs):
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    "make", [lambda m: m, fastrnn.freeze, fastrnn.quantize], ids=["", "freeze", "quantize"]
)
@pytest.mark.parametrize("layers", [2, 3, 5])
@each_layer
@torch.no_grad()
def test_any_number_of_threads(name, layers, make, threads, stacked):
    """Threads that divide into groups of layers and that do not, groups of several layers and of parts."""
    module = make(stack(name, layers))
    x, states = torch.randn(T, B, I), first_states(module)
    expected = one_by_one(module, x, states)
    for n in (1, 2, 3, 4, 7):
        threads(n)
        # Steps of int8 are short: of the other cells' some stacks are faster layer by layer.
        if n > 1 and (make is not fastrnn.quantize or name in ("lstm", "lstm_no_bias")):
            assert "layers in" in fastrnn.explain(module, x).split
        assert_same_bits(flat(*module(x, states)), expected)
    assert len(stacked) == 5
    assert all(result is not None for result in stacked)


@pytest.mark.parametrize("mask", ["lengths", "reset", "lengths+reset", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@each_layer
@torch.no_grad()
def test_masks_and_dtypes(name, dtype, mask, threads, stacked):
    threads(2)
    module, x = stack(name, dtype=dtype), torch.randn(T, B, I).to(dtype)
    states, masks = first_states(module, dtype), {}
    if mask == "packed":
        x = pack_padded_sequence(x, torch.tensor([T, 77, 9]))
    else:
        x, masks = random_masks(mask, x)
    assert "layers in 2 groups" in fastrnn.explain(module, x).split
    for made in (module, fastrnn.freeze(module)):
        assert_same_bits(flat(*made(x, states, **masks)), one_by_one(made, x, states, **masks))
        assert stacked[-1] is not None


def assert_in_turn(module, x, stacked, **masks):
    """The layers one after another, each for some of the steps."""
    assert "layers in" not in fastrnn.explain(module, x).split
    assert_same_bits(flat(*module(x, **masks)), one_by_one(module, x, **masks))
    assert stacked[-1] is not None


@pytest.mark.parametrize("mask", ["none", "lengths+reset", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layer
@torch.no_grad()
def test_layers_in_turn(name, dtype, mask, threads, stacked):
    """Of what lies between two layers no more rows than these steps' are there."""
    threads(2)
    steps, batch = 650, 24
    kind, own = LAYERS[name]
    width = 48 if mask == "none" else 160  # smaller ragged ones would run side by side
    module, x = kind(I, width, 4, **own).to(dtype).eval(), torch.randn(steps, batch, I).to(dtype)
    masks = {}
    if mask == "packed":
        lengths = torch.randint(1, steps + 1, (batch,))
        x = pack_padded_sequence(x, lengths.index_fill(0, torch.tensor([1]), steps), enforce_sorted=False)
    else:
        x, masks = random_masks(mask, x)
    for made in (module, fastrnn.freeze(module)):
        assert_in_turn(made, x, stacked, **masks)


@pytest.mark.parametrize(
    "make", [lambda m: m, fastrnn.freeze, fastrnn.quantize], ids=["", "freeze", "quantize"]
)
@torch.no_grad()
def test_units_of_layers_in_turn(make, threads, stacked):
    """Each member has some of the units of all rows, and meets the others in each step."""
    module, x = make(fastrnn.LSTM(8, 256, 2).eval()), torch.randn(600, 5, 8)
    for n in (1, 2, 3, 4):
        threads(n)
        forward = fastrnn.explain(module, x).split.partition("; training")[0]
        assert n == 1 or f"units in {n} parts" in forward
        assert_in_turn(module, x, stacked)


def test_what_lies_between_layers_does_not_grow_with_the_steps():
    shape = Shape(6000, 16, 64, 64)
    y = 4 * shape.T * shape.B * shape.H
    taken = memory.in_a_process("fastrnn", Case("gru", "forward", shape, "two layers"))
    assert y < taken < 1.5 * y


@pytest.mark.parametrize(("I", "H"), [(8, 192), (80, 256)])
@torch.no_grad()
def test_layers_of_unlike_numbers_of_threads(I, H, threads, stacked):
    """A short call's lower layer wakes fewer than the upper one."""
    module, x = fastrnn.LSTM(I, H, 2).eval(), torch.randn(1, 1, I)
    for n in (3, 4, 8):
        threads(n)
        assert_same_bits(flat(*module(x)), one_by_one(module, x))
        assert stacked[-1] is not None


@torch.no_grad()
def test_the_other_ways_to_call(threads, stacked):
    threads(2)
    module, x = stack("lstm"), torch.randn(T, B, I)
    expected = one_by_one(module, x)
    assert_same_bits(flat(*module(x)), expected)
    y, h, c = flat(*module(x[:, 1]))
    assert_same_bits([y, h, c], one_by_one(module, x[:, 1]))
    assert y.shape == (T, H)
    module.batch_first = True
    for given in (x.transpose(0, 1), x.transpose(0, 1).contiguous()):
        assert_same_bits(flat(*module(given)), [expected[0].transpose(0, 1), *expected[1:]])
    assert len(stacked) == 4
    assert all(result is not None for result in stacked)


@pytest.mark.parametrize("make", [fastrnn.freeze, fastrnn.quantize])
@torch.no_grad()
def test_packed_weights_with_strides(make, threads):
    """The operator's dense copies of them live as long as what reads them."""
    threads(2)
    module, x = make(stack("lstm")), torch.randn(T, B, I)
    assert "layers in 2 groups" in fastrnn.explain(module, x).split
    dense = [getattr(module, f"packed_l{k}") for k in range(3)]
    strided = [torch.stack([w, w], 1)[:, 0] for w in dense]
    assert not any(w.is_contiguous() for w in strided)
    given = ["lstm", x, list(first_states(module))]
    (y, last), (other, others) = (
        torch.ops.fastrnn.stack(*given, w, None, None, None) for w in (dense, strided)
    )
    assert_same_bits([y, *last], [other, *others])
    assert_same_bits([y, *last], one_by_one(module, x, tuple(given[2])))


@pytest.mark.skipif(sys.platform != "linux", reason="OMP_THREAD_LIMIT is of GNU OpenMP, on Linux alone")
def test_fewer_threads_than_asked_for():
    """Two of three: the team's groups are fewer than the plan's."""
    code = """
import torch, fastrnn
torch.set_num_threads(3)
module, x = fastrnn.LSTM(40, 80, 3), torch.randn(130, 3, 40)
with torch.no_grad():
    print(fastrnn.explain(module, x).split)
    y, (h, c) = module(x)
    expected, (h_n, c_n), _ = module(x, return_states=True)
print(all(torch.equal(a, b) for a, b in ((y, expected), (h, h_n), (c, c_n))))
"""
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2", "OMP_DYNAMIC": "false"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=limited)
    assert run.returncode == 0, run.stderr
    split, same = run.stdout.splitlines()
    assert "layers in 3 groups" in split
    assert same == "True"


@torch.no_grad()
def test_short_and_wide(threads, stacked):
    """Where one layer after another is faster the same operator runs them so."""
    threads(2)
    for shape in ((1, 1, I), (5, 3, I), (40, 40, I), (1, 40, I), (7, 0, I)):
        module, x = stack("gru"), torch.randn(shape)
        assert "layers" not in fastrnn.explain(module, x).split
        assert_same_bits(flat(*module(x)), one_by_one(module, x))
        assert stacked[-1] is not None


@torch.no_grad()
def test_explain_where_the_layers_are_taken_one_by_one(threads):
    """No wave is promised where `functional.stack` declines."""
    threads(2)
    module, x = stack("lstm"), torch.randn(T, B, I)
    assert "layers in" in fastrnn.explain(module, x).split
    with torch.autocast("cpu"):
        assert "layers in" not in fastrnn.explain(module, x).split
    assert "layers in" not in fastrnn.explain(module.half(), x.half()).split


def test_who_takes_the_layers_one_by_one(threads, stacked):
    threads(2)
    x = torch.randn(T, B, I)
    module = stack("lstm").requires_grad_(False)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(module(x)[0].sum(), x)
    assert gradient.abs().sum() > 0
    with torch.no_grad():
        expected = module(x)[0]
        assert stacked[-1] is not None
        with torch.autocast("cpu"):
            assert module(x)[0].dtype == torch.bfloat16
        with fastrnn.backend("reference"):
            torch.testing.assert_close(module(x)[0], expected)
        torch.testing.assert_close(torch.func.vmap(lambda x: module(x)[0])(x[None])[0], expected)
        module.half()
        assert module(x.half())[0].dtype == torch.float16
        assert [result is None for result in stacked] == [True, False, True, True, True, True]
        module.float().train().dropout = 0.5
        assert not torch.allclose(module(x)[0], expected)
        count = len(stacked)
        fastrnn.LSTM(I, H, 2, bidirectional=True)(x)
        assert len(stacked) == count == 6


@torch.no_grad()
def test_errors_are_the_layers(stacked):
    module, x = stack("gru"), torch.randn(T, B, I)
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    with pytest.raises(RuntimeError, match=r"w_hh must be torch\.float32 like the input, got torch\.float64"):
        module(x)
    assert stacked == []  # the layers were not run


@torch.no_grad()
@pytest.mark.parametrize("make", [lambda module: module, fastrnn.freeze], ids=["plain", "frozen"])
def test_what_no_check_explains_is_raised_as_it_is(make, monkeypatch):
    """Rather than hidden behind the layers one by one, at twice the cost."""

    def fails(*args):
        raise RuntimeError("no memory")

    module, x = make(stack("lstm")), torch.randn(T, B, I)
    expected = module(x)[0]
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "stack", fails)
        patch.setattr(kernels, "call", lambda *args: pytest.fail("a layer was run"))
        with pytest.raises(RuntimeError, match="no memory"):
            module(x)
    assert_same_bits([module(x)[0]], [expected])


def operator_arguments(layers=2):
    module = fastrnn.GRU(3, 4, layers)
    params = [p for group in module.all_weights for p in group]
    return module, ["gru", torch.randn(5, 2, 3), [torch.randn(layers, 2, 4)], params, None, None, None]


@torch.no_grad()
def test_the_operator():
    module, args = operator_arguments()
    torch.library.opcheck(torch.ops.fastrnn.stack.default, tuple(args))
    y, last = torch.ops.fastrnn.stack(*args)
    assert_same_bits([y, *last], one_by_one(module, args[1], args[2][0]))
    for position, spoiled, words in (
        (2, [], "needs states"),
        (2, [args[2][0][0]], r"must have 3 dimensions \[L, B, P\]"),
        (2, [args[2][0][:0]], "params must be a multiple of 0 layers"),
        (2, [args[2][0], args[2][0][:1]], "must be of 2 layers, got 1"),
        (3, args[3][:-1], "params must be a multiple of 2 layers, got 7"),
        (3, [args[3][0]] * 2, "must be what fastrnn::pack gave"),
        (1, args[1].half(), "takes float32, float64 and bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=words):
            torch.ops.fastrnn.stack(*args[:position], spoiled, *args[position + 1 :])
    packed = [getattr(fastrnn.freeze(module.double()), f"packed_l{k}") for k in range(2)]
    with pytest.raises(RuntimeError, match="packed for another dtype"):
        torch.ops.fastrnn.stack(*args[:3], packed, *args[4:])


@torch.no_grad()
def test_compiled(threads):
    """One operator in the graph; with gradients wanted, the layers'."""
    threads(2)
    names = []

    def backend(graph, example_inputs):
        names[:] = [str(node.target) for node in graph.graph.nodes if "fastrnn" in str(node.target)]
        return graph

    module, x = stack("lstm"), torch.randn(T, B, I)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    assert_same_bits(flat(*compiled(x)), flat(*module(x)))
    assert names == ["fastrnn.stack.default"]
    with torch.enable_grad():
        assert_same_bits(flat(*compiled(x)), flat(*module(x)))
    assert names == ["fastrnn.layer.default"] * 3


def test_compiled_errors_are_the_layers():
    module, x = stack("gru"), torch.randn(T, B, I)
    module.weight_hh_l1.data = module.weight_hh_l1.data.double()
    compiled = torch.compile(module, backend="eager")
    for grad in (False, True):
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(
                RuntimeError, match=r"w_hh must be torch\.float32 like the input, got torch\.float64"
            ),
        ):
            compiled(x)


def test_no_derivative_is_dropped():
    """Neither a gradient nor a tangent: eager modules run layer by layer, the operator refuses."""
    module, args = operator_arguments()
    with pytest.raises(RuntimeError, match="stack is for inference and has no derivatives"):
        torch.ops.fastrnn.stack(*args)
    compiled, x = torch.compile(module, backend="eager"), args[1]
    with torch.no_grad():
        assert_same_bits(flat(*compiled(x)), flat(*module(x)))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            assert forward_ad.unpack_dual(module(dual)[0]).tangent.abs().sum() > 0
            for call in (lambda: compiled(dual), lambda: torch.ops.fastrnn.stack(args[0], dual, *args[2:])):
                with pytest.raises(RuntimeError, match="no forward-mode AD"):
                    call()


def flops(args):
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        kernels.stack(*args)
    return counter.get_total_flops()


def test_flops():
    _, args = operator_arguments()
    assert flops(args) == 2 * 5 * 2 * 3 * 4 * (3 + 4 + 4 + 4)


@each_layer
def test_flops_of_packed_weights(name):
    module, x = stack(name), torch.randn(4, B, I)
    given = first_states(module)
    states = list(given) if isinstance(given, tuple) else [given]
    plain = [p for group in module.all_weights for p in group]
    expected = flops([module._cell, x, states, plain, None, None, None])
    for make in (fastrnn.freeze, fastrnn.quantize):
        packed = [getattr(make(module), f"packed_l{k}") for k in range(3)]
        assert flops([module._cell, x, states, packed, None, None, None]) == expected > 0


def test_an_exported_program_still_has_gradients():
    """Exported where none are wanted, called where they are."""
    model, x = fastrnn.LSTM(4, 8, 2), torch.randn(5, 2, 4)
    with torch.no_grad():
        program = torch.export.export(model, (x,)).module()
    y = program(x)[0]
    assert torch.equal(y, model(x)[0])
    y.sum().backward()
    assert all(p.grad is not None for p in program.parameters())


@torch.no_grad()
def test_the_operator_on_two_devices():
    """What it gave would be memory that nobody filled."""
    _, args = operator_arguments()
    args[3][1] = args[3][1].detach().to("meta")
    with pytest.raises(RuntimeError, match="not at the same device"):
        torch.ops.fastrnn.stack(*args)


@torch.no_grad()
def test_compiled_where_the_layers_are_taken_one_by_one():
    """Under autocast, and inside a transform."""
    module, x = stack("lstm"), torch.randn(5, B, I)

    def mapped(x):
        return torch.func.vmap(lambda x: module(x)[0])(x)

    xs = torch.stack([x, -x])
    compiled = torch.compile(mapped, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(xs), torch.stack([module(v)[0] for v in xs]))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = compiled(x)[0], module(x)[0]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@torch.no_grad()
def test_rows_of_int8_weights_have_room_in_the_widest_layer(threads, stacked):
    """The first one's of a wide x are those that a member's scratch must hold."""
    module, x = fastrnn.quantize(fastrnn.LSTM(3000, 128, 3).eval()), torch.randn(200, 2, 3000)
    expected = one_by_one(module, x)
    for n in (1, 2, 3):
        threads(n)
        assert_same_bits(flat(*module(x)), expected)
        assert stacked[-1] is not None
