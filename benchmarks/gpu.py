"""Time lanes on a GPU in cnnlib, stock Flax and PyTorch, and compare the results of the GPU with those of a CPU.

Each finished row is written to `--rows FILE`. From the first rows, we choose the defaults of cnnlib.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.nets import BATCH, EXAMPLES, NETS, Epoch, Rows, epoch_of, model_of, stock_operations
from benchmarks.timing import Contestant, Table, blocked, timed
from cnnlib.aot.compiling import report_of
from cnnlib.aot.hardware import GPUS, Target
from cnnlib.config.schema import LaneNumbers
from cnnlib.ops.kernels import Kernels
from cnnlib.ops.primitives import compiled_for
from cnnlib.system.provenance import versions
from cnnlib.train import evaluate as evaluation
from cnnlib.train import step as train
from cnnlib.train.step import Examples

Key = tuple[Any, ...]
Row = dict[str, Any]
TIMED = ("lenet5", "two_conv", "mnist1d_cnn", "lenet_300_100")
"""Networks of `NETS` to time."""
PRECISIONS = ("highest", "default")
"""Precisions of float32 products with which losses are compared."""
CALLS = 3
"""Number of timed calls. One warm-up call precedes them."""
DOCS = Path(__file__).parents[1] / "docs"


class Form(NamedTuple):
    """A way to run lanes."""

    kernels: Kernels
    """Which implementation of cnnlib's operations to use."""
    at_a_time: int | None
    """Number of vectorised lanes; None means all."""
    is_stock: bool = False
    """Whether XLA's convolutions and pooling replace cnnlib's operations."""


FORMS = {
    "ours, all lanes at once": Form("gpu", None),
    "ours, 8 at a time": Form("gpu", 8),
    "ours, one at a time": Form("gpu", 1),
    "ours, one at a time in blocks": Form("tpu", 1),
    "stock, all lanes at once": Form("xla", None, is_stock=True),
    "stock, one at a time": Form("xla", 1, is_stock=True),
}


class Sizes(NamedTuple):
    """Sizes of the measurements."""

    batch: int = BATCH
    examples: int = EXAMPLES
    lanes: tuple[int, ...] = (64, 8, 1, 256)
    """Lane counts. The rows of the first lane count are measured first: from these rows we choose the defaults."""
    product: int = 8192
    """Rows and columns of the matrix product."""
    copied: int = 2**30
    """Bytes to copy."""
    steps: int = 100
    """Number of training steps before the second comparison of losses."""
    experiments: tuple[str, ...] = ("fc_vs_conv", "mnist1d")
    """Experiments to run as a whole."""
    overrides: tuple[str, ...] = ()
    """Overrides of `experiments`."""
    resumed: tuple[str, ...] = ("arms=lenet5", "lanes.seed=0,1", "epochs=1000")
    """Overrides of `fc_vs_conv` for the killed run. The run must be long enough for a checkpoint."""
    checks: bool = True
    """Whether to run `cnnlib check`."""


TINY = Sizes(
    batch=4,
    examples=8,
    lanes=(2, 1),
    product=64,
    copied=2**12,
    steps=3,
    experiments=("fc_vs_conv",),
    overrides=("arms=mlp_75_33", "data.train=200", "epochs=2", "lanes.seed=0,1"),
    resumed=("arms=mlp_75_33", "data.train=200", "epochs=20", "lanes.seed=0,1"),
    checks=False,
)
"""Small sizes for a rehearsal on a CPU."""


def target_here() -> Target | None:
    """Return the device as a target for estimates, or None if `GPUS` lacks the published figures of the device."""
    kind = jax.devices()[0].device_kind.lower()
    return next((Target("cuda", known, name, 1) for name, known in GPUS.items() if name in kind), None)


# Upper limits of the hardware.


def product_row(size: int, dtype: str, precision: str) -> Row:
    """Time a product of square matrices."""
    a = jnp.ones((size, size), dtype)
    seconds = median(blocked(jax.jit(functools.partial(jnp.matmul, precision=precision)), a, a))
    return {"size": size, "teraflops_per_second": 2 * size**3 / seconds / 1e12}


