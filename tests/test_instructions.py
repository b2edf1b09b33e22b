"""The instructions of two small scans do not grow unnoticed: counts by valgrind against the committed record."""

import json
import platform
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent))

from bench import instructions

MORE = 1.02  # what a change may cost before it must be recorded, on purpose


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the counted scans are built for AVX2")
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")
def test_counts(native):
    kept = json.loads(instructions.RECORD.read_text(encoding="utf-8"))
    if kept["compiler"] != instructions.compiler():
        pytest.skip(f"counts are recorded for {kept['compiler']}, this is {instructions.compiler()}")
    counts = instructions.count()
    assert counts.keys() == kept["instructions"].keys()
    grown = {
        name: f"{n} instead of {kept['instructions'][name]}"
        for name, n in counts.items()
        if n > MORE * kept["instructions"][name]
    }
    assert not grown, "python -m bench.instructions --record takes new counts over"
