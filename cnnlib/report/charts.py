"""The plots of the HTML report: Vega-Lite specifications made with altair, and the JavaScript that draws them."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, TypedDict

import numpy as np

from cnnlib.errors import UserError
from cnnlib.report.columns import setting_text, settings
from cnnlib.report.labels import Label, raised
from cnnlib.report.style import STYLE
from cnnlib.runs.metrics import MetricsLine
from cnnlib.runs.results import RunResults
from cnnlib.spec.counts import count
from cnnlib.spec.layers import READINGS, Connectivity, Conv
from cnnlib.spec.model import Model
from cnnlib.stats.intervals import mean_interval

COSTS = {
    "parameters": "parameters",
    "macs": "multiply-adds per example",
    "train_seconds_per_lane": "seconds of training",
}
"""Axis titles of the costs that accuracy is plotted against; the keys are attributes of `ArmResult`."""
PLACES = 5
"""Number of columns for the points of an arm's lanes. The columns are to the left of the mean of these lanes."""
MOST_NAMES = 12
"""The chart writes names beside the means if it has at most this many means, and no names if it has more."""
SHAPES = {"full": "circle", "local": "square", "conv": "triangle-up"}
DASHES = ([1, 0], [6, 3], [2, 2])
"""Dash patterns that distinguish lines of the same colour."""
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")


def check_extra() -> None:
    """Raise UserError if the plotting libraries are not installed."""
    for library in ("altair", "jinja2", "vl_convert"):
        if importlib.util.find_spec(library) is None:
            raise UserError("report needs cnnlib's extra `report`: pip install -e '.[report]'")


def library() -> str:
    """Return the JavaScript of Vega, Vega-Lite and vega-embed as one text, so that the page loads nothing."""
    import vl_convert

    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # the stub of this function lacks the default


class CostPoint(TypedDict):
    """The mean accuracy of a setting in percent, with the ends of its interval, against a cost."""

    arm: str
    connectivity: Connectivity
    cost: float
    n: int
    accuracy: float
    low: float
    high: float
    raised: float
    """By how many pixels the name is raised."""


def accuracy_chart(results: RunResults, cost: str) -> dict[str, object]:
    """Plot test accuracy (%) against `cost`, a key of `COSTS` (log axis). Lanes are points; means have intervals."""
    import altair

    lanes: list[dict[str, object]] = []
    means: list[CostPoint] = []
    for arm, setting in settings(results):
        name, kind, spent = arm.name + setting_text(arm, setting), arm.connectivity, float(getattr(arm, cost))
        common = {"arm": name, "connectivity": kind, "cost": spent}
        lanes += [
            {**common, "seed": lane.seed, "accuracy": 100 * lane.test_accuracy, "place": place % PLACES}
            for place, lane in enumerate(arm.lanes_of(setting))
            if lane.status == "ok" and lane.test_accuracy is not None
        ]
        if setting.test_accuracy.mean is not None:
            mean, low, high = setting.test_accuracy.percent()
            numbers = CostPoint(
                arm=name,
                connectivity=kind,
                cost=spent,
                n=setting.test_accuracy.n,
                accuracy=mean,
                low=low,
                high=high,
                raised=0.0,
            )
            means.append(numbers)
    for point, rise in zip(means, raised(labels_of(means)), strict=True):
        point["raised"] = rise
    kinds = [kind for kind in STYLE if any(point["connectivity"] == kind for point in means)]
    color = altair.Color(
        "connectivity:N", scale=altair.Scale(domain=kinds, range=[STYLE[kind][0] for kind in kinds]), title=None
    )
    shape = altair.Shape(
        "connectivity:N", scale=altair.Scale(domain=kinds, range=[SHAPES[kind] for kind in kinds]), title=None
    )
    x = altair.X("cost:Q", scale=altair.Scale(type="log", nice=False, padding=40), title=COSTS[cost])
    form = "~g" if cost == "train_seconds_per_lane" else ".2~s"
    x = x.axis(altair.Axis(format=form, tickCount=6, labelOverlap="greedy", labelSeparation=8))
    y = altair.Y("accuracy:Q", scale=altair.Scale(zero=False, padding=10), title="test accuracy, %")
    told = [altair.Tooltip("arm:N"), altair.Tooltip("cost:Q", title=COSTS[cost], format=",.6~g")]
    percent = [altair.Tooltip("accuracy:Q", title="test accuracy, %", format=".2f")]
    ends = [altair.Tooltip(f"{end}:Q", title=f"interval, {end}", format=".2f") for end in ("low", "high")]
    points = altair.Chart(altair.InlineData(lanes))
    beside = altair.ExprRef(expr="-8 - 4 * datum.place")  # pixels, so that points do not cover the mean or each other
    points = points.mark_point(filled=True, opacity=0.6, size=40, xOffset=beside)
    points = points.encode(x=x, y=y, color=color, shape=shape, tooltip=[*told, altair.Tooltip("seed:N"), *percent])
    base = altair.Chart(altair.InlineData(means))
    mean_told = [*told, altair.Tooltip("n:Q"), *percent, *ends]
    bars = base.mark_rule(strokeWidth=2).encode(x=x, y="low:Q", y2="high:Q", color=color, tooltip=mean_told)
    marks = base.mark_point(filled=True, size=110, opacity=1).encode(
        x=x, y=y, color=color, shape=shape, tooltip=mean_told
    )
    layers = [points, bars, marks]
    if len(means) <= MOST_NAMES:
        above = altair.ExprRef(expr="-1 - datum.raised")
        layers.append(base.mark_text(align="left", dx=9, dy=above).encode(x=x, y=y, text="arm:N"))
    chart = altair.layer(*layers).properties(width="container", height=300)
    return dict(chart.to_dict())


