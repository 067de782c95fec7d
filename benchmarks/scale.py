"""Measure the costs that docs/scale.md uses, such as the costs of lanes, image sides, checkpoints and streams."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import numpy as np

from benchmarks.timing import Contestant, Table, interleaved
from cnnlib.config.resolve import TrainedArm, resolve
from cnnlib.config.schema import Arm, Checkpoint, Experiment, Lanes, Optim
from cnnlib.data import image_folder
from cnnlib.data.declaration import Data
from cnnlib.data.sets import DataSet, Description, StreamedSet, load, open_splits
from cnnlib.data.sources import Arrays, Split
from cnnlib.data.stream import chunks, steps_a_chunk
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.spec.notation import parse_model
from cnnlib.system import files
from cnnlib.train import checkpoint, sharding
from cnnlib.train.feeds import ArmFeed, Resident, Streamed
from cnnlib.train.programs import Programs, compile_programs, memory_of, numbers_of

NET = "conv:8@3 relu max:2 conv:16@3 relu max:2 dense:classes"
LANES = (1, 2, 8, 32)
SIDES = (32, 64, 128)
BLOCK = "residual(conv:8@3 relu conv:8@3)"
NETS = {
    "six residual blocks of 8 channels": f"conv:8@3 {' '.join([BLOCK] * 6)} avg:8 dense:classes",
    "twice three convolutions of 8 channels, then pooling": f"{'conv:8@3 relu ' * 3}max:2 {'conv:8@3 relu ' * 3}max:2 "
    "dense:classes",
}
MIB = 2**20


def seconds_of(experiment: Experiment, rounds: int, devices: int | None = None) -> tuple[float, int]:
    """Return the median time of an epoch of all lanes in seconds, and the memory of the epoch's program in bytes."""
    (arm,) = resolve(experiment)
    found = sharding.devices(devices)
    feed = Resident(load(arm.data), found)
    made = compile_programs(arm, feed, found)
    numbers, examples = made.spread.put(numbers_of(arm)), feed.examples(arm, made.spread)["train"]

    def epoch() -> None:
        states, _ = made.initialize(numbers)
        jax.block_until_ready(made.epoch(states, numbers, examples)[1].loss)  # type: ignore[no-untyped-call]

    times = interleaved([Contestant("epoch", epoch)], rounds)["epoch"]
    return float(np.median(times)), memory_of(made.epoch)


def experiment_of(side: int, lanes: int, count: int, net: str = NET, **fields: object) -> Experiment:
    """Return an experiment that has one arm and trains on generated images."""
    return Experiment(
        arms=(Arm("net", parse_model(net)),),
        data=Data(f"lines_{side}x{count}", stream=False),
        optim=Optim("sgd", learning_rate=(0.01,)),
        lanes=Lanes(seed=tuple(range(lanes))),
        epochs=1,
        batch_size=32,
        checkpoint=Checkpoint(every=0),
        **fields,  # type: ignore[arg-type]
    )


def lanes_and_devices(rounds: int) -> Table:
    """Time 32 steps with batches of 32 for all lanes: first on one device of all cores, then on one device per core."""
    rows = []
    for lanes in LANES:
        one, _ = seconds_of(experiment_of(32, lanes, 1024), rounds, 1)
        all_cores, _ = seconds_of(experiment_of(32, lanes, 1024), rounds)
        rows.append(
            {"lanes": str(lanes), "one device, ms per lane-step": 1e3 * one / lanes / 32}
            | {"all devices, ms per lane-step": 1e3 * all_cores / lanes / 32}
        )
    return Table("lanes and devices, 32x32 images, batch 32", rows)


def sides(rounds: int) -> Table:
    """Measure time and memory of a step of 32 images for each image side. Use `accumulate` and `remat`, or neither."""
    rows = []
    for side in SIDES:
        whole, memory = seconds_of(experiment_of(side, 1, 32), rounds, 1)
        pieces, less = seconds_of(experiment_of(side, 1, 32, accumulate=8, remat=True), rounds, 1)
        rows.append(
            {"side": str(side), "ms per step": 1e3 * whole, "MiB": memory / MIB}
            | {"ms, accumulate=8 remat": 1e3 * pieces, "MiB, accumulate=8 remat": less / MIB}
        )
    return Table("image sides, one lane, batch 32", rows)


def computed_again(rounds: int) -> Table:
    """Measure time and memory with and without `remat`. In these nets, maps between two poolings take most memory."""
    rows = []
    for what, net in NETS.items():
        kept, memory = seconds_of(experiment_of(64, 1, 32, net), rounds, 1)
        again, less = seconds_of(experiment_of(64, 1, 32, net, remat=True), rounds, 1)
        rows.append(
            {"net": what, "ms per step": 1e3 * kept, "MiB": memory / MIB}
            | {"ms, remat": 1e3 * again, "MiB, remat": less / MIB}
        )
    return Table("maps kept and computed again, 64x64 images, one lane, batch 32", rows)


