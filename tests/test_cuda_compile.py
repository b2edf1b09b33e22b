"""What nvcc makes of the CUDA sources; no GPU is needed. And the rules of the house that keep them emulable."""

import collections
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import cuda_programs
import pytest
from cuda_programs import ROOT, SIM

SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), SIM / "scans.cu", SIM / "wrappers.cu"]
TEXTS = sorted(path for path in (ROOT / "csrc" / "cuda").iterdir() if path.suffix in (".h", ".cu", ".cuh"))
TEXTS += sorted(SIM.glob("*.cu"))
# Kernels that are nothing without tensor cores. One of nvcc 13.0's faults is to drop them without a word.
TENSOR_CORE_KERNELS = {"scans": ["grid_scan", "cluster_scan"], "wrappers": ["multiply"]}

needs_nvcc = pytest.mark.skipif(
    cuda_programs.cuda_home() is None or cuda_programs.nvcc() is None, reason="no nvcc: set CUDA_HOME"
)
SLOW = {"persistent_forward", "persistent_backward", "grid_forward", "grid_backward", "grid_32"}  # to compile
every_source = pytest.mark.parametrize(
    "source",
    [pytest.param(source, marks=[pytest.mark.slow] if source.stem in SLOW else []) for source in SOURCES],
    ids=lambda source: source.name,
)


@needs_nvcc
@pytest.mark.parametrize(
    "architecture",
    ["sm_90a", pytest.param("sm_80", marks=pytest.mark.slow), pytest.param("sm_100", marks=pytest.mark.slow)],
)
@every_source
def test_compiles_alone(source, architecture):
    """Without a warning, a spilled register or any other local memory, and without torch's headers."""
    assert cuda_programs.compiled(source, architecture).stat().st_size > 0


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("source", [SIM / "scans.cu", SIM / "wrappers.cu"], ids=lambda source: source.name)
def test_programs_link(source):
    """As a machine with a GPU builds them."""
    assert cuda_programs.device_program(source).stat().st_size > 0


@needs_nvcc
@every_source
def test_includes_no_torch(source):
    """They take a compiler ten seconds, and belong to csrc/ops/."""
    listed = cuda_programs.build([*cuda_programs.nvcc_command(source, "sm_90a"), "-M"], ".d").read_text(
        encoding="utf-8"
    )
    assert "gpu.h" in listed
    assert not re.findall(r"\S*/(?:torch|ATen|c10)/\S*", listed)


def cuobjdump() -> str | None:
    packaged = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", "cuobjdump")
    return str(packaged) if packaged.exists() else shutil.which("cuobjdump")


def instructions(source: Path) -> dict[str, collections.Counter]:
    """How often each instruction occurs in each kernel, by mangled name."""
    command = [str(cuobjdump()), "-sass", str(cuda_programs.compiled(source, "sm_90a"))]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"\n\s*Function : ", sass)[1:]:
        opcodes = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", part)
        found[part.split()[0]] = collections.Counter(opcodes)
    return found


@needs_nvcc
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
@every_source
def test_instructions(source):
    """No local memory in the machine's code either; tensor cores where a kernel is written for them."""
    kernels = instructions(source)
    assert kernels
    for kernel, counts in kernels.items():
        assert counts["EXIT"] > 0, kernel
        assert (counts["LDL"], counts["STL"]) == (0, 0), kernel
    for name in TENSOR_CORE_KERNELS.get(source.stem, []):
        counts = [counts["HMMA"] for kernel, counts in kernels.items() if f"{len(name)}{name}" in kernel]
        assert counts and min(counts) > 0, name


CELLS = {"Rnn": "rnn_tanh", "Lstm": "lstm", "Gru": "gru"}


def products_of(kernel: str) -> int:
    """How many tensor-core instructions a persistent kernel has: one for each fragment of weights in registers and each
    group of 8 rows of the batch, and those of two k-steps more in a loop over the fragments in shared memory; an
    odd number in registers adds one."""
    from fastrnn import _C

    direction = re.search(r"(?:persistent|grid)_(forward|backward)_kernel", kernel)
    cell, sizes = re.search(r"(Rnn|Lstm|Gru)Cell", kernel), re.search(r"Li(\d+)E(?:Li(\d+)E)?Lb", kernel)
    assert direction and cell and sizes
    backward, groups = direction[1] == "backward", int(sizes[2] or 1)
    plans = _C.cuda_plans(CELLS[cell[1]], 2, 16, 100, backward=backward)[:-1]
    grid = [plan for plan in plans if plan["tier"] == "grid"]
    if "grid_" in kernel:  # those in shared memory: as many pairs of k-steps as are on their way, at two places
        fits = [plan for plan in grid if plan["units"] == 8 * int(sizes[1]) and plan["rows"] == 8 * groups]
        steps, tiles = {(plan["register_steps"], plan["row_tiles"]) for plan in fits}.pop()
        return (steps + 4 * ((4 if tiles <= 2 else 2) // groups)) * tiles * groups
    plans = [plan for plan in plans if plan["tier"] != "grid"]
    if backward:
        fits = [plan for plan in plans if plan["row_tiles"] == int(sizes[1])]
    else:  # so many groups of 8 units a warp
        fits = [plan for plan in plans if plan["units"] * 4 == plan["threads"] * int(sizes[1])]
    steps, tiles = {(p["register_steps"], p["row_tiles"]) for p in fits if p["rows"] == 8 * groups}.pop()
    return (steps + steps % 2 + 2) * tiles * groups


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(cuobjdump() is None, reason="no cuobjdump: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
@pytest.mark.parametrize("name", ["persistent_forward", "persistent_backward", "grid_forward", "grid_backward"])
def test_products_of_persistent_kernels(name):
    """All of them, and no more: nothing is dropped, nothing is computed twice."""
    pytest.importorskip("fastrnn._C")
    kernels = instructions(ROOT / "csrc" / "cuda" / f"{name}.cu")
    assert len(kernels) >= 14
    for kernel, counts in kernels.items():
        assert counts["HMMA"] == products_of(kernel), kernel


def without_comments(path: Path) -> str:
    """Line numbers and strings stay."""
    return re.sub(r"//.*", "", path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_cuda_syntax_stays_in_gpu_h(path):
    if path.name == "gpu.h":
        return
    assert re.findall(r"\basm\b|__shared__|<<<|__syncthreads|__shfl|__ballot|cudaLaunch", without_comments(path)) == []


def unbraced_branches(text: str) -> list[str]:
    """The branches of `if constexpr` without braces: nvcc 13.0 dropped the code of some, inside lambdas, silently."""
    found = []
    for match in re.finditer(r"\bif constexpr\s*\(", text):
        at, depth = match.end(), 1
        while depth:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
        line = f"line {text.count(chr(10), 0, match.start()) + 1}"
        if text[at:].lstrip()[:1] != "{":
            found.append(line)
            continue
        at = text.index("{", at) + 1
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(text[at], 0)
            at += 1
        if re.match(r"\s*else\b(?!\s*(?:\{|if constexpr))", text[at:]):
            found.append(f"{line}, else")
    return found


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_branches_of_if_constexpr_have_braces(path):
    assert unbraced_branches(without_comments(path)) == []


def test_unbraced_branches_are_found():
    text = "if constexpr (a(b)) x();\nif constexpr (c) { y(); } else z();\nif constexpr (d) {} else if constexpr (e) {}"
    assert unbraced_branches(text) == ["line 1", "line 2, else"]
