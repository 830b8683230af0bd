"""Pictures of curvature with matplotlib.

They show densities, eigenvalues, sensitivities by layer, and stability over training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from curvax.estimate._hutchinson import Estimate
from curvax.spectra._density import Density, smooth_density

# matplotlib is an extra: whoever imports this module wants it.
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
    """Draw a spectral density on a logarithmic scale.

    The band around it is two standard errors over probes wide, to each side.

    Args:
      density: the `Density` returned by `curvax.spectral_density`.
      eigenvalues: numbers to mark on the axis, such as the outliers that `curvax.eigsh` finds.
      width: standard deviation of the Gaussian that spreads each node; by default a hundredth of
        the range of nodes.
      label: name of the curve in a legend.
      ax: the axes to draw into; by default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import jax.numpy as jnp, curvax.plot
      >>> from curvax.spectra import Density
      >>> density = Density(jnp.array([[0.0, 2.0]]), jnp.array([[0.25, 0.75]]), jnp.array(4.0))
      >>> curvax.plot.spectral_density(density, eigenvalues=[2.0]).get_yscale()
      'log'
    """
    ax = _axes(ax)
    low = float(np.min(density.nodes))
    high = float(np.max(density.nodes))
    # Where all nodes are one, its own size stands for the range.
    width = width or (high - low or abs(high) or 1.0) / 100

    # Points at distances of a quarter of the width, that no peak falls between.
    num_points = int(4 * (high - low) / width) + 41
    grid = np.linspace(low - 5 * width, high + 5 * width, num_points)
    smoothed = smooth_density(density, jnp.asarray(grid), width)
    mean, error = (np.asarray(x) for x in smoothed)
    (line,) = ax.semilogy(grid, mean, label=label)
    color = line.get_color()

    # A thousandth of one eigenvalue's peak; what is below is rounding.
    floor = 1e-3 / (float(density.dimension) * width)

    # The error of a single probe is infinite, and no band.
    if np.isfinite(error).all():
        lower = np.maximum(mean - 2 * error, floor)
        upper = np.maximum(mean + 2 * error, floor)
        ax.fill_between(grid, lower, upper, color=color, alpha=0.2, linewidth=0)
    if eigenvalues is not None:
        values = np.asarray(eigenvalues)
        heights = np.full(values.shape, 2 * floor)
        ax.plot(values, heights, "v", color=color, markersize=5)
    ax.set(xlabel="eigenvalue", ylabel="density", ylim=(floor, 3 * np.max(mean)))
    return ax


def eigenvalues(
    values: Any,
    *,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw eigenvalues as bars, in the order in which they come.

    Args:
      values: the eigenvalues, such as the first result of `curvax.eigsh`.
      label: name of the bars in a legend.
      ax: the axes to draw into; by default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import curvax.plot
      >>> len(curvax.plot.eigenvalues([3.0, 2.0, -1.0]).patches)
      3
    """
    ax = _axes(ax)
    heights = np.asarray(values)
    # Counted from one, as eigenvalues are.
    numbers = np.arange(1, len(heights) + 1)
    ax.bar(numbers, heights, label=label)
    ax.set(xlabel="number", ylabel="eigenvalue")
    return ax


def sensitivities(
    values: Mapping[str, Any],
    *,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw a number for each layer as horizontal bars, the first layer on top.

    Where the number is an estimate, its standard error is drawn too.

    Args:
      values: numbers or `curvax.Estimate`s, by the name of the layer.
      label: what the numbers are, for the axis.
      ax: the axes to draw into; by default those of a new figure.

    Returns:
      The axes.

    Example:
      >>> import curvax, curvax.plot
      >>> first, second = curvax.Estimate(3.0, 0.1), curvax.Estimate(1.0, 0.2)
      >>> ax = curvax.plot.sensitivities({"first": first, "second": second})
      >>> [text.get_text() for text in ax.get_yticklabels()]
      ['first', 'second']
    """
    ax = _axes(ax)

    # matplotlib leaves out error bars of NaN.
    def mean_and_error(x: Any) -> tuple[Any, Any]:
        return (x.mean, x.sem) if isinstance(x, Estimate) else (x, np.nan)

    pairs = [mean_and_error(x) for x in values.values()]
    means, errors = np.array(pairs, float).reshape(-1, 2).T
    # The error of a single probe is infinite: nothing to draw.
    finite_errors = np.where(np.isfinite(errors), errors, np.nan)
    has_errors = not np.isnan(finite_errors).all()

    positions = np.arange(len(means))
    ax.barh(positions, means, xerr=finite_errors if has_errors else None)
    ax.set_yticks(positions, list(values))
    # The first layer on top.
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
      front: the allocations returned by `curvax.apps.quantization.pareto`.
      marked: allocations to draw as points, by their names.
      label: name of the steps in a legend.
      ax: the axes to draw into; by default those of a new figure.

    Returns:
      The axes; the vertical one is logarithmic if no sum is negative or zero.

    Example:
      >>> import curvax.plot
      >>> from curvax.apps import quantization
      >>> front = quantization.pareto({"l": {2: 4.0, 4: 1.0}}, {"l": 800})
      >>> ax = curvax.plot.pareto_front(front, marked={"4 bits": front[-1]})
      >>> ax.lines[0].get_xdata().tolist()
      [0.2, 0.4]
    """
    ax = _axes(ax)
    by_name = dict(marked or {})
    # Sizes are in bits.
    kilobytes = [point.size / 8000 for point in front]
    omegas = [point.omega for point in front]
    # Between two points of the front, the smaller one is what fits.
    ax.step(kilobytes, omegas, where="post", label=label)
    for name, point in by_name.items():
        ax.plot([point.size / 8000], [point.omega], "o", label=name)
    if all(point.omega > 0 for point in (*front, *by_name.values())):
        ax.set_yscale("log")
    ax.set(xlabel="size, kB", ylabel="sum of sensitivities")
    return ax


def sharpness(reports: Mapping[int, SharpnessReport], *, ax: Axes | None = None) -> Axes:
    """Draw how near training is to the edge of stability, by both ratios of sharpness reports.

    Args:
      reports: the results of `curvax.apps.sharpness_report`, by step.
      ax: the axes to draw into; by default those of a new figure.

    Returns:
      The axes, with a line at 1, above which a method is not stable.

    Example:
      >>> import jax.numpy as jnp, curvax, curvax.plot
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batches = [(jnp.eye(2), jnp.zeros(2))]
      >>> report = curvax.apps.sharpness_report(
      ...     objective, jnp.ones(2), batches, learning_rate=0.5
      ... )
      >>> curvax.plot.sharpness({0: report}).lines[0].get_ydata().tolist()
      [0.125]
    """
    ax = _axes(ax)
    steps = list(reports)
    # Learning rate over the largest at which full-batch descent, or SGD with its noise, is stable.
    gradient_descent = [float(report.gradient_descent) for report in reports.values()]
    sgd = [float(report.sgd) for report in reports.values()]
    ax.plot(steps, gradient_descent, "o-", label="gradient descent")
    ax.plot(steps, sgd, "o-", label="SGD")
    ax.axhline(1, color="gray", linewidth=1)
    ax.set(xlabel="step", ylabel="learning rate / largest stable one")
    ax.legend()
    return ax


def _axes(ax: Axes | None) -> Axes:
    if ax is not None:
        return ax
    _, new = pyplot.subplots(layout="constrained")
    return new
