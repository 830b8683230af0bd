"""Sensitivities: how much a layer's quantization costs, by its curvature (HAWQ, HAWQ-V2)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from curvax._types import Matvec, Params, PRNGKey
from curvax.apps.quantization._quantizers import Scheme, Table, layers_by_path, perturbations, sizes
from curvax.estimate import Estimate
from curvax.spectra import EigInfo, top_eigenvalues_by, traces_by

# W_l: the n_l weights of layer l, Q_b: rounding to b bits, H_l: the layer's block of the Hessian


def sensitivities(
    curvature: Mapping[str, Array | float],
    params: Params,
    widths: Iterable[int],
    scheme: Scheme | None = None,
) -> Table:
    """Return `Omega_l(b) = (c_l / n_l) |Q_b(W_l) - W_l|^2` for every layer l and width b.

    Args:
      curvature: c_l by layer: a trace, a top eigenvalue, or another measure of the curvature of a
        layer of n_l weights.
      params: a pytree of float arrays.
      widths: widths in bits, each from 2 to 8.
      scheme: how weights are quantized; None: `Scheme()`.

    Returns:
      The table that `allocate` takes, `{layer: {bits: Omega}}`.

    Raises:
      ValueError: the layers of curvature are not those of the scheme.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> params = {"w": jnp.array([[0.25, -1.0]])}
      >>> table = quantization.sensitivities({"['w']": 8.0}, params, (2,))
      >>> table["['w']"][2].item()
      0.25
    """
    numbers = sizes(params, scheme)
    if curvature.keys() != numbers.keys():
        raise ValueError(
            f"curvature is of layers {', '.join(sorted(curvature))}, the scheme quantizes "
            f"{', '.join(sorted(numbers))}: estimate it with "
            "by=quantization.layers_by_path(params, scheme).get."
        )
    table: Table = {}
    for layer, row in perturbations(params, widths, scheme).items():
        # the curvature of an average weight, c_l / n_l
        mean_curvature = jnp.asarray(curvature[layer]) / numbers[layer]
        table[layer] = {width: mean_curvature * moved for width, moved in row.items()}
    return table


def hawq(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    widths: Iterable[int] = (2, 4, 8),
    scheme: Scheme | None = None,
    **options: Any,
) -> tuple[Table, dict[str, EigInfo]]:
    """Measure each layer by the top eigenvalue lambda_l of its diagonal block of the Hessian.

    The sensitivities are `Omega_l(b) = (lambda_l / n_l) |Q_b(W_l) - W_l|^2`.

    Args:
      matvec: a function `v -> H v` on trees like params. The Gauss-Newton matrix (`curvax.ggnvp`)
        has no negative eigenvalues; the Hessian of a network that is not at a minimum may have
        some.
      params: the trained parameters.
      key: a JAX key.
      widths: widths in bits, each from 2 to 8.
      scheme: how weights are quantized; None: `Scheme()`.
      **options: options of `curvax.eigsh`.

    Returns:
      The table that `allocate` takes, `{layer: {bits: Omega}}`, and the information of `eigsh` for
      each layer.

    Cost: the products of `curvax.spectra.top_eigenvalues_by`.

    References: Dong, Yao, Gholami, Mahoney and Keutzer (2019), HAWQ,
      https://arxiv.org/abs/1905.03696.

    Deviates: as published, layers are ordered by `lambda_l / n_l` and widths are chosen by hand
      along that order; the perturbation, there used for the order of fine-tuning, turns it into a
      table that `allocate` can work with.
    """
    by = layers_by_path(params, scheme).get
    values, info = top_eigenvalues_by(matvec, params, key, by=by, **options)
    return sensitivities(values, params, widths, scheme), info


def hawq_v2(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int,
    widths: Iterable[int] = (2, 4, 8),
    scheme: Scheme | None = None,
) -> tuple[Table, dict[str, Estimate]]:
    """Measure each layer by the average trace of its diagonal block of the Hessian.

    The sensitivities are `Omega_l(b) = (tr(H_l) / n_l) |Q_b(W_l) - W_l|^2`. Half their sum over
    layers is what quantization adds to the quadratic model of the loss, if its errors are
    independent of the eigenvectors of the Hessian and of each other.

    Args:
      matvec: a function `v -> H v` on trees like params; see `hawq`.
      params: the trained parameters.
      key: a JAX key.
      num_probes: the number of probes of Hutchinson's method; one product serves all layers.
      widths: widths in bits, each from 2 to 8.
      scheme: how weights are quantized; None: `Scheme()`.

    Returns:
      The table that `allocate` takes, `{layer: {bits: Omega}}`, and the traces with their standard
      errors.

    Cost: `num_probes` products. For a stream of batches call `sensitivities` with the traces of
      `curvax.spectra.traces_over`.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import quantization
      >>> objective = curvax.Objective(lambda p, x: x @ p["w"], curvax.losses.squared_error())
      >>> params, batch = {"w": jnp.array([[0.25], [-1.0]])}, (2 * jnp.eye(2), jnp.zeros((2, 1)))
      >>> matvec, key = curvax.ggnvp(objective, params, batch), jax.random.key(0)
      >>> omegas, traces = quantization.hawq_v2(matvec, params, key, num_probes=2, widths=(2,))
      >>> traces["['w']"].mean.item(), omegas["['w']"][2].item()  # 2 0.25^2
      (4.0, 0.125)

    References: Dong, Yao, Arfeen, Gholami, Mahoney and Keutzer (2020), HAWQ-V2,
      https://arxiv.org/abs/1911.03852, equation 11 for Omega.
    """
    # tr(H_l) of all layers by Hutchinson's method
    by = layers_by_path(params, scheme).get
    traces = traces_by(matvec, params, num_probes, key, by=by)
    # HAWQ-V2, equation 11
    means = {layer: trace.mean for layer, trace in traces.items()}
    return sensitivities(means, params, widths, scheme), traces