def labels_of(means: Sequence[CostPoint], side: int = 250) -> list[Label]:
    """Return the box of each mean's name, in pixels. `side` is about the width and the height of the plot."""
    x = np.log([mean["cost"] for mean in means])
    y = np.array([mean["accuracy"] for mean in means])
    spans = [max(float(np.ptp(each)), 1e-9) if len(means) else 1.0 for each in (x, y)]
    return [
        Label(side * (left - x.min()) / spans[0], side * (bottom - y.min()) / spans[1], 7 * len(mean["arm"]))
        for left, bottom, mean in zip(x, y, means, strict=True)
    ]


class LanePoint(TypedDict):
    """A point of the curve of a lane."""

    arm: str
    epoch: int
    lane: int
    seed: int
    value: float


class MeanPoint(TypedDict):
    """A point of the mean curve of an arm, with the ends of its interval."""

    arm: str
    epoch: int
    n: int
    value: float
    low: float
    high: float


class Curves(NamedTuple):
    """Points of learning curves in percent, with the names of their arms: curves of lanes, and means over lanes."""

    lanes: list[LanePoint]
    means: list[MeanPoint]


def curve_points(lines: Sequence[MetricsLine], arms: Sequence[str], metric: str, most_epochs: int) -> Curves:
    """Return the learning curves of `metric`, such as `validation_accuracy`, for `arms`.

    Keep at most `most_epochs` evenly spaced epochs per arm, the last epoch included. The result may be empty.
    """
    values: dict[tuple[str, int], list[tuple[MetricsLine, float]]] = defaultdict(list)
    for line in lines:
        if line.arm in arms and (value := getattr(line, metric)) is not None:
            values[line.arm, line.epoch].append((line, 100 * value))
    found = Curves([], [])
    for arm in arms:
        epochs = sorted(epoch for name, epoch in values if name == arm)
        chosen = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), most_epochs)).round().astype(int))
        for epoch in (epochs[index] for index in chosen):
            at = values[arm, epoch]
            mean, low, high, n = mean_interval([value for _, value in at])
            value, low, high = (round(mean or 0.0 if end is None else end, 3) for end in (mean, low, high))
            found.means.append({"arm": arm, "epoch": epoch, "n": n, "value": value, "low": low, "high": high})
            found.lanes.extend(
                {"arm": arm, "epoch": epoch, "lane": line.lane, "seed": line.seed, "value": round(value, 3)}
                for line, value in at
            )
    return found


