"""SANIA: how far to go along a preconditioned gradient, read off the loss."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, PyTree

from curvax._checks import check_precision
from curvax._trees import inner_product, scaled
from curvax._types import Batch, Params, Scalar
from curvax.objective import Objective
from curvax.optim._loss_of_update import loss_of_update
from curvax.optim._rule import transformation, zero_count, zero_number
from curvax.optim._squares import scale_by_adam_sqr

# f: the loss, f_star: its least value, g: the gradient, B: the metric, u = B^-1 g


class SaniaState(NamedTuple):
    """State of `scale_by_sania`.

    Attributes:
      inner_state: state of the wrapped transformation.
      scale: lambda, the factor of the latest step, in [0, 1].
      num_skipped: the number of updates so far in which lambda was 0 since the loss or `g.u` was
        not a finite number, or `g.u` was negative.
    """

    inner_state: Any
    scale: Scalar
    num_skipped: Int[Array, ""]


def scale_by_sania(
    inner: optax.GradientTransformation,
    objective: Objective | None = None,
    f_star: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Scale a preconditioned gradient `u = B^-1 g` such that its model reaches the least loss.

    Along `-lambda u` the model of the loss with the curvature B is `f - lambda n + lambda^2 n / 2`,
    with `n = g.u`. Its first crossing of `f_star` is at

      lambda = 1 - sqrt(1 - 2 (f - f_star) / n)   if n > 2 (f - f_star), else 1,

    the minimum of a model that stays above `f_star`. For `n` far above the loss this is Polyak's
    step, `(f - f_star) / n`.

    Args:
      inner: the transformation that returns u, with B positive definite; `curvax.sania` lists
        those of the paper.
      objective: gives the loss of an update that is called without it.
      f_star: the least value of the loss, 0 where a model can fit every example (interpolation).
        With mini-batches it is that of every batch.

    Returns:
      `optax.GradientTransformationExtraArgs` with `update(updates, state, params, *, value=None,
      batch=None)`, which emits `lambda u`: a learning rate comes after it, and 1 is the paper's.
      The value is the loss at params; without it the objective is evaluated on the batch. At or
      below `f_star`, lambda is 0. The state is a `SaniaState`. A loss or `n` that is not a finite
      number gives a step of zero, a gradient that is not finite one of NaN, which
      `optax.apply_if_finite` sees.

    Raises:
      ValueError: At trace time, both the value and what it is computed from are missing, or the
        value is not one number.
      TypeError: `f_star` arrives in 16 bits.

    Cost: one inner product of trees like params; a forward pass where neither the value is passed
      nor the gradient of the same batch is in the same compiled step.

    Example: the square `(3 w)^2 / 2` by its own curvature: the model is the loss.
      >>> import jax.numpy as jnp, curvax
      >>> newton = curvax.scale_by_oasis()
      >>> tx = curvax.optim.scale_by_sania(newton, f_star=0.0)
      >>> w = jnp.array([2.0])
      >>> at_w = {"value": jnp.sum(9 * w**2) / 2, "curvature": jnp.array([9.0])}
      >>> u, state = tx.update(9 * w, tx.init(w), w, **at_w)
      >>> u.tolist(), state.scale.item()
      ([2.0], 1.0)

    References: Abdukhakimov et al. (2023), SANIA: Polyak-type optimization framework leads to scale
      invariant stochastic algorithms, https://arxiv.org/abs/2312.17369.

    Deviates: in that lambda is computed by a form that does not cancel where n is large.
    """
    check_precision(f_star=f_star)
    inner = optax.with_extra_args_support(inner)

    def init(params: Params) -> SaniaState:
        return SaniaState(inner.init(params), zero_number(), zero_count())

    def update(
        updates: PyTree,
        state: SaniaState,
        params: Params | None = None,
        *,
        value: Any = None,
        batch: Batch | None = None,
        model_params: Params | None = None,
        **extra: Any,
    ) -> tuple[PyTree, SaniaState]:
        model = params if model_params is None else model_params
        loss = loss_of_update(value, objective, model, batch)
        steps, inner_state = inner.update(
            updates,
            state.inner_state,
            params,
            value=loss,
            batch=batch,
            model_params=model_params,
            **extra,
        )

        # n = g' B^-1 g. Negative, B is no metric; NaN in it is also in the steps, and stays there
        # for any lambda.
        n = inner_product(updates, steps)
        is_usable = jnp.isfinite(loss) & (n >= 0) & jnp.isfinite(n)
        scale = jnp.where(is_usable, _first_crossing(loss - f_star, n), 0)
        new = SaniaState(
            inner_state=inner_state,
            scale=scale.astype(jnp.float32),
            num_skipped=state.num_skipped + ~is_usable,
        )
        return scaled(scale, steps), new

    return transformation(init, update)


