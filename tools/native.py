"""Build the native library: find the tools, write CMake's command line once, run it.

Used by setup.py (`pip install`), and by the Makefile as a program::

    python tools/native.py check                  # the tools that no package registry brings
    python tools/native.py build                  # fastrnn/_C in the source tree
    python tools/native.py tests [--sanitize]     # the C++ tests, built and run
    python tools/native.py limits                 # what only the benchmarks need: the limits of the machine,
    python tools/native.py scans                  # and scans whose instructions are counted
    python tools/native.py cuda-ops               # the CUDA half on an emulated GPU, for the tests
    python tools/native.py cuda-link              # the CUDA half against an unpacked CUDA torch: compiles and links

Only the standard library is imported here: setup.py must work without torch (for an sdist), `check` before any
environment exists. Environment variables: FASTRNN_NATIVE, FASTRNN_CUDA, FASTRNN_CUDA_ARCH, MAX_JOBS, and CMake's own
(CXX, CXXFLAGS).
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 10)
MIN_TORCH = (2, 11)
MINOR = ".".join(map(str, sys.version_info[:2]))  # of this Python, as Debian names its packages
LINK_TORCH = "2.11.0"  # a plain torch of its registry is built for CUDA
# -O1 -g1: the tiles are unrolled so far that with -O2 or full debug information a file takes the compiler ten minutes
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1"

# What a C++20 compiler must accept: old ones know the flag, but not the library.
CXX20_PROBE = """
#include <bit>
#include <concepts>
#include <span>
static_assert(__cplusplus >= 202002L);
template <std::integral T> constexpr int width(T x) { return std::bit_width(static_cast<unsigned>(x)); }
int main() { std::span<const int> s{}; return width(0) + static_cast<int>(s.size()); }
"""


class BuildError(RuntimeError):
    """Something is missing; the message is one line that says what to do."""


def version() -> str:
    """Return `__version__` of fastrnn/__init__.py, its only source, without importing the package."""
    text = (ROOT / "fastrnn" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r"""^__version__(?:\s*:\s*str)?\s*=\s*["']([^"']+)["']""", text, re.MULTILINE)
    if not found:
        raise BuildError('fastrnn/__init__.py has no line `__version__ = "..."`')
    return found[1]


def flag(name: str, default: bool) -> bool:
    """Return the value of an environment variable that is 0 or 1."""
    value = os.environ.get(name, "").strip()
    if value not in ("", "0", "1"):
        raise BuildError(f"{name}={value!r} is not understood: set it to 0 or 1, or unset it")
    return default if value == "" else value == "1"


def wants_native() -> bool:
    """Return whether to build the native library: FASTRNN_NATIVE, else on Linux only (see docs/compatibility.md)."""
    return flag("FASTRNN_NATIVE", default=sys.platform == "linux")


# --- Tools ------------------------------------------------------------------------------------------------------------


def install_hint(apt: str, dnf: str, brew: str = "") -> str:
    """Return how to install a system package, in the words of the package manager that is there."""
    for manager, command in (("apt-get", f"apt install {apt}"), ("dnf", f"dnf install {dnf}"), ("brew", brew)):
        if command and shutil.which(manager):
            return command
    return f"apt install {apt}"


def find_tool(name: str) -> str:
    """Return the path of cmake or ninja: the one beside this Python, else the one on PATH."""
    beside = shutil.which(name, path=sysconfig.get_path("scripts"))
    found = beside or shutil.which(name)
    if not found:
        raise BuildError(f"{name} not found: pip install {name}")
    return found


def words_of(command: str) -> list[str]:
    """Return a command line's words; at least one."""
    try:
        return shlex.split(command) or [command]
    except ValueError as error:
        raise BuildError(f"CXX={command!r} is not a command: {error}") from None


def compiler_arguments(command: str) -> list[str]:
    """Return the compiler for CMake: what launches it, and the flags behind it, belong to other variables."""
    first, *rest = words_of(command)
    launcher = []
    if rest and Path(first).name in ("ccache", "sccache", "distcc"):
        launcher = [f"-DCMAKE_CXX_COMPILER_LAUNCHER={shutil.which(first)}"]
        first, *rest = rest
    compiler = shutil.which(first)
    if compiler is None:
        raise BuildError(f"C++ compiler not found ({first} of CXX={command!r})")
    return [f"-DCMAKE_CXX_COMPILER={';'.join([compiler, *rest])}", *launcher]


