"""RNNCell, LSTMCell and GRUCell: torch.nn's modules of these names, on fastrnn's functions."""

from typing import Any

import torch
from torch import Tensor

from . import _backend, functional
from ._init import RecurrentInit, apply_options, option_words, set_options

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]


class _Cell(torch.nn.RNNCellBase):
    """What the three cells share: unbatched input, torch.nn's messages, and how the parameters begin."""

    recurrent_init: str = "uniform"
    forget_bias: float | None = None

    def reset_parameters(self) -> None:
        """As torch.nn does; then ``recurrent_init`` and ``forget_bias``, if they were given."""
        super().reset_parameters()
        apply_options(self, [""])

    def extra_repr(self) -> str:
        return super().extra_repr() + option_words(self)

    def _check_dim(self, name: str, what: str, tensor: Tensor) -> None:
        if tensor.dim() not in (1, 2):
            raise ValueError(f"{name}: Expected {what} to be 1D or 2D, got {tensor.dim()}D instead")

    def _scripted(self, input: Tensor, hx: list[Tensor]) -> list[Tensor]:
        """What torch.jit.script compiles in place of fastrnn's functions: torch's own op. The new states."""
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            hx = [state.unsqueeze(0) for state in hx]
        if len(hx) == 0:
            hx = [torch.zeros(input.size(0), self.hidden_size, dtype=input.dtype, device=input.device)] * 2
        results = self._torch_step(input, hx)
        return [state.squeeze(0) for state in results] if unbatched else results

    def _torch_step(self, input: Tensor, hx: list[Tensor]) -> list[Tensor]:
        """The new states, by torch's own op."""
        raise NotImplementedError


class RNNCell(_Cell):
    """One step of an Elman RNN: a drop-in for :class:`torch.nn.RNNCell`, which documents the arguments.

    ``recurrent_init``, keyword only, as for :class:`fastrnn.RNN`.
    """

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
        *,
        recurrent_init: RecurrentInit = "uniform",
    ) -> None:
        set_options(self, recurrent_init)
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def _torch_step(self, input: Tensor, hx: list[Tensor]) -> list[Tensor]:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if self.nonlinearity == "tanh":
            return [torch._VF.rnn_tanh_cell(input, hx[0], *weights)]
        return [torch._VF.rnn_relu_cell(input, hx[0], *weights)]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``h'`` for input ``[N, I]`` or ``[I]`` and ``hx`` ``[N, H]`` or ``[H]`` (None: zeros).

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102, alone, as only so is what follows not compiled
            if _backend.traced_by_fx(input):
                return _backend.node_of(self, input, hx)
        self._check_dim("RNNCell", "input", input)
        if hx is not None:
            self._check_dim("RNNCell", "hidden", hx)
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        if torch.jit.is_scripting():
            return self._scripted(input, [] if hx is None else [hx])[0]
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.rnn_cell(input, hx, *weights, nonlinearity=self.nonlinearity)
        hx = None if hx is None else hx.unsqueeze(0)
        return functional.rnn_cell(input.unsqueeze(0), hx, *weights, nonlinearity=self.nonlinearity).squeeze(0)


class GRUCell(_Cell):
    """One step of a GRU: a drop-in for :class:`torch.nn.GRUCell`, which documents the arguments.

    ``recurrent_init``, keyword only, as for :class:`fastrnn.GRU`.
    """

    _name = "GRUCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_init: RecurrentInit = "uniform",
    ) -> None:
        set_options(self, recurrent_init)
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def _torch_step(self, input: Tensor, hx: list[Tensor]) -> list[Tensor]:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        return [torch._VF.gru_cell(input, hx[0], *weights)]

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """``h'`` for input ``[N, I]`` or ``[I]`` and ``hx`` ``[N, H]`` or ``[H]`` (None: zeros).

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102, alone, as only so is what follows not compiled
            if _backend.traced_by_fx(input):
                return _backend.node_of(self, input, hx)
        self._check_dim("GRUCell", "input", input)
        if hx is not None:
            self._check_dim("GRUCell", "hidden", hx)
        if torch.jit.is_scripting():
            return self._scripted(input, [] if hx is None else [hx])[0]
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.gru_cell(input, hx, *weights)
        return functional.gru_cell(input.unsqueeze(0), None if hx is None else hx.unsqueeze(0), *weights).squeeze(0)


class LSTMCell(_Cell):
    """One step of an LSTM: a drop-in for :class:`torch.nn.LSTMCell`, which documents the arguments.

    ``recurrent_init`` and ``forget_bias``, keyword only, as for :class:`fastrnn.LSTM`.
    """

    _name = "LSTMCell"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_init: RecurrentInit = "uniform",
        forget_bias: float | None = None,
    ) -> None:
        set_options(self, recurrent_init, forget_bias)
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def _torch_step(self, input: Tensor, hx: list[Tensor]) -> list[Tensor]:
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        h, c = torch._VF.lstm_cell(input, hx, *weights)
        return [h, c]

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """``(h', c')`` for input ``[N, I]`` or ``[I]`` and ``hx`` a pair of ``[N, H]`` or ``[H]`` (None: zeros).

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does.
        """
        if not torch.jit.is_scripting():  # noqa: SIM102, alone, as only so is what follows not compiled
            if _backend.traced_by_fx(input):
                return _backend.node_of(self, input, hx)
        self._check_dim("LSTMCell", "input", input)
        if hx is not None:
            for index, state in enumerate(hx):
                self._check_dim("LSTMCell", f"hx[{index}]", state)
        if torch.jit.is_scripting():
            results = self._scripted(input, [] if hx is None else [hx[0], hx[1]])
            return results[0], results[1]
        weights = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if input.dim() == 2:
            return functional.lstm_cell(input, hx, *weights)
        hx = None if hx is None else (hx[0].unsqueeze(0), hx[1].unsqueeze(0))
        h, c = functional.lstm_cell(input.unsqueeze(0), hx, *weights)
        return h.squeeze(0), c.squeeze(0)
