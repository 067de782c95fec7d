"""Malformed overrides, files of runs, checkpoints and data sets: one line and exit status 2, never a trace.

2,000 cases in all; the fast session has a tenth of them.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import warnings

import jax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from cnnlib.cli.main import main
from cnnlib.config.fields import to_dict
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes
from cnnlib.data.declaration import Data
from cnnlib.errors import UserError
from cnnlib.runs.callbacks import Watcher
from cnnlib.runs.folder import RunFolder
from cnnlib.runs.resume import read_arm
from cnnlib.runs.runner import run
from cnnlib.spec.notation import parse_model
from cnnlib.train.checkpoint import Checkpoints, Unreadable
from cnnlib.train.programs import state_shapes
from cnnlib.train.sharding import spread

pytestmark = pytest.mark.slow


def told(arguments):
    """Exit status and lines on standard error of a command."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        status = main(arguments)
    return status, error.getvalue(), out.getvalue()


def is_one_line(arguments):
    status, error, out = told(arguments)
    assert status == 2, (arguments, status, error, out)
    assert len(error.splitlines()) == 1 and error.startswith("error: ") and "Traceback" not in error, error
    return error


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x00"), max_size=30)
FIELDS = st.sampled_from(
    """epochs batch_size lanes.seed lanes.at_a_time lanes optim.learning_rate optim.name data.validation data.seed arms
    arms.lenet5.model arms.lenet5.match arms.lenet5.connectivity checkpoint.every checkpoint.share checkpoint.keep
    wandb.per wandb.project augment.crop compute_dtype""".split()  # noqa: SIM905
)
WRONG = """-1 1e999 nan inf -inf 0x10 1_0 , 1.. 5..1 ../../etc $(id) [] conv: conv:1@0 dense:-3 residual( null {} \ud7ff
    conv:6@5,relu""".split()  # noqa: SIM905
VALUES = TEXT | st.sampled_from([*WRONG, "", "9" * 5000, "(" * 500, "residual(" * 300, "conv:6@5 relu"])
OVERRIDES = st.builds("{}={}".format, FIELDS | TEXT, VALUES) | TEXT


