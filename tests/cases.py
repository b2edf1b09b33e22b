"""The table of cases that feeds the tests, and how a case is run: outputs and gradients, all by name."""

import itertools
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fastrnn

KINDS = {
    "rnn_tanh": ("RNN", {}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
    "lstm": ("LSTM", {}),
    "lstm_proj": ("LSTM", {}),
    "gru": ("GRU", {}),
}
LAYOUTS = ("time_major", "batch_first", "sorted", "unsorted", "unbatched")


@dataclass(frozen=True)
class Case:
    kind: str
    layout: str = "time_major"
    num_layers: int = 1
    bidirectional: bool = False
    bias: bool = True
    hx: bool = True
    dtype: torch.dtype = torch.float32
    steps: int = 3
    batch: int = 3
    inputs: int = 3
    hidden: int = 3

    @property
    def proj(self):
        return (self.hidden + 1) // 2 if self.kind == "lstm_proj" else 0

    @property
    def batch_first(self):
        return self.layout == "batch_first"

    @property
    def linear(self):
        """Everything positive, so that relu has no kink: 16-bit rounding would cross it, and no rule bounds that."""
        return self.kind == "rnn_relu" and torch.finfo(self.dtype).bits == 16

    @property
    def directions(self):
        return 2 if self.bidirectional else 1

    def __str__(self):
        flags = [self.layout, f"L{self.num_layers}", f"D{self.directions}"]
        flags += ["bias" if self.bias else "nobias", "hx" if self.hx else "nohx", str(self.dtype).split(".")[-1]]
        return f"{self.kind}-{'-'.join(flags)}-T{self.steps}N{self.batch}I{self.inputs}H{self.hidden}"


# Odd sizes, on both sides of every vector width and tile. Each case takes the next combination, so that all flags meet
# all sizes without the product of both.
_SIZES = [
    (3, 3, 17, 17),
    (17, 1, 3, 129),
    (1, 17, 129, 3),
    (3, 17, 1, 17),
    (17, 3, 3, 9),
    (3, 1, 17, 129),
    (1, 3, 3, 17),
]


def table(dtypes=(torch.float32, torch.float64), kinds=tuple(KINDS), layouts=LAYOUTS):
    """Every kind with every flag."""
    sizes = itertools.cycle(_SIZES)
    flags = itertools.product(kinds, layouts, (1, 2), (False, True), (True, False), (True, False), dtypes)
    return [Case(*flag, *next(sizes)) for flag in flags]


def small(**changes):
    """A case for each kind; the changes apply to all."""
    return [replace(Case(kind), **changes) for kind in KINDS]


def mostly_slow(cases):
    """Every third as it is, those of a table with every pair of flags among them; the others slow."""
    import pytest

    return [case if i % 3 == 0 else pytest.param(case, marks=pytest.mark.slow) for i, case in enumerate(cases)]


def parametrize(cases):
    import pytest

    return pytest.mark.parametrize("case", cases, ids=str)


def module(case, library=fastrnn, dtype=None):
    """The module of a case, with the same weights in every library."""
    name, options = KINDS[case.kind]
    if case.proj:
        options = {**options, "proj_size": case.proj}
    torch.manual_seed(case.steps + case.hidden)
    built = getattr(library, name)(
        case.inputs,
        case.hidden,
        case.num_layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.bidirectional,
        dtype=torch.float32,
        **options,
    )
    if case.linear:
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.abs_().mul_(case.hidden**-0.5)
    # rounded to the case's dtype first: the oracle computes with the same numbers
    return built.to(case.dtype).to(case.dtype if dtype is None else dtype)


def data(case, dtype=None, device="cpu"):
    """Input (Tensor or PackedSequence) and initial states, the same numbers in every dtype; all require grad."""
    generator = torch.Generator().manual_seed(7)

    def random(*shape):
        numbers = torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.float32)
        numbers = numbers.abs() if case.linear else numbers
        return numbers.to(case.dtype).to(device, case.dtype if dtype is None else dtype).requires_grad_()

    steps, batch, inputs = case.steps, case.batch, case.inputs
    rows = case.num_layers * case.directions
    if case.layout == "unbatched":
        input = random(steps, inputs)
        states = [random(rows, case.proj or case.hidden), random(rows, case.hidden)]
    else:
        input = random(batch, steps, inputs) if case.batch_first else random(steps, batch, inputs)
        states = [random(rows, batch, case.proj or case.hidden), random(rows, batch, case.hidden)]
    if case.layout in ("sorted", "unsorted"):
        input = packed(case, input)
    if not case.hx:
        return input, None
    return input, tuple(states) if case.kind.startswith("lstm") else states[0]


def row_lengths(case):
    """1 to T, not in order."""
    return torch.tensor([1 + (5 * n + case.steps - 1) % case.steps for n in range(case.batch)])


def packed(case, input):
    lengths = row_lengths(case)
    if case.layout == "sorted":
        lengths = lengths.sort(descending=True).values
    result = pack_padded_sequence(input.detach(), lengths, enforce_sorted=case.layout == "sorted")
    return result._replace(data=result.data.requires_grad_())


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def tensors(value):
    """The tensors of a nested result, PackedSequence data included, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, PackedSequence):
        return [value.data]
    return [] if value is None else [tensor for item in value for tensor in tensors(item)]


def outputs_and_gradients(module, input, hx, **options):
    """Every output, and the gradients of a random projection of all of them, by name."""
    results = tensors(module(input, hx, **options))
    sources = {"input": tensors(input)[0]}
    sources |= {f"h{index}": state for index, state in enumerate(tensors(hx))}
    sources |= dict(module.named_parameters())
    generator = torch.Generator().manual_seed(11)
    cotangents = [_exact(torch.randn(r.shape, generator=generator, dtype=torch.float64)).to(r) for r in results]
    gradients = torch.autograd.grad(results, list(sources.values()), cotangents, materialize_grads=True)
    named = {f"output[{index}]": result for index, result in enumerate(results)}
    return named | {f"grad of {name}": grad for name, grad in zip(sources, gradients, strict=True)}


def output_and_gradients_of_squares(module, input):
    """The output, and the gradients of the sum of its squares by input and parameters, as a list."""
    module.zero_grad()
    input = input.clone().requires_grad_()
    output, _ = module(input)
    output.square().sum().backward()
    return [output.detach(), input.grad, *[parameter.grad.clone() for parameter in module.parameters()]]


def _exact(numbers):
    """Rounded to what every dtype can hold, so that an error is never that of the numbers that came in."""
    return numbers.to(torch.bfloat16).to(torch.float16)
