"""What the tests put in the place of parts of Triton's interpreter.

It runs a launch's programs one after another, so one that waits for another would wait for ever. Here each is
a process of its own; they share the tensors' memory and run at once, as on a GPU.

And half of its time goes to what has no effect, which is left out: it patches triton.language again at each
call of a function inside a kernel, and computes whether a sum or product of integers overflows, which it then
looks at in its debug mode alone."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import traceback
from typing import Any

import torch
from triton.runtime import interpreter

# Seconds after which a program that still waits is ended, and its test fails.
PATIENCE = 100
_run = interpreter.GridExecutor.__call__
_patch = interpreter._patch_lang
_builder = interpreter.interpreter_builder
# The globals of the functions for which triton.language is patched while a launch runs.
_patched: set[int] = set()


def _launch(executor: Any, *args: Any, **options: Any) -> None:
    _patched.clear()
    try:
        _run(executor, *args, **options)
    finally:
        _patched.clear()


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
    _launch(executor, *args, **options)


def patch(function: Any) -> Any:
    """Stands in for interpreter._patch_lang. Only a launch, the first to call, uses what it returns."""
    key = id(function.__globals__)
    if key in _patched:
        return None
    scope = _patch(function)
    _patched.add(key)
    return scope


def run(executor: Any, *args: Any, **options: Any) -> None:
    """Stands in for GridExecutor.__call__: programs that meet run side by side."""
    if not options.get("GRID"):
        _launch(executor, *args, **options)
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
    quick = dataclasses.replace(_builder.options, sanitize_overflow=False)
    monkeypatch.setattr(_builder, "options", quick)
