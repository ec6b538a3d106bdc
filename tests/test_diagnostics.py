"""fastrnn.diagnostics beside autograd on a loop over single steps, and torch.func.jacrev of one step."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import F64, hidden, randn
from torch.nn.utils.parametrizations import orthogonal
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.profiler import ProfilerActivity, profile

import fastrnn
from fastrnn import flow, jacobians
from fastrnn.diagnostics import gradient_flow
from fastrnn.reference import CELLS as REGISTRY

T, B, I, H = 7, 3, 4, 5
CELLS = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 2}),
    "gru": (fastrnn.GRU, {}),
    "gru_reset_before": (fastrnn.GRU, {"reset_after": False}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
}
each_cell = pytest.mark.parametrize("cell", CELLS)
TIGHT = 1e-13  # some 450 roundings of float64: sums of H terms, and a decomposition of H x H
CLOSE = {"rtol": 1e-11, "atol": 1e-13}  # conftest's of float64 gradients, or closer


def build(cell, *sizes, **options):
    kind, extra = CELLS[cell]
    torch.manual_seed(3)
    return kind(*(sizes or (I, H)), dtype=F64, **extra, **options)


def as_list(flows):
    return flows if isinstance(flows, list) else [flows]


def parameter(layer, name):
    return getattr(layer, name, None)


def step_of(layer, suffix):
    """One step of a direction: (x or its product, states) -> new states."""
    w_ih, w_hh, b_ih, b_hh, w_hr = (
        parameter(layer, f"{name}_{suffix}")
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    )

    def step(x, states):
        gx = torch.nn.functional.linear(x, w_ih, b_ih)
        new = REGISTRY[layer._cell].step(gx, states[0], states, w_hh, b_hh)
        return new if w_hr is None else (new[0] @ w_hr.T, *new[1:])

    return step


def loop(layer, x, hx=None, lengths=None, reset=None):
    """The output [T, B, D*P], and for each direction of each layer every step's x, old and new states."""
    D = 2 if layer.bidirectional else 1
    steps, batch = x.shape[:2]
    lengths = torch.full((batch,), steps) if lengths is None else lengths
    reset = torch.zeros(steps, batch, dtype=torch.bool) if reset is None else reset
    two = layer.mode == "LSTM"
    if hx is None:
        K, P = layer.num_layers * D, layer.proj_size or layer.hidden_size
        hx = [x.new_zeros(K, batch, P)] + [x.new_zeros(K, batch, layer.hidden_size)] * two
    hx = list(hx) if two else [hx] if isinstance(hx, torch.Tensor) else hx
    runs = []
    for k in range(layer.num_layers):
        outs = []
        for d in range(D):
            step = step_of(layer, f"l{k}" + "_reverse" * d)
            s, run = tuple(h[k * D + d] for h in hx), {}
            for t in reversed(range(steps)) if d else range(steps):
                boundary = t + d
                if boundary < steps:
                    cut = (reset[boundary] & (boundary < lengths))[:, None]
                    s = tuple(torch.where(cut, 0, v) for v in s)
                new = step(x[t], s)
                for v in new:
                    v.retain_grad()
                run[t] = (x[t].detach(), [v.detach() for v in s], new)
                on = (t < lengths)[:, None]
                s = tuple(torch.where(on, n, v) for n, v in zip(new, s, strict=True))
            outs.append(
                torch.stack([torch.where((t < lengths)[:, None], run[t][2][0], 0) for t in range(steps)])
            )
            runs.append(run)
        x = torch.cat(outs, -1)
    return x, runs


def expected_norms(runs, state):
    zero = torch.zeros(1, dtype=F64)
    return [
        torch.stack([(zero if g is None else g).norm() for g in (run[t][2][state].grad for t in sorted(run))])
        for run in runs
    ]


def assert_norms(flows, runs):
    two = len(runs[0][0][2]) == 2
    for found, name in ((0, "norms"), (1, "norms_c"))[: 1 + two]:
        for one, want in zip(as_list(flows), expected_norms(runs, found), strict=True):
            torch.testing.assert_close(getattr(one, name), want, **CLOSE)


def weighed(output):
    """A loss that reads every output, nonlinearly."""
    weights = torch.linspace(-1, 2, output.numel(), dtype=output.dtype, device=output.device)
    return (output.sin() * weights.view(output.shape)).sum()


