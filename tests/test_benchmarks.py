"""That the benchmarks run and say what they measured; how fast anything is, no test asserts."""

from __future__ import annotations

import json
import math
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks import agreement, aot, gpu, lanes, operations, step
from benchmarks.nets import NETS, Rows, model_of, stock_operations
from benchmarks.timing import Contestant, Table, interleaved, summary
from cnnlib.errors import UserError
from cnnlib.nn.network import network
from cnnlib.system.jaxlib_defects import numbers_of


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_step_has_a_row_a_contestant(tmp_path):
    path = tmp_path / "step.json"
    arguments = ["step", "--net", "lenet_300_100", "--batch-size", "4", "--rounds", "2", "--json", str(path)]
    assert command.main(arguments) == 0
    (table,) = json.loads(path.read_text())["tables"]
    names = [row["ms per lane-step"] for row in table["rows"]]
    assert names[:3] == ["cnnlib, 8 lanes", "cnnlib, 1 lane", "stock Flax, one step per call"] and len(names) >= 5
    for row in table["rows"]:
        assert 0 < row["low_ms"] <= row["median_ms"] <= row["high_ms"] and row["times_ours"] > 0
    assert table["rows"][0]["times_ours"] == 1


def test_the_operations_of_a_step_are_three_times_its_products():
    # LeNet-300-100 by hand: 784*300 + 300*100 + 100*10 multiply-adds; no input gradient for the first layer.
    first, rest = 784 * 300, 300 * 100 + 100 * 10
    assert step.step_operations(step.model_of("lenet_300_100"), 7) == 2 * 7 * (2 * first + 3 * rest)


@pytest.mark.slow
def test_lanes_leaves_out_what_would_take_too_long(monkeypatch):
    slow = "stock Flax, vmap"
    monkeypatch.setattr(lanes, "timed", lambda entry: 99.0 if entry.name == slow and entry.units > 1 else 0.0)
    table = lanes.measure("lenet5", batch_size=2, rounds=1, counts=(1, 2, 4))
    rows = {row["ms per lane-step"]: [row[f"{n} lanes"] for n in (1, 2, 4)] for row in table.rows}
    assert {"cnnlib, by default", "cnnlib, all at a time", slow} <= set(rows)
    assert rows.pop(slow)[1:] == [None, None]
    measured = {name: [value is not None for value in values] for name, values in rows.items()}
    assert measured.pop("cnnlib, all at a time") == [False, True, True]  # with one lane that is the default
    assert all(map(all, measured.values()))


@pytest.mark.slow
def test_ops_measures_every_part_of_every_implementation(monkeypatch):
    monkeypatch.setattr(operations, "CONVOLUTIONS", {"small": (6, 2, 3, 3, "SAME")})
    monkeypatch.setattr(operations, "LOCALS", {"local": (6, 2, 3, 3, 2, 1)})
    monkeypatch.setattr(operations, "POOLS", {"pool": (6, 2)})
    conv, local, pool = operations.measure(batch_size=8, rounds=1)
    implementations = len(operations.implementations()) + 1
    assert len(conv.rows) == len(local.rows) == 3 * implementations and len(pool.rows) == 2 * implementations
    rows = conv.rows + local.rows + pool.rows
    assert all(value > 0 for row in rows for value in row.values() if not isinstance(value, str))
    (table,) = operations.measure(batch_size=8, rounds=1, only="loc")
    assert table.title.startswith("local,")


@pytest.mark.slow
def test_memory_counts_a_population_and_a_lane(capsys):
    assert command.main(["memory", "--net", "lenet_300_100", "--batch-size", "4"]) == 0
    rows = capsys.readouterr().out.splitlines()[-5:]
    alone, many = (float(row.split()[-2].replace(",", "")) for row in rows[:2])
    assert many > alone > 2 * 4 * 266_610 / 2**20  # parameters and momenta, 4 bytes each


