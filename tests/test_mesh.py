"""Lanes over several devices: forced ones of a CPU, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cnnlib import mesh
from cnnlib.errors import UserError

SCRIPT = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
from cnnlib import mesh
from cnnlib.config import Arm, Data, Experiment, Lanes, Optim
from cnnlib.data import load
from cnnlib.errors import Stopped
from cnnlib.programs import compile_programs, numbers_of
from cnnlib.resolve import resolve
from cnnlib.run import on_devices, run
from cnnlib.spec import parse_model
from cnnlib.watcher import Watcher

mesh.use_cores(4)
out = Path(sys.argv[1])
arms = (
    Arm("conv", parse_model("conv:4@3 relu max:2 dense:classes")),
        Arm("full", parse_model("dense:8 relu dense:classes")))
experiment = Experiment(
    arms=arms, data=Data("mnist5k", validation=500), optim=Optim("adam", learning_rate=(0.01,)),
    lanes=Lanes(seed=(0, 1, 2)), epochs=2, batch_size=200, compile_cache=False,
)
told = {}
for count in (1, 2):
    results = run(replace(experiment, devices=count), "tiny", out / str(count), Watcher())
    told[count] = [[arm["devices"], arm["lanes"]] for arm in results["arms"]]

class StopAfterFirst(Watcher):
    def epoch_ends(self, report):
        self.ended = True

watcher = StopAfterFirst()
try:
    run(replace(experiment, devices=3), "tiny", out / "moved", watcher, stop=lambda: hasattr(watcher, "ended"))
    told["stopped"] = False
except Stopped:
    told["stopped"] = True
results = run(replace(experiment, devices=1), "tiny", out / "moved", Watcher(), resume=True)
told["moved"] = [[arm["devices"], arm["lanes"]] for arm in results["arms"]]

arm = resolve(experiment)[0]
made = compile_programs(arm, on_devices(load(arm.data), mesh.devices()), mesh.devices())
words = "all-reduce|all-gather|all-to-all|collective|reduce-scatter"
told["collectives"] = [re.findall(words, p.as_text()) for p in (made.epoch, made.predict, made.fit, made.snapshot)]
splits = on_devices(load(arm.data), mesh.devices())
told["copies"] = len({shard.data.unsafe_buffer_pointer() for shard in splits["train"].x.addressable_shards})
try:
    mesh.devices(5)
except Exception as error:
    told["five"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What runs on 1, 2, 3 and 4 devices came to."""
    folder = tmp_path_factory.mktemp("mesh")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], capture_output=True, text=True, timeout=280, cwd=folder
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_lane_is_the_same_on_any_number_of_devices(told):
    assert [told[count][0][0] for count in ("1", "2")] == [1, 2]  # three lanes: uneven
    for arm in (0, 1):
        alone = told["1"][arm][1]
        assert len(alone) == 3
        for count in ("2",):
            for own, other in zip(alone, told[count][arm][1], strict=True):
                assert own["seed"] == other["seed"]
                assert other["test_loss"] == pytest.approx(own["test_loss"], rel=1e-4)
    # A convolution's lanes run one after another on each device, by the same program.
    for count in ("2",):
        fingerprints = [[lane["parameters_sha256"] for lane in told[at][0][1]] for at in ("1", count)]
        assert fingerprints[0] == fingerprints[1] and len(set(fingerprints[0])) == 3


@pytest.mark.slow
def test_a_checkpoint_moves_to_another_number_of_devices(told):
    assert told["stopped"]
    assert [devices for devices, _ in told["moved"]] == [1, 1]
    for lane, own in zip(told["moved"][0][1], told["1"][0][1], strict=True):
        assert lane["parameters_sha256"] == own["parameters_sha256"]


@pytest.mark.slow
def test_devices_tell_each_other_nothing_and_share_the_examples(told):
    assert told["collectives"] == [[], [], [], []]
    assert told["copies"] == 1
    assert told["five"] == "devices=5: JAX has 4 (cpu)"


@pytest.mark.parametrize(
    ("lanes", "count", "used", "a_device"), [(30, 2, 2, 15), (5, 4, 3, 2), (1, 8, 1, 1), (9, 8, 5, 2), (8, 8, 8, 1)]
)
def test_no_device_is_used_for_copies_alone(lanes, count, used, a_device):
    spread = mesh.spread(lanes, [SimpleNamespace(platform="cpu")] * count)
    assert (len(spread.devices), spread.lanes_a_device) == (used, a_device)
    rows = np.arange(lanes)
    filled = spread.filled(rows)
    assert len(filled) == used * a_device and list(filled[:lanes]) == list(rows)
    assert all(filled[lanes:] == rows[-1])


def test_what_jax_has_not_is_one_line():
    with pytest.raises(UserError, match=r"devices=1000: JAX has 1 \(cpu\)"):
        mesh.devices(1000)


@pytest.mark.parametrize("start", range(8))
def test_aligned_arrays_hold_the_same_numbers(start):
    array = np.arange(start, 50.0, dtype=np.float32)[start:]
    aligned = mesh.aligned(array)
    assert aligned.ctypes.data % mesh.ALIGNMENT == 0
    assert aligned.dtype == array.dtype and list(aligned) == list(array)
