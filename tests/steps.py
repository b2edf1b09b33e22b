"""The cases of tests/cuda_sim/steps.cu, and what must come out: the reference's cells, recurrent products given."""

import numpy as np
import torch
from cuda_programs import Case

from fastrnn import reference

SAVED = {"rnn_tanh": 1, "rnn_relu": 1, "lstm": 5, "gru": 4}


def step_case(cell, steps=4, batch=3, units=5, directions=2, lengths=None, resets=False, seed=0):
    """Random numbers throughout; of exactly the sizes that the kernels are told, so that a sanitizer sees the ends."""
    random = np.random.default_rng(seed)
    spec = reference.CELLS[cell]
    gates, rows = spec.gates * units, steps * batch

    def normal(*shape):
        return random.standard_normal(shape).astype(np.float32)

    columns = SAVED[cell] * units
    projection = np.full((directions, rows, columns), np.nan, np.float32)
    projection[..., :gates] = normal(directions, rows, gates)
    arrays = {
        "gates": projection,
        "recurrent": normal(directions, batch, gates),
        "h0": normal(directions, batch, units),
        "hidden": normal(directions, batch, units),
        "output": np.full((rows, directions * units), np.nan, np.float32),
        "h_n": np.full((directions, batch, units), np.nan, np.float32),
        "grad_output": normal(rows, directions * units),
        "product": normal(directions, batch, units),
        "carry": np.zeros((directions, batch, units), np.float32),
        "grad_gates": np.full((directions, rows, gates), np.nan, np.float32),
        "step_gates": np.full((directions, batch, gates), np.nan, np.float32),
        "grad_first": np.zeros((directions, batch, gates), np.float32),
        "previous": np.full((directions, rows, units), np.nan, np.float32),
    }
    if cell == "lstm":
        arrays["c0"], arrays["c_n"] = normal(directions, batch, units), np.full_like(arrays["h_n"], np.nan)
    if cell == "gru":
        arrays["grad_recurrent"] = np.full((directions, rows, gates), np.nan, np.float32)
    if lengths is not None:
        arrays["lengths"] = np.array(lengths, np.int64)
    arrays["reset"] = random.random((steps, batch)) < (0.4 if resets else 0.0)
    arrays["state"] = arrays["c0" if cell == "lstm" else "h0"].copy()
    dropped = arrays["reset"][0]  # what the host does before the first step
    arrays["state"][0, dropped] = 0
    numbers = {"kind": list(reference.CELLS).index(cell), "steps": steps, "batch": batch, "units": units}
    return Case("layer", arrays, numbers | {"directions": directions, "columns": columns})


def expected(case):
    """Output, final states, and the gradients of the projections and of the recurrent products, in float64."""
    cell = list(reference.CELLS)[case.numbers["kind"]]
    steps, batch, units, directions = (case.numbers[name] for name in ("steps", "batch", "units", "directions"))
    spec = reference.CELLS[cell]
    width = spec.gates * units

    def numbers(name):
        return torch.from_numpy(case.arrays[name]).double()

    lengths = case.arrays.get("lengths", np.full(batch, steps))
    reset = case.arrays["reset"]
    output = torch.zeros(steps, batch, directions, units, dtype=torch.float64)
    found = {"h_n": torch.zeros(directions, batch, units, dtype=torch.float64)}
    found["grad_gates"] = torch.zeros(directions, steps, batch, width, dtype=torch.float64)
    found["recurrent of step"] = torch.zeros_like(found["grad_gates"])
    if cell == "lstm":
        found["c_n"] = torch.zeros_like(found["h_n"])
    for d in range(directions):
        inputs = numbers("gates")[d, :, :width].reshape(steps, batch, width)
        for n in range(batch):
            length = int(lengths[n])
            initial = tuple(numbers(name)[d, n] for name in ("h0", "c0")[: spec.states])
            times = range(length) if d == 0 else range(length - 1, -1, -1)
            states, loss, visited = initial, 0.0, []
            for t in times:
                begins = reset[t, n] if d == 0 else t + 1 < length and reset[t + 1, n]
                if begins:
                    states = tuple(torch.zeros_like(state) for state in states)
                x = inputs[t, n].clone().requires_grad_()
                h = numbers("recurrent")[d, n].clone().requires_grad_()
                states = spec.step(x, h, states)
                visited.append((t, x, h))
                output[t, n, d] = states[0].detach()
                last = t == (length - 1 if d == 0 else 0)
                flows = not last and not reset[t + 1 if d == 0 else t, n]
                incoming = numbers("grad_output").reshape(steps, batch, directions, units)[t, n, d]
                # the product stands for what the step that h flows into gives back
                loss = loss + (states[0] * (incoming + numbers("product")[d, n] * float(flows))).sum()
            found["h_n"][d, n] = states[0].detach()
            if cell == "lstm":
                found["c_n"][d, n] = states[1].detach()
            if not visited:
                continue
            gradients = torch.autograd.grad(loss, [tensor for _, x, h in visited for tensor in (x, h)])
            for (t, _, _), of_x, of_h in zip(visited, gradients[::2], gradients[1::2], strict=True):
                found["grad_gates"][d, t, n], found["recurrent of step"][d, t, n] = of_x, of_h
    found["output"] = output.reshape(steps * batch, directions * units)
    found["grad_gates"] = found["grad_gates"].reshape(directions, steps * batch, width)
    recurrent = found.pop("recurrent of step").reshape(directions, steps * batch, width)
    if cell == "gru":
        found["grad_recurrent"] = recurrent
    return {name: tensor.numpy() for name, tensor in found.items()}


def check_steps(case, arrays):
    """What a run left in the arrays."""
    for name, oracle in expected(case).items():
        np.testing.assert_allclose(arrays[name], oracle, rtol=1e-5, atol=1e-5, err_msg=name)


STEPS = [
    step_case(cell, **arguments)
    for cell in SAVED
    for arguments in (
        {},
        {"lengths": [4, 0, 2], "resets": True, "seed": 1},
        {"units": 37, "batch": 17, "directions": 1},
    )
]
