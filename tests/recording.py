"""Modes that write down which functions and ops are called while they are on."""

from typing import Any

from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class _Names:
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def _record(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


class Functions(_Names, TorchFunctionMode):
    __torch_function__ = _Names._record


class Dispatches(_Names, TorchDispatchMode):
    __torch_dispatch__ = _Names._record