def curves_chart(found: Curves, words: str) -> dict[str, object]:
    """Plot a metric against the epoch. Each arm has a line and a band, and each lane in `found` has a faint line."""
    import altair

    names = list(dict.fromkeys(mean["arm"] for mean in found.means))
    colors = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
    dashes = [DASHES[index // len(PALETTE) % len(DASHES)] for index in range(len(names))]
    legend = altair.Legend(symbolType="stroke", symbolSize=300)
    color = altair.Color("arm:N", scale=altair.Scale(domain=names, range=colors), title=None, legend=legend)
    dash = altair.StrokeDash("arm:N", scale=altair.Scale(domain=names, range=dashes), title=None, legend=legend)
    title = f"{words}, %"
    x = altair.X("epoch:Q", title="epoch", axis=altair.Axis(tickMinStep=1))
    y = altair.Y("value:Q", scale=altair.Scale(zero=False, nice=False, padding=8), title=title)
    told = [altair.Tooltip("arm:N"), altair.Tooltip("epoch:Q")]
    number = altair.Tooltip("value:Q", title=title, format=".2f")
    chosen = altair.selection_point(fields=["arm"], bind="legend")

    def seen(share: float) -> Any:
        return altair.condition(chosen, altair.value(share), altair.value(share / 8))

    base = altair.Chart(altair.InlineData(found.means)).encode(x=x, color=color)
    band = base.mark_area().encode(y=altair.Y("low:Q", title=title), y2="high:Q", opacity=seen(0.2))
    ends = [altair.Tooltip(f"{end}:Q", title=f"interval, {end}", format=".2f") for end in ("low", "high")]
    mean_told = [*told, altair.Tooltip("n:Q"), number, *ends]
    line = base.mark_line(strokeWidth=2.5).encode(y=y, strokeDash=dash, opacity=seen(1.0), tooltip=mean_told)
    dots = base.mark_point(filled=True, size=28).encode(y=y, opacity=seen(1.0), tooltip=mean_told)
    layers = [band, line, dots]
    if found.lanes:
        every = altair.Chart(altair.InlineData(found.lanes)).mark_line(strokeWidth=1)
        every = every.encode(x=x, y=y, color=color, detail="lane:N", opacity=seen(0.3))
        layers.insert(1, every.encode(tooltip=[*told, altair.Tooltip("seed:N"), number]))
    chart = altair.layer(*layers).add_params(chosen).properties(width="container", height=300)
    return dict(chart.to_dict())


class GrowthPoint(TypedDict):
    """The counts of one zero-padded layer."""

    side: int
    window: int
    channels: int
    features: int
    connectivity: Connectivity
    connections: int
    parameters: int


def growth_points(
    sides: Sequence[int], windows: Sequence[int], channels: Sequence[int], features: Sequence[int]
) -> list[GrowthPoint]:
    """Return exact counts of one zero-padded layer, with one entry per combination of sizes and connectivity.

    Raises UserError if a window does not fit the smallest side.
    """
    return [
        {
            "side": side,
            "window": window,
            "channels": inputs,
            "features": outputs,
            "connectivity": reading,
            "connections": counted.connections,
            "parameters": counted.parameters,
        }
        for side in sides
        for window in windows
        for inputs in channels
        for outputs in features
        for reading in reversed(READINGS)
        for counted in [count(Model((Conv(outputs, window),)).with_connectivity(reading), (side, side, inputs))]
    ]


def growth_chart(points: Sequence[GrowthPoint]) -> dict[str, object]:
    """Plot the counts of `growth_points` against the image side. Menus select window, channels and features."""
    import altair

    menus, chosen = [], []
    for field, title, values in (
        ("window", "side of the window", {point["window"] for point in points}),
        ("channels", "channels in", {point["channels"] for point in points}),
        ("features", "features out", {point["features"] for point in points}),
    ):
        options = sorted(values)
        menu = altair.binding_select(options=options, name=f"{title}: ")
        menus.append(altair.param(name=field, bind=menu, value=3 if 3 in options else options[0]))
        chosen.append(f"datum.{field} == {field}")

    def by_reading(channel: Any, values: Sequence[Any]) -> Any:
        scale = altair.Scale(domain=list(STYLE), range=values)
        return channel("connectivity:N", scale=scale, title=None, legend=altair.Legend(symbolSize=200))

    color = by_reading(altair.Color, [color for color, _ in STYLE.values()])
    shape = by_reading(altair.Shape, list(SHAPES.values()))
    # Local layers and convolutions have equally many connections, so one line covers the other. The upper line is
    # dashed, so that both are visible.
    dash = by_reading(altair.StrokeDash, [[1, 0], [1, 0], [6, 6]])
    panels = []
    for number in ("connections", "parameters"):
        base = altair.Chart().encode(
            x=altair.X("side:Q", scale=altair.Scale(type="log", base=2), title="side of the input, in pixels"),
            y=altair.Y(f"{number}:Q", scale=altair.Scale(type="log"), title=number, axis=altair.Axis(format="~s")),
            color=color,
            tooltip=["connectivity:N", "side:Q", altair.Tooltip(f"{number}:Q", format=",")],
        )
        marks = base.mark_point(filled=True, size=50, opacity=1).encode(shape=shape)
        lines = base.mark_line(strokeWidth=3).encode(strokeDash=dash)
        panels.append(altair.layer(lines, marks).properties(width=320, height=300))
    chart = altair.hconcat(*panels, data=altair.InlineData(list(points))).resolve_scale(y="shared")
    chart = chart.add_params(*menus).transform_filter(" && ".join(chosen))
    return dict(chart.to_dict())
