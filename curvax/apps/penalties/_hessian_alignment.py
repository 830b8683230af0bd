"""Alignment of the curvature of several domains, for classifiers that serve another one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.tree_util import keystr
from jaxtyping import Array, PyTree

from curvax._batch import check_batch
from curvax._checks import check_at_least, check_count, check_params, describe, look_up
from curvax._trees import inner_product, safe_divide
from curvax._types import Batch, Params, PRNGKey, Scalar, tree_at_least_float32
from curvax.apps.penalties._in_chunks import mean_loss
from curvax.estimate import hutchinson_diagonal
from curvax.objective import Objective, scaled_to_share, total_terms
from curvax.products import hvp

# e: domains, N_e: terms of domain e, g_e and H_e: gradient and Hessian of its mean loss in the head

Head: TypeAlias = dict[str, Array]
"""The leaves of params that make the head, by path."""
HeadLoss: TypeAlias = Callable[[Head], Scalar]
Domains: TypeAlias = Sequence[Batch] | Mapping[str, Batch]


def hessian_alignment(
    objective: Objective,
    head: Callable[[str, Array], bool],
    *,
    form: str = "hessian_gradient",
    curvature_weight: Any = 1e-4,
    gradient_weight: Any = 5e-3,
    num_probes: int = 300,
    microbatch: int | None = None,
) -> Callable[..., Scalar]:
    """Add to a loss how far apart gradients and Hessians of the domains are, in the head.

        L + mean_e [ curvature_weight |h_e - h|^2 + gradient_weight |g_e - g|^2 ]

    L is the mean loss of all domains together, with gradient g and Hessian H in the params of the
    head, and h stands for its curvature:

        "hessian_gradient":  h_e = H_e g_e,    h = H g         (`H g = |g| grad |g|`)
        "hutchinson":        h_e = diag(H_e),  h = diag(H)     (estimates, with common probes)

    g and h are constants in derivatives. All params are trained by the penalty, the features before
    the head too. It is 0 where all domains have the same data.

    Args:
      objective: a `curvax.Objective`; of one with aux the loss alone is taken.
      head: a function `(path, leaf) -> bool` that selects the leaves of the head, mostly the last
        kernel and its bias; paths are those that `jax.tree_util.keystr` prints.
      form: "hessian_gradient" or "hutchinson".
      curvature_weight: at least 0; may be traced. The authors' code has 1e-4, for "hutchinson"
        1e-3. Gradients and Hessians shrink as the fit gets better: try larger ones.
      gradient_weight: at least 0; may be traced.
      num_probes: probes of "hutchinson". With n of them the penalty is too large by the variance of
        the estimates of `h_e - h`, which falls as 1 / n.
      microbatch: rows worked on at a time; the same result in bounded memory.

    Returns:
      `regularized(params, domains, key) -> scalar`, for `jax.value_and_grad`. `domains` is a list,
      tuple or dict of two batches or more, `(inputs, targets)` each, of any sizes: each is weighed
      by its terms in L, g and h, and all are equal in the mean over e. A domain without terms,
      where all are masked, is left out of that mean. `key` is the JAX key of the probes; the other
      form needs none.

    Raises:
      ValueError: a weight is negative, the form is unknown, the head is empty, there are less than
        two domains, or the key is missing.
      TypeError: the objective has several parts, a domain is no batch, or the loss compares
        examples with each other.

    Cost: "hessian_gradient": a gradient and a Hessian product of all data, each differentiated, and
      the same once more, not differentiated. In the head they cost little; the features are run
      three times. "hutchinson": `num_probes` products each. Memory: as a gradient, or a chunk.

    Example: two domains of one feature with `g_e = w - y_e` and `H_e = 1`: both terms are 1/4 / 2.
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> domains = [(jnp.ones((2, 1)), jnp.full(2, y)) for y in (0.0, 1.0)]
      >>> weights = {"curvature_weight": 1.0, "gradient_weight": 1.0}
      >>> align = curvax.apps.penalties.hessian_alignment(objective, lambda *_: True, **weights)
      >>> align(jnp.zeros(1), domains).item() - objective(jnp.zeros(1), domains[1]).item() / 2
      0.5

    References: Hemati, Zhang, Estiri and Chen (2023), Understanding Hessian alignment for domain
      generalization, https://arxiv.org/abs/2308.11778. Equations and defaults are those of the
      authors' code; the identity of `H g` is derived, and tested.

    Deviates: domains without terms are left out. `H g` is a Hessian product.
    """
    curvature_of = look_up("form", form, FORMS)
    check_at_least(0, curvature_weight=curvature_weight, gradient_weight=gradient_weight)
    check_count(1, num_probes=num_probes)

    if objective.parts:
        raise TypeError(
            "alignment is of an objective of one part, got a curvax.total; align the part that has "
            "domains, and add the others to the loss."
        )

    def regularized(params: Params, domains: Domains, key: PRNGKey | None = None) -> Scalar:
        """Return the loss of all domains together, and the penalty."""
        check_params(params)
        batches = _batches_of(domains)
        if form == "hutchinson" and key is None:
            raise ValueError('form="hutchinson" draws probes: call it as (params, domains, key).')
        curvature = partial(curvature_of, key=key, num_probes=num_probes)

        # N_e, and the sum over domains; for a weighted sum of losses a dict by head of that.
        terms = [total_terms(objective, params, batch, microbatch) for batch in batches]
        totals = jax.tree.map(lambda *counts: sum(counts), *terms)

        def pooled(p: Params) -> Scalar:
            """Return L, the mean loss of all domains together, as the sum of their shares."""
            shares = []
            for batch in batches:
                share = scaled_to_share(objective, p, batch, totals)
                shares.append(mean_loss(share, microbatch)(p, batch))
            return jnp.asarray(sum(shares))

        # g and h are constants: nothing of them is differentiated.
        g, h = _moments(pooled, head, lax.stop_gradient(params), curvature)
        g, h = lax.stop_gradient((g, h))
        distances, counted = [], []
        for batch, counts in zip(batches, terms, strict=True):
            loss_e = mean_loss(objective, microbatch)
            g_e, h_e = _moments(partial(_with_batch, loss_e, batch), head, params, curvature)
            # a |h_e - h|^2 + b |g_e - g|^2
            of_curvature = curvature_weight * _squared_distance(h_e, h)
            of_gradient = gradient_weight * _squared_distance(g_e, g)
            # The gradient of no terms is 0, and says nothing of a domain.
            has_terms = jnp.asarray(optax.tree.sum(counts)) > 0
            distances.append(jnp.where(has_terms, of_curvature + of_gradient, 0))
            counted.append(has_terms)
        # Where no domain has terms (0/0), there is no penalty.
        penalty = safe_divide(sum(distances), jnp.sum(jnp.stack(counted), dtype=distances[0].dtype))
        return pooled(params) + penalty

    return regularized


def _moments(
    loss: Callable[[Params], Scalar],
    head: Callable[[str, Array], bool],
    params: Params,
    curvature: Callable[..., Head],
) -> tuple[Head, Head]:
    """Return the gradient of a loss in the head, and what stands for its Hessian there."""
    paths = [(keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]
    selected = {path: leaf for path, leaf in paths if head(path, leaf)}
    if not selected:
        names = ", ".join(path for path, _ in paths)
        raise ValueError(f"head selects no leaf of params; their paths are {names}.")

    def of_head(leaves: Head) -> Scalar:
        ordered = [leaves.get(path, leaf) for path, leaf in paths]
        return loss(jax.tree.unflatten(jax.tree.structure(params), ordered))

    g = jax.grad(of_head)(selected)
    return g, curvature(of_head, selected, g)


def _hessian_gradient(
    loss: HeadLoss, head: Head, g: Head, *, key: PRNGKey | None, num_probes: int
) -> Head:
    """Return `H g`, which is `|g| grad |g|`."""
    del key, num_probes
    product: Head = hvp(loss, head)(g)
    return product


def _hessian_diagonal(
    loss: HeadLoss, head: Head, g: Head, *, key: PRNGKey, num_probes: int
) -> Head:
    """Estimate `diag(H)`, for every domain with the same probes: they meet the same noise."""
    del g
    mean: Head = hutchinson_diagonal(hvp(loss, head), head, key, num_probes).mean
    return mean


FORMS: dict[str, Callable[..., Head]] = {
    "hessian_gradient": _hessian_gradient,
    "hutchinson": _hessian_diagonal,
}
"""What may stand for a Hessian."""


def _with_batch(loss: Callable[..., Scalar], batch: Batch, params: Params) -> Scalar:
    return loss(params, batch)


def _squared_distance(x: PyTree[Array], y: PyTree[Array]) -> Scalar:
    """Return `|x - y|^2`, in at least float32."""
    difference = optax.tree.sub(tree_at_least_float32(x), tree_at_least_float32(y))
    return inner_product(difference, difference)


def _batches_of(domains: Any) -> list[Batch]:
    """Return the batches of the domains, or raise unless there are two or more."""
    if not isinstance(domains, Mapping | list | tuple):
        raise TypeError(
            f"domains must be a list or dict of batches (inputs, targets), got {describe(domains)}."
        )
    named = dict(domains) if isinstance(domains, Mapping) else dict(enumerate(domains))
    if len(named) < 2:
        raise ValueError(f"alignment is between two domains or more, got {len(named)}.")
    for name, batch in named.items():
        try:
            check_batch(batch)
        except (TypeError, ValueError) as error:
            error.add_note(f"This is of domains[{name!r}]; each domain is (inputs, targets).")
            raise
    return list(named.values())
