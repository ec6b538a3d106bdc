"""Around one call: processes, threads and signals, and sizes past 16 and 31 bits.

What could hang runs in a process of its own, under a time limit.
"""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from helpers import Fresh

import fastrnn

# Kind, sizes, options, T, B: one row a step; few rows, with weights unpacked; rows and units shared out;
# single columns; sums so long that a BLAS shares them out.
CASES = (
    ("LSTM", (16, 64), {}, 40, 1),
    ("LSTM", (64, 256), {}, 3, 1),
    ("LSTM", (32, 128), {}, 20, 5),
    ("LSTM", (16, 64), {"num_layers": 2, "bidirectional": True}, 20, 5),
    ("LSTM", (16, 96), {"proj_size": 40}, 20, 5),
    ("GRU", (16, 96), {}, 20, 5),
    ("GRU", (16, 96), {"reset_after": False}, 20, 5),
    ("RNN", (16, 64), {"bidirectional": True}, 20, 40),
    ("RNN", (1, 1), {"bidirectional": True}, 300, 7),
    ("GRU", (1, 300), {}, 100, 4),
    ("LSTM", (16, 80), {"num_layers": 3}, 100, 2),  # in inference all at once
    ("LSTM", (1000, 33), {}, 7, 2),
    ("LSTM", (300, 300), {}, 1, 1),
)


# ThreadSanitizer sees what was not ordered, not what went wrong, and takes its time.
ROUNDS = 1 if "TSAN_OPTIONS" in os.environ else 5


def make(kind, *sizes, **options):
    torch.manual_seed(0)
    return getattr(fastrnn, kind)(*sizes, **options)


def train(layer, x):
    """The output, in inference too, and its gradients for the input and the parameters."""
    x = x.detach()
    with torch.no_grad():
        alone = layer(x)[0]
    y = layer(x.requires_grad_())[0]
    return [y.detach(), alone, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


def cases():
    layers = [(make(kind, *sizes, **options), T, B) for kind, sizes, options, T, B in CASES]
    return [(layer, torch.randn(T, B, layer.input_size)) for layer, T, B in layers]


def same(ours, expected):
    return all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def one_thread(path):
    assert torch.get_num_threads() == 1
    results = [train(*case) for case in cases()]
    assert all(t.isfinite().all() for case in results for t in case)
    torch.save(results, path)


def other_numbers_of_threads(path):
    expected = torch.load(path)
    every = (*range(1, 9), 4 * (os.cpu_count() or 1) + 1)
    for threads in every if ROUNDS > 1 else every[1:4]:
        torch.set_num_threads(threads)
        for name, case, theirs in zip(CASES, cases(), expected, strict=True):
            for i, (a, b) in enumerate(zip(train(*case), theirs, strict=True)):
                if not torch.equal(a, b):
                    what = ("y", "y in inference", "dx")[i] if i < 3 else f"gradient of parameter {i - 3}"
                    print(f"{threads} threads, {name}: {what} by {(a - b).abs().max():.1g}")


def test_any_number_of_threads(tmp_path):
    """The bits are those of a process with OMP_NUM_THREADS=1, with fewer threads than cores and with more."""
    path = str(tmp_path / "expected.pt")
    Fresh("test_processes.one_thread", path, OMP_NUM_THREADS="1").finish()
    assert Fresh("test_processes.other_numbers_of_threads", path).finish() == ""


def python_threads():
    work = cases() * 2  # a layer is in use by two threads
    alone = [train(*case) for case in work]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(ROUNDS):
            results = pool.map(lambda case: train(*case), work)
            assert all(same(*pair) for pair in zip(results, alone, strict=True))


def test_python_threads_at_once():
    """Each call has its own team and barrier: the bits are those of calls one after another."""
    Fresh("test_processes.python_threads").finish()


def threads_of_large_layers():
    torch.set_num_threads(1)
    work = [(make("LSTM", 1, 64), torch.randn(T, 64, 1)) for T in (65, 100, 200)]  # 4.3, 6.6 and 13 MB kept
    alone = [train(*case) for case in work]
    with ThreadPoolExecutor(6) as pool:
        for _ in range(ROUNDS):
            results = pool.map(lambda case: train(*case), work * 4)
            assert all(same(*pair) for pair in zip(results, alone * 4, strict=True))


def test_python_threads_share_no_memory_of_the_step_before():
    Fresh("test_processes.threads_of_large_layers").finish()


def parallel_region(library):
    """In an OpenMP region every thread calls, and a call's team is that one thread."""
    work = cases()
    torch.set_num_threads(1)
    expected = [train(*case) for case in work]
    torch.set_num_threads(4)
    right = []

    @ctypes.CFUNCTYPE(None)
    def call():
        right.extend(same(train(*case), e) for case, e in zip(work, expected, strict=True))

    ctypes.CDLL(library).parallel_region(4, call)
    assert right == [True] * 4 * len(CASES)
    assert same(train(*work[2]), expected[2]), "a call of the whole team, after the region"


def test_threads_of_a_parallel_region(tmp_path):
    library = tmp_path / "parallel_region.so"
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    source = str(Path(__file__).with_name("parallel_region.cpp"))
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-fopenmp", source, "-o", str(library)], check=True, timeout=60
    )
    Fresh("test_processes.parallel_region", str(library)).finish()


