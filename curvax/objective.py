"""The objective: a model and a loss, as one function of params and batch that keeps both visible.

A mean over parts of a batch: shares
------------------------------------

Curvature is that of the *mean* loss over a batch, but work goes over the batch in parts: chunks of
bounded memory, single examples, batches read from the host. The mean of a part is not what has to
be added up. With N terms in the batch (`curvax.losses` says what a term is) and `N_c` in chunk c,

    L = 1/N sum_i L_i = sum_c N_c/N (1/N_c sum_{i in c} L_i) = sum_c share_c L_c,   share_c = N_c/N.

So every method that works in parts counts N first (`total_terms`), then scales the objective on
each part to its share of the mean (`scaled_to_share`), and adds. The sum over all parts is the
whole exactly, for any partition down to single examples:

* value, gradient and Hessian are linear in the loss, and take the factor `share_c` as it is; so
  does the output-space curvature S of the Gauss-Newton matrix `J' S J`;
* a pseudo-gradient r has `E[r r'] = S`, and takes `sqrt(share_c)`; sums of independent draws of the
  parts then have the second moment of a draw for the batch;
* masks: N counts the positions that count, weights included. A chunk that holds padding alone has
  `N_c = 0` and share 0, and a batch without any term has loss 0 (0/0 is 0), not NaN;
* heads of a `weighted_sum` have counts of their own, `L = sum_h w_h 1/N_h sum_i L_hi`: counts and
  shares are then dicts by head, and each head is scaled by its own `N_hc/N_h`.

What is not linear in the loss needs a factor of its own, which its function states. With `s_b` the
gradient of the share of example b, per-example gradients are `g_b = B s_b`, so that their mean is
the gradient. The empirical Fisher is `1/N sum_b (grad L_b)(grad L_b)' = N sum_b s_b s_b'`, L_b the
sum over the terms of example b: a pseudo-gradient at the targets of the data, `sqrt(N) s_b` by
example, which takes `sqrt(share_c)` on a chunk as every other one does.

An objective of several parts
-----------------------------

`total` adds objectives that have batches of their own, `L = sum_p w_p L_p`. All that is linear in
the loss adds up with the same weights, whatever the numbers of rows: gradient, Hessian, `J' S J`,
and the Fisher matrices of the parts. So a function of an objective begins with the case of several
parts: it calls itself on each (`of_parts`), and adds. Nothing below it knows of parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from curvax._batch import check_batch, sum_over_chunks
from curvax._checks import check_scalar, describe
from curvax._explicit import is_placed, without_placement
from curvax._shared import unwrap
from curvax._types import Batch, Outputs, Params, PRNGKey, Scalar, at_least_float32
from curvax.losses import Loss, as_loss, from_function, weighted_sum
from curvax.losses._shares import share_of, term_counts


@dataclass(frozen=True)
class Objective:
    """Mean loss of a model over a batch, `L(params) = loss(model(params, inputs), targets)`.

    Use it wherever a loss function goes (`jax.value_and_grad(objective)(params, batch)`);
    curvature, which needs the model's outputs, takes the same object.

    Args:
      model: the pure function `(params, inputs) -> outputs`, or with `has_aux`
        `-> (outputs, aux)`. Parts of inputs marked `curvax.Shared` arrive unwrapped.
      loss: one of `curvax.losses`, or any function `(outputs, targets) -> scalar mean`;
        `curvax.losses.from_function` says what else a method may need of it.
      has_aux: the model returns `(outputs, aux)`, and the objective `(loss, aux)`; for batch
        statistics and metrics.
      parts: set by `curvax.total`: its parts, each with a batch of its own.
      is_penalty: set by `curvax.penalty`: the outputs are params, and there is no batch.

    Raises:
      TypeError, ValueError: at trace time, when the batch is not a pair with one leading axis,
        when outputs and targets do not fit the loss, or when the loss is not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batch = (jnp.eye(2), jnp.ones((2, 1)))
      >>> value, gradient = jax.value_and_grad(objective)(jnp.zeros((2, 1)), batch)
      >>> value.item(), gradient.ravel().tolist()
      (0.5, [-0.5, -0.5])
    """

    model: Callable[[Params, Any], Any]
    loss: Loss
    has_aux: bool = False
    # Weights may be arrays, which have no hash; objectives are static arguments of `jit`.
    parts: tuple[Part, ...] = field(default=(), compare=False)
    is_penalty: bool = False

    def __post_init__(self) -> None:
        """Turn a plain function into a `Loss`."""
        # A frozen dataclass offers no other way to set a field.
        object.__setattr__(self, "loss", as_loss(self.loss))

    def __call__(
        self,
        params: Params,
        batch: Batch,
    ) -> Any:
        """Return the mean loss, or `(loss, aux)` with `has_aux`."""
        if self.parts:
            return self._total(params, batch)
        if self.is_penalty:
            batch = (None, None)
        else:
            check_batch(batch)
        inputs, targets = batch
        # f = model(params, inputs), L = loss(f, targets)
        outputs, aux = self._apply(params, inputs)
        value = check_scalar(self.loss(outputs, unwrap(targets)), "the loss")
        return (value, aux) if self.has_aux else value

    def _total(
        self,
        params: Params,
        batch: Any,
    ) -> Any:
        """Return the weighted sum of the parts, with `has_aux` beside a dict of their aux."""
        batches = batches_of_parts(self, batch)
        values, aux = [], {}
        # L = sum_p w_p L_p
        for name, weight, part in self.parts:
            with naming_part(name):
                result = part(params, batches[name])
            value = result[0] if part.has_aux else result
            values.append(weight * value)
            if part.has_aux:
                aux[name] = result[1]
        total = jnp.asarray(sum(values))
        return (total, aux) if self.has_aux else total

    def value(
        self,
        params: Params,
        batch: Batch,
    ) -> Scalar:
        """Return the mean loss alone."""
        result = self(params, batch)
        value: Scalar = result[0] if self.has_aux else result
        return value

    def outputs(
        self,
        params: Params,
        inputs: Any,
    ) -> Outputs:
        """Return the model's outputs alone."""
        outputs, _ = self._apply(params, inputs)
        return outputs

    def _apply(
        self,
        params: Params,
        inputs: Any,
    ) -> tuple[Outputs, Any]:
        """Run the model; return outputs and aux."""
        return self._split(self.model(params, unwrap(inputs)))

    def outputs_of(self, result: Any) -> Outputs:
        """Return the outputs of what the model has returned (or of its shapes), without aux."""
        return self._split(result)[0]

    def _split(self, result: Any) -> tuple[Outputs, Any]:
        """Return outputs and aux; aux is None for a model without."""
        if not self.has_aux:
            return result, None
        # An array of two rows would unpack too: only a tuple says that aux was meant.
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"with has_aux=True the model must return (outputs, aux), got {describe(result)}."
            )
        return result


