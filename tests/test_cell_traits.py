"""Each C++ cell on its own, by finite differences: a wrong formula shows here before any kernel uses it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import load

from fastrnn.gpu import TRAITS
from fastrnn.reference import CELLS

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def traits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cell_traits")
    flags = ["-std=c++20", "-O1"]
    source = str(HERE / "cell_traits.cpp")
    return load("cell_traits", [source], extra_cflags=flags, build_directory=str(folder)).cells


def test_both_registries_agree(traits):
    assert {name: cell[:4] for name, cell in traits.items()} == {
        name: (cell.gates, cell.states, cell.saved, cell.saves_h) for name, cell in CELLS.items()
    }


def test_the_gpus_traits_are_those_of_the_headers(traits):
    assert {name: cell[6:] for name, cell in traits.items()} == {
        name: (list(t.hidden_grads), t.state, t.mid) for name, t in TRAITS.items()
    }


@pytest.mark.parametrize("name", CELLS)
def test_step_equals_the_reference(traits, name):
    """One hidden unit: gx [G], states [S] and the recurrent weights R [G], so that gh = R h."""
    gates, states, _, saves_h, forward = traits[name][:5]
    for _ in range(20):
        gx, s, R = (torch.randn(n, dtype=torch.float64) for n in (gates, states, gates))
        theirs = CELLS[name].step(gx[None], s[:1][None], tuple(v.view(1, 1) for v in s), R[:, None], None)
        ours, saved = forward(gx.tolist(), s.tolist(), R.tolist())
        torch.testing.assert_close(torch.tensor(ours, dtype=torch.float64), torch.cat(theirs).flatten())
        assert not saves_h or saved == ours


@pytest.mark.parametrize("name", CELLS)
def test_backward_equals_finite_differences(traits, name):
    gates, states, _, _, forward, backward = traits[name][:6]
    weights, step = torch.randn(states, dtype=torch.float64), 1e-6

    def split(v):
        return [part.tolist() for part in v.split([gates, states, gates])]

    def loss(v):
        return torch.tensor(forward(*split(v))[0], dtype=torch.float64) @ weights

    for _ in range(20):
        inputs = torch.randn(2 * gates + states, dtype=torch.float64)
        gx, s, R = split(inputs)
        s_new, saved = forward(gx, s, R)
        groups = backward(saved, s, s_new, weights.tolist(), R)
        ours = torch.tensor([g for group in groups for g in group], dtype=torch.float64)
        nudges = step * torch.eye(len(inputs), dtype=torch.float64)
        numeric = torch.stack([(loss(inputs + e) - loss(inputs - e)) / (2 * step) for e in nudges])
        torch.testing.assert_close(ours, numeric, rtol=1e-6, atol=1e-8)
