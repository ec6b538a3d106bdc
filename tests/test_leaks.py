"""Memory over many calls: neither the process nor Python holds on to anything but some scratch, and what
large layers keep for their backward passes."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from helpers import Fresh

import fastrnn


class MallInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    FIELDS = "arena, ordblks, smblks, hblks, hblkhd, usmblks, fsmblks, uordblks, fordblks, keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split(", ")]


def allocated_bytes():
    """What malloc has given out and not got back: exact where the resident size, in pages, is not. 0 where
    the C library does not tell."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        return 0
    library.mallinfo2.restype = MallInfo
    info = library.mallinfo2()
    return info.uordblks + info.hblkhd


# The C library's own word: no fault of fastrnn's can skip a test.
where_malloc_tells = pytest.mark.skipif(
    not allocated_bytes(), reason="only glibc 2.33 and newer has mallinfo2, which counts malloc's bytes"
)


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held():
    gc.collect()
    return len(gc.get_objects()), allocated_bytes(), resident_bytes()


def forward(layer, x):
    with torch.no_grad():
        layer(x)


def training(layer, x):
    layer(x)[0].sum().backward()


def double_backward(layer, x):
    (dx,) = torch.autograd.grad(layer(x)[0].square().sum(), x, create_graph=True)
    dx.sum().backward()


def grow(name, calls):
    """Prints what `calls` calls left behind, after others to warm up."""
    call = globals()[name]
    # Small enough for one thread: a team's barriers would take long on a busy machine.
    layer, x = fastrnn.LSTM(8, 16, bidirectional=True), torch.randn(3, 4, 8, requires_grad=True)
    for _ in range(calls // 4):
        call(layer, x)
    before = held()
    for _ in range(calls):
        call(layer, x)
    print(*(b - a for a, b in zip(before, held(), strict=True)))


@pytest.mark.parametrize(
    ("name", "calls"), [("forward", 10_000), ("training", 10_000), ("double_backward", 1000)]
)
def test_nothing_is_left_behind(name, calls):
    objects, allocated, resident = map(int, Fresh("test_leaks.grow", name, calls).finish().split())
    assert objects < 50
    # Python's and malloc's own tables move by some 10 KB; the leak that there once was took 48 bytes a call.
    assert allocated < (32 << 10) + 8 * calls, f"{allocated / calls:.0f} bytes a call"
    assert resident < 4 << 20


def scratch(batch):
    """Prints what malloc has given out since before a step of `batch` sequences, after one and after two."""
    layer, x = fastrnn.GRU(8, 64), torch.zeros(1, batch, 8)
    before = allocated_bytes()
    for _ in range(2):
        forward(layer, x)
        print(allocated_bytes() - before)


@where_malloc_tells
@pytest.mark.parametrize(("batch", "kept"), [(1000, True), (37_000, True), (60_000, False)])
def test_scratch_is_kept_up_to_a_limit(batch, kept):
    """A call's scratch, some 1.5 KB a sequence, is the next one's: up to 64 MB, and no block is larger."""
    first, second = map(int, Fresh("test_leaks.scratch", batch).finish().split())
    assert abs(second - first) < 1 << 20
    assert (1400 * batch < first < (65 << 20)) if kept else first < 1 << 20


def lent():
    """The megabytes that the system may take from this process when it wants for memory; 0 where it does not
    tell."""
    try:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return 0
    return int(dict(line.split(":", 1) for line in lines).get("LazyFree", "0 kB").split()[0]) / 1024


def memory_waits():
    """Whether the system takes pages back later (MADV_FREE), and tells; under AddressSanitizer none waits."""
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        return False
    try:
        with mmap.mmap(-1, 4 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
            memory.write(bytes(4 << 20))
            memory.madvise(mmap.MADV_FREE)
            return lent() > 3
    except (AttributeError, OSError):
        return False


# Asked with a mapping of its own, not with one of fastrnn's, whose faults can so skip no test.
where_memory_waits = pytest.mark.skipif(
    not memory_waits(),
    reason="needs MADV_FREE, LazyFree in /proc/self/smaps, and no AddressSanitizer, which frees at once",
)


def saved_by(layer, x):
    """What a forward pass keeps, as its operator gives it."""
    zeros = [
        torch.zeros(1, x.shape[1], layer.hidden_size) for _ in range(1 + isinstance(layer, fastrnn.LSTM))
    ]
    weights = [p.detach() for p in layer.parameters()]
    return torch.ops.fastrnn.layer(layer.mode.lower(), x, zeros, weights, None, None, None, True, False)[-1][
        0
    ]


def drop(calls, T, B, H):
    """Prints the megabytes lent while what so many calls keep lives, when it is dropped, and in a child
    and its parent after a fork; and whether the next call's is where one of theirs was."""
    layer, x = fastrnn.LSTM(1, H), torch.randn(T, B, 1)
    saved_by(layer, x[:1])
    before = lent()
    alive = [saved_by(layer, x) for _ in range(calls)]
    places = {t.data_ptr() for t in alive}
    print(lent() - before)
    del alive
    print(lent() - before)
    again = saved_by(layer, x)
    reused = again.data_ptr() in places
    del again
    child = os.fork()
    if child == 0:
        os._exit(int(lent() - before > 1))
    print(os.waitpid(child, 0)[1], lent() - before, reused)


@pytest.mark.parametrize(
    ("calls", "sizes", "most"),
    [
        (2, (64, 32, 256), 16),  # 8 MB each
        (18, (64, 32, 256), 16 * 8),  # of 16 blocks
        (3, (1536, 128, 64), 2 * 192),  # three would be more than 512 MB
    ],
)
def test_what_training_keeps_waits_for_the_next_step(calls, sizes, most):
    printed = Fresh("test_leaks.drop", calls, *sizes, OMP_NUM_THREADS="1").finish().split()
    alive, dropped, child, parent = map(float, printed[:4])
    assert alive < 1
    assert child == 0, "nothing waits in a child after a fork"
    assert parent < 1, "nothing waits when a process forks"
    if memory_waits():
        assert 1 < dropped < most + 1
        assert printed[4] == "True"
    else:
        assert dropped < 1


@pytest.mark.parametrize("lengths", [None, torch.arange(32)])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_nothing_is_read_of_the_step_before(kind, lengths):
    torch.manual_seed(0)
    layer, x = getattr(fastrnn, kind)(3, 256), torch.randn(64, 32, 3, requires_grad=True)

    def train():
        layer.zero_grad()
        y, _ = layer(x, lengths=lengths)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]

    expected = train()
    before = saved_by(layer, x.detach())
    place = before.fill_(math.nan).data_ptr()
    del before
    results = train()
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(results, expected, strict=True))
    if memory_waits():
        assert saved_by(layer, x.detach()).data_ptr() == place