class Part(NamedTuple):
    """A part of an objective.

    Attributes:
      name: its key in the batch.
      weight: what its loss is multiplied by.
      objective: the part itself.
    """

    name: str
    weight: Any
    objective: Objective


def total(
    parts: Mapping[str, Objective],
    weights: Mapping[str, Any] | None = None,
) -> Objective:
    """Add objectives with batches of their own, `L = sum_p w_p L_p`, each a mean over its rows.

    A physics-informed network has residuals in the interior and conditions on the boundary, an
    ELBO a reconstruction and a divergence, an actor-critic a policy, a value and an entropy; with
    `curvax.penalty` a penalty on params is a part too. The result is used like any objective; its
    batch is a dict with the names of the parts.

    Value, gradient and every curvature are the weighted sums of the parts', each that of its mean
    loss: `hvp`, `ggnvp`, `fishervp`, `empirical_fishervp`, `streamed`, diagonals, second moments of
    EK-FAC and the system of `curvax.egn` are exact. `curvax.kron_factors` says how the Kronecker
    products of the parts become one.

    Args:
      parts: `{name: Objective}`. With `has_aux` in one of them, aux is a dict by part.
      weights: `{name: number}`, numbers or scalar arrays, at least 0; a part without has 1.

    Returns:
      An `Objective` whose batch is `{name: (inputs, targets)}`; the numbers of rows may differ.
      Its `model` and `loss` are those of all parts that have a batch, side by side: dicts of
      inputs give dicts of outputs.

    Raises:
      ValueError: there is no part with a batch, a weight is negative or of no part, or a part is a
        total itself; at trace time, the batch has other keys than there are parts.
      TypeError: a part is no `Objective`; at trace time, the batch is no dict.

    Cost: that of the parts. Where they share layers, these are run for each part on its own rows.

    Example:
      >>> import jax, jax.numpy as jnp, curvax
      >>> u = lambda w, t: w[0] + w[1] * t**2
      >>> slope = lambda w, t: jax.vmap(jax.grad(u, argnums=1), (None, 0))(w, t)   # u' = 2 w_1 t
      >>> error = curvax.losses.squared_error()
      >>> parts = {"interior": curvax.Objective(slope, error),
      ...     "boundary": curvax.Objective(u, error)}
      >>> objective = curvax.total(parts, weights={"boundary": 10.0})
      >>> interior = jnp.array([0.5, 1.0]), jnp.array([1.0, 2.0])                  # u' = 2 t
      >>> batch = {"interior": interior, "boundary": (jnp.zeros(1), jnp.ones(1))}
      >>> objective(jnp.zeros(2), batch).item()                          # 5/4 + 10 * 1/2
      6.25
      >>> curvax.to_dense(curvax.ggnvp(objective, jnp.zeros(2), batch), jnp.zeros(2)).tolist()
      [[10.0, 0.0], [0.0, 2.5]]
    """
    weights = {} if weights is None else weights
    _check_parts(parts, weights)
    members = [Part(name, weights.get(name, 1.0), part) for name, part in parts.items()]
    with_batch = [part for part in members if not part.objective.is_penalty]
    has_aux = any(part.objective.has_aux for part in with_batch)

    # The outputs of every part on its own inputs, as one function of params.
    def model(params: Params, inputs: Any) -> Any:
        outputs, aux = {}, {}
        for name, _, part in with_batch:
            with naming_part(name):
                outputs[name], of_part = part._apply(params, inputs[name])
            if part.has_aux:
                aux[name] = of_part
        return (outputs, aux) if has_aux else outputs

    loss = weighted_sum({name: (weight, part.loss) for name, weight, part in with_batch})
    return Objective(model=model, loss=loss, has_aux=has_aux, parts=tuple(members))


