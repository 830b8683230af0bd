"""What a loss offers, what a user's own loss gets by default, and the one place where targets are sampled."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from curvax._checks import check_scalar
from curvax._types import Outputs, PRNGKey, Scalar, Targets

Value: TypeAlias = Callable[[Outputs, Targets], Scalar]
Hvp: TypeAlias = Callable[[Outputs, Targets, Outputs], Outputs]
Sample: TypeAlias = Callable[[PRNGKey, Outputs, Targets], Targets]
NumTerms: TypeAlias = Callable[[Outputs, Targets], Scalar]
PseudoGradient: TypeAlias = Callable[[PRNGKey, Outputs, Targets], Outputs]


@dataclass(frozen=True)
class Loss:
    """A loss `L(outputs, targets)` that is a mean over terms; callable.

    Attributes:
      value: `(outputs, targets) -> scalar`, the mean over terms.
      curvature_product: `(outputs, targets, v) -> tree like outputs`, the curvature that the Gauss-Newton matrix uses, times v.
      sample: `(key, outputs, targets) -> targets` drawn from the model's own prediction; the given targets say which
        terms count.
      num_terms: `(outputs, targets) -> scalar`, how many terms the mean is over (0 when all are masked).
      pseudo_gradient: `(key, outputs, targets) -> r`, see `curvax.losses.pseudo_gradient`.
      heads: `(name, weight, loss)` of each head of a `weighted_sum`, else empty.
    """

    value: Value
    curvature_product: Hvp
    sample: Sample
    num_terms: NumTerms
    pseudo_gradient: PseudoGradient
    heads: tuple[tuple[str, Any, Loss], ...] = field(default=(), compare=False)

    def __call__(self, outputs: Outputs, targets: Targets) -> Scalar:
        """Return the mean loss."""
        return check_scalar(self.value(outputs, targets), "a loss")


def from_function(
    value: Value,
    *,
    curvature_product: Hvp | None = None,
    sample: Sample | None = None,
    num_terms: NumTerms | None = None,
    pseudo_gradient: PseudoGradient | None = None,
) -> Loss:
    """Make a `Loss` of a function `value(outputs, targets) -> scalar`, the mean over its terms.

    Defaults: `curvature_product` is the Hessian with respect to outputs, by autodiff (indefinite where the loss is not convex in
    them); `num_terms` is the length of the leading axis; `pseudo_gradient` is `sqrt(num_terms)` times the gradient at
    sampled targets, right whenever `sample` draws from the density of which `value` is the negative logarithm. Without
    `sample`, methods that sample raise a TypeError.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> cauchy = curvax.losses.from_function(lambda f, y: jnp.mean(jnp.sum(jnp.log1p((f - y) ** 2), axis=-1)))
      >>> f = y = jnp.zeros((4, 2))                       # at f = y each entry has curvature 2 / num_terms
      >>> cauchy.curvature_product(f, y, jnp.ones((4, 2)))[0].tolist()
      [0.5, 0.5]
    """

    def sampled_gradient(key: PRNGKey, outputs: Outputs, targets: Targets) -> Outputs:
        outputs = jax.lax.stop_gradient(outputs)
        drawn = loss.sample(key, outputs, targets)
        gradient = jax.grad(lambda f: value(f, drawn))(outputs)
        return times(jnp.sqrt(count_terms(loss, outputs, targets)), gradient)

    loss = Loss(
        value=value,
        curvature_product=curvature_product or _autodiff_hvp(value),
        sample=sample or _no_sample,
        num_terms=num_terms or _leading_axis,
        pseudo_gradient=pseudo_gradient or sampled_gradient,
    )
    return loss


def as_loss(loss: Any) -> Loss:
    """Return `loss` if it is a `Loss`; else build one of a callable and of the methods of a `Loss` that it has."""
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise TypeError(
            f"loss must be callable as loss(outputs, targets), got {type(loss).__name__}."
        )
    methods = ("curvature_product", "sample", "num_terms", "pseudo_gradient")
    return from_function(loss, **{name: getattr(loss, name, None) for name in methods})


def pseudo_gradient(loss: Loss, key: PRNGKey, outputs: Outputs, targets: Targets) -> Outputs:
    """Draw a cotangent `r` of the outputs with `E[r r'] = loss.curvature_product`, the output-space curvature of the mean loss.

    By default `r = sqrt(N) grad_f L(f, y)` with `y ~ p(. | f)` and N terms: a sum of N independent zero-mean scores, each
    divided by `sqrt(N)`. Then Fisher `= E[(J'r)(J'r)']` and Gauss-Newton-Bartlett `= (J'r)^2`, with no other constant.

    Args:
      loss: a `Loss`, or a callable that `as_loss` takes.
      key: JAX key.
      outputs: model outputs, leading axis first.
      targets: say which terms count (`ignore_index`, masks); their values are not used otherwise.

    Returns:
      A tree like `outputs`.

    Cost: one gradient of the loss with respect to the outputs.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = curvax.losses.squared_error()                        # curvature I / 4: entries of variance 1/4
      >>> r = curvax.losses.pseudo_gradient(loss, jax.random.key(0), jnp.zeros((4, 1000)), jnp.zeros((4, 1000)))
      >>> bool(abs(jnp.var(r) - 0.25) < 0.02)
      True

    References: Martens (2020), New insights and perspectives on the natural gradient method, sections 5 and 9.
    """
    return as_loss(loss).pseudo_gradient(key, outputs, targets)


def count_terms(loss: Loss, outputs: Outputs, targets: Targets) -> Scalar:
    """Return `loss.num_terms` as a float of the outputs' precision, at least float32."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(outputs))
    return jnp.asarray(loss.num_terms(outputs, targets), dtype)


def times(factor: Any, tree: PyTree) -> PyTree:
    """Multiply every leaf by a scalar, keeping the leaf's dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def _leading_axis(outputs: Outputs, targets: Targets) -> Scalar:
    del targets
    return jnp.asarray(float(jax.tree.leaves(outputs)[0].shape[0]))


def _no_sample(key: PRNGKey, outputs: Outputs, targets: Targets) -> Targets:
    raise TypeError(
        "this loss has no way to sample targets from the model's prediction, which the Fisher, Gauss-Newton-Bartlett "
        "and Sophia-G need; give one: curvax.losses.from_function(value, sample=lambda key, outputs, targets: ...)."
    )


def _autodiff_hvp(value: Value) -> Hvp:
    def curvature_product(outputs: Outputs, targets: Targets, v: Outputs) -> Outputs:
        _, product = jax.jvp(jax.grad(lambda f: value(f, targets)), (outputs,), (v,))
        return product

    return curvature_product