def tasks():
    @torch.jit.script
    def layer(x: torch.Tensor, h: torch.Tensor, params: list[torch.Tensor]) -> torch.Tensor:
        return torch.ops.fastrnn.layer("gru", x, [h], params, None, None, None, False, False)[0]

    @torch.jit.script
    def at_once(xs: list[torch.Tensor], h: torch.Tensor, params: list[torch.Tensor]) -> list[torch.Tensor]:
        tasks = [torch.jit.fork(layer, x, h, params) for x in xs]
        return [torch.jit.wait(task) for task in tasks]

    gru = make("GRU", 32, 96)
    params, h = [p.detach() for p in gru.parameters()], torch.zeros(1, 5, 96)
    xs = [torch.randn(40, 5, 32) for _ in range(16)]
    expected = [gru(x)[0] for x in xs]
    for _ in range(ROUNDS):
        assert same(at_once(xs, h, params), expected)
    # Past the end of that pool, where torch aborts now and then, after tasks of torch.mm as well: "terminate
    # called without an active exception".
    os._exit(0)


def test_threads_of_the_inter_op_pool():
    """torch.jit.fork's tasks run on torch's other pool; each makes a team of its own."""
    Fresh("test_processes.tasks").finish()


def fork():
    work = [(make("LSTM", 64, 128), torch.randn(30, 8, 64)), (make("LSTM", 1, 64), torch.randn(65, 64, 1))]
    expected = [train(*case) for case in work]
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        torch.set_num_threads(1)
        right = [torch.equal(layer(x)[0], y) for (layer, x), (y, *_) in zip(work, expected, strict=True)]
        os._exit(0 if all(right) else 3)
    _, status = os.waitpid(child, 0)
    assert status == 0, status
    assert all(same(train(*case), e) for case, e in zip(work, expected, strict=True))


def test_forked_child():
    """A child has none of its parent's threads; with one thread, as a DataLoader's worker has, nothing waits
    for them. (With more, torch's own operators wait for ever.)"""
    Fresh("test_processes.fork").finish()


def check_training(layer, x, expected):
    assert same(train(layer, x), expected)


def test_spawned_child():
    """The layer itself goes to the child, which has as many threads as its parent."""
    layer, x = make("GRU", 64, 128, bidirectional=True), torch.randn(30, 8, 64)
    child = get_context("spawn").Process(target=check_training, args=(layer, x, train(layer, x)))
    child.start()
    child.join(120)
    code = child.exitcode
    child.kill()
    assert code == 0


class Encoded(torch.utils.data.Dataset):
    """Items that a layer has made something of, in the worker that loads them."""

    def __init__(self):
        self.layer = make("LSTM", 32, 64, num_layers=2)
        self.inputs = torch.randn(8, 20, 5, 32)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(self.inputs[i])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_dataloader_workers(start):
    data = Encoded()
    expected = [data[i] for i in range(len(data))]  # the parent has used its threads before the workers start
    loader = torch.utils.data.DataLoader(
        data, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120
    )
    assert same(list(loader), expected)
    assert same([data[i] for i in range(len(data))], expected)


def call_until_interrupted(training, times):
    # A shell may have started all this with the signal ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    layer, x = make("LSTM", 32, 64, num_layers=2), torch.randn(20, 5, 32)
    expected = train(layer, x)
    for _ in range(times):
        layer.requires_grad_(training)
        try:
            print("calling", flush=True)
            while True:
                if training:
                    train(layer, x)
                else:
                    layer(x)
        except KeyboardInterrupt:
            torch.set_grad_enabled(True)  # which one on the way into torch.no_grad, or out, leaves off
        layer.requires_grad_()
        assert same(train(layer, x), expected)


@pytest.mark.parametrize("training", [False, True])
def test_interrupt_between_calls(training):
    """Ctrl-C, at many moments of a call: KeyboardInterrupt comes, and the next call is right."""
    child = Fresh("test_processes.call_until_interrupted", training, 20)
    for moment, _ in enumerate(child.process.stdout):
        time.sleep(0.01 + 0.0013 * moment)
        child.process.send_signal(signal.SIGINT)
    child.finish()


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