def copy_row(size: int) -> Row:
    """Time a copy within device memory. The copy reads `size` bytes and writes `size` bytes."""
    seconds = median(blocked(jax.jit(lambda a: a + 1), jnp.ones(size // 4, jnp.float32)))
    return {"bytes": size, "gigabytes_per_second": 2 * size / seconds / 1e9}


def median(work: Callable[[], Any], units: int = 1) -> float:
    """Return seconds per unit of `work`: the median of `CALLS` calls after one warm-up call."""
    work()
    return float(np.median([timed(Contestant("", work, units)) for _ in range(CALLS)]))


# Lanes.


def arrays_of(epoch: Epoch) -> tuple[LaneNumbers, Examples]:
    """Make hyperparameters for each lane, and examples. An example is noise with a bright band; its place is the class.

    Return NumPy arrays, which any device accepts.
    """
    lanes = len(epoch.numbers.seed)
    seeds = np.arange(lanes, dtype=np.uint32)
    values = {"seed": seeds, "order_seed": seeds, "learning_rate": 0.01, "momentum": 0.9}
    numbers = LaneNumbers(
        *(
            np.broadcast_to(np.asarray(values.get(name, 0.0), like.dtype), (lanes,))
            for name, like in zip(LaneNumbers._fields, epoch.numbers, strict=True)
        )
    )
    random = np.random.RandomState(0)
    x, y = epoch.examples.x, random.randint(0, 10, epoch.examples.y.shape)
    noise = random.randint(0, 128, x.shape)
    width = x.shape[1] // 10
    place = np.arange(x.shape[1]) // width == y[:, None]
    bright = noise + 100 * place.reshape(*place.shape, *[1] * (x.ndim - 2))
    channels = x.shape[-1]
    mean, std = np.full(channels, 64, np.float32), np.full(channels, 64, np.float32)
    arrays: Any = (bright.astype(x.dtype), y.astype(np.int32), mean, std)
    return numbers, Examples(*arrays)


def lanes_row(sizes: Sizes, net: str, lanes: int, dtype: str, form: str) -> Row:
    """Time epochs of all lanes, and estimate the time of an epoch from the compiled program."""
    how = FORMS[form]
    epoch = epoch_of(net, lanes, dtype, how.at_a_time or lanes, sizes.batch, sizes.examples, "sgd")
    numbers, examples = jax.device_put(arrays_of(epoch))
    with compiled_for(how.kernels), stock_operations() if how.is_stock else contextlib.nullcontext():
        state = jax.jit(train.over_lanes(train.initialize(epoch.recipe), 1))(numbers)
        lowered = epoch.function.lower(state, numbers, examples)
    start = time.perf_counter()
    program = lowered.compile()
    compiling = time.perf_counter() - start

    def work() -> None:
        nonlocal state
        state, sums = program(state, numbers, examples)
        jax.block_until_ready(sums)

    seconds = median(work, epoch.steps)
    target = target_here()
    report = report_of(program, compiling, target) if target else None
    return {
        "microseconds_per_lane_step": 1e6 * seconds,
        "estimated_microseconds_per_lane_step": 1e6 * report.seconds / epoch.steps if report else None,
        "lane_steps_per_second": 1 / seconds,
        "compile_seconds": round(compiling, 1),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def torch_row(sizes: Sizes, net: str, lanes: int, how: str) -> Row:
    """Time PyTorch's training steps; `how` is the way to run them."""
    if problem := peers.torch_is_missing():
        raise RuntimeError(problem)
    model, shape, random = model_of(net), NETS[net][1], np.random.RandomState(0)
    x, y = random.normal(size=(sizes.batch, *shape)).astype(np.float32), random.randint(0, 10, sizes.batch)
    step = {
        "eager": lambda: peers.torch_step(model, x, y, channels_last=False, models=lanes),
        "vmap": lambda: peers.torch_func_step(model, x, y, lanes),
        "CUDA graph": lambda: peers.torch_graph_step(model, x, y),
    }[how]()
    steps = sizes.examples // sizes.batch
    seconds = median(lambda: [step() for _ in range(steps)], steps * lanes)
    return {"microseconds_per_lane_step": 1e6 * seconds, "lane_steps_per_second": 1 / seconds}


# Are the results correct?


def losses_row(sizes: Sizes, net: str, precision: str) -> Row:
    """Train the same 2 lanes on GPU and CPU. Compare their losses after 1 step and after `sizes.steps` steps."""
    found: Row = {}
    for steps in (1, sizes.steps):
        losses = []
        for device, kernels in ((jax.devices()[0], None), (jax.devices("cpu")[0], "xla")):
            epoch = epoch_of(net, 2, "float32", 1, sizes.batch, steps * sizes.batch, "sgd")
            # `default_device` sets the device of JAX's arrays. `compiled_for` sets the operations that are traced.
            with jax.default_device(device), jax.default_matmul_precision(precision), compiled_for(kernels):
                numbers, examples = jax.device_put(arrays_of(epoch), device)
                state = jax.jit(train.over_lanes(train.initialize(epoch.recipe), 1))(numbers)
                state, _ = epoch.function(state, numbers, examples)
                evaluate = train.over_lanes(evaluation.evaluate(epoch.recipe), 1, lane_arguments=2)
                sums = jax.jit(evaluate)(state.parameters, state.statistics, examples)
                losses.append(np.asarray(sums.loss) / np.asarray(sums.examples))
        here, there = losses
        found |= {
            f"loss_after_{steps}": float(there.mean()),
            f"difference_after_{steps}": float(abs(here - there).max()),
        }
    return found


def experiments_command(*arguments: str) -> list[str]:
    """Return the command line that runs `cnnlib` with `arguments`."""
    return [sys.executable, "-m", "cnnlib", *arguments]


def completed(*arguments: str) -> str:
    """Run `cnnlib` and return its output. If it fails, raise RuntimeError with the last line of the output."""
    done = subprocess.run(experiments_command(*arguments), capture_output=True, text=True, cwd=DOCS.parent)
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or done.stdout.strip()).splitlines()[-1])
    return done.stdout


def accuracies(results: Row) -> dict[str, float]:
    """Return the mean test accuracy of each arm."""
    return {arm["name"]: float(np.mean([lane["test_accuracy"] for lane in arm["lanes"]])) for arm in results["arms"]}


def fingerprints(results: Row) -> list[str]:
    """Return the fingerprint of each lane's trained parameters."""
    return [lane["parameters_sha256"] for arm in results["arms"] for lane in arm["lanes"]]


def run_row(name: str, overrides: Sequence[str]) -> Row:
    """Run the whole experiment `name`. Return its results and the stored results of a CPU in one row."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        completed("run", name, *overrides, "--out", folder)
        results = json.loads(Path(folder, "results.json").read_text())
    stored = json.loads((DOCS / name / "results.json").read_text())
    return {
        "overrides": list(overrides),
        "seconds": round(time.perf_counter() - start, 1),
        "accuracy": accuracies(results),
        "stored_accuracy": accuracies(stored),
        "stored_on": stored["device"],
    }


def resumed_row(overrides: Sequence[str]) -> Row:
    """Run `fc_vs_conv` twice and compare. The second run is killed after its first checkpoint, then resumed."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("whole", "killed"):
            out = Path(folder, name)
            arguments = ("run", "fc_vs_conv", *overrides, "checkpoint.share=1", "--out", str(out))
            if name == "killed":
                quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
                with subprocess.Popen(experiments_command(*arguments), **quiet, cwd=DOCS.parent) as process:
                    while process.poll() is None and not any(out.glob("checkpoints/*/[0-9]*")):
                        time.sleep(0.01)
                    process.kill()
                arguments += ("--resume",)
            completed(*arguments)
            found[name] = json.loads((out / "results.json").read_text())
    return {
        "overrides": list(overrides),
        "resumed_after_epochs": [session["in_flight"] for session in found["killed"]["resumed"]],
        "is_the_same_bit_for_bit": fingerprints(found["killed"]) == fingerprints(found["whole"]),
    }


def check_row() -> Row:
    """Check the backend with `cnnlib check`."""
    return {"says": completed("check").strip().splitlines()[-1]}


# All rows.


def device_row() -> Row:
    """Describe the device and the software."""
    found: Row = {"platform": jax.devices()[0].platform, "versions": versions()}
    if (smi := shutil.which("nvidia-smi")) is not None:
        query = "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm"
        told = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True)
        found["nvidia_smi"] = told.stdout.strip()
    return found


def plan(sizes: Sizes) -> Iterator[tuple[Key, Callable[[], Row]]]:
    """Yield the key of each row and the function that makes the row. The most informative rows come first."""
    yield ("device",), device_row
    for dtype, precision in (("bfloat16", "default"), ("float32", "default"), ("float32", "highest")):
        yield ("product", dtype, precision), functools.partial(product_row, sizes.product, dtype, precision)
    yield ("copy",), functools.partial(copy_row, sizes.copied)
    first, *others = sizes.lanes
    yield from lanes_of(sizes, first, "float32")
    yield from torch_of(sizes, TIMED[0])
    for precision in PRECISIONS:
        yield ("losses", TIMED[0], precision), functools.partial(losses_row, sizes, TIMED[0], precision)
    for name in sizes.experiments:
        yield ("run", name), functools.partial(run_row, name, sizes.overrides)
    yield ("resumed",), functools.partial(resumed_row, sizes.resumed)
    if sizes.checks:
        yield ("check",), check_row
    for lanes in others:
        yield from lanes_of(sizes, lanes, "float32")
    for net in TIMED[1:]:
        yield from torch_of(sizes, net)
    yield from lanes_of(sizes, first, "bfloat16")


def lanes_of(sizes: Sizes, lanes: int, dtype: str) -> Iterator[tuple[Key, Callable[[], Row]]]:
    """Yield the key and function of each row with one lane count.

    Skip a form that equals another form. If a net has no windows, it has no other operations to compare. If `at_a_time`
    is `lanes` or more, the form equals the form that vectorises all lanes.
    """
    for net, (form, how) in itertools.product(TIMED, FORMS.items()):
        has_windows = model_of(net).connectivity != "full"
        is_all_at_once = how.at_a_time is not None and how.at_a_time >= lanes and how.kernels != "tpu"
        if not is_all_at_once and (has_windows or how.kernels == "gpu"):
            yield ("lanes", net, lanes, dtype, form), functools.partial(lanes_row, sizes, net, lanes, dtype, form)


def torch_of(sizes: Sizes, net: str) -> Iterator[tuple[Key, Callable[[], Row]]]:
    """Yield the key and function of each row of PyTorch."""
    for count, how in ((1, "eager"), (1, "CUDA graph"), (sizes.lanes[0], "vmap")):
        yield ("PyTorch", net, count, how), functools.partial(torch_row, sizes, net, count, how)


def measure(seconds: float, path: Path, sizes: Sizes) -> Iterator[Table]:
    """Make rows. After `seconds` seconds, start no new row, and yield tables of all rows in the file."""
    made_with = {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
    until, rows, wanted = time.monotonic() + seconds, Rows(path, made_with), list(plan(sizes))
    for key, make in wanted:
        if time.monotonic() > until and key not in rows.known:
            continue
        row = rows.of(key, make)
        print(json.dumps(row), flush=True)
    missing = sum(key not in rows.known for key, _ in wanted)
    yield from tables(rows)
    yield Table(
        "rows", [{"file": str(path), "made": len(wanted) - missing, "left for the same command again": missing}]
    )


def tables(rows: Rows) -> Iterator[Table]:
    """Arrange the rows as readable tables."""
    of: dict[str, list[tuple[Key, Row]]] = {}
    for (kind, *key), row in rows.known.items():
        of.setdefault(kind, []).append((tuple(key), row))
    ceilings = [
        {"ceiling": " ".join(["product", *key]), "measured": row.get("teraflops_per_second"), "unit": "TFLOP/s"}
        for key, row in of.get("product", [])
    ]
    ceilings += [
        {"ceiling": "copy", "measured": row.get("gigabytes_per_second"), "unit": "GB/s"}
        for _, row in of.get("copy", [])
    ]
    if ceilings:
        yield Table("ceilings", ceilings)
    timed_rows = [
        {
            "net": net,
            "lanes": lanes,
            "who": who,
            "us": row.get("microseconds_per_lane_step"),
            "estimate": row.get("estimated_microseconds_per_lane_step"),
            "compile_s": row.get("compile_seconds"),
        }
        for (net, lanes, who), row in (
            *(((net, lanes, f"{form}, {dtype}"), row) for (net, lanes, dtype, form), row in of.get("lanes", [])),
            *(((net, lanes, f"PyTorch, {how}"), row) for (net, lanes, how), row in of.get("PyTorch", [])),
        )
    ]
    if timed_rows:
        yield Table("microseconds per lane-step, measured and estimated", timed_rows)
    if "losses" in of:
        yield Table(
            "largest difference of losses from the CPU's",
            [
                {"net, precision": ", ".join(key)}
                | {name.replace("_", " "): f"{value:.2g}" for name, value in row.items() if "_after_" in name}
                for key, row in of["losses"]
            ],
        )
    arms = [
        {
            "run": f"{name} {arm}",
            "share_right": accuracy,
            "share_right_on_a_CPU": row["stored_accuracy"].get(arm, math.nan),
        }
        for (name,), row in of.get("run", [])
        for arm, accuracy in row.get("accuracy", {}).items()
    ]
    if arms:
        yield Table("mean test accuracy of whole runs, beside the stored results", arms)
    others = [
        {"row": ", ".join(map(str, key)), "says": row["failed"]} for key, row in rows.known.items() if "failed" in row
    ]
    others += [{"row": "check", "says": row["says"]} for _, row in of.get("check", []) if "says" in row]
    others += [
        {"row": "resumed", "says": f"{'the same' if row['is_the_same_bit_for_bit'] else 'not the same'} bit for bit"}
        for _, row in of.get("resumed", [])
        if "failed" not in row
    ]
    if others:
        yield Table("check, resumed run, failures", others)
