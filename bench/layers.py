"""One row of the layer table: a case, a cell and a mode, run by torch.nn, by fastrnn and by further peers.

All of them get the same weights and the same random data, and must agree before they are timed.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from bench import limits, timing
from bench.cases import PEERS, Case

CLASSES = {"rnn": "RNN", "lstm": "LSTM", "gru": "GRU"}
# tf32: float32 of which the products may be as inexact as TF32's, by torch's switch for it.
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}

# Largest difference allowed between two implementations, relative to the largest value of the tensor. It is there to
# refuse to time wrong work (one wrong gate is off by 0.1 and more); the accuracy itself is the tests' subject. A
# bfloat16 has 8 bits, and its rounding (0.4%) enters anew at every step, at places that each implementation chooses.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.1}

State = Tensor | tuple[Tensor, Tensor]


class DisagreementError(AssertionError):
    """Two implementations of the same work gave different results."""


def load_fastrnn() -> ModuleType:
    """The package under test, imported late so that ``--help`` and the table of cases need no build."""
    return importlib.import_module("fastrnn")


@dataclass(frozen=True)
class Problem:
    """The data of one row of the table, the same for every implementation."""

    case: Case
    cell: str
    input: Tensor  # [T, N, I]
    hx: State | None  # h0 (LSTM: and c0), each [L, N, H]; None: zeros
    reset: Tensor  # bool [T, N]
    grad_output: Tensor  # [T, N, H]
    reference: nn.RNNBase  # the torch.nn module, whose weights all share

    @property
    def dtype(self) -> torch.dtype:
        return self.input.dtype

    def pack(self, padded: Tensor) -> Tensor:
        """The valid rows ``[rows, ...]`` of a tensor ``[T, N, ...]``, in the order of a PackedSequence."""
        return pack_padded_sequence(padded, self.case.lengths()).data


def make_problem(
    case: Case, cell: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> Problem:
    """Random data and a randomly initialised module for one case; equal seeds give equal problems."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        reference = getattr(nn, CLASSES[cell])(case.input_size, case.hidden_size, case.layers).to(device, dtype)
    hx: State | None = None
    if case.stateful:
        # Within (-1, 1), as a hidden state is.
        state = (case.layers, case.batch, case.hidden_size)
        hx = random(*state).tanh()
        if cell == "lstm":
            hx = (hx, random(*state))
    return Problem(
        case=case,
        cell=cell,
        input=random(case.steps, case.batch, case.input_size),
        hx=hx,
        reset=case.reset(generator).to(device),
        grad_output=random(case.steps, case.batch, case.hidden_size),
        reference=reference,
    )


@dataclass
class Variant:
    """One implementation of a problem's work, in inference.

    Parameters
    ----------
    name : str
        As it stands in the results.
    forward : callable
        Runs the layer on data bound beforehand and returns its output in the implementation's own layout.
    rows : callable
        Brings that layout, which is also that of the input's gradient, to the one in which results are compared.
    expected : str
        The variant whose results this one must reproduce.
    """

    name: str
    forward: Callable[[], Any]
    rows: Callable[[Any], Tensor]
    expected: str = "torch"


@dataclass(kw_only=True)
class TrainableVariant(Variant):
    """A variant that can be trained: ``leaf`` is the input, ``grad_output`` what backward starts from."""

    module: nn.Module
    leaf: Tensor
    grad_output: Tensor

    def train(self) -> None:
        """Forward and backward; the gradients are made anew, as an optimizer's ``zero_grad`` leaves them."""
        self.module.zero_grad(set_to_none=True)
        self.leaf.grad = None
        self.forward().backward(self.grad_output)

    def gradients(self) -> dict[str, Tensor]:
        """Gradients of the input and of the weights after one training call."""
        self.train()
        named = {"input": self.leaf, **dict(self.module.named_parameters())}
        gradients = {name: tensor.grad for name, tensor in named.items() if tensor.grad is not None}
        return gradients | {"input": self.rows(gradients["input"])}


def _plain(name: str, module: nn.RNNBase, problem: Problem, **kwargs: Tensor) -> TrainableVariant:
    """A padded batch ``[T, N, I]``; ``kwargs`` are fastrnn's own (lengths, reset)."""
    leaf, hx = problem.input.clone().requires_grad_(), problem.hx
    grad_output = problem.grad_output
    if problem.case.ragged:  # nothing beyond a row's length has a gradient
        packed = pack_padded_sequence(grad_output, problem.case.lengths())
        grad_output = pad_packed_sequence(packed)[0]
    return TrainableVariant(
        name, lambda: module(leaf, hx, **kwargs)[0], problem.pack, module=module, leaf=leaf, grad_output=grad_output
    )


