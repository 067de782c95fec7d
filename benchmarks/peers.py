"""Build the same networks without cnnlib: in stock Flax, and in PyTorch if it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from cnnlib.spec.layers import Activation, Conv, Dense, MaxPool
from cnnlib.spec.model import Model
from cnnlib.spec.window import per_axis

LEARNING_RATE, MOMENTUM = 0.05, 0.9


class StockFlax(nn.Module):
    """A cnnlib model built from `nn.Conv`, `nn.Dense` and `nn.max_pool`."""

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
    """Return `init(key, x)` and `step(state, x, y)`: functions that train one stock Flax model by SGD with momentum."""
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


def stacked_init(init: Callable[..., Any], x: jax.Array, lanes: int) -> Any:
    """Return the states of `lanes` stock models, stacked for `jax.vmap`."""
    return jax.jit(jax.vmap(init, (0, None)))(jax.random.split(jax.random.key(0), lanes), jnp.asarray(x))


def torch_is_missing() -> str | None:
    """Return None if PyTorch can run, else a line that says why it is left out. cnnlib does not depend on PyTorch."""
    if importlib.util.find_spec("torch") is None:
        return "PyTorch is not installed (extra `bench`): its rows are missing"
    import torch

    if jax.devices()[0].platform == "gpu" and not torch.cuda.is_available():
        return "this PyTorch sees no GPU: its rows are missing"
    return None


def torch_net(model: Model, shape: tuple[int, ...]) -> Any:
    """Return the model as a `torch.nn.Sequential`. `shape` is the channels-last shape of one example."""
    import torch

    layers: list[Any] = []
    flat = False
    for layer, output_shape in zip(model.layers, model.shapes(shape), strict=True):
        match layer:
            case Conv():
                padding = {"SAME": "same", "VALID": "valid"}.get(str(layer.padding), layer.padding)
                convolution = torch.nn.Conv1d if len(shape) == 2 else torch.nn.Conv2d
                layers.append(
                    convolution(shape[-1], layer.features, layer.kernel_size, stride=layer.strides, padding=padding)
                )
            case Dense():
                layers += [] if flat else [torch.nn.Flatten()]
                flat = True
                layers.append(torch.nn.Linear(int(np.prod(shape)), layer.num_units))
            case MaxPool():
                layers.append(torch.nn.MaxPool2d(layer.window_shape))
            case Activation():
                layers.append(torch.nn.ReLU())
        shape = output_shape
    return torch.nn.Sequential(*layers)


def torch_batch(x: np.ndarray, y: np.ndarray, channels_last: bool) -> tuple[Any, Any]:
    """Return the batch as PyTorch tensors on the device that JAX uses. The array `x` is channels-last float32."""
    import torch

    device = "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
    images = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))).to(device)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    return images, torch.from_numpy(y.astype(np.int64)).to(device)


def torch_finished() -> None:
    """Wait until PyTorch's GPU work is finished. On a CPU this does nothing, as each call returns after its work."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def torch_step(
    model: Model, x: np.ndarray, y: np.ndarray, channels_last: bool, models: int = 1, compiled: bool = False
) -> Callable[[], None]:
    """Return a function that trains `models` networks in turn for one step each, eagerly or with `torch.compile`."""
    import torch

    images, labels = torch_batch(x, y, channels_last)
    nets = [torch_net(model, x.shape[1:]).to(images.device) for _ in range(models)]
    if channels_last:
        nets = [net.to(memory_format=torch.channels_last) for net in nets]
    rules = [torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM) for net in nets]
    if compiled:
        nets = [torch.compile(net) for net in nets]

    def step() -> None:
        for net, rule in zip(nets, rules, strict=True):
            rule.zero_grad(set_to_none=True)
            torch.nn.functional.cross_entropy(net(images), labels).backward()
            rule.step()
        torch_finished()

    return step


def torch_func_step(model: Model, x: np.ndarray, y: np.ndarray, models: int) -> Callable[[], None]:
    """Return a function that trains `models` networks at once for one step. It uses `torch.func.vmap`."""
    import torch
    from torch.func import functional_call, grad, stack_module_state, vmap

    images, labels = torch_batch(x, y, channels_last=False)
    nets = [torch_net(model, x.shape[1:]).to(images.device) for _ in range(models)]
    parameters, _ = stack_module_state(nets)
    parameters = {name: value.detach() for name, value in parameters.items()}
    momenta = {name: torch.zeros_like(value) for name, value in parameters.items()}
    skeleton = nets[0]

    def loss(parameters: Any, images: Any, labels: Any) -> Any:
        return torch.nn.functional.cross_entropy(functional_call(skeleton, parameters, (images,)), labels)

    gradients_of = vmap(grad(loss), in_dims=(0, None, None))

    def step() -> None:
        with torch.no_grad():
            for name, gradient in gradients_of(parameters, images, labels).items():
                momenta[name].mul_(MOMENTUM).add_(gradient)
                parameters[name].sub_(momenta[name], alpha=LEARNING_RATE)
        torch_finished()

    return step


def torch_graph_step(model: Model, x: np.ndarray, y: np.ndarray) -> Callable[[], None]:
    """Return a function that trains one network for one step by replaying a CUDA graph.

    The graph is recorded as PyTorch's documentation of CUDA graphs says: after some steps on a side stream.

    Raises:
        RuntimeError: There is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("CUDA graphs need a GPU")
    images, labels = torch_batch(x, y, channels_last=False)
    net = torch_net(model, x.shape[1:]).to(images.device)
    rule = torch.optim.SGD(net.parameters(), LEARNING_RATE, MOMENTUM, fused=True)

    def one() -> None:
        rule.zero_grad(set_to_none=False)
        torch.nn.functional.cross_entropy(net(images), labels).backward()
        rule.step()

    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            one()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one()

    def step() -> None:
        graph.replay()
        torch_finished()

    return step
