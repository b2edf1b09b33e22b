"""RNNCell, LSTMCell and GRUCell: torch.nn's modules of these names, on fastrnn's functions."""

from typing import Any

import torch
from torch import Tensor

from . import functional

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class _Cell(torch.nn.RNNCellBase):
    """What the three cells share: unbatched input, and torch.nn's messages."""

    def _check_dim(self, what: str, tensor: Tensor) -> None:
        if tensor.dim() not in (1, 2):
            name = type(self)._name  # type: ignore[attr-defined]
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")


class RNNCell(_Cell):
    """One step of an Elman RNN: a drop-in for :class:`torch.nn.RNNCell`, which documents the arguments."""

    __constants__ = [*torch.nn.RNNCellBase.__constants__, "nonlinearity"]  # noqa: RUF012
    _name = "RNNCell"
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``h'`` for input ``[N, I]`` or ``[I]`` and ``hx`` ``[N, H]`` or ``[H]`` (None: zeros).

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does.
        """
        self._check_dim("input", input)
        if hx is not None:
            self._check_dim("hidden", hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.rnn_cell(input, hx, *weights, nonlinearity=self.nonlinearity)
        hx = None if hx is None else hx.unsqueeze(0)
        return functional.rnn_cell(input.unsqueeze(0), hx, *weights, nonlinearity=self.nonlinearity).squeeze(0)


class GRUCell(_Cell):
    """One step of a GRU: a drop-in for :class:`torch.nn.GRUCell`, which documents the arguments."""

    _name = "GRUCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``h'`` for input ``[N, I]`` or ``[I]`` and ``hx`` ``[N, H]`` or ``[H]`` (None: zeros).

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does.
        """
        self._check_dim("input", input)
        if hx is not None:
            self._check_dim("hidden", hx)
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.gru_cell(input, hx, *weights)
        return functional.gru_cell(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0), *weights).squeeze(0)


class LSTMCell(_Cell):
    """One step of an LSTM: a drop-in for :class:`torch.nn.LSTMCell`, which documents the arguments."""

    _name = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``(h', c')`` for input ``[N, I]`` or ``[I]`` and ``hx`` a pair of ``[N, H]`` or ``[H]`` (None: zeros).

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does.
        """
        self._check_dim("input", input)
        if hx is not None:
            for index, state in enumerate(hx):
                self._check_dim(f"hx[{index}]", state)
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.lstm_cell(input, hx, *weights)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.lstm_cell(input.unsqueeze(0), hx, *weights)
        return h.squeeze(0), c.squeeze(0)
