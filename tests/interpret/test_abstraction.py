"""Looking inside nets, with nets made by hand, loops and NumPy as oracles."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import logits

from cnnlib.data.sets import DataSet, Description, Split
from cnnlib.errors import UserError
from cnnlib.interpret.activations import BATCH_SIZE, activations, receptive_field
from cnnlib.interpret.evidence import class_evidence, last_map
from cnnlib.interpret.patches import first_filters, strongest_patches
from cnnlib.interpret.probes import PENALTIES, linear_probes, ridge
from cnnlib.interpret.trained import Net
from cnnlib.interpret.tuning import bars, orientation_tuning
from cnnlib.nn.equivalence import expand, parameter_shapes
from cnnlib.nn.network import network
from cnnlib.spec.notation import parse_model

pytestmark = pytest.mark.once

MODEL = "conv:3@3 norm relu max:2 residual(conv:3@3 relu) conv:4@2/2:valid tanh dense:5 relu dense:4"
IMAGES = np.random.RandomState(1).randint(0, 256, (7, 9, 8, 2)).astype(np.uint8)


def net_of(layers, input_shape, parameters=None, mean=0.0, deviation=1.0, seed=0):
    """A net of given or of random weights, with norms that have seen something."""
    model, draws = parse_model(layers), np.random.RandomState(seed)
    drawn = jax.tree.map(
        lambda like: draws.normal(0, 0.5, like.shape).astype(np.float32), parameter_shapes(model, input_shape)
    )
    channels = input_shape[-1]
    statistics = {
        f"layer_{index}": {"mean": np.full(3, 0.2, np.float32), "variance": np.full(3, 1.7, np.float32)}
        for index, layer in enumerate(model.layers)
        if str(layer) == "norm"
    }
    means, deviations = (np.full(channels, value, np.float32) for value in (mean, deviation))
    return Net(model, drawn if parameters is None else parameters, statistics, input_shape, means, deviations, 0.0)


def prefix_of(net, layer, x):
    """The output of a layer of a model that ends there."""
    model = parse_model(" ".join(map(str, net.model.layers[: layer + 1])))
    parameters, statistics = jax.tree.map(jnp.asarray, (net.parameters, net.statistics))
    return jax.jit(network(model).apply)({"params": parameters, "batch_stats": statistics}, jnp.asarray(x))


def read_as(net, reading):
    parameters = expand(net.model, jax.tree.map(jnp.asarray, net.parameters), net.input_shape, reading)
    return net._replace(model=net.model.with_connectivity(reading), parameters=jax.device_get(parameters))


def filters_net(*filters, side=12):
    """A convolution of these kernels `(height, width)` on grey images."""
    kernel = np.stack(filters, axis=-1)[:, :, None, :].astype(np.float32)
    size = "x".join(map(str, kernel.shape[:2]))
    parameters = {"layer_0": {"kernel": kernel}}
    return net_of(f"conv:{len(filters)}@{size}:nobias", (side, side, 1), parameters)


# Activations.


def test_the_last_activations_are_the_logits_and_all_are_those_of_prefixes():
    net = net_of(MODEL, (9, 8, 2), mean=100.0, deviation=60.0)
    found = activations(net, IMAGES)
    assert [layer.shape[1:] for layer in found] == list(net.model.shapes((9, 8, 2)))
    seen = (IMAGES.astype(np.float32) - 100) / 60
    parameters, statistics = jax.tree.map(jnp.asarray, (net.parameters, net.statistics))
    whole = logits(network(net.model), parameters, statistics, jnp.asarray(seen))
    np.testing.assert_allclose(found[-1], whole, rtol=1e-5, atol=1e-5)
    for layer, output in enumerate(found):
        np.testing.assert_allclose(output, prefix_of(net, layer, seen), rtol=1e-5, atol=1e-5, err_msg=str(layer))
    # Rounding is the compiler's: it may compute a layer once for its own output, and again inside the next layer.
    pooled = found[2][:, :8].reshape(7, 4, 2, 4, 2, 3).max(axis=(2, 4))
    some = activations(net, IMAGES, (6, 0))
    for one, other in (
        (found[2], np.maximum(found[1], 0)),
        (found[3], pooled),
        (some[0], found[6]),
        (some[1], found[0]),
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_the_three_readings_have_the_same_activations():
    net = net_of(MODEL, (9, 8, 2), mean=100.0, deviation=60.0)
    found = activations(net, IMAGES)
    for reading in ("local", "full"):
        other = activations(read_as(net, reading), IMAGES)
        for layer, (one, two) in enumerate(zip(found, other, strict=True)):
            np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4, err_msg=f"{reading} {layer}")


def test_many_examples_go_through_in_batches_without_loss():
    net = net_of("dense:3 relu dense:2", (2, 2, 1))
    x = np.random.RandomState(0).normal(size=(2 * BATCH_SIZE + 3, 2, 2, 1)).astype(np.float32)
    hidden, output = activations(net, x, (0, 2))
    own = x.reshape(len(x), 4) @ net.parameters["layer_0"]["kernel"] + net.parameters["layer_0"]["bias"]
    np.testing.assert_allclose(hidden, own, rtol=1e-4, atol=1e-5)
    assert output.shape == (len(x), 2)


# Receptive fields.


@pytest.mark.parametrize("reading", ["conv", "local", "full"])
def test_nothing_outside_a_receptive_field_has_a_gradient_and_its_edges_do(reading):
    net = read_as(net_of("conv:2@3 tanh avg:2 conv:2@3/2:valid tanh", (11, 10, 1)), reading)
    if reading == "full":  # of weights that are all there
        net = net._replace(parameters=net_of(str(net.model), (11, 10, 1)).parameters)
    image = jnp.asarray(np.random.RandomState(0).normal(size=(1, 11, 10, 1)), jnp.float32)
    for layer in (1, 3, 4):
        rows, columns = net.model.shapes((11, 10, 1))[layer][:2]
        gradients = jax.jit(jax.grad(lambda x, i, j, layer=layer: prefix_of(net, layer, x)[0, i, j].sum()))
        for position in itertools.product((0, rows - 1), (0, columns - 1)):
            touched = np.argwhere(np.asarray(gradients(image, *position))[0, ..., 0] != 0)
            seen = receptive_field(net, layer, position)
            clipped = (max(seen.top, 0), min(seen.bottom, 11), max(seen.left, 0), min(seen.right, 10))
            (top, left), (bottom, right) = touched.min(axis=0), touched.max(axis=0) + 1
            assert (top, bottom, left, right) == clipped


def test_known_receptive_fields():
    net = net_of("conv:2@5 relu max:2 conv:2@5:valid dense:3", (28, 28, 1))
    assert receptive_field(net, 0, (0, 3)) == (-2, 3, 1, 6)
    assert receptive_field(net, 3, (1, 9)) == (0, 14, 16, 30)
    assert receptive_field(net, 4) == (0, 28, 0, 28)


# First filters.


def test_filters_are_the_kernels_as_images():
    net = net_of("conv:3@3x5 dense:2", (6, 7, 2))
    filters, kernel = first_filters(net), net.parameters["layer_0"]["kernel"]
    assert filters.shape == (3, 3, 5, 2)
    np.testing.assert_array_equal(filters[1], kernel[..., 1])
    dense = net_of("dense:4 relu dense:2", (6, 7, 2))
    np.testing.assert_array_equal(first_filters(dense)[3], dense.parameters["layer_0"]["kernel"][:, 3].reshape(6, 7, 2))


def test_a_node_s_filter_answers_to_images_as_the_node_does():
    net = net_of("conv:2@3:nobias", (5, 6, 2), seed=3)
    x = np.random.RandomState(0).normal(size=(1, 5, 6, 2)).astype(np.float32)
    (nodes,) = activations(net, x)
    whole = first_filters(read_as(net, "full"))
    assert whole.shape == (5 * 6 * 2, 5, 6, 2)
    np.testing.assert_allclose((whole * x).sum(axis=(1, 2, 3)), nodes.ravel(), rtol=1e-4, atol=1e-5)
    local = net_of("local:2@3:nobias", (5, 6, 2), seed=4)
    (nodes,), padded = activations(local, x), np.pad(x[0], ((1, 1), (1, 1), (0, 0)))
    own = iter(first_filters(local))
    for row, column, feature in np.ndindex(5, 6, 2):
        answer = (next(own) * padded[row : row + 3, column : column + 3]).sum()
        assert answer == pytest.approx(nodes[0, row, column, feature], rel=1e-3, abs=1e-4)
    assert next(own, None) is None


# Patches.


def test_the_strongest_patch_is_where_the_pattern_was_planted():
    cross = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]])
    net = filters_net(cross - 0.5, -cross)
    net = net._replace(mean=np.full(1, 10.0, np.float32))
    x = np.random.RandomState(0).randint(0, 30, (2 * BATCH_SIZE, 12, 12, 1)).astype(np.uint8)
    planted = {3: (4, 7), BATCH_SIZE + 2: (9, 2), 2 * BATCH_SIZE - 1: (0, 11)}
    for (example, (row, column)), bright in zip(planted.items(), (250, 240, 230), strict=True):
        for down, right in np.argwhere(cross) - 1:
            if 0 <= row + down < 12 and 0 <= column + right < 12:
                x[example, row + down, column + right] = bright
    found = strongest_patches(net, x, 0, 3)
    assert found.examples[0].tolist() == list(planted)
    assert found.positions[0].tolist() == [list(place) for place in planted.values()]
    np.testing.assert_array_equal(found.pixels[0, 1, ..., 0], x[BATCH_SIZE + 2, 8:11, 1:4, 0])
    corner = found.pixels[0, 2, ..., 0]  # in the upper right corner: what is beyond the image is the mean
    np.testing.assert_array_equal(corner[1:, :2], x[-1, 0:2, 10:12, 0])
    assert (corner[0] == 10).all() and (corner[:, 2] == 10).all()
    outputs = activations(net, x)[0].max(axis=(1, 2))
    np.testing.assert_allclose(found.values, np.sort(outputs, axis=0)[::-1][:3].T, rtol=1e-6)
    assert all(len(set(row)) == 3 for row in found.examples.tolist())


def test_units_of_a_vector_see_whole_images():
    net = net_of("conv:2@3 relu dense:3", (5, 5, 3))
    x = np.random.RandomState(0).randint(0, 256, (6, 5, 5, 3)).astype(np.uint8)
    found = strongest_patches(net, x, 2, 2)
    scores = activations(net, x)[-1]
    np.testing.assert_array_equal(found.examples[:, 0], scores.argmax(axis=0))
    assert found.positions.shape == (3, 2, 0)
    np.testing.assert_array_equal(found.pixels[1, 0], x[found.examples[1, 0]])


# Orientation.


def test_a_bar_has_its_angle_its_place_and_its_width():
    (upright,) = bars((5, 7), 90, np.array([1.0]))
    np.testing.assert_allclose(upright, np.tile(np.exp(-((np.arange(7) - 4) ** 2) / (2 * 0.49)), (5, 1)))
    np.testing.assert_allclose(bars((7, 5), 0, np.array([1.0]))[0], upright.T, atol=1e-12)
    (rising,) = bars((5, 5), 45, np.array([0.0]), 0.5)
    rows, columns = np.nonzero(rising > 0.99)
    np.testing.assert_array_equal(rows + columns, 4)  # from the lower left to the upper right
    assert rising[4, 1] == pytest.approx(np.exp(-0.5 / (2 * 0.25)))  # half a diagonal beside it
    np.testing.assert_allclose(bars((5, 5), 135, np.array([0.0]), 0.5)[0], rising[::-1], atol=1e-12)


def test_the_grid_of_pixels_favours_no_orientation():
    random = filters_net(*np.random.RandomState(0).normal(size=(1000, 5, 5)))
    angles = np.arange(0, 180, 7.5)
    on_the_grid = np.isin(orientation_tuning(random, angles).preferred, (0, 90)).mean()
    assert on_the_grid == pytest.approx(2 / 24, abs=0.04)
    assert np.isin(orientation_tuning(random, angles, 0.2).preferred, (0, 90)).mean() > 0.2  # where bars are sharp


def test_filters_are_tuned_to_the_bars_that_they_look_like():
    line = np.full((5, 5), -0.25)
    vertical, rising = line.copy(), line.copy()
    vertical[:, 2] = 1
    rising[np.arange(5), 4 - np.arange(5)] = 1  # from the lower left to the upper right
    blob, never = np.zeros((5, 5)), np.full((5, 5), -1.0)
    blob[2, 2] = 1
    tuned = orientation_tuning(
        filters_net(vertical, vertical.T, rising, rising[::-1], blob, never), np.arange(0, 180, 15)
    )
    np.testing.assert_array_equal(tuned.preferred[:4], [90, 0, 45, 135])
    assert (tuned.selectivity[:4] > 0.4).all() and tuned.selectivity[4] < 0.1
    assert np.isnan(tuned.selectivity[5]) and np.isnan(tuned.preferred[5]) and (tuned.responses[5] == 0).all()
    beside = np.exp(-(np.array([1, 4]) / (2 * 0.49)))
    assert tuned.responses[0].max() == pytest.approx(5 * (1 - 2 * 0.25 * beside.sum()))  # with the bar on the line
    responses, angles = tuned.responses[0], np.deg2rad(tuned.angles)
    variance = (
        1 - np.hypot((responses * np.cos(2 * angles)).sum(), (responses * np.sin(2 * angles)).sum()) / responses.sum()
    )
    assert tuned.selectivity[0] == pytest.approx(1 - variance)


def test_units_of_full_and_local_nets_are_tuned_too():
    vertical = np.full((5, 5), -0.25)
    vertical[:, 2] = 1
    net = filters_net(vertical, side=7)
    for reading, middle in (("local", 3 * 7 + 3), ("full", 3 * 7 + 3)):
        assert orientation_tuning(read_as(net, reading), (0, 45, 90, 135)).preferred[middle] == 90
    colour = net_of("conv:1@5:nobias", (7, 7, 3), {"layer_0": {"kernel": np.repeat(vertical[..., None, None], 3, 2)}})
    assert orientation_tuning(colour, (0, 45, 90, 135)).responses.max() == pytest.approx(
        3 * orientation_tuning(net, (0, 45, 90, 135)).responses.max()
    )


# Evidence.


def test_grad_cam_is_what_numpy_computes():
    net = net_of("conv:2@3:valid:nobias relu dense:3:nobias", (6, 6, 1), seed=5)
    image = np.random.RandomState(2).normal(size=(6, 6, 1)).astype(np.float32)
    kernel, dense = net.parameters["layer_0"]["kernel"], net.parameters["layer_2"]["kernel"].reshape(4, 4, 2, 3)
    maps = np.zeros((4, 4, 2))
    for row, column in np.ndindex(4, 4):
        maps[row, column] = np.tensordot(image[row : row + 3, column : column + 3], kernel, axes=3)
    maps = np.maximum(maps, 0)
    for label in range(3):
        coarse = np.maximum((maps * dense[..., label].mean(axis=(0, 1))).sum(axis=-1), 0)
        found = class_evidence(net, image, label)
        # The middles of 3x3 windows without padding are places 1 to 4; a step beyond them there is nothing.
        np.testing.assert_allclose(found[1:5, 1:5], coarse, rtol=1e-4, atol=1e-5)
        assert found.shape == (6, 6) and (found[[0, 5]] == 0).all() and (found[:, [0, 5]] == 0).all()


def test_evidence_between_the_places_of_a_map_is_interpolated():
    net = net_of("conv:1@2/2:valid:nobias dense:2:nobias", (8, 8, 1), seed=1)
    net.parameters["layer_0"]["kernel"][...] = 1
    net.parameters["layer_1"]["kernel"][...] = 1
    image = np.zeros((8, 8, 1), np.float32)
    image[2:4, 4:6] = 0.25  # the window in the second row and third column: 1
    found = class_evidence(net, image, 0)
    tent = lambda middle: np.maximum(0, 1 - np.abs(np.arange(8) - middle) / 2)  # noqa: E731
    np.testing.assert_allclose(found, np.outer(tent(2.5), tent(4.5)), atol=1e-6)


def test_all_readings_find_the_same_evidence_and_a_net_without_windows_has_signs():
    net = net_of(MODEL, (9, 8, 2), mean=100.0, deviation=60.0)
    found = class_evidence(net, IMAGES[0], 2)
    assert found.max() > 0
    for reading in ("local", "full"):
        np.testing.assert_allclose(class_evidence(read_as(net, reading), IMAGES[0], 2), found, rtol=1e-3, atol=1e-4)
    linear = net_of("dense:4", (9, 8, 2), mean=100.0, deviation=60.0)
    weights = linear.parameters["layer_0"]["kernel"][:, 3].reshape(9, 8, 2)
    expected = (weights * (IMAGES[0] - 100.0) / 60).sum(axis=-1)
    np.testing.assert_allclose(class_evidence(linear, IMAGES[0], 3), expected, rtol=1e-4, atol=1e-5)
    assert expected.min() < 0 < expected.max()


def test_the_last_map_is_taken_after_its_norm_and_activation():
    assert last_map(parse_model("conv:2@3 relu max:2 conv:2@3 norm relu max:2 dense:3 relu")) == 5
    assert last_map(parse_model("conv:2@3 max:2 relu dense:3")) == 0
    assert last_map(parse_model("conv:2@3 residual(conv:2@3) relu dense:3")) == 2
    assert last_map(parse_model("dense:3 relu")) is None


# Probes.


def data_of(features, labels, validation=60, test=60):
    x, y = features.astype(np.float32), labels.astype(np.int32)
    ends = (len(y) - validation - test, len(y) - test)
    splits = [Split(a, b) for a, b in zip(np.split(x, ends), np.split(y, ends), strict=True)]
    return DataSet(Description("made", x.shape[1:], 3, {}), *splits, np.zeros(1), np.ones(1))


def test_a_probe_tells_apart_what_a_line_separates_and_nothing_else():
    draws = np.random.RandomState(0)
    x = draws.normal(size=(360, 2, 2, 1))
    labels = (x[:, 0, 0, 0] * x[:, 1, 1, 0] > 0).astype(int)  # no line through the pixels tells
    kernel = np.zeros((4, 2), np.float32)
    kernel[0, 0] = kernel[3, 0] = kernel[0, 1] = 1
    kernel[3, 1] = -1
    # |a + b| - |a - b| has the sign of a b, by four ReLUs of a + b, a - b and their negatives.
    kernel = np.concatenate([kernel, -kernel], axis=1)
    net = net_of("dense:4:nobias relu dense:3", (2, 2, 1))
    net.parameters["layer_0"]["kernel"][...] = kernel
    pixels, sums, parts, _ = linear_probes(net, data_of(x, labels))
    assert [probe.layer for probe in (pixels, sums, parts)] == [None, 0, 1]
    assert pixels.name == "input" and parts.name == "1 relu" and (pixels.features, parts.features) == (4, 4)
    assert pixels.accuracy < 0.75 and sums.accuracy < 0.75
    assert parts.accuracy >= 0.95
    (again,) = linear_probes(net, data_of(x, labels), (1,))
    assert again == parts


def test_separable_features_are_told_apart_wholly():
    draws = np.random.RandomState(0)
    labels = draws.randint(3, size=300)
    x = draws.normal(0, 0.1, (300, 2, 2, 1))
    x.reshape(300, 4)[np.arange(300), labels] += 2
    for probe in linear_probes(net_of("dense:3", (2, 2, 1)), data_of(x, labels), (None,)):
        assert probe.accuracy == 1.0
        assert probe.penalty == PENALTIES[-1]  # all are right: the largest


def test_the_penalty_is_chosen_on_validation_and_the_score_is_that_of_the_test():
    draws = np.random.RandomState(3)
    labels = draws.randint(3, size=200)
    x = draws.normal(size=(200, 6, 6, 1))
    x.reshape(200, 36)[np.arange(200), labels] += 1
    data = data_of(x, labels)
    (found,) = linear_probes(net_of("dense:3", (6, 6, 1)), data, (None,))
    accuracies = {}
    for penalty, scores in ridge(data.train.x.reshape(80, 36).astype(float), np.eye(3)[data.train.y], PENALTIES):
        accuracies[penalty] = [
            (scores(split.x.reshape(-1, 36)).argmax(axis=1) == split.y).mean() for split in (data.validation, data.test)
        ]
    best = max(accuracies, key=lambda penalty: (accuracies[penalty][0], penalty))
    assert (found.penalty, found.accuracy) == (best, accuracies[best][1])
    # What the test examples are cannot matter to the choice.
    other = data_of(np.concatenate([x[:140], x[140:][::-1]]), np.concatenate([labels[:140], labels[140:]]))
    assert linear_probes(net_of("dense:3", (6, 6, 1)), other, (None,))[0].penalty == best


@pytest.mark.parametrize("count, features", [(40, 7), (9, 30)])
def test_ridge_solves_least_squares_with_rows_for_the_penalty(count, features):
    draws = np.random.RandomState(0)
    x, y = draws.normal(2, 1, (count, features)), draws.normal(1, 1, (count, 2))
    centred, targets = x - x.mean(axis=0), y - y.mean(axis=0)
    for penalty, function in ridge(x, y, (1e-3, 0.1)):
        root = np.sqrt(penalty * (centred**2).sum())
        rows = np.concatenate([centred, root * np.eye(features)])
        weights, *_ = np.linalg.lstsq(rows, np.concatenate([targets, np.zeros((features, 2))]), rcond=None)
        np.testing.assert_allclose(function(x), centred @ weights + y.mean(axis=0), atol=1e-8)


def test_features_that_do_not_vary_are_no_error():
    ((_, function),) = ridge(np.ones((5, 2)), np.arange(10.0).reshape(5, 2), (1e-3,))
    np.testing.assert_allclose(function(np.ones((1, 2))), [[4.0, 5.0]])


# What is refused.


def test_what_has_no_answer_is_one_line():
    signals = net_of("conv:2@3 relu dense:3", (8, 1))
    images = net_of("conv:2@3 relu dense:3", (5, 5, 1))
    x, signal = np.zeros((4, 5, 5, 1), np.uint8), np.zeros((2, 8, 1), np.float32)
    assert activations(signals, signal)[0].shape == (2, 8, 2)  # signals have activations
    strange = net_of("residual(conv:1@3/2|conv:1@3/2:0+2x0+2 conv:1@1) dense:2", (6, 6, 1))
    assert receptive_field(strange, 0, (0, 0)).bottom >= 2
    without = data_of(np.zeros((70, 5, 5, 1)), np.zeros(70), validation=0)
    for ask, told in (
        (lambda: first_filters(signals), "height x width x channel; an input of 8x1 has none"),
        (lambda: orientation_tuning(signals, (0, 60, 120)), "an input of 8x1"),
        (lambda: receptive_field(signals, 0, (0,)), "sees signals of 8x1"),
        (lambda: class_evidence(signals, np.zeros((8, 1, 1)), 0), "sees signals of 8x1"),
        (lambda: strongest_patches(signals, np.zeros((1, 8, 1, 1)), 0, 1), "sees signals of 8x1"),
        (lambda: first_filters(net_of("max:2", (4, 4, 1))), "a net without weights"),
        (lambda: activations(images, x[:, :4]), "sees examples of 5x5x1"),
        (lambda: activations(images, x[:0]), "one or more"),
        (lambda: activations(images, x, (3,)), "no layer 3"),
        (lambda: receptive_field(images, -1), "no layer -1"),
        (lambda: receptive_field(images, 0, (5, 0)), "positions within 5x5, not"),
        (lambda: receptive_field(images, 2, (0, 0)), "layer 2 has no positions"),
        (lambda: strongest_patches(images, x, 0, 5), "there are 4 images"),
        (lambda: class_evidence(images, x[0], 3), "no class 3; there are 0 to 2"),
        (lambda: orientation_tuning(images, (0, 45, 90)), "divide 180 degrees"),
        (lambda: orientation_tuning(images, (0, 60, 120), deviation=0.0), "wider than 0"),
        (lambda: linear_probes(images, without), "data.validation must be 1 or more"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            ask()
        assert "\n" not in str(caught.value)
