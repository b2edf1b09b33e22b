"""Time series: a GRU forecasts CO2 by the month and sunspots by the year, against seasonal and linear baselines."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.figure import Figure
from statsmodels.datasets import co2, sunspots
from torch import Tensor, nn

from examples import _common as common

TEST = 0.25  # of the series, its end


@dataclass(frozen=True)
class Series:
    """A series and how it is looked at."""

    name: str
    values: np.ndarray  # [time]
    first_year: float
    per_year: int
    season: int  # steps after which it repeats itself, about; as far as the forecasts go
    window: int  # steps that a forecast may look back

    @property
    def border(self) -> int:
        """The first step of the test part."""
        return int(len(self.values) * (1 - TEST))


def load() -> list[Series]:
    """Mauna Loa CO2, weeks averaged to months and a few gaps filled in between; and the yearly sunspot numbers."""
    monthly = co2.load_pandas().data["co2"].resample("MS").mean().interpolate()
    yearly = sunspots.load_pandas().data
    return [
        Series("CO2, ppm", monthly.to_numpy(), monthly.index[0].year + (monthly.index[0].month - 1) / 12, 12, 12, 36),
        Series("sunspots", yearly["SUNACTIVITY"].to_numpy(), float(yearly["YEAR"].iloc[0]), 1, 11, 33),
    ]


def origins(series: Series, test: bool) -> np.ndarray:
    """The steps from which forecasts are made, the last that is known at each.

    A training forecast must lie before the border with all its targets; a test forecast has none before it, while
    its window may reach back over it.
    """
    if test:
        return np.arange(series.border - 1, len(series.values) - series.season)
    return np.arange(series.window + series.season - 1, series.border - series.season)


def targets(series: Series, at: np.ndarray) -> np.ndarray:
    """What follows each origin, ``[origins, season]``."""
    return series.values[at[:, None] + np.arange(1, series.season + 1)]


def seasonal_naive(series: Series, at: np.ndarray) -> np.ndarray:
    """The values one season before each target, ``[origins, season]``; all of them are known at the origin."""
    return series.values[at[:, None] + np.arange(1, series.season + 1) - series.season]


def seasonal_drift(series: Series, at: np.ndarray) -> np.ndarray:
    """The seasonal naive forecast plus the last season's change: fair to a series with a trend."""
    return seasonal_naive(series, at) + (series.values[at] - series.values[at - series.season])[:, None]


def features(series: Series, at: np.ndarray) -> np.ndarray:
    """What a learned forecast sees, ``[origins, window, 2]``: the values before the origin, and their seasonal change.

    Values are relative to the origin's, so that a trend leads to no numbers that training has not seen; all are
    divided by `scale`.
    """
    steps = at[:, None] - np.arange(series.window)[::-1]
    values, changes = series.values[steps], series.values[steps] - series.values[steps - series.season]
    return np.stack([values - values[:, -1:], changes], -1) / scale(series)


def scale(series: Series) -> float:
    """The standard deviation of the change over a season, of the training part."""
    known = series.values[: series.border]
    return float((known[series.season :] - known[: -series.season]).std())


def linear(series: Series, at: np.ndarray, penalty: float) -> np.ndarray:
    """Ridge regression on the GRU's own input: what can be had without a recurrent network, ``[origins, season]``."""
    known = origins(series, test=False)

    def flat(steps: np.ndarray) -> np.ndarray:
        inputs = features(series, steps).reshape(len(steps), -1)
        return np.concatenate([inputs, np.ones((len(steps), 1))], 1)

    x, y = flat(known), (targets(series, known) - seasonal_naive(series, known)) / scale(series)
    weights = np.linalg.solve(x.T @ x + penalty * np.eye(x.shape[1]), x.T @ y)
    return seasonal_naive(series, at) + flat(at) @ weights * scale(series)


class Forecaster(nn.Module):
    """A GRU's last output, then a linear layer: a correction of the seasonal naive forecast for each horizon."""

    def __init__(self, hidden: int, horizons: int, layers: ModuleType) -> None:
        super().__init__()
        self.gru = layers.GRU(2, hidden, batch_first=True)
        self.linear = nn.Linear(hidden, horizons)

    def forward(self, input: Tensor) -> Tensor:
        """``[N, window, 2]`` to ``[N, horizons]``, in units of `scale`."""
        return self.linear(nn.functional.dropout(self.gru(input)[0][:, -1], 0.1, self.training))


def train(model: Forecaster, input: Tensor, wanted: Tensor, updates: int, description: str) -> list[float]:
    """Train on windows ``[N, window, 2]`` and their corrections ``[N, horizons]``; the loss of every update."""
    batches = common.shuffled_batches(len(input), 64)

    def loss_of(_: int) -> Tensor:
        rows = next(batches)
        return nn.functional.huber_loss(model(input[rows]), wanted[rows])

    return common.fit(model, loss_of, updates, weight_decay=0.1, description=description)


