"""Measure milliseconds per lane-step (one step of one lane) for several lane counts, in cnnlib and other software."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.step import INPUT_SHAPE, batch_of, default_at_a_time, model_of, ours
from benchmarks.timing import Contestant, Table, blocked, interleaved, timed
from cnnlib.spec.counts import count
from cnnlib.spec.model import Model
from cnnlib.train.programs import free_memory

LANES = (1, 2, 4, 8, 16, 64, 256)
LONGEST = 20.0
"""Limit in seconds. If a call of a contestant takes longer, leave out this contestant here and at all later counts."""


def contestants(model: Model, batch_size: int, lanes: int, left_out: set[str]) -> list[Contestant]:
    """Return every way to train `lanes` models for one step, except the ways in `left_out`."""
    x, y = batch_of(batch_size)
    images, labels = jnp.asarray(x), jnp.asarray(y, jnp.int32)
    init, step = peers.stock_step(model)
    stepped = jax.jit(step)
    steps = {64: 8, 256: 3}.get(lanes, 16)  # the fixed cost of an epoch is divided by its steps

    def looped() -> Any:
        states = [jax.jit(init)(jax.random.key(lane), images) for lane in range(lanes)]
        return lambda: jax.block_until_ready([stepped(state, images, labels) for state in states])

    def vmapped() -> Any:
        states = peers.stacked_init(init, images, lanes)
        return blocked(jax.jit(jax.vmap(step, (0, None, None))), states, images, labels)

    makers: dict[str, tuple[Any, int]] = {
        "cnnlib, by default": (lambda: ours(model, batch_size, lanes, steps), lanes * steps),
        "cnnlib, one at a time": (lambda: ours(model, batch_size, lanes, steps, 1), lanes * steps),
        "cnnlib, all at a time": (lambda: ours(model, batch_size, lanes, steps, lanes), lanes * steps),
        "stock Flax, vmap": (vmapped, lanes),
        "stock Flax, loop over models": (looped, lanes),
    }
    if not peers.torch_is_missing():
        makers["PyTorch, loop over models, channels_last"] = (
            lambda: peers.torch_step(model, x, y, channels_last=True, models=lanes),
            lanes,
        )
        makers["PyTorch, torch.func.vmap"] = (lambda: peers.torch_func_step(model, x, y, lanes), lanes)
    for name, at_a_time in (("one", 1), ("all", lanes)):
        if default_at_a_time(model, lanes) == at_a_time:
            del makers[f"cnnlib, {name} at a time"]
    return [Contestant(name, make(), units) for name, (make, units) in makers.items() if name not in left_out]


def measure(net: str, batch_size: int, rounds: int, counts: tuple[int, ...] = LANES) -> Table:
    """Return a table: one row per contestant, one column per lane count. None means too slow, or too little memory."""
    model = model_of(net)
    left_out: set[str] = set()
    columns: dict[int, dict[str, float]] = {}
    names: list[str] = []
    # PyTorch's vmap does not report its memory use in advance. So add up all maps of all models, forward and backward.
    bytes_a_lane = 4 * 4 * batch_size * count(model, INPUT_SHAPE).activations
    for lanes in counts:
        if bytes_a_lane * lanes > free_memory(jax.devices()[0]):
            left_out |= {"PyTorch, torch.func.vmap", "stock Flax, vmap", "cnnlib, all at a time"}
        entries = []
        for entry in contestants(model, batch_size, lanes, left_out):
            entry.work()
            if timed(entry) * entry.units > LONGEST:
                left_out.add(entry.name)
            else:
                entries.append(entry)
        seconds = interleaved(entries, rounds)
        columns[lanes] = {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}
        names += [entry.name for entry in entries if entry.name not in names]
    rows = [
        {"ms per lane-step": name, **{f"{lanes} lanes": columns[lanes].get(name) for lanes in counts}} for name in names
    ]
    return Table(f"{net}, batch {batch_size}, median of {rounds} rounds", rows)
