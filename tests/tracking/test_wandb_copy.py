"""The copy in Weights & Biases: equal to the files of the run, and never in the way of training."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import made_results
import numpy as np
import pytest

from cnnlib.errors import UserError
from cnnlib.runs.callbacks import Beginning
from cnnlib.runs.metrics import lane_name, means_of
from cnnlib.system.files import follow_json_lines
from cnnlib.tracking import wandb_copy
from cnnlib.tracking.wandb_copy import WandbCopy, chosen_mode, has_key

METRICS = ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy")
TINY = ["arms=mlp_75_33,lenet5", "epochs=3", "lanes.seed=0,1", "data.name=lines", "data.validation=200"]


def command(out, *arguments):
    return [sys.executable, "-m", "cnnlib", "run", "fc_vs_conv", *TINY, "--out", str(out), *arguments]


def environment(folder, **change):
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
    (temporary := folder / "tmp").mkdir(exist_ok=True)
    places = {"WANDB_CONFIG_DIR": str(folder), "WANDB_CACHE_DIR": str(folder), "WANDB_DATA_DIR": str(folder)}
    return {
        **quiet,
        "JAX_PLATFORMS": "cpu",
        "NETRC": str(folder / "none"),
        "HOME": str(folder),
        # With kernels and programs that are compiled.
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "TMPDIR": str(temporary),
        **places,
        **change,
    }


def records(run):
    """What wandb's own reader says of an offline run."""
    (file,) = run.glob("*.wandb")
    reader = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(file)]
    text = subprocess.run(reader, capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def read_back(run):
    """A run's identity, the items of its history, and its summary."""
    found = records(run)
    (identity,) = (record["run"] for record in found if record["type"] == "run")
    history = [record["history"]["item"] for record in found if record["type"] == "history"]
    summary = {}
    for record in found:
        if record["type"] == "summary":
            summary |= record["summary"].get("update", {})
    return identity, history, summary


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    out = tmp_path_factory.mktemp("offline") / "run"
    fields = ["arms.lenet5.data.train=900", "optim.learning_rate=0.02,0.05", "wandb.tags=mine", "wandb.notes=a note"]
    run = command(out, "--wandb", "offline", *fields)
    done = subprocess.run(run, capture_output=True, text=True, check=False, env=environment(out.parent))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "wandb sync" in line)
    pattern = line.split("wandb sync ")[1]
    listed = subprocess.run(
        ["sh", "-c", f"ls -d {pattern}"], capture_output=True, text=True, check=True, cwd=out.parent
    )
    assert len(listed.stdout.splitlines()) == 9  # what the shell makes of the line: all W&B runs
    return out


