"""What a loss offers, and what a user's own loss gets by default.

Here is the one place where the library samples targets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from curvax._checks import check_scalar
from curvax._types import Outputs, PRNGKey, Scalar, Targets

Value: TypeAlias = Callable[[Outputs, Targets], Scalar]
Hvp: TypeAlias = Callable[[Outputs, Targets, Outputs], Outputs]
Sample: TypeAlias = Callable[[PRNGKey, Outputs, Targets], Targets]
NumTerms: TypeAlias = Callable[[Outputs, Targets], Scalar]
PseudoGradient: TypeAlias = Callable[[PRNGKey, Outputs, Targets], Outputs]
EmpiricalGradient: TypeAlias = Callable[[Outputs, Targets], Outputs]
TermAxes: TypeAlias = Callable[[Outputs, Targets], int]
TermWeights: TypeAlias = Callable[[Outputs, Targets], Float[Array, " batch"]]


@dataclass(frozen=True)
class Loss:
    """A loss `L(outputs, targets)` that is a mean over terms; callable.

    Attributes:
      value: `(outputs, targets) -> scalar`, the mean over terms.
      curvature_product: `(outputs, targets, v) -> tree like outputs`, the curvature that the
        Gauss-Newton matrix uses, times v.
      sample: `(key, outputs, targets) -> targets` drawn from the model's own prediction; the
        targets that come in say which terms count.
      num_terms: `(outputs, targets) -> scalar`, how many terms the mean is over (0 when all are
        masked).
      pseudo_gradient: `(key, outputs, targets) -> r`, see `curvax.losses.pseudo_gradient`.
      empirical_gradient: `(outputs, targets) -> r`, the same at the batch's own targets, of which
        the empirical Fisher is made: `sqrt(num_terms)` times the gradient.
      term_axes: `(outputs, targets) -> int`, how many leading axes of the outputs say which term
        an entry is of. (Of a `weighted_sum` each head has its own.)
      block_axes: `(outputs, targets) -> int`, how many leading axes of the outputs tell the
        diagonal blocks of the curvature apart: those of the terms, or more. Products of a
        pseudo-gradient's entries in different blocks have the mean zero.
      couples_examples: whether the loss compares examples of a batch with each other, as
        `contrastive` does. Then single examples have no loss of their own.
      heads: `(name, weight, loss)` of each head of a `weighted_sum`, else empty.
      centering_weights: `(outputs, targets) -> p`, `[batch]` with the sum 1, of a loss whose
        curvature is `diag(p) - p p'` for each entry of an example's outputs; None for others.
    """

    value: Value
    curvature_product: Hvp
    sample: Sample
    num_terms: NumTerms
    pseudo_gradient: PseudoGradient
    empirical_gradient: EmpiricalGradient
    term_axes: TermAxes
    block_axes: TermAxes
    couples_examples: bool = False
    # Weights may be arrays, which have no hash; objectives are static arguments of `jit`.
    heads: tuple[tuple[str, Any, Loss], ...] = field(default=(), compare=False)
    # Its root is known, of which sample space makes use.
    centering_weights: TermWeights | None = None

    def __call__(
        self,
        outputs: Outputs,
        targets: Targets,
    ) -> Scalar:
        """Return the mean loss."""
        return check_scalar(self.value(outputs, targets), "a loss")


def from_function(
    value: Value,
    *,
    curvature_product: Hvp | None = None,
    sample: Sample | None = None,
    num_terms: NumTerms | None = None,
    pseudo_gradient: PseudoGradient | None = None,
    empirical_gradient: EmpiricalGradient | None = None,
    term_axes: TermAxes | None = None,
    block_axes: TermAxes | None = None,
    couples_examples: bool = False,
) -> Loss:
    """Make a `Loss` of a function `value(outputs, targets) -> scalar`, the mean over its terms.

    Args:
      value: `(outputs, targets) -> scalar`, the mean over terms.
      curvature_product: as `Loss.curvature_product`; by default the product with the Hessian with
        respect to outputs, by autodiff (indefinite where the loss is not convex in them).
      sample: as `Loss.sample`; without it, methods that sample raise a TypeError.
      num_terms: as `Loss.num_terms`; by default the length of the leading axis.
      pseudo_gradient: as `Loss.pseudo_gradient`; by default `sqrt(num_terms)` times the gradient
        at sampled targets, which is right whenever `sample` draws from the density of which
        `value` is the negative logarithm.
      empirical_gradient: as `Loss.empirical_gradient`; by default `sqrt(num_terms)` times the
        gradient.
      term_axes: as `Loss.term_axes`; by default 1, the batch axis.
      block_axes: as `Loss.block_axes`; by default those of the terms.
      couples_examples: whether the value compares examples of a batch with each other. Then what
        works on single examples or on parts of a batch is refused.

    Returns:
      A `Loss`.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> def cauchy(f, y):
      ...     return jnp.mean(jnp.sum(jnp.log1p((f - y) ** 2), axis=-1))
      >>> loss = curvax.losses.from_function(cauchy)
      >>> f = y = jnp.zeros((4, 2))             # at f = y each entry has curvature 2 / num_terms
      >>> loss.curvature_product(f, y, jnp.ones((4, 2)))[0].tolist()
      [0.5, 0.5]
    """

    # r = sqrt(N) grad_f L(f, y), y ~ p(. | f). With the scores s_i of the N terms, grad_f L is
    # 1/N sum_i s_i, so r = 1/sqrt(N) sum_i s_i and E[r r'] = 1/N sum_i E[s_i s_i'], the curvature
    # of the mean.
    def scaled_gradient(f: Outputs, y: Targets, num_terms: Scalar) -> Outputs:
        return times(jnp.sqrt(num_terms), jax.grad(value)(f, y))

    def sampled_gradient(
        key: PRNGKey,
        outputs: Outputs,
        targets: Targets,
    ) -> Outputs:
        """Draw targets, and return `sqrt(N)` times the gradient of the loss at them."""
        # The draw depends on the outputs; a derivative of r must not go through it.
        f = jax.lax.stop_gradient(outputs)
        y = loss.sample(key, f, targets)
        return scaled_gradient(f, y, count_terms(loss, f, targets))

    # The same at the targets of the data, so that it has the same unit: were they the model's own,
    # E[r r'] would be S again.
    def gradient_at_targets(outputs: Outputs, targets: Targets) -> Outputs:
        return scaled_gradient(outputs, targets, count_terms(loss, outputs, targets))

    if couples_examples:
        gradient_at_targets = _no_empirical_gradient
    loss = Loss(
        value=value,
        curvature_product=curvature_product or _autodiff_hvp(value),
        sample=sample or _no_sample,
        num_terms=num_terms or _leading_axis,
        pseudo_gradient=pseudo_gradient or sampled_gradient,
        empirical_gradient=empirical_gradient or gradient_at_targets,
        term_axes=term_axes or _batch_axis,
        block_axes=block_axes or term_axes or _batch_axis,
        couples_examples=couples_examples,
    )
    return loss


def as_loss(loss: Any) -> Loss:
    """Return `loss` if it is a `Loss`; else build one of a callable.

    Of the callable's own methods, those are used that a `Loss` has.
    """
    if isinstance(loss, Loss):
        return loss
    if not callable(loss):
        raise TypeError(
            f"loss must be callable as loss(outputs, targets), got {type(loss).__name__}."
        )
    # None stands for the default.
    return from_function(
        loss,
        curvature_product=getattr(loss, "curvature_product", None),
        sample=getattr(loss, "sample", None),
        num_terms=getattr(loss, "num_terms", None),
        pseudo_gradient=getattr(loss, "pseudo_gradient", None),
        empirical_gradient=getattr(loss, "empirical_gradient", None),
        term_axes=getattr(loss, "term_axes", None),
        block_axes=getattr(loss, "block_axes", None),
        couples_examples=getattr(loss, "couples_examples", False),
    )


def pseudo_gradient(
    loss: Loss,
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
) -> Outputs:
    """Draw a cotangent `r` of the outputs with `E[r r'] = S`, the curvature of the mean loss.

    S is the output-space matrix that `loss.curvature_product` multiplies by. By default
    `r = sqrt(N) grad_f L(f, y)` with `y ~ p(. | f)` and N terms: a sum of N independent zero-mean
    scores, each divided by `sqrt(N)`. Then Fisher `= E[(J'r)(J'r)']` and Gauss-Newton-Bartlett
    `= (J'r)^2`, with no other constant.

    Args:
      loss: a `Loss`, or a callable that `as_loss` takes.
      key: JAX key.
      outputs: the model's outputs, leading axis first.
      targets: they say which terms count (`ignore_index`, masks); their values are not used
        otherwise.

    Returns:
      A tree like `outputs`.

    Cost: one gradient of the loss with respect to the outputs.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> loss = curvax.losses.squared_error()            # curvature I / 4: entries of variance 1/4
      >>> f = jnp.zeros((4, 1000))
      >>> r = curvax.losses.pseudo_gradient(loss, jax.random.key(0), f, f)
      >>> bool(abs(jnp.var(r) - 0.25) < 0.02)
      True

    References: Martens (2020), New insights and perspectives on the natural gradient method,
      sections 5 and 9, https://arxiv.org/abs/1412.1193.
    """
    return as_loss(loss).pseudo_gradient(key, outputs, targets)


def count_terms(
    loss: Loss,
    outputs: Outputs,
    targets: Targets,
) -> Scalar:
    """Return `loss.num_terms` as a float of the outputs' precision, at least float32."""
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(outputs))
    return jnp.asarray(loss.num_terms(outputs, targets), dtype)