@pytest.mark.parametrize("positive", [True, False])
def test_linear_recurrence(positive):
    """||dL/dh_k|| is ||(R^T)^(T-1-k) 1||: a relu network that stays positive is linear."""
    layer = fastrnn.RNN(I, H, nonlinearity="relu", dtype=F64)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand_like(p) * 0.3)
        if not positive:
            layer.weight_hh_l0.mul_(torch.randn(H, H, dtype=F64).sign())
            layer.bias_ih_l0.add_(50.0)
    found = gradient_flow(layer, torch.rand(40, 1, I, dtype=F64))
    v, R = torch.ones(H, dtype=F64), layer.weight_hh_l0.detach()
    want = [v.norm()]
    for _ in range(39):
        v = R.T @ v
        want.append(v.norm())
    torch.testing.assert_close(found.norms, torch.stack(want[::-1]), rtol=1e-12, atol=0)
    values = torch.linalg.svdvals(R).expand(39, 1, H)
    torch.testing.assert_close(found.singular_values, values, rtol=1e-12, atol=1e-14)


@each_cell
@pytest.mark.parametrize("loss", [None, weighed])
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, False), (1, True), (3, True)])
def test_norms_are_autograds(cell, layers, both, loss):
    layer = build(cell, num_layers=layers, bidirectional=both)
    x, hx = randn(T, B, I), hidden(layer, B)
    output, runs = loop(layer, x, hx)
    (output[-1].sum() if loss is None else loss(output)).backward()
    layer.zero_grad()
    flows = gradient_flow(layer, x, hx, loss=loss)
    assert isinstance(flows, list) == (layers > 1 or both)
    assert_norms(flows, runs)
    assert all(p.grad is None for p in layer.parameters())


def expected_singular_values(layer, runs):
    """[T-1, B, S] for each direction of each layer, by jacrev; entry j is between steps j and j+1."""
    D = 2 if layer.bidirectional else 1
    result = []
    for n, run in enumerate(runs):
        step, later = step_of(layer, f"l{n // D}" + "_reverse" * (n % D)), 0 if n % D else 1

        def flat(s, x, step=step, widths=tuple(v.shape[-1] for v in run[0][2])):
            return torch.cat(step(x, s.split(list(widths), -1)), -1)

        rows = []
        for j in range(len(run) - 1):
            x, old, _ = run[j + later]
            J = torch.func.vmap(torch.func.jacrev(flat))(torch.cat(old, -1), x)
            rows.append(torch.linalg.svdvals(J))
        result.append(torch.stack(rows).detach())
    return result


@each_cell
@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, True)])
def test_singular_values_are_jacrevs(cell, layers, both, monkeypatch):
    monkeypatch.setattr(flow, "_AT_ONCE", 500)  # several rounds
    layer = build(cell, num_layers=layers, bidirectional=both)
    with torch.no_grad():
        for p in layer.parameters():
            p.mul_(2.5)  # away from the linear range
    x, hx = randn(T, B, I), hidden(layer, B)
    _, runs = loop(layer, x, hx)
    for one, want in zip(
        as_list(gradient_flow(layer, x, hx)), expected_singular_values(layer, runs), strict=True
    ):
        torch.testing.assert_close(one.singular_values, want, rtol=TIGHT, atol=TIGHT)
        assert one.singular_values.shape == (T - 1, B, sum(s.shape[-1] for s in runs[0][0][1]))
        assert bool((one.singular_values.diff(dim=-1) <= 0).all())


def test_every_layers_cell_has_its_jacobian():
    """A cell of one's own need not: docs/guide/adding_a_cell.md."""
    assert {build(cell)._cell for cell in CELLS} == set(jacobians.STEPS) <= set(REGISTRY)