def penalty(
    fun: Callable[[Scalar], Scalar],
    mask: Callable[[Params], PyTree[bool]] | None = None,
) -> Objective:
    """Make a penalty on params a part of an objective, `sum_i fun(w_i)` over all their entries.

    Its curvature is its Hessian, the diagonal of `fun''(w_i)`, in Gauss-Newton and Fisher matrices
    alike: there is nothing to sample, and no row of a batch. For weight decay, `0.5 w^2`, it is the
    identity. Products and diagonals have it exactly; a Kronecker block adds its mean over the
    block to the damping. Where it is the same for all entries, as for weight decay, that is exact
    with `damping_scheme="exact"` and with EK-FAC; "factored", the default of K-FAC, spreads it over
    both factors as it does every damping.

    Args:
      fun: a function of one entry, convex where methods need positive curvature.
      mask: `params -> tree like params of bools`, as in `optax.add_decayed_weights`: which leaves
        are penalized. By default all are.

    Returns:
      An `Objective` to be a part of `curvax.total`; it has no place in the batch, or None there.

    Raises:
      TypeError: at trace time, `fun` gives no scalar for a scalar.

    Cost: a pass over params.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> fit = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> decay = curvax.penalty(lambda w: 0.5 * w**2)
      >>> objective = curvax.total({"fit": fit, "decay": decay}, weights={"decay": 0.1})
      >>> batch = {"fit": (jnp.array([[1.0, 0.0], [0.0, 3.0]]), jnp.zeros(2))}
      >>> matvec = curvax.ggnvp(objective, jnp.zeros(2), batch)          # x'x / 2 + 0.1 I
      >>> [round(x, 4) for x in matvec(jnp.ones(2)).tolist()]
      [0.6, 4.6]
    """

    def entrywise(derivative: Callable[[Scalar], Scalar], params: Params) -> PyTree[Array]:
        """Apply a function to every entry; masked leaves give zeros."""
        penalized = jax.tree.map(lambda x: True, params) if mask is None else mask(params)

        def of_leaf(x: Array, is_penalized: bool) -> Array:
            # Not even called: at an entry that is not penalized its derivative may be infinite.
            if is_penalized is False:
                return jnp.zeros_like(x)
            # By `vmap` no entry can see another: the Hessian is diagonal by construction.
            flat = jax.vmap(derivative)(x.ravel())
            return jnp.where(is_penalized, flat.reshape(x.shape), 0)

        return jax.tree.map(of_leaf, params, penalized)

    def checked(w: Scalar) -> Scalar:
        return check_scalar(fun(w), "a penalty")

    def value(params: Params, targets: Any) -> Scalar:
        del targets
        terms = [jnp.sum(at_least_float32(x)) for x in jax.tree.leaves(entrywise(checked, params))]
        return jnp.asarray(sum(terms))

    # S v = fun''(w) v, entry by entry.
    def curvature_product(params: Params, targets: Any, v: Params) -> Params:
        del targets
        second = entrywise(jax.grad(jax.grad(checked)), params)
        return jax.tree.map(jnp.multiply, second, v)

    # It is counted as one term, so that batches of a stream have equal shares of it.
    def num_terms(params: Params, targets: Any) -> Scalar:
        del params, targets
        return jnp.ones([])

    loss = from_function(value, curvature_product=curvature_product, num_terms=num_terms)
    return Objective(model=_params_alone, loss=loss, is_penalty=True)


