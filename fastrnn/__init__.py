"""fastrnn: fused recurrent layers that stand in for torch.nn's.

import fastrnn
lstm = fastrnn.LSTM(256, 512, num_layers=2)   # torch.nn.LSTM's signature, parameters and results
"""

from . import diagnostics, functional, init
from ._version import __version__
from .attention import Attention
from .backends import BackendError, Explanation, backend, explain
from .bidirectional import Bidirectional
from .cells import GRUCell, LSTMCell, RNNCell
from .conversion import convert, revert
from .decoder import AttentionDecoder
from .forest import Forest
from .generation import generate
from .inference import freeze, quantize
from .markov import MarkovModel
from .modules import GRU, LSTM, RNN, States
from .onnx import export_onnx
from .ops import GRUFunction, LSTMFunction, RNNFunction
from .tree import ChildSumTreeLSTM, NaryTreeLSTM, TreeRNN

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Attention",
    "AttentionDecoder",
    "BackendError",
    "Bidirectional",
    "ChildSumTreeLSTM",
    "Explanation",
    "Forest",
    "GRUCell",
    "GRUFunction",
    "LSTMCell",
    "LSTMFunction",
    "MarkovModel",
    "NaryTreeLSTM",
    "RNNCell",
    "RNNFunction",
    "States",
    "TreeRNN",
    "__version__",
    "backend",
    "convert",
    "diagnostics",
    "explain",
    "export_onnx",
    "freeze",
    "functional",
    "generate",
    "init",
    "quantize",
    "revert",
]
