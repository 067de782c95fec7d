"""The same networks as people write them without cnnlib: stock Flax, and PyTorch where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cnnlib.spec import Activation, Conv, Dense, MaxPool, Model, per_axis

LEARNING_RATE, MOMENTUM = 0.05, 0.9


class StockFlax(nn.Module):
    """A model of cnnlib built from `nn.Conv`, `nn.Dense` and `nn.max_pool`."""

    model: Model

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in self.model.layers:
            match layer:
                case Conv():
                    padding = ((layer.padding,) * 2,) * 2 if isinstance(layer.padding, int) else layer.padding
                    x = nn.Conv(layer.features, per_axis(layer.kernel_size, 2, "kernel"), padding=padding)(x)
                case Dense():
                    x = nn.Dense(layer.num_units)(x.reshape(x.shape[0], -1))
                case MaxPool():
                    window = per_axis(layer.window_shape, 2, "window")
                    x = nn.max_pool(x, window, strides=window)
                case Activation():
                    x = nn.relu(x)
                case _:
                    raise ValueError(f"the benchmarks' nets have no {layer}")
        return x


def stock_step(model: Model) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """`init(key, x)` and `step(state, x, y)` of one stock Flax model under SGD with momentum."""
    net, rule = StockFlax(model), optax.sgd(LEARNING_RATE, MOMENTUM)

    def init(key: jax.Array, x: jax.Array) -> Any:
        parameters = net.init(key, x)
        return parameters, rule.init(parameters)

    def step(state: Any, x: jax.Array, y: jax.Array) -> Any:
        parameters, optimizer_state = state

        def loss(parameters: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(net.apply(parameters, x), y).mean()

        update, optimizer_state = rule.update(jax.grad(loss)(parameters), optimizer_state, parameters)
        return optax.apply_updates(parameters, update), optimizer_state

    return init, step


def has_torch() -> bool:
    """Whether PyTorch is installed: it is a peer, not a dependency."""
    return importlib.util.find_spec("torch") is not None


def torch_step(model: Model, x: np.ndarray, y: np.ndarray, channels_last: bool) -> Callable[[], None]:
    """One eager training step of the same model in PyTorch, in place; `x` is channels-last float32."""
    import torch

    layers: list[Any] = []
    shape = x.shape[1:]
    flat = False
    for layer, output_shape in zip(model.layers, model.shapes(shape), strict=True):
        match layer:
            case Conv():
                padding = {"SAME": "same", "VALID": "valid"}.get(str(layer.padding), layer.padding)
                layers.append(torch.nn.Conv2d(shape[-1], layer.features, layer.kernel_size, padding=padding))
            case Dense():
                layers += [] if flat else [torch.nn.Flatten()]
                flat = True
                layers.append(torch.nn.Linear(int(np.prod(shape)), layer.num_units))
            case MaxPool():
                layers.append(torch.nn.MaxPool2d(layer.window_shape))
            case Activation():
                layers.append(torch.nn.ReLU())
        shape = output_shape
    net = torch.nn.Sequential(*layers)
    images = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    labels = torch.from_numpy(y.astype(np.int64))
    rule = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM)

    def step() -> None:
        rule.zero_grad(set_to_none=True)
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        rule.step()

    return step


def stacked_init(init: Callable[..., Any], x: jax.Array, lanes: int) -> Any:
    """The states of `lanes` stock models, stacked for `jax.vmap`."""
    return jax.jit(jax.vmap(init, (0, None)))(jax.random.split(jax.random.key(0), lanes), jnp.asarray(x))
