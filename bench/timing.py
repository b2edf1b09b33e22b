"""The paired timer: functions that do the same work are timed in turn, A B A B, in one process.

Clock speed and neighbours move the absolute times of a shared machine by a factor of two within minutes. Two samples
taken one after the other see nearly the same machine, so it is their ratio that is reported.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch

Function = Callable[[], object]

# A sample is as many calls as make it this long, so that the timer's own cost (below 1 us) stays under 1% of it.
MIN_SAMPLE_SECONDS = 200e-6
# Up to this duration a call is repeated once, unmeasured, before each sample: the function timed before has left its
# own data in the caches and its own threads spinning, and a short call would pay for both. A long call hardly can.
LEAD_IN_SECONDS = 5e-3
# Warm-up calls of each function; a long function gets fewer.
WARM_UP_CALLS = 4
WARM_UP_SECONDS = 0.3
MIN_ROUNDS = 5
FEWEST_ROUNDS = 3
MAX_ROUNDS = 1000


class Clock(Protocol):
    """Times repeated calls, and tells the time that the budget is counted in."""

    def now(self) -> float:
        """Seconds since some fixed moment."""

    def sample(self, function: Function, calls: int) -> float:
        """Seconds that ``calls`` calls of ``function`` take, all work that they start included."""


class CpuClock:
    """The monotonic clock of the host: right for functions that have done their work when they return."""

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, function: Function, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - start


class CudaClock:
    """Events on the current stream of a CUDA device: the device's own time, from first to last kernel of the calls."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, function: Function, calls: int) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            start.record()
            for _ in range(calls):
                function()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) * 1e-3


def clock_for(device: torch.device | str) -> Clock:
    """The clock for functions whose tensors are on ``device``."""
    device = torch.device(device)
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass
class Timing:
    """Seconds per call of one function, one sample a round."""

    seconds: list[float] = field(default_factory=list)

    @property
    def minimum(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Comparison:
    """Timings of functions that were sampled in turn: round k of all of them is of the same moment."""

    timings: dict[str, Timing]

    @property
    def rounds(self) -> int:
        return min(len(timing.seconds) for timing in self.timings.values())

    def ratio_of_minima(self, peer: str, ours: str) -> float:
        """Fastest sample of ``peer`` over fastest sample of ``ours``: above 1, ours is faster. Least disturbed."""
        return self.timings[peer].minimum / self.timings[ours].minimum

    def median_ratio(self, peer: str, ours: str) -> float:
        """Median over the rounds of ``peer`` over ``ours``: what a caller sees on this machine as it is."""
        pairs = zip(self.timings[peer].seconds, self.timings[ours].seconds, strict=True)
        return statistics.median(a / b for a, b in pairs)


def compare(
    functions: Mapping[str, Function],
    *,
    budget: float,
    clock: Clock | None = None,
    limit: float = math.inf,
    min_rounds: int = MIN_ROUNDS,
    max_rounds: int = MAX_ROUNDS,
    min_sample: float = MIN_SAMPLE_SECONDS,
) -> Comparison:
    """Time every function, one sample of each a round, in the given order.

    Parameters
    ----------
    functions : mapping of str to callable
        What to time. The functions must do their work on other data than zeros: zeros are faster than real data
        (denormals aside, a multiplier that toggles no bits draws less power and lets the clock rise).
    budget : float
        Seconds, warm-up included. At least ``min_rounds`` rounds are made even if they take longer.
    clock : Clock
        The default is the host's clock; see `clock_for`.
    limit : float
        Seconds after which `FEWEST_ROUNDS` are enough, and after twice as many a single one: what a very long call
        may take of a run that must end in time.
    min_rounds, max_rounds : int
        Bounds on the number of rounds.
    min_sample : float
        Seconds that a sample takes at least: short calls are repeated within it.
    """
    clock = clock or CpuClock()
    begin = clock.now()
    with _collector_off():
        plans = {name: _plan(function, clock, min_sample) for name, function in functions.items()}
        comparison = Comparison({name: Timing() for name in functions})
        round_seconds = 0.0
        while comparison.rounds < max_rounds:
            start = clock.now()
            end = start + round_seconds - begin  # of the coming round, if it is like the last one
            if comparison.rounds >= min_rounds and end > budget:
                break
            if comparison.rounds >= FEWEST_ROUNDS and end > limit:
                break
            if comparison.rounds >= 1 and end > 2 * limit:
                break
            for name, function in functions.items():
                calls, lead_in = plans[name]
                if lead_in:
                    function()
                comparison.timings[name].seconds.append(clock.sample(function, calls) / calls)
            round_seconds = clock.now() - start
    return comparison


def _plan(function: Function, clock: Clock, min_sample: float) -> tuple[int, bool]:
    """Warm the function up and find the calls of a sample and whether a lead-in call goes before it.

    The quickest of some calls decides: one that hits a disturbance, or lazy initialisation, would make a short function
    look long, and its samples too short.
    """
    trials = [clock.sample(function, 1)]
    while len(trials) < WARM_UP_CALLS and sum(trials) < WARM_UP_SECONDS:
        trials.append(clock.sample(function, 1))
    call = seconds = min(trials)
    calls = 1
    while seconds < min_sample:
        # What is missing and a tenth more, but never above 10 times at once: short samples are uncertain.
        calls = max(calls + 1, min(10 * calls, math.ceil(1.1 * calls * min_sample / max(seconds, 1e-9))))
        seconds = clock.sample(function, calls)
    return calls, call < LEAD_IN_SECONDS


@contextmanager
def _collector_off() -> Iterator[None]:
    """Keep the garbage collector out of the samples, as `timeit` does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def threads(count: int | None) -> Iterator[int]:
    """Set torch's intra-op threads to ``count`` (None or 0: as torch was started) for a while; gives the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)
