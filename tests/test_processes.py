"""Around one call: threads that call at once, forked children, and sizes past 16 and 31 bits."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import fastrnn

KINDS = ("LSTM", "GRU", "RNN")


def make(kind, *sizes, **options):
    torch.manual_seed(0)
    return getattr(fastrnn, kind)(*sizes, **options)


def train(layer, x):
    """The output, and its gradients for the parameters."""
    y = layer(x)[0]
    return [y.detach(), *torch.autograd.grad(y.square().sum(), list(layer.parameters()))]


@pytest.mark.parametrize("kind", KINDS)
def test_python_threads_at_once(kind):
    """Each call has its own team and barrier: the bits are those of calls one after another."""
    layer = make(kind, 32, 64, num_layers=2, bidirectional=True)
    inputs = [torch.randn(40, 3 + i, 32) for i in range(6)]
    alone = [train(layer, x) for x in inputs]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(5):
            for ours, expected in zip(pool.map(lambda x: train(layer, x), inputs), alone, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


FORK = """
import os, signal, torch, fastrnn
layer = fastrnn.LSTM(64, 128)
x = torch.randn(30, 8, 64)
def train():
    y = layer(x)[0]
    return torch.autograd.grad(y.square().sum(), list(layer.parameters()))
expected = train()
child = os.fork()
if child == 0:
    signal.alarm(60)
    torch.set_num_threads(1)
    with torch.no_grad():
        y = layer(x)[0]
    os._exit(0 if y.isfinite().all() else 3)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert all(torch.equal(a, b) for a, b in zip(train(), expected))
"""


def test_forked_child():
    """A child has none of its parent's threads; with one thread, as a DataLoader's worker has, nothing waits
    for them. (With more, torch's own operators wait for ever.)"""
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_more_threads_than_cores():
    layer, x = make("LSTM", 16, 64), torch.randn(20, 5, 16)
    expected, before = train(layer, x), torch.get_num_threads()
    try:
        torch.set_num_threads(4 * (os.cpu_count() or 1) + 1)
        ours = train(layer, x)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("kind", "T", "B"), [("RNN", 70_000, 1), ("LSTM", 2, 70_000), ("GRU", 2, 70_000)])
def test_long_and_wide(kind, T, B):
    """Past 65,535 steps and sequences, forward and backward; float64, with torch.nn as the judge."""
    ours = make(kind, 2, 3).double()
    theirs = getattr(torch.nn, kind)(2, 3).double()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(T, B, 2, dtype=torch.float64)
    for a, b in zip(train(ours, x), train(theirs, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def free_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.slow
@pytest.mark.skipif(free_bytes() < 10 << 30, reason="needs 10 GiB of free memory")
def test_more_elements_than_31_bits():
    """An output of 2.2e9 elements: a 32-bit index would wrap. The last sequence equals itself run alone."""
    T, B, H = 32_768, 4_200, 16
    layer = make("RNN", 1, H).bfloat16()
    x = torch.randn(T, B, 1).bfloat16()
    with torch.no_grad():
        y, h = layer(x)
        assert y.numel() > 2**31
        alone, last = layer(x[:, -1:].contiguous())
    torch.testing.assert_close(y[-50:, -1:], alone[-50:], rtol=0.05, atol=0.02)
    torch.testing.assert_close(h[:, -1:], last, rtol=0.05, atol=0.02)