def of_parts(
    fn: Callable[..., Any],
    objective: Objective,
    params: Params,
    batch: Any,
    key: PRNGKey | None = None,
) -> list[tuple[Part, Any]]:
    """Call `fn(part, params, part's batch[, part's key])` for all parts but penalties.

    The result has each part beside what `fn` returns for it. Part number p has the key
    `fold_in(key, p)`.
    """
    batches = batches_of_parts(objective, batch)
    results = []
    for number, part in enumerate(objective.parts):
        if part.objective.is_penalty:
            continue
        keys = () if key is None else (jax.random.fold_in(key, number),)
        with naming_part(part.name):
            result = fn(part, params, batches[part.name], *keys)
        results.append((part, result))
    return results


def for_auto_sharding(objective: Objective, params: Params, batch: Any) -> Objective:
    """Return an objective fit for `with_auto_sharding` on these params and this batch.

    Where a model says along which explicit axes of the mesh its arrays are sharded, the compiler
    decides that there.
    """
    if objective.is_penalty:
        return objective
    if objective.parts:
        parts, weights = {}, {}
        for name, rows in batches_of_parts(objective, batch).items():
            part = next(part for part in objective.parts if part.name == name)
            parts[name] = for_auto_sharding(part.objective, params, rows)
            weights[name] = part.weight
        return total(parts, weights)
    args = params, unwrap(batch[0])
    model = without_placement(objective.model, *args)
    # The same object where that will do, for JAX knows its programs by it.
    if model is objective.model:
        return objective
    try:
        names_axes = is_placed(objective.model, *args)
    except Exception:
        # A model that JAX refuses where axes are explicit, such as one that looks up rows by
        # sharded numbers, names none. Whatever else is wrong in it raises when it is run.
        names_axes = False
    return replace(objective, model=model) if names_axes else objective


def penalty_diagonal(objective: Objective, params: Params) -> PyTree[Array] | None:
    """Sum the curvature of the penalties among the parts, a diagonal; None if there are none."""
    ones = jax.tree.map(jnp.ones_like, params)
    diagonals = []
    for name, weight, part in objective.parts:
        if part.is_penalty:
            with naming_part(name):
                diagonal = part.loss.curvature_product(params, None, ones)
            # w_p fun''(w), in at least float32 as all curvature is.
            diagonals.append(jax.tree.map(lambda h, w=weight: w * at_least_float32(h), diagonal))
    return jax.tree.map(lambda *h: sum(h), *diagonals) if diagonals else None


def sum_over_parts(
    fn: Callable[..., PyTree[Array]],
    objective: Objective,
    params: Params,
    batch: Any,
    key: PRNGKey | None = None,
) -> PyTree[Array]:
    """Return `sum_p w_p fn(objective of part p, ...)` of diagonals, with those of penalties."""

    def of_part(part: Part, *args: Any) -> PyTree[Array]:
        return fn(part.objective, *args)

    diagonals = []
    for part, diagonal in of_parts(of_part, objective, params, batch, key):
        diagonals.append(jax.tree.map(lambda x, w=part.weight: w * x, diagonal))
    of_penalties = penalty_diagonal(objective, params)
    if of_penalties is not None:
        diagonals.append(of_penalties)
    return jax.tree.map(lambda *x: sum(x), *diagonals)


