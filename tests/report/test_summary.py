from __future__ import annotations

import io
from dataclasses import replace

import pytest
from made_results import arm, lane, results
from rich.console import Console
from scipy import stats

from cnnlib.report import summary

pytestmark = pytest.mark.once

RESULTS = results(
    arm("lenet_300_100", [lane(0, 0.935), lane(1, 0.945)], connectivity="full", parameters=266_610),
    arm("lenet5", [lane(0, 0.97), lane(1, None)]),
)


HALF = 0.5 * stats.t.ppf(0.975, 1)
"""Half of the interval of two accuracies of 93.5 and 94.5 %."""


def printed(results, width):
    console = Console(file=io.StringIO(), width=width)
    summary.print_results(results, console)
    return console.file.getvalue()


def test_the_table_fits_80_columns_and_cuts_nothing():
    text = printed(RESULTS, 80)
    assert all(len(line) <= 80 for line in text.splitlines())
    for part in ("lenet_300_100", "266,610", "94.00 [87.65, 100.35]", "97.00", "1 (1 diverged)", "1.23", "Student's t"):
        assert part in text


@pytest.mark.parametrize("width", [56, 60])
def test_a_narrow_terminal_gets_a_list_with_every_number(width):
    text = printed(RESULTS, width)
    assert all(len(line) <= width for line in text.splitlines())
    assert "parameters: 266,610" in text and "94.00 [87.65, 100.35]" in text


def test_markdown_has_the_same_cells():
    lines = summary.markdown(RESULTS).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == summary.rows(RESULTS)[0]
    assert len({line.count("|") for line in lines[:4]}) == 1


def several():
    """The first arm has two learning rates, and all lanes of the second one have diverged."""
    lanes = [lane(seed, accuracy, learning_rate=rate) for rate, *found in RATES for seed, accuracy in enumerate(found)]
    return replace(RESULTS, arms=(arm("lenet_300_100", lanes, connectivity="full"), RESULTS.arms[1]))


RATES = ((0.1, 0.89, 0.91), (0.2, None, None))


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
    assert segments.get_segments()[0][:, 1].tolist() == pytest.approx([94.0 - HALF, 94.0 + HALF])
    assert {text.get_text() for text in axes.get_legend().get_texts()} == {"full", "conv"}


def test_many_settings_stay_at_the_size_that_the_arm_has():
    rates = [round(0.001 * n, 3) for n in range(1, 31)]
    one = arm("a", [lane(seed, 0.9, learning_rate=rate) for rate in rates for seed in (0, 1)], parameters=266_610)
    bars = [bar.lines[0].get_xydata()[0][0] for bar in drawn(results(one)).containers]
    assert len(bars) == 30 and all(abs(x / 266_610 - 1) < 0.09 for x in bars)


def test_a_figure_of_nothing_but_diverged_lanes_is_still_a_figure():
    assert drawn(results(arm("a", [lane(0, None), lane(1, None)]))).get_legend() is None