@each_cell
def test_lengths_and_reset(cell):
    layer = build(cell, num_layers=2, bidirectional=True)
    x, lengths = randn(T, B + 1, I), torch.tensor([4, T, 0, 6])
    x[4:, 0] = math.nan  # padding reaches nothing
    reset = torch.rand(T, B + 1) < 0.25
    reset[0, 1] = True  # this sequence does not see its first state
    assert bool(reset[1:4].any())
    hx = hidden(layer, B + 1)
    output, runs = loop(layer, torch.where(x.isnan(), 0, x), hx, lengths, reset)
    (output[3, 0] + output[T - 1, 1] + output[5, 3]).sum().backward()
    flows = gradient_flow(layer, x, hx, lengths=lengths, reset=reset)
    assert_norms(flows, runs)
    wanted = expected_singular_values(layer, runs)
    for n, (one, want) in enumerate(zip(flows, wanted, strict=True)):
        within = torch.arange(1, T)[:, None] < lengths
        cut = within & reset[1:]
        values = one.singular_values
        assert bool(values[~within].isnan().all()), n
        assert bool((values[cut] == 0).all())
        torch.testing.assert_close(values[within & ~cut], want[within & ~cut], rtol=TIGHT, atol=TIGHT)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("sort", [False, True])
def test_packed_sequences(cell, batch_first, sort):
    layer = build(cell, num_layers=2, bidirectional=True, batch_first=batch_first)
    lengths = torch.tensor([T, 5, 2]) if sort else torch.tensor([2, T, 5])
    x = randn(B, T, I) if batch_first else randn(T, B, I)
    packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=sort)
    hx = hidden(layer, B)

    def loss(output):
        return weighed(pad_packed_sequence(output)[0] if isinstance(output, tuple) else output)

    def time_first(output):
        return weighed(output.transpose(0, 1) if batch_first else output)

    given = layer(packed, hx)[0]
    seen = []
    for ours, want in ((None, None), (loss, time_first)):
        flows = gradient_flow(layer, packed, hx, loss=ours and (lambda o: (seen.append(o), loss(o))[1]))
        for one, other in zip(flows, gradient_flow(layer, x, hx, lengths=lengths, loss=want), strict=True):
            torch.testing.assert_close(one.norms, other.norms, **CLOSE)
            torch.testing.assert_close(one.singular_values, other.singular_values, equal_nan=True, **CLOSE)
    for mine, theirs in zip(seen[0], given, strict=True):  # the loss reads what the layer gives
        torch.testing.assert_close(mine, theirs, **CLOSE) if theirs is not None else None


@each_cell
def test_batch_first_and_unbatched(cell):
    layer, x = build(cell, num_layers=2), randn(T, B, I)
    whole = gradient_flow(layer, x)
    first = gradient_flow(build(cell, num_layers=2, batch_first=True), x.transpose(0, 1))
    single = [gradient_flow(layer, x[:, b], hidden(layer, None) if b else None) for b in range(B)]
    for n in range(2):
        torch.testing.assert_close(first[n].norms, whole[n].norms, **CLOSE)
        torch.testing.assert_close(first[n].singular_values, whole[n].singular_values, **CLOSE)
        torch.testing.assert_close(single[0][n].singular_values, whole[n].singular_values[:, 0], **CLOSE)
        want = gradient_flow(layer, x[:, 1:2], tuple_map(hidden(layer, None)))[n]
        torch.testing.assert_close(single[1][n].norms, want.norms, **CLOSE)


@pytest.mark.parametrize("batch_first", [False, True])
def test_reset_lies_as_the_input_does(batch_first):
    x, reset = randn(T, B, I), torch.rand(T, B) < 0.3
    want = gradient_flow(build("gru"), x, reset=reset)
    layer = build("gru", batch_first=batch_first)
    across = (lambda t: t.transpose(0, 1)) if batch_first else lambda t: t
    found = gradient_flow(layer, across(x), reset=across(reset))
    torch.testing.assert_close(found.norms, want.norms, **CLOSE)
    torch.testing.assert_close(found.singular_values, want.singular_values, **CLOSE)
    single = gradient_flow(layer, x[:, 1], reset=reset[:, 1])
    want = gradient_flow(build("gru"), x[:, 1:2], reset=reset[:, 1:2])
    torch.testing.assert_close(single.norms, want.norms, **CLOSE)
    torch.testing.assert_close(single.singular_values, want.singular_values[:, 0], **CLOSE)


def test_sequences_of_one_step_are_read():
    """The default loss has a share of each, and none of an empty one."""
    found = gradient_flow(build("gru"), randn(T, 3, I), lengths=torch.tensor([1, 0, 1]))
    assert found.norms.tolist() == pytest.approx([math.sqrt(2 * H)] + [0.0] * (T - 1))