def find_compiler() -> str:
    """Return the C++ compiler's command line (CXX, else c++, g++, clang++), checked to know C++20."""
    hint = f"{install_hint('g++', 'gcc-c++', 'xcode-select --install')}, or set CXX to another compiler"
    asked = os.environ.get("CXX", "").strip()
    names = [asked] if asked else ["c++", "g++", "clang++"]
    command = next((name for name in names if shutil.which(words_of(name)[0])), None)
    if command is None:
        raise BuildError(f"C++ compiler not found ({', '.join(names)}): {hint}")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(CXX20_PROBE, encoding="utf-8")
        probe = subprocess.run(
            [*words_of(command), "-std=c++20", "-fsyntax-only", str(source)], capture_output=True, check=False
        )
    if probe.returncode != 0:
        raise BuildError(
            f"the C++ compiler {command} does not know C++20: g++ >= 11 or clang++ >= 14 is needed ({hint})"
        )
    return command


def check_python() -> None:
    """Stop unless this Python can build an extension."""
    have = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        want = ".".join(map(str, MIN_PYTHON))
        raise BuildError(f"{sys.executable} is Python {have}, {want} or newer is needed: make PYTHON=/path/to/python3")
    if wants_native() and not Path(sysconfig.get_path("include"), "Python.h").exists():
        hint = install_hint(f"python{MINOR}-dev", "python3-devel")
        raise BuildError(f"Python.h of Python {have} not found: {hint} (or FASTRNN_NATIVE=0 for pure Python)")


def check_venv() -> None:
    """Stop unless this Python can make a virtual environment."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError:
        hint = install_hint(f"python{MINOR}-venv", "python3-pip")
        raise BuildError(f"{sys.executable} has no venv or ensurepip: {hint}") from None


def check() -> None:
    """Stop with one line at the first tool that is missing and that no package registry brings."""
    check_python()
    if wants_native():
        find_compiler()


def import_torch() -> ModuleType:
    """Return torch, or stop with the one line that says how to get it."""
    how = "pip install torch first, then pip install --no-build-isolation ."
    try:
        import torch
    except ImportError as error:
        why = "" if isinstance(error, ModuleNotFoundError) and error.name == "torch" else f" ({error})"
        raise BuildError(f"fastrnn is built against the installed torch, and there is none{why}: {how}") from None
    have = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if have < MIN_TORCH:
        want = ".".join(map(str, MIN_TORCH))
        raise BuildError(f"torch {torch.__version__} is too old, {want} or newer is needed: {how}")
    return torch


def cuda_home() -> Path | None:
    """Return the folder of the CUDA toolkit: CUDA_HOME or CUDA_PATH, else that of nvcc, else the usual one; or None."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    homes += [str(Path(nvcc).resolve().parent.parent)] if nvcc else []
    found = (Path(home) for home in [*homes, "/usr/local/cuda"] if home)
    return next((home for home in found if (home / "include" / "cuda_bf16.h").exists()), None)


def wants_cuda(torch: ModuleType) -> bool:
    """Return whether to build the CUDA half: FASTRNN_CUDA, else if torch is a CUDA build and nvcc is there.

    Whether this machine has a GPU is not asked: machines that build often have none.
    """
    home = cuda_home()
    nvcc = home is not None and (home / "bin" / "nvcc").exists()
    wanted = flag("FASTRNN_CUDA", default=torch.version.cuda is not None and nvcc)
    if wanted and torch.version.cuda is None:
        raise BuildError(f"FASTRNN_CUDA=1, but torch {torch.__version__} is not a CUDA build: install one, or unset it")
    if wanted and not nvcc:
        raise BuildError("FASTRNN_CUDA=1, but nvcc is not found: set CUDA_HOME, or unset FASTRNN_CUDA")
    return wanted


def cuda_arguments(home: Path) -> list[str]:
    """Return what CMake needs to build for CUDA; FASTRNN_CUDA_ARCH names the GPUs as CMake does: "90a-real;100"."""
    architectures = os.environ.get("FASTRNN_CUDA_ARCH", "").strip()
    return [
        "-DFASTRNN_CUDA=1",
        f"-DCMAKE_CUDA_COMPILER={home / 'bin' / 'nvcc'}",
        f"-DCUDAToolkit_ROOT={home}",
        *([f"-DFASTRNN_CUDA_ARCHITECTURES={architectures}"] if architectures else []),
    ]


