"""Report the peak memory per lane of a program of one step. The compiler's number includes arguments and results."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from benchmarks import peers
from benchmarks.step import LANES, batch_of, model_of, our_epoch
from benchmarks.timing import Table
from cnnlib.train.programs import memory_of


def measure(net: str, batch_size: int) -> Table:
    """Return the peak memory of each program in MiB: the total, and the total divided by the number of lanes."""
    model = model_of(net)
    x, y = batch_of(batch_size)
    images, labels = jnp.asarray(x), jnp.asarray(y, jnp.int32)
    init, step = peers.stock_step(model)
    state, states = jax.jit(init)(jax.random.key(0), images), peers.stacked_init(init, images, LANES)
    programs = {
        "cnnlib, 1 lane": (our_epoch(model, batch_size, 1, 1, steps=1)[0], 1),
        f"cnnlib, {LANES} lanes, one at a time": (our_epoch(model, batch_size, LANES, 1, steps=1)[0], LANES),
        f"cnnlib, {LANES} lanes, all at a time": (our_epoch(model, batch_size, LANES, LANES, steps=1)[0], LANES),
        "stock Flax, one model": (jax.jit(step).lower(state, images, labels).compile(), 1),
        f"stock Flax, vmap of {LANES}": (
            jax.jit(jax.vmap(step, (0, None, None))).lower(states, images, labels).compile(),
            LANES,
        ),
    }
    rows = [
        {
            "peak MiB": name,
            "program": memory_of(program) / 2**20,
            "a lane": memory_of(program) / lanes / 2**20,
        }
        for name, (program, lanes) in programs.items()
    ]
    return Table(f"{net}, batch {batch_size}; one batch of examples on the device", rows)
