"""Modules that torch.fx keeps whole, as it does torch.nn's own layers."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Proxy


def traced(*arguments: Any) -> Proxy | None:
    """The first of fx's stand-ins among a call's arguments, which may be tuples of them."""
    for argument in arguments:
        found = traced(*argument) if isinstance(argument, tuple | list) else argument
        if isinstance(found, Proxy):
            return found
    return None


def leaf_call(module: torch.nn.Module, proxy: Proxy, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Records the module as one `call_module` node of an fx trace, as fx does for torch.nn's own layers.

    args, options: what goes by place and by name; None is what need not be given.
    """
    tracer: Any = proxy.tracer
    while args[-1] is None:
        args = args[:-1]
    given = {name: value for name, value in options.items() if value is not None}
    return tracer.create_proxy("call_module", tracer.path_of_module(module), args, given)
