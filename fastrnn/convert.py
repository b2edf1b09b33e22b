"""Swap torch.nn's recurrent modules for fastrnn's over a whole model, and back."""

import sys
import warnings
import weakref

import torch
from torch.nn import Module
from torch.nn.utils.parametrize import type_before_parametrizations

from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN

__all__ = ["convert", "to_torch"]

_PAIRS: tuple[tuple[type[Module], type[Module]], ...] = (
    (torch.nn.RNN, RNN),
    (torch.nn.LSTM, LSTM),
    (torch.nn.GRU, GRU),
    (torch.nn.RNNCell, RNNCell),
    (torch.nn.LSTMCell, LSTMCell),
    (torch.nn.GRUCell, GRUCell),
)


def convert(model: Module) -> Module:
    """Swap every torch.nn RNN, LSTM, GRU, RNNCell, LSTMCell and GRUCell in a model for fastrnn's, in place.

    The new modules have the very same parameters, buffers, hooks, parametrizations and training flag; a module that
    the model holds twice becomes one new module. The random state is not touched. Only exact torch types are
    swapped: a subclass may rely on what it overrides, so it is left alone, with one warning that names all of them.

    Parameters
    ----------
    model : Module
        If itself recurrent, it is not changed: the result is a new module around the same state.

    Returns
    -------
    Module
        The model, or the new module if the model itself was swapped.
    """
    return _swap(model, dict(_PAIRS))


def to_torch(model: Module) -> Module:
    """Undo :func:`convert`: swap every fastrnn module in a model for torch.nn's, in place.

    Parameters
    ----------
    model : Module
        If itself recurrent, it is not changed: the result is a new module around the same state.

    Returns
    -------
    Module
        The model, or the new module if the model itself was swapped.
    """
    return _swap(model, {ours: theirs for theirs, ours in _PAIRS})


def _swap(model: Module, targets: dict[type[Module], type[Module]]) -> Module:
    swapped: dict[Module, Module] = {}
    left_alone: dict[str, type[Module]] = {}
    done = set(targets.values())
    for name, module in model.named_modules():
        before = type_before_parametrizations(module)
        if before in targets:
            swapped[module] = _rebuild(module, targets[before])
        elif before not in done and isinstance(module, tuple(targets)):
            left_alone[name or "the model itself"] = before
    # list() because a swap under the model must not disturb the walk; a recurrent root may hold parametrizations
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in swapped:
                parent._modules[name] = swapped[child]
                if _is_compiled(parent):  # its forward is bound to the module that it compiles
                    parent._initialize()  # type: ignore[operator]
    if left_alone:
        listing = ", ".join(
            f"{name} ({before.__module__}.{before.__qualname__})" for name, before in left_alone.items()
        )
        warnings.warn(f"Subclasses of recurrent modules are left as they are: {listing}", stacklevel=3)
    return swapped.get(model, model)


def _is_compiled(module: Module) -> bool:
    """Whether it is what torch.compile makes of a module. To import that class takes seconds."""
    loaded = sys.modules.get("torch._dynamo.eval_frame")
    return loaded is not None and isinstance(module, loaded.OptimizedModule)


def _rebuild(module: Module, target: type[Module]) -> Module:
    """A module of another class around the same state.

    Not by the constructor, which would draw random weights. The containers of the state are shared, not copied, so
    that the handle of a hook still removes it.
    """
    new = target.__new__(_with_parametrizations(module, target))
    new.__dict__.update(module.__dict__)
    if new._compiled_call_impl is not None:  # Module.compile() bound it to the old module
        new._compiled_call_impl = None
        warnings.warn("A module on which compile() was called is swapped: call compile() again", stacklevel=4)
    for hook in new._load_state_dict_pre_hooks.values():
        if getattr(hook, "with_module", False):  # it holds the module that it is to be called with
            hook.module = weakref.ref(new)  # type: ignore[attr-defined]
    return new


def _with_parametrizations(module: Module, target: type[Module]) -> type[Module]:
    """The class for the new module: the target, or the parametrized subclass of it.

    torch.nn.utils.parametrize gives each module a class of its own, with a property for each parametrized tensor.
    """
    if type_before_parametrizations(module) is type(module):
        return target
    own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    return type(f"Parametrized{target.__name__}", (target,), own)
