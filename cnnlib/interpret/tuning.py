"""Measure which orientation of a bar each filter of the first layer prefers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from cnnlib.errors import UserError
from cnnlib.interpret.patches import first_filters
from cnnlib.interpret.trained import Net


class Tuning(NamedTuple):
    """How strongly units respond to bars of each orientation."""

    angles: Float[np.ndarray, " angle"]
    """Angles in degrees: a bar at 0 is horizontal, a bar at 45 rises to the right, a bar at 90 is vertical."""
    responses: Float[np.ndarray, "unit angle"]
    selectivity: Float[np.ndarray, " unit"]
    """1 - circular variance. 0: the unit responds equally to all orientations. 1: the unit responds to one orientation
    only. NaN: no bar excites the unit."""
    preferred: Float[np.ndarray, " unit"]
    """Angle of the largest response, in degrees. NaN: no bar excites the unit."""


def orientation_tuning(net: Net, angles: Sequence[int | float] | np.ndarray, deviation: float = 0.7) -> Tuning:
    """Return how strongly each filter of the first layer responds to a bright bar of each orientation.

    The bar is tried at all positions. The response is the largest amount by which the bar increases the unit's weighted
    sum, or 0 if the bar never increases the sum. The bar is 1 on a background of 0, in all channels. The bar is longer
    than the filter and moves in steps of a quarter of a pixel. Its profile is a Gaussian with a standard deviation of
    `deviation` pixels. If `deviation` is 0.7 or more, the pixel grid favours no orientation. (With a smaller
    `deviation`, it favours a bar along a column.) Selectivity is 1 - circular variance (Ringach, Shapley and Hawken,
    "Orientation selectivity in macaque V1", 2002). In a square window, a long bar along a diagonal covers up to 1.41
    times as much as a bar along a side. So the selectivity of a uniform filter is near 0, not exactly 0.

    Raises UserError if the first layer's input is not an image, or if the angles do not divide 180 degrees equally.
    """
    filters = first_filters(net).sum(axis=-1)
    asked = np.asarray(angles, np.float64)
    if asked.ndim != 1 or len(asked) < 3 or not np.allclose(np.diff(asked), 180 / len(asked)):
        raise UserError("angles: three or more, equally far apart, that divide 180 degrees, such as 0, 45, 90, 135")
    if not 0 < deviation < np.inf:
        raise UserError(f"deviation={deviation}: a bar is wider than 0 pixels")
    shape = filters.shape[1:]
    steps = np.ceil(2 * np.hypot(*shape))
    offsets = np.arange(-steps, steps + 1) / 4  # pixels, from corner to corner
    weights = filters.reshape(len(filters), -1).astype(np.float64)
    responses = np.stack(
        [(weights @ bars(shape, angle, offsets, deviation).reshape(len(offsets), -1).T).max(axis=1) for angle in asked],
        axis=1,
    )
    responses = np.maximum(responses, 0.0)
    total = responses.sum(axis=1)
    silent = total <= 0
    resultant = np.abs(responses @ np.exp(2j * np.deg2rad(asked))) / np.where(silent, 1.0, total)
    preferred = asked[responses.argmax(axis=1)]
    return Tuning(asked, responses, np.where(silent, np.nan, resultant), np.where(silent, np.nan, preferred))


def bars(
    shape: tuple[int, int], angle: int | float, offsets: Float[np.ndarray, " bar"], deviation: float = 0.7
) -> Float[np.ndarray, "bar height width"]:
    """Return one image per offset. Each image has one bar from edge to edge; the bar's value is 1 on its center line.

    The bar's profile is a Gaussian with a standard deviation of `deviation` pixels. `angle` is in degrees, as in
    `Tuning`. An offset is the distance in pixels from the image's center to the bar's center line. It counts downwards
    for a horizontal bar, and to the right for a vertical bar.
    """
    across, down = np.sin(np.deg2rad(angle)), np.cos(np.deg2rad(angle))
    rows, columns = (np.arange(side) - (side - 1) / 2 for side in shape)
    distance: np.ndarray = columns[None, :] * across + rows[:, None] * down - offsets[:, None, None]
    return np.asarray(np.exp(-(distance**2) / (2 * deviation**2)))