def test_contestants_take_turns():
    order = []
    entries = [Contestant(name, lambda name=name: order.append(name)) for name in "ab"]
    seconds = interleaved(entries, rounds=2)
    assert order == ["a", "b"] * 3 and [len(values) for values in seconds.values()] == [2, 2]


def test_ratios_are_taken_round_by_round():
    # Twice as long in every round; the ratio of the medians would be 2 as well, that of the extremes would not.
    found = summary([2.0, 8.0, 4.0], ours=[1.0, 4.0, 2.0])
    assert found == {"median_ms": 4000.0, "low_ms": 2000.0, "high_ms": 8000.0, "times_ours": 2.0}
    assert math.isclose(summary([2.0, 2.0, 9.0], ours=[1.0, 4.0, 3.0])["times_ours"], 2.0)


def test_a_table_reads_in_a_terminal_and_in_a_readme():
    table = Table("title", [{"ms per call": "ours", "median_ms": 1234.5, "share": 0.5}, {"ms per call": "x"} | NOTHING])
    assert table.text(markdown=False).splitlines() == [
        "title",
        "",
        "ms per call  median ms  share",
        "ours          1,234.50  50.0%",
        "x                    -      -",
    ]
    assert table.text(markdown=True).splitlines()[2:] == [
        "| ms per call | median ms | share |",
        "| --- | ---: | ---: |",
        "| ours | 1,234.50 | 50.0% |",
        "| x | - | - |",
    ]


NOTHING = {"median_ms": None, "share": None}


def test_numbers_below_one_are_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["step", "--rounds", "0"])
    assert ended.value.code == 2 and "must be at least 1" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(numbers_of(version("jaxlib")) < (0, 9, 2), reason="this jaxlib has no such fusions")
@pytest.mark.parametrize("name", ["neyshabur", "mnist1d"])
def test_library_fusions_change_no_loss_by_more_than_rounding(name):
    """The arm with the most multiply-adds.

    `python -m benchmarks agreement` looks at all arms of all experiments.
    """
    on_digits = ["data.name=mnist5k", "data.validation=500"] if name == "fashion" else []
    largest = lambda arms: [max(arms, key=lambda arm: arm.count.macs)]  # noqa: E731
    (table,) = agreement.measure([2], steps=1, only=name, overrides=on_digits, chosen=largest)
    (row,) = table.rows
    assert float(row["difference"]) < 1e-3


def test_rows_of_compilers_are_kept_and_made_once(tmp_path, monkeypatch):
    made = []

    def row(net, lanes, dtype, hardware, form):
        made.append((net, form))
        if form == aot.FORMS[1]:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room\nmore")
        return {"cycles_per_lane_step": 30 if form == "ours" else 40}

    monkeypatch.setattr(aot, "row", row)
    path = tmp_path / "rows.jsonl"
    for _ in range(2):
        (table,) = aot.measure(["lenet5"], [8], ["float32"], ["tpu:v5e"], path)
        assert table.rows == [
            {"net": "lenet5", "lanes": "8", **dict(zip(aot.FORMS, (30, None, 40), strict=True)),
             "ours to the better stock form": 0.75}
        ]  # fmt: skip
    assert made == [("lenet5", form) for form in aot.FORMS]
    failures = [one.get("failed") for one in Rows(path, {"jax": jax.__version__}).known.values()]
    name = jax.errors.JaxRuntimeError.__name__  # XlaRuntimeError before JAX 0.8
    assert failures == [None, f"{name}: RESOURCE_EXHAUSTED: no room", None]
    monkeypatch.setattr(jax, "__version__", "99.0")  # another compiler: all of them again
    list(aot.measure(["lenet5"], [8], ["float32"], ["tpu:v5e"], path))
    assert made == 2 * [("lenet5", form) for form in aot.FORMS]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_what_is_measured_on_a_gpu_runs_on_a_cpu_and_goes_on_where_it_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "TIMED", ("mnist1d_cnn",))
    monkeypatch.setattr(gpu, "PRECISIONS", ("highest",))
    forms = ("ours, all lanes at once", "stock, one at a time")
    monkeypatch.setattr(gpu, "FORMS", {name: gpu.FORMS[name] for name in forms})
    path, sizes = tmp_path / "rows.jsonl", gpu.TINY._replace(lanes=(2,))
    *_, rows = gpu.measure(0, path, sizes)  # no time at all: no row
    wanted = [key for key, _ in gpu.plan(sizes)]
    assert rows.rows == [{"file": str(path), "made": 0, "left for the same command again": len(wanted)}]
    titles = [table.title.partition(",")[0] for table in gpu.measure(math.inf, path, sizes)]
    assert titles[:2] == ["ceilings", "microseconds per lane-step"] and titles[-1] == "rows"
    known = Rows(path, {"jax": jax.__version__}).known
    assert list(known) == wanted
    for key in [key for key in wanted if key[0] == "lanes"]:
        assert known[key]["microseconds_per_lane_step"] > 0
    for key in [key for key in wanted if key[0] == "losses"]:
        # On a CPU the same lanes in two forms. Losses are near ln 10 at first, and fall.
        losses = known[key]
        assert losses["difference_after_1"] < 1e-5 and losses["difference_after_3"] < 1e-4
        assert 0 < losses["loss_after_3"] < losses["loss_after_1"] < 10
    assert known["run", "fc_vs_conv"]["accuracy"].keys() == {"mlp_75_33"}
    assert known["run", "fc_vs_conv"]["stored_accuracy"]["mlp_75_33"] > 0.9
    assert known["resumed",]["is_the_same_bit_for_bit"]
    before = path.read_bytes()
    list(gpu.measure(math.inf, path, sizes))
    assert path.read_bytes() == before


