"""ChildSumTreeLSTM, NaryTreeLSTM and TreeRNN: recursive layers over a `Forest`.

Dimensions: N nodes, I input, H hidden, A arity.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import _checks
from ._fx import leaf_call, traced
from .backends import AUTOCAST_DTYPES, Explanation, autocast_dtype, decide_fused, explained
from .forest import Forest, is_direction
from .tree_ops import tree
from .tree_reference import TREE_CELLS


class _Tree(nn.Module):
    """What the recursive layers share."""

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        arity: int,
        bias: bool,
        direction: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        _checks.integer("input_size", input_size, 0)
        _checks.positive(hidden_size=hidden_size, arity=arity)
        _checks.bool_option("bias", bias)
        self.input_size, self.hidden_size, self.arity = input_size, hidden_size, arity
        self.bias = bias
        self.direction = is_direction(direction)
        cell = TREE_CELLS[self._cell]
        rows = cell.gates * hidden_size
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size, **factory))
        self.weight_hh = nn.Parameter(torch.empty(*cell.weight_hh(hidden_size, arity), **factory))
        if bias:
            self.bias_ih = nn.Parameter(torch.empty(rows, **factory))
            self.bias_hh = nn.Parameter(torch.empty(rows, **factory))
        else:
            self.register_parameter("bias_ih", None)
            self.register_parameter("bias_hh", None)
        self.reset_parameters()

    @property
    def _cell(self) -> str:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Uniform within 1/sqrt(H), in the order of the parameters: torch.nn's cells."""
        bound = 1.0 / math.sqrt(self.hidden_size)
        for weight in self.parameters():
            nn.init.uniform_(weight, -bound, bound)

    def extra_repr(self) -> str:
        text = f"{self.input_size}, {self.hidden_size}"
        if not TREE_CELLS[self._cell].summed:
            text += f", arity={self.arity}"
        if not self.bias:
            text += ", bias=False"
        return text + ("" if self.direction == "up" else f", direction='{self.direction}'")

    def _explain(self, x: Tensor | None) -> Explanation:
        first = self.weight_ih if x is None else x
        return explained(decide_fused(first, "recursive cells"), first, self._cell, "levels")

    def _states(self, x: Tensor | None, forest: Forest) -> tuple[Tensor, ...]:
        if not isinstance(forest, Forest):
            raise TypeError(f"forest must be a fastrnn.Forest, got {type(forest).__name__}")
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"x must be a Tensor or None, got {type(x).__name__}")
        params: list[Tensor] = [self.weight_ih, self.weight_hh]
        if self.bias_ih is not None:
            params += [self.bias_ih, self.bias_hh]
        cell, N = TREE_CELLS[self._cell], forest.num_nodes
        rows = cell.gates * self.hidden_size
        shapes = [(rows, self.input_size), cell.weight_hh(self.hidden_size, self.arity), (rows,), (rows,)]
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        for name, p, shape in zip(names, params, shapes, strict=False):
            if p.shape != shape:
                raise RuntimeError(f"{name} must be {list(shape)}, got {list(p.shape)}")
            _checks.same_dtype(name, p, params[0])
        if x is not None:
            if x.dim() != 2 or x.shape != (N, self.input_size):
                raise ValueError(
                    f"x must be [N, I] = [{N}, {self.input_size}] for the forest's {N} nodes, "
                    f"got {list(x.shape)}"
                )
            _checks.same_dtype("x", x, params[0])
        first = params[0] if x is None else x
        _checks.same_device(first, [], params)
        if first.device != forest.device and first.device.type != "meta":
            raise RuntimeError(
                f"the forest is on {forest.device}, the input and the parameters are on {first.device}: "
                "use forest.to(device)"
            )
        if not cell.summed:
            forest.check_arity(self.arity)
        dtype = autocast_dtype(first)
        if dtype is not None:
            params = [p.to(dtype) if p.dtype in AUTOCAST_DTYPES else p for p in params]
            x = None if x is None else x.to(dtype)
        return tree(self._cell, x, params, forest, is_direction(self.direction))


class _TreeLSTM(_Tree):
    def forward(self, x: Tensor | None, forest: Forest) -> tuple[Tensor, Tensor]:
        """(h, c), each [N, H], of every node.

        x       [N, I], of the parameters' dtype (under autocast of any), rows in the forest's node order;
                None where nodes have no input
        forest  a `Forest` on the parameters' device
        Raises ValueError for an x of another shape and, naming the node, for more children than the arity;
        TypeError for what is no Forest, RuntimeError for dtypes and devices.
        """
        proxy = traced(x, forest)
        if proxy is not None:
            both: tuple[Tensor, Tensor] = leaf_call(self, proxy, (x, forest), {})
            return both
        h, c = self._states(x, forest)
        return h, c