def _whole(name: str, module: nn.RNNBase, problem: Problem) -> TrainableVariant:
    """The same shape without lengths or resets: what they cost is the difference. Compared with nothing but itself."""
    variant = _plain(name, module, problem)
    variant.grad_output, variant.expected = problem.grad_output, name
    return variant


def _packed(name: str, module: nn.RNNBase, problem: Problem) -> TrainableVariant:
    """A PackedSequence, packed beforehand: packing is the data loader's work."""
    packed = pack_padded_sequence(problem.input, problem.case.lengths())
    leaf, hx = packed.data.clone().requires_grad_(), problem.hx
    return TrainableVariant(
        name,
        lambda: module(PackedSequence(leaf, packed.batch_sizes), hx)[0].data,
        lambda rows: rows,
        module=module,
        leaf=leaf,
        grad_output=problem.pack(problem.grad_output),
    )


def _stepwise(module: nn.RNNBase, problem: Problem) -> TrainableVariant:
    """Resets as they are written with torch.nn: a call for every step, its state masked."""
    leaf = problem.input.clone().requires_grad_()
    keep = problem.reset.logical_not().to(problem.dtype)[:, None, :, None]  # [T, 1, N, 1]

    def forward() -> Tensor:
        state: Any = problem.hx
        outputs = []
        for step in range(problem.case.steps):
            mask = keep[step]
            state = (state[0] * mask, state[1] * mask) if isinstance(state, tuple) else state * mask
            output, state = module(leaf[step : step + 1], state)
            outputs.append(output)
        return torch.cat(outputs)

    return TrainableVariant(
        "torch-stepwise", forward, problem.pack, module=module, leaf=leaf, grad_output=problem.grad_output
    )


def variants(problem: Problem) -> list[TrainableVariant]:
    """The implementations in torch.nn and fastrnn of a problem's work, torch's own first."""
    reference, case = problem.reference, problem.case
    module = getattr(load_fastrnn(), CLASSES[problem.cell])(case.input_size, case.hidden_size, case.layers)
    module = module.to(problem.input.device, problem.dtype)
    module.load_state_dict(reference.state_dict())
    if case.ragged:
        with_lengths = _plain("fastrnn-lengths", module, problem, lengths=case.lengths())
        padded = _whole("fastrnn-padded", module, problem)
        return [_packed("torch", reference, problem), _packed("fastrnn", module, problem), with_lengths, padded]
    if case.resets:
        # torch.nn has no resets: its time is that of the plain call, which does less and gives another result. What
        # gives the same result is a loop over the steps, timed beside it.
        ours, loop = _plain("fastrnn", module, problem, reset=problem.reset), _stepwise(reference, problem)
        ours.expected = loop.expected = loop.name
        return [_plain("torch", reference, problem), ours, loop, _whole("fastrnn-plain", module, problem)]
    return [_plain("torch", reference, problem), _plain("fastrnn", module, problem)]


def _session(module: nn.Module, problem: Problem) -> Variant:
    """The whole sequence by a session, whose weights are packed beforehand, as those of a compiled peer are."""
    session = load_fastrnn().StreamingSession(module, problem.case.batch)

    def forward() -> Tensor:
        session.state = problem.hx
        return session.chunk(problem.input)

    return Variant("fastrnn-session", forward, problem.pack)


def check(problem: Problem, runs: Sequence[Variant], mode: str) -> None:
    """Run every variant once and compare outputs, and in training the gradients of input and weights.

    Raises
    ------
    DisagreementError
        If one differs from what it should reproduce by more than `TOLERANCES`; the message names it.
    """
    results = {}
    for run in runs:
        if mode == "training":
            assert isinstance(run, TrainableVariant), f"{run.name} is for inference only"
            results[run.name] = run.gradients()
        else:
            with torch.inference_mode():
                results[run.name] = {"output": run.rows(run.forward())}
    for run in runs:
        for name, expected in results[run.expected].items():
            if (actual := results[run.name].get(name)) is None:
                raise DisagreementError(f"{problem.cell} {problem.case.name} {mode}: {run.name} gives no {name}")
            scale = expected.abs().max().item()
            error = (actual.float() - expected.float()).abs().max().item() / (scale or 1.0)
            if not error <= TOLERANCES[problem.dtype]:  # so written, NaN is an error
                raise DisagreementError(
                    f"{problem.cell} {problem.case.name} {mode}: {name} of {run.name} differs from {run.expected} by "
                    f"{error:.2g} of the largest value (allowed: {TOLERANCES[problem.dtype]:.2g})"
                )