def batches_of_parts(objective: Objective, batch: Any) -> dict[str, Any]:
    """Return the batches by part, None for penalties, or raise unless there is one for each."""
    names = [part.name for part in objective.parts]
    needed = {part.name for part in objective.parts if not part.objective.is_penalty}
    if not isinstance(batch, Mapping):
        raise TypeError(
            f"an objective of the parts {', '.join(names)} needs a batch that is a dict, "
            f"{{part: (inputs, targets)}}, got {describe(batch)}."
        )
    if not needed <= set(batch) <= set(names):
        raise ValueError(
            f"the batch must have the keys {', '.join(sorted(needed))}, one for each part of the "
            f"objective that has a batch; got {', '.join(map(str, batch))}."
        )
    for name in set(names) - needed:
        if batch.get(name) is not None:
            raise ValueError(
                f"batch[{name!r}] is {describe(batch[name])}, but part {name!r} is a penalty on "
                "params: leave it out of the batch."
            )
    return {name: batch.get(name) for name in names}


def checked_inputs(objective: Objective, batch: Any) -> Any:
    """Return the inputs of a batch, of several parts a dict by part, or raise if it is no batch."""
    if not objective.parts:
        check_batch(batch)
        return batch[0]
    inputs = {}
    for name, rows in batches_of_parts(objective, batch).items():
        # Penalties have no inputs, and no place in the model.
        if rows is not None:
            with naming_part(name):
                check_batch(rows)
            inputs[name] = rows[0]
    return inputs


@contextmanager
def naming_part(name: str) -> Iterator[None]:
    """Say in errors from within which part they are of."""
    try:
        yield
    except Exception as error:
        error.add_note(f"This is of the part {name!r} of curvax.total.")
        raise


def _check_parts(parts: Mapping[str, Any], weights: Mapping[str, Any]) -> None:
    """Raise unless parts are objectives, one with a batch, and weights are theirs."""
    for name, part in parts.items():
        if not isinstance(part, Objective):
            raise TypeError(
                f"part {name!r} must be a curvax.Objective, got {describe(part)}: wrap its model "
                "and loss, curvax.Objective(model, loss), or curvax.penalty(fun)."
            )
        if part.parts:
            raise ValueError(f"part {name!r} is a curvax.total itself; give its parts one by one.")
    if all(part.is_penalty for part in parts.values()):
        raise ValueError(
            f"total needs at least one part with a batch, got {', '.join(parts) or 'no part'}: "
            'curvax.total({"name": curvax.Objective(model, loss), ...}).'
        )
    for name, weight in weights.items():
        if name not in parts:
            raise ValueError(f"weight of {name!r}, which is no part; parts: {', '.join(parts)}.")
        # Arrays may be traced and are not looked at; `not >=` also refuses NaN.
        if isinstance(weight, int | float) and not weight >= 0:
            raise ValueError(f"the weight of part {name!r} must be at least 0, got {weight}.")


def _params_alone(params: Params, inputs: Any) -> Params:
    del inputs
    return params


def total_terms(
    objective: Objective,
    params: Params,
    batch: Batch,
    microbatch: int | None,
) -> PyTree[Scalar]:
    """Count the terms N that the mean over the batch is over, `microbatch` rows at a time.

    The result is a scalar, or for a weighted sum a dict by head; of several parts a dict by part.
    """
    if objective.parts:
        batches = batches_of_parts(objective, batch)
        return {
            name: total_terms(part, params, batches[name], microbatch)
            for name, _, part in objective.parts
        }
    if objective.is_penalty:
        return _terms(objective, params, (None, None))

    def count(chunk: Batch) -> PyTree[Scalar]:
        return _terms(objective, params, chunk)

    return count(batch) if microbatch is None else sum_over_chunks(count, batch, microbatch)


def scaled_to_share(
    objective: Objective,
    params: Params,
    chunk: Batch,
    totals: PyTree[Scalar],
) -> Objective:
    """Return `objective` scaled on `chunk` to its share of the batch's mean, `N_c / N`.

    With `totals` from `total_terms` of the batch, the shares of all chunks sum to the whole; the
    head of this module says why.
    """
    if objective.parts:
        batches = batches_of_parts(objective, chunk)
        scaled, weights = {}, {}
        for name, weight, part in objective.parts:
            rows = (None, None) if part.is_penalty else batches[name]
            scaled[name] = scaled_to_share(part, params, rows, totals[name])
            weights[name] = weight
        return total(scaled, weights)
    # Most counts need outputs only for their dtype: the forward pass that they run is dead code.
    counts = _terms(objective, params, chunk)
    return replace(objective, loss=share_of(objective.loss, counts, totals))


def _terms(
    objective: Objective,
    params: Params,
    chunk: Batch,
) -> PyTree[Scalar]:
    # The count has the outputs' dtype; a user's own `num_terms` may look at their values too.
    inputs, targets = chunk
    return term_counts(objective.loss, objective.outputs(params, inputs), targets)