def test_what_is_measured_on_a_gpu_has_no_form_twice():
    forms = {}
    for key, _ in gpu.plan(gpu.Sizes()):
        if key[0] == "lanes" and key[3] == "float32":
            forms.setdefault(key[1:3], set()).add(key[4])
    assert forms["lenet5", 64] == set(gpu.FORMS)
    assert forms["lenet5", 8] == set(gpu.FORMS) - {"ours, 8 at a time"}
    one = {"ours, all lanes at once", "ours, one at a time in blocks", "stock, all lanes at once"}
    assert forms["lenet5", 1] == one  # blocks are another form also of one lane
    assert forms["lenet_300_100", 1] == {"ours, all lanes at once"}  # without windows there is one form of operations


def test_a_row_that_fails_does_not_keep_others_from_being_made(tmp_path):
    rows = Rows(tmp_path / "rows.jsonl", {})

    def fails():
        raise TypeError("no such argument\nmore")

    def has_no_compiler():
        raise UserError("libtpu is missing")

    assert rows.of(("a",), fails)["failed"] == "TypeError: no such argument"
    assert rows.of(("b",), lambda: {"value": 1})["value"] == 1
    with pytest.raises(UserError, match="libtpu is missing"):
        rows.of(("c",), has_no_compiler)
    assert list(Rows(tmp_path / "rows.jsonl", {}).known) == [("a",), ("b",)]


def test_estimates_on_a_gpu_are_for_the_chip_that_is_there(monkeypatch):
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert gpu.target_here().chip.bandwidth == 3350e9
    Device.device_kind = "NVIDIA A100-SXM4-80GB"
    assert gpu.target_here() is None


@pytest.mark.once
@pytest.mark.parametrize(
    "net", ["lenet5", *(pytest.param(net, marks=pytest.mark.slow) for net in ("local_lenet5", "mnist1d_cnn"))]
)
def test_stock_networks_are_the_same_functions(net):
    model, shape = model_of(net), NETS[net][1]
    x = jnp.asarray(np.random.RandomState(0).normal(size=(2, *shape)), jnp.float32)
    variables = network(model).init(jax.random.key(0), x)
    ours = jax.jit(lambda x: network(model).apply(variables, x))(x)
    with stock_operations():
        theirs = jax.jit(lambda x: network(model).apply(variables, x))(x)
    np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=1e-5)
