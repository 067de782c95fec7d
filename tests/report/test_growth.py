from __future__ import annotations

import json

import pytest
from matplotlib import pyplot

from cnnlib.config.fields import to_dict
from cnnlib.config.overrides import override
from cnnlib.config.schema import EXPERIMENTS, Arm, Growth
from cnnlib.demos import DEMOS
from cnnlib.errors import UserError
from cnnlib.report import charts, growth
from cnnlib.spec.notation import parse_model

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("growth")
    results, earlier = growth.run_growth(EXPERIMENTS.get("explosion"), "explosion", out)
    assert earlier is None
    return results, out


def test_the_explosion_has_the_figures_of_the_argument(run):
    results, _ = run
    found = {(entry.side, entry.arm): entry for entry in results.counts}
    assert {side for side, _ in found} >= {8, 32, 1000, 4096} and len(found) == 3 * len(results.config.sides)
    assert found[32, "full"].connections == 9_437_184 and found[32, "full"].parameters == 9_440_256
    assert found[1000, "full"].connections == 9 * 10**12
    assert found[32, "conv"].connections == 82_944 and found[32, "conv"].connections_without_padding == 79_524
    for side in results.config.sides:
        full, local, conv = (found[side, arm] for arm in ("full", "local", "conv"))
        assert full.connections == (3 * side**2) ** 2
        assert local.connections == conv.connections == 81 * side**2
        # Three taps an axis, less one at each border.
        assert conv.connections_without_padding == 9 * (3 * side - 2) ** 2
        assert local.parameters == 84 * side**2 and conv.parameters == 84


def test_in_grey_a_thousand_squared_is_ten_to_the_twelve():
    grey = Growth((Arm("full", parse_model("full:1@3")),), sides=(1000,), channels=1)
    (entry,) = growth.counted(grey, "grey").counts
    assert entry.connections == 10**12


def test_a_run_writes_what_it_says(run):
    results, out = run
    assert {path.name for path in out.iterdir()} - {".lock", ".writer.lock"} == {
        "config.json",
        "results.json",
        "table.md",
        "growth.png",
    }
    assert json.loads((out / "results.json").read_text()) == to_dict(results)
    assert "| 32 | 9,437,184 | 82,944 | 82,944 |" in (out / "table.md").read_text()
    assert (out / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_a_second_run_keeps_the_first(tmp_path):
    tiny = Growth((Arm("a", parse_model("dense:classes")),), sides=(4,))
    growth.run_growth(tiny, "tiny", tmp_path)
    _, earlier = growth.run_growth(tiny, "tiny", tmp_path)
    assert earlier and "earlier" in earlier
    (kept,) = (tmp_path / "earlier").rglob("growth.png")
    assert kept.exists()


def test_the_figure_plots_the_counts(run, tmp_path, monkeypatch):
    results, _ = run
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    growth.figure(results, tmp_path / "growth.png")
    monkeypatch.undo()
    left, right = drawn[0].axes
    for axes, count in ((left, "connections"), (right, "parameters")):
        assert axes.get_title() == count and axes.get_xscale() == axes.get_yscale() == "log"
        for line in axes.lines:
            entries = results.arms[line.get_label()]
            assert list(line.get_xdata()) == [entry.side for entry in entries]
            assert list(line.get_ydata()) == [getattr(entry, count) for entry in entries]
        assert len(axes.lines) == 3
    assert {text.get_text() for text in left.texts} == {"9,437,184", "9,000,000,000,000"}
    assert {text.get_text() for text in left.get_legend().get_texts()} == {"full", "local", "conv"}
    pyplot.close(drawn[0])


@pytest.mark.parametrize(
    ("assignment", "part"),
    [
        ("sides=", "sides is empty"),
        ("sides=8,4", "sides must grow, not 8,4"),
        ("sides=0,4", "sides must lie in 1"),
        ("channels=0", "channels must lie in 1"),
        ("num_classes=0", "num_classes must lie in 1"),
        ("epochs=3", "no field 'epochs'; there are: arms, sides, channels, num_classes"),
        ("arms.full.start=conv", "arm full: start has no meaning where nothing is trained"),
        ("arms=nobody", "no arm 'nobody'; there are: full, local, conv"),
    ],
)
def test_a_wrong_field_is_a_user_error(assignment, part):
    with pytest.raises(UserError) as error:
        override(EXPERIMENTS.get("explosion"), [assignment])
    assert part in str(error.value)


def test_a_layer_that_does_not_fit_a_side_is_named_with_its_arm():
    small = Growth((Arm("a", parse_model("conv:1@5:valid")),), sides=(4, 8))
    with pytest.raises(UserError, match=r"arm a: layer 0 .* on 4x4x3"):
        growth.resolve_growth(small)


def test_the_explorer_counts_exactly_and_filters_by_its_menus():
    sides, windows, channels, features = (32, 1000), (1, 3), (1, 3), (1, 3)
    found = charts.growth_points(sides, windows, channels, features)
    assert len(found) == 3 * 2**4
    (full,) = (
        point["connections"]
        for point in found
        if (point["side"], point["window"], point["channels"], point["features"]) == (32, 3, 3, 3)
        and point["connectivity"] == "full"
    )
    assert full == 9_437_184
    for point in found:
        side, window, inputs, outputs = (point[name] for name in ("side", "window", "channels", "features"))
        nodes = {"full": (side**2 * inputs) * (side**2 * outputs)}
        assert point["connections"] == nodes.get(point["connectivity"], side**2 * window**2 * inputs * outputs)
    chart = charts.growth_chart(found)
    menus = {menu["name"]: (menu["value"], menu["bind"]["options"]) for menu in chart["params"]}
    assert menus == {"window": (3, [1, 3]), "channels": (3, [1, 3]), "features": (3, [1, 3])}
    told = json.dumps(chart["transform"])
    assert all(f"datum.{name} == {name}" in told for name in menus)
    assert [panel["layer"][0]["encoding"]["y"]["title"] for panel in chart["hconcat"]] == ["connections", "parameters"]


def test_the_demo_draws_the_experiment(run):
    results, _ = run
    figure = DEMOS.get("explosion").draw()
    for axes, count in zip(figure.axes, ("connections", "parameters"), strict=True):
        assert axes.get_xscale() == axes.get_yscale() == "log" and axes.get_xlabel() and axes.get_title() == count
        drawn = {line.get_label(): dict(zip(*line.get_data(), strict=True)) for line in axes.lines}
        for entry in results.counts:
            assert drawn[entry.arm][entry.side] == getattr(entry, count)
    pyplot.close(figure)
