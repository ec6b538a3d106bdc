"""A layer's recurrence by the CUDA kernels of csrc/cuda: the engine that fastrnn.gpu calls, and the choice of a
kernel and its tiles, fixed by sizes, type and device."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .gpu import TRAITS, Backward, Call, Forward, capability
from .reference import CELLS

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MIN_CAPABILITY = 80
# csrc/cuda/args.h: how blocks wait for each other.
MODES = {"step": 0, "grid": 1, "block": 2}
# Bytes of what blocks tell each other in one launch, which must be fresh memory, unless that is so few steps.
EXCHANGE_BYTES, LEAST_STEPS = 32 << 20, 16
ROWS, PIECE_BYTES, WARPS = 16, 64, 8  # csrc/cuda/product.h
# What fastrnn_cuda_run says beside CUDA's errors.
_NO_KERNEL, _NOT_RESIDENT = -1, -2
# Looks at one datum before a block gives it up, some 0.5 us each: 30 s or more.
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

    def resident(self, values: dict[str, int]) -> int:
        """Blocks of such a launch that the device holds at once; 0 where there is no such kernel."""
        return int(self.functions.fastrnn_cuda_resident(self._args(values)))

    def plan(self, values: dict[str, int]) -> tuple[int, tuple[int, int, int], tuple[int, int, int]]:
        """Bytes of shared memory of a block; of each stage a warp's pieces of the weights, and how many of them
        registers and then shared memory hold."""
        out = (ctypes.c_int64 * 7)()
        self.functions.fastrnn_cuda_plan(self._args(values), out)
        return out[0], (out[1], out[2], out[3]), (out[4], out[5], out[6])

    def run(self, values: dict[str, int], device: torch.device) -> bool:
        """False where the blocks of a grid could not all be resident; then none has run."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        error = int(self.functions.fastrnn_cuda_run(self._args(values), ctypes.c_void_p(stream)))
        if error in (0, _NOT_RESIDENT):
            return error == 0
        if error == _NO_KERNEL:
            raise RuntimeError("fastrnn's CUDA kernels: none fits this device's shared memory")
        raise RuntimeError(f"fastrnn's CUDA kernels: {self.functions.fastrnn_cuda_error(error).decode()}")


def _load() -> Library | None:
    """None where the library was built without nvcc."""
    path = Path(__file__).parent / "_C.abi3.so"
    try:
        return Library(path)
    except (OSError, AttributeError):
        return None


LIBRARY = _load()


def missing() -> str | None:
    """Why there are no kernels at all."""
    if LIBRARY is None:
        return "this build of fastrnn has no CUDA kernels (FASTRNN_CUDA=1 insists on them)"
    return None


@functools.cache
def _device_missing(index: int | None) -> str | None:
    found = capability(torch.device("cuda", index))
    if found is None:
        return "it takes NVIDIA GPUs"
    if found < MIN_CAPABILITY:
        return f"it takes GPUs of compute capability 8.0 or newer, this one has {found / 10}"
    return None


def why_not(x: Tensor) -> str | None:
    """Why the engine cannot serve a call whose input is x."""
    if missing():
        return missing()
    if x.device.type not in ("cuda", "meta"):
        return f"it takes CUDA tensors, the input is on {x.device}"
    if x.dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        return f"it takes {names}, the input is {str(x.dtype).removeprefix('torch.')}"
    if type(x) is Tensor and x.device.type == "cuda":
        return _device_missing(x.device.index)
    return None


# --- which kernel in which tiles


@dataclass(frozen=True)
class Shape:
    """What the choice depends on: groups (directions x heads) of H units, with K columns of h; B sequences,
    elements of itemsize bytes; so many multiprocessors."""

    cell: str
    H: int
    K: int
    groups: int
    B: int
    itemsize: int
    projected: bool
    backward: bool
    processors: int


@dataclass(frozen=True)
class Config:
    """mode: see MODES; units of a block; at_once: how many tiles of 16 sequences have blocks of their own, which
    take the others one after another; in_registers: whether registers hold weights."""

    mode: str
    units: int
    at_once: int
    in_registers: bool = True

    def __str__(self) -> str:
        return f"blocks of {self.units} units, {self.at_once} tiles of 16 sequences at once"


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


