"""Fused RNN, LSTM and GRU layers for PyTorch, drop-in for torch.nn's.

from fastrnn import LSTM                 # instead of: from torch.nn import LSTM
model = fastrnn.convert(model)           # or over a whole model
"""

from . import _backend

__version__ = "0.1.0"

_backend.initialize()

from . import functional, onnx  # noqa: E402
from ._backend import backend  # noqa: E402
from ._explain import build_info, explain  # noqa: E402
from .cells import GRUCell, LSTMCell, RNNCell  # noqa: E402
from .convert import convert, to_torch  # noqa: E402
from .modules import GRU, LSTM, RNN, LSTMStates, States  # noqa: E402
from .streaming import StreamingSession  # noqa: E402

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "LSTMStates",
    "RNNCell",
    "States",
    "StreamingSession",
    "__version__",
    "backend",
    "build_info",
    "convert",
    "explain",
    "functional",
    "onnx",
    "to_torch",
]
