"""``python -m bench.instructions``: the instructions of two small scans on the AVX2 path, counted by valgrind.

A count does not depend on what else the machine does, so it shows a loss of a percent that no clock here would. It does
depend on the compiler, which the record names. ``--record`` writes bench/results/instructions.json, which
tests/test_instructions.py holds the code to.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.built import ROOT, build

RECORD = ROOT / "bench" / "results" / "instructions.json"
SHAPES = {"lstm": "N16 T16 I64 H64", "gru": "N3 T17 I33 H67"}  # of bench/native/scans.cpp
COUNT = re.compile(r"^\s*([\d,]+).*:counted_(\w+)", re.M)


def compiler() -> str:
    """The version of the C++ compiler that builds the scans."""
    sys.path.insert(0, str(ROOT))
    from tools import native

    done = subprocess.run([*native.find_compiler().split(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[0]


def count() -> dict[str, int]:
    """Build the program and count: instructions by scan, such as ``lstm_forward``.

    Raises
    ------
    RuntimeError
        If valgrind is not installed, or the program is not one for this processor.
    """
    if shutil.which("valgrind") is None:
        raise RuntimeError("valgrind not found: apt install valgrind")
    if platform.machine() not in ("x86_64", "AMD64"):
        raise RuntimeError("the counted scans are built for AVX2: an x86-64 processor is needed")
    program = build("scans") / "scans"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        counting = ["--collect-atstart=no", "--toggle-collect=counted_*", f"--callgrind-out-file={out}"]
        # bound at the start, a library's function costs the same at its first call as at any other
        environment = {**os.environ, "LD_BIND_NOW": "1", "OMP_NUM_THREADS": "1"}
        subprocess.run(
            ["valgrind", "--tool=callgrind", *counting, str(program)], env=environment, check=True, capture_output=True
        )
        table = subprocess.run(
            ["callgrind_annotate", "--inclusive=yes", "--threshold=100", str(out)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(digits.replace(",", "")) for digits, name in COUNT.findall(table)}


def record() -> dict[str, Any]:
    """What is committed."""
    return {"compiler": compiler(), "isa": "avx2", "shapes": SHAPES, "instructions": count()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", action="store_true", help=f"write {RECORD.relative_to(ROOT)}")
    arguments = parser.parse_args()
    text = json.dumps(record(), indent=1) + "\n"
    print(text, end="")
    if arguments.record:
        RECORD.write_text(text, encoding="utf-8")
