"""What the tests put in the place of parts of Triton's interpreter.

It runs a launch's programs one after another, so one that waits for another would wait for ever. Here each is
a process of its own; they share the tensors' memory and run at once, as on a GPU. And more than half of its
time went on triton.language, patched anew at each call of a function inside a kernel, and on looks for an
integer's overflow, by some ten operations of its own each: here once a launch and module, and by numpy."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter

# Seconds after which a program that still waits is ended, and its test fails.
PATIENCE = 100
_run = interpreter.GridExecutor.__call__
_patch = interpreter._patch_lang
_builder = interpreter.interpreter_builder
_patched: set[int] = set()  # the globals of the functions for which this launch has done so


def _program(executor: Any, place: tuple[int, ...], args: Any, options: Any) -> None:
    """One program, in the forked process."""
    dims, executor.grid = executor.grid, (1, 1, 1)
    set_dims, set_place, add = _builder.set_grid_dim, _builder.set_grid_idx, _builder.create_atomic_rmw

    def yielding(*given: Any) -> Any:
        os.sched_yield()  # there are more programs than cores
        return add(*given)

    _builder.set_grid_dim = lambda *_: set_dims(*dims)
    _builder.set_grid_idx = lambda *_: set_place(*place)
    _builder.create_atomic_rmw = yielding
    executor._restore_args_dev = lambda *_: None  # the results are in place
    _run(executor, *args, **options)


def patch(function: Any) -> Any:
    """Stands in for interpreter._patch_lang, whose result only a launch looks at."""
    if id(function.__globals__) in _patched:
        return None
    _patched.add(id(function.__globals__))
    return _patch(function)


def look_for_overflow(lhs: Any, rhs: Any, operation: Any) -> None:
    """Stands in for TritonSemantic.binary_op_sanitize_overflow_impl."""
    if lhs.type.scalar.int_bitwidth < 64:
        ufunc = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        exact = ufunc(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        limits = np.iinfo(lhs.handle.data.dtype)
        assert limits.min <= exact.min() <= exact.max() <= limits.max, (
            f"overflow of {lhs.dtype}: {operation.__name__}"
        )


def run(executor: Any, *args: Any, **options: Any) -> None:
    """Stands in for GridExecutor.__call__: programs that meet run side by side."""
    _patched.clear()
    if not options.get("GRID"):
        _run(executor, *args, **options)
        return
    for tensor in args:
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            tensor.untyped_storage().share_memory_()
    x, y, z = executor.grid
    children = []
    for place in [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]:
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            signal.alarm(PATIENCE)
            _program(executor, place, args, options)
            code = 0
        except BaseException:
            traceback.print_exc(file=sys.__stderr__)
        finally:
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not any(codes), f"programs ended with {codes}"


def install(monkeypatch: Any) -> None:
    monkeypatch.setattr(interpreter, "_patch_lang", patch)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    semantic = interpreter.interpreter_semantic
    monkeypatch.setattr(semantic, "binary_op_sanitize_overflow_impl", look_for_overflow)
