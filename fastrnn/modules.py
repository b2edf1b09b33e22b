"""RNN, LSTM and GRU: torch.nn's modules of these names, on fastrnn's functions.

They derive from torch.nn.RNNBase, which has the parameters, the initialisation and the serialisation; not from
torch.nn.LSTM and its kin, at whose instances torch.compile breaks the graph.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import _backend
from ._init import RecurrentInit, apply_options, option_words, set_options
from ._stack import stack

__all__ = ["GRU", "LSTM", "RNN", "LSTMStates", "States"]

_CELLS = {"RNN_TANH": "rnn_tanh", "RNN_RELU": "rnn_relu", "LSTM": "lstm", "GRU": "gru"}


class States(NamedTuple):
    """What ``forward_states`` of RNN and GRU returns.

    ``h`` has the hidden state of every layer, direction and step: ``[L*D, T, N, H]``, ``[L*D, N, T, H]`` with
    batch_first, ``[L*D, T, H]`` unbatched, ``[L*D, rows, H]`` packed; row ``layer * D + direction`` as in ``h_n``.
    """

    output: Tensor | PackedSequence
    h_n: Tensor
    h: Tensor


class LSTMStates(NamedTuple):
    """What ``forward_states`` of LSTM returns: as :class:`States`, and the cell states ``c``, always H wide."""

    output: Tensor | PackedSequence
    state: tuple[Tensor, Tensor]
    h: Tensor
    c: Tensor


class _Layers(torch.nn.RNNBase):
    """What the three modules share; a hidden state is one tensor, or for the LSTM a pair."""

    _name: ClassVar[str]  # in error messages
    _input_error: ClassVar[str] = "{}: Expected input to be 2D or 3D, got {}D instead"

    recurrent_init: str = "uniform"
    forget_bias: float | None = None

    def __init__(
        self,
        mode: str,
        *args: Any,
        recurrent_init: str = "uniform",
        forget_bias: float | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        set_options(self, recurrent_init, forget_bias)
        if device is not None:  # torch.nn takes it by position too
            kwargs["device"] = device
        super().__init__(mode, *args, **kwargs)

    def reset_parameters(self) -> None:
        """As torch.nn does; then ``recurrent_init`` and ``forget_bias``, if they were given."""
        super().reset_parameters()
        names = self._flat_weights_names
        apply_options(self, [name.removeprefix("weight_hh") for name in names if name.startswith("weight_hh")])

    def extra_repr(self) -> str:
        return super().extra_repr() + option_words(self)

    def flatten_parameters(self) -> None:
        """Do nothing: the weights need not lie together."""

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """As torch.nn does, but against the weight that forward will use, functional_call's for one."""
        weight = self._parameters.get("weight_ih_l0")
        dtype = (self.weight_ih_l0 if weight is None else weight).dtype
        if input.dtype != dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({dtype}). "
                f"Convert input: input.to({dtype}), or convert model: model.to({input.dtype})"
            )
        expected = 2 if batch_sizes is not None else 3
        if input.dim() != expected:
            raise RuntimeError(f"input must have {expected} dimensions, got {input.dim()}")
        if self.input_size != input.size(-1):
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _plain(self, input: Tensor, hx: Any) -> tuple[Tensor, Any] | None:
        """The commonest call: one layer, batched, native, no feature; None for any other, and for one with a fault.

        A small layer takes less time than torch.nn's checks and the stack between it and the caller. The op has all of
        these checks itself; only to put a complaint into torch.nn's words are they made here, once it has refused.
        """
        if self.num_layers != 1 or isinstance(input, PackedSequence) or input.dim() != 3:
            return None
        if _backend.choose(input, False) != "native" or (hx is None and _backend.wants_states()):
            return None
        lstm = self.mode == "LSTM"
        states = () if hx is None else hx if lstm else (hx,)
        if lstm and hx is not None and len(hx) != 2:
            return None
        weights, two, batch_first = self._weights(), self.bidirectional, self.batch_first
        try:
            result = _backend.native_layer(
                _CELLS[self.mode], input, states, weights, None, None, None, two, batch_first, False
            )
        except (RuntimeError, TypeError):
            return None
        return result[0], (result[1], result[2]) if lstm else result[1]

    def _weights(self) -> list[Tensor]:
        # never _flat_weights: _parameters is what torch.func.functional_call writes to; what is missing there is an
        # attribute, of a parametrization, a pruning hook or a data-parallel replica
        p: dict[str, Any] = self._parameters
        return [p[name] if name in p else getattr(self, name) for name in self._flat_weights_names]

    def _hidden_dims_error(self, hx: Any, dim: int) -> str | None:
        """The complaint about a hidden state that is not ``dim``-dimensional."""
        return None if hx.dim() == dim else f"hx should also be {dim}-D but got {hx.dim()}-D tensor"

    def _forward(
        self, input: Any, hx: Any, lengths: Tensor | None, reset: Tensor | None, need_steps: bool = False
    ) -> tuple[Any, Any, list[Tensor]]:
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx, lengths, reset, need_steps)
        dim = input.dim()
        if dim != 2 and dim != 3:
            raise ValueError(self._input_error.format(self._name, dim))
        if hx is not None:
            complaint = self._hidden_dims_error(hx, dim)
            if complaint is not None:
                raise RuntimeError(f"For {'unbatched 2-D' if dim == 2 else 'batched 3-D'} input, {complaint}")
        if dim == 2:
            return self._forward_unbatched(input, hx, lengths, reset, need_steps)
        if hx is None:
            self.check_input(input, None)
        else:
            self.check_forward_args(input, hx, None)
        return self._run(input, hx, lengths, reset, None, need_steps)

    def _forward_unbatched(
        self, input: Tensor, hx: Any, lengths: Tensor | None, reset: Tensor | None, need_steps: bool
    ) -> tuple[Tensor, Any, list[Tensor]]:
        """A batch of one; lengths is then of shape (), reset (T,)."""
        batch_dim = 0 if self.batch_first else 1
        if isinstance(lengths, Tensor):  # what is none is refused further down
            if lengths.dim() != 0:
                raise ValueError(f"lengths should have the shape () for unbatched input, got: {tuple(lengths.shape)}")
            lengths = lengths.unsqueeze(0)
        if isinstance(reset, Tensor):
            if reset.shape != input.shape[:1]:
                raise ValueError(
                    f"reset should have the shape (T,) = {tuple(input.shape[:1])} for unbatched input, "
                    f"got: {tuple(reset.shape)}"
                )
            reset = reset.unsqueeze(batch_dim)
        input = input.unsqueeze(batch_dim)
        hx = None if hx is None else self._map_hidden(hx, lambda state: state.unsqueeze(1))
        plain = self._plain(input, hx) if lengths is None and reset is None and not need_steps else None
        steps: list[Tensor] = []
        if plain is not None:
            output, hidden = plain
        else:
            if hx is None:
                self.check_input(input, None)
            else:
                self.check_forward_args(input, hx, None)
            output, hidden, steps = self._run(input, hx, lengths, reset, None, need_steps)
        hidden = self._map_hidden(hidden, lambda state: state.squeeze(1))
        return output.squeeze(batch_dim), hidden, [step.squeeze(batch_dim + 1) for step in steps]

    def _forward_packed(
        self, input: PackedSequence, hx: Any, lengths: Tensor | None, reset: Tensor | None, need_steps: bool
    ) -> tuple[PackedSequence, Any, list[Tensor]]:
        data, batch_sizes, sorted_indices, unsorted_indices = input
        if hx is not None:
            hx = self.permute_hidden(hx, sorted_indices)
        self._check_packed(data, hx, batch_sizes)
        output, hidden, steps = self._run(data, hx, lengths, reset, batch_sizes, need_steps)
        packed = PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices)
        return packed, self.permute_hidden(hidden, unsorted_indices), steps

    def _check_packed(self, data: Tensor, hx: Any, batch_sizes: Tensor) -> None:
        if hx is None or torch.compiler.is_compiling():  # reading batch_sizes is not for a compiled graph
            self.check_input(data, batch_sizes)
        else:
            self.check_forward_args(data, hx, batch_sizes)

    def _map_hidden(self, hx: Any, function: Any) -> Any:
        return function(hx)

    def __prepare_scriptable__(self) -> "_Layers":
        """Called by torch.jit.script: the compiled code reads the parameters where torch.nn's does."""
        for name in self._flat_weights_names:
            if name not in self._parameters:
                raise RuntimeError(
                    f"torch.jit.script cannot compile {self._name} while {name} is parametrized or pruned: "
                    "make that permanent first (remove_parametrizations, prune.remove), or use torch.jit.trace"
                )
        return self

    def _scripted(self, input: Tensor, hx: list[Tensor], lengths: Tensor | None, reset: Tensor | None) -> list[Tensor]:
        """What torch.jit.script compiles in place of all the rest: torch's own op. Output and final states."""
        if lengths is not None or reset is not None:
            raise RuntimeError("lengths and reset are not available under torch.jit.script; torch.jit.trace keeps them")
        # torch's op checks little, and reads and writes beyond what is smaller than it thinks
        name, dim = "RNN" if self.mode.startswith("RNN") else self.mode, input.dim()
        batch_dim = 0 if self.batch_first else 1
        unbatched = dim == 2
        if dim != 2 and dim != 3:
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {dim}D instead")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )
        for state in hx:
            if state.dim() != dim:
                raise RuntimeError(f"For {dim}-D input, hx should also be {dim}-D but got {state.dim()}-D tensor")
        if unbatched:
            input = input.unsqueeze(batch_dim)
            hx = [state.unsqueeze(1) for state in hx]
        rows, batch = self.num_layers * (2 if self.bidirectional else 1), input.size(batch_dim)
        outputs = self.proj_size if self.proj_size > 0 else self.hidden_size
        sizes = [outputs, self.hidden_size][: 2 if self.mode == "LSTM" else 1]
        for index, state in enumerate(hx):
            expected = [rows, batch, sizes[index]]
            if state.size() != expected:
                raise RuntimeError(f"Expected hidden[{index}] size {expected}, got {state.size()}")
        if len(hx) == 0:
            for size in sizes:
                hx.append(torch.zeros(rows, batch, size, dtype=input.dtype, device=input.device))
        weights = torch.jit.annotate(list[Tensor], self._flat_weights)
        bias, layers = self.bias, self.num_layers
        dropout, both, first = self.dropout, self.bidirectional, self.batch_first
        if self.mode == "LSTM":
            output, h_n, c_n = torch._VF.lstm(input, hx, weights, bias, layers, dropout, self.training, both, first)
            results = [output, h_n, c_n]
        else:
            if self.mode == "GRU":
                pair = torch._VF.gru(input, hx[0], weights, bias, layers, dropout, self.training, both, first)
            elif self.mode == "RNN_TANH":
                pair = torch._VF.rnn_tanh(input, hx[0], weights, bias, layers, dropout, self.training, both, first)
            else:
                pair = torch._VF.rnn_relu(input, hx[0], weights, bias, layers, dropout, self.training, both, first)
            results = [pair[0], pair[1]]
        if unbatched:
            results = [results[0].squeeze(batch_dim)] + [state.squeeze(1) for state in results[1:]]
        return results

    def _run(
        self,
        input: Tensor,
        hx: Any,
        lengths: Tensor | None,
        reset: Tensor | None,
        batch_sizes: Tensor | None,
        need_steps: bool,
    ) -> tuple[Tensor, Any, list[Tensor]]:
        output, hidden, steps = stack(
            _CELLS[self.mode],
            input,
            (hx,) if isinstance(hx, Tensor) else hx,
            self._weights(),
            self.bias,
            self.num_layers,
            self.dropout,
            self.training,
            self.bidirectional,
            self.batch_first,
            lengths,
            reset,
            batch_sizes,
            need_steps,
        )
        final = (hidden[0], hidden[1]) if self.mode == "LSTM" else hidden[0]
        return output, final, self._gather_steps(steps) if need_steps else []

    def _gather_steps(self, by_layer: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Of each state, ``[..., D*H]`` for every layer, one ``[L*D, ..., H]``."""
        directions = 2 if self.bidirectional else 1
        return [
            torch.cat([layer.unflatten(-1, (directions, -1)).movedim(-2, 0) for layer in layers])
            for layers in zip(*by_layer, strict=True)
        ]


class _SingleState(_Layers):
    """RNN and GRU: the hidden state is one tensor."""

    @overload
    def forward(
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(self, input: PackedSequence, hx: Tensor | None = None) -> tuple[PackedSequence, Tensor]: ...

    # a PackedSequence too; but what torch.jit.script compiles has the types written here
    def forward(  # type: ignore[misc]
        self, input: Tensor, hx: Tensor | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run the layers.

        Parameters
        ----------
        input : ``[T, N, I]``, ``[N, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence.
        hx : ``[L*D, N, H]``, unbatched ``[L*D, H]``; None: zeros.
        lengths : integers ``[N]`` in any order, unbatched ``[]``: the valid steps of each row. The output is zero
            beyond them and the final state that of the last valid step. Not with a PackedSequence.
        reset : bool ``[T, N]``, ``[N, T]`` with batch_first, ``[T]`` unbatched: a new sequence starts here, with a
            state of zeros. Not with a PackedSequence.

        Returns
        -------
        output : ``[T, N, D*H]``, laid out as the input.
        h_n : ``[L*D, N, H]``, unbatched ``[L*D, H]``.

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does; and ValueError or TypeError for bad ``lengths`` or ``reset``.
        """
        if torch.jit.is_scripting():
            results = self._scripted(input, [] if hx is None else [hx], lengths, reset)
            return results[0], results[1]
        else:
            if _backend.traced_by_fx(input):
                return _backend.node_of(self, input, hx, lengths, reset)
            if lengths is None and reset is None:
                plain = self._plain(input, hx)
                if plain is not None:
                    return plain
            output, hidden, _ = self._forward(input, hx, lengths, reset)
            return output, hidden

    def forward_states(
        self, input: Any, hx: Tensor | None = None, lengths: Tensor | None = None, reset: Tensor | None = None
    ) -> States:
        """As forward, with the hidden state of every layer, direction and step; all differentiable."""
        output, hidden, (h,) = self._forward(input, hx, lengths, reset, need_steps=True)
        return States(output, hidden, h)


class RNN(_SingleState):
    """Elman RNN layers with tanh or relu: a drop-in for :class:`torch.nn.RNN`, which documents the arguments.

    ``forward`` also takes ``lengths`` and ``reset``, and there is ``forward_states``.

    Parameters
    ----------
    recurrent_init : "uniform", as torch.nn, or "orthogonal": the recurrent weights of each gate begin as an orthogonal
        matrix, Saxe et al. (2014); with a projection, one with orthonormal columns. Keyword only.

    Raises
    ------
    ValueError, TypeError : as torch.nn does; and for another ``recurrent_init``.
    """

    _name = "RNN"
    _input_error = "{}: Expected input to be 2D or 3D, got {}D tensor instead"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_init: RecurrentInit = "uniform",
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        _refuse_options_of_lstm(kwargs)
        if len(args) > 3:
            self.nonlinearity = args[3]
            args = args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{self.nonlinearity}'. Select from 'tanh' or 'relu'.")
        super().__init__("RNN_TANH" if self.nonlinearity == "tanh" else "RNN_RELU", *args, device=device, **kwargs)


class GRU(_SingleState):
    """GRU layers: a drop-in for :class:`torch.nn.GRU`, which documents the arguments.

    ``forward`` also takes ``lengths`` and ``reset``, and there is ``forward_states``.

    Parameters
    ----------
    recurrent_init : "uniform", as torch.nn, or "orthogonal": the recurrent weights of each gate begin as an orthogonal
        matrix, Saxe et al. (2014); with a projection, one with orthonormal columns. Keyword only.

    Raises
    ------
    ValueError, TypeError : as torch.nn does; and for another ``recurrent_init``.
    """

    _name = "GRU"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_init: RecurrentInit = "uniform",
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        _refuse_options_of_lstm(kwargs)
        super().__init__("GRU", *args, device=device, **kwargs)


class LSTM(_Layers):
    """LSTM layers, with projection too: a drop-in for :class:`torch.nn.LSTM`, which documents the arguments.

    ``forward`` also takes ``lengths`` and ``reset``, and there is ``forward_states``.

    Parameters
    ----------
    recurrent_init : "uniform", as torch.nn, or "orthogonal": the recurrent weights of each gate begin as an orthogonal
        matrix, Saxe et al. (2014); with a projection, one with orthonormal columns. Keyword only.
    forget_bias : what the forget gate's two biases begin with, as a sum; 1.0 lets a new LSTM remember, Gers et al.
        (2000), Jozefowicz et al. (2015). None: as torch.nn, random around zero. Keyword only.

    Raises
    ------
    ValueError, TypeError : as torch.nn does; and for another ``recurrent_init``, a ``forget_bias`` that is no number,
        and one without biases.
    """

    _name = "LSTM"

    @overload
    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recurrent_init: RecurrentInit = "uniform",
        forget_bias: float | None = None,
    ) -> None: ...

    @overload
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __init__(self, *args: Any, device: Any = None, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, device=device, **kwargs)

    # a pair of states needs torch.nn.LSTM's own versions of these
    get_expected_cell_size = torch.nn.LSTM.get_expected_cell_size
    check_forward_args = torch.nn.LSTM.check_forward_args  # type: ignore[assignment]
    permute_hidden = torch.nn.LSTM.permute_hidden  # type: ignore[assignment]

    def _hidden_dims_error(self, hx: Any, dim: int) -> str | None:
        if hx[0].dim() == dim and hx[1].dim() == dim:
            return None
        return f"hx and cx should also be {dim}-D but got ({hx[0].dim()}-D, {hx[1].dim()}-D) tensors"

    def _check_packed(self, data: Tensor, hx: Any, batch_sizes: Tensor) -> None:
        """Nothing: torch.nn.LSTM leaves a PackedSequence to the op."""

    def _map_hidden(self, hx: Any, function: Any) -> tuple[Tensor, Tensor]:
        return function(hx[0]), function(hx[1])

    @overload
    def forward(
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]: ...

    @overload
    def forward(
        self, input: PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[PackedSequence, tuple[Tensor, Tensor]]: ...

    def forward(  # type: ignore[misc]
        self,
        input: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run the layers.

        Parameters
        ----------
        input : ``[T, N, I]``, ``[N, T, I]`` with batch_first, ``[T, I]`` unbatched, or a PackedSequence.
        hx : ``(h_0 [L*D, N, P or H], c_0 [L*D, N, H])``, unbatched without N; None: zeros.
        lengths, reset : as for :class:`GRU`: integers ``[N]``, unbatched ``[]``; bool ``[T, N]``, ``[N, T]`` with
            batch_first, ``[T]`` unbatched.

        Returns
        -------
        output : ``[T, N, D*(P or H)]``, laid out as the input.
        (h_n, c_n) : shaped as ``hx``.

        Raises
        ------
        ValueError, RuntimeError : as torch.nn does; and ValueError or TypeError for bad ``lengths`` or ``reset``.
        """
        if torch.jit.is_scripting():
            results = self._scripted(input, [] if hx is None else [hx[0], hx[1]], lengths, reset)
            return results[0], (results[1], results[2])
        else:
            if _backend.traced_by_fx(input):
                return _backend.node_of(self, input, hx, lengths, reset)
            if lengths is None and reset is None:
                plain = self._plain(input, hx)
                if plain is not None:
                    return plain
            output, hidden, _ = self._forward(input, hx, lengths, reset)
            return output, hidden

    def forward_states(
        self,
        input: Any,
        hx: tuple[Tensor, Tensor] | None = None,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> LSTMStates:
        """As forward, with the states h and c of every layer, direction and step; all differentiable."""
        output, hidden, (h, c) = self._forward(input, hx, lengths, reset, need_steps=True)
        return LSTMStates(output, hidden, h, c)


def _refuse_options_of_lstm(kwargs: dict[str, Any]) -> None:
    for name in ("proj_size", "forget_bias"):
        if name in kwargs:
            raise ValueError(f"{name} argument is only supported for LSTM, not RNN or GRU")
