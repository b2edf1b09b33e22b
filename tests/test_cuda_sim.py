"""The emulator runs every function of gpu.h as CUDA defines it, and finds the faults that are planted.

What ThreadSanitizer finds is in test_cuda_race.py.
"""

import re

import cuda_programs
import numpy as np
import pytest
from cuda_programs import SIM, Case, from_bf16, to_bf16
from layers import FAULTS, LAYERS, check_layer, faulty_program
from scans import ALL_SCANS, check_scan, scan_case
from steps import STEPS, check_steps

pytestmark = pytest.mark.skipif(bool(cuda_programs.no_emulator()), reason=cuda_programs.no_emulator() or "-")

RNG = np.random.default_rng(0)
FLOATS = RNG.standard_normal(32).astype(np.float32)
LANES = np.arange(32)


def wrapper_cases():
    """(case, what its arrays must hold afterwards, relative tolerance) for every function of gpu.h."""
    blank = np.zeros
    yield (
        Case("shuffles", {"x": FLOATS, "out": blank((6, 32), np.float32)}),
        {
            "out": np.stack([
                FLOATS[(LANES + 5) % 32],
                FLOATS[LANES ^ 3],
                FLOATS[np.where(LANES < 2, LANES, LANES - 2)],
                FLOATS[np.where(LANES > 27, LANES, LANES + 4)],
                np.full(32, FLOATS.sum(dtype=np.float64)),
                np.full(32, FLOATS.max()),
            ])
        },
        1e-6,
    )  # fmt: skip
    votes = (FLOATS > 0).astype(np.uint32) << LANES.astype(np.uint32)
    yield (
        Case("half_warps", {"x": FLOATS, "out": blank(32, np.float32), "votes": blank(32, np.uint32)}),
        {"out": FLOATS[LANES ^ 8], "votes": np.repeat([votes[:16].sum(), votes[16:].sum()], 16)},
        0,
    )
    x = RNG.integers(-99, 99, (4, 32), dtype=np.int32)
    yield (
        Case("static_shared", {"x": x, "out": blank((2, 32, 4), np.int32)}),
        {"out": np.stack([x.T, x.T + 1000])},
        0,
    )
    x = RNG.integers(-99, 99, 64, dtype=np.int32)
    yield Case("warp_exchange", {"x": x, "out": blank(64, np.int32)}), {"out": x[np.arange(64) ^ 1]}, 0
    x = RNG.integers(-99, 99, (5, 32), dtype=np.int32)
    yield Case("named_barriers", {"x": x, "out": blank((5, 32), np.int32)}, {"rounds": 5}), {"out": x[:, ::-1]}, 0
    for size in (4, 8, 16):
        x = RNG.integers(1, 255, (64, size), dtype=np.uint8)
        landed = x.copy()
        landed[63, 3:] = 0
        expected = np.concatenate([landed[:32], landed[32:][LANES ^ 1]])
        yield Case(f"copies{size}", {"x": x, "out": blank((64, size), np.uint8)}), {"out": expected}, 0
    x = RNG.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)
    arrays = {"x": x, **{f"x{n}": blank((2, 32, n), np.uint32) for n in (1, 2, 4)}}
    pairs = x.reshape(4, 32, 2).view(np.uint32)[..., 0].T  # [lane, matrix]
    transposed = np.ascontiguousarray(x.swapaxes(1, 2)).reshape(4, 32, 2).view(np.uint32)[..., 0].T
    yield Case("matrices", arrays), {f"x{n}": np.stack([pairs[:, :n], transposed[:, :n]]) for n in (1, 2, 4)}, 0
    a, b, c = (RNG.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (8, 16), (16, 8)))
    for name, to_bits, from_bits in (
        ("bf16", to_bf16, from_bf16),
        ("half", lambda v: v.astype(np.float16), lambda v: v.astype(np.float32)),
    ):
        bits = {"a": to_bits(a), "b": to_bits(b), "c": c, "d": blank((16, 8), np.float32)}
        exact = c + from_bits(bits["a"]).astype(np.float64) @ from_bits(bits["b"]).T
        yield Case(f"multiply_{name}", bits), {"d": exact}, 1e-5
        # ties to even, both ways; beyond half's range; the smallest numbers
        odd = [
            1 + 2**-8,
            1 + 3 * 2**-8,
            1 + 2**-11,
            1 + 3 * 2**-11,
            1e38,
            -1e38,
            70000,
            np.inf,
            -np.inf,
            0.0,
            -0.0,
            1e-7,
        ]
        numbers = np.concatenate([np.array(odd, np.float32), RNG.standard_normal(64 - len(odd)).astype(np.float32)])
        with np.errstate(over="ignore"):
            single = to_bits(numbers)
        arrays = {
            "x": numbers,
            "single": blank(64, single.dtype),
            "pairs": blank(32, np.uint32),
            "back": blank(64, np.float32),
        }
        yield (
            Case(f"conversions_{name}", arrays),
            {"single": single, "pairs": single.view(np.uint32), "back": from_bits(single)},
            0,
        )
    x = np.linspace(-8, 7.5, 32, dtype=np.float32) + np.float32(0.1)
    yield (
        Case("approximations", {"x": x, "out": blank((3, 32), np.float32)}),
        {"out": np.stack([np.exp2(x, dtype=np.float64), 1 / x.astype(np.float64), np.tanh(x, dtype=np.float64)])},
        2**-10,
    )
    yield (
        Case("loads", {"x": FLOATS, "out": blank(32, np.float32), "later": blank(32, np.int32)}),
        {"out": FLOATS + FLOATS[::-1], "later": np.ones(32)},
        0,
    )
    x = RNG.integers(1, 99, 32, dtype=np.int32)
    arrays = {
        "x": x,
        "between": blank(64, np.int32),
        "words": blank(4, np.uint32),
        "carriers": blank(32, np.uint64),
        "out": blank((3, 32), np.int32),
    }
    yield Case("flags", arrays), {"out": np.stack([x[::-1], 2 * x[::-1], x[::-1]]), "words": [1, 32, 32, 7]}, 0
    a = RNG.integers(-99, 99, (4, 64), dtype=np.int32)
    yield (
        Case("grid_barriers", {"a": a, "b": a * 0, "counter": blank(1, np.uint32)}, {"blocks": 4, "rounds": 3}),
        {"a": np.roll(a, -3, axis=0), "counter": [24]},
        0,
    )
    x = RNG.integers(1, 99, (2, 4, 32)).astype(np.uint32)
    right, left = np.roll(x, -1, axis=1), np.roll(x, 1, axis=1)
    rank_of_left = np.broadcast_to(np.array([3, 0, 1, 2], np.uint32)[:, None], (2, 4, 8))
    fours = np.stack([left[..., :8], rank_of_left, np.full_like(rank_of_left, 4), left[..., 8:16]], axis=-1)
    yield (
        Case("cluster_memory", {"x": x, "out": blank((2, 4, 3, 32), np.uint32)}),
        {"out": np.stack([right, left[..., ::-1], fours.reshape(2, 4, 32)], axis=2)},
        0,
    )
    x = RNG.integers(1, 99, 32, dtype=np.int32)
    arrays = {"x": x, "between": blank(64, np.int32), "words": blank(2, np.uint32), "out": blank((3, 32), np.int32)}
    yield Case("cluster_flags", arrays), {"out": np.tile(x[::-1] + x + 1, (3, 1))}, 0
    x = RNG.integers(-99, 99, (7, 32), dtype=np.int32)
    yield Case("mbarriers", {"x": x, "out": blank((7, 32), np.int32)}, {"rounds": 7}), {"out": x[:, ::-1]}, 0
    x = RNG.integers(1, 99, (4, 32)).astype(np.uint32)
    for size in (4, 8, 16):
        case = Case(f"async_stores{size}", {"x": x, "out": blank((4, 4, 32), np.uint32)})
        yield case, {"out": np.tile(x, (4, 1, 1))}, 0
    x = RNG.integers(-99, 99, (2, 100), dtype=np.int32)
    yield Case("bulk_loads", {"x": x, "out": blank((2, 100), np.int32)}, {"count": 100}), {"out": x[:, ::-1]}, 0


