"""Lanes over several devices: forced ones of a CPU, in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from cnnlib.errors import UserError
from cnnlib.train import sharding
from cnnlib.train.multihost import Hosts

SCRIPT = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
from cnnlib.train import feeds, sharding as mesh
from cnnlib.config.schema import Arm, Augment, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.data.sets import load
from cnnlib.errors import Stopped
from cnnlib.train.feeds import Resident, on_devices
from cnnlib.train.programs import compile_programs, size_of, spread_of
from cnnlib.config.resolve import resolve
from cnnlib.runs.runner import run
from cnnlib.runs.session import Options
from cnnlib.spec.notation import parse_model
from cnnlib.config.fields import to_dict
from cnnlib.runs.callbacks import Watcher

mesh.use_cores(8)
out = Path(sys.argv[1])
arms = (
    Arm("conv", parse_model("conv:4@3 relu max:2 dense:classes")),
    Arm("full", parse_model("dense:8 relu dense:classes"), own=("augment.flip=false",)),
    Arm("norm", parse_model("conv:4@3 norm relu max:2 dense:classes"),
        own=("optim.name=sgd", "optim.learning_rate=0.01", "epochs=1")),
)
# Few steps: training amplifies a difference in rounding, wherever it moves a unit across zero.
data = Data("mnist5k", validation=500, train=700)
experiment = Experiment(
    arms=arms, data=data, optim=Optim("adam", learning_rate=(0.01,)),
    augment=Augment(shift=2, flip=True), lanes=Lanes(seed=(0, 1, 2)), epochs=2, batch_size=200,
    checkpoint=Checkpoint(share=1.0),
)

def results_of(name, **fields):
    results = run(replace(experiment, **fields), "tiny", out / name, Watcher())
    return {arm["name"]: [arm["mesh"], arm["lanes"]] for arm in to_dict(results)["arms"]}

told = {
    "one": results_of("one", devices=1),
    "two": results_of("two", devices=2, arms=arms[:1]),
    "data": results_of("data", mesh=(1, 8), arms=arms[2:]),
    "mixed": results_of("mixed", mesh=(2, 4), arms=arms[1:2]),  # three lanes: uneven
    "pieces": results_of("pieces", devices=1, accumulate=4, arms=arms[1:2]),
    "mixed pieces": results_of("mixed pieces", mesh=(3, 2), accumulate=2, remat=True, arms=arms[:1]),
    "remat": results_of("remat", devices=1, remat=True, arms=arms[:1]),
}

class StopAfterFirst(Watcher):
    ended = False
    def epoch_ends(self, report):
        self.ended = True

longer = replace(experiment, arms=arms[:1], epochs=4)
told["unmoved"] = run(replace(longer, devices=1), "tiny", out / "unmoved", Watcher()).arms[0].lanes
told["stops"] = []
for how in ({"mesh": (1, 8)}, {"devices": 1}, {"mesh": (2, 2), "devices": 4}):  # 8, 1, 4 devices
    watcher = StopAfterFirst()
    try:
        run(replace(longer, **how), "tiny", out / "moved", watcher, Options(resume=True), stop=lambda: watcher.ended)
    except Stopped as stopped:
        told["stops"].append(str(stopped))
results = run(replace(longer, devices=3), "tiny", out / "moved", Watcher(), Options(resume=True))
told["moved"] = results.arms[0].lanes
told["resumed"] = [change for session in results.resumed for change in session.changes]

def collectives(arm, devices, **fields):
    arm = replace(arm, experiment=replace(arm.experiment, **fields))
    made = compile_programs(arm, Resident(load(arm.data), devices), devices)
    words = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    programs = {"epoch": made.epoch, "predict": made.predict, "fit": made.fit, "snapshot": made.snapshot}
    return {name: sorted(set(re.findall(words, program.as_text()))) for name, program in programs.items()}

arm = resolve(experiment)[0]
told["lanes only"] = collectives(arm, mesh.devices())
told["batches"] = collectives(arm, mesh.devices(), mesh=(2, 4))

def streamed(count):  # bytes that as many lanes need as there are devices, and those of three chunks
    one = replace(experiment, arms=arms[1:2], lanes=Lanes(seed=tuple(range(count))), data=replace(data, stream=True))
    (arm,), devices = resolve(one), mesh.devices(count)
    (data_set,) = feeds.read_or_open_all([arm.data], 2**40, print, None).values()
    feed = feeds.feed_of(data_set, devices)
    chunks = 3 * size_of(feed.examples(arm, spread_of(arm, devices))["train"])
    return compile_programs(arm, feed, devices).memory_bytes, chunks

told["streamed"] = [streamed(1), streamed(8)]
splits = on_devices(load(arm.data), mesh.devices())
told["copies"] = len({shard.data.unsafe_buffer_pointer() for shard in splits["train"].x.addressable_shards})
told["errors"] = []
for fields in ({"devices": 9}, {"mesh": (2, 5)}, {"mesh": (4, 2)}, {"mesh": (2, 4), "devices": 4}):
    try:
        run(replace(experiment, **fields), "tiny", out / "wrong", Watcher())
    except Exception as error:
        told["errors"].append(str(error))
print(json.dumps(to_dict(told)))
"""


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What runs on meshes of up to 8 devices came to."""
    folder = tmp_path_factory.mktemp("mesh")
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.slow
def test_devices_of_one_memory_share_the_chunks_of_a_stream(told):
    (one, chunks), (eight, same) = told["streamed"]
    assert same == chunks and eight == pytest.approx(8 * (one - chunks) + chunks, rel=0.05)
    assert chunks > 0.5 * one  # so that counting them eight times would be seen


@pytest.mark.slow
@pytest.mark.parametrize("how", ["two", "data", "mixed", "pieces", "mixed pieces", "remat"])
def test_a_lane_is_the_same_on_any_mesh_and_in_any_number_of_pieces(told, how):
    meshes = {"two": [2, 1], "data": [1, 8], "mixed": [2, 4], "mixed pieces": [3, 2]}
    for arm, (shape, lanes) in told[how].items():
        assert shape == meshes.get(how, [1, 1])
        alone = told["one"][arm][1]
        assert [lane["seed"] for lane in lanes] == [lane["seed"] for lane in alone] == [0, 1, 2]
        for own, other in zip(alone, lanes, strict=True):
            # Rounding reaches 1e-6 here. One example of a batch of 200 has a weight of 5e-3.
            assert other["test_loss"] == pytest.approx(own["test_loss"], rel=1e-5)
            assert other["train_loss"] == pytest.approx(own["train_loss"], rel=1e-5)
    # A convolution's lanes run one after another on each device, by the same program.
    if how in ("two", "remat"):
        fingerprints = [[lane["parameters_sha256"] for lane in told[at]["conv"][1]] for at in ("one", how)]
        assert fingerprints[0] == fingerprints[1] and len(set(fingerprints[0])) == 3


@pytest.mark.slow
def test_a_checkpoint_moves_from_eight_devices_to_one_to_four(told):
    assert [text[:27] for text in told["stops"]] == [f"stopped after epoch {n} of 4 " for n in (1, 2, 3)]
    assert "mesh was 1,8, is None" in told["resumed"]
    for moved, unmoved in zip(told["moved"], told["unmoved"], strict=True):
        assert moved["epochs"] == 4
        assert moved["test_loss"] == pytest.approx(unmoved["test_loss"], rel=1e-5)


@pytest.mark.slow
def test_devices_tell_each_other_of_shared_batches_and_of_nothing_else(told):
    assert told["lanes only"] == {"epoch": [], "predict": [], "fit": [], "snapshot": []}
    assert told["batches"] == {
        "epoch": ["all-reduce"],
        "predict": ["all-gather"],
        "fit": ["all-gather"],
        "snapshot": [],
    }
    assert told["copies"] == 1


@pytest.mark.slow
def test_a_mesh_that_cannot_be_had_is_one_line(told):
    assert told["errors"] == [
        "devices=9: JAX has 8 (cpu)",
        "mesh=2,5 needs 10 devices: JAX has 8 (cpu)",
        "mesh=4,2: 3 lanes leave some of 4 groups of devices without any",
        "mesh=2,4 needs 8 devices: JAX has 4 (cpu)",
    ]


@pytest.mark.parametrize(
    ("lanes", "count", "used", "a_device"), [(30, 2, 2, 15), (5, 4, 3, 2), (1, 8, 1, 1), (9, 8, 5, 2), (8, 8, 8, 1)]
)
def test_no_device_is_used_for_copies_alone(lanes, count, used, a_device):
    spread = sharding.spread(lanes, [SimpleNamespace(platform="cpu")] * count, batch_size=128)
    assert (len(spread.devices), spread.lanes_a_device) == (used, a_device)
    rows = np.arange(lanes)
    filled = spread.filled(rows)
    assert len(filled) == used * a_device and list(filled[:lanes]) == list(rows)
    assert all(filled[lanes:] == rows[-1])


@pytest.mark.parametrize(
    ("lanes", "count", "batch_size", "shape"),
    [(3, 8, 128, (3, 2)), (1, 8, 128, (1, 8)), (1, 8, 100, (1, 5)), (2, 8, 7, (2, 1)), (5, 8, 128, (5, 1))],
)
def test_accelerators_that_are_left_share_batches(lanes, count, batch_size, shape):
    spread = sharding.spread(lanes, [SimpleNamespace(platform="gpu")] * count, batch_size)
    assert (spread.groups, spread.shards) == shape


def on_hosts(*counts):
    """So many devices of each process."""
    return [
        SimpleNamespace(platform="cpu", process_index=host) for host, count in enumerate(counts) for _ in range(count)
    ]


@pytest.mark.parametrize(
    ("lanes", "counts", "asked", "used"),
    [
        (9, (2, 2, 2, 2), None, [2, 1, 1, 1]),  # five devices have lanes: two, but for the last
        (4, (4, 4), None, [2, 2]),
        (10_000, (4,) * 64, None, [4] * 58 + [3] * 6),
        (30, (1, 3), None, [1, 3]),
        (3, (1, 3), None, [1, 2]),
        (3, (4, 4), (3, 2), [3, 3]),
    ],
)
def test_hosts_have_equally_many_devices_with_lanes(lanes, counts, asked, used):
    spread = sharding.spread(lanes, on_hosts(*counts), 128, asked, Hosts(0, len(counts)))
    assert [sum(device.process_index == host for device in spread.devices) for host in range(len(counts))] == used
    assert [device.process_index for device in spread.devices] == sorted(d.process_index for d in spread.devices)


def test_a_host_without_lanes_is_one_line():
    with pytest.raises(UserError, match="leaves nothing to do for process 1 of 2: 1 lanes need fewer hosts"):
        sharding.spread(1, on_hosts(2, 2), 128, None, Hosts(0, 2))


def test_devices_are_counted_on_each_host(monkeypatch):
    monkeypatch.setattr(sharding.jax, "devices", lambda: on_hosts(2, 3))
    assert [device.process_index for device in sharding.devices(1)] == [0, 1]
    assert [device.process_index for device in sharding.devices(2)] == [0, 0, 1, 1]
    with pytest.raises(UserError, match=r"process 0 of 2: devices=3: JAX has 2 \(cpu\)"):
        sharding.devices(3)


def test_what_jax_has_not_is_one_line():
    with pytest.raises(UserError, match=r"devices=1000: JAX has 1 \(cpu\)"):
        sharding.devices(1000)


@pytest.mark.parametrize("start", range(8))
def test_aligned_arrays_hold_the_same_numbers(start):
    array = np.arange(start, 50.0, dtype=np.float32)[start:]
    aligned = sharding.aligned(array)
    assert aligned.ctypes.data % sharding.ALIGNMENT == 0
    assert aligned.dtype == array.dtype and list(aligned) == list(array)
