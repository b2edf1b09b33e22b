"""The cases of tests/cuda_sim/layers.cu, what must come out, and the faults that are planted in the kernels."""

import shutil
from pathlib import Path

import cuda_programs
import numpy as np
import torch
from cuda_programs import ROOT, SIM, Case, from_bf16, to_bf16

from fastrnn import reference

SAVED = {"lstm": 5, "gru": 4}
BLOCK, ASYNC, GLOBAL = range(3)  # as Exchange


def layer_case(
    cell, steps=5, batch=3, units=20, directions=1, cluster=2, exchange=ASYNC, lengths=None, resets=False, packed=False
):
    """A packed batch's lengths do not increase."""
    random = np.random.default_rng(0)
    rows = sum(lengths) if packed else steps * batch
    gates, columns = reference.CELLS[cell].gates * units, SAVED[cell] * units

    def normal(*shape):
        return to_bf16(random.standard_normal(shape).astype(np.float32))

    def nothing(*shape):
        return np.full(shape, 0xFFFF, np.uint16)  # NaN

    projection = np.full((directions, rows, columns), np.nan, np.float32)
    projection[..., :gates] = random.standard_normal((directions, rows, gates))
    arrays = {
        "w_hh": to_bf16(random.standard_normal((directions, gates, units)) * units**-0.5),
        "packed": np.zeros(1 << 20, np.uint8),
        "gates": projection,
        "h0": normal(directions, batch, units),
        "output": nothing(rows, directions * units),
        "h_n": nothing(directions, batch, units),
        "grad_output": normal(rows, directions * units),
        "carry": np.zeros((directions, batch, units), np.float32),
        "grad_gates": nothing(directions, rows, gates),
        "grad_first": np.zeros((directions, batch, gates), np.uint16),
        "previous": nothing(directions, rows, units),
    }
    if resets:
        arrays["reset"] = random.random((steps, batch)) < 0.4
    if cell == "lstm":
        arrays["c0"], arrays["c_n"] = normal(directions, batch, units), nothing(directions, batch, units)
    else:
        arrays["grad_recurrent"] = nothing(directions, rows, gates)
    if lengths is not None:
        arrays["lengths"] = np.array(lengths, np.int64)
    if packed:
        sizes = [sum(length > t for length in lengths) for t in range(steps)]
        arrays["offset"] = np.cumsum([0, *sizes[:-1]])
    numbers = {"kind": list(reference.CELLS).index(cell), "steps": steps, "batch": batch, "units": units}
    numbers |= {"directions": directions, "columns": columns, "cluster": cluster, "exchange": exchange, "rows": rows}
    return Case(cell, arrays, numbers)


def expected(case):
    """Outputs and the gradients of both projections in float64, h rounded where the tensor cores read it."""
    cell, a = case.entry, case.arrays
    steps, batch, units, directions = (case.numbers[name] for name in ("steps", "batch", "units", "directions"))
    spec = reference.CELLS[cell]
    width = spec.gates * units

    def numbers(name):
        return torch.from_numpy(from_bf16(a[name])).double()

    lengths = a.get("lengths", np.full(batch, steps))
    resets = a.get("reset", np.zeros((steps, batch), np.bool_))
    exists = torch.ones(steps, batch, dtype=torch.bool)  # every (t, n) but what a packed batch has not
    if "offset" in a:
        exists = torch.arange(steps).unsqueeze(1) < torch.from_numpy(lengths)

    def padded(rows, *shape):
        result = torch.zeros(steps, batch, *shape, dtype=torch.float64)
        result[exists] = rows.reshape(-1, *shape)
        return result

    output = torch.zeros(steps, batch, directions, units, dtype=torch.float64)
    found = {"h_n": torch.zeros(directions, batch, units, dtype=torch.float64)}
    found["grad_gates"] = torch.zeros(directions, steps, batch, width, dtype=torch.float64)
    found["grad_recurrent"] = torch.zeros_like(found["grad_gates"])
    if cell == "lstm":
        found["c_n"] = torch.zeros_like(found["h_n"])
    upstream = padded(numbers("grad_output"), directions, units)
    for d in range(directions):
        inputs = padded(torch.from_numpy(a["gates"]).double()[d, :, :width], width)
        weights = numbers("w_hh")[d]
        for n in range(batch):
            length = int(lengths[n])
            states, loss, visited = tuple(numbers(name)[d, n] for name in ("h0", "c0")[: spec.states]), 0.0, []
            for t in range(length) if d == 0 else range(length - 1, -1, -1):
                if resets[t, n] if d == 0 else t + 1 < length and resets[t + 1, n]:
                    states = tuple(torch.zeros_like(state) for state in states)
                x = inputs[t, n].clone().requires_grad_()
                rounded = states[0] + (states[0].bfloat16().double() - states[0]).detach()
                product = weights @ rounded
                h = torch.zeros_like(product).requires_grad_()
                states = spec.step(x, product + h, states)
                visited.append((t, x, h))
                output[t, n, d] = states[0].detach()
                loss = loss + (states[0] * upstream[t, n, d]).sum()
            for name, state in zip(("h_n", "c_n"), states, strict=False):
                found[name][d, n] = state.detach()
            if visited:
                gradients = torch.autograd.grad(loss, [tensor for _, x, h in visited for tensor in (x, h)])
                for (t, _, _), of_x, of_h in zip(visited, gradients[::2], gradients[1::2], strict=True):
                    found["grad_gates"][d, t, n], found["grad_recurrent"][d, t, n] = of_x, of_h
    found["output"] = output[exists].reshape(-1, directions * units)
    for name in ("grad_gates", "grad_recurrent"):
        found[name] = found[name][:, exists]
    if cell == "lstm":
        del found["grad_recurrent"]
    return {name: tensor.numpy() for name, tensor in found.items()}


