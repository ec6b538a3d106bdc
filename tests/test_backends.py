"""Choosing a backend: for the process, for a block, by the environment; what explain says."""

from __future__ import annotations

import copy
import functools
import math
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import random_case
from torch._subclasses.fake_tensor import FakeTensorMode

import fastrnn
from fastrnn import backends, cuda, functional, gpu, kernels
from fastrnn.backends import current_backend
from fastrnn.reference import CELLS


@pytest.fixture(autouse=True)
def no_default(monkeypatch):
    monkeypatch.setattr(backends, "_process_default", [None])
    monkeypatch.delenv("FASTRNN_BACKEND", raising=False)
    monkeypatch.setattr(backends, "_environment", [])


def in_another_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_plain_call_sets_the_process():
    fastrnn.backend("reference")
    assert in_another_thread(current_backend) == "reference"
    assert current_backend() == "reference"
    held = fastrnn.backend("cpu")  # as a notebook holds the value of a cell
    assert current_backend() == "cpu"
    assert in_another_thread(current_backend) == "cpu"
    del held
    assert current_backend() == "cpu"


def test_a_block_ends_and_nests():
    fastrnn.backend("cpu")
    with fastrnn.backend("reference"):
        assert current_backend() == "reference"
        assert in_another_thread(current_backend) == "cpu"
        with fastrnn.backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "reference"
    assert current_backend() == "cpu"


def test_blocks_made_first_and_entered_twice():
    outer, inner = fastrnn.backend("reference"), fastrnn.backend("cpu")
    with outer, inner, outer:
        assert current_backend() == "reference"
    assert current_backend() == "auto"
    assert backends._process_default == [None]


def test_blocks_reach_no_other_thread():
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            seen.add(current_backend())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:

        def enter(_):
            for _ in range(500):
                with fastrnn.backend("reference"):
                    assert current_backend() == "reference"

        list(pool.map(enter, range(4)))
    stop.set()
    watcher.join()
    assert seen == {"auto"}
    assert current_backend() == "auto"


def test_the_environment(monkeypatch):
    monkeypatch.setenv("FASTRNN_BACKEND", "reference")
    assert current_backend() == "reference"
    monkeypatch.setenv("FASTRNN_BACKEND", "gpu")
    assert current_backend() == "reference"  # read once
    backends._environment.clear()
    with pytest.raises(ValueError, match=r"backend must be one of .*, got 'gpu'"):
        current_backend()


def test_unknown_names():
    with pytest.raises(ValueError, match="got 'oneDNN'"):
        fastrnn.backend("oneDNN")
    assert current_backend() == "auto"


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_only_auto_falls_back(name):
    layer, x = fastrnn.LSTM(2, 3), torch.randn(4, 1, 2)
    with fastrnn.backend(name), pytest.raises(fastrnn.BackendError, match=f'backend="{name}" cannot serve'):
        layer(x)
    wide, x = fastrnn.LSTM(2, 3, dtype=torch.complex64), x.to(torch.complex64)
    with fastrnn.backend("cpu"), pytest.raises(fastrnn.BackendError, match="the input is complex64"):
        wide(x)
    assert wide(x)[0].dtype == torch.complex64


def test_explain():
    x = torch.randn(4, 1, 2)
    said = fastrnn.explain(fastrnn.GRU(2, 3, reset_after=False), x)
    assert said.backend == "cpu"
    assert "gru_reset_before" in said.kernel
    assert str(said).startswith("backend cpu, kernel gru_reset_before scan in C++")
    packed = torch.nn.utils.rnn.pack_sequence([x[:, 0]])
    assert fastrnn.explain(fastrnn.LSTM(2, 3), packed.to(torch.complex64)).backend == "reference"
    with fastrnn.backend("triton"):
        assert str(fastrnn.explain(fastrnn.RNN(2, 3), x)).startswith("cannot run: ")
    for stranger in (torch.nn.LSTM(2, 3), torch.nn.Linear(2, 3)):
        with pytest.raises(TypeError, match="explain takes a fastrnn layer or cell"):
            fastrnn.explain(stranger, x)
    # What the call would refuse.
    sequences = [torch.nn.utils.rnn.pack_sequence([torch.randn(4, *size)]) for size in ((5,), (1, 2))]
    for layer, wrong in (
        (fastrnn.LSTM(2, 3), x[None]),
        (fastrnn.LSTM(2, 3), x[..., :1]),
        *((fastrnn.LSTM(2, 3), sequence) for sequence in sequences),
        (fastrnn.RNNCell(2, 3), x),
        (fastrnn.RNNCell(2, 3), x[0, :, :1]),
    ):
        for call in (layer, functools.partial(fastrnn.explain, layer)):
            with pytest.raises((ValueError, RuntimeError), match=r"2D|1D|2 dimensions|input_size"):
                call(wrong)


