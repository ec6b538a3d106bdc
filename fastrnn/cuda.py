"""A layer's recurrence by the CUDA kernels of csrc/cuda: the engine that fastrnn.gpu calls, and the choice of
a kernel and its tiles, fixed by sizes, type and device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ._checks import dtype_names
from .gpu import TRAITS, Backward, Call, Forward, allows_tf32, alone, capability
from .reference import CELLS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIN_CAPABILITY = 80
# csrc/cuda/args.h: how blocks wait for each other.
MODES = {"step": 0, "grid": 1, "block": 2, "cluster": 3}
# Bytes of what blocks tell each other in one launch, which must be fresh memory, unless that is so few steps.
EXCHANGE_BYTES, LEAST_STEPS = 32 << 20, 16
CLUSTERS = 90  # the compute capability from which there are clusters
MOST_BLOCKS = 16  # of a cluster
NEIGHBOURS = 16  # multiprocessors that clusters are put together from
BLOCK_UNITS = 64  # of a block that is alone in its group
# What all blocks read of each other a step, up to which they look for all of it at once.
EAGER_BYTES = 1 << 20
ROWS, PIECE_BYTES = 16, 64  # csrc/cuda/product.h
# What fastrnn_cuda_run says beside CUDA's errors.
_NO_KERNEL, _NOT_RESIDENT = -1, -2
# Bytes that a backward pass reads up to which they are taken to be in the cache yet; else how many steps
# before it needs them it asks for them.
CACHED_BYTES, AHEAD_STEPS = 24 << 20, 4
# Looks at one datum before a block gives it up: some 0.5 us each through the cache, 30 s; a cluster's look
# waits by itself, for a time that is the device's.
PATIENCE = 1 << 26


class Library:
    """The C functions of csrc/cuda/launch.cu."""

    def __init__(self, path: Path) -> None:
        self.functions = ctypes.CDLL(str(path))
        self.functions.fastrnn_cuda_fields.restype = ctypes.c_char_p
        self.functions.fastrnn_cuda_error.restype = ctypes.c_char_p
        self.fields: list[str] = self.functions.fastrnn_cuda_fields().decode().split()
        self._places = {name: i for i, name in enumerate(self.fields)}
        self._type = ctypes.c_int64 * len(self.fields)

    def _args(self, values: dict[str, int]) -> ctypes.Array[ctypes.c_int64]:
        args = self._type()
        for name, value in values.items():
            args[self._places[name]] = value
        return args

    def plan(self, values: dict[str, int]) -> tuple[int, ...]:
        """Blocks of such a launch that the device holds at once (0: none, for want of a kernel, of shared
        memory or of such clusters); a block's bytes of shared memory; of each stage a warp's pieces of the
        weights, how many of them registers and then shared memory hold, and the bytes of all, packed."""
        out = (ctypes.c_int64 * 10)()
        self.functions.fastrnn_cuda_plan(self._args(values), out)
        return (self._told(out[0]), *out[1:])

    def has_image(self) -> bool:
        """Whether its kernels were compiled for the current device, or for one that it is compatible with."""
        return self._told(self.functions.fastrnn_cuda_has_image()) > 0

    def run(self, values: dict[str, int], weights: bool, device: torch.device) -> bool:
        """All steps; weights: whether these are to be packed first. False where the blocks of a grid could
        not all be resident; then none has run."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        error = int(self.functions.fastrnn_cuda_run(self._args(values), weights, ctypes.c_void_p(stream)))
        if error == _NO_KERNEL:
            raise RuntimeError("fastrnn's CUDA kernels: none fits this device's shared memory")
        self._told(0 if error == _NOT_RESIDENT else -error)
        return error == 0

    def _told(self, answer: int) -> int:
        """The answer; RuntimeError where it is an error, negative, which no cache then keeps."""
        if answer >= 0:
            return answer
        raise RuntimeError(f"fastrnn's CUDA kernels: {self.functions.fastrnn_cuda_error(-answer).decode()}")


