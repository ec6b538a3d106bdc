"""Probes of docs/compatibility.md: sequences and states, training and types, weights and copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from probing import F64, B, H, I, T, Wrong, example, expect, make, plain, probe, same, trained, wide
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastrnn

SEQUENCES = "Sequences and states"
ENDS = [4, 0, 6]


@probe(SEQUENCES, "sequences of unequal lengths, in any order")
def unsorted_lengths(library: Any, kind: str) -> None:
    layer, x, ends = make(library, kind), example(), torch.tensor([4, 1, 6])
    packed = pack_padded_sequence(x, ends, enforce_sorted=False)
    truth = plain(kind, wide(layer), x.double())[0]
    same(pad_packed_sequence(layer(packed)[0])[0], truth * (torch.arange(T)[:, None] < ends)[..., None])


@probe(SEQUENCES, "... and empty ones among them (torch.nn: a PackedSequence; ours: `lengths=`)")
def zero_lengths(library: Any, kind: str) -> None:
    layer, x, ends = make(library, kind), example(), torch.tensor(ENDS)
    if library is nn:
        y = pad_packed_sequence(layer(pack_padded_sequence(x, ends, enforce_sorted=False))[0])[0]
    else:
        y = layer(x, lengths=ends)[0]
    truth = plain(kind, wide(layer), x.double())[0]
    same(y, truth * (torch.arange(T)[:, None] < ends)[..., None])


@probe(SEQUENCES, "the state set to zero inside a sequence, in one call")
def reset_inside(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    reset = torch.zeros(T, B, dtype=torch.bool)
    reset[2, 0] = reset[4, 1] = reset[5, 0] = True
    same(layer(x, reset=reset)[0], plain(kind, wide(layer), x.double(), reset)[0])


@probe(SEQUENCES, "the states of every layer and step, c included, in one call")
def all_states(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    states = layer(x, return_states=True)[2]
    for ours, truth in zip(states, plain(kind, wide(layer), x.double())[2], strict=False):
        same(ours[0], truth)


@probe(SEQUENCES, "the textbook GRU, its reset gate before the recurrent product", kinds=("GRU",))
def reset_before(library: Any, kind: str) -> None:
    layer, x = make(library, kind, reset_after=False), example()
    same(layer(x)[0], plain(kind, wide(layer), x.double(), after=False)[0])


@probe(SEQUENCES, "a batch of no sequences trains")
def empty_batch(library: Any, kind: str) -> None:
    layer = make(library, kind)
    layer(example(T, 0))[0].sum().backward()
    if any(p.grad is None or p.grad.any() for p in layer.parameters()):
        raise Wrong("wrong result: gradients that are not zero")


# --- training and types

TRAINING = "Training and types"


@probe(TRAINING, "training in eval mode")
def eval_mode(library: Any, kind: str) -> None:
    layer, x = make(library, kind).eval(), example()
    trained(layer(x)[0], layer, kind, x)


@probe(TRAINING, "the same bits twice, forward and backward")
def same_bits(library: Any, kind: str) -> None:
    def run() -> list[Tensor]:
        layer = make(library, kind)
        y = layer(example())[0]
        return [y, *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]

    if not all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True)):
        raise Wrong("wrong result: the bits differ")


def under_autocast(library: Any, kind: str, dtype: torch.dtype) -> None:
    layer, x = make(library, kind), example()
    with torch.autocast("cpu", dtype):
        y, last = layer(x)
    found = {t.dtype for t in (y, *(last if kind == "LSTM" else (last,)))}
    trained(y, layer, kind, x, 0.05, 0.05)
    if found != {dtype}:
        names = " and ".join(sorted(str(d).removeprefix("torch.") for d in found))
        raise Wrong(f"right, but its results are of {names}")


@probe(TRAINING, "training under `autocast`, bfloat16: every result of that type")
def autocast_bfloat16(library: Any, kind: str) -> None:
    under_autocast(library, kind, torch.bfloat16)


@probe(TRAINING, "training under `autocast`, float16: every result of that type")
def autocast_float16(library: Any, kind: str) -> None:
    under_autocast(library, kind, torch.float16)


def in_type(library: Any, kind: str, dtype: torch.dtype, error: float) -> None:
    layer, x = make(library, kind).to(dtype), example(dtype=dtype)
    trained(layer(x)[0], layer, kind, x, error, error)


@probe(TRAINING, "training in bfloat16")
def bfloat16(library: Any, kind: str) -> None:
    in_type(library, kind, torch.bfloat16, 0.05)


@probe(TRAINING, "training in float16")
def float16(library: Any, kind: str) -> None:
    in_type(library, kind, torch.float16, 0.02)


@probe(TRAINING, "training in float64")
def float64(library: Any, kind: str) -> None:
    in_type(library, kind, F64, 1e-11)


@probe(TRAINING, "complex numbers")
def complex_numbers(library: Any, kind: str) -> None:
    layer, x = make(library, kind).to(torch.complex64), example().to(torch.complex64) * (1 + 1j)
    weights = {n: p.detach().to(torch.complex128) for n, p in layer.named_parameters()}
    same(layer(x)[0], plain(kind, weights, x.to(torch.complex128))[0])


# --- weights and copies

WEIGHTS = "Weights, copies and checks"


@probe(WEIGHTS, "weights dropped at random (AWD-LSTM): a tensor in a parameter's place")
def weight_dropout(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    raw = nn.Parameter(layer.weight_hh_l0.detach())
    del layer._parameters["weight_hh_l0"]
    layer.weight_hh_l0 = nn.functional.dropout(raw, 0.5)
    truth = {**wide(layer), "weight_hh_l0": layer.weight_hh_l0.detach().double()}
    y = layer(x)[0]
    same(y, plain(kind, truth, x.double())[0])
    if not torch.autograd.grad(y.sum(), raw)[0].any():
        raise Wrong("wrong result: no gradient")


@probe(WEIGHTS, "`parametrizations.weight_norm`, trained")
def weight_norm(library: Any, kind: str) -> None:
    layer, x = parametrizations.weight_norm(make(library, kind), "weight_hh_l0"), example()
    with torch.no_grad():
        layer.parametrizations.weight_hh_l0.original0.mul_(2)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    truth = {n: getattr(layer, n).detach().double() for n in names}
    y = layer(x)[0]
    same(y, plain(kind, truth, x.double())[0])
    y.sum().backward()
    if any(p.grad is None for p in layer.parameters()):
        raise Wrong("wrong result: a parameter without a gradient")


@probe(WEIGHTS, "`torch.func.functional_call` with other weights")
def other_weights(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    other = {n: torch.full_like(p, 0.1) for n, p in layer.named_parameters()}
    truth = plain(kind, {n: w.double() for n, w in other.items()}, x.double())[0]
    same(functional_call(layer, other, (x,))[0], truth)


@probe(WEIGHTS, "`copy.deepcopy`, `pickle`, `state_dict` into the other library's layer")
def copies(library: Any, kind: str) -> None:
    layer, x = make(library, kind), example()
    other = getattr(fastrnn if library is nn else nn, kind)(I, H)
    other.load_state_dict(layer.state_dict(), strict=True)
    for module in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
        same(module(x)[0], plain(kind, wide(layer), x.double())[0])


@probe(WEIGHTS, "a PackedSequence (of equal lengths) of the wrong width raises")
def wrong_width(library: Any, kind: str) -> None:
    layer = make(library, kind)
    packed = pack_padded_sequence(torch.randn(T, B, I + 2), torch.tensor([T] * B))
    expect(
        (RuntimeError, ValueError), lambda: layer(packed), "computes, from other memory than the input's rows"
    )


@probe(WEIGHTS, "a weight replaced by one of the wrong shape raises")
def wrong_weight(library: Any, kind: str) -> None:
    layer = make(library, kind)
    layer.weight_hh_l0 = nn.Parameter(torch.randn(layer.weight_hh_l0.shape[0] + 2, H))
    expect((RuntimeError, ValueError), lambda: layer(example()), "computes, with rows that belong to no gate")