def test_a_layer_made_in_inference_mode():
    with torch.inference_mode():
        layer = build("lstm_proj")
    x = randn(T, B, I)
    assert torch.equal(gradient_flow(layer, x).norms, gradient_flow(build("lstm_proj"), x).norms)


def tuple_map(hx):
    return hx.unsqueeze(1) if isinstance(hx, torch.Tensor) else tuple(h.unsqueeze(1) for h in hx)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_torchs_layers_and_parametrized_ones(kind):
    theirs = getattr(torch.nn, kind)(I, H, dtype=F64)
    x = randn(T, B, I)
    orthogonal(theirs, "weight_hh_l0")
    before = type(theirs)
    found = gradient_flow(theirs, x)
    assert found.name == kind
    assert type(theirs) is before
    assert "passes" not in vars(theirs)
    plain = getattr(fastrnn, kind)(I, H, dtype=F64)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(getattr(theirs, name))
    torch.testing.assert_close(found.norms, gradient_flow(plain, x).norms, **CLOSE)


def test_frozen_parameters_no_grad_and_inference_mode():
    layer, x = build("gru", num_layers=2), randn(T, B, I)
    want = gradient_flow(layer, x)
    layer.requires_grad_(False)
    with torch.no_grad():
        again = gradient_flow(layer, x)
    with torch.inference_mode():
        inferred = gradient_flow(layer, x + 0, torch.zeros(2, B, H, dtype=F64))
    for a, b, c in zip(want, again, inferred, strict=True):
        assert torch.equal(a.norms, b.norms)
        assert torch.equal(a.norms, c.norms)
        assert not a.norms.requires_grad
        assert not a.singular_values.requires_grad


def test_dropout_acts_as_the_mode_says():
    layer, x = build("lstm", num_layers=2, dropout=0.5), randn(T, B, I)
    calm = gradient_flow(layer.eval(), x)[0].norms
    torch.testing.assert_close(calm, gradient_flow(build("lstm", num_layers=2), x)[0].norms, **CLOSE)
    torch.manual_seed(1)
    first = gradient_flow(layer.train(), x)[0].norms
    torch.manual_seed(1)
    assert torch.equal(gradient_flow(layer, x)[0].norms, first)
    assert not torch.allclose(first, calm)


def test_one_pass_by_the_fused_operators():
    layer, x = fastrnn.LSTM(I, H, num_layers=2, bidirectional=True), torch.randn(50, B, I)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        gradient_flow(layer, x)
    counts = {event.key: event.count for event in profiled.key_averages()}
    assert counts["fastrnn::layer"] == counts["fastrnn::layer_backward"] == 2


@each_cell
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_dtypes(cell, dtype):
    layer, x = build(cell), randn(T, B, I)
    want = gradient_flow(layer, x)
    found = gradient_flow(layer.to(dtype), x.to(dtype))
    close = {"rtol": 1e-4, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.03}
    for name in ("norms", "singular_values"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name).double(), getattr(want, name), **close)


def test_autocast():
    layer, x = fastrnn.GRU(I, H, num_layers=2), torch.randn(T, B, I)
    want = gradient_flow(layer, x)
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_flow(layer, x)
        _ = found[0].singular_values  # computed here
        inside = gradient_flow(fastrnn.LSTM(I, H, proj_size=2), x)
        values = inside.singular_values
    del inside.singular_values
    assert torch.equal(inside.singular_values, values)  # their products are not autocast's
    close = dict.fromkeys(("rtol", "atol"), 2 * torch.finfo(torch.bfloat16).eps)  # 0.3 over 20 seeds
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.norms, b.norms, **close)
        torch.testing.assert_close(a.singular_values, b.singular_values, **close)


def test_a_state_that_is_not_finite():
    layer, x = build("rnn_relu"), randn(T, B, I)
    x[2, 1] = math.inf
    found = gradient_flow(layer, x)
    values = found.singular_values
    assert bool(values[:, 0].isfinite().all())
    assert found.summary()
    # c * f' is not finite, and neither is the Jacobian.
    c = torch.zeros(1, B, H, dtype=F64)
    c[0, 1] = math.inf
    values = gradient_flow(build("lstm"), randn(T, B, I), (torch.zeros_like(c), c)).singular_values
    assert values.isnan().all(-1).all(0).tolist() == [False, True, False]