def checkpoints(rounds: int) -> Table:
    """Time how long it takes to write a complete checkpoint, and how long training waits for it."""
    rows = []
    for size in (8, 64):
        taken = checkpoint.snapshot({"words": jax.numpy.arange(size * MIB // 4, dtype=np.uint32).reshape(8, -1)})
        whole, waits = [], []
        with tempfile.TemporaryDirectory() as folder, contextlib.closing(checkpoint.Checkpoints(Path(folder))) as kept:
            for number in range(rounds + 1):
                start = time.perf_counter()
                kept.save(number + 1, taken, {})
                waits.append(time.perf_counter() - start)
                kept.wait()
                assert kept.seconds is not None
                whole.append(kept.seconds)
        # The first save includes the time of imports.
        seconds, wait = (float(np.median(times[1:])) for times in (whole, waits))
        rows.append({"MiB": str(size), "seconds": seconds, "training waits, s": wait, "MiB per second": size / seconds})
    return Table("checkpoints", rows)


def lines(rounds: int) -> Table:
    """Time writing one line of `metrics.jsonl`. A run writes one line per lane and epoch."""
    line = {"arm": "net", "lane": 123, "seed": 123, "order_seed": 123, "learning_rate": 0.01, "momentum": 0.9}
    line |= {"weight_decay": 0.0, "label_smoothing": 0.0, "l1": 0.0, "l1_threshold": 0.0, "epoch": 12}
    line |= {f"{part}_{kind}": 0.123456789 for part in ("train", "validation") for kind in ("loss", "accuracy")}
    line |= {"status": "ok", "seconds": 1.23456789}
    with tempfile.TemporaryDirectory() as folder, files.JsonLines(Path(folder) / "metrics.jsonl") as metrics:
        seconds = interleaved([Contestant("lines", lambda: metrics.write([line] * 10_000), 10_000)], rounds)["lines"]
    size = len(json.dumps(line)) + 1
    return Table(
        "lines", [{"a lane and epoch": "metrics.jsonl", "bytes": str(size), "us": 1e6 * float(np.median(seconds))}]
    )


TELL = """
import os, sys, time
from cnnlib.train import multihost, sharding as mesh
mesh.use_cores(1)
joined = multihost.join(multihost.asked(True, "127.0.0.1:" + sys.argv[1], 2, int(sys.argv[2])))
with joined:
    joined.agreed(False)
    start = time.perf_counter()
    for _ in range(200):
        joined.agreed(False)
    if joined.is_first:
        print((time.perf_counter() - start) / 200, flush=True)
os._exit(0)
"""


def hosts() -> Table:
    """Time how long two processes on this machine take to agree on a value."""
    port = str(np.random.RandomState().randint(20_000, 30_000))
    command = [sys.executable, "-c", TELL, port]
    other = subprocess.Popen([*command, "1"], stdout=subprocess.DEVNULL)
    told = subprocess.run([*command, "0"], capture_output=True, text=True, check=True).stdout
    other.wait()
    return Table("two processes", [{"what": "agreeing", "ms": 1e3 * float(told.splitlines()[-1])}])


def streams() -> Table:
    """Measure how many examples per second a stream reads, for several numbers of workers. Nothing is trained."""
    rows = []
    for data, batch_size, workers in (("mnist5k", 100, 0), ("lines_256x8192", 64, 0), ("lines_256x8192", 64, 2)):
        source = open_splits(Data(data)).train
        steps = steps_a_chunk(source, batch_size)
        how = {"seed": 0, "reshuffle": True, "workers": workers}
        with contextlib.closing(chunks(source, batch_size=batch_size, steps=steps, **how)) as found:  # type: ignore[arg-type]
            count = 0
            next(found)
            start = time.perf_counter()
            while time.perf_counter() - start < 5:
                count += len(next(found).y)
            seconds = time.perf_counter() - start
        bytes_an_example = int(np.prod(source.input_shape)) * source.dtype.itemsize
        rows.append(
            {"data": f"{data}, {workers} workers", "examples a second": count / seconds}
            | {"MiB per second": count * bytes_an_example / MIB / seconds}
        )
    return Table("streams", rows)


def decoding() -> Table:
    """Measure how many PNG images per second one core reads from files of TFDS. Nothing is trained."""
    rows = []
    for side in (32, 224):
        drawn, _ = open_splits(Data(f"lines_{side}x512")).train.read(np.arange(512))
        colours = np.repeat(drawn, 3, axis=-1)
        labels = np.arange(512, dtype=np.int32) % 2
        with tempfile.TemporaryDirectory() as folder:
            image_folder.from_arrays(
                "drawn", folder, Split(colours, labels), Split(colours[:2], labels[:2]), ("a", "b")
            )
            source = open_splits(Data("drawn", data_dir=folder)).train
            count = 0
            source.read(np.arange(64))
            start = time.perf_counter()
            while time.perf_counter() - start < 5:
                count += len(source.read(np.arange(source.count)).y)
            rows.append({"PNG files": f"{side}x{side}x3", "examples a second": count / (time.perf_counter() - start)})
    return Table("decoding", rows)


def feeds(rounds: int) -> Table:
    """Time an epoch of 60,000 images of 28x28. All are on the device, or they come in chunks from the host's memory."""
    random = np.random.RandomState(0)
    x = random.randint(0, 256, (60_000, 28, 28, 1)).astype(np.uint8)
    y = random.randint(0, 10, 60_000).astype(np.int32)
    known = Description("random", (28, 28, 1), 10, {"train": 60_000, "validation": 0, "test": 100})
    measures = (np.full(1, 127.5, np.float32), np.full(1, 74.0, np.float32))
    none, few = Split(x[:0], y[:0]), Split(x[:100], y[:100])
    data_set = DataSet(known, Split(x, y), none, few, *measures)
    streamed = StreamedSet(known, Arrays(x, y), Arrays(*none), Arrays(*few), *measures)
    rows = []
    for net in ("lenet_300_100", "lenet5"):
        experiment = Experiment(
            arms=(Arm(net, ARCHITECTURES.get(net)),),
            data=Data("mnist5k"),
            lanes=Lanes(seed=(0, 1)),
            epochs=1,
            checkpoint=Checkpoint(every=0),
        )
        (arm,) = resolve(experiment, lambda data: known)
        devices = sharding.devices()
        made = {}
        for name, feed in (("on the device", Resident(data_set, devices)), ("streamed", Streamed(streamed))):
            programs = compile_programs(arm, feed, devices)
            made[name] = (programs, feed.to(arm, programs, None, 0.0))

        def epoch(programs: Programs, fed: ArmFeed, arm: TrainedArm = arm) -> None:
            numbers = programs.spread.put(numbers_of(arm))
            states, _ = programs.initialize(numbers)
            jax.block_until_ready(fed.train(states, numbers)[1].loss)  # type: ignore[no-untyped-call]

        entries = [Contestant(name, partial(epoch, *pair)) for name, pair in made.items()]
        times = interleaved(entries, rounds)
        ratio = np.divide(times["streamed"], times["on the device"])
        fed = made["streamed"][1]
        rows.append(
            {"net, 2 lanes": net, "s on the device": float(np.median(times["on the device"]))}
            | {"s streamed": float(np.median(times["streamed"])), "ratio": float(np.median(ratio))}
            | {"share waited": fed.waited / (sum(times["streamed"]) * (1 + 1 / rounds))}
        )
        fed.close()
    return Table(f"an epoch of 60,000 28x28 images, batch 128, median of {rounds} rounds", rows)


PEAK = """
import json, resource, subprocess, sys, time
start = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
print(json.dumps([time.perf_counter() - start, peak]))
"""
LARGE_NET = "conv:8@5 relu max:4 conv:16@3 relu max:4 conv:16@3 relu max:4 dense:classes"
LARGE = {
    "20 GB, 256x256, an epoch and its evaluation": ("conv:8@5/4 relu max:4 dense:classes", "lines_256x300000", []),
    "1000x1000": (LARGE_NET, "lines_1000x256", []),
    "1000x1000, accumulate=16": (LARGE_NET, "lines_1000x256", ["accumulate=16"]),
    "1000x1000, accumulate=16 remat=true": (LARGE_NET, "lines_1000x256", ["accumulate=16", "remat=true"]),
}


def large() -> Table:
    """Time whole streamed runs, and measure the peak memory of the training process."""
    rows = []
    for what, (net, data, fields) in LARGE.items():
        with tempfile.TemporaryDirectory() as folder:
            how = ["data.stream=true", "data.validation=0", "epochs=1", "lanes.seed=0", "batch_size=32", *fields]
            how += ["optim.learning_rate=0.01", f"arms.lenet5.model={net}", f"data.name={data}"]
            run = [sys.executable, "-m", "cnnlib", "run", "fc_vs_conv", "arms=lenet5", *how]
            command = [sys.executable, "-c", PEAK, *run, "--wandb", "off", "--out", folder]
            told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            (arm,) = json.loads((Path(folder) / "results.json").read_text())["arms"]
            seconds, peak = json.loads(told)
            rows.append(
                {"run": what, "s in all": seconds, "s training": arm["train_seconds_per_lane"]}
                | {"share waited": arm["waited_seconds"] / arm["train_seconds_per_lane"], "peak MiB": peak}
            )
    return Table("streamed runs, one lane, batch 32", rows)


PIECES: dict[str, Callable[[int], Table]] = {
    "feeds": feeds,
    "lanes": lanes_and_devices,
    "sides": sides,
    "remat": computed_again,
    "checkpoints": checkpoints,
    "lines": lines,
    "hosts": lambda rounds: hosts(),
    "streams": lambda rounds: streams(),
    "decoding": lambda rounds: decoding(),
    "large": lambda rounds: large(),
}


def measure(rounds: int, only: str) -> Iterator[Table]:
    """Yield the table of every piece whose name contains the text `only`."""
    yield from (piece(rounds) for name, piece in PIECES.items() if only in name)
