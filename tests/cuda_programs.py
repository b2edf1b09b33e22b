"""Compile CUDA sources, emulated on the CPU or by nvcc, and run stand-alone programs of kernels over cases.

A program is a .cu that includes tests/cuda_sim/program.h. Whatever is built lies in build/cuda-sim/, under a name that
is a hash of the command, of the sources named there and of all headers: it is built again only if one of them changed.
"""

import functools
import hashlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from emulation import cuda_home

ROOT = Path(__file__).resolve().parent.parent
SIM = ROOT / "tests" / "cuda_sim"
BUILD = ROOT / "build" / "cuda-sim"
HEADERS = [ROOT / "csrc" / "core", ROOT / "csrc" / "cuda", SIM]
INCLUDES = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'cuda'}"]
# -O1: the compiler takes most of the time. -rdynamic: the emulator names kernels.
EMULATED = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-rdynamic", f"-I{SIM}", *INCLUDES]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"],
    "thread": ["-fsanitize=thread"],
}
# No local memory: neither a spilled register nor an array that is not in registers.
NVCC = [
    "-std=c++20",
    "-O3",
    *INCLUDES,
    "-Werror",
    "all-warnings",
    "-Xptxas",
    "-v,-warn-spills,-warn-lmem-usage,-Werror",
]


@functools.cache
def nvcc() -> str | None:
    home = cuda_home()
    inside = home / "bin" / "nvcc" if home else None
    return str(inside) if inside and inside.exists() else shutil.which("nvcc")


def no_emulator() -> str:
    """Why CUDA sources cannot be compiled for the CPU here; empty: they can."""
    if cuda_home() is None:
        return "no CUDA headers: set CUDA_HOME"
    return "" if shutil.which(compiler()[0]) else f"no {compiler()[0]}"


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX") or "g++")


def build(command: list[str], suffix: str = "") -> Path:
    """Run a compiler that writes to `-o OUT`, appended here, unless this was done before. Returns OUT."""
    digest = hashlib.sha256(" ".join(command).encode())
    headers = (path for folder in HEADERS for path in folder.rglob("*") if path.suffix in (".h", ".cuh"))
    arguments = (Path(argument) for argument in command[1:] if not argument.startswith("-"))
    for path in [*sorted(headers), *(path for path in arguments if path.is_file())]:
        digest.update(path.read_bytes())
    out = BUILD / f"{digest.hexdigest()[:24]}{suffix}"
    if not out.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        unfinished = out.with_name(f"{os.getpid()}-{out.name}")
        result = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
        unfinished.rename(out)
    return out


def emulated(source: Path, sanitizer: str = "") -> Path:
    """The program of a .cu, on the emulator. The emulator itself is not instrumented."""
    common = [*compiler(), *EMULATED, f"-I{cuda_home()}/include"]
    macro = [f"-DCUSIM_{sanitizer.upper()}"] if sanitizer else []
    objects = [str(build([*common, "-O2", *macro, "-c", str(path)], ".o")) for path in sorted(SIM.glob("*.cpp"))]
    flags = SANITIZERS[sanitizer]
    return build([*common, *flags, "-x", "c++", str(source), "-x", "none", *objects, "-ldl"])


def nvcc_command(source: Path, architecture: str) -> list[str]:
    number = architecture.removeprefix("sm_")
    include = [f"-I{SIM}"] if source.parent == SIM else []
    return [str(nvcc()), *NVCC, *include, "-gencode", f"arch=compute_{number},code={architecture}", str(source)]


def compiled(source: Path, architecture: str) -> Path:
    """What nvcc makes of a .cu: an object file, of a test program its device half (the host's takes far longer)."""
    kind, suffix = ("-cubin", ".cubin") if source.parent == SIM else ("-c", ".o")
    return build([*nvcc_command(source, architecture), kind], suffix)


def device_program(source: Path) -> Path:
    """The program of a .cu, for a GPU."""
    return build(nvcc_command(source, "sm_90a"))


def declared_functions(gpu_header: str) -> list[str]:
    """The names that gpu.h gives to kernels and to those who launch them."""
    return re.findall(r"^(?:GPU_FN [\w:]+|void|int) (\w+)\(", gpu_header, re.MULTILINE)


@dataclass
class Case:
    entry: str
    arrays: dict[str, np.ndarray]
    numbers: dict[str, int] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        lines = [f"entry {self.entry}"]
        lines += [f"number {name} {value}" for name, value in self.numbers.items()]
        for name, array in self.arrays.items():
            lines.append(f"array {name} {array.nbytes}")
            np.ascontiguousarray(array).tofile(folder / f"{name}.bin")
        (folder / "case.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    def read(self, folder: Path) -> dict[str, np.ndarray]:
        return {
            name: np.fromfile(folder / f"{name}.out", array.dtype).reshape(array.shape)
            for name, array in self.arrays.items()
        }


@dataclass
class Result:
    arrays: dict[str, np.ndarray]  # empty if the case failed
    error: str  # of the case; empty: none
    stderr: str  # of the whole program


def run(program: Path, cases: list[Case], folder: Path, seed: int = 0) -> list[Result]:
    """Run all cases in one process, in `folder`, which must be new or empty."""
    folders = [folder / f"{index}-{case.entry}" for index, case in enumerate(cases)]
    for case, place in zip(cases, folders, strict=True):
        case.write(place)
    options = {
        "CUSIM_SEED": str(seed),
        # what torch's own process may have set does not matter here
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
    }
    command = [str(program), *map(str, folders)]
    settings = {"capture_output": True, "text": True, "timeout": 600, "env": os.environ | options}
    done = subprocess.run(command, **settings)
    if "unexpected memory mapping" in done.stderr:  # old ThreadSanitizers and new kernels: too random addresses
        done = subprocess.run(["setarch", "-R", *command], **settings)
    results = []
    for case, place in zip(cases, folders, strict=True):
        error = place / "error.txt"
        if error.exists():
            results.append(Result({}, error.read_text(encoding="utf-8"), done.stderr))
        elif all((place / f"{name}.out").exists() for name in case.arrays):
            results.append(Result(case.read(place), "", done.stderr))
        else:
            results.append(Result({}, f"the program ended with status {done.returncode}", done.stderr))
    return results


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even; NaN becomes CUDA's."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)