# --- CMake ------------------------------------------------------------------------------------------------------------


def build_tag(torch: ModuleType) -> str:
    """Return a folder name that differs wherever object files cannot be shared."""
    torch_version = torch.__version__.replace("+", "-")
    return f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-torch-{torch_version}"


def cmake_arguments(torch: ModuleType, build: Path, extra: list[str]) -> list[str]:
    """Return the arguments that configure `build`: the whole interface between Python and CMakeLists.txt."""
    from torch.utils import cpp_extension

    cuda = wants_cuda(torch)
    home = cuda_home()
    device = "cuda" if cuda else "cpu"
    return [
        "-S", str(ROOT),
        "-B", str(build),
        "-G", "Ninja",
        f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
        *compiler_arguments(find_compiler()),
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DFASTRNN_OUTPUT_DIR={build / 'lib'}",
        f"-DFASTRNN_EXT_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
        f"-DFASTRNN_TORCH_INCLUDE={';'.join(cpp_extension.include_paths(device))}",
        f"-DFASTRNN_TORCH_LIB={cpp_extension.library_paths(device)[0]}",
        f"-DFASTRNN_VERSION={version()}",
        f"-DFASTRNN_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}",
        *(cuda_arguments(home) if cuda and home else ["-DFASTRNN_CUDA=0"]),
        *extra,
    ]  # fmt: skip


def jobs() -> str:
    """Return how many compilers run at once: MAX_JOBS, else one for each CPU that this process may use."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return os.environ.get("MAX_JOBS", "").strip() or str(cpus or 1)


def run(command: list[str]) -> None:
    """Run a program of the build, its output shown as it comes."""
    sys.stdout.flush()
    try:
        subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    except subprocess.CalledProcessError as error:
        what = " ".join(command[:2])
        raise BuildError(f"`{what} ...` failed with status {error.returncode}; its own message stands above") from None


@contextmanager
def alone_in(build: Path) -> Iterator[None]:
    """Keep other processes that build in the same folder waiting: those of a test run, say."""
    build.mkdir(parents=True, exist_ok=True)
    with (build / "fastrnn-lock").open("w") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def configure_and_build(build: Path, extra: list[str], target: str) -> None:
    """Configure `build` where its command line is new, then build `target`."""
    with alone_in(build):
        _configure_and_build(build, extra, target)


def _configure_and_build(build: Path, extra: list[str], target: str) -> None:
    cmake = find_tool("cmake")
    arguments = cmake_arguments(import_torch(), build, extra)
    wanted = "\n".join([cmake, os.environ.get("CXX", ""), os.environ.get("CXXFLAGS", ""), *arguments])
    configured = build / "fastrnn-configured.txt"
    if not configured.exists() or configured.read_text(encoding="utf-8") != wanted:
        # CMake keeps a compiler and tools that it found once; what was configured otherwise starts anew.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        shutil.rmtree(build / "CMakeFiles", ignore_errors=True)
        configured.unlink(missing_ok=True)  # what fails here, or is interrupted, is to be done again
        run([cmake, *arguments])
        configured.write_text(wanted, encoding="utf-8")
    run([cmake, "--build", str(build), "--target", target, "--parallel", jobs()])


def library_build() -> tuple[Path, list[str]]:
    """Return the folder of the library's build, and what configures it."""
    return ROOT / "build" / build_tag(import_torch()), ["-DCMAKE_BUILD_TYPE=Release"]


def build_library() -> Path:
    """Build the library and return its path (below build/, for the caller to copy)."""
    build, extra = library_build()
    configure_and_build(build, extra, "all")
    library = build / "lib" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not library.exists():
        raise BuildError(f"CMake built no {library.relative_to(ROOT)}: CMakeLists.txt does not use FASTRNN_OUTPUT_DIR")
    return library