class ChildSumTreeLSTM(_TreeLSTM):
    """The Child-Sum Tree-LSTM (Tai, Socher & Manning 2015, arXiv:1503.00075, eq. 2 to 8), for any number of
    children.

    h~ = sum_k h_k over the children k of a node, and with b = b_ih + b_hh

    i = sigmoid(W_i x + U_i h~ + b_i)      f_k = sigmoid(W_f x + U_f h_k + b_f)
    o = sigmoid(W_o x + U_o h~ + b_o)      g = tanh(W_g x + U_g h~ + b_g)  (the paper's u)
    c = i g + sum_k f_k c_k                h = o tanh(c)

    input_size    I; 0 where no node has an input
    hidden_size   H
    direction     "up": from the children to their parent; "down": from a parent to each of its children,
                  whose only k is then the parent

    Parameters weight_ih [4*H, I] (W), weight_hh [4*H, H] (U), bias_ih, bias_hh [4*H], gate order i, f, g, o:
    those of torch.nn.LSTMCell, whose state dict loads. On chains it is an LSTM.
    Raises ValueError and TypeError for sizes and options that are none.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        direction: str = "up",
    ) -> None:
        super().__init__(input_size, hidden_size, 1, bias, direction, device, dtype)

    @property
    def _cell(self) -> str:
        return "child_sum_lstm"


class NaryTreeLSTM(_TreeLSTM):
    """The N-ary Tree-LSTM (Tai, Socher & Manning 2015, arXiv:1503.00075, eq. 9 to 14), with weights for each
    slot.

    Children stand in slots 1 .. A (`Forest.from_parents(slots=)` counts from 0); h_l = c_l = 0 where slot l
    is empty. With b = b_ih + b_hh

    i = sigmoid(W_i x + sum_l U_il h_l + b_i)    f_k = sigmoid(W_f x + sum_l U_fkl h_l + b_f)
    o = sigmoid(W_o x + sum_l U_ol h_l + b_o)    g = tanh(W_g x + sum_l U_gl h_l + b_g)  (the paper's u)
    c = i g + sum_k f_k c_k                      h = o tanh(c)

    input_size    I; 0 where no node has an input
    hidden_size   H
    arity         A
    direction     "up": from the children to their parent; "down": from a parent to each of its children: the
                  parent's state stands in the child's slot, the others are empty

    Parameters weight_ih [4*H, I] (rows i, f, g, o), weight_hh [(3+A)*H, A*H] (rows i, f_1 .. f_A, g, o,
    columns slot 1 .. A), bias_ih, bias_hh [4*H]. With arity=1 the state dict of torch.nn.LSTMCell loads.
    Raises ValueError and TypeError for sizes and options that are none.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        arity: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        direction: str = "up",
    ) -> None:
        super().__init__(input_size, hidden_size, arity, bias, direction, device, dtype)

    @property
    def _cell(self) -> str:
        return "nary_lstm"


class TreeRNN(_Tree):
    r"""The recursive network (Socher, Lin, Ng & Manning 2011): h = f(U x + W [h_1; ..; h_A] + b_ih + b_hh).

    f is tanh or relu; a missing child's h is zero, so a leaf is f(U x + b).

    input_size    I; 0 where no node has an input
    hidden_size   H
    arity         A
    nonlinearity  "tanh" or "relu"
    direction     as in `NaryTreeLSTM`

    Parameters weight_ih [H, I] (U), weight_hh [H, A*H] (W, columns slot 1 .. A), bias_ih, bias_hh [H]. With
    arity=1 the state dict of torch.nn.RNNCell loads.
    Raises ValueError for an unknown nonlinearity, ValueError and TypeError for sizes that are none.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        arity: int = 2,
        nonlinearity: str = "tanh",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        direction: str = "up",
    ) -> None:
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
        self.nonlinearity = nonlinearity
        super().__init__(input_size, hidden_size, arity, bias, direction, device, dtype)

    @property
    def _cell(self) -> str:
        return f"tree_rnn_{self.nonlinearity}"

    def forward(self, x: Tensor | None, forest: Forest) -> Tensor:
        """h [N, H] of every node; arguments and errors as `NaryTreeLSTM`'s."""
        proxy = traced(x, forest)
        if proxy is not None:
            h: Tensor = leaf_call(self, proxy, (x, forest), {})
            return h
        return self._states(x, forest)[0]

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.nonlinearity == "tanh" else f"{text}, nonlinearity={self.nonlinearity}"