def check_layer(case, arrays):
    """Within two units in the last place of bfloat16 a step, of the largest value: what rounding may add up to."""
    for name, oracle in expected(case).items():
        bound = 2 * case.numbers["steps"] * 2.0**-8 * np.abs(oracle).max()
        np.testing.assert_allclose(from_bf16(arrays[name]), oracle, rtol=0, atol=bound, err_msg=name)


LAYERS = [
    layer_case("lstm"),
    layer_case("gru", directions=2, lengths=[5, 0, 3], resets=True),
    layer_case("lstm", cluster=1, exchange=BLOCK, directions=2),
    layer_case("gru", steps=3, cluster=2),
    layer_case("lstm", steps=3, batch=9, units=30, cluster=4, lengths=[3, 1, 2, 3, 0, 3, 2, 1, 3]),
    layer_case("lstm", units=64),  # backward, a warp of each block has nothing for its own
    layer_case("lstm", cluster=4, directions=2),  # a block without units
    layer_case("gru", steps=4, batch=9, directions=2, lengths=[4, 4, 3, 3, 3, 1, 1, 1, 1], packed=True),
    layer_case("lstm", exchange=GLOBAL),
    layer_case("gru", batch=9, exchange=GLOBAL, directions=2, lengths=[5, 0, 3, 5, 1, 2, 3, 4, 5], resets=True),
]

# A line of a kernel, what takes its place, and a case in which that shows. (That the backward scan's operand is there
# twice shows in no schedule of the emulator's: products read ahead, and a warp would have to fall behind by a step.)
FAULTS = {
    "no wait forward": ("persistent_forward.cuh", "turn.wait(s + 1, active);", ";", 0),
    "no wait backward": ("persistent_backward.cuh", "turn.wait(s + 1);", "", 0),
    "one buffer of h": ("persistent_forward.cuh", "(s + 1) % 2 * of_h", "s % 2 * of_h", 0),
    "one inbox": ("persistent_backward.cuh", "(s + 1) % 2 * of_inbox", "s % 2 * of_inbox", 0),
    "a block without units sends": ("persistent_backward.cuh", "warp < plan.warps && rank < owners;", "warp < plan.warps;", 6),  # noqa: E501
    "a packed row has no end": ("cells_forward.cuh", "has(o) && (time_.packed() ? t < length_[r] : length_[r] >= 0);", "has(o) && length_[r] >= 0;", 7),  # noqa: E501
    "no block barrier": ("persistent_backward.cuh", "gpu::syncthreads();", "", 0),
    "blocks do not begin together": ("persistent.cuh", "gpu::cluster_sync();", "gpu::syncthreads();", 0),
    "no barrier of one block": ("persistent.cuh", "void wait(int s, bool sends = true) const {\n    if (!async_) {\n      gpu::syncthreads();", "void wait(int s, bool sends = true) const {\n    if (!async_) {", 2),  # noqa: E501
    "wrong parity": ("persistent.cuh", "(s - 1) / 2 % 2", "s / 2 % 2", 0),
    "words are not waited for": ("grid.cuh", "if (!nothing(v)) return;", "return;", 8),
    "sums of some warps": ("grid_forward.cuh", "gpu::syncthreads();\n      if (has_cell) {", "if (has_cell) {", 8),
    "too few bytes": ("persistent_forward.cuh", "arriving = static_cast<unsigned>(", "arriving = static_cast<unsigned>(-16 + ", 0),  # noqa: E501
}  # fmt: skip


def faulty_program(fault, folder: Path, sanitizer: str = "") -> Path:
    """The program with one fault in it, from a copy of the sources."""
    name, line, instead, _ = FAULTS[fault]
    for part in ("core", "cuda"):
        shutil.copytree(ROOT / "csrc" / part, folder / part)
    text = (folder / "cuda" / name).read_text(encoding="utf-8")
    assert text.count(line) == 1, f"{name} has no such line, or several: {line}"
    (folder / "cuda" / name).write_text(text.replace(line, instead), encoding="utf-8")
    source = folder / "cuda" / "layers.cu"  # beside the headers: those come first
    shutil.copy(SIM / "layers.cu", source)
    return cuda_programs.emulated(source, sanitizer)