def _load() -> Library | None:
    """None where the library was built without nvcc."""
    try:
        return Library(Path(__file__).parent / "_C.abi3.so")
    except (OSError, AttributeError):
        return None


LIBRARY = _load()


def missing() -> str | None:
    """Why there are no kernels at all."""
    none = "this build of fastrnn has no CUDA kernels (FASTRNN_CUDA=1 insists on them)"
    return none if LIBRARY is None else None


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch gives it no types
def _has_image(index: int | None) -> bool:
    with torch.cuda.device(index):  # None: the current one. A graph takes no C, and the answer is for good
        return LIBRARY is None or LIBRARY.has_image()


@functools.cache
def _device_missing(index: int | None) -> str | None:
    found = capability(torch.device("cuda", torch.cuda.current_device() if index is None else index))
    if found is None:
        return "it takes NVIDIA GPUs"
    if found < MIN_CAPABILITY:
        return f"it takes GPUs of compute capability 8.0 or newer, this one has {found / 10}"
    if not _has_image(index):
        return f"it was not compiled for compute capability {found / 10} (see FASTRNN_CUDA_ARCHS)"
    return None


def why_not(x: Tensor) -> str | None:
    """Why the engine cannot serve a call whose input is x."""
    if missing():
        return missing()
    if x.device.type not in ("cuda", "meta"):
        return f"it takes CUDA tensors, the input is on {x.device}"
    if x.dtype not in DTYPES:
        return f"it takes {dtype_names(DTYPES)}, the input is {dtype_names([x.dtype])}"
    # Not of a traced one: the device may not be there.
    if type(x) in (Tensor, torch.nn.Parameter) and x.device.type == "cuda":
        return _device_missing(x.device.index)
    return None


# --- which kernel in which tiles


@dataclass(frozen=True)
class Shape:
    """What the choice depends on: groups (directions x heads) of H units, with K columns of h; B sequences,
    elements of itemsize bytes; so many multiprocessors, of this compute capability; the most blocks of a
    cluster to ask them for."""

    cell: str
    H: int
    K: int
    groups: int
    B: int
    itemsize: int
    projected: bool
    backward: bool
    processors: int
    capability: int = MIN_CAPABILITY
    cluster_blocks: int = MOST_BLOCKS


@dataclass(frozen=True)
class Config:
    """mode: see MODES; units of a block; at_once: how many tiles of `rows` sequences have blocks of their
    own, which take the others one after another; in_registers: whether registers hold weights."""

    mode: str
    units: int
    at_once: int
    in_registers: bool = True
    rows: int = ROWS

    def __str__(self) -> str:
        tiles = f"{self.at_once} tile{'s' if self.at_once > 1 else ''}"
        sequences = f"{self.rows} sequence{'s' if self.rows > 1 else ''}"
        return f"blocks of {self.units} units, {tiles} of {sequences} at once"


def round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@dataclass(frozen=True)
class Widths:
    """Columns that an exchange has in each stage, and its stride, which is whole pieces; 0: no such stage."""

    used: tuple[int, int]
    strides: tuple[int, int]


def widths(shape: Shape) -> Widths:
    traits, units, columns = TRAITS[shape.cell], round_up(shape.H, 8), round_up(shape.K, 8)
    if not shape.backward:
        used = (columns, units if traits.mid or shape.projected else 0)
    elif traits.mid:
        used = (2 * units, units)
    else:
        used = (traits.gates * units, columns if shape.projected else 0)
    piece = PIECE_BYTES // shape.itemsize
    return Widths(used, (round_up(used[0], piece), round_up(used[1], piece)))


