"""The report's plots as Vega-Lite specifications, made with altair; and the JavaScript that draws them, embedded."""

from __future__ import annotations

import importlib.util
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from cnnlib.config import SETTING_FIELDS
from cnnlib.errors import UserError
from cnnlib.report import setting_text
from cnnlib.stats import mean_interval
from cnnlib.style import STYLE
from cnnlib.tracking import is_number

COSTS = {
    "parameters": "parameters",
    "macs": "multiply-adds an example",
    "train_seconds_per_lane": "seconds of training",
}
"""What accuracy is plotted against: fields of an arm's results, in words."""
MOST_EPOCHS = 40
"""That are drawn of a learning curve, evenly chosen and always the last."""
MOST_NAMES = 12
"""Of points that have their names beside them."""
SHAPES = {"full": "circle", "local": "square", "conv": "triangle-up"}
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D31", "#7F7F7F")


def check_extra() -> None:
    """Raises UserError where the libraries that draw are not installed."""
    for library in ("altair", "vl_convert"):
        if importlib.util.find_spec(library) is None:
            raise UserError("report needs cnnlib's extra `report`: pip install -e '.[report]'")


def library() -> str:
    """The JavaScript of Vega, Vega-Lite and vega-embed in one piece, for a page that loads nothing."""
    import vl_convert

    return str(vl_convert.javascript_bundle())  # type: ignore[call-arg]  # its stub forgets the default


def accuracy_chart(results: dict[str, Any], cost: str) -> dict[str, Any]:
    """Test accuracy in percent against a cost on a log axis: every lane a point, each mean with its interval."""
    import altair

    lanes, means = [], []
    for arm in results["arms"]:
        for index, setting in enumerate(arm["settings"]):
            common = {
                "arm": arm["name"] + setting_text(results, arm, index),
                "connectivity": arm["connectivity"],
                "cost": float(arm[cost]),
            }
            names = [name for name in SETTING_FIELDS if name in setting]
            lanes += [
                {**common, "seed": lane["seed"], "accuracy": 100 * lane["test_accuracy"]}
                for lane in arm["lanes"]
                if lane["status"] == "ok" and all(lane[name] == setting[name] for name in names)
            ]
            accuracy = setting["test_accuracy"]
            if accuracy["mean"] is not None:
                low, high = (accuracy["mean"] if end is None else end for end in accuracy["ci95"])
                numbers = {"accuracy": accuracy["mean"], "low": low, "high": high}
                means.append({**common, "n": accuracy["n"], **{name: 100 * value for name, value in numbers.items()}})
    kinds = [kind for kind in STYLE if any(mean["connectivity"] == kind for mean in means)]
    color = altair.Color(
        "connectivity:N", scale=altair.Scale(domain=kinds, range=[STYLE[kind][0] for kind in kinds]), title=None
    )
    shape = altair.Shape(
        "connectivity:N", scale=altair.Scale(domain=kinds, range=[SHAPES[kind] for kind in kinds]), title=None
    )
    x = altair.X("cost:Q", scale=altair.Scale(type="log", nice=False, padding=40), title=COSTS[cost])
    x = x.axis(altair.Axis(format=".2~s" if cost != "train_seconds_per_lane" else "~g", tickCount=6))
    y = altair.Y("accuracy:Q", scale=altair.Scale(zero=False, padding=10), title="test accuracy, %")
    told = [altair.Tooltip("arm:N"), altair.Tooltip("cost:Q", title=COSTS[cost], format=",.6~g")]
    percent = [altair.Tooltip("accuracy:Q", title="test accuracy, %", format=".2f")]
    ends = [altair.Tooltip(f"{end}:Q", title=f"interval, {end}", format=".2f") for end in ("low", "high")]
    points = altair.Chart(altair.InlineData(lanes)).mark_point(filled=True, opacity=0.4, size=45)
    points = points.encode(x=x, y=y, color=color, shape=shape, tooltip=[*told, altair.Tooltip("seed:N"), *percent])
    base = altair.Chart(altair.InlineData(means))
    mean_told = [*told, altair.Tooltip("n:Q"), *percent, *ends]
    bars = base.mark_rule(strokeWidth=2).encode(x=x, y="low:Q", y2="high:Q", color=color, tooltip=mean_told)
    marks = base.mark_point(filled=True, size=110, opacity=1).encode(
        x=x, y=y, color=color, shape=shape, tooltip=mean_told
    )
    layers = [points, bars, marks]
    if len(means) <= MOST_NAMES:
        layers.append(base.mark_text(align="left", dx=9, dy=-1).encode(x=x, y=y, text="arm:N"))
    chart = altair.layer(*layers).properties(width="container", height=300)
    return dict(chart.to_dict())


