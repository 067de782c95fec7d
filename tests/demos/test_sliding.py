"""Convolution as overlap: areas, closed forms, rows of numbers, images."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.integrate
import scipy.signal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from cnnlib.demos.sliding import (
    Box,
    Exponential,
    Gaussian,
    Triangle,
    convolve,
    convolved,
    correlate,
    dirty_map,
    overlap,
    point_sources,
)
from cnnlib.errors import UserError

pytestmark = pytest.mark.once

SIGNALS = [
    Box(1.5, 0.3),
    Box(0.4, -1.0),
    Triangle(2.0, 0.0),
    Triangle(0.7, 0.5),
    Exponential(1.0),
    Exponential(3.0, -0.5),
    Gaussian(0.6),
    Gaussian(0.2, 1.0),
]


@pytest.mark.parametrize("f, g", list(itertools.combinations_with_replacement(SIGNALS, 2)), ids=str)
def test_the_area_of_the_overlap_is_the_closed_form(f, g):
    t = np.linspace(-4.0, 6.0, 41)
    areas = np.array([overlap(f, g, moved) for moved in t])
    np.testing.assert_allclose(areas, convolved(f, g, t), atol=1e-9)
    np.testing.assert_allclose(convolved(f, g, t), convolved(g, f, t), atol=1e-12)


@pytest.mark.parametrize(
    "f, g", [(SIGNALS[0], SIGNALS[2]), (SIGNALS[3], SIGNALS[5]), (SIGNALS[4], SIGNALS[6])], ids=str
)
def test_an_integrator_that_knows_nothing_finds_the_same(f, g):
    for t in (-0.7, 0.2, 1.9):
        breaks = sorted({float(s) for s in (*f.knots, *(t - g.knots)) if -8 < s < 8})
        area, _ = scipy.integrate.quad(lambda s, t=t: float(f(s) * g(t - s)), -8, 8, points=breaks, limit=400)
        assert overlap(f, g, t) == pytest.approx(area, abs=1e-7)


def test_known_overlaps():
    # Two boxes of width 1 make the tent of width 2; where they do not meet there is nothing.
    t = np.linspace(-2, 2, 81)
    np.testing.assert_allclose(convolved(Box(), Box(), t), Triangle()(t), atol=1e-12)
    assert overlap(Box(), Box(), 1.5) == 0.0 and overlap(Box(), Box(), 0.0) == pytest.approx(1.0)
    # A sharp exponential and a broad Gaussian: no factor may overflow.
    assert np.isfinite(convolved(Exponential(200.0), Gaussian(1.0), np.array([-9.0, 0.0, 9.0]))).all()


numbers = st.floats(-5, 5)


@settings(max_examples=30, deadline=None)
@given(
    arrays.arrays(float, st.integers(1, 12), elements=numbers),
    arrays.arrays(float, st.integers(1, 5), elements=numbers),
)
def test_rows_convolve_as_numpy_does(x, kernel):
    np.testing.assert_allclose(convolve(x, kernel), np.convolve(x, kernel), atol=1e-9)
    np.testing.assert_allclose(correlate(x, kernel), np.correlate(x, kernel, mode="full"), atol=1e-9)
    np.testing.assert_allclose(correlate(x, kernel[::-1]), convolve(x, kernel), atol=1e-9)  # the flip


def test_images_convolve_as_scipy_and_fourier_do():
    generator = np.random.default_rng(0)
    x, kernel = generator.normal(size=(7, 9)), generator.normal(size=(3, 5))
    np.testing.assert_allclose(convolve(x, kernel), scipy.signal.convolve2d(x, kernel), atol=1e-12)
    np.testing.assert_allclose(correlate(x, kernel), scipy.signal.correlate2d(x, kernel), atol=1e-12)
    shape = (9, 13)
    product = np.fft.rfft2(x, shape) * np.fft.rfft2(kernel, shape)
    np.testing.assert_allclose(convolve(x, kernel), np.fft.irfft2(product, shape), atol=1e-12)


def test_a_dirty_map_is_the_beam_around_each_source():
    beam = np.array([[0.0, 0.2, 0.0], [0.1, 1.0, 0.3], [0.0, 0.4, 0.0]])
    clean = point_sources((6, 7), [(2, 3), (5, 6)], [2.0, 1.0])
    dirty = dirty_map(clean, beam)
    np.testing.assert_allclose(dirty[1:4, 2:5], 2 * beam)
    assert dirty[5, 6] == 1.0 and dirty[5, 5] == pytest.approx(0.1) and dirty[0, 0] == 0.0
    np.testing.assert_allclose(dirty, scipy.signal.convolve2d(clean, beam, mode="same"), atol=1e-12)


def test_what_does_not_slide_is_told():
    with pytest.raises(UserError, match="odd sides, not 2x3"):
        dirty_map(np.zeros((4, 4)), np.ones((2, 3)))
    with pytest.raises(UserError, match="1 axes does not slide over a signal of 2"):
        convolve(np.zeros((4, 4)), np.ones(3))
    with pytest.raises(UserError, match="not 3"):
        convolve(np.zeros((4, 4, 4)), np.ones((1, 1, 1)))