def sania(
    objective: Objective,
    inner: optax.GradientTransformation | None = None,
    f_star: float | Array = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """SANIA: preconditioned steps whose length the loss decides, `params -= lambda u`.

    With u of `inner` and lambda of `curvax.optim.scale_by_sania`; there is no learning rate. The
    variants of the paper are choices of `inner`:
    ```
    curvax.optim.scale_by_adam_sqr(b2, eps)       # the default
    curvax.optim.scale_by_adagrad_sqr(eps)
    curvax.estimating(                            # Hutchinson's diagonal of the Hessian
        curvax.scale_by_oasis(), curvax.optim.hessian_diagonal(objective)
    )
    curvax.estimating(                            # Newton's method by conjugate gradients
        curvax.scale_by_newton(curvax.cg, damping=1e-3),
        lambda params, batch, key: curvax.hvp(objective, params, batch),
    )
    ```
    The last one ends a solve where it meets negative curvature, with its iterate, or in the first
    step with `u = g` (see `curvax.cg`); `functools.partial(curvax.cg, preconditioner=...)` is
    preconditioned. Any other rule `scale_by_M` will do, `curvax.scale_by_kfac(layout)` among them.

    Args:
      objective: the `curvax.Objective` that is minimized.
      inner: the transformation that returns `u = B^-1 g`; None stands for
        `curvax.optim.scale_by_adam_sqr()`.
      f_star: the least value of the loss on every batch. Where it is set too low, steps are too
        long for ever: with 0 an autoencoder with cross-entropies, an ELBO and a flow did not train.

    Returns:
      `optax.GradientTransformationExtraArgs`, a whole optimizer; call `update(grads, state, params,
      batch=batch)`, or with `value=loss` where that is known. The state holds a `SaniaState`.

    Raises:
      ValueError, TypeError: As `curvax.optim.scale_by_sania` does.

    Cost: that of `inner` and an inner product.

    Example: separable data, which a large enough w fits to any accuracy.
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.sigmoid_cross_entropy())
      >>> x = jnp.array([[1.0, 100.0], [2.0, -50.0], [-1.0, 20.0]])
      >>> w, batch = jnp.zeros((2, 1)), (x, jnp.array([[1.0], [1.0], [0.0]]))
      >>> tx = curvax.sania(objective, curvax.optim.scale_by_adagrad_sqr(eps=1e-6))
      >>> state = tx.init(w)
      >>> @jax.jit
      ... def step(w, state):
      ...     updates, state = tx.update(jax.grad(objective)(w, batch), state, w, batch=batch)
      ...     return w + updates, state
      >>> for _ in range(100):
      ...     w, state = step(w, state)
      >>> bool(objective(w, batch) < 0.05)
      True

    References: Abdukhakimov et al. (2023), SANIA: Polyak-type optimization framework leads to scale
      invariant stochastic algorithms, https://arxiv.org/abs/2312.17369; the authors' code for
      AdaGrad-SQR and Adam-SQR. For the other two the framework was read, not its code.

    Deviates: in the solve by conjugate gradients, whose end at negative curvature is that of
      Steihaug; its iterates satisfy `u' (H + damping I) u = g.u`, so that lambda means the same.
    """
    rule = scale_by_adam_sqr() if inner is None else inner
    return optax.chain(scale_by_sania(rule, objective, f_star), optax.scale(-1.0))


def _first_crossing(gap: Scalar, n: Scalar) -> Scalar:
    """Return the least lambda with `gap - lambda n + lambda^2 n / 2 = 0`, or 1 if there is none."""
    # Where nothing is to be gained, or what is computed as a loss is below its least value, no
    # step. At n = 0, u is 0, and so is the step, for any lambda.
    gap = jnp.maximum(gap, 0)
    ratio = jnp.where(n > 0, 2 * gap / jnp.where(n > 0, n, 1), 1)
    # 1 - sqrt(1 - r) = r / (1 + sqrt(1 - r)): for small r the difference would be all rounding.
    ratio = jnp.minimum(ratio, 1)
    return ratio / (1 + jnp.sqrt(1 - ratio))