def curves_chart(lines: Sequence[dict[str, Any]], arms: Sequence[str], metric: str) -> dict[str, Any] | None:
    """A metric in percent against the epoch: a line with a band an arm, and every seed a fainter line.

    None where no line has the metric.
    """
    import altair

    values: dict[tuple[str, int], list[tuple[int, int, float]]] = defaultdict(list)
    for line in lines:
        if line.get("arm") in arms and isinstance(line.get("epoch"), int) and is_number(line.get(metric)):
            lane, seed = (line.get(name) for name in ("lane", "seed"))
            if isinstance(lane, int) and isinstance(seed, int):
                values[str(line["arm"]), line["epoch"]].append((lane, seed, 100 * float(line[metric])))
    if not values:
        return None
    shown = {}
    for arm in arms:
        epochs = sorted(epoch for name, epoch in values if name == arm)
        chosen = np.unique(np.linspace(0, len(epochs) - 1, min(len(epochs), MOST_EPOCHS)).round().astype(int))
        shown[arm] = [epochs[index] for index in chosen]
    seeds, means = [], []
    for arm, epochs in shown.items():
        for epoch in epochs:
            found = values[arm, epoch]
            mean, low, high, n = mean_interval([value for *_, value in found])
            band = {"low": mean if low is None else low, "high": mean if high is None else high}
            means.append({"arm": arm, "epoch": epoch, "value": mean, "n": n, **band})
            seeds += [{"arm": arm, "epoch": epoch, "lane": a, "seed": b, "value": round(c, 3)} for a, b, c in found]
    names = list(shown)
    colors = [PALETTE[index % len(PALETTE)] for index in range(len(names))]
    color = altair.Color("arm:N", scale=altair.Scale(domain=names, range=colors), title=None)
    title = metric.replace("_", " ") + ", %"
    x = altair.X("epoch:Q", title="epoch", axis=altair.Axis(tickMinStep=1))
    y = altair.Y("value:Q", scale=altair.Scale(zero=False, nice=False, padding=8), title=title)
    told = [altair.Tooltip("arm:N"), altair.Tooltip("epoch:Q")]
    number = altair.Tooltip("value:Q", title=title, format=".2f")
    base = altair.Chart(altair.InlineData(means)).encode(x=x, color=color)
    every = altair.Chart(altair.InlineData(seeds)).mark_line(opacity=0.25, strokeWidth=1)
    every = every.encode(x=x, y=y, color=color, detail="lane:N", tooltip=[*told, altair.Tooltip("seed:N"), number])
    band = base.mark_area(opacity=0.2).encode(y="low:Q", y2="high:Q")
    ends = [altair.Tooltip(f"{end}:Q", title=f"interval, {end}", format=".2f") for end in ("low", "high")]
    line = base.mark_line(strokeWidth=2.5, point=True).encode(
        y=y, tooltip=[*told, altair.Tooltip("n:Q"), number, *ends]
    )
    chart = altair.layer(band, every, line).properties(width="container", height=300)
    return dict(chart.to_dict())