def clusters(shape: Shape) -> Config | None:
    """One of clusters, where one holds a group's units and as many at once as the device has all sequences:
    each takes as few of these as it can. Multiprocessors are neighbours by 16, and some lack one; `fit` asks
    the device."""
    for units in (16, 32):
        size = -(-max(shape.H, shape.K) // units)
        if shape.capability < CLUSTERS or size > shape.cluster_blocks:
            continue
        at_once = (shape.processors // NEIGHBOURS * (NEIGHBOURS // size) - 1) // shape.groups
        rows = -(-shape.B // at_once) if at_once > 0 else ROWS + 1
        if rows <= ROWS:
            return Config("cluster", units, -(-shape.B // rows), rows=rows)
    return None


@functools.cache
def configure(shape: Shape) -> Config:
    """On an H200, of LSTMs, GRUs and RNNs in bfloat16 and float32 with H from 64 to 2048 and B from 1 to 128,
    forward and backward: clusters are the fastest; else the fewer tiles of the batch a block takes one after
    another the faster, and of as many the units in this order."""
    if in_clusters := clusters(shape):
        return in_clusters
    tiles = -(-shape.B // ROWS)
    found = []
    for units in (16, 32):
        of_units = -(-max(shape.H, shape.K) // units)
        most = shape.processors // (of_units * shape.groups)
        if most:
            own = -(-tiles // min(most, tiles))
            found.append((own, Config("grid", units, -(-tiles // own))))
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    if max(shape.H, shape.K) <= BLOCK_UNITS:
        return Config("block", BLOCK_UNITS, tiles)
    return Config("step", 16 if shape.itemsize == 4 else 32, tiles)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shape_of(
    cell: str, x: Tensor, H: int, P: int, B: int, D: int, heads: int, projected: bool, backward: bool
) -> Shape:
    """What the configuration of a layer of D directions depends on, on the device of x."""
    sizes, found = (H // heads, P // heads, D * heads, B), capability(x.device) or MIN_CAPABILITY
    return Shape(cell, *sizes, x.element_size(), projected, backward, processors(x.device), found)


def describe(cell: str, H: int, proj_size: int, B: int, D: int, x: Tensor) -> tuple[str, str]:
    """Of a layer's forward pass: its kernel and its tiles; on a real device what `fit` makes of them."""
    # Of one unit and one sequence at least: there may be none, which no tile shares out.
    H, P, B = max(1, H), max(1, proj_size or H), max(1, B)
    shape = shape_of(cell, x, H, P, B, D, 1, proj_size > 0, False)
    config = configure(shape)
    if ENGINE.library is not None and type(x) in (Tensor, torch.nn.Parameter) and x.device.type != "meta":
        with alone(x.device):
            config = fit(ENGINE.library, shape, config, D, x.dtype, x.device)[0]
    two = "two launches" if widths(shape).used[1] else "a launch"
    launches = f"{two} a step" if config.mode == "step" else "a launch for many steps"
    return f"{cell} {config.mode} in CUDA, {launches}, {dtype_names([x.dtype])} products", str(config)


# --- what the device holds at once


def sizes(shape: Shape, D: int, dtype: torch.dtype) -> dict[str, int]:
    """Of a pass: what csrc/cuda/args.h calls them."""
    wide, heads = widths(shape), shape.groups // D
    return {
        "cell": list(CELLS).index(shape.cell),
        "dtype": DTYPES[dtype],
        "backward": shape.backward,
        "projected": shape.projected,
        "used_1": wide.used[0],
        "used_2": wide.used[1],
        "stride_1": wide.strides[0],
        "stride_2": wide.strides[1],
        "B": shape.B,
        "H": shape.H * heads,
        "P": shape.K * heads,
        "D": D,
        "heads": heads,
    }


def tiles_of_units(shape: Shape, config: Config) -> int:
    """Blocks that a group's units are shared out over."""
    return -(-max(shape.H, shape.K) // config.units)


def launch(shape: Shape, config: Config) -> dict[str, int]:
    """Of its launches: what csrc/cuda/args.h calls them."""
    return {
        "mode": MODES[config.mode],
        "units": config.units,
        "grid_x": config.at_once,
        "grid_y": tiles_of_units(shape, config),
        "grid_z": shape.groups,
        "tile_rows": config.rows,
        "in_registers": config.in_registers,
    }


def in_steps(shape: Shape, config: Config) -> Config:
    return replace(config, mode="step", at_once=-(-shape.B // ROWS), rows=ROWS)


@functools.lru_cache(maxsize=512)
def fit(
    library: Library, shape: Shape, config: Config, D: int, dtype: torch.dtype, device: torch.device
) -> tuple[Config, tuple[int, ...]]:
    """This configuration, or, of a grid or clusters, the next one that the device, the current one, has room
    for; and Library.plan of it. If not all blocks of a grid are resident at once, the same goes in steps. If
    not all clusters are, tiles of more sequences need fewer of them; if those are too many too, clusters of
    fewer blocks are tried, then none."""
    plan = library.plan({**sizes(shape, D, dtype), **launch(shape, config)})
    tiles = tiles_of_units(shape, config)
    if config.mode == "grid" and plan[0] < config.at_once * tiles * shape.groups:
        return fit(library, shape, in_steps(shape, config), D, dtype, device)
    if config.mode == "cluster":
        at_once = plan[0] // tiles // shape.groups
        rows = -(-shape.B // at_once) if at_once > 0 else ROWS + 1
        if rows > ROWS:
            smaller = replace(shape, cluster_blocks=tiles - 1)
            return fit(library, smaller, configure(smaller), D, dtype, device)
        if rows > config.rows:
            config = replace(config, at_once=-(-shape.B // rows), rows=rows)
            return fit(library, shape, config, D, dtype, device)
    return config, plan


# --- a pass


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Pass:
    """The launches of one pass of a call. values: csrc/cuda/args.h has them all."""

    def __init__(self, library: Library, call: Call, backward: bool) -> None:
        self.library, self.call = library, call
        sizes_of = (call.H, call.P, call.B, call.D, call.heads, call.projected)
        self.shape = shape_of(call.cell, call.x, *sizes_of, backward)
        self.widths = widths(self.shape)
        two = self.widths.used[1] > 0
        first, last = call.params[0], call.params[-1]
        self.values: dict[str, int] = {
            **sizes(self.shape, call.D, call.x.dtype),
            "w_hh_0": _address(first.w_hh),
            "w_hh_1": _address(last.w_hh),
            "w_hr_0": _address(first.w_hr),
            "w_hr_1": _address(last.w_hr),
            "T": call.T,
            "N": call.N,
            "first": 1 if two else 0,
            "last": 2 if two else 0,
            "exact": not allows_tf32(call.x.device),
            "patience": PATIENCE,
        }
        self.adopt(configure(self.shape))

    def adopt(self, config: Config) -> None:
        """This configuration, or what `fit` makes of it."""
        call, shape, values = self.call, self.shape, self.values
        self.config, plan = fit(self.library, shape, config, call.D, call.x.dtype, call.x.device)
        config = self.config
        values |= launch(shape, config)
        blocks = config.at_once * tiles_of_units(shape, config) * shape.groups
        row_bytes = [stride * shape.itemsize * call.B * shape.groups for stride in self.widths.strides]
        read = min(call.B, ROWS) * self.widths.strides[0] * shape.itemsize * blocks
        values["eager"] = read <= EAGER_BYTES
        saved = call.N * call.D * call.H * (call.traits.saved * shape.itemsize + 4 * call.traits.cell_state)
        values["ahead"] = AHEAD_STEPS if saved > CACHED_BYTES else 0
        slots = 2
        if config.mode == "grid":
            steps = call.T + shape.backward
            slots = 1 + min(steps, max(LEAST_STEPS, EXCHANGE_BYTES // max(1, sum(row_bytes))))
        elif config.mode in ("block", "cluster"):
            row_bytes = [0, 0]
        values["slots"] = slots
        kept = [4 * call.D * call.B * call.P, 4 * call.D * call.B * call.H]
        parts = ("weights_1", "weights_2", "exchange_1", "exchange_2", "h_kept", "c_kept")
        bytes_each = (
            plan[5],
            plan[9] * bool(self.widths.used[1]),
            slots * row_bytes[0],
            slots * row_bytes[1],
            *kept,
        )
        offsets = [0]
        for size in bytes_each:
            offsets.append(offsets[-1] + round_up(size, 256))
        # float32, as use_deterministic_algorithms fills no bytes with NaN.
        self.workspace = call.x.new_empty(offsets[-1] // 4, dtype=torch.float32)
        base = self.workspace.data_ptr()
        values |= {name: base + offset for name, offset in zip(parts, offsets, strict=False)}
        self.packs = True

    def run(self, begin: int, end: int, leaves: bool) -> None:
        self.values |= {"begin": begin, "end": end, "starts": begin == 0, "leaves": leaves}
        while not self.library.run(self.values, self.packs, self.call.x.device):
            if begin > 0:  # what the steps before left is where another configuration would not look
                raise RuntimeError(
                    f"fastrnn's CUDA kernels: the device held the blocks of a grid until step {begin}, and "
                    "does not now: others use it"
                )
            self.adopt(in_steps(self.shape, self.config))
        self.packs = False


class Cuda:
    """See fastrnn.gpu.Engine."""

    name, finds_before = "cuda", True

    def __init__(self) -> None:
        self.library = LIBRARY

    def check(self, call: Call) -> None:
        reason = why_not(call.x)
        if reason is not None:
            raise RuntimeError(f"the CUDA kernels cannot serve this call: {reason}")
        if max(call.N, call.T * call.B) * call.D >= 1 << 31:
            raise RuntimeError(f"the CUDA kernels take fewer than 2**31 rows, got {call.N} x {call.D}")

    def forward(self, call: Call, tensors: Forward) -> Callable[[int, int, tuple[int, int]], None]:
        assert self.library is not None
        states = [s.contiguous() for s in call.states]
        one = _Pass(self.library, call, False)
        one.values |= {
            "gates": _address(tensors.gates),
            "y": _address(tensors.y),
            "seq": _address(tensors.seq),
            "mid": _address(tensors.mid),
            "rows": tensors.rows,
            "h_start": _address(states[0]),
            "c_start": _address(states[-1]),
            "h_left": _address(tensors.last[0]),
            "c_left": _address(tensors.last[-1]),
            "offsets": _address(tensors.offsets),
            "flags": _address(tensors.flags),
            "save": tensors.save,
        }
        for d, p in enumerate(call.params):
            one.values |= {f"b_ih_{d}": _address(p.b_ih), f"b_hh_{d}": _address(p.b_hh)}

        def steps(begin: int, end: int, bases: tuple[int, int], kept: Sequence[Tensor] = states) -> None:
            one.values |= {"base_0": bases[0], "base_1": bases[1]}
            one.run(begin, end, end == call.T)

        return steps

    def backward(self, call: Call, tensors: Backward) -> None:
        assert self.library is not None
        states = [s.contiguous() for s in call.states]
        one = _Pass(self.library, call, True)
        one.values |= {
            "dy": _address(tensors.dy),
            "dseq": _address(tensors.dseq),
            "gates": _address(tensors.gates),
            "y": _address(tensors.y),
            "seq": _address(tensors.seq),
            "h_before": _address(tensors.h_before) if call.traits.state else 0,
            "c_before": _address(tensors.c_before),
            "h_first": _address(states[0]),
            "c_first": _address(states[-1]),
            "dg": _address(tensors.dg),
            "dmid": _address(tensors.dmid),
            "h_start": _address(tensors.dlast[0]) if tensors.dlast else 0,
            "c_start": _address(tensors.dlast[-1]) if tensors.dlast else 0,
            "h_left": _address(tensors.dfirst[0]),
            "c_left": _address(tensors.dfirst[-1]),
            "offsets": _address(tensors.offsets),
            "flags": _address(tensors.flags),
        }
        one.run(0, call.T + 1, True)


ENGINE = Cuda()
