"""What a stranger does first: build and install the package, with tools there or missing."""

import fcntl
import importlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SITE = Path(sysconfig.get_path("purelib"))
NATIVE = ROOT / "tools" / "native.py"
# What builds an sdist or a wheel, and is no part of torch.
BUILD_TOOLS = ("setuptools", "_distutils_hack", "distutils-precedence.pth", "build", "pyproject_hooks", "packaging")
FORWARD = """
import sys, torch, fastrnn
assert sys.prefix in fastrnn.__file__, fastrnn.__file__
fastrnn.LSTM(3, 4, bidirectional=True)(torch.randn(5, 2, 3))[0].sum().backward()
"""


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what steers the build, the tools of this Python on PATH."""
    steering = ("FASTRNN_", "PYTHONPATH", "CXX")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(steering)}
    path = os.pathsep.join([sysconfig.get_path("scripts"), kept["PATH"]])
    return {**kept, "PATH": path, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **changes}


def run(*command: object, check: bool = True, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """A finished process, its two streams in one; nothing is fetched from a registry."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment(**changes),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert not check or done.returncode == 0, done.stdout
    return done


def make_python(folder: Path, *, torch: bool) -> Path:
    """The Python of a new environment that sees this one's packages, or only what builds packages."""
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip())
    for old in site.glob("setuptools*"):  # an old one, of the Python that made the environment
        old.rename(folder / old.name)
    if torch:
        # A .pth file adds a folder without reading the .pth files in it, so not the editable install of fastrnn.
        (site / "outer.pth").write_text(f"{SITE}\n")
    else:
        for new in SITE.iterdir():
            if new.name in BUILD_TOOLS or re.fullmatch(r"(setuptools|build|packaging)-.*\.dist-info", new.name):
                link = site / new.name
                if not link.exists():
                    link.symlink_to(new)
    return python


def our_lines(output: str) -> list[str]:
    """The lines that fastrnn's own build wrote."""
    return [line.strip() for line in output.splitlines() if line.strip().startswith("fastrnn: ")]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"CXX": "no-such-compiler"}, ("no-such-compiler", "not found", "install")),
        ({"CXX": "false"}, ("does not know C++20", "install")),
        ({"CXX": "'"}, ("is not a command", "quotation")),
        ({"FASTRNN_NATIVE": "yes"}, ("FASTRNN_NATIVE", "0 or 1")),
    ],
    ids=["compiler missing", "compiler too old", "no command line", "flag not understood"],
)
def test_missing_tool_is_named_in_one_line(changes, words):
    done = run(sys.executable, NATIVE, "check", check=False, **{"FASTRNN_NATIVE": "1", **changes})
    assert done.returncode != 0
    assert our_lines(done.stdout) == [done.stdout.strip()]
    assert all(word in done.stdout for word in words), done.stdout


@pytest.fixture
def native(monkeypatch):
    """tools/native.py as a module."""
    monkeypatch.syspath_prepend(str(NATIVE.parent))
    return importlib.import_module("native")


