"""Layers to freeze and to quantize, for the tests of both."""

from __future__ import annotations

import pytest
import torch

import fastrnn
from fastrnn import inference, kernels

MAKERS = {"freeze": fastrnn.freeze, "quantize": fastrnn.quantize}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
LAYERS = {
    "lstm": (fastrnn.LSTM, {}),
    "lstm_proj": (fastrnn.LSTM, {"proj_size": 5}),
    "gru": (fastrnn.GRU, {}),
    "gru_reset_before": (fastrnn.GRU, {"reset_after": False}),
    "rnn_tanh": (fastrnn.RNN, {}),
    "rnn_relu": (fastrnn.RNN, {"nonlinearity": "relu"}),
}
ROUNDED = {"rtol": 0.02, "atol": 0.02}  # h, where sums in another order round it to another bfloat16
OFF = {"lengths": None, "batch_sizes": None, "reset": None}


def layer(name="lstm", *args, **options):
    kind, own = LAYERS[name]
    torch.manual_seed(3)
    return kind(*args, **own, **options)


def rounded(params, D):
    """int8 params and their scales, as `packed.pack` wants them, and the float64 weights they stand for."""
    q, scales, exact = [], [], []
    for p in params:
        if p.dim() == 1:
            q.append(p)
            exact.append(p.double())
            continue
        weight, scale = inference.rounded_rows(p)
        assert ((weight * scale[:, None] - p).abs() <= scale[:, None] * 0.5001).all()
        q.append(weight)
        scales.append(scale)
        exact.append(weight.double() * scale.double()[:, None])
    return q, scales, exact


def products_of_bfloat16():
    return kernels.instruction_set() in ("amx", "avx512bf16")
