"""The vector functions of level.h, over every kind of fp32 value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunegate.kernels import native

pytestmark = pytest.mark.skipif(native.describe()[0] == "twins", reason="needs the compiled kernels")
EXP, SIGMOID, TANH = range(3)


def run(which: int, x: np.ndarray) -> np.ndarray:
    lib = native.library()
    values = torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
    out = torch.empty_like(values)
    lib._test_vector_function(which, values.data_ptr(), out.data_ptr(), len(values))
    return out.numpy()


@pytest.fixture(scope="module")
def every() -> np.ndarray:
    """4 million bit patterns spread over all of fp32: both signs, denormals, infinities, NaNs."""
    return np.arange(0, 2**32, 1021, dtype=np.uint64).astype(np.uint32).view(np.float32)


def test_exp_within_two_ulp(every):
    dense = np.concatenate((every, np.linspace(-87.3365, 88.7228, 1_000_001, dtype=np.float32)))
    x = dense[(dense >= np.float32(-87.33654)) & (dense <= np.float32(88.72283))]
    want = np.exp(x.astype(np.float64))
    error = np.abs(run(EXP, x) - want)
    assert (error / np.spacing(want.astype(np.float32))).max() < 2
    assert (error / want).max() < 1.2e-7


def test_exp_outside_its_range(every):
    got = run(EXP, every)
    assert np.isnan(got[np.isnan(every)]).all()
    assert not np.isnan(got[~np.isnan(every)]).any()
    assert (got[every > 88.7229] == np.inf).all()
    assert (got[every < -87.337] == 0).all()
    edges = np.array([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 88.72283, -87.33654], dtype=np.float32)
    np.testing.assert_allclose(run(EXP, edges), [1, 1, 1, 1, np.inf, 0, 3.4027985e38, 1.1754998e-38], rtol=1.2e-7)


def test_sigmoid_and_tanh(every):
    x = every[np.isfinite(every)]
    wide = np.clip(x.astype(np.float64), -700, 700)
    sigmoid = 1 / (1 + np.exp(-wide))
    got = run(SIGMOID, x)
    assert np.abs(got - sigmoid).max() < 1.5e-7
    kept = wide > -87
    assert (np.abs(got - sigmoid)[kept] / sigmoid[kept]).max() < 3e-7
    assert np.abs(run(TANH, x) - np.tanh(wide)).max() < 2e-7
    for which in (SIGMOID, TANH):
        assert np.isnan(run(which, np.array([np.nan] * 3))).all()
    np.testing.assert_array_equal(run(SIGMOID, np.array([-np.inf, np.inf])), [0, 1])
    np.testing.assert_array_equal(run(TANH, np.array([-np.inf, np.inf])), [-1, 1])


def test_short_and_odd_lengths_are_the_whole():
    x = np.linspace(-5, 5, 67, dtype=np.float32)
    whole = run(EXP, x)
    for length in range(67):
        np.testing.assert_array_equal(run(EXP, x[:length]), whole[:length])