def test_a_compiler_may_have_flags_and_a_launcher(native, tmp_path, monkeypatch):
    for name in ("ccache", "g++"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiler = f"-DCMAKE_CXX_COMPILER={tmp_path}/g++"
    launcher = f"-DCMAKE_CXX_COMPILER_LAUNCHER={tmp_path}/ccache"
    assert native.compiler_arguments("g++") == [compiler]
    assert native.compiler_arguments("g++ -m64 '-DA=b c'") == [f"{compiler};-m64;-DA=b c"]
    assert native.compiler_arguments("ccache g++ -m64") == [f"{compiler};-m64", launcher]
    with pytest.raises(native.BuildError, match="clang"):
        native.compiler_arguments("ccache clang++")


def test_what_failed_is_configured_again(native, tmp_path, monkeypatch):
    """Also where the settings are those again that worked before."""
    calls = []

    def run(command):
        calls.append("build" if "--build" in command else "configure")
        if "-DBROKEN" in command:
            raise native.BuildError("no")

    monkeypatch.setattr(native, "run", run)
    monkeypatch.setattr(native, "cmake_arguments", lambda torch, build, extra: extra)
    native.configure_and_build(tmp_path, [], "all")
    native.configure_and_build(tmp_path, [], "all")
    with pytest.raises(native.BuildError):
        native.configure_and_build(tmp_path, ["-DBROKEN"], "all")
    native.configure_and_build(tmp_path, [], "all")
    assert calls == ["configure", "build", "build", "configure", "configure", "build"]


def test_a_library_in_use_is_replaced_and_not_written(native, tmp_path):
    """A process has it mapped, and would find other code there."""
    library, target = tmp_path / "build" / "lib" / "new.so", tmp_path / "package" / "new.so"
    library.parent.mkdir(parents=True)
    for content in ("old", "new"):
        library.write_text(content)
        native.put(library, target)
        if content == "old":
            mapped = target.open()
    assert mapped.read() == "old"
    mapped.close()
    assert target.read_text() == "new"
    assert [path.name for path in target.parent.iterdir()] == ["new.so"]


def test_pure_python_needs_no_compiler():
    assert run(sys.executable, NATIVE, "check", FASTRNN_NATIVE="0", CXX="no-such-compiler").stdout == ""


def test_version_has_one_source():
    from importlib.metadata import version

    import fastrnn

    assert version("fastrnn") == fastrnn.__version__


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """A Python with the tools that build packages, without torch."""
    return make_python(tmp_path_factory.mktemp("bare"), torch=False)


@pytest.fixture(scope="module")
def torch_python(tmp_path_factory):
    """A Python with torch and the build tools, without fastrnn."""
    return make_python(tmp_path_factory.mktemp("torch"), torch=True)


@pytest.fixture(scope="module")
def sdist(bare_python, tmp_path_factory):
    """The sdist, built without torch."""
    folder = tmp_path_factory.mktemp("sdist")
    with (tmp_path_factory.getbasetemp().parent / "sdist.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two workers would build in the same tree, and take away each other's files
        run(bare_python, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder)
    (archive,) = folder.glob("fastrnn-*.tar.gz")
    return archive


@pytest.mark.slow
def test_sdist_holds_the_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ("CMakeLists.txt", "Makefile", "LICENSE", "tools/native.py", "docs/design.md")
    for name in (*needed, "fastrnn/py.typed", "fastrnn/cuda_plans.csv"):
        assert name in names
    for folder in ("csrc", "tests", "bench"):
        assert any(name.startswith(f"{folder}/") for name in names)
    assert not [name for name in names if re.search(r"\.so$|__pycache__|^build/|^\.venv|^bench/out", name)]


@pytest.mark.slow
def test_installing_without_torch_stops_with_one_line(sdist, bare_python):
    done = run(bare_python, "-m", "pip", "install", "--no-build-isolation", sdist, check=False, FASTRNN_NATIVE="1")
    assert done.returncode != 0
    (line,) = our_lines(done.stdout)
    assert "pip install torch first, then pip install --no-build-isolation ." in line


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the native library is built on Linux by default")
def test_sdist_installs_and_runs_natively(sdist, torch_python, tmp_path):
    run(torch_python, "-m", "pip", "install", "--no-build-isolation", "--no-deps", sdist)
    run(torch_python, "-W", "error:.*fastrnn", "-c", FORWARD, cwd=tmp_path, FASTRNN_BACKEND="native")


@pytest.mark.slow
def test_pure_python_wheel(sdist, torch_python, tmp_path):
    run(
        torch_python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, sdist,
        FASTRNN_NATIVE="0", CXX="no-such-compiler",
    )  # fmt: skip
    (wheel,) = tmp_path.glob("fastrnn-*-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {"fastrnn/py.typed", "fastrnn/cuda_plans.csv"} <= set(archive.namelist())
    run(torch_python, "-m", "pip", "install", "--no-deps", "--force-reinstall", wheel)
    run(torch_python, "-c", FORWARD, cwd=tmp_path, FASTRNN_BACKEND="python")
