"""The check of a backend finds what is wrong, passes what is right, and keeps a wrong one from training."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from cnnlib.check import backend, compare
from cnnlib.check.cases import cases, quick_cases
from cnnlib.check.compare import FORMS, prepared, quick_check
from cnnlib.check.table import print_check
from cnnlib.cli.main import main
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.data.sets import load
from cnnlib.errors import UserError
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.runner import run
from cnnlib.runs.session import Options
from cnnlib.spec.notation import parse_model
from cnnlib.train.feeds import Resident
from cnnlib.train.programs import compile_programs

TINY = Experiment(
    arms=(Arm("full", parse_model("avg:4 dense:classes")),),
    data=Data("lines"),
    optim=Optim("sgd", learning_rate=(0.01,)),
    lanes=Lanes(seed=(0,)),
    epochs=1,
    batch_size=200,
    compile_cache=False,
    checkpoint=Checkpoint(every=0),
)


def test_every_operation_of_the_quick_check_is_right_here():
    found = quick_check()
    assert {one.operation for one in found} >= {"dense", "conv2d", "conv1d", "local2d", "max_pool", "batch_norm"}
    assert not [one for one in found if one.is_wrong]


def worst(case, form="forward", platform="cpu", precision="highest"):
    """The error of a case, in units of its tolerance on a platform, computed here."""
    one = prepared(case, "float32")
    function = FORMS[form](compare.forward(case) if form == "forward" else compare.with_gradients(case))
    results = jax.device_get(jax.jit(function)(*one.arguments, one.cotangent))
    return compare.largest_error(one, results, platform, precision)


def case_of(operation):
    return next(case for case in quick_cases() if case.operation == operation)


def last_row_lost(y):
    return y.at[-1].set(y[-2])


@pytest.mark.parametrize("case", quick_cases(), ids=lambda case: case.operation)
def test_a_wrong_operation_is_found(case):
    assert worst(case) <= 1
    assert worst(case._replace(function=lambda *own: last_row_lost(case.function(*own)))) > 1


@pytest.mark.parametrize("operation", ["dense", "conv2d", "local2d", "max_pool", "batch_norm", "cross-entropy"])
def test_a_wrong_gradient_is_found(operation):
    case = case_of(operation)

    @jax.custom_vjp
    def function(*own):
        return case.function(*own)

    def backward(own, gradient):
        back = jax.vjp(case.function, *own)[1](gradient)
        return (back[0] * (1 + 1e-4), *back[1:])

    function.defvjp(lambda *own: (case.function(*own), own), backward)
    assert worst(case._replace(function=function), "vmap") > 1


def test_the_tolerance_follows_the_precision_of_products():
    case = case_of("dense")
    in_bfloat16 = case._replace(
        function=lambda x, kernel: jax.lax.reduce_precision(x, 8, 7) @ jax.lax.reduce_precision(kernel, 8, 7)
    )
    assert worst(in_bfloat16, platform="tpu", precision="default") <= 1
    assert worst(in_bfloat16, platform="tpu", precision="high") > 1
    assert worst(in_bfloat16, platform="gpu", precision="default") > 1
    assert worst(in_bfloat16, platform="cpu", precision="default") > 1
    in_float32 = case._replace(function=lambda x, kernel: x @ kernel)
    assert worst(in_float32, platform="gpu", precision="highest") <= 1


def test_a_result_that_is_no_number_is_wrong():
    case = case_of("dense")
    assert np.isinf(worst(case._replace(function=lambda x, kernel: jnp.full_like(case.function(x, kernel), jnp.nan))))


def test_sizes_lie_on_both_sides_of_where_libraries_divide_the_work():
    rows = [case.arguments[0].shape[1] for case in cases() if case.operation == "sum of squared products"]
    assert min(rows) < 32_768 < max(rows)


# A run.


@pytest.fixture
def wrong_max_pool(monkeypatch, tmp_path):
    """A backend whose pooling is wrong, and which has not been checked before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(backend, "PASSED", set())
    right = case_of("max_pool")
    broken = right._replace(function=lambda x: right.function(x) * (1 + 1e-4))
    monkeypatch.setattr(compare, "quick_cases", lambda: (case_of("dense"), broken))
    monkeypatch.setattr(backend, "version", lambda name: "0.10.2")


