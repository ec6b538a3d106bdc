"""`freeze` and `quantize`: the values, copies and files of packed and int8 weights."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from helpers import MASKS, random_case, random_masks
from made import LAYERS, OFF, ROUNDED, each_maker, layer, products_of_bfloat16, rounded
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import fastrnn
from fastrnn import functional, kernels, packed, reference
from fastrnn.reference import CELLS

each_isa = pytest.mark.parametrize("isa", kernels.instruction_sets())
# T, B, I, H, P: single elements, odd sizes, units beyond a vector, one row a step, many rows.
SHAPES = (
    (1, 1, 1, 1, 0),
    (5, 3, 4, 3, 0),
    (7, 13, 5, 33, 0),
    (3, 2, 3, 257, 0),
    (40, 1, 33, 130, 0),
    (9, 40, 17, 64, 0),
)
CASES = [(cell, *shape) for cell in CELLS for shape in SHAPES]
CASES += [("lstm", 6, 7, 3, 41, P) for P in (1, 5, 40)]
each_case = pytest.mark.parametrize("case", CASES, ids=str)


def flat(result):
    y, last, seq = result
    return [y, *last, *seq]


def quantized_error(cell, x, states, params, masks, D):
    """The largest difference to float64 with the same rounded weights, relative to the largest value."""
    q, scales, exact = rounded(params, D)
    weights = packed.pack(cell, q, scales, D)
    ours = flat(packed.layer(cell, x, states, weights, **{**OFF, **masks}, return_states=True))
    theirs = flat(reference.layer(cell, x.double(), [s.double() for s in states], exact, **masks))
    return max(float((a - b).abs().max() / (1 + b.abs().max())) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@each_case
def test_frozen_is_plain(case, mask):
    """The same bits where the plain call packs its weights too: from more than 16 rows on, or up to 256."""
    cell, T, B, I, H, P = case
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x, states, params = random_case(cell, T, B, I, H, D=2, P=P, dtype=dtype)
        x, masks = random_masks(mask, x)
        plain = flat(functional.layer(cell, x, states, params, **masks, return_states=True))
        weights = packed.pack(cell, params, [], 2)
        frozen = flat(packed.layer(cell, x, states, weights, **{**OFF, **masks}, return_states=True))
        for a, b in zip(frozen, plain, strict=True):
            # Products of bfloat16 take packed weights of few sequences too.
            few = B <= 4 and not (dtype == torch.bfloat16 and products_of_bfloat16())
            if (dtype == torch.bfloat16 and not products_of_bfloat16()) or (not few and T * B > 16):
                assert torch.equal(a, b)
            else:
                torch.testing.assert_close(a, b, **(ROUNDED if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("mask", MASKS)
@each_case
def test_quantized_is_float64_with_rounded_weights(case, mask):
    cell, T, B, I, H, P = case
    x, states, params = random_case(cell, T, B, I, H, D=2, P=P, dtype=torch.float32)
    x, masks = random_masks(mask, x)
    assert quantized_error(cell, x, states, params, masks, 2) < 2e-4


@each_isa
@pytest.mark.parametrize("cell", CELLS)
def test_each_instruction_set(cell, isa, use_isa):
    use_isa(isa)
    for T, B, H in ((9, 11, 37), (20, 1, 200), (3, 2, 64), (4, 4, 31), (2, 50, 70)):
        x, states, params = random_case(cell, T, B, 5, H, D=2, dtype=torch.float32)
        masks = {"lengths": torch.randint(0, T + 1, (B,))}
        assert quantized_error(cell, x, states, params, masks, 2) < 2e-4
        plain = flat(functional.layer(cell, x, states, params, **masks, return_states=True))
        weights = packed.pack(cell, params, [], 2)
        frozen = flat(packed.layer(cell, x, states, weights, **{**OFF, **masks}, return_states=True))
        for a, b in zip(frozen, plain, strict=True):
            torch.testing.assert_close(a, b)


@each_isa
@pytest.mark.parametrize("K", [1, 3, 512, 513, 516, 517, 4099, 20000])
def test_the_largest_sums(K, isa, use_isa):
    """Weights and inputs all at their largest, of either sign: what would overflow, would here."""
    use_isa(isa)
    x = torch.ones(1, 3, K)
    x[0, 1] = -1
    params = [torch.ones(2, K), torch.zeros(2, 2)]
    params[0][1] = -1
    q, scales, _ = rounded(params, 1)
    weights = packed.pack("rnn_relu", q, scales, 1)
    y, _, _ = packed.call("rnn_relu", x, [torch.zeros(1, 3, 2)], weights)
    expected = torch.tensor([[K, 0.0], [0.0, K], [K, 0.0]])
    torch.testing.assert_close(y[0], expected)
    # Ours end at -127, those of another program need not.
    others = packed.pack("rnn_relu", [torch.full_like(q[0], -128), q[1]], [torch.ones(2), scales[1]], 1)
    y, _, _ = packed.call("rnn_relu", x, [torch.zeros(1, 3, 2)], others)
    torch.testing.assert_close(y[0], torch.tensor([[0.0, 0.0], [128.0 * K, 128.0 * K], [0.0, 0.0]]))


@each_isa
def test_rows_that_are_not_finite(isa, use_isa):
    use_isa(isa)
    quantized = fastrnn.quantize(layer("lstm", 21, 33))
    x = torch.randn(3, 5, 21)
    expected = quantized(x)[0]
    x[1, 0, 20], x[1, 1, 3], x[1, 2] = float("nan"), float("-inf"), 0.0
    x[0, 3] = 1e-38
    y = quantized(x)[0]
    assert y[1:, :2].isnan().all()
    assert y[:, 2:].isfinite().all()
    assert torch.equal(y[:, 4], expected[:, 4])


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_bits_do_not_depend_on_threads(name, make):
    made = make(layer(name, 96, 300, 2, bidirectional=True))
    before = torch.get_num_threads()
    try:
        for T, B in ((20, 1), (6, 33)):
            x, results = torch.randn(T, B, 96), []
            for threads in (1, 2):
                torch.set_num_threads(threads)
                results.append(made(x)[0])
            assert torch.equal(*results)
    finally:
        torch.set_num_threads(before)


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_called_as_the_layer(name, make):
    """Every form of input and state, against the plain layer with the very weights."""
    plain = layer(name, 6, 9, 2, bidirectional=True, batch_first=True, dropout=0.5)
    made = make(plain)
    plain.eval()
    with torch.no_grad():
        for n, p in plain.named_parameters():
            if make is fastrnn.quantize and p.dim() == 2:
                p.copy_(getattr(made, f"{n}_int8") * getattr(made, f"{n}_scale")[:, None])
    x, lengths = torch.randn(4, 7, 6), torch.tensor([7, 0, 3, 5])
    some = torch.tensor([7, 1, 3, 5])
    _, hx = plain(x)
    calls = [
        lambda m: m(x),
        lambda m: m(x, hx),
        lambda m: m(x[0]),
        lambda m: m(x[:0]),
        lambda m: m(x, lengths=lengths, return_states=True),
        lambda m: m(x, reset=torch.arange(28).view(4, 7) % 3 == 1),
        lambda m: m(
            pack_padded_sequence(x, some, batch_first=True, enforce_sorted=False), return_states=True
        ),
    ]
    for call in calls:
        with torch.no_grad():
            ours, theirs = call(made), call(plain)
        torch.testing.assert_close(
            ours, theirs, **({"rtol": 1e-3, "atol": 1e-3} if make is fastrnn.quantize else {})
        )


@each_maker
@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_streamed(name, make):
    """A step by the short way gives what the long one gives, and errors have their words."""
    made = make(layer(name, 6, 40))
    x = torch.randn(8, 2, 6)
    whole, last = made(x)
    state = made(x[:1])[1]
    with torch.no_grad():
        for t in range(1, 8):
            y, state = made(x[t : t + 1], state)
            torch.testing.assert_close(y[0], whole[t])
        torch.testing.assert_close(state, last)
        with pytest.raises(RuntimeError, match=r"input_size\. Expected 6, got 5"):
            made(x[:1, :, :5], state)


@each_maker
@pytest.mark.parametrize("name", LAYERS)
def test_state_dict_and_copies(name, make):
    plain, other = layer(name, 6, 40, 2, bidirectional=True), layer(name, 6, 40, 2, bidirectional=True)
    for p in other.parameters():
        nn.init.normal_(p)
    x = torch.randn(9, 3, 6)
    made, target = make(plain), make(other)
    y = made(x)[0]
    assert not torch.equal(target(x)[0], y)
    target.load_state_dict(made.state_dict())
    assert torch.equal(target(x)[0], y)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made)), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x)[0], y)
        assert repr(twin) == repr(made)
    if make is fastrnn.freeze:
        other.load_state_dict(made.state_dict())
        assert torch.equal(make(other)(x)[0], y)
        target.load_state_dict(plain.state_dict())
        assert torch.equal(target(x)[0], y)
    else:
        with pytest.raises(RuntimeError, match="weight_ih_l0_int8"):
            target.load_state_dict(plain.state_dict())


def test_the_copy_is_on_its_own():
    plain = layer("lstm", 4, 8)
    made = fastrnn.freeze(plain)
    x = torch.randn(3, 2, 4)
    y = made(x)[0]
    with torch.no_grad():
        plain.weight_hh_l0.mul_(2)
    assert torch.equal(made(x)[0], y)
    assert plain.training
    assert not made.training
    assert not list(made.parameters())


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn_tanh"])
def test_error_beside_float32(name):
    """What the docstring of `quantize` says of random weights."""
    root_mean_square, most = {"lstm": (0.0006, 0.005), "gru": (0.0012, 0.008), "rnn_tanh": (0.0022, 0.013)}[
        name
    ]
    plain, x = layer(name, 256, 256), torch.randn(100, 8, 256)
    with torch.no_grad():
        error = fastrnn.quantize(plain)(x)[0] - plain(x)[0]
    assert error.square().mean().sqrt() < 1.2 * root_mean_square
    assert error.abs().max() < 1.2 * most


def test_size_is_a_quarter():
    def size(module):
        file = io.BytesIO()
        torch.save(module, file)
        state = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        return state, file.tell()

    plain = fastrnn.LSTM(512, 512)
    for ours, theirs in zip(size(fastrnn.quantize(plain)), size(plain), strict=True):
        assert ours < 0.26 * theirs


@pytest.mark.skipif(
    len(kernels.instruction_sets()) < 2, reason="compares instruction sets, and here is but one"
)
@each_maker
def test_another_machine(make, use_isa):
    """Packed for one instruction set: refused by one of other vectors; what is saved is packed anew."""
    use_isa("baseline")
    made = make(layer("gru", 4, 8))
    state, file, x = made.state_dict(), pickle.dumps(made), torch.randn(3, 2, 4)
    y = made(x)[0]
    use_isa(kernels.instruction_sets()[-1])
    with pytest.raises(RuntimeError, match="packed for vectors of 16 bytes"):
        made(x)
    torch.testing.assert_close(pickle.loads(file)(x)[0], y)
    made.load_state_dict(state)
    torch.testing.assert_close(made(x)[0], y)


@pytest.mark.skipif(
    not {"avx512", "avx512bf16"} <= {*kernels.instruction_sets()}, reason="needs AVX-512 with bfloat16"
)
def test_packed_singly_or_in_pairs(use_isa):
    use_isa("avx512")
    frozen = fastrnn.freeze(layer("lstm", 4, 8).bfloat16())
    x = torch.randn(3, 2, 4, dtype=torch.bfloat16)
    y = frozen(x)[0]
    use_isa("avx512bf16")
    with pytest.raises(RuntimeError, match="packed for another instruction set than avx512bf16: freeze"):
        frozen(x)
    torch.testing.assert_close(pickle.loads(pickle.dumps(frozen))(x)[0], y, **ROUNDED)


@each_maker
@pytest.mark.parametrize("layers", [1, 2])
def test_weights_that_were_replaced(make, layers):
    """The packed ones would go on computing, without a word."""
    made, x = make(fastrnn.GRU(3, 4, layers)), torch.randn(5, 2, 3)
    other = {name: torch.zeros_like(t) for name, t in made.state_dict().items()}
    with torch.no_grad(), pytest.raises(RuntimeError, match="layer was replaced, whose weights are packed"):
        torch.func.functional_call(made, other, (x,))
    expected = made(x)[0].detach()
    own = {name: t.detach() for name, t in made.state_dict().items()}
    with torch.no_grad():
        assert torch.equal(torch.func.functional_call(made, own, (x,))[0], expected)
    made.load_state_dict(other)
    with torch.no_grad():
        assert not torch.equal(made(x)[0], expected)
        made.bias_hh_l0 = made.bias_hh_l0.clone()
        with pytest.raises(RuntimeError, match="bias_hh_l0 of a"):
            made(x)


@each_maker
def test_a_transform_is_refused_by_its_name(make):
    made, x = make(fastrnn.GRU(3, 4)), torch.randn(5, 2, 3)

    def call(x):
        return made(x)[0]

    for transformed in (lambda: torch.func.vmap(call)(x[None]), lambda: torch.func.jvp(call, (x,), (x,))):
        with torch.no_grad(), pytest.raises(RuntimeError, match=r"knows no transforms of torch\.func: call"):
            transformed()


@each_maker
def test_forward_mode_of_others(make):
    """A dual level is one of all threads: only who brings a tangent is refused."""
    made, x = make(fastrnn.GRU(3, 4)), torch.randn(5, 2, 3)
    with torch.no_grad():
        expected, graph = made(x)[0], torch.compile(made, fullgraph=True, backend="eager")
        assert torch.equal(graph(x)[0], expected)
        with torch.autograd.forward_ad.dual_level():
            for call in (made, graph):
                assert torch.equal(call(x)[0], expected)
                with pytest.raises(RuntimeError, match="has no derivatives"):
                    call(torch.autograd.forward_ad.make_dual(x, x))[0]


@each_maker
def test_a_load_that_failed(make):
    """Its state and its packed weights are no longer the same."""
    made, x = make(fastrnn.GRU(3, 4)), torch.randn(5, 2, 3)
    state = {name: t.clone() for name, t in made.state_dict().items()}
    bad = {name: t.half() if t.is_floating_point() else t for name, t in state.items()}
    graph = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        expected = made(x)[0]
        assert torch.equal(graph(x)[0], expected)
        with pytest.raises(RuntimeError):
            made.load_state_dict(bad, assign=True)
        for call in (made, graph):
            with pytest.raises(Exception, match="no packed weights since a load or a move that failed"):
                call(x)
        made.load_state_dict(state, assign=True)
        for call in (made, graph):
            assert torch.equal(call(x)[0], expected)


@each_maker
def test_a_move_that_failed(make):
    """Further in, where nothing of the layer itself was moved: it goes on."""
    plain, x = fastrnn.GRU(3, 4), torch.randn(5, 2, 3)
    plain.inner = fastrnn.quantize(fastrnn.GRU(3, 4))
    made = make(plain)
    expected = made(x)[0].detach()
    with pytest.raises(RuntimeError, match=r"cannot be moved to torch\.float64"):
        made.double()
    assert torch.equal(made(x)[0], expected)


@each_maker
def test_the_model_stays_as_it_was(make):
    """Also the state of its parametrizations, which a call in train mode changes."""
    model = torch.nn.utils.parametrizations.spectral_norm(fastrnn.LSTM(4, 8), "weight_hh_l0")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    made = make(model)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    x = torch.randn(5, 2, 4)
    bound = {"rtol": 0, "atol": 0.05} if make is fastrnn.quantize else {}
    torch.testing.assert_close(made(x)[0], model.eval()(x)[0], **bound)


@each_maker
def test_what_a_user_has_added_to_a_layer(make):
    plain = fastrnn.LSTM(4, 8)
    plain.h0, plain.norm = torch.nn.Parameter(torch.ones(1, 1, 8)), torch.nn.LayerNorm(8)
    plain.register_buffer("calls", torch.zeros(()))
    plain.register_buffer("scale", torch.ones(()), persistent=False)
    made, x = make(plain), torch.randn(5, 2, 4)
    for one in (made, pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert torch.equal(one.h0, plain.h0)
        assert torch.equal(one.scale, plain.scale)
        assert one.norm.weight.requires_grad
        one.calls = one.calls + 1
        torch.testing.assert_close(one(x)[0], made(x)[0])
        added = {name for name in plain.state_dict() if name.startswith(("h0", "norm", "calls"))}
        assert added < one.state_dict().keys()
    if make is fastrnn.freeze:
        made.load_state_dict(plain.state_dict())
        plain.load_state_dict(made.state_dict())
    torch.nn.utils.parametrize.register_parametrization(plain, "h0", torch.nn.Tanh())
    with pytest.raises(ValueError, match=r"^the layer: h0 is parametrized and no weight"):
        make(plain)


@each_maker
def test_a_users_buffer_of_another_type_is_no_obstacle(make):
    plain = fastrnn.GRU(3, 4)
    plain.register_buffer("seen", torch.zeros(2, dtype=torch.float16))
    made, x = make(plain), torch.randn(5, 2, 3)
    expected = made(x)[0].detach()
    assert torch.equal(made.to("cpu")(x)[0], expected)


def test_a_step_of_a_projected_layer_wider_than_all_else():
    """What its projection meets takes more room than x or h."""
    made, x = fastrnn.quantize(fastrnn.LSTM(8, 1024, proj_size=8)), torch.randn(1, 40, 8)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(made(x)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
