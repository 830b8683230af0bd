"""Pictures of curvature with matplotlib: densities, eigenvalues, sensitivities by layer, stability over training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from curvax.estimate._hutchinson import Estimate
from curvax.spectra._density import Density, smooth_density

try:
    from matplotlib import pyplot
except ImportError as error:
    raise ImportError("curvax.plot draws with matplotlib: pip install 'curvax[plot]'") from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvax.apps._sharpness import SharpnessReport
    from curvax.apps.quantization import Allocation


def spectral_density(
    density: Density,
    *,
    eigenvalues: Any = None,
    width: float | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a spectral density on a logarithmic scale, with a band of two standard errors over probes.

    Args:
      density: of `curvax.spectral_density`.
      eigenvalues: to be marked on the axis, such as the outliers that `curvax.eigsh` finds.
      width: standard deviation of the Gaussian that spreads each node; None: a hundredth of the range of nodes.
      label: of the curve.
      ax: to draw into; None: a new figure.

    Returns:
      the axes.

    Example:
      >>> import jax.numpy as jnp, curvax.plot
      >>> from curvax.spectra import Density
      >>> density = Density(jnp.array([[0.0, 2.0]]), jnp.array([[0.25, 0.75]]), jnp.array(4.0))
      >>> curvax.plot.spectral_density(density, eigenvalues=[2.0]).get_yscale()
      'log'
    """
    ax = _axes(ax)
    low, high = float(np.min(density.nodes)), float(np.max(density.nodes))
    width = width or (high - low or abs(high) or 1.0) / 100
    # Points at distances of a quarter of the width, that no peak falls between.
    grid = np.linspace(low - 5 * width, high + 5 * width, int(4 * (high - low) / width) + 41)
    mean, error = (np.asarray(x) for x in smooth_density(density, jnp.asarray(grid), width))
    (line,) = ax.semilogy(grid, mean, label=label)
    floor = 1e-3 / (float(density.dimension) * width)  # a thousandth of one eigenvalue's peak
    if np.isfinite(error).all():
        band = (np.maximum(mean - 2 * error, floor), np.maximum(mean + 2 * error, floor))
        ax.fill_between(grid, *band, color=line.get_color(), alpha=0.2, linewidth=0)
    if eigenvalues is not None:
        values = np.asarray(eigenvalues)
        ax.plot(values, np.full(values.shape, 2 * floor), "v", color=line.get_color(), markersize=5)
    ax.set(xlabel="eigenvalue", ylabel="density", ylim=(floor, 3 * np.max(mean)))
    return ax


def eigenvalues(values: Any, *, label: str | None = None, ax: Axes | None = None) -> Axes:
    """Draw eigenvalues as bars, in the order given.

    Args:
      values: such as the first result of `curvax.eigsh`.
      label: of the bars.
      ax: to draw into; None: a new figure.

    Returns:
      the axes.

    Example:
      >>> import curvax.plot
      >>> len(curvax.plot.eigenvalues([3.0, 2.0, -1.0]).patches)
      3
    """
    ax = _axes(ax)
    heights = np.asarray(values)
    ax.bar(np.arange(1, len(heights) + 1), heights, label=label)
    ax.set(xlabel="number", ylabel="eigenvalue")
    return ax


def sensitivities(
    values: Mapping[str, Any], *, label: str | None = None, ax: Axes | None = None
) -> Axes:
    """Draw a number for each layer as horizontal bars, the first layer on top; with the standard error of an estimate.

    Args:
      values: by name, numbers or `curvax.Estimate`s.
      label: of the numbers.
      ax: to draw into; None: a new figure.

    Returns:
      the axes.

    Example:
      >>> import curvax, curvax.plot
      >>> ax = curvax.plot.sensitivities({"first": curvax.Estimate(3.0, 0.1), "second": curvax.Estimate(1.0, 0.2)})
      >>> [text.get_text() for text in ax.get_yticklabels()]
      ['first', 'second']
    """
    ax = _axes(ax)
    pairs = [(x.mean, x.sem) if isinstance(x, Estimate) else (x, np.nan) for x in values.values()]
    means, errors = np.array(pairs, float).reshape(-1, 2).T
    errors = np.where(np.isfinite(errors), errors, np.nan)  # an estimate of one probe has none
    ax.barh(np.arange(len(means)), means, xerr=None if np.isnan(errors).all() else errors)
    ax.set_yticks(np.arange(len(means)), list(values))
    ax.invert_yaxis()
    ax.set_xlabel(label or "sensitivity")
    return ax


def pareto_front(
    front: Sequence[Allocation],
    *,
    marked: Mapping[str, Allocation] | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the least sum of sensitivities that each size allows, as steps.

    Args:
      front: of `curvax.apps.quantization.pareto`.
      marked: allocations to draw as points, by their names.
      label: of the steps.
      ax: to draw into; None: a new figure.

    Returns:
      the axes; their vertical one is logarithmic if no sum is negative or zero.

    Example:
      >>> import curvax.plot
      >>> from curvax.apps import quantization
      >>> front = quantization.pareto({"l": {2: 4.0, 4: 1.0}}, {"l": 800})
      >>> curvax.plot.pareto_front(front, marked={"4 bits": front[-1]}).lines[0].get_xdata().tolist()
      [0.2, 0.4]
    """
    ax = _axes(ax)
    kilobytes = lambda points: [point.size / 8000 for point in points]
    ax.step(kilobytes(front), [point.omega for point in front], where="post", label=label)
    for name, point in (marked or {}).items():
        ax.plot(kilobytes([point]), [point.omega], "o", label=name)
    if all(point.omega > 0 for point in (*front, *(marked or {}).values())):
        ax.set_yscale("log")
    ax.set(xlabel="size, kB", ylabel="sum of sensitivities")
    return ax


def sharpness(reports: Mapping[int, SharpnessReport], *, ax: Axes | None = None) -> Axes:
    """Draw how near training is to the edge of stability: both ratios of sharpness reports, by step.

    Args:
      reports: of `curvax.apps.sharpness_report`, by step.
      ax: to draw into; None: a new figure.

    Returns:
      the axes, with a line at 1, above which a method is not stable.

    Example:
      >>> import jax.numpy as jnp, curvax, curvax.plot
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> report = curvax.apps.sharpness_report(objective, jnp.ones(2), [(jnp.eye(2), jnp.zeros(2))], learning_rate=0.5)
      >>> curvax.plot.sharpness({0: report}).lines[0].get_ydata().tolist()
      [0.125]
    """
    ax = _axes(ax)
    steps = list(reports)
    ax.plot(
        steps,
        [float(report.gradient_descent) for report in reports.values()],
        "o-",
        label="gradient descent",
    )
    ax.plot(steps, [float(report.sgd) for report in reports.values()], "o-", label="SGD")
    ax.axhline(1, color="gray", linewidth=1)
    ax.set(xlabel="step", ylabel="learning rate / largest stable one")
    ax.legend()
    return ax


def _axes(ax: Axes | None) -> Axes:
    return pyplot.subplots(layout="constrained")[1] if ax is None else ax