@dataclass
class Row:
    """What was measured for one case, cell and mode. A ratio above 1 means that fastrnn is faster."""

    cell: str
    case: str
    shape: str
    mode: str
    dtype: str
    threads: int
    rounds: int
    seconds: dict[str, dict[str, float]]  # by variant: "min" and "median", per call
    ratio: float  # torch over fastrnn, minima
    median_ratio: float  # torch over fastrnn, median of the rounds
    peer_ratios: dict[str, float] = field(default_factory=dict)  # other variants over fastrnn, minima
    limit: float | None = None  # part of what the machine can do: its least time for the work over fastrnn's, minima
    bound: str = ""  # what sets that least time: multiply-add or load
    flops_per_second: float | None = None  # of this machine in this row
    bytes_per_second: float | None = None  #

    @property
    def regression(self) -> bool:
        """Whether fastrnn is the slower one."""
        return self.ratio < 1

    @property
    def best_ratio(self) -> float:
        """Time of the fastest other library (torch.nn, further runtimes) over that of fastrnn."""
        return min([self.ratio, *(ratio for name, ratio in self.peer_ratios.items() if name in PEERS)])


@contextmanager
def fp32_precision(precision: str) -> Iterator[None]:
    """``torch.backends.mkldnn.rnn.fp32_precision`` for a while."""
    switch = torch.backends.mkldnn.rnn  # type: ignore[attr-defined]
    before, switch.fp32_precision = switch.fp32_precision, precision
    try:
        yield
    finally:
        switch.fp32_precision = before


def _in_full(run: Callable[[], Any]) -> Callable[[], Any]:
    """The same in float32's own precision."""

    def exact() -> Any:
        with fp32_precision("ieee"):
            return run()

    return exact


def measure(
    case: Case,
    cell: str,
    mode: str,
    *,
    dtype: str = "float32",
    thread_count: int | None = None,
    peers: Sequence[str] = (),
    session: bool = False,
    budget: float = 1.0,
    limit: float = math.inf,
    device: torch.device | str = "cpu",
    against_limits: bool = False,
) -> Row:
    """Check and time one row; see `bench.timing.compare` for ``budget`` and ``limit`` (seconds).

    ``peers`` are further runtimes, timed in inference with float32 only, as they offer no more. ``session`` adds a
    session of fastrnn, in inference on one thread and without lengths or resets, which is what it can do.
    ``against_limits`` measures in the same rounds what the machine can do in float32. A row in tf32, or in float32 with
    ``FASTRNN_CPU_FLOAT32=bf16x3``, has fastrnn's own float32 beside it.
    """
    with timing.threads(thread_count) as count, fp32_precision(dtype) if dtype == "tf32" else nullcontext():
        problem = make_problem(case, cell, DTYPES[dtype], device)
        runs: list[Any] = [*variants(problem)]
        if peers and mode == "inference" and dtype != "bfloat16":
            from bench.peers import peer_variant

            runs += [peer_variant(peer, problem, count) for peer in peers]
        if session and mode == "inference" and count == 1 and not (case.ragged or case.resets):
            runs.append(_session(runs[1].module, problem))
        check(problem, runs, mode)
        # The mode is entered once, outside the samples: entering it costs as much as a tenth of the shortest call.
        with torch.inference_mode(mode == "inference"):
            functions = {run.name: run.forward if mode == "inference" else run.train for run in runs}
            if dtype == "tf32" or (dtype == "float32" and load_fastrnn().build_info().get("cpu_float32") == "bf16x3"):
                functions["fastrnn-float32"] = _in_full(functions["fastrnn"])
            others = [name for name in functions if name not in ("torch", "fastrnn")]
            machine = None
            if against_limits and dtype == "float32":
                capability = load_fastrnn().build_info()["cpu_capability"]
                machine = limits.Limits(case, cell, mode, count, capability)
                functions |= machine.functions
            comparison = timing.compare(functions, budget=budget, limit=limit, clock=timing.clock_for(device))
    row = Row(
        cell=cell,
        case=case.name,
        shape=case.shape,
        mode=mode,
        dtype=dtype,
        threads=count,
        rounds=comparison.rounds,
        seconds={name: {"min": t.minimum, "median": t.median} for name, t in comparison.timings.items()},
        ratio=comparison.ratio_of_minima("torch", "fastrnn"),
        median_ratio=comparison.median_ratio("torch", "fastrnn"),
        peer_ratios={name: comparison.ratio_of_minima(name, "fastrnn") for name in others},
    )
    if machine:
        least, row.bound = machine.seconds(comparison.timings)
        row.limit = least / comparison.timings["fastrnn"].minimum
        row.flops_per_second, row.bytes_per_second = machine.rates(comparison.timings)
    return row
