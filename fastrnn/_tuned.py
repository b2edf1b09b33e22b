"""What was measured on GPUs, handed to the plan of the CUDA kernels: the rows of ``cuda_plans.csv`` beside this file.

The environment variable ``FASTRNN_CUDA_TUNED``, read at import, names another file, to try rows before they are
committed; empty, none is read and the plan's model decides alone.
"""

import os
from pathlib import Path
from types import ModuleType

VARIABLE = "FASTRNN_CUDA_TUNED"
FILE = Path(__file__).with_name("cuda_plans.csv")


def load(extension: ModuleType, cuda: bool) -> None:
    """Read the rows for ``fastrnn._C``.

    Without CUDA kernels nothing asks for them but the plan's model, so then only a file that was named is read.

    Raises
    ------
    ValueError : if the file is not such a table; the message names it, and the line.
    OSError : if the file that was named cannot be read; the message names the variable.
    """
    named = os.environ.get(VARIABLE)
    if named == "" or (named is None and not cuda):
        return
    path = FILE if named is None else Path(named)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise type(error)(f"{VARIABLE}: {error}") from None
    try:
        extension.set_tuned_plans(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