WRAPPERS = list(wrapper_cases())


@pytest.fixture(scope="module", params=["emulated", "emulated, seed 1", "emulated, seed 2", "device"])
def wrapper_results(request, tmp_path_factory):
    """All cases in one process; on the device from the same source."""
    cases = [case for case, _, _ in WRAPPERS]
    source = SIM / "wrappers.cu"
    if request.param == "device":
        import torch

        if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("needs a CUDA device of capability 9.0")
        program, seed = cuda_programs.device_program(source), 0
    else:
        program, seed = cuda_programs.emulated(source), int(request.param[-1]) if "seed" in request.param else 0
    return cuda_programs.run(program, cases, tmp_path_factory.mktemp("wrappers"), seed)


@pytest.mark.parametrize("index", range(len(WRAPPERS)), ids=[case.entry for case, _, _ in WRAPPERS])
def test_wrapper(wrapper_results, index):
    _, expected, tolerance = WRAPPERS[index]
    result = wrapper_results[index]
    assert not result.error
    for name, value in expected.items():
        np.testing.assert_allclose(result.arrays[name], value, rtol=tolerance, atol=tolerance, err_msg=name)


def test_every_function_has_a_case():
    """A function of gpu.h that no kernel of wrappers.cu uses is tested by nobody."""
    text = (SIM.parents[1] / "csrc" / "cuda" / "gpu.h").read_text(encoding="utf-8")
    names = set(cuda_programs.declared_functions(text))
    used = (SIM / "wrappers.cu").read_text(encoding="utf-8")
    composed = {"mbarrier_try_wait", "mbarrier_try_wait_block", "to_float", "require_cooperative", "shared_address"}
    assert len(names) > 50
    assert {name for name in names - composed if f"gpu::{name}" not in used} == set()