def gru(series: Series, at: np.ndarray, layers: ModuleType, members: int, updates: int) -> np.ndarray:
    """The mean forecast of several GRUs that differ in their first weights and batches, ``[origins, season]``."""
    known = origins(series, test=False)
    input, later = (torch.as_tensor(features(series, steps), dtype=torch.float32) for steps in (known, at))
    wanted = torch.as_tensor((targets(series, known) - seasonal_naive(series, known)) / scale(series)).float()
    total = torch.zeros(len(at), series.season)
    for member in range(members):
        model = Forecaster(24, series.season, layers)
        train(model, input, wanted, updates, f"{series.name}, {member + 1} of {members}")
        with torch.inference_mode():
            total += model(later)
    return seasonal_naive(series, at) + total.double().numpy() / members * scale(series)


def choose(series: Series, candidates: Sequence[int], forecast: Callable[[Series, np.ndarray, int], np.ndarray]) -> int:
    """The setting that forecasts the end of the training part best from its beginning; the test part is not looked at.

    Parameters
    ----------
    forecast : callable
        From a series, the origins and a candidate to ``[origins, season]``.
    """
    inner = replace(series, values=series.values[: series.border])  # the training part has a border of its own
    at = origins(inner, test=True)
    found = [errors(forecast(inner, at, candidate), targets(inner, at)).mean() for candidate in candidates]
    return candidates[int(np.argmin(found))]


def errors(forecast: np.ndarray, true: np.ndarray) -> np.ndarray:
    """The mean absolute error at each horizon, ``[season]``."""
    return np.abs(forecast - true).mean(0)


def draw(all_series: Sequence[Series], forecasts: Sequence[dict[str, np.ndarray]]) -> Figure:
    """Of each series its test part with forecasts of the GRU from a few origins, and the error by horizon."""
    figure, panels = plt.subplots(len(all_series), 2, figsize=(12, 3.2 * len(all_series)), width_ratios=[1.7, 1])
    for (left, right), series, by_name in zip(panels, all_series, forecasts, strict=True):
        at = origins(series, test=True)
        years = series.first_year + np.arange(len(series.values)) / series.per_year
        shown = slice(series.border - series.window, None)
        left.plot(years[shown], series.values[shown], color="#222222", linewidth=1, label="measured")
        left.axvline(years[series.border], color="#888888", linestyle=":", label="end of the training part")
        for number in range(0, len(at), series.season):
            after = years[at[number] + 1 : at[number] + 1 + series.season]
            left.plot(after, by_name["GRU"][number], color="#2a78b5", label=None if number else "GRU, a season ahead")
        for name, forecast in by_name.items():
            style = {"color": "#2a78b5", "linewidth": 2} if name == "GRU" else {"linestyle": "--"}
            right.plot(range(1, series.season + 1), errors(forecast, targets(series, at)), label=name, **style)
        left.set(title=series.name, xlabel="year")
        right.set(title="mean absolute error", xlabel="steps ahead", ylim=(0, None))
        left.legend(fontsize=8)
        right.legend(fontsize=8)
        right.grid(color="#dddddd")
    return figure


def run(options: argparse.Namespace) -> dict[str, dict[str, np.ndarray]]:
    """The error by horizon of every forecast, by series."""
    layers = common.layers(options.backend)
    members, updates = (1, [150]) if options.quick else (5, [100, 200, 400, 800])
    all_series, all_forecasts, results = load(), [], {}
    for series in all_series:
        at = origins(series, test=True)
        forecasts = {
            "seasonal naive": seasonal_naive(series, at),
            "seasonal naive + drift": seasonal_drift(series, at),
            "ridge regression": linear(series, at, choose(series, [1, 10, 100], linear)),
        }
        with common.Timer() as timer:
            chosen = choose(series, updates, lambda inner, known, count: gru(inner, known, layers, 1, count))
            forecasts["GRU"] = gru(series, at, layers, members, chosen)
        results[series.name] = {name: errors(made, targets(series, at)) for name, made in forecasts.items()}
        all_forecasts.append(forecasts)
        horizons = sorted({1, series.season // 4, series.season // 2, series.season})
        common.show(
            f"{series.name}: mean absolute error of {len(at)} forecasts from "
            f"{series.first_year + at[0] / series.per_year:.0f} on; {members} GRUs, {chosen} updates each, "
            f"{timer.cpu:.0f} s of CPU time",
            ["forecast", *(f"{horizon} ahead" for horizon in horizons), "all"],
            [
                [name, *(float(error[horizon - 1]) for horizon in horizons), float(error.mean())]
                for name, error in results[series.name].items()
            ],
        )
    common.save(draw(all_series, all_forecasts), "forecast", options)
    return results


def main(given: Sequence[str] | None = None) -> dict[str, dict[str, np.ndarray]]:
    return run(common.parse(common.arguments(__doc__), given))


if __name__ == "__main__":
    main()
