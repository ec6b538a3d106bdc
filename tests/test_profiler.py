"""What a profile shows: the operators by name, and which layer's they are."""

from __future__ import annotations

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import fastrnn

LAYERS = (
    ("LSTM", {}),
    ("LSTM", {"proj_size": 3}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"nonlinearity": "relu"}),
)


def names(call, **options):
    """How often each name comes up."""
    with profile(activities=[ProfilerActivity.CPU], **options) as profiled:
        call()
    return {event.key: event.count for event in profiled.key_averages()}


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_eager(kind, options):
    layer, x = getattr(fastrnn, kind)(5, 8, num_layers=2, **options), torch.randn(3, 2, 5)
    with torch.no_grad():
        counts = names(lambda: layer(x))
    assert counts["fastrnn::stack"] == 1  # all layers
    assert not {"fastrnn::layer", "fastrnn::layer_backward"} & set(counts)
    counts = names(lambda: layer(x)[0].sum().backward())
    assert counts["fastrnn::layer"] == counts["fastrnn::layer_backward"] == 2
    # The operators are the same for every cell; around them stands the Function of this one.
    assert counts[f"{kind}Function"] == counts[f"{kind}FunctionBackward"] == 2


def test_module_names():
    """A profile with stacks names the module, in inference as well."""

    def named(layer):
        with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], with_stack=True) as profiled:
            layer(torch.randn(3, 2, 5))
        return any(event.name.startswith("nn.Module: GRU") for event in profiled.events())

    # torch 2.11's profiler names no module, torch.nn's neither; any other torch's has to.
    if torch.__version__.startswith("2.11.") and not named(torch.nn.GRU(5, 8)):
        pytest.skip("the profiler of torch 2.11 names no modules, torch.nn.GRU neither")
    assert named(fastrnn.GRU(5, 8))


def test_shapes():
    """record_shapes keeps the input's, by which calls of one operator are told apart."""
    layer = fastrnn.LSTM(5, 8)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for T in (3, 4):
            layer(torch.randn(T, 2, 5))[0].sum().backward()
    shapes = {"fastrnn::layer": [], "fastrnn::layer_backward": []}
    for event in profiled.events():
        if event.name in shapes:
            shapes[event.name].append(event.input_shapes[1])  # x; dy
    assert shapes == {
        "fastrnn::layer": [[3, 2, 5], [4, 2, 5]],
        "fastrnn::layer_backward": [[3, 2, 8], [4, 2, 8]],
    }


def test_compiled():
    layer, x = fastrnn.LSTM(5, 8), torch.randn(3, 2, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    compiled(x)[0].sum().backward()
    counts = names(lambda: compiled(x)[0].sum().backward())
    assert counts["fastrnn::layer"] == counts["fastrnn::layer_backward"] == 1