def is_no_trace(arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        status, error, out = told(arguments)
    is_fine = (status, error) == (0, "")
    assert is_fine or (status == 2 and len(error.splitlines()) == 1 and out == ""), (arguments, error)


def malformed_overrides(overrides):
    is_no_trace(["show", "fc_vs_conv", *[text for text in overrides if not text.startswith("-")]])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


def paths_of(value, path=()):
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from paths_of(inner, (*path, key))


@st.composite
def damaged(draw, text):
    """A file's text cut off, replaced, or with one value of its JSON exchanged for another."""
    kind = draw(st.sampled_from(["cut", "junk", "value", "gone"]))
    if kind == "cut":
        return text[: draw(st.integers(0, len(text) - 2))]
    if kind == "junk":
        return draw(TEXT)
    value = json.loads(text)
    *before, last = draw(st.sampled_from([path for path in paths_of(value) if path]))
    inner = value
    for key in before:
        inner = inner[key]
    if kind == "gone":
        del inner[last]
    else:
        inner[last] = draw(JSON)
    return json.dumps(value)


EXPERIMENT = Experiment(
    arms=(Arm("full", parse_model("avg:7 dense:classes")),),
    data=Data("lines", validation=200),
    lanes=Lanes(seed=(0, 1)),
    epochs=1,
    batch_size=500,
    checkpoint=Checkpoint(share=1.0),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("finished")
    run(EXPERIMENT, "tiny", out, Watcher())
    return out


def put(source, target, name, text):
    """A copy of a run in which one file holds something else."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target)
    (target / name).write_text(text, encoding="utf-8", errors="surrogatepass")


FILES = ["run.json", "config.json", "results.json", "metrics.jsonl"]


def malformed_files_of_runs(finished, tmp_path, data):
    name = data.draw(st.sampled_from(FILES))
    text = (finished / name).read_text()
    lines = text.splitlines() if name == "metrics.jsonl" else [text]
    put(finished, tmp_path / "run", name, "\n".join([*lines[:-1], data.draw(damaged(lines[-1]))]))
    status, error, _ = told(["runs", str(tmp_path)])
    assert (status, error) == (0, ""), error
    is_no_trace(["compare", str(finished), str(tmp_path / "run")])


def malformed_runs_to_resume(finished, tmp_path, data):
    name = data.draw(st.sampled_from(["run.json", "results.json"]))
    put(finished, tmp_path / "run", name, data.draw(damaged((finished / name).read_text())))
    before = (tmp_path / "run" / "results.json").read_bytes()
    # The command's experiment is another one: whatever the record says, this is not to be resumed.
    is_one_line(["run", "fc_vs_conv", "epochs=1", "--out", str(tmp_path / "run"), "--resume", "--wandb", "off"])
    assert (tmp_path / "run" / "results.json").read_bytes() == before


def malformed_arms(finished, tmp_path, data):
    name = "arms/full.json"
    text = data.draw(damaged((finished / name).read_text()))
    put(finished, tmp_path / "run", name, text)
    (arm,) = resolve(EXPERIMENT)
    with RunFolder(tmp_path / "run") as held:
        found = read_arm(held, arm)
    whole = json.loads((finished / name).read_text())
    assert found is None or to_dict(found) == {key: value for key, value in whole.items() if key != "sha256"}


def malformed_checkpoints(finished, tmp_path, data):
    whole = finished / "checkpoints" / "full" / "1"
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    shutil.rmtree(tmp_path / "kept", ignore_errors=True)
    shutil.copytree(whole, tmp_path / "kept" / "1")
    victim = tmp_path / "kept" / "1" / data.draw(st.sampled_from(files))
    content = victim.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "junk", "gone", "folder"]))
    victim.unlink()
    if kind == "cut":
        victim.write_bytes(content[: data.draw(st.integers(0, max(0, len(content) - 1)))])
    elif kind == "junk":
        victim.write_bytes(data.draw(st.binary(max_size=60)))
    elif kind == "folder":
        victim.mkdir()
    (arm,) = resolve(EXPERIMENT)
    like = state_shapes(arm, spread(len(arm.lanes), jax.devices()[:1], EXPERIMENT.batch_size))
    kept = Checkpoints(tmp_path / "kept")
    with contextlib.closing(kept), contextlib.suppress(Unreadable, UserError):
        for epoch in kept.epochs():
            assert isinstance(kept.progress(epoch), dict)
            kept.state(epoch, like, len(arm.lanes))


def malformed_data_sets(tmp_path, data):
    name = data.draw(st.sampled_from(["mnist", "fashion_mnist", "mine", "a/b", "..", "cifar10:9.9.9"]))
    folder = tmp_path / "data" / name.split(":")[0].replace("..", "dots") / "1.0.0"
    shutil.rmtree(tmp_path / "data", ignore_errors=True)
    folder.mkdir(parents=True)
    for file in ("dataset_info.json", "features.json"):
        (folder / file).write_text(data.draw(TEXT | JSON.map(json.dumps)), encoding="utf-8", errors="surrogatepass")
    asked = [f"data.name={name}", f"data.data_dir={tmp_path / 'data'}"]
    is_no_trace(["show", "fc_vs_conv", *asked])  # what is not prepared is not yet wrong
    is_no_trace(["count", "fc_vs_conv", *asked, "data.validation=-1"])


def sweep(body, strategy, examples):
    limits = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.filter_too_much,
    ]
    settled = settings(
        max_examples=examples, deadline=None, suppress_health_check=limits, phases=(Phase.generate,), database=None
    )
    settled(given(strategy)(body))()


def test_overrides():
    sweep(lambda overrides: malformed_overrides(overrides), st.lists(OVERRIDES, min_size=1, max_size=3), 800)


def test_files_of_runs(finished, tmp_path):
    sweep(lambda data: malformed_files_of_runs(finished, tmp_path, data), st.data(), 400)


def test_runs_to_resume(finished, tmp_path):
    sweep(lambda data: malformed_runs_to_resume(finished, tmp_path, data), st.data(), 100)


def test_finished_arms(finished, tmp_path):
    sweep(lambda data: malformed_arms(finished, tmp_path, data), st.data(), 300)


def test_checkpoints(finished, tmp_path):
    sweep(lambda data: malformed_checkpoints(finished, tmp_path, data), st.data(), 250)


def test_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", os.fspath(tmp_path))
    sweep(lambda data: malformed_data_sets(tmp_path, data), st.data(), 150)