def times(factor: Any, tree: PyTree) -> PyTree:
    """Multiply every leaf by a scalar, keeping the leaf's dtype."""
    return jax.tree.map(lambda x: (factor * x).astype(x.dtype), tree)


def by_head(outputs: Outputs, parts: dict[str, Any]) -> Any:
    """Put what belongs to the heads of a weighted sum into the kind of container of its outputs."""

    def part(path: tuple[Any, ...], head_outputs: Any) -> Any:
        del head_outputs
        return parts[path[0].key]

    # Everything below the container, such as an OrderedDict, counts as a leaf: one for each head.
    return jax.tree.map_with_path(part, outputs, is_leaf=lambda x: x is not outputs)


def _leading_axis(outputs: Outputs, targets: Targets) -> Scalar:
    del targets
    # All outputs share the batch axis: any leaf tells its length.
    first = jax.tree.leaves(outputs)[0]
    return jnp.asarray(float(first.shape[0]))


def _batch_axis(outputs: Outputs, targets: Targets) -> int:
    del outputs, targets
    return 1


def _no_sample(
    key: PRNGKey,
    outputs: Outputs,
    targets: Targets,
) -> Targets:
    """Raise: nothing says how to draw targets."""
    raise TypeError(
        "this loss has no way to sample targets from the model's prediction, which the Fisher, "
        "Gauss-Newton-Bartlett and Sophia-G need; give one: "
        "curvax.losses.from_function(value, sample=lambda key, outputs, targets: ...), or take "
        'fisher="empirical", which needs no samples (curvax.kfac, ekfac, kron_factors).'
    )


def _no_empirical_gradient(outputs: Outputs, targets: Targets) -> Outputs:
    raise TypeError(
        "this loss compares the examples of a batch with each other, so that single examples have "
        "no gradient and there is no empirical Fisher; "
        'take fisher="mc" or "exact" (curvax.kfac, kron_factors).'
    )


def _autodiff_hvp(value: Value) -> Hvp:
    """Return the product with the Hessian of `value` with respect to outputs."""

    # Forward over reverse: d/dt grad_f L(f + t v) at t = 0.
    def curvature_product(
        outputs: Outputs,
        targets: Targets,
        v: Outputs,
    ) -> Outputs:
        def gradient(f: Outputs) -> Outputs:
            return jax.grad(value)(f, targets)

        _, product = jax.jvp(gradient, (outputs,), (v,))
        return product

    return curvature_product