@pytest.mark.parametrize("isa", kernels.instruction_sets())
def test_explain_arithmetic(isa, use_isa):
    """Of bfloat16, in autocast too, it is what the instruction set multiplies; the scans' alone."""
    use_isa(isa)
    multiplied = f"{isa}, products of bfloat16, float32 sums"
    plain = f"{isa}, float32 arithmetic"
    of_bfloat16 = multiplied if isa in ("amx", "avx512bf16") else plain
    x, lstm = torch.randn(4, 1, 2), fastrnn.LSTM(2, 3)
    half = fastrnn.LSTM(2, 3, dtype=torch.bfloat16)
    frozen, small = fastrnn.freeze(half), fastrnn.quantize(lstm)

    def said(layer, dtype=torch.float32):
        given = x[0] if isinstance(layer, torch.nn.RNNCellBase) else x
        return fastrnn.explain(layer, given.to(dtype)).kernel

    assert plain in said(lstm)
    assert plain in said(lstm.half(), torch.float16)
    assert f"{isa}, float64 arithmetic" in said(lstm.double(), torch.float64)
    for layer in (half, frozen):
        assert of_bfloat16 in said(layer, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in (lstm.float(), fastrnn.LSTMCell(2, 3), frozen):
            assert of_bfloat16 in said(layer)
        assert f"{plain}, int8 weights" in said(small)
        assert f"{plain}, frozen" in said(fastrnn.freeze(lstm))
        assert plain in said(fastrnn.Attention(2, 5, score="general"))


@pytest.mark.parametrize(
    ("found", "said"), [(75, "8.0 or newer, this one has 7.5"), (80, None), (None, None)]
)
def test_gpus_that_triton_does_not_take(found, said, monkeypatch):
    class Parameter(SimpleNamespace):
        device, dtype = torch.device("cuda", 0), torch.float32

    monkeypatch.setattr(torch.nn, "Parameter", Parameter)
    monkeypatch.setattr(backends, "TRITON_MISSING", None)
    monkeypatch.setattr(backends, "capability", lambda device: found)
    backends._too_old_for_triton.cache_clear()
    reason = backends._why_not_triton(Parameter())
    backends._too_old_for_triton.cache_clear()
    assert reason is None if said is None else said in reason


def test_explain_attention():
    x, explain = torch.randn(4, 3, 2), fastrnn.explain
    general = fastrnn.Attention(2, 5, score="general")
    assert str(explain(general, x)).startswith("backend cpu, kernel general attention online softmax in C++")
    fed = fastrnn.AttentionDecoder(2, 5, 5, cell="gru")
    assert "gru decoder scan in C++" in explain(fed, x).kernel
    for decoder, inputs in ((fed, x[:1]), (fastrnn.AttentionDecoder(2, 5, 5, input_feeding=False), x)):
        assert "scan in C++, then dot attention online softmax" in explain(decoder, inputs).kernel
    fed.batch_first = True
    assert "gru scan in C++, then" in explain(fed, x[:, :1]).kernel
    with fastrnn.backend("reference"):
        assert explain(fed, x).kernel == "gru decoder by plain torch operations"
    for layer in (general, fed):
        with fastrnn.backend("cuda"):
            assert explain(layer, x).backend is None
        with pytest.raises(TypeError, match="needs an input"):
            explain(layer, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert "float32 arithmetic" in explain(general, x).kernel


def test_explain_both_directions():
    x, explain = torch.randn(4, 3, 2), fastrnn.explain
    lstm, gru = fastrnn.LSTM(2, 3), fastrnn.GRU(2, 3)
    assert explain(fastrnn.Bidirectional(lstm), x) == explain(lstm, x)
    said = explain(fastrnn.Bidirectional(lstm, gru), x)
    assert said.backend == "cpu"
    assert said.kernel.startswith("forward lstm scan in C++")
    assert ", backward gru scan in C++" in said.kernel
    said = explain(fastrnn.Bidirectional(torch.nn.LSTM(2, 3), gru), x)
    assert said.backend == "forward torch, backward cpu"
    with fastrnn.backend("cuda"):
        assert explain(fastrnn.Bidirectional(lstm, gru), x).backend is None


@pytest.mark.parametrize("asked", ["triton", "cuda"])
def test_a_cell_that_a_program_has_added(asked, monkeypatch):
    """It has an entry in CELLS, and perhaps a header; kernels for GPUs want more."""
    monkeypatch.setitem(CELLS, "another", CELLS["gru"])
    x, states, params = random_case("another", T=3, B=2, I=3, H=4, D=1)
    with fastrnn.backend("reference"):
        assert functional.layer("another", x, states, params)[0].shape == (3, 2, 4)
    words = f"backend=\"{asked}\" cannot serve this call: it has no kernel for the cell 'another'"
    with fastrnn.backend(asked), pytest.raises(fastrnn.BackendError, match=words):
        functional.layer("another", x, states, params)


@pytest.mark.skipif(backends.TRITON_MISSING is not None, reason="Triton is not installed")
@pytest.mark.parametrize("device", backends.TRITON_DEVICES)
def test_what_a_gpu_takes(device, monkeypatch):
    """Without one: of fake tensors, which have its name."""
    with FakeTensorMode():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.empty(2, device=device, dtype=dtype)
            monkeypatch.setattr(cuda, "LIBRARY", None)
            assert backends.choose(x) == "triton"
            monkeypatch.setattr(cuda, "LIBRARY", object())  # as of a build with nvcc
            assert backends.choose(x) == ("cuda" if device == "cuda" else "triton")
            assert backends.decide_fused(x, "it").backend == "reference"
            assert backends.decide_cell(x, "lstm").backend == backends.choose(x)
            assert backends.decide_cell(x, "another").backend == "reference"
            assert backends.decide_attention(x).backend == "triton"
            query = torch.empty(4, 3, 2, device=device, dtype=dtype)
            said = str(fastrnn.explain(fastrnn.Attention(2, 5, score="general"), query))
            assert "in Triton" in said
            assert "tiles of 16 queries x 32 positions, 16 columns of values" in said
        for dtype in (torch.float64, torch.complex64, torch.complex128):
            x = torch.empty(2, device=device, dtype=dtype)
            assert backends.decide(x).backend == "reference"
            with fastrnn.backend("triton"), pytest.raises(fastrnn.BackendError, match="it takes float32"):
                backends.choose(x)


def test_tf32_is_what_torch_says_in_the_old_way_or_the_new():
    device, settings = torch.device("cuda"), torch.backends.cudnn.rnn
    before = settings.fp32_precision
    try:
        for value in ("ieee", "tf32"):
            settings.fp32_precision = value
            assert gpu.allows_tf32(device) == (value == "tf32")
    finally:
        settings.fp32_precision = before
    with torch.backends.cudnn.flags(allow_tf32=False):
        assert not gpu.allows_tf32(device)
    assert gpu.allows_tf32(device) == (before == "tf32")
    assert not gpu.allows_tf32(torch.device("cpu"))


@pytest.mark.parametrize(
    ("layer", "shape", "joint"),
    [
        (fastrnn.LSTM(40, 33), (30, 5, 40), True),
        (fastrnn.RNN(40, 33, nonlinearity="relu"), (30, 5, 40), True),
        (fastrnn.LSTM(40, 33, proj_size=5), (200, 2, 40), True),
        (fastrnn.GRU(40, 33), (30, 5, 40), False),  # its new gate takes x's part and h's apart
        (fastrnn.LSTM(40, 33), (300, 1, 40), False),  # W would be read for one row at a time
        (fastrnn.LSTM(40, 33), (3, 5, 40), False),  # too few rows to pack weights for
        (fastrnn.LSTM(40, 33), (4, 4, 40), False),
        (fastrnn.LSTM(40, 33), (5, 4, 40), True),
        (fastrnn.LSTM(40, 33), (30, 4, 40), True),
        (fastrnn.LSTM(8, 84), (5, 4, 8), False),  # of few sequences from H / 4 on,
        (fastrnn.LSTM(8, 84), (6, 4, 8), True),
        (fastrnn.LSTM(8, 400), (50, 4, 8), False),  # H / 2 where R outgrows the second level
    ],
    ids=str,
)
def test_x_and_h_in_one_product(layer, shape, joint):
    """What explain says of it, and the values, frozen or not: float64's, to its roundings."""
    x = torch.randn(shape)
    assert "in one product" not in str(fastrnn.explain(fastrnn.quantize(layer), x))
    x, layer = x.double(), copy.deepcopy(layer).double()
    frozen = fastrnn.freeze(layer)
    for of in (layer, frozen):
        assert ("x and h in one product" in str(fastrnn.explain(of, x))) == joint
    bound = {
        "rtol": 1e-13,
        "atol": 1e-13,
    }  # 450 eps: 73 products, a few ulp of a gate, some steps
    with torch.no_grad():
        y = layer(x)[0]
        torch.testing.assert_close(frozen(x)[0], y, **bound)
        with fastrnn.backend("reference"):
            torch.testing.assert_close(y, layer(x)[0], **bound)


def cache(level):
    """Bytes, as the kernels ask for them: by glibc's _SC_LEVEL2_CACHE_SIZE and _SC_LEVEL3_CACHE_SIZE, which
    Python has no names for, or what Linux says; 0 where there is none."""
    if (known := os.sysconf({2: 191, 3: 194}[level])) > 0:
        return known
    told = Path(f"/sys/devices/system/cpu/cpu0/cache/index{level}/size")
    return int(told.read_text().rstrip("K\n")) << 10 if told.exists() else 0


def second_level():
    return min(max(cache(2) or 1 << 20, 256 << 10), 4 << 20)


@pytest.mark.skipif("amx" not in kernels.instruction_sets(), reason="no processor without AMX runs its tiles")
def test_tiles_take_x_and_h_in_one_product_by_their_rows(use_isa):
    """The second level holds W and R of both, in bfloat16; four times as much; neither."""
    use_isa("amx")
    level = second_level()
    for H, least in (
        (math.isqrt(level // 16), 2),
        (math.isqrt(level // 4), 12),
        (math.isqrt(level // 4) + 1, 24),
    ):
        layer = fastrnn.LSTM(H, H, dtype=torch.bfloat16)
        for B, joint in ((least - 1, False), (least, True)):
            said = str(fastrnn.explain(layer, torch.zeros(100, B, H, dtype=torch.bfloat16)))
            assert ("x and h in one product" in said) == joint, (H, B)


def test_rows_are_shared_out_where_they_hide_that_weights_are_far():
    """In the third level, if R takes no more than a quarter of it: Intel's wants more of them than others."""
    H = math.isqrt(second_level() // 8) // 16 * 16  # R is twice the second level
    far = "rows of the batch" if cache(3) // 4 >= 16 * H * H else "units"
    rows = 64 if "GenuineIntel" in Path("/proc/cpuinfo").read_text() else 16
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for B, part in ((2 * rows - 1, "units"), (2 * rows, far)):
            said = fastrnn.explain(fastrnn.LSTM(8, H), torch.zeros(20, B, 8)).split
            assert said.startswith(f"2 threads ({part} in 2 parts; "), said
    finally:
        torch.set_num_threads(before)


def test_explain_tells_the_split():
    """By the model of docs/cpu.md."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        for layer, shape, expected in (
            (fastrnn.GRU(8, 8), (4, 1, 8), "1 thread"),
            (fastrnn.LSTM(64, 128), (100, 32, 64), "4 threads (rows of the batch in 4 parts; "),
            (
                fastrnn.LSTM(64, 128, batch_first=True),
                (32, 100, 64),
                "4 threads (rows of the batch in 4 parts; ",
            ),
            (fastrnn.LSTM(64, 128), (4, 32, 64), "4 threads (units in 4 parts; "),
            (fastrnn.LSTM(64, 256), (100, 1, 64), "4 threads (units in 4 parts; "),
            (fastrnn.LSTM(64, 256), (100, 64), "4 threads (units in 4 parts; "),
            (
                fastrnn.GRU(64, 256, bidirectional=True),
                (100, 1, 64),
                "4 threads (directions in 2 parts, units in 2 parts; ",
            ),
            (
                fastrnn.LSTM(64, 256, proj_size=32),
                (100, 12, 64),
                "4 threads (rows of the batch in 2 parts, units in 2 ",
            ),
            (fastrnn.LSTMCell(64, 256), (32, 64), "4 threads (units in 4 parts; "),
        ):
            said = fastrnn.explain(layer, torch.zeros(shape))
            assert said.split.startswith(expected), (layer, said)
            assert f", {said.split}: " in str(said)
        # Backward without the input's product; not where no gradients flow.
        layer, x = fastrnn.LSTM(500, 96), torch.zeros(3, 1, 500)
        said = fastrnn.explain(layer, x).split
        assert said.startswith("2 threads (units in 2 parts; ")
        assert said.endswith("; training: backward scan by 1 thread")
        said = fastrnn.explain(fastrnn.GRU(64, 256, bidirectional=True), torch.zeros(100, 1, 64)).split
        assert said.endswith(
            "; training: backward scan by 4 threads (directions in 2 parts, units in 2 parts)"
        )
        assert "training" not in fastrnn.explain(fastrnn.freeze(layer), x).split
        # Layers side by side, in inference: not of two directions, of one step, larger than the cache, or of
        # many rows.
        for layer, shape, expected in (
            (
                fastrnn.GRU(64, 64, 2),
                (100, 1, 64),
                "in inference 2 threads (layers in 2 groups, 8 steps apart; ",
            ),
            (
                fastrnn.LSTM(64, 112, 2),
                (400, 64),
                "in inference 4 threads (layers in 2 groups, 25 steps apart, units ",
            ),
            (
                fastrnn.LSTM(64, 128, 2, bidirectional=True),
                (100, 1, 64),
                "4 threads (directions in 2 parts, units in 2 parts; ",
            ),
            (fastrnn.GRU(64, 64, 2), (1, 1, 64), "1 thread"),
            (fastrnn.LSTM(64, 1024, 2), (100, 1, 64), "4 threads (units in 4 parts; "),
            (fastrnn.LSTM(64, 128, 2), (100, 32, 64), "4 threads (rows of the batch in 4 parts; "),
        ):
            assert fastrnn.explain(layer, torch.zeros(shape)).split.startswith(expected), layer
        packed = torch.nn.utils.rnn.pack_sequence([torch.zeros(100, 64)] * 32)
        assert "rows of the batch in 4" in fastrnn.explain(fastrnn.LSTM(64, 128), packed).split
        # Of several lengths the first rows would be most of the work.
        ragged = torch.nn.utils.rnn.pack_sequence([torch.zeros(100 - 3 * i, 64) for i in range(32)])
        assert "units in 4" in fastrnn.explain(fastrnn.LSTM(64, 128), ragged).split
        nearly = torch.nn.utils.rnn.pack_sequence([torch.zeros(100 - i // 2, 64) for i in range(32)])
        assert "rows of the batch in 4" in fastrnn.explain(fastrnn.LSTM(64, 128), nearly).split
        # A thread without a vector of units would only wait.
        units = {"baseline": 4, "neon": 4, "avx2": 8}.get(fastrnn.kernels.instruction_set(), 16)
        for threads, H, B in ((16, 64, 16), (64, 128, 16), (64, 512, 1)):
            torch.set_num_threads(threads)
            said = fastrnn.explain(fastrnn.LSTM(H, H), torch.zeros(100, B, H)).split
            assert 1 < int(said.split("units in ")[1].split()[0]) <= H // units, said
        # Nor is any left without work where a ragged batch has more threads than vectors.
        torch.set_num_threads(16)
        many = torch.nn.utils.rnn.pack_sequence([torch.zeros(100 - i // 11, 8) for i in range(1024)])
        for vectors in (1, 2, 4):
            said = fastrnn.explain(fastrnn.LSTM(8, vectors * units), many).split
            rows, parts = 16 // vectors, f", units in {vectors} parts" * (vectors > 1)
            assert said.startswith(f"16 threads (rows of the batch in {rows} parts{parts}"), said
    finally:
        torch.set_num_threads(before)
    with fastrnn.backend("reference"):
        assert fastrnn.explain(fastrnn.GRU(8, 8), torch.zeros(4, 1, 8)).split is None


def test_functional_says_what_is_wrong():
    """The same words on both backends."""
    x, states, params = random_case("lstm", 3, 2, 2, 3)
    wrong = {
        "the input is of 1 sequences, the states are of 2": (x[:, :1], states, params, {}),
        r"the input must be \[T, B, I\]": (x[0], states, params, {}),
        r"states must be 2 of shape \[D, B, \.\]": (x, [s[0] for s in states], params, {}),
        "states must be 2": (x, states[:1], params, {}),
        r"w_hh must be \[12, 3\], got \[12, 2\]": (x, states, [params[0], params[1][:, :2], *params[2:]], {}),
        r"reset must be torch.bool \[3, 2\]": (x, states, params, {"reset": torch.zeros(3, 2)}),
        r"lengths must be torch.int64 \[2\]": (
            x,
            states,
            params,
            {"lengths": torch.arange(3)},
        ),
        "params must be": (x, states, params[:1], {}),
    }
    for name in ("cpu", "reference"):
        with fastrnn.backend(name):
            for words, (x_, states_, params_, masks) in wrong.items():
                with pytest.raises(ValueError, match=words):
                    functional.layer("lstm", x_, states_, params_, **masks)
            with pytest.raises(RuntimeError, match="Expected sequence length to be larger than 0"):
                functional.layer("lstm", x[:0], states, params)
            with pytest.raises(RuntimeError, match="Input and mask tensors are not at the same device"):
                functional.layer("lstm", x, states, params, reset=torch.zeros(3, 2, device="meta").bool())
            for sizes in ([1, 2], [2, 2], [3], [2, 0], [2, 1, 0]):
                rows = {"batch_sizes": torch.tensor(sizes)}
                with pytest.raises(ValueError, match="batch_sizes must be"):
                    functional.layer("lstm", x[:, 0], states, params, **rows)
            with pytest.raises(RuntimeError, match=r"w_hh must be torch\.float64 like the input"):
                functional.layer("lstm", x, states, [params[0], params[1].float(), *params[2:]])
    with pytest.raises(ValueError, match="cell must be one of lstm, gru"):
        functional.layer("lstn", x, states, params)


@pytest.mark.parametrize(
    "bad", [{"H": -5}, {"T": -1}, {"D": 0}, {"layers": 0}, {"x": torch.zeros(())}], ids=str
)
def test_a_plan_of_nonsense(bad):
    sizes = {"T": 100, "B": 1, "N": 100, "H": 0, "P": 0, "D": 1, "layers": 4}
    asked = {"cell": "lstm", "x": torch.zeros(1, 1, 1), "int8": False, **sizes}
    assert torch.ops.fastrnn.plan(**asked)[0] == 1
    with pytest.raises(RuntimeError, match="plan takes sizes that are not negative"):
        torch.ops.fastrnn.plan(**{**asked, **bad})
