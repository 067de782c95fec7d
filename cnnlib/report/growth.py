"""Count connections and parameters of layers as the input grows. Such a run trains nothing and needs no JAX."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cnnlib.config.fields import to_dict
from cnnlib.config.resolve import ResolvedArm, resolve_arms
from cnnlib.config.schema import Growth
from cnnlib.report.style import STYLE, pyplot_for_files
from cnnlib.runs.folder import RunFolder, check
from cnnlib.runs.results import FORMAT
from cnnlib.spec.layers import Connectivity
from cnnlib.system import files, provenance
from cnnlib.system.tables import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure


LANDMARKS = (32, 1000)
"""Sides of the input at which the figure shows the full layer's count as text. Textbooks use these sides."""
COUNTS = {
    "connections": "connections, taps on padding counted",
    "connections_without_padding": "connections without taps on padding",
    "parameters": "parameters, biases counted",
}


def resolve_growth(growth: Growth) -> dict[int, tuple[ResolvedArm, ...]]:
    """Return the arms for each side of the input. If a layer does not fit, raise UserError and name the side."""
    shapes = {side: (side, side, growth.channels) for side in growth.sides}
    return {
        side: resolve_arms(growth.arms, {arm.name: (shape, growth.num_classes) for arm in growth.arms})
        for side, shape in shapes.items()
    }


@dataclass(frozen=True, kw_only=True)
class LayerGrowth:
    """The counts of one arm at one side of the input."""

    side: int
    arm: str
    connectivity: Connectivity
    model: str
    connections: int
    connections_without_padding: int
    parameters: int


@dataclass(frozen=True, kw_only=True)
class GrowthResults:
    """The content of `results.json` of an experiment that only counts."""

    format: int
    experiment: str
    config: Growth
    versions: dict[str, str]
    commit: str | None
    counts: tuple[LayerGrowth, ...]

    @property
    def arms(self) -> dict[str, list[LayerGrowth]]:
        """Return the counts of each arm, by name."""
        found: dict[str, list[LayerGrowth]] = {}
        for count in self.counts:
            found.setdefault(count.arm, []).append(count)
        return found


def run_growth(growth: Growth, name: str, out: Path) -> tuple[GrowthResults, str | None]:
    """Count layers, and write `config.json`, `results.json`, `table.md` and `growth.png` to `out`.

    Return the content of `results.json`, and the folder that now has the files of an earlier run (None if no run).
    Raises UserError, and writes nothing, if a layer does not fit its input.
    """
    results = counted(growth, name)
    config = {"experiment": name, **to_dict(growth)}
    check(out)
    with RunFolder(out) as held:
        earlier = held.make_room()
        files.write_whole(held / "config.json", lambda path: path.write_text(files.to_json(config)))
        files.write_whole(held / "table.md", lambda path: path.write_text(markdown(results), encoding="utf-8"))
        files.write_whole(held / "growth.png", lambda path: figure(results, path))
        # Write this file last: a run that has results counts as finished.
        files.write_whole(held / "results.json", lambda path: path.write_text(files.to_json(to_dict(results))))
    return results, earlier


def counted(growth: Growth, name: str) -> GrowthResults:
    """Count each arm at each side of the input. Raises UserError if a layer does not fit its input."""
    return GrowthResults(
        format=FORMAT,
        experiment=name,
        config=growth,
        versions=provenance.versions(),
        commit=provenance.commit(),
        counts=tuple(
            LayerGrowth(
                side=side,
                arm=arm.name,
                connectivity=arm.model.connectivity,
                model=str(arm.model),
                **{count: getattr(arm.count, count) for count in COUNTS},
            )
            for side, arms in resolve_growth(growth).items()
            for arm in arms
        ),
    )


def tables(results: GrowthResults) -> list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Return one (title, columns, rows) per kind of count. Each table has one row per side and one column per arm."""
    arms = results.arms
    found = []
    for count, title in COUNTS.items():
        numbers = {(entry.side, entry.arm): f"{getattr(entry, count):,}" for entry in results.counts}
        rows = [(str(side), *(numbers[side, arm] for arm in arms)) for side in results.config.sides]
        found.append((f"{title}, of one example of {channels_text(results)}", ("side", *arms), rows))
    return found


def channels_text(results: GrowthResults) -> str:
    """Return the number of channels in words, such as `3 channels`."""
    channels = results.config.channels
    return f"{channels} channel{'s'[: channels > 1]}"


def markdown(results: GrowthResults) -> str:
    """Return the tables in Markdown."""
    return "\n".join(f"{title}:\n\n{markdown_table(columns, rows)}" for title, columns, rows in tables(results))


def figure(results: GrowthResults, path: Path) -> None:
    """Write the figure that `draw` returns to a file."""
    pyplot, _ = pyplot_for_files()
    drawn = draw(results)
    drawn.savefig(path, dpi=150)
    pyplot.close(drawn)


def draw(results: GrowthResults) -> Figure:
    """Draw connections and parameters against the side of the input, one line per arm. Both axes are logarithmic."""
    from matplotlib import pyplot

    drawn, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4.4), sharey=True, layout="constrained")
    for axes, count in ((left, "connections"), (right, "parameters")):
        for index, (arm, entries) in enumerate(results.arms.items()):
            color, marker = STYLE[entries[0].connectivity]
            # Lines may lie on top of one another. Later lines are thinner and dashed, so that all are visible.
            axes.plot(
                [entry.side for entry in entries],
                [getattr(entry, count) for entry in entries],
                color=color,
                marker=marker,
                markersize=6 - index,
                linewidth=3.2 - index,
                linestyle=("-", "--", ":")[index % 3],
                label=arm,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("side of the input, in pixels")
        axes.set_title(count)
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_formatter("{x:.0f}")
    for entry in results.counts:
        if entry.connectivity == "full" and entry.side in LANDMARKS:
            left.annotate(
                f"{entry.connections:,}",
                (entry.side, entry.connections),
                xytext=(-9, 2),
                textcoords="offset points",
                ha="right",
                fontsize=8,
            )
    left.set_ylabel("number")
    left.legend()
    drawn.suptitle(f"{results.experiment}: square inputs of {channels_text(results)}, one example")
    return drawn
