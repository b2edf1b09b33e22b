"""How a module's parameters begin where that is not torch.nn's way: the forget gate's bias, the recurrent weights.

torch.nn's initialisation comes first and draws what it always draws, so that every other parameter is the one that the
same seed gives in torch.nn.
"""

from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch

RecurrentInit = Literal["uniform", "orthogonal"]


def set_options(module: Any, recurrent_init: str, forget_bias: object = None) -> None:
    """Check the options and keep those that are not the defaults, which are attributes of the classes.

    So a module that was made without them has exactly the attributes of torch.nn's.
    """
    if recurrent_init not in get_args(RecurrentInit):
        raise ValueError(f"recurrent_init should be 'uniform' or 'orthogonal', got: {recurrent_init!r}")
    if isinstance(forget_bias, bool) or not isinstance(forget_bias, int | float | None):
        raise TypeError(f"forget_bias should be a number or None, got: {type(forget_bias).__name__}")
    if recurrent_init != "uniform":
        module.recurrent_init = recurrent_init
    if forget_bias is not None:
        module.forget_bias = float(forget_bias)


def apply_options(module: Any, suffixes: Iterable[str]) -> None:
    """Overwrite what the options name; ``suffixes`` are those of the parameters of every layer and direction."""
    if module.recurrent_init == "uniform" and module.forget_bias is None:
        return
    if module.forget_bias is not None and not module.bias:
        raise ValueError("forget_bias needs bias=True")
    size = module.hidden_size
    with torch.no_grad():
        for suffix in suffixes:
            if module.recurrent_init == "orthogonal":
                for gate in _parameter(module, f"weight_hh{suffix}").split(size):
                    # in float32, because there is no QR decomposition in 16 bit
                    wide = gate.to(torch.float32) if gate.element_size() < 4 else gate
                    gate.copy_(torch.nn.init.orthogonal_(torch.empty_like(wide)))
            if module.forget_bias is not None:  # the sum of both biases is what counts
                _parameter(module, f"bias_ih{suffix}")[size : 2 * size] = module.forget_bias
                _parameter(module, f"bias_hh{suffix}")[size : 2 * size] = 0.0


def option_words(module: Any) -> str:
    """For ``extra_repr``: what is not the default."""
    words = "" if module.recurrent_init == "uniform" else f", recurrent_init={module.recurrent_init}"
    return words if module.forget_bias is None else f"{words}, forget_bias={module.forget_bias}"


def _parameter(module: Any, name: str) -> torch.nn.Parameter:
    parameter = module._parameters.get(name)
    if parameter is None:
        raise RuntimeError(f"reset_parameters cannot initialise {name}: it is parametrized or pruned")
    return parameter
