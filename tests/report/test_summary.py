from __future__ import annotations

import copy
import io

import pytest
from rich.console import Console

from cnnlib.report import summary

pytestmark = pytest.mark.once

NUMBERS = {"momentum": 0.9, "weight_decay": 0.0, "label_smoothing": 0.0, "l1": 0.0, "l1_threshold": 0.0}


def lane(seed, accuracy, rate=0.1):
    numbers = {**NUMBERS, "learning_rate": rate}
    return {"seed": seed, **numbers, "test_accuracy": accuracy, "status": "ok" if accuracy is not None else "diverged"}


def setting(mean, low, high, n, rate=0.1, diverged=0):
    numbers = {**NUMBERS, "learning_rate": rate}
    return {**numbers, "test_accuracy": {"mean": mean, "ci95": [low, high], "n": n}, "diverged": diverged}


def arm(name, connectivity, parameters, settings, lanes, chosen=0):
    counts = {"parameters": parameters, "connections": 416_520, "macs": 416_520, "train_seconds_per_lane": 1.234}
    return {
        "name": name,
        "connectivity": connectivity,
        "match": None,
        **counts,
        "settings": settings,
        "lanes": lanes,
        "chosen_setting": chosen,
    }


RESULTS = {
    "experiment": "fc_vs_conv",
    "data": {"name": "mnist5k", "train": 3500, "validation": 500, "test": 1000},
    "config": {
        "epochs": 12,
        "compute_dtype": "float32",
        "optim": {"name": "sgd", "learning_rate": [0.1], "momentum": [0.9]},
    },
    "device": {"count": 1, "kind": "cpu", "kernels": "native"},
    "versions": {"jax": "0.10.2"},
    "wall_seconds": 37.4,
    "arms": [
        arm("lenet_300_100", "full", 266_610, [setting(0.94, 0.93, 0.95, 2)], [lane(0, 0.935), lane(1, 0.945)]),
        arm("lenet5", "conv", 61_706, [setting(0.97, None, None, 1, diverged=1)], [lane(0, 0.97), lane(1, None)]),
    ],
}


def printed(results, width):
    console = Console(file=io.StringIO(), width=width)
    summary.print_results(results, console)
    return console.file.getvalue()


def test_the_table_fits_80_columns_and_cuts_nothing():
    text = printed(RESULTS, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("lenet_300_100", "266,610", "94.00 [93.00, 95.00]", "97.00", "1 (1 diverged)", "1.23", "Student's t"):
        assert part in text


@pytest.mark.parametrize("width", [56, 60])
def test_a_narrow_terminal_gets_a_list_with_every_number(width):
    text = printed(RESULTS, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "parameters: 266,610" in text and "94.00 [93.00, 95.00]" in text


def test_markdown_has_the_same_cells():
    lines = summary.markdown(RESULTS).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == list(summary.rows(RESULTS)[0])
    assert len({line.count("|") for line in lines[:4]}) == 1


def several():
    results = copy.deepcopy(RESULTS)
    results["config"]["optim"]["learning_rate"] = [0.1, 0.2]
    first = results["arms"][0]
    first["settings"] = [setting(0.90, 0.89, 0.91, 2, 0.1), setting(None, None, None, 0, 0.2, diverged=2)]
    return results


def test_settings_have_a_row_each_and_the_chosen_one_is_marked():
    names = [row[0] for row in summary.rows(several())]
    assert names == ["lenet_300_100 learning_rate=0.1 (chosen)", "lenet_300_100 learning_rate=0.2", "lenet5"]
    assert summary.rows(several())[1][5] == "-"


def drawn(results):
    """The axes of the figure, which can be written."""
    figure = summary.accuracy_figure(results)
    written = io.BytesIO()
    figure.savefig(written)
    assert len(written.getvalue()) > 10_000
    return figure.axes[0]


def test_the_figure_shows_every_lane_and_the_means_with_their_intervals():
    axes = drawn(RESULTS)
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "parameters" and "test accuracy" in axes.get_ylabel()
    dots = [
        tuple(offset) for points in axes.collections if points.get_offsets().size for offset in points.get_offsets()
    ]
    heights = sorted(float(y) for _, y in dots)
    assert {93.5, 94.5, 97.0} <= set(heights)
    bar = axes.containers[0]
    assert bar.lines[0].get_xydata().tolist() == [[266_610, 94.0]]
    (segments,) = bar.lines[2]
    assert segments.get_segments()[0][:, 1].tolist() == pytest.approx([93.0, 95.0])
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"full", "conv"}


def test_many_settings_stay_at_the_size_that_the_arm_has():
    results = several()
    rates = [round(0.001 * n, 3) for n in range(1, 31)]
    results["arms"] = results["arms"][:1]
    results["arms"][0]["settings"] = [setting(0.90, 0.89, 0.91, 2, rate) for rate in rates]
    bars = [bar.lines[0].get_xydata()[0][0] for bar in drawn(results).containers]
    assert len(bars) == 30 and all(abs(x / 266_610 - 1) < 0.09 for x in bars)


def test_a_figure_of_nothing_but_diverged_lanes_is_still_a_figure():
    results = copy.deepcopy(RESULTS)
    for each in results["arms"]:
        each["settings"] = [setting(None, None, None, 0, diverged=2)]
    assert drawn(results).get_legend() is None