@each_cell
def test_one_step_and_no_sequence(cell):
    layer = build(cell, num_layers=2)
    for x, shape in ((randn(1, B, I), (0, B)), (randn(T, 0, I), (T - 1, 0)), (randn(1, I), (0,))):
        for one in gradient_flow(layer, x):
            assert one.norms.shape == x.shape[:1]
            assert one.singular_values.shape[:-1] == shape
            assert one.verdict == ("none" if x.numel() == 0 else "start")
            assert one.summary()


def test_inside_a_compiled_function():
    layer = fastrnn.GRU(I, H, dtype=F64)

    def norms(x):
        return gradient_flow(layer, 2 * x).norms + 1

    x = randn(T, B, I)
    torch.testing.assert_close(torch.compile(norms, backend="eager")(x), norms(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@each_cell
def test_on_the_gpu(cell):
    layer, x = build(cell, num_layers=2, bidirectional=True), randn(T, B, I)
    want = gradient_flow(layer, x, loss=weighed)
    with torch.backends.cudnn.flags(allow_tf32=False):
        found = gradient_flow(layer.float().cuda(), x.float().cuda(), loss=weighed)
    # Some 800 roundings of float32, as for the kernels: T steps of sums of H terms, through two layers.
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a.norms.cpu().double(), b.norms, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.singular_values.cpu().double(), b.singular_values, rtol=1e-4, atol=1e-5)
        assert a.norms.is_cuda
        assert a.verdict == b.verdict


@pytest.mark.parametrize(
    ("call", "kind", "part"),
    [
        (lambda layer, x: gradient_flow(torch.nn.Linear(I, H), x), TypeError, "got Linear"),
        (lambda layer, x: gradient_flow(fastrnn.GRUCell(I, H), x), TypeError, "got GRUCell"),
        (lambda layer, x: gradient_flow(fastrnn.freeze(layer), x), TypeError, "frozen"),
        (
            lambda layer, x: gradient_flow(torch.nn.Sequential(torch.nn.GRU(I, H)), x),
            TypeError,
            r"Sequential; give it a layer inside this, get_submodule\('0'\)",
        ),
        (lambda layer, x: gradient_flow(fastrnn.Bidirectional(layer), x), TypeError, "'forward_layer'"),
        (lambda layer, x: gradient_flow(torch.compile(layer), x), TypeError, "'_orig_mod'"),
        (lambda layer, x: gradient_flow(layer, x[0, 0]), ValueError, "2D or 3D"),
        (lambda layer, x: gradient_flow(layer, "x"), TypeError, "input must be a Tensor"),
        (lambda layer, x: gradient_flow(layer, x[..., 1:]), RuntimeError, "input_size"),
        (lambda layer, x: gradient_flow(layer, x[:0]), RuntimeError, "larger than 0"),
        (lambda layer, x: gradient_flow(layer, x, x), RuntimeError, "Expected hidden"),
        (lambda layer, x: gradient_flow(layer, x, loss=lambda o: o), ValueError, "one real number"),
        (lambda layer, x: gradient_flow(layer, x, loss=lambda o: 3.0), ValueError, "got float"),
        (lambda layer, x: gradient_flow(layer, x, loss=lambda o: o.detach().sum()), ValueError, "depend"),
        (lambda layer, x: gradient_flow(layer, x, loss=3), TypeError, "loss must be"),
        (lambda layer, x: gradient_flow(layer, x, lengths=torch.tensor([T + 1] * B)), ValueError, "lengths"),
        (lambda layer, x: gradient_flow(layer, x, reset=torch.ones(2)), ValueError, "reset"),
        (lambda layer, x: gradient_flow(layer, x.cdouble()), ValueError, "real layers"),
        (
            lambda layer, x: gradient_flow(layer, pack_padded_sequence(x.cdouble(), [T] * B)),
            ValueError,
            "real layers",
        ),
    ],
)
def test_errors(call, kind, part):
    with pytest.raises(kind, match=part):
        call(build("gru"), randn(T, B, I))


def test_a_model_around_a_layer_is_left_alone():
    model = torch.nn.Sequential(torch.nn.GRU(I, H))
    with pytest.raises(TypeError):
        gradient_flow(model, randn(T, B, I))
    assert type(model[0]) is torch.nn.GRU