def threads_at_once(calls):
    """Prints what malloc has given out after calls by threads at once, of which two keep their scratch."""
    torch.set_num_threads(1)
    layer, x = fastrnn.GRU(8, 64), torch.zeros(20, 100, 8)
    with ThreadPoolExecutor(8) as pool:
        for count in (calls // 4, calls):
            list(pool.map(lambda _: forward(layer, x), range(count)))
            print(allocated_bytes())


@where_malloc_tells
def test_threads_at_once_leave_two_blocks():
    before, after = map(int, Fresh("test_leaks.threads_at_once", 400).finish().split())
    assert after - before < 4 << 20


def rounds(count, alive):
    """Prints the megabytes lent after so many rounds of calls whose memory is dropped at once, and then after
    two larger ones."""
    layer, x = fastrnn.LSTM(1, 64), torch.randn(2560, 16, 1)  # 40 MB, and 4
    saved_by(layer, x[:1])
    before = lent()
    for _ in range(count):
        kept = [saved_by(layer, x[:256]) for _ in range(alive)]
        del kept
    print(lent() - before)
    kept = [saved_by(layer, x) for _ in range(2)]
    del kept
    print(lent() - before)


@where_memory_waits
def test_what_waits_is_counted_in_every_round():
    """More blocks than there are places: what is lost track of would add up to the limit."""
    small, large = map(float, Fresh("test_leaks.rounds", 9, 32, OMP_NUM_THREADS="1").finish().split())
    assert small > 60
    assert large > 75


def sizes_apart():
    """Prints whether a block is still there for who needs all of it, after a call that needs little."""
    layer, x = fastrnn.LSTM(1, 64), torch.randn(4096, 16, 1)  # 64 MB, and 4
    place = saved_by(layer, x).data_ptr()
    small = saved_by(layer, x[:256])
    print(saved_by(layer, x).data_ptr() == place, small.shape)


@where_memory_waits
def test_little_takes_no_large_block():
    assert Fresh("test_leaks.sizes_apart", OMP_NUM_THREADS="1").finish().startswith("True")


def address_space():
    """A call for whose memory there are addresses only where what waits gives up its own."""
    import resource

    layer, x = fastrnn.LSTM(1, 64), torch.randn(12288, 16, 1)
    saved_by(layer, x[:6144])  # 96 MB wait
    used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
    # 192 MB are kept of the next call, whose y and c take 48 each.
    resource.setrlimit(resource.RLIMIT_AS, (used + (250 << 20), resource.RLIM_INFINITY))
    assert saved_by(layer, x).shape[1] == 12288 * 16


@where_memory_waits
def test_what_waits_makes_room():
    Fresh("test_leaks.address_space", OMP_NUM_THREADS="1").finish()
