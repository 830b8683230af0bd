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


def sensitivities(
    curvature: Mapping[str, Array | float],
    params: Params,
    widths: Iterable[int],
    scheme: Scheme | None = None,
) -> Table:
    """Return `Omega_l(b) = (c_l / n_l) |Q_b(W_l) - W_l|^2` for every layer l and width b.

    Args:
      curvature: c_l by layer: a trace, a top eigenvalue, or what else stands for the curvature of a layer of n_l weights.
      params: pytree of float arrays.
      widths: in bits, each from 2 to 8.
      scheme: of the quantization.

    Returns:
      the table that `allocate` takes, `{layer: {bits: Omega}}`.

    Raises:
      ValueError: layers of curvature that are not those of the scheme.

    Example:
      >>> import jax.numpy as jnp
      >>> from curvax.apps import quantization
      >>> table = quantization.sensitivities({"['w']": 8.0}, {"w": jnp.array([[0.25, -1.0]])}, (2,))
      >>> table["['w']"][2].item()
      0.25
    """
    numbers = sizes(params, scheme)
    if curvature.keys() != numbers.keys():
        raise ValueError(
            f"curvature is of layers {', '.join(sorted(curvature))}, the scheme quantizes {', '.join(sorted(numbers))}: "
            "estimate it with by=quantization.layers_by_path(params, scheme).get."
        )
    moved = perturbations(params, widths, scheme)
    mean = {layer: jnp.asarray(curvature[layer]) / n for layer, n in numbers.items()}
    return {
        layer: {width: mean[layer] * x for width, x in row.items()} for layer, row in moved.items()
    }


def hawq(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    widths: Iterable[int] = (2, 4, 8),
    scheme: Scheme | None = None,
    **options: Any,
) -> tuple[Table, dict[str, EigInfo]]:
    """Measure layers by the top eigenvalue of their diagonal block: `Omega_l(b) = (lambda_l / n_l) |Q_b(W_l) - W_l|^2`.

    Args:
      matvec: `v -> H v` on trees like params. The Gauss-Newton matrix (`curvax.ggnvp`) has no negative eigenvalues, which
        the Hessian of a network that is not at a minimum may have.
      params: trained.
      key: JAX key.
      widths: in bits, each from 2 to 8.
      scheme: of the quantization.
      **options: of `curvax.eigsh`.

    Returns:
      the table that `allocate` takes, `{layer: {bits: Omega}}`, and what `eigsh` tells of each layer.

    Cost: products of `curvax.spectra.top_eigenvalues_by`.

    References: Dong, Yao, Gholami, Mahoney and Keutzer (2019), HAWQ.

    Deviates: as published, layers are ordered by `lambda_l / n_l` and widths are chosen by hand along that order; the
      perturbation, there used for the order of fine-tuning, makes a table of it that `allocate` can work with.
    """
    values, info = top_eigenvalues_by(
        matvec, params, key, by=layers_by_path(params, scheme).get, **options
    )
    return sensitivities(values, params, widths, scheme), info


def hawq_v2(
    matvec: Matvec,
    params: Params,
    key: PRNGKey,
    num_probes: int,
    widths: Iterable[int] = (2, 4, 8),
    scheme: Scheme | None = None,
) -> tuple[Table, dict[str, Estimate]]:
    """Measure layers by the average trace of their diagonal block: `Omega_l(b) = (tr(H_l) / n_l) |Q_b(W_l) - W_l|^2`.

    Half the sum over layers is what quantization adds to the quadratic model of the loss, if its errors are independent of
    the eigenvectors of the Hessian and of each other.

    Args:
      matvec: `v -> H v` on trees like params; see `hawq`.
      params: trained.
      key: JAX key.
      num_probes: of Hutchinson's method; one product serves all layers.
      widths: in bits, each from 2 to 8.
      scheme: of the quantization.

    Returns:
      the table that `allocate` takes, `{layer: {bits: Omega}}`, and the traces with their standard errors.

    Cost: `num_probes` products. Over a stream of batches: `sensitivities` of `curvax.spectra.traces_over`.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> from curvax.apps import quantization
      >>> objective = curvax.Objective(lambda p, x: x @ p["w"], curvax.losses.squared_error())
      >>> params = {"w": jnp.array([[0.25], [-1.0]])}
      >>> matvec = curvax.ggnvp(objective, params, (2 * jnp.eye(2), jnp.zeros((2, 1))))
      >>> omegas, traces = quantization.hawq_v2(matvec, params, jax.random.key(0), num_probes=2, widths=(2,))
      >>> traces["['w']"].mean.item(), omegas["['w']"][2].item()                    # 2 0.25^2
      (4.0, 0.125)

    References: Dong, Yao, Arfeen, Gholami, Mahoney and Keutzer (2020), HAWQ-V2, equation 11 for Omega.
    """
    traces = traces_by(matvec, params, num_probes, key, by=layers_by_path(params, scheme).get)
    return sensitivities(
        {layer: trace.mean for layer, trace in traces.items()}, params, widths, scheme
    ), traces