def put(library: Path, target: Path) -> None:
    """Copy a built library, whole: processes that have the old one loaded keep it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with alone_in(library.parent.parent), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        new = Path(shutil.copy2(library, folder))
        new.replace(target)


def build_in_place() -> None:
    """Put the library beside the Python sources; for a pure Python package, see that none is there."""
    target = ROOT / "fastrnn" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if wants_native():
        put(build_library(), target)
    else:
        target.unlink(missing_ok=True)  # one of an earlier build would be loaded


def build_cuda_ops() -> Path:
    """Build the ops of the CUDA half on an emulated GPU and return the library, for torch.ops.load_library."""
    home = cuda_home()
    if home is None:
        raise BuildError("CUDA's headers are not found: install the CUDA toolkit, or set CUDA_HOME")
    build = ROOT / "build" / "cuda-ops"
    extra = [f"-DFASTRNN_CUDA_HEADERS={home / 'include'}", "-DCMAKE_BUILD_TYPE=Release"]
    configure_and_build(build, extra, "fastrnn_cuda_ops")
    return build / "lib" / "libfastrnn_cuda_ops.so"


def build_cuda_link() -> Path:
    """Build and link the library for CUDA against a torch that is only unpacked: no GPU, no CUDA torch to import."""
    home = cuda_home()
    if home is None:
        raise BuildError("nvcc is not found: install the CUDA toolkit, or set CUDA_HOME")
    folder = ROOT / "build" / "cuda-torch" / LINK_TORCH
    lib = folder / "torch" / "lib"
    if not (lib / "libtorch_cpu.so").exists():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [
            sys.executable,
            "-m",
            "pip",
            "--disable-pip-version-check",
            "download",
            "--no-deps",
            "--dest",
            str(folder),
        ]
        run([*pip, f"torch=={LINK_TORCH}"])
        wheel = next(folder.glob("torch-*.whl"))
        wanted = re.compile(r"torch/(include/.*|lib/lib(c10|c10_cuda|torch|torch_cpu|torch_python)\.so)")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder, [name for name in archive.namelist() if wanted.fullmatch(name)])
        wheel.unlink()
    include = folder / "torch" / "include"
    extra = [
        f"-DFASTRNN_TORCH_INCLUDE={include};{include / 'torch/csrc/api/include'};{home / 'include'}",
        f"-DFASTRNN_TORCH_LIB={lib}",
        *cuda_arguments(home),
        # the wheel's own needs (cuBLAS, cuDNN, ...) are not here
        "-DCMAKE_MODULE_LINKER_FLAGS=-Wl,--allow-shlib-undefined",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    build = ROOT / "build" / "cuda-link"
    configure_and_build(build, extra, "_C")
    return build / "lib" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def build_bench(target: str) -> None:
    """Build a native part of the benchmarks, ``limits`` or ``scans``, in build/bench/bench/native."""
    build = ROOT / "build" / "bench"
    configure_and_build(build, ["-DFASTRNN_BUILD_BENCH=ON", "-DCMAKE_BUILD_TYPE=Release"], target)


def run_tests(sanitize: bool) -> None:
    """Build and run the C++ tests: from objects of the library, in its folder, or apart under sanitizers."""
    if sanitize:
        build = ROOT / "build" / "cpp-tests-sanitize"
        extra = ["-DFASTRNN_BUILD_TESTS=ON", "-DCMAKE_BUILD_TYPE=Sanitize", f"-DCMAKE_CXX_FLAGS={SANITIZERS}"]
    else:
        build, extra = library_build()
    configure_and_build(build, extra, "fastrnn_cpp_tests")
    run([find_tool("ctest"), "--test-dir", str(build), "--output-on-failure", "--no-tests=error"])


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["check", "build", "tests", "limits", "scans", "cuda-ops", "cuda-link"])
    parser.add_argument("--sanitize", action="store_true", help="build the tests with address and undefined sanitizers")
    arguments = parser.parse_args()
    try:
        if arguments.command == "check":
            check_venv()
            check()
        elif arguments.command == "cuda-ops":
            build_cuda_ops()
        elif arguments.command == "cuda-link":
            build_cuda_link()
        elif arguments.command in ("limits", "scans"):
            build_bench(arguments.command)
        elif arguments.command == "tests":
            run_tests(arguments.sanitize)
        else:
            build_in_place()
    except BuildError as error:
        sys.exit(f"fastrnn: {error}")


if __name__ == "__main__":
    main()
