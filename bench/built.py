"""The native parts of the benchmarks (bench/native), built where they are not yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "bench" / "bench" / "native"


def build(target: str) -> Path:
    """Build ``limits`` or ``scans`` and return the folder that it lies in.

    Raises
    ------
    RuntimeError
        If it cannot be built; the build's own message stands above.
    """
    try:
        subprocess.run([sys.executable, "tools/native.py", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    except subprocess.CalledProcessError:
        raise RuntimeError(f"{target} of bench/native was not built") from None
    return FOLDER