def _seconds(shape: Shape, config: Config) -> float:
    """A step's microseconds by a model of one H100: what blocks read of the cache, of shared memory, and
    multiply, and the time that telling each other takes."""
    traits = TRAITS[shape.cell]
    tiles = -(-shape.B // ROWS)
    own = -(-tiles // config.at_once)
    blocks = shape.groups * config.at_once * -(-max(shape.H, shape.K) // config.units)
    gates = traits.gates if not shape.backward else 1
    width = sum(widths(shape).strides) * shape.itemsize
    weights = gates * config.units * width  # bytes of a block
    held = min(weights, 112 << 10)
    shared = min(weights - held, 96 << 10)
    streamed = weights - held - shared
    rows = min(shape.B, ROWS)
    cache = blocks * own * (rows * width + streamed) / 4.5e6
    multiply = own * 16 * gates * config.units * width / shape.itemsize / 0.6e6
    return 0.8 + cache + own * shared / 0.2e6 + multiply + 0.25 * own


@functools.cache
def configure(shape: Shape) -> Config:
    tiles = -(-shape.B // ROWS)
    if max(shape.H, shape.K) <= 128 and shape.itemsize == 2 and not shape.projected:
        return Config("block", 64 if max(shape.H, shape.K) <= 64 else 128, tiles)
    found = []
    for units in (8, 16, 32):
        of_units = -(-max(shape.H, shape.K) // units)
        most = shape.processors // (of_units * shape.groups)
        if most:
            own = -(-tiles // min(most, tiles))
            found.append(Config("grid", units, -(-tiles // own)))
    if found:
        return min(found, key=lambda config: _seconds(shape, config))
    return Config("step", 16 if shape.itemsize == 4 else 32, tiles)


@functools.cache
def processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def shape_of(call: Call, backward: bool) -> Shape:
    return Shape(
        call.cell,
        call.H // call.heads,
        call.P // call.heads,
        call.D * call.heads,
        call.B,
        call.x.element_size(),
        call.projected,
        backward,
        processors(call.x.device),
    )


# --- weights as the kernels read them


def pack_rows(w: Tensor, gates: int, heads: int, units: int) -> Tensor:
    """Rows of w [gates*H, K], each a gate's unit, as columns of the product: [heads, tiles of units, pieces of k,
    gates x units / 8, lane, 16 bytes]."""
    part = 16 // w.element_size()
    H, K = w.shape[0] // gates // heads, w.shape[1]
    wide, deep = round_up(H, units), round_up(K, 4 * part)
    w = w.view(gates, heads, H, K)
    if (wide, deep) != (H, K):
        w = torch.nn.functional.pad(w, (0, deep - K, 0, wide - H))
    w = w.view(gates, heads, wide // units, units // 8, 8, deep // (4 * part), 4, part)
    return w.permute(1, 2, 5, 0, 3, 4, 6, 7).contiguous()


def pack_columns(w: Tensor, gates: int, heads: int, units: int, tiles: int) -> Tensor:
    """Columns of w [gates*H, K], which are those of the product; k counts its rows, each gate's up to a multiple of
    8. tiles: of units, at least so many."""
    part = 16 // w.element_size()
    H, K = w.shape[0] // gates // heads, w.shape[1]
    tall, wide = round_up(H, 8), tiles * units
    deep = round_up(gates * tall, 4 * part)
    w = w.view(gates, heads, H, K)
    if (tall, wide) != (H, K):
        w = torch.nn.functional.pad(w, (0, wide - K, 0, tall - H))
    w = w.permute(1, 3, 0, 2).reshape(heads, wide, gates * tall)
    if deep != gates * tall:
        w = torch.nn.functional.pad(w, (0, deep - gates * tall))
    w = w.view(heads, tiles, units // 8, 8, deep // (4 * part), 4, part)
    return w.permute(0, 1, 4, 2, 3, 5, 6).contiguous()


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


class _Run:
    """The launches of one pass of a call."""

    def __init__(self, library: Library, call: Call, backward: bool) -> None:
        self.library, self.call, self.backward = library, call, backward
        self.shape = shape_of(call, backward)
        self.widths = widths(self.shape)
        self.two = self.widths.used[1] > 0
        self.kept: list[Tensor] = []
        self.values: dict[str, int] = {
            "cell": list(CELLS).index(call.cell),
            "dtype": DTYPES[call.x.dtype],
            "backward": backward,
            "projected": call.projected,
            "stride_1": self.widths.strides[0],
            "stride_2": self.widths.strides[1],
            "T": call.T,
            "B": call.B,
            "N": call.N,
            "H": call.H,
            "P": call.P,
            "D": call.D,
            "heads": call.heads,
            "first": 1 if self.two else 0,
            "last": 2 if self.two else 0,
            "exact": not (call.x.device.type == "cuda" and torch.backends.cudnn.allow_tf32),
            "patience": PATIENCE,
        }
        self.adopt(configure(self.shape))

    def adopt(self, config: Config) -> None:
        """This configuration, or where the device does not hold its blocks at once, one of steps."""
        call, shape = self.call, self.shape
        tiles = -(-max(shape.H, shape.K) // config.units)
        self.config = config
        self.values |= {
            "mode": MODES[config.mode],
            "units": config.units,
            "grid_x": config.at_once,
            "grid_y": tiles,
            "grid_z": shape.groups,
            "in_registers": config.in_registers,
        }
        if config.mode == "grid":
            blocks = config.at_once * tiles * shape.groups
            if _resident(self.library, tuple(sorted(self._sizes().items())), call.x.device) < blocks:
                self.adopt(replace(config, mode="step", at_once=-(-call.B // ROWS)))
                return
        self.weights(tiles)

    def _sizes(self) -> dict[str, int]:
        names = (
            "cell",
            "dtype",
            "backward",
            "projected",
            "units",
            "mode",
            "grid_x",
            "stride_1",
            "stride_2",
            "B",
        )
        return {name: int(self.values[name]) for name in (*names, "in_registers")}

    def weights(self, tiles: int) -> None:
        call, units, traits = self.call, self.config.units, self.call.traits
        first, second = [], []
        for p in call.params:
            gates = 2 if traits.mid else traits.gates
            r1, r2 = p.w_hh[: gates * call.H], p.w_hh[gates * call.H :]
            if self.backward:
                first.append(pack_columns(r1, gates, call.heads, units, tiles))
                if traits.mid:
                    second.append(pack_columns(r2, 1, call.heads, units, tiles))
                elif p.w_hr is not None:
                    second.append(pack_columns(p.w_hr, 1, 1, units, tiles))
            else:
                first.append(pack_rows(r1, gates, call.heads, units))
                if traits.mid:
                    second.append(pack_rows(r2, 1, call.heads, units))
                elif p.w_hr is not None:
                    second.append(_taller(pack_rows(p.w_hr, 1, 1, units), tiles))
        self.packed = [
            torch.stack(group) if len(group) > 1 else group[0] for group in (first, second) if group
        ]
        self.values["weights_1"] = _address(self.packed[0])
        self.values["weights_2"] = _address(self.packed[1]) if second else 0

    def exchange(self, steps: int) -> tuple[Tensor, Tensor | None]:
        """Fresh places [slots, groups, B, stride] of both stages, of a launch of so many steps."""
        call, grid = self.call, self.config.mode == "grid"
        slots = steps + 1 if grid else 2
        made: list[Tensor] = []
        for used, stride in zip(self.widths.used, self.widths.strides, strict=True):
            if not used:
                continue
            place = call.x.new_empty(slots, self.shape.groups, call.B, stride)
            if grid:
                # kPending of csrc/cuda/types.h.
                place.view(torch.int32 if call.x.element_size() == 4 else torch.int16).fill_(-1)
                if used < stride:
                    place[..., used:].zero_()
            else:
                place.zero_()
            made.append(place)
        self.values["slots"] = slots
        self.values["exchange_1"] = _address(made[0])
        self.values["exchange_2"] = _address(made[1]) if len(made) == 2 else 0
        return made[0], made[1] if len(made) == 2 else None

    def steps(self, begin: int, end: int, start: Callable[[Tensor, int], None]) -> None:
        """All steps, some a launch; start(slot, step): fills the place that a launch's first step reads."""
        shape, call = self.shape, self.call
        per_step = shape.groups * call.B * sum(self.widths.strides) * shape.itemsize
        most = (
            end - begin
            if self.config.mode == "block"
            else max(LEAST_STEPS, EXCHANGE_BYTES // max(per_step, 1))
        )
        for first in range(begin, end, most):
            last = min(end, first + most)
            while True:
                self.values |= {"begin": first, "end": last, "origin": first, "slots": 2}
                if self.config.mode != "block":
                    place, _ = made = self.exchange(last - first)
                    start(place[0], first)
                if self.library.run(self.values, call.x.device):
                    break
                self.adopt(replace(self.config, mode="step", at_once=-(-call.B // ROWS)))
            if self.config.mode != "block":
                self.kept = [t for t in made if t is not None]
                self.newest = place[(last - first) % self.values["slots"]]


def _taller(packed: Tensor, tiles: int) -> Tensor:
    """As many tiles of units as the other stage has; those that have none are zeros."""
    more = tiles - packed.shape[1]
    return torch.cat([packed, packed.new_zeros(1, more, *packed.shape[2:])], 1) if more else packed


@functools.lru_cache(maxsize=512)
def _resident(library: Library, sizes: tuple[tuple[str, int], ...], device: torch.device) -> int:
    return library.resident(dict(sizes))


class Cuda:
    """See fastrnn.gpu.Engine."""

    name = "cuda"

    def __init__(self, library: Library | None = None) -> None:
        self.library = LIBRARY if library is None else library

    def check(self, call: Call) -> None:
        x = call.x
        if self.library is None or why_not(x):
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise RuntimeError(f"the CUDA kernels take {known} on a GPU, got {x.dtype} on {x.device}")
        if max(call.N, call.T * call.B) * call.D >= 1 << 31:
            raise RuntimeError(
                f"the CUDA kernels take fewer than 2**31 rows, got {call.N} of {call.D} directions"
            )

    def forward(self, call: Call, tensors: Forward) -> Callable[[int, int, tuple[int, int]], None]:
        assert self.library is not None
        run = _Run(self.library, call, False)
        run.values |= {
            "gates": _address(tensors.gates),
            "y": _address(tensors.y),
            "seq": _address(tensors.seq),
            "mid": _address(tensors.mid),
            "rows": tensors.rows,
            "h_state": _address(tensors.h_state),
            "c_state": _address(tensors.c_state),
            "offsets": _address(tensors.offsets),
            "flags": _address(tensors.flags),
            "save": tensors.save,
            **{
                f"{n}_{d}": _address(getattr(p, n))
                for d, p in enumerate(call.params)
                for n in ("b_ih", "b_hh")
            },
        }
        K = call.P // call.heads

        def start(place: Tensor, step: int) -> None:
            """h, where the step zeroes it 0."""
            h = tensors.h_state
            if tensors.flags is not None:
                at = [step, call.T - 1 - step]
                cut = torch.stack([tensors.flags[d, at[d]] & 2 != 0 for d in range(call.D)])
                h = h.masked_fill(cut[:, :, None], 0)
            by_head = h.view(call.D, call.B, call.heads, K).transpose(1, 2)
            place.view(call.D, call.heads, call.B, -1)[..., :K].copy_(by_head)
            used = run.widths.used[0]
            if K < used:
                place[..., K:used].zero_()

        def steps(begin: int, end: int, bases: tuple[int, int]) -> None:
            run.values |= {"base_0": bases[0], "base_1": bases[1]}
            run.steps(begin, end, start)

        return steps

    def backward(self, call: Call, tensors: Backward) -> None:
        assert self.library is not None
        run = _Run(self.library, call, True)
        run.values |= {
            "dy": _address(tensors.dy),
            "dseq": _address(tensors.dseq),
            "gates": _address(tensors.gates),
            "seq": _address(tensors.seq),
            "h_before": _address(tensors.h_before) if call.traits.state else 0,
            "c_before": _address(tensors.c_before),
            "dg": _address(tensors.dg),
            "dmid": _address(tensors.dmid),
            "h_state": _address(tensors.h_grad),
            "c_state": _address(tensors.c_grad),
            "offsets": _address(tensors.offsets),
            "flags": _address(tensors.flags),
            "rows": call.N,
        }

        def start(place: Tensor, step: int) -> None:
            """What the launch before told last."""
            if step:
                place.copy_(run.newest)

        run.steps(0, call.T + 1, start)


ENGINE = Cuda()