def test_a_wrong_backend_is_refused_before_anything_is_written(wrong_max_pool, tmp_path):
    with pytest.raises(UserError) as error:
        run(TINY, "tiny", tmp_path / "run", Watcher())
    text = str(error.value)
    assert text.startswith("cpu computes wrong numbers: max_pool (")
    assert "times the tolerance) with jaxlib 0.10.2" in text and "--no-check trains all the same" in text
    assert "XLA_FLAGS='--xla_cpu_experimental_ynn_fusion_type=-reduce' avoids it" in text
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError):  # a failure is not remembered as a pass
        run(TINY, "tiny", tmp_path / "run", Watcher())


def test_a_run_without_the_check_says_so_in_its_results(wrong_max_pool, tmp_path):
    results = run(TINY, "tiny", tmp_path / "run", Watcher(), Options(check=False))
    assert results.device.checked is False
    assert json.loads((tmp_path / "run" / "results.json").read_text())["device"]["checked"] is False


class Told(Watcher):
    def __init__(self):
        self.lines = []

    def says(self, text):
        self.lines.append(text)


@pytest.mark.slow
def test_a_backend_that_has_passed_is_not_checked_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = []
    for name, expected in (("first", 1), ("second", 0)):
        monkeypatch.setattr(backend, "PASSED", set())  # as in another process
        watcher = Told()
        results = run(TINY, "tiny", tmp_path / name, watcher)
        assert results.device.checked is True
        assert len([line for line in watcher.lines if line.startswith("checking cpu")]) == expected
        told += watcher.lines
    monkeypatch.setattr(backend, "PASSED", set())
    monkeypatch.setenv("XLA_FLAGS", "--other=1")
    assert backend.backend_of(jax.devices()[0], "default")["XLA_FLAGS"] == "--other=1"
    with pytest.raises(UserError, match="computes wrong numbers"):  # other flags are another backend
        monkeypatch.setattr(
            backend, "quick_check", lambda precision: [compare.Found("dense", "scan", "float32", "", 2.0)]
        )
        run(TINY, "tiny", tmp_path / "third", Watcher())


# Precision.


def test_the_precision_of_an_arm_is_that_of_its_products():
    (arm,) = resolve(replace(TINY, precision="highest"))
    data = load(arm.data)
    texts = {}
    for precision in ("default", "highest"):
        (arm,) = resolve(replace(TINY, precision=precision))
        feed = Resident(data, jax.devices()[:1])
        texts[precision] = compile_programs(arm, feed, jax.devices()[:1]).epoch.as_text()
    assert "operand_precision={highest,highest}" in texts["highest"]
    assert "operand_precision={highest,highest}" not in texts["default"]


# The command.


def test_the_command_prints_a_table_and_its_verdict(monkeypatch, capsys):
    assert main(["check", "--only", "gather"]) == 0
    printed = capsys.readouterr().out
    assert all(len(line) <= 80 for line in printed.splitlines() if not line.startswith("XLA_FLAGS: "))
    assert len([line for line in printed.splitlines() if line.startswith("gather")]) == len(FORMS)
    assert printed.endswith("everything is right\n")
    broken = case_of("gather")._replace(function=lambda images, index: images[index].astype(jnp.float32) + 1)
    monkeypatch.setattr("cnnlib.check.table.cases", lambda: (broken,))
    assert main(["check", "--only", "gather"]) == 1
    assert "wrong:\n  gather 100 of 1000 images, forward, float32: " in capsys.readouterr().out


def test_the_command_says_what_there_is_to_check(capsys):
    assert main(["check", "--only", "nothing"]) == 2
    assert "nothing to check has 'nothing' in its name; there are: dense_products, " in capsys.readouterr().err


def test_a_wrong_known_bad_program_makes_the_check_fail(monkeypatch):
    monkeypatch.setattr("cnnlib.check.table.run_known_bad", lambda name: "wrong")
    assert print_check("default", "sum_of_products", Console(file=io.StringIO())) is False