def run_one(source, case, tmp_path, sanitizer="", seed=0):
    return cuda_programs.run(cuda_programs.emulated(SIM / source, sanitizer), [case], tmp_path, seed)[0]


def test_launch_errors_name_the_kernel(tmp_path):
    arrays = {"x": FLOATS, "out": FLOATS, "later": LANES.astype(np.int32)}
    result = run_one("wrappers.cu", Case("too_much_shared", arrays), tmp_path)
    assert "kernel loads(float const*, float*, int*)" in result.error
    assert "more shared memory" in result.error


# --- Planted faults ---------------------------------------------------------------------------------------------------

X64 = np.arange(1, 65, dtype=np.float32)
X256 = np.arange(1, 257, dtype=np.float32)
BLOCK = {"x": X64, "out": np.zeros(64, np.float32)}
GRID = {
    "x": X256,
    "between": np.zeros(256, np.float32),
    "out": np.zeros(256, np.float32),
    "counter": np.zeros(1, np.uint32),
}
CLUSTER = {"out": np.zeros((4, 64), np.uint32)}
RESULTS = {"block": X64[::-1], "grid": np.roll(X256, -64), "cluster": np.repeat([3, 0, 1, 2], 64).reshape(4, 64)}

# What the report must say, whatever the schedule.
REPORTED = [
    (
        "divergence",
        BLOCK,
        r"divergence at a barrier.*\n.*syncthreads \(faults.cu:\d+\): 40 threads, the first is 0,0,0",
    ),
    ("two_barriers", BLOCK, r"divergence at a barrier: syncthreads, where others are at syncthreads \(faults.cu:\d+\)"),
    ("early_return", BLOCK, r"threads wait for ever\n.*shuffle_xor \(gpu.h:\d+\): 31 threads, the first is 32,0,0"),
    ("lane_outside_mask", BLOCK, r"shuffle: .*outside the mask|calling lane is not in its mask"),
    ("dynamic_out_of_bounds", BLOCK, r"outside shared memory: \(dynamic\) has 256 bytes, and byte 256 was written"),
    ("before_dynamic", BLOCK, r"outside shared memory: \(dynamic\) has 256 bytes, and byte -4 was written"),
    ("static_out_of_bounds", BLOCK, r"outside shared memory: table has 256 bytes, and byte 256 was written"),
    ("copy_out_of_bounds", BLOCK, r"cp_async: the address is outside .*block 0,0,0 thread 63,0,0 at faults.cu:\d+"),
    ("not_cooperative", GRID, r"a grid barrier in a launch that is not cooperative \(block \d,0,0 thread"),
    ("block_skips", GRID, r"waits too long: grid_barrier is never satisfied \(block \d,0,0 thread 0,0,0"),
    ("rank", CLUSTER, r"cluster_map: the rank is outside the cluster \(block \d,0,0 thread \d+,0,0 at faults.cu:\d+"),
    ("address", CLUSTER, r"remote_store: the address is outside the shared memory of the cluster"),
    ("before_first_barrier", CLUSTER, r"remote_store: .* before the first cluster barrier"),
    ("exit_before_access", CLUSTER, r"may exit before another block's last access|of a block that has exited"),
    ("arrive_twice", CLUSTER, r"cluster_arrive: the thread has not waited"),
    ("wait_without_arrive", CLUSTER, r"cluster_wait without cluster_arrive"),
    ("exit_between", CLUSTER, r"exits between cluster_arrive and cluster_wait"),
    ("not_initialised", CLUSTER, r"mbarrier_try_wait: the mbarrier is not initialised"),
    ("too_many_arrivals", CLUSTER, r"mbarrier_arrive_expect: more arrivals than the mbarrier counts"),
    ("never_satisfied", CLUSTER, r"waits too long: mbarrier_wait is never satisfied"),
]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("entry, arrays, message", REPORTED, ids=[entry for entry, _, _ in REPORTED])
def test_fault_is_reported(entry, arrays, message, seed, tmp_path):
    error = run_one("faults.cu", Case(entry, arrays), tmp_path, seed=seed).error
    assert re.search(message, error), error


