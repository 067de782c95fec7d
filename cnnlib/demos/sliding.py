"""Compute convolutions as overlaps: one function slides over another; the result is the area under their product.

For functions of one variable, the convolution is the integral of f(s) g(t - s) over s. `overlap` computes this integral
numerically, and `convolved` computes it in closed form. `convolve` convolves rows of numbers and images. This file uses
only NumPy and SciPy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cnnlib.errors import UserError


@dataclass(frozen=True)
class Box:
    """A function that is 1 on an interval of length `width` around `center`, and 0 outside."""

    width: float = 1.0
    center: float = 0.0

    def __call__(self, t: np.ndarray | float) -> np.ndarray:
        """Return the value at each t."""
        return _spline(self.powers, t, 0)

    @property
    def powers(self) -> tuple[tuple[float, float, int], ...]:
        """Return the terms `(weight, start, degree)` of the sum: weight (t - start)^degree / degree! for t >= start."""
        half = self.width / 2
        return (1.0, self.center - half, 0), (-1.0, self.center + half, 0)

    @property
    def knots(self) -> np.ndarray:
        """Return ascending points. The function is smooth between two neighbouring points, and 0 outside all points."""
        return np.array([start for _, start, _ in self.powers])


@dataclass(frozen=True)
class Triangle:
    """A triangle. Its height is 1, its top is at `center`, and its base is an interval of length `width`."""

    width: float = 2.0
    center: float = 0.0

    def __call__(self, t: np.ndarray | float) -> np.ndarray:
        """Return the value at each t."""
        return _spline(self.powers, t, 0)

    @property
    def powers(self) -> tuple[tuple[float, float, int], ...]:
        """Return terms as `Box.powers` does."""
        half = self.width / 2
        slopes = (1 / half, self.center - half), (-2 / half, self.center), (1 / half, self.center + half)
        return tuple((slope, start, 1) for slope, start in slopes)

    @property
    def knots(self) -> np.ndarray:
        """Return points as `Box.knots` does."""
        return np.array([start for _, start, _ in self.powers])


@dataclass(frozen=True)
class Exponential:
    """A function that is exp(-rate (t - start)) from `start` on, and 0 before."""

    rate: float = 1.0
    start: float = 0.0

    def __call__(self, t: np.ndarray | float) -> np.ndarray:
        """Return the value at each t."""
        return self.integrated(t, 0)

    def integrated(self, t: np.ndarray | float, times: int) -> np.ndarray:
        """Return the integral from minus infinity to t, taken 0, 1 or 2 times."""
        x = np.maximum(np.asarray(t, np.float64) - self.start, 0.0)
        once = -np.expm1(-self.rate * x) / self.rate
        values = (np.exp(-self.rate * x), once, (x - once) / self.rate)
        return np.where(np.asarray(t) >= self.start, values[times], 0.0)

    @property
    def knots(self) -> np.ndarray:
        """Return points as `Box.knots` does. The value falls by the factor exp(-4) per point, down to exp(-40)."""
        return self.start + np.arange(11) * 4 / self.rate


@dataclass(frozen=True)
class Gaussian:
    """The function exp(-(t - center)^2 / (2 deviation^2)). The height of the curve is 1; its area is not."""

    deviation: float = 1.0
    center: float = 0.0

    def __call__(self, t: np.ndarray | float) -> np.ndarray:
        """Return the value at each t."""
        return self.integrated(t, 0)

    def integrated(self, t: np.ndarray | float, times: int) -> np.ndarray:
        """Return the integral from minus infinity to t, taken 0, 1 or 2 times."""
        x = (np.asarray(t, np.float64) - self.center) / self.deviation
        density, area = np.exp(-(x**2) / 2), math.sqrt(2 * math.pi) * _normal_below(x)
        values = (density, self.deviation * area, self.deviation**2 * (x * area + density))
        return np.asarray(values[times])

    @property
    def knots(self) -> np.ndarray:
        """Return points as `Box.knots` does. Beyond 9 standard deviations, the function counts as 0."""
        return self.center + self.deviation * np.arange(-9.0, 10.0)


Signal = Box | Triangle | Exponential | Gaussian


def overlap(f: Signal, g: Signal, t: float) -> float:
    """Return the integral of f(s) g(t - s) over s. Here g is mirrored and moved by t, and f stays in place.

    The integral uses 16 Gauss-Legendre points on each interval in which f and g are smooth. Its error is about 1e-12.
    """
    knots = np.unique(np.concatenate([f.knots, t - g.knots]))
    low, high = max(f.knots.min(), t - g.knots.max()), min(f.knots.max(), t - g.knots.min())
    knots = knots[(knots >= low) & (knots <= high)]
    if len(knots) < 2:
        return 0.0
    places, weights = np.polynomial.legendre.leggauss(16)
    middle, half = (knots[1:] + knots[:-1]) / 2, np.diff(knots) / 2
    s = middle[:, None] + half[:, None] * places
    return float((half[:, None] * weights * f(s) * g(t - s)).sum())


def convolved(f: Signal, g: Signal, t: np.ndarray | float) -> np.ndarray:
    """Return the result of `overlap` in closed form, for any two of boxes, triangles, exponentials and Gaussians.

    A box or a triangle is a sum of powers, as in `Box.powers`. To convolve a function with such a power, integrate the
    function degree + 1 times. The convolution of two Gaussians is a Gaussian; its variance is the sum of the two
    variances. The convolution of an exponential and a Gaussian is the exponentially modified Gaussian.
    """
    t = np.asarray(t, np.float64)
    for first, second in ((f, g), (g, f)):
        if isinstance(first, Box | Triangle):
            parts = [weight * _integrated(second, t - start, degree + 1) for weight, start, degree in first.powers]
            return np.asarray(sum(parts))
    for first, second in ((f, g), (g, f)):
        if isinstance(first, Exponential) and isinstance(second, Gaussian):
            x, variance = t - first.start - second.center, second.deviation**2
            shift = (x - first.rate * variance) / second.deviation
            # Add logarithms: for a steep exponential, the first factor is huge and the second is almost 0.
            log = first.rate**2 * variance / 2 - first.rate * x + _log_normal_below(shift)
            return np.asarray(second.deviation * math.sqrt(2 * math.pi) * np.exp(log))
    if isinstance(f, Gaussian) and isinstance(g, Gaussian):
        deviation = math.hypot(f.deviation, g.deviation)
        height = math.sqrt(2 * math.pi) * f.deviation * g.deviation / deviation
        return height * Gaussian(deviation, f.center + g.center)(t)
    assert isinstance(f, Exponential) and isinstance(g, Exponential)
    x = np.maximum(t - f.start - g.start, 0.0)
    if math.isclose(f.rate, g.rate, rel_tol=1e-6):
        return np.asarray(x * np.exp(-f.rate * x))
    return np.asarray((np.exp(-f.rate * x) - np.exp(-g.rate * x)) / (g.rate - f.rate))


def convolve(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Return the discrete convolution. Its element n is the sum of kernel[k] x[n - k] over k.

    `x` and `kernel` are signals `(length,)` or images `(height, width)`; values outside count as 0. If an axis of `x`
    has length n and the same axis of `kernel` has length k, then that axis of the result has length n + k - 1. The
    result is a sum of copies of `x`. Each copy is shifted and weighted by one entry of the kernel.
    """
    x, kernel = _rows(x), _rows(kernel)
    if x.ndim != kernel.ndim:
        raise UserError(f"a kernel of {kernel.ndim} axes does not slide over a signal of {x.ndim}")
    total = np.zeros([n + k - 1 for n, k in zip(x.shape, kernel.shape, strict=True)])
    for place in np.ndindex(kernel.shape):
        total[tuple(slice(k, k + n) for k, n in zip(place, x.shape, strict=True))] += kernel[place] * x
    return total


