"""Compare seeds per minute on MNIST-1D, in cnnlib and in PyTorch. PyTorch follows the protocol of the paper's notebook.

The notebook trains one seed at a time, eagerly: Adam, learning rate 0.01, batches of 100 in one fixed order. It fetches
the loss of each step and measures accuracy every 250 steps (Greydanus and Kobak, arXiv 2011.14439). cnnlib and the
notebook train the same nets for the same number of steps. Neither time includes making the data. The table has cnnlib's
time with compilation and without it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from cnnlib.experiments.mnist1d import mnist1d

from benchmarks.peers import torch_is_missing
from benchmarks.timing import Table
from cnnlib.config.overrides import override
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Experiment
from cnnlib.data.sets import load
from cnnlib.errors import UserError
from cnnlib.train import sharding
from cnnlib.train.feeds import Resident
from cnnlib.train.programs import compile_programs, numbers_of

EVALUATE_EVERY = 250


def torch_net(name: str) -> Any:
    """Return one of the notebook's nets. Its convolutions take signals of shape `(batch, channel, place)`."""
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = nn.Linear(40, 100), nn.Linear(100, 100), nn.Linear(100, 10)

        def forward(self, x: Any) -> Any:
            h = self.first(x).relu()
            return self.third(h + self.second(h).relu())

    class Cnn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(1, 25, 5, stride=2, padding=1)
            self.second, self.third = (nn.Conv1d(25, 25, 3, stride=2, padding=1) for _ in range(2))
            self.last = nn.Linear(125, 10)

        def forward(self, x: Any) -> Any:
            h = self.third(self.second(self.first(x[:, None]).relu()).relu()).relu()
            return self.last(h.flatten(1))

    return {"logistic": lambda: nn.Linear(40, 10), "mlp": Mlp, "cnn": Cnn}[name]()


def torch_seconds(name: str, seed: int, steps: int, data: Any) -> float:
    """Return how many seconds the notebook's loop takes to train one seed."""
    import torch

    torch.manual_seed(seed)
    net = torch_net(name)
    rule = torch.optim.Adam(net.parameters(), lr=0.01)
    x, y, x_test, y_test = (torch.as_tensor(array) for array in data)
    x, x_test = x.float(), x_test.float()
    y, y_test = y.long(), y_test.long()
    start = time.perf_counter()
    losses = []
    for step in range(steps):
        at = step * 100 % len(y)
        loss = torch.nn.functional.cross_entropy(net(x[at : at + 100]), y[at : at + 100])
        loss.backward()
        rule.step()
        rule.zero_grad()
        losses.append(loss.item())
        if step % EVALUATE_EVERY == 0:
            with torch.no_grad():
                _ = [(net(a).argmax(-1) == b).float().mean().item() for a, b in ((x, y), (x_test, y_test))]
    return time.perf_counter() - start


def our_program(experiment: Experiment) -> tuple[Callable[[], None], float]:
    """Return a function that trains all lanes of the experiment's arm from scratch, and the compile time in seconds."""
    (arm,) = resolve(experiment)
    devices = sharding.devices()
    feed = Resident(load(arm.data), devices)
    programs = compile_programs(arm, feed, devices)
    numbers, examples = programs.spread.put(numbers_of(arm)), feed.examples(arm, programs.spread)["train"]

    def call() -> None:
        states, _ = programs.initialize(numbers)
        for _ in range(experiment.epochs):
            states, sums = programs.epoch(states, numbers, examples)
        jax.block_until_ready(sums)  # type: ignore[no-untyped-call]

    return call, programs.compile_seconds


def measure(rounds: int, epochs: int, lanes: int) -> Table:
    """Compare seeds per minute of each net. A round trains one seed in PyTorch and all lanes in one cnnlib program."""
    if missing := torch_is_missing():
        raise UserError(missing)
    names = ("logistic", "mlp", "cnn")
    changes = [f"epochs={epochs}", f"lanes.seed=0..{lanes - 1}"]
    ours = {name: our_program(override(mnist1d(), [f"arms={name}", *changes])) for name in names}
    whole = load(mnist1d().data)
    data = (whole.train.x[..., 0], whole.train.y, whole.test.x[..., 0], whole.test.y)
    times: dict[tuple[str, str], list[float]] = {}
    for number in range(rounds + 1):
        for name, (call, _) in ours.items():
            theirs = torch_seconds(name, number, 40 * epochs, data)
            start = time.perf_counter()
            call()
            if number:  # the first round warms up
                times.setdefault((name, "theirs"), []).append(theirs)
                times.setdefault((name, "ours"), []).append((time.perf_counter() - start) / lanes)
    rows = []
    for name, (_, compilation) in ours.items():
        own, their = np.asarray(times[name, "ours"]), np.asarray(times[name, "theirs"])
        compiled = own + compilation / lanes
        rows.append(row(name, own, their, compiled))
    own, their = (sum(np.asarray(times[name, side]) for name in names) for side in ("ours", "theirs"))
    rows.append(row("all three", own, their, own + sum(seconds for _, seconds in ours.values()) / lanes))
    return Table(f"MNIST-1D, {40 * epochs} steps a seed, {lanes} lanes, {rounds} rounds in turn", rows)


def row(name: str, ours: Any, theirs: Any, compiled: Any) -> dict[str, Any]:
    """Return the median times of cnnlib and PyTorch, and the median over rounds of the ratio of the two times."""
    return {
        "net": name,
        "PyTorch, s per seed": float(np.median(theirs)),
        "ours, s per seed": float(np.median(ours)),
        "times the seeds per minute": f"{np.median(theirs / ours):.1f}",
        "lowest": f"{np.min(theirs / ours):.1f}",
        "with compilation": f"{np.median(theirs / compiled):.1f}",
    }