# Asynchronous copies may also land early, in some schedules: then nothing is to be seen.
@pytest.mark.parametrize(
    "entry, arrays, message",
    [
        ("copy_not_waited", BLOCK, "exits with copies of cp_async that it never waited for"),
        ("store_not_waited", CLUSTER, "st_async: nobody waited for it, and its block exits"),
    ],
)
def test_late_copy_is_reported(entry, arrays, message, tmp_path):
    assert message in run_one("faults.cu", Case(entry, arrays), tmp_path).error


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name, arrays", [("block", BLOCK), ("grid", GRID), ("cluster", CLUSTER)])
def test_without_the_fault(name, arrays, seed, tmp_path):
    result = run_one("faults.cu", Case(f"{name}_none", arrays), tmp_path, seed=seed)
    assert not result.error
    np.testing.assert_array_equal(result.arrays["out"], RESULTS[name])


@pytest.mark.parametrize("entry", ["no_barrier", "no_warp_barrier", "read_out_of_bounds"])
def test_unwritten_shared_memory_is_nan(entry, tmp_path):
    """In some schedule: the reader then comes first."""
    cases = [run_one("faults.cu", Case(entry, BLOCK), tmp_path / str(seed), seed=seed) for seed in (1, 2)]
    assert any(np.isnan(result.arrays["out"]).any() for result in cases)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["dynamic_out_of_bounds", "read_out_of_bounds"])