def correlate(x: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Slide the kernel over `x`, not mirrored. Nets call this a "convolution". Lengths are as in `convolve`."""
    return convolve(x, np.flip(_rows(kernel)))


def dirty_map(clean: np.ndarray, beam: np.ndarray) -> np.ndarray:
    """Return the image that a telescope sees: it replaces each source of the clean map by a copy of the beam.

    Each copy is as bright as its source. So the result is the convolution of `clean` and `beam`. It is cut to the size
    of `clean`, `(height, width)`. Raises UserError if the beam has an even side.
    """
    if any(side % 2 == 0 for side in beam.shape):
        raise UserError(f"a beam has a middle pixel, so odd sides, not {'x'.join(map(str, beam.shape))}")
    whole = convolve(clean, beam)
    first = [side // 2 for side in beam.shape]
    return whole[tuple(slice(a, a + side) for a, side in zip(first, clean.shape, strict=True))]


def point_sources(shape: Sequence[int], places: Sequence[tuple[int, int]], fluxes: Sequence[float]) -> np.ndarray:
    """Return a clean map `(height, width)`: pixels at `places` have the given fluxes, and other pixels are 0."""
    clean = np.zeros(tuple(shape))
    for place, flux in zip(places, fluxes, strict=True):
        clean[place] += flux
    return clean


def _integrated(g: Signal, t: np.ndarray, times: int) -> np.ndarray:
    if isinstance(g, Box | Triangle):
        return _spline(g.powers, t, times)
    return g.integrated(t, times)


def _spline(powers: Any, t: np.ndarray | float, times: int) -> np.ndarray:
    """Return a sum of powers (see `Box.powers`), integrated `times` times."""
    t = np.asarray(t, np.float64)
    total = np.zeros(t.shape)
    for weight, start, degree in powers:
        n = degree + times
        total += np.where(t >= start, weight * np.maximum(t - start, 0.0) ** n / math.factorial(n), 0.0)
    return total


def _normal_below(x: np.ndarray) -> np.ndarray:
    """Return the share of the standard normal distribution below x."""
    from scipy.special import ndtr  # this function is exact in the tails too

    return np.asarray(ndtr(x))


def _log_normal_below(x: np.ndarray) -> np.ndarray:
    from scipy.special import log_ndtr

    return np.asarray(log_ndtr(x))


def _rows(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float64)
    if x.ndim not in (1, 2):
        raise UserError(f"signals have one axis and images two, not {x.ndim}")
    return x