@pytest.mark.slow
def test_every_value_of_every_lane_is_in_its_own_run(offline):
    results = json.loads((offline / "results.json").read_text())
    identity = json.loads((offline / "run.json").read_text())["id"]
    lines = [json.loads(line) for line in (offline / "metrics.jsonl").read_text().splitlines()]
    runs = {read_back(run)[0]["run_id"]: run for run in (offline / "wandb").glob("offline-run-*")}
    lanes = {(arm["name"], number): lane for arm in results["arms"] for number, lane in enumerate(arm["lanes"])}
    assert set(runs) == {f"{identity}-{arm}-{number}" for arm, number in lanes} | {f"{identity}-group"}
    for (arm, number), lane in lanes.items():
        known, history, summary = read_back(runs[f"{identity}-{arm}-{number}"])
        told = [line for line in lines if (line["arm"], line["lane"]) == (arm, number)]
        assert [item["_step"] for item in history] == [item["epoch"] for item in history] == [1, 2, 3]
        for item, line in zip(history, told, strict=True):
            assert {name: item[name] for name in METRICS} == {name: line[name] for name in METRICS}
        assert (
            known["job_type"] == arm
            and known["display_name"] == f"{arm} seed {lane['seed']} learning_rate {lane['learning_rate']:g}"
        )
        assert known["run_group"] == f"fc_vs_conv run {identity}" and known["tags"] == ["lines", "cpu", "mine"]
        assert known["notes"] == "a note"
        config = known["config"]["update"]
        assert (config["arm"], config["seed"], config["epochs"]) == (arm, lane["seed"], 3)
        assert config["learning_rate"] == lane["learning_rate"] and config["optim"]["schedule"] == "one_cycle"
        assert config["data"]["name"] == "lines"
        assert config["data"]["train"] == (900 if arm == "lenet5" else None)  # the arm's own
        (result,) = (one for one in results["arms"] if one["name"] == arm)
        chosen = result["settings"][result["chosen_setting"]]["learning_rate"]
        assert chosen_of(runs[f"{identity}-{arm}-{number}"]) == (lane["learning_rate"] == chosen)
        assert summary["test_accuracy"] == lane["test_accuracy"] and summary["status"] == "ok"
        assert summary["parameters_sha256"] == lane["parameters_sha256"]
        counts = next(one for one in results["arms"] if one["name"] == arm)
        assert (summary["parameters"], summary["macs"]) == (counts["parameters"], counts["macs"])
        assert summary["validation_accuracy"]["max"] == max(line["validation_accuracy"] for line in told)
        assert summary["train_loss"]["min"] == min(line["train_loss"] for line in told)
    _, history, summary = read_back(runs[f"{identity}-group"])
    for arm in results["arms"]:
        accuracies = [lane["test_accuracy"] for lane in arm["lanes"]]
        assert summary[f"{arm['name']}/test_accuracy"] == pytest.approx(np.mean(accuracies), rel=1e-12)
        assert summary[f"{arm['name']}/test_accuracy_std"] == pytest.approx(np.std(accuracies, ddof=1), rel=1e-9)
        own = [item for item in history if f"{arm['name']}/epoch" in item]
        assert [item[f"{arm['name']}/epoch"] for item in own] == [1, 2, 3]
        for item in own:
            losses = [
                line["train_loss"]
                for line in lines
                if (line["arm"], line["epoch"]) == (arm["name"], item[f"{arm['name']}/epoch"])
            ]
            assert item[f"{arm['name']}/train_loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    (item,) = (item for item in history if "results.nrows" in item)
    assert item["results.nrows"] == 4 and item["accuracy.format"] == "png"


@pytest.mark.slow
def test_a_run_per_group_alone_goes_to_the_project_and_entity_that_are_asked_for(offline, tmp_path):
    shutil.copytree(offline, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    config = json.loads((offline / "config.json").read_text())
    config["wandb"] |= {"per": "group", "project": "digits", "entity": "team"}
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    again = [sys.executable, "-m", "cnnlib", "wandb", str(tmp_path / "run"), "--wandb", "offline"]
    subprocess.run(again, check=True, capture_output=True, env=environment(tmp_path))
    (group,) = (tmp_path / "run" / "wandb").glob("offline-run-*")
    known, _, _ = read_back(group)
    assert (known["project"], known["entity"], known["job_type"]) == ("digits", "team", "group")


@pytest.mark.slow
def test_a_copy_is_made_again_of_the_files_of_a_run(offline, tmp_path):
    shutil.copytree(offline, tmp_path / "run", ignore=shutil.ignore_patterns("wandb"))
    again = [sys.executable, "-m", "cnnlib", "wandb", str(tmp_path / "run"), "--wandb", "offline"]
    subprocess.run(again, check=True, capture_output=True, env=environment(tmp_path))
    found = [
        {run["run_id"]: (run["config"], [comparable(item) for item in history], comparable(summary))}
        for out in (offline, tmp_path / "run")
        for run, history, summary in sorted(map(read_back, (out / "wandb").glob("offline-run-*")), key=str)
    ]
    half = len(found) // 2
    assert {key for one in found[:half] for key in one} == {key for one in found[half:] for key in one}
    for one in found[:half]:
        ((key, (_, history, summary)),) = one.items()
        (other,) = (other[key] for other in found[half:] if key in other)
        assert (other[1], other[2]) == (history, summary)


def comparable(row):
    """What is the same in every copy: no times, and no places of files."""
    return {key: value for key, value in row.items() if not key.startswith("_") and "results" not in key}


def chosen_of(run):
    """The last word of a W&B run on whether its lane has the chosen setting."""
    updates = [record["config"]["update"] for record in records(run) if record["type"] == "config"]
    return updates[-1]["chosen"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (None, "no folder of a run"),
        ({}, "has format 1,"),
        ({"format": 1}, "has format 1,"),
        ({"format": 99}, "format 99,"),
    ],
)
def test_a_folder_of_another_format_is_not_sent(what, said, tmp_path):
    if what is not None:
        (tmp_path / "run.json").write_text(json.dumps(what))
    done = subprocess.run(
        [sys.executable, "-m", "cnnlib", "wandb", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert said in done.stderr


def test_lines_are_followed_as_they_are_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"a": 0}\n{"a": 1}\n')
    steps = iter(['{"a": 2}\n{"a"', ": 3}\n", None])

    def is_over():
        if (text := next(steps)) is None:
            return True
        with path.open("a") as file:
            file.write(text)
        return False

    assert list(follow_json_lines(path, 9, is_over)) == [[{"a": 1}, {"a": 2}], [{"a": 3}], []]


def test_means_are_those_of_lanes_that_have_not_diverged():
    found = ((1.0, "ok"), (3.0, "ok"), (None, "diverged"))
    lines = [made_results.line(n, 1, train_loss=loss, status=status) for n, (loss, status) in enumerate(found)]
    assert means_of(lines, ["train_loss", "validation_loss"]) == {
        "lanes_ok": 2,
        "train_loss": 2.0,
        "train_loss_std": pytest.approx(2**0.5),
        "validation_loss": None,
        "validation_loss_std": None,
    }
    assert means_of(lines[:1], ["train_loss"])["train_loss_std"] is None


@pytest.mark.slow
def test_system_noise_is_off_and_the_key_is_nowhere(offline):
    assert not list(offline.parent.glob("tmp/*"))  # where the worker rehearsed
    for run in (offline / "wandb").glob("offline-run-*"):
        assert not {"stats", "output", "output_raw"} & {record["type"] for record in records(run)}
    assert "wandb" not in json.loads((offline / "environment.json").read_text())["variables"]


@pytest.mark.slow
def test_a_resumed_run_keeps_its_names_and_goes_on_after_its_last_epoch(tmp_path):
    many = ("--wandb", "offline", "epochs=12", "arms=lenet5", "lanes.seed=0", "checkpoint.share=1")
    with subprocess.Popen(
        command(tmp_path / "run", *many), stdout=subprocess.PIPE, text=True, env=environment(tmp_path)
    ) as process:
        assert process.stdout is not None
        while "epoch 1/12" not in process.stdout.readline():
            assert process.poll() is None
        process.terminate()
        assert process.wait() == 143
    again = command(tmp_path / "run", *many, "--resume")
    assert subprocess.run(again, check=False, capture_output=True, env=environment(tmp_path)).returncode == 0
    parts = sorted((tmp_path / "run" / "wandb").glob("*lenet5-0"))
    first, second = map(read_back, parts)
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["id"]
    assert first[0]["run_id"] == second[0]["run_id"] == f"{identity}-lenet5-0"
    assert [item["epoch"] for item in first[1]] + [item["epoch"] for item in second[1]] == list(range(1, 13))


class Failing(BaseHTTPRequestHandler):
    """A server that answers each request with an error."""

    def do_POST(self):
        self.send_error(500)

    do_GET = do_POST

    def log_message(self, *_):
        pass


def trains_on(tmp_path, address, mode="online"):
    """Runs against a W&B at this address; returns what was said and how long it took."""
    key = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "0123456789" * 4}
    began = time.monotonic()
    run = command(tmp_path / "run", "--wandb", mode, "epochs=6", "arms=mlp_75_33")
    done = subprocess.run(
        run, capture_output=True, text=True, check=False, env=environment(tmp_path, **key), timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "table.md").exists()
    for path in (tmp_path / "run").rglob("*"):
        inside_wandb = "wandb" in path.relative_to(tmp_path / "run").parts
        assert inside_wandb or not path.is_file() or key["WANDB_API_KEY"].encode() not in path.read_bytes()
    return done.stdout, time.monotonic() - began


@pytest.mark.slow
def test_a_server_that_answers_with_errors_is_told_once_and_training_goes_on(tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Failing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        said, _ = trains_on(tmp_path, f"http://127.0.0.1:{server.server_address[1]}")
        server.shutdown()
    assert said.count("W&B failed") == 1 and said.count("cnnlib wandb") == 1


@pytest.mark.slow
def test_a_server_that_hangs_is_told_once_and_training_goes_on(tmp_path):
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:  # takes connections, and says nothing
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        _, alone = trains_on(tmp_path, address, mode="off")  # the first compiles, for both
        said, seconds = trains_on(tmp_path, address)
    assert said.count("W&B") == 1 and "cnnlib wandb" in said
    # wandb itself waits for 90 s and more. What a busy machine takes longer, it takes longer without W&B too.
    assert seconds < 1.5 * alone + 40


def test_the_mode_follows_what_is_there(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert chosen_mode("off") == (None, None) and chosen_mode("offline") == ("offline", None)
    mode, hint = chosen_mode("auto")
    assert mode is None and hint is not None and "wandb login" in hint and "--wandb offline" in hint
    with pytest.raises(UserError, match="--wandb online needs a key"):
        chosen_mode("online")
    (tmp_path / "netrc").write_text("machine api.wandb.ai\n  login user\n  password " + "a" * 40 + "\n")
    assert has_key() and chosen_mode("auto") == ("online", None)
    monkeypatch.setenv("WANDB_BASE_URL", "https://other.example")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert chosen_mode("auto") == ("online", None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert chosen_mode("auto") == ("offline", None) and chosen_mode("online") == ("online", None)
    monkeypatch.setattr(wandb_copy.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"--wandb offline needs cnnlib's extra `wandb`"):
        chosen_mode("offline")
    monkeypatch.delenv("WANDB_MODE")
    mode, hint = chosen_mode("auto")
    assert mode is None and hint is not None and "not installed" in hint


def test_lanes_are_named_by_what_tells_them_apart():
    numbers = [(seed, rate) for seed in (0, 1) for rate in (0.1, 0.01)]
    lanes = [made_results.lane(seed, 0.5, learning_rate=rate).numbers for seed, rate in numbers]
    assert lane_name("lenet5", lanes[1], lanes) == "lenet5 seed 0 learning_rate 0.01"
    assert lane_name("lenet5", lanes[0], lanes[::2]) == "lenet5 seed 0"
    crossed = [made_results.lane(0, 0.5, order_seed=order).numbers for order in (0, 5)]
    assert lane_name("lenet5", crossed[1], crossed) == "lenet5 seed 0 order_seed 5"


def test_a_copy_is_not_written_through_a_link_that_leads_out(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "wandb").symlink_to(tmp_path)
    copy = WandbCopy("offline", print)
    beginning = Beginning(tmp_path / "run", made_results.record(), False)
    try:
        with pytest.raises(UserError, match="leads out of"):
            copy.run_begins(beginning)
    finally:
        copy.close(1)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
