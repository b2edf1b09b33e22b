"""Sessions: a module's layers run step by step, with packed weights and a state of their own."""

import threading
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from . import _backend, reference
from ._stack import stack
from .modules import _CELLS, GRU, LSTM, RNN

__all__ = ["StreamingSession"]

_FORWARDS = [library.forward for library in (RNN, LSTM, GRU, torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU)]


class StreamingSession:
    """The layers of a module, run one time step after the other on one thread of the CPU.

    The weights are a packed snapshot, the state belongs to the session. Nothing is recorded for autograd, and there is
    no dropout, as in ``module.eval()``. One thread at a time may use a session; sessions are independent of each other.
    A copied or unpickled session has the copied state, and takes the weights that the copied module has then.

    Parameters
    ----------
    module : RNN, LSTM or GRU, of fastrnn or torch.nn
        On the CPU, in float32, float64, bfloat16 or float16, and not bidirectional.
    batch_size : int
        N, the number of sequences that go side by side.
    weight_dtype : torch.dtype, optional
        What the weights are kept in; None: the module's dtype (float16: float32, which holds the same values).
        ``torch.bfloat16``: rounded to 8 bits of mantissa. ``torch.int8``: rounded to 127 steps on either side of zero
        with a scale for each row of each matrix, and in every step the inputs and states that they multiply likewise,
        with a scale for each row of the batch. Everything else is computed in float32 (float64 for a float64 module,
        which has no other weights).

    Raises
    ------
    TypeError
        For another module, one whose class has a forward of its own, which a session would not run, and for a
        weight_dtype that is none of the above.
    ValueError
        For a bidirectional module, one on another device, one whose layers are not of one size, batch_size < 1 or too
        large, and float64 with another weight_dtype.

    Examples
    --------
    >>> session = fastrnn.StreamingSession(fastrnn.LSTM(40, 64, num_layers=2))
    >>> session.step(torch.randn(40)).shape
    torch.Size([64])
    """

    def __init__(self, module: torch.nn.RNNBase, batch_size: int = 1, weight_dtype: torch.dtype | None = None) -> None:
        if not isinstance(module, torch.nn.RNNBase) or module.mode not in _CELLS:
            raise TypeError(f"module should be an RNN, LSTM or GRU, got: {type(module).__name__}")
        if type(module).forward not in _FORWARDS:
            raise TypeError(f"{type(module).__name__} has a forward of its own, which a session would not run")
        if module.bidirectional:
            raise ValueError(
                "a bidirectional module cannot be streamed: its reverse direction begins with the last step, "
                "which has not come yet"
            )
        if isinstance(batch_size, bool) or not isinstance(batch_size, int):
            raise TypeError(f"batch_size should be an int, got: {type(batch_size).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size should be at least 1, got: {batch_size}")
        self.module = module
        self.batch_size = batch_size
        weights = self._weights()
        self.weight_dtype = _kept_dtype(weights[0].dtype, weight_dtype)
        native = None if _backend.layer_ops is None else _backend.native
        make: Any = _PythonSession if native is None else native.StreamingSession
        self._session: Any = make(
            _CELLS[module.mode],
            weights,
            module.num_layers,
            batch_size,
            str(self.weight_dtype).removeprefix("torch."),
            module.batch_first,
        )

    def _weights(self) -> list[Tensor]:
        """As they are now; by attribute, for those of a parametrization or of a hook that sets them before forward."""
        for hook in self.module._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                setattr(self.module, hook.name, hook.compute_weight(self.module, do_power_iteration=False))
            elif isinstance(hook, BasePruningMethod | WeightNorm):
                hook(self.module, ())
        weights = [getattr(self.module, name).detach() for name in self.module._flat_weights_names]
        for weight in weights:
            if not weight.is_cpu:
                raise ValueError(f"a session runs on the CPU, and the module is on {weight.device}: module.cpu()")
        return weights

    def step(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Go one time step on.

        Parameters
        ----------
        x : Tensor
            ``[N, I]``, or ``[I]`` if N is 1, of the module's dtype, with any strides.
        out : Tensor, optional
            Where the output goes, shaped as it; it may share memory with ``x``.

        Returns
        -------
        Tensor
            The last layer's output, ``[N, P or H]``, or ``[P or H]`` for ``[I]``: a new tensor, or ``out``.

        Raises
        ------
        TypeError
            For what is no tensor, and for another dtype.
        ValueError
            For another shape or device, and for an ``out`` that requires grad or whose elements share memory.
        RuntimeError
            While another thread is within the session.
        """
        return self._session.step(x, out)

    def chunk(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """Go several time steps on: the same to the last bit as as many calls of :meth:`step`.

        Parameters
        ----------
        x : Tensor
            ``[T, N, I]``, ``[N, T, I]`` if the module is batch_first, or ``[T, I]`` if N is 1; T >= 1.
        out : Tensor, optional
            Where the output goes, shaped as it: ``x`` itself, or memory that ``x`` has no part of.

        Returns
        -------
        Tensor
            The last layer's output, laid out as ``x``.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            As :meth:`step` does.
        """
        return self._session.chunk(x, out)

    @property
    def state(self) -> Any:
        """The state of all layers, copied: ``h [L, N, P or H]``, for the LSTM ``(h, c)`` with ``c [L, N, H]``.

        Float64 for a float64 module, else float32. To set it, give the same, or the module's dtype, or None for zeros.
        Where N is 1, the states of an unbatched call, ``[L, H]``, will do as well.
        """
        state = self._session.state()
        return tuple(state) if self.module.mode == "LSTM" else state[0]

    @state.setter
    def state(self, value: Any) -> None:
        if value is None:
            return self.reset()
        if self.module.mode == "LSTM":
            if not isinstance(value, tuple | list) or len(value) != 2:
                raise TypeError(f"state should be a tuple (h, c), got: {type(value).__name__}")
            states = list(value)
        else:
            states = [value]
        for state in states:
            if not isinstance(state, Tensor):
                raise TypeError(f"state should be of Tensors, got: {type(state).__name__}")
        if self.batch_size == 1:
            states = [state.unsqueeze(1) if state.dim() == 2 else state for state in states]
        self._session.set_state([state.detach() for state in states])

    def reset(self, mask: Tensor | None = None) -> None:
        """Begin new sequences, with states of zeros.

        Parameters
        ----------
        mask : Tensor, optional
            bool ``[N]``: the rows of the batch that begin anew; None: all.

        Raises
        ------
        TypeError, ValueError
            For a mask of another type, dtype, shape or device.
        """
        self._session.reset(mask)

    def refresh(self) -> None:
        """Take over the module's weights as they are now; the state stays.

        Raises
        ------
        RuntimeError, ValueError
            If their dtype, device or shapes have changed.
        """
        self._session.refresh(self._weights())

    def __getstate__(self) -> dict[str, Any]:
        return {
            "module": self.module,
            "batch_size": self.batch_size,
            "weight_dtype": self.weight_dtype,
            "state": self.state,
        }

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__init__(values["module"], values["batch_size"], values["weight_dtype"])  # type: ignore[misc]
        self.state = values["state"]

    def __repr__(self) -> str:
        kept = f"weights in {str(self.weight_dtype).removeprefix('torch.')}"
        if isinstance(self._session, _PythonSession):
            kept += ", Python backend"
        elif self.weight_dtype == torch.int8 and _backend.native is not None and not _backend.native.has_int8_dot():
            kept += ", multiplied without the int8 dot product that this machine lacks"
        return f"{type(self).__name__}({self.module}, batch_size={self.batch_size}; {kept})"


def _kept_dtype(module: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """What the weights of a module of that dtype are kept in."""
    if wanted is None or wanted == module:
        return torch.float32 if module == torch.float16 else module
    if wanted not in (torch.float32, torch.bfloat16, torch.int8):
        raise TypeError(f"weight_dtype should be None, torch.bfloat16 or torch.int8, got: {wanted}")
    if module == torch.float64:
        raise ValueError(f"weight_dtype should be None for a float64 module, got: {wanted}")
    return wanted


class _PythonSession:
    """The same through ``functional``'s layers, for where the native library is not in use.

    Weights are rounded as the native session rounds them; what int8 weights multiply is not.
    """

    def __init__(
        self, cell: str, weights: list[Tensor], num_layers: int, batch: int, weight_type: str, batch_first: bool
    ) -> None:
        self.cell, self.layers, self.batch, self.kept, self.batch_first = (
            cell,
            num_layers,
            batch,
            weight_type,
            batch_first,
        )
        self.dtype = weights[0].dtype
        self.compute = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.shapes = [weight.shape for weight in weights]
        per_layer = len(weights) // num_layers
        if any(
            self.shapes[1:per_layer] != self.shapes[first + 1 : first + per_layer]
            for first in range(0, len(weights), per_layer)
        ):
            raise ValueError(f"the layers should be of one size, got weights of: {[list(s) for s in self.shapes]}")
        self.in_use = threading.Lock()
        self.states: list[Tensor] = []
        self.refresh(weights)
        self.reset(None)

    def refresh(self, weights: list[Tensor]) -> None:
        if [weight.shape for weight in weights] != self.shapes:
            raise ValueError("the shape of a layer has changed")
        if any(weight.dtype != self.dtype for weight in weights):
            raise RuntimeError(f"the weights should be of the dtype {self.dtype}, got: {weights[0].dtype}")
        self.weights = [_rounded(weight.to(self.compute), self.kept).clone() for weight in weights]

    def step(self, x: Tensor, out: Tensor | None) -> Tensor:
        self._check(x, "x")
        inputs = self.weights[0].shape[1]
        if x.shape != (self.batch, inputs) and not (self.batch == 1 and x.shape == (inputs,)):
            either = "(I,) or " if self.batch == 1 else ""
            raise ValueError(f"x should have the shape {either}(N, I) = ({self.batch}, {inputs}), got: {list(x.shape)}")
        self._check_out(out, x)
        output = self._run(x.reshape(1, self.batch, inputs), False).reshape(*x.shape[:-1], -1)
        return output if out is None else out.copy_(output)

    def chunk(self, x: Tensor, out: Tensor | None) -> Tensor:
        self._check(x, "x")
        inputs = self.weights[0].shape[1]
        unbatched = x.dim() == 2 and self.batch == 1
        batch_dim = 0 if self.batch_first else 1
        batched = x.dim() == 3 and x.shape[batch_dim] == self.batch
        if not (unbatched or batched) or x.shape[-1] != inputs:
            layout = "(N, T, I)" if self.batch_first else "(T, N, I)"
            raise ValueError(
                f"x should have the shape {'(T, I) or ' if self.batch == 1 else ''}{layout} with N = {self.batch} "
                f"and I = {inputs}, got: {list(x.shape)}"
            )
        if x.numel() == 0:
            raise ValueError(f"x should have at least one step, got: {list(x.shape)}")
        self._check_out(out, x)
        output = self._run(x.unsqueeze(batch_dim) if unbatched else x, self.batch_first)
        output = output.squeeze(batch_dim) if unbatched else output
        return output if out is None else out.copy_(output)

    def _run(self, x: Tensor, batch_first: bool) -> Tensor:
        if not self.in_use.acquire(blocking=False):
            raise RuntimeError("a session is used by one thread at a time")
        try:
            with torch.no_grad(), torch.autocast("cpu", enabled=False):
                biases = any(len(shape) == 1 for shape in self.shapes)
                output, states, _ = stack(
                    self.cell, x.to(self.compute), self.states, self.weights, biases, self.layers, 0.0, False, False,
                    batch_first,
                )  # fmt: skip
            self.states = list(states)
        finally:
            self.in_use.release()
        return output.to(self.dtype)

    def _check(self, tensor: Any, name: str) -> None:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} should be a Tensor, got: {type(tensor).__name__}")
        if not tensor.is_cpu or tensor.layout != torch.strided or is_functorch_wrapped_tensor(tensor):
            raise ValueError(f"{name} should be a plain tensor on the CPU, got one on {tensor.device}")
        if tensor.dtype != self.dtype:
            raise TypeError(f"{name} should be of the module's dtype {self.dtype}, got: {tensor.dtype}")

    def _check_out(self, out: Any, x: Tensor) -> None:
        if out is None:
            return
        self._check(out, "out")
        shape = (*x.shape[:-1], self.shapes[1][1])
        if out.shape != shape:
            raise ValueError(f"out should have the shape {list(shape)}, got: {list(out.shape)}")
        if out.requires_grad:
            raise ValueError("out should not require grad: a session records nothing")
        if torch._debug_has_internal_overlap(out) == 1:
            raise ValueError("out should not share memory between its elements")
        if out.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError("out was made in inference mode, and cannot be written outside of it")

    def state(self) -> list[Tensor]:
        return [state.clone() for state in self.states]

    def set_state(self, states: list[Tensor]) -> None:
        if len(states) != len(self.states):
            raise ValueError(f"state should be {len(self.states)} tensors, got: {len(states)}")
        for index, (state, own) in enumerate(zip(states, self.states, strict=True)):
            if not state.is_cpu or state.shape != own.shape:
                raise ValueError(
                    f"state[{index}] should be a tensor on the CPU of the shape {list(own.shape)}, "
                    f"got: {list(state.shape)} on {state.device}"
                )
            if state.dtype not in (self.dtype, self.compute):
                raise TypeError(f"state[{index}] should be of dtype {self.dtype}, got: {state.dtype}")
        self.states = [state.to(self.compute, copy=True) for state in states]

    def reset(self, mask: Tensor | None) -> None:
        if mask is None:
            spec = reference.CELLS[self.cell]
            sizes = [self.shapes[1][1], self.shapes[1][0] // spec.gates]
            options: Any = {"dtype": self.compute, "device": "cpu"}
            self.states = [torch.zeros(self.layers, self.batch, s, **options) for s in sizes[: spec.states]]
            return
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask should be a Tensor, got: {type(mask).__name__}")
        if mask.dtype != torch.bool:
            raise TypeError(f"mask should be a Tensor of bool, got: {mask.dtype}")
        if mask.shape != (self.batch,) or not mask.is_cpu:
            raise ValueError(f"mask should have the shape (N,) = ({self.batch},), got: {list(mask.shape)}")
        self.states = [state.masked_fill(mask[:, None], 0) for state in self.states]


def _rounded(weight: Tensor, kept: str) -> Tensor:
    """A weight or a bias as values of what it is kept in; biases are kept as they are."""
    if weight.dim() == 1 or kept not in ("bfloat16", "int8"):
        return weight
    if kept == "bfloat16":
        return weight.bfloat16().to(weight.dtype)
    scale = weight.abs().amax(1, keepdim=True) / 127
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)