def test_address_sanitizer(entry, tmp_path):
    stderr = run_one("faults.cu", Case(entry, BLOCK), tmp_path, "address").stderr
    assert re.search(r"cusim: invalid access in block 0,0,0 thread \d+,0,0\n", stderr)
    assert re.search(r"use-after-poison(?s:.)* in block_rules\(.*faults.cu:\d+", stderr)


@pytest.mark.slow
def test_static_arrays_have_bounds(tmp_path):
    stderr = run_one("faults.cu", Case("static_out_of_bounds", BLOCK), tmp_path, "address").stderr
    assert re.search(r"faults.cu:\d+:\d+: runtime error: index 64 out of bounds for type 'float \[64\]'", stderr)


@pytest.mark.slow
def test_address_sanitizer_is_content(tmp_path):
    """With what has no fault: fibers, copies, clusters."""
    cases = [case for case, _, _ in WRAPPERS]
    results = cuda_programs.run(cuda_programs.emulated(SIM / "wrappers.cu", "address"), cases, tmp_path)
    assert [result.error or result.stderr for result in results] == [""] * len(cases)


# --- The kernels of one step ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("sanitizer", ["", pytest.param("address", marks=pytest.mark.slow)])
def test_steps(sanitizer, tmp_path):
    """Values, and with a sanitizer that nothing is touched beside what a kernel was given."""
    results = cuda_programs.run(cuda_programs.emulated(SIM / "steps.cu", sanitizer), STEPS, tmp_path)
    for case, result in zip(STEPS, results, strict=True):
        assert (result.error, result.stderr) == ("", "")
        check_steps(case, result.arrays)


# --- Persistent scans -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_scans(seed, tmp_path):
    cases = [scan_case(**arguments) for arguments in ALL_SCANS]
    results = cuda_programs.run(cuda_programs.emulated(SIM / "scans.cu"), cases, tmp_path, seed)
    for case, result in zip(cases, results, strict=True):
        assert not result.error
        check_scan(case, result.arrays["out"])


@pytest.mark.parametrize(
    "arguments, fault",
    [
        (ALL_SCANS[0], "no_copy_wait"),
        (ALL_SCANS[0], "no_block_barrier"),
        (ALL_SCANS[0], "not_cooperative"),
        (ALL_SCANS[-1], "no_mbarrier_wait"),
        (ALL_SCANS[-1], "no_block_barrier"),
        (ALL_SCANS[-1], "one_buffer"),
        (ALL_SCANS[-1], "no_cluster_barrier"),
    ],
    ids=lambda value: value if isinstance(value, str) else value["entry"],
)
def test_scan_with_a_fault(arguments, fault, tmp_path):
    """Some schedule shows each of them."""
    case = scan_case(**arguments, fault=fault)
    program = cuda_programs.emulated(SIM / "scans.cu")
    for seed in range(8):
        result = cuda_programs.run(program, [case], tmp_path / str(seed), seed)[0]
        if result.error:
            return
        try:
            check_scan(case, result.arrays["out"])
        except AssertionError:
            return
    pytest.fail("no schedule showed the fault")


# --- Whole layers, by the kernels of the library ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "sanitizer, seed", [("", 0), ("", 1), ("", 2), pytest.param("address", 0, marks=pytest.mark.slow)]
)
def test_layers(sanitizer, seed, tmp_path):
    results = cuda_programs.run(cuda_programs.emulated(SIM / "layers.cu", sanitizer), LAYERS, tmp_path, seed)
    for case, result in zip(LAYERS, results, strict=True):
        assert (result.error, result.stderr) == ("", "")
        check_layer(case, result.arrays)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_layer_is_found(fault, tmp_path):
    """In some schedule: by the emulator's rules, or by what comes out."""
    program, case = faulty_program(fault, tmp_path / "sources"), LAYERS[FAULTS[fault][-1]]
    for seed in range(16):
        result = cuda_programs.run(program, [case], tmp_path / str(seed), seed)[0]
        if result.error:
            return
        try:
            check_layer(case, result.arrays)
        except AssertionError:
            return
    pytest.fail("no schedule shows it")
