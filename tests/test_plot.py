"""Pictures: what is drawn where, and the error without matplotlib."""

import importlib
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import curvax
from curvax import plot
from curvax.spectra import Density


def axes():
    return Figure().subplots()


def test_spectral_density_has_its_peaks_band_and_marks():
    nodes, weights = jnp.array([[0.0, 2.0], [0.0, 2.1]]), jnp.array([[0.25, 0.75], [0.5, 0.5]])
    ax = plot.spectral_density(
        Density(nodes, weights, jnp.array(4.0)),
        eigenvalues=[2.0, 2.1],
        width=0.1,
        ax=(given := axes()),
    )
    assert ax is given and ax.get_yscale() == "log"
    curve, marks = ax.lines
    x, y = curve.get_data()
    np.testing.assert_allclose(np.trapezoid(y, x), 1, atol=1e-3)
    np.testing.assert_allclose(
        y[np.argmin(np.abs(x))], 0.375 / (0.1 * np.sqrt(2 * np.pi)), rtol=1e-3
    )
    assert marks.get_xdata().tolist() == [2.0, 2.1] and len(ax.collections) == 1
    one_probe = plot.spectral_density(Density(nodes[:1], weights[:1], jnp.array(4.0)), ax=axes())
    assert not one_probe.collections  # which knows no error
    plot.spectral_density(
        Density(jnp.ones((2, 1)), jnp.ones((2, 1)), jnp.array(4.0)), ax=axes()
    )  # without any range


def test_bars_stand_in_order_with_errors_where_there_are_any():
    ax = plot.eigenvalues(jnp.array([3.0, 2.0, -1.0]), ax=axes())
    assert [bar.get_height() for bar in ax.patches] == [3, 2, -1]
    values = {
        "a": curvax.Estimate(jnp.array(3.0), jnp.array(0.5)),
        "b": curvax.Estimate(1.0, jnp.inf),
        "c": 2.0,
    }
    ax = plot.sensitivities(values, label="trace", ax=axes())
    assert [bar.get_width() for bar in ax.patches] == [3, 1, 2] and ax.get_xlabel() == "trace"
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        "a",
        "b",
        "c",
    ] and ax.yaxis_inverted()
    (errors,) = ax.collections
    assert [len(points) for points in errors.get_segments()] == [2, 0, 0]


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "curvax.plot")
    with pytest.raises(ImportError, match=r"pip install 'curvax\[plot\]'"):
        importlib.import_module("curvax.plot")
