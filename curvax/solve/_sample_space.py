"""The Gauss-Newton matrix of a batch in the space of its examples and outputs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from curvax._batch import ENTRIES_AT_A_TIME, batch_size
from curvax._checks import check_choice, check_params
from curvax._shared import unwrap
from curvax._trees import as_vector, by_path, cast_like, dimension
from curvax._types import Batch, Outputs, Params, Targets, at_least_float32
from curvax._xla import with_auto_sharding
from curvax.capture import (
    Capture,
    Kernel,
    UseCotangents,
    are_examples_apart,
    find_kernels,
    gram,
    joined_captures,
    plan,
    record,
    uncovered,
    uses_in_part,
)
from curvax.losses import Loss
from curvax.losses._energy import divided_by_root, times_root, times_transposed_root
from curvax.losses._linear import check_curved
from curvax.losses._loss import TermWeights
from curvax.objective import (
    Objective,
    Part,
    batches_of_parts,
    checked_inputs,
    for_auto_sharding,
    penalty_diagonal,
)
from curvax.products import ggnvp, to_dense
from curvax.products._linear import linearize
from curvax.solve._direct import Dense, Formed, SampleSpace
from curvax.solve._jacobian_rows import jacobian_rows, sum_of_outer_products

SPACES = {"auto": "the smaller one", "samples": "examples x outputs", "params": "parameters"}

MOST_OUTPUTS = 4
"""Outputs of an example up to which rows are formed one by one, in the space of parameters.

Of d parameters and T positions of an example, rows take about `2 b c d^2` multiplications, and d
Gauss-Newton products `10 b T d^2`. On two cores and networks of one hidden layer rows took 3.9 ms
and products 19 with 4 outputs and 384 parameters, 300 and 128 with 16 outputs and 768.
"""

# b: examples of the batch, c: outputs of an example, k: columns of the root, n = c b: rows


def sample_space(
    objective: Objective,
    params: Params,
    batch: Batch,
    *,
    space: str = "auto",
    form_rows: bool | None = None,
) -> Formed:
    """Form the Gauss-Newton matrix of a batch for exact solves, in the smaller of two spaces.

    `F = J'S J = U U'`, with S the output-space curvature (as in `curvax.ggnvp`), `S = R R'` (by
    example, unless the loss compares examples with each other), `U = J'R`. Where the batch has
    fewer outputs n than there are parameters d, `U'U` is formed, and `(F + damping I)^-1` is
    applied through it; else F itself. Negative curvature (of a user's loss) counts as none where
    there is a root. Of a `curvax.total` the columns of U are those of all parts, `sqrt(w_p) U_p`.

    There are three ways to either matrix, and shapes decide between them:

    * rows: U' itself, by one reverse pass through every output of every example. It is the way for
      residuals of differential equations, with one output an example. In sample space it is taken
      for one output and up to 2^24 entries of U'; over parameters, where only some rows are in
      memory at a time, for up to 4 outputs. The model must be known to keep examples apart.
    * layers, in sample space: `U'U` is the sum over layers of products of inner products of the
      layers' inputs and output-gradients. No Jacobian is formed.
    * products, over parameters: F, column by column.

    Args:
      objective: the `curvax.Objective` whose curvature is formed.
      params: pytree of float arrays.
      batch: `(inputs, targets)`.
      space: "auto" for the smaller space, "samples" or "params".
      form_rows: True for the way by rows, False for another one; None decides by shapes.

    Returns:
      What `curvax.solve.direct` takes; a pytree, so that it may cross `jit`.

    Raises:
      ValueError: if the space is unknown; in sample space if the model mixes examples (BatchNorm in
        training), or if outputs lack the batch's leading axis; if rows are asked for, and the model
        is not known to keep examples apart.
      TypeError: if a kernel of the model has a backward pass only, and rows are not formed.

    Cost: by rows c backward passes and `n d min(n, d)` multiplications; `n d` floats in sample
      space. By layers c backward passes without kernels' gradients, and for each dense layer
      `n^2 (in / c^2 + out)` multiplications; where a kernel meets several positions of an example
      (convolutions, sequences) `n^2 in out`. Memory: `n^2` floats, c times the activations. By
      products d Gauss-Newton products, `d^2` floats.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> x = jnp.array([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]])                         # F = x'x / 2
      >>> space = curvax.solve.sample_space(objective, jnp.zeros(3), (x, jnp.zeros(2)))
      >>> space.gram.round(4).tolist()                                                # x x' / 2
      [[2.5, 0.0], [0.0, 4.5]]
      >>> step, info = curvax.solve.direct(space, jnp.ones(3), damping=0.5)
      >>> [round(v, 4) for v in step.tolist()]
      [1.0, 0.2, 0.0]

    References: Korbit et al. (2024), Exact Gauss-Newton optimization for training deep neural
      networks, whose system `(S J J' + damping I) q = r` is made symmetric here by the root of S.
    """
    check_choice("space", space, SPACES)
    check_params(params)
    inputs = checked_inputs(objective, batch)
    _check_not_empty(objective, batch)
    shapes = jax.tree.leaves(jax.eval_shape(lambda: objective.outputs(params, inputs)))
    num_rows = sum(math.prod(shape.shape) for shape in shapes)
    # A penalty on params has as many rows as there are parameters.
    penalties = [part.name for part in objective.parts if part.objective.is_penalty]
    in_params = space == "auto" and (num_rows > dimension(params) or penalties)
    if space == "params" or in_params:
        if _are_rows_formed(form_rows, objective, params, batch, in_params=True):
            return _by_outer_products(objective, params, batch)
        matrix = to_dense(ggnvp(objective, params, batch), params, chunk_size=8)
        return Dense(at_least_float32(matrix))
    if penalties:
        raise ValueError(
            f"in sample space the penalty {penalties[0]!r} would be as many rows as there are "
            'parameters. Use space="params"; or leave it out and add its weight to the damping, '
            "which is the same for weight decay."
        )
    by_rows = _are_rows_formed(form_rows, objective, params, batch, in_params=False)
    return _in_sample_space(objective, params, batch, by_rows)


def _are_rows_formed(
    asked: bool | None,
    objective: Objective,
    params: Params,
    batch: Any,
    in_params: bool,
) -> bool:
    """Decide by shapes whether rows are formed; raise if they are asked for and cannot be."""
    if asked is False:
        return False
    # Without a root by example, U' is known only as R'J of the whole batch, not over parameters.
    possible = not (in_params and objective.loss.couples_examples)
    num_rows, num_outputs = 0, 0
    for part, (inputs, _) in _members(objective, batch):
        size = batch_size(inputs)
        shapes = jax.eval_shape(partial(part.objective.outputs, inputs=inputs), params)
        leaves = jax.tree.leaves(shapes)
        # Outputs that are not by example, a mean for instance, have no rows by example.
        possible &= all(x.shape[:1] == (size,) for x in leaves)
        of_part = sum(math.prod(x.shape) for x in leaves)
        num_rows += of_part
        num_outputs = max(num_outputs, of_part // size)
        # Of one example alone, batch norm in training computes what it does not in a batch.
        possible &= are_examples_apart(part.objective, params, inputs)
    if asked:
        if not possible:
            raise ValueError(
                "rows by example need a model that is known to keep examples apart, and over "
                "parameters a loss that does so too; here some mix, or cannot be followed through "
                "the model. Leave out form_rows=True."
            )
        return True
    if in_params:
        return possible and num_outputs <= MOST_OUTPUTS
    fits = num_rows * dimension(params) <= ENTRIES_AT_A_TIME
    return possible and fits and num_outputs == 1


def _members(objective: Objective, batch: Any) -> list[tuple[Part, Batch]]:
    """Return the parts that have a batch, with it; of an objective without parts itself."""
    if not objective.parts:
        return [(Part("", 1.0, objective), batch)]
    batches = batches_of_parts(objective, batch)
    parts = [part for part in objective.parts if not part.objective.is_penalty]
    return [(part, batches[part.name]) for part in parts]


def _check_not_empty(objective: Objective, batch: Any) -> None:
    """Raise if a part has no example, whose mean would be 0/0."""
    for part, rows in _members(objective, batch):
        if batch_size(rows) == 0:
            where = f"[{part.name!r}]" if objective.parts else ""
            raise ValueError(
                f"batch{where} has no rows, but a curvature is a mean over at least one. Pass "
                "some, or leave the part out of the objective."
            )


def _by_outer_products(objective: Objective, params: Params, batch: Any) -> Dense:
    """Form F over parameters as the sum of the outer products of all rows."""

    def form(params: Params, batch: Any) -> Float[Array, "d d"]:
        matrices = []
        for part, (inputs, targets) in _members(placed, batch):
            outputs = part.objective.outputs(params, inputs)
            roots, _ = _weighted_roots(part.objective.loss, part.weight, outputs, targets)
            matrices.append(sum_of_outer_products(part.objective, params, inputs, roots))
        # F = sum_p w_p J_p' S_p J_p, and the diagonal of the penalties.
        matrix = jnp.asarray(sum(matrices))
        penalties = penalty_diagonal(placed, params)
        if penalties is None:
            return matrix
        return matrix + jnp.diag(as_vector(penalties)[0])

    placed = for_auto_sharding(objective, params, batch)
    return Dense(with_auto_sharding(form, params, batch))


def _in_sample_space(
    objective: Objective, params: Params, batch: Any, by_rows: bool
) -> SampleSpace:
    """Form `U'U`, and the two maps `v -> U'v` and `q -> U q` between the spaces."""
    for part, _ in _members(objective, batch):
        if objective.parts and part.objective.loss.couples_examples:
            raise ValueError(
                f"the loss of the part {part.name!r} compares examples with each other, so that "
                'its curvature has no root by example. Use space="params".'
            )
    form = _space_by_rows if by_rows else _space_by_layers
    space = form(objective, params, batch)
    if objective.parts or not objective.loss.couples_examples:
        return space
    inputs, targets = batch
    outputs = objective.outputs(params, inputs)
    weights_of = objective.loss.centering_weights
    if weights_of is not None:
        return _centered(objective.loss, weights_of, outputs, targets, space)
    with_root = partial(_root_of_all, objective.loss)
    root, gram, gradient = with_auto_sharding(
        with_root, outputs, targets, space.gram, space.gradient
    )
    return SampleSpace(
        gram=gram,
        push=Partial(_push_by_root, root, space.push),
        pull=Partial(_pull_by_root, root, space.pull),
        gradient=gradient,
    )


def _centered(
    loss: Loss,
    weights_of: TermWeights,
    outputs: Outputs,
    targets: Targets,
    space: SampleSpace,
) -> SampleSpace:
    """Return the space of `U = J'R` from that of J, for the root R of `diag(p) - p p'`.

    No matrix is decomposed for it, where `_root_of_all` needs the eigenvalues of S.
    """

    def form(outputs: Outputs, targets: Targets, gram: Array, residual: Array) -> Any:
        check_curved(loss, outputs, unwrap(targets))
        p = weights_of(outputs, unwrap(targets)).astype(gram.dtype)
        # R'(J J')R, of rows and then of columns.
        half = _by_output(times_transposed_root, p, gram)
        centered = _by_output(times_transposed_root, p, half.T)
        return p, centered, _by_output(divided_by_root, p, residual)

    p, gram, gradient = with_auto_sharding(form, outputs, targets, space.gram, space.gradient)
    push = Partial(_push_centered, p, space.push)
    return SampleSpace(gram, push, Partial(_pull_centered, p, space.pull), gradient)


def _by_output(
    apply: Callable[[Array, Array], Array],
    p: Float[Array, " b"],
    v: Float[Array, "n ..."],
) -> Float[Array, "n ..."]:
    """Apply a matrix over examples to rows that are ordered [k, b], for each output k."""
    rows = jnp.moveaxis(v.reshape(-1, len(p), v.size // len(v)), 0, 1)
    applied = apply(p, rows.reshape(len(p), -1)).reshape(rows.shape)
    return jnp.moveaxis(applied, 1, 0).reshape(v.shape)


def _push_centered(
    p: Float[Array, " b"], push: Callable[[Params], Float[Array, " n"]], v: Params
) -> Float[Array, " n"]:
    """Return `R'(J v)`."""
    return _by_output(times_transposed_root, p, push(v))


def _pull_centered(
    p: Float[Array, " b"], pull: Callable[[Float[Array, " n"]], Params], q: Float[Array, " n"]
) -> Params:
    """Return `J'(R q)`."""
    return pull(_by_output(times_root, p, q))


def _space_by_rows(objective: Objective, params: Params, batch: Any) -> SampleSpace:
    """Form U' and its products."""

    def form(params: Params, batch: Any) -> tuple[Array, Array, Array]:
        rows, gradients = [], []
        for part, (inputs, targets) in _members(placed, batch):
            outputs = part.objective.outputs(params, inputs)
            roots, gradient = _weighted_roots(part.objective.loss, part.weight, outputs, targets)
            of_part = jacobian_rows(part.objective, params, inputs, roots)
            # Rows are ordered [k, b] within a part.
            rows.append(of_part.reshape(-1, of_part.shape[2]))
            gradients.append(gradient)
        joined = jnp.concatenate(rows)
        gram = jnp.matmul(joined, joined.T, precision=lax.Precision.HIGHEST)
        return joined, gram, jnp.concatenate(gradients)

    placed = for_auto_sharding(objective, params, batch)
    rows, gram, gradient = with_auto_sharding(form, params, batch)
    push, pull = Partial(_push_rows, rows), Partial(_pull_rows, rows, params)
    return SampleSpace(gram, push, pull, gradient)


def _push_rows(rows: Float[Array, "n d"], v: Params) -> Float[Array, " n"]:
    """Return `U'v` by the rows."""
    flat, _ = as_vector(v)
    return jnp.matmul(rows, flat.astype(rows.dtype), precision=lax.Precision.HIGHEST)


def _pull_rows(rows: Float[Array, "n d"], params: Params, q: Float[Array, " n"]) -> Params:
    """Return `U q` by the rows."""
    flat, to_tree = as_vector(params)
    pulled = jnp.matmul(q, rows, precision=lax.Precision.HIGHEST)
    return to_tree(pulled.astype(flat.dtype))


def _space_by_layers(objective: Objective, params: Params, batch: Any) -> SampleSpace:
    """Form `U'U` layer by layer, and the products through the linearized model."""
    # F = sum_p w_p U_p U_p': the columns of U are those of all sqrt(w_p) U_p.
    spaces = [
        _rows(part.objective, params, rows, part.weight)
        for part, rows in _members(objective, batch)
    ]

    def gram_of_rows(
        params: Params,
        batch: Any,
        roots: list[Array],
    ) -> Float[Array, "n n"]:
        return _gram_of_rows(placed, params, batch, roots)

    placed = for_auto_sharding(objective, params, batch)
    matrix = with_auto_sharding(gram_of_rows, params, batch, [rows.roots for rows in spaces])
    pushes = [rows.push for rows in spaces]
    pulls = [(rows.pull, rows.gradient.size) for rows in spaces]
    gradient = jnp.concatenate([rows.gradient for rows in spaces])
    return SampleSpace(matrix, Partial(_push_all, pushes), _pull_all(pulls), gradient)


class _Rows(NamedTuple):
    """The rows `U' = R'J` of one batch.

    Attributes:
      roots: R by example, `[b, c, k]`.
      push: `v -> U'v`.
      pull: `q -> U q`.
      gradient: q with `U q` the gradient.
    """

    roots: Float[Array, "b c k"]
    push: Partial
    pull: Partial
    gradient: Float[Array, " n"]


def _rows(objective: Objective, params: Params, batch: Batch, weight: Any) -> _Rows:
    """Return the rows of a batch, of the loss times a weight."""
    inputs, targets = batch

    def outputs_at(p: Params) -> Outputs:
        return objective.outputs(p, inputs)

    # J once for both maps; U'U is formed without it.
    outputs, jacobian = linearize(outputs_at, params, "Use curvax.gauss_newton_bartlett.")
    # Of examples that are sharded explicitly every device gets all roots, as all of the matrix.
    roots_of = partial(_weighted_roots, objective.loss, weight)
    roots, gradient = with_auto_sharding(roots_of, outputs, targets)
    push = Partial(_push, jacobian, roots, params)
    pull = Partial(_pull, jacobian, roots, params, outputs)
    return _Rows(roots, push, pull, gradient)


def _push_all(pushes: Sequence[Partial], v: Params) -> Float[Array, " n"]:
    """Return `U'v` of the rows of all batches, one after the other."""
    return jnp.concatenate([push(v) for push in pushes])


def _pull_all(pulls: Sequence[tuple[Partial, int]]) -> Partial:
    """Return `q -> U q` for the rows of all batches."""
    ends = np.cumsum([size for _, size in pulls])[:-1].tolist()

    def pull(functions: Sequence[Partial], q: Float[Array, " n"]) -> Params:
        # U q = sum_p U_p q_p
        pulled = [fn(part) for fn, part in zip(functions, jnp.split(q, ends), strict=True)]
        return jax.tree.map(lambda *x: sum(x), *pulled)

    return Partial(pull, [fn for fn, _ in pulls])


def _gram_of_rows(
    objective: Objective,
    params: Params,
    batch: Any,
    roots: Sequence[Float[Array, "b c k"]],
) -> Float[Array, "n n"]:
    """Return `U'U`, the inner products of all rows `J_b' R_b e_k`, of one batch or of all parts."""
    inputs = checked_inputs(objective, batch)
    kernels, _ = find_kernels(objective, params, inputs)
    # Kernels need names only to find their arrays again.
    named = {str(number): kernel for number, kernel in enumerate(kernels)}
    views = [view for kernel in kernels for view in kernel.views]
    masks = {}
    for path, x in by_path(params).items():
        mask = uncovered(path, x.shape, views)
        # Leaves that kernels cover wholly need no gradient beside theirs.
        if mask.any():
            masks[path] = mask
    if not objective.parts:
        capture, cotangents = _captured(objective, params, inputs, named, masks, roots[0])
        return gram(named, masks, capture, cotangents)

    captures = []
    for part, of_part in zip(objective.parts, roots, strict=True):
        name, _, member = part
        kinds = uses_in_part(member, params, inputs[name], list(kernels))
        used = {}
        for number, uses in enumerate(kinds):
            if uses:
                used[str(number)] = dataclasses.replace(named[str(number)], uses=uses)
        captures.append(_captured(member, params, inputs[name], used, masks, of_part))
    capture, cotangents = joined_captures(captures, list(named))
    # Of the padded rows [k, b] those that are there, part by part.
    chosen = _row_numbers([of_part.shape for of_part in roots])
    return gram(named, masks, capture, cotangents)[chosen[:, None], chosen]


def _captured(
    objective: Objective,
    params: Params,
    inputs: Any,
    kernels: Mapping[str, Kernel],
    leaves: Iterable[str],
    roots: Float[Array, "b c k"],
) -> tuple[Capture, UseCotangents]:
    """Capture a batch by example, and pull back the columns of R."""
    # By example: the rows of J of two examples must not be summed.
    planned = plan(objective, params, inputs, kernels, leaves, per_example=True)
    capture = record(planned, params, inputs)

    def pull_column(column: Float[Array, "b c"]) -> UseCotangents:
        return capture.pull(_unflatten(column, capture.outputs))

    # The k-th cotangent of every example: [k, b, c].
    return capture, jax.vmap(pull_column)(jnp.moveaxis(roots, -1, 0))


def _row_numbers(shapes: Sequence[tuple[int, ...]]) -> Int[np.ndarray, " n"]:
    """Return the numbers that the rows of all parts have among the padded rows `[k, b]`."""
    num_examples = sum(shape[0] for shape in shapes)
    numbers, first = [], 0
    for b, _, k in shapes:
        examples = first + np.arange(b)
        numbers.append(num_examples * np.arange(k)[:, None] + examples)
        first += b
    return np.concatenate([of_part.ravel() for of_part in numbers])


def _weighted_roots(
    loss: Loss, weight: Any, outputs: Outputs, targets: Targets
) -> tuple[Float[Array, "b c k"], Float[Array, " n"]]:
    """Return R with `R R' = w S`, and `R^-1` times the gradient of w times the loss.

    Where the loss compares examples with each other, R is the identity by example.
    """
    by_example = (_identities if loss.couples_examples else _roots)(loss, outputs, targets)
    # Of w times the gradient R^-1 has the root of w too.
    roots, gradient = jax.tree.map(partial(jnp.multiply, jnp.sqrt(weight)), by_example)
    return roots, gradient


def _roots(
    loss: Loss, outputs: Outputs, targets: Targets
) -> tuple[Float[Array, "b c k"], Float[Array, " n"]]:
    """Return R and `R^-1` times the gradient of the loss in the outputs.

    `R_b R_b' = S_b`, the curvature of the mean loss in the outputs of example b.
    """
    check_curved(loss, outputs, unwrap(targets))
    flat = _flatten(outputs)

    def curvature_product(e: Float[Array, " c"]) -> Float[Array, "b c"]:
        direction = _unflatten(jnp.broadcast_to(e, flat.shape), outputs)
        return _flatten(loss.curvature_product(outputs, unwrap(targets), direction))

    # One direction for all examples at once, because S has a block for each: [c, b, c].
    columns = lax.map(curvature_product, jnp.eye(flat.shape[1], dtype=flat.dtype))
    # S_b = Q L Q', so R_b = Q L^1/2, and R^-1 r = L^-1/2 Q' r. Directions without curvature have no
    # inverse, and none is needed: the gradient of a loss vanishes with its curvature there.
    values, vectors = _eigh_by_example(jnp.moveaxis(columns, 0, -1))
    root_values = jnp.sqrt(jnp.maximum(values, 0))
    residual = _flatten(jax.grad(loss)(outputs, unwrap(targets)))
    rotated = jnp.einsum("bck,bc->kb", vectors, residual, precision=lax.Precision.HIGHEST)
    gradient = rotated / jnp.where(root_values > 0, root_values, jnp.inf).T
    return vectors * root_values[:, None, :], gradient.ravel()


def _eigh_by_example(
    matrices: Float[Array, "b c c"],
) -> tuple[Float[Array, "b c"], Float[Array, "b c c"]]:
    """Return eigenvalues and eigenvectors; a matrix of one entry is its eigenvalue."""
    if matrices.shape[-1] == 1:
        return matrices[..., 0], jnp.ones_like(matrices)
    values, vectors = jnp.linalg.eigh(matrices)
    return values, vectors


def _identities(
    loss: Loss, outputs: Outputs, targets: Targets
) -> tuple[Float[Array, "b c k"], Float[Array, " n"]]:
    """Return R = I by example, and the gradient of the loss in the outputs."""
    residual = _flatten(jax.grad(loss)(outputs, unwrap(targets)))
    size, width = residual.shape
    identity = jnp.eye(width, dtype=residual.dtype)
    return jnp.broadcast_to(identity, (size, width, width)), residual.T.ravel()


def _root_of_all(
    loss: Loss,
    outputs: Outputs,
    targets: Targets,
    gram: Float[Array, "n n"],
    residual: Float[Array, " n"],
) -> tuple[Float[Array, "n n"], Float[Array, "n n"], Float[Array, " n"]]:
    """Return the root R of all of S at once, and the Gram matrix and gradient of `U = J'R`.

    So it is where the loss compares examples, and S has no block for each. `gram` is J J', and
    `residual` the gradient of the loss in the outputs.
    """
    check_curved(loss, outputs, unwrap(targets))
    size, width = _flatten(outputs).shape

    # Rows are ordered [k, b], as in J J'.
    def curvature_product(e: Float[Array, " n"]) -> Float[Array, " n"]:
        direction = _unflatten(e.reshape(width, size).T, outputs)
        product = loss.curvature_product(outputs, unwrap(targets), direction)
        return _flatten(product).T.ravel()

    # S = Q L Q', R = Q L^1/2, U'U = R'(J J')R; directions without curvature as in `_roots`.
    rows = jnp.eye(size * width, dtype=residual.dtype)
    values, vectors = jnp.linalg.eigh(lax.map(curvature_product, rows))
    root_values = jnp.sqrt(jnp.maximum(values, 0))
    root = vectors * root_values
    dot = partial(jnp.matmul, precision=lax.Precision.HIGHEST)
    gradient = dot(vectors.T, residual) / jnp.where(root_values > 0, root_values, jnp.inf)
    return root, dot(root.T, dot(gram, root)), gradient


def _push_by_root(
    root: Float[Array, "n n"],
    push: Callable[[Params], Float[Array, " n"]],
    v: Params,
) -> Float[Array, " n"]:
    """Return `R'(J v)`."""
    return jnp.matmul(root.T, push(v), precision=lax.Precision.HIGHEST)


def _pull_by_root(
    root: Float[Array, "n n"],
    pull: Callable[[Float[Array, " n"]], Params],
    q: Float[Array, " n"],
) -> Params:
    """Return `J'(R q)`."""
    return pull(jnp.matmul(root, q, precision=lax.Precision.HIGHEST))


def _push(
    jacobian: Callable[[Params], Outputs],
    roots: Array,
    params: Params,
    v: Params,
) -> Float[Array, " n"]:
    """Return `U'v = R'J v`."""

    def rows(roots: Array, outputs: Outputs) -> Float[Array, " n"]:
        pushed = _flatten(outputs)
        return jnp.einsum("bck,bc->kb", roots, pushed, precision=lax.Precision.HIGHEST).ravel()

    tangents = jacobian(cast_like(v, params))
    return with_auto_sharding(rows, roots, tangents)


def _pull(
    jacobian: Callable[[Params], Outputs],
    roots: Array,
    params: Params,
    outputs: Outputs,
    q: Float[Array, " n"],
) -> Params:
    """Return `U q = J'R q`."""

    def combine(roots: Array, outputs: Outputs, q: Float[Array, " n"]) -> Outputs:
        # Rows are ordered [k, b], as the matrix U'U is.
        columns = q.reshape(roots.shape[2], -1)
        flat = jnp.einsum("bck,kb->bc", roots, columns, precision=lax.Precision.HIGHEST)
        return _unflatten(flat, outputs)

    # R q is a cotangent of the outputs, and sharded as they are.
    cotangent = with_auto_sharding(combine, roots, outputs, q, like=outputs)
    (pulled,) = jax.linear_transpose(jacobian, params)(cotangent)
    return pulled


def _flatten(outputs: Outputs) -> Float[Array, "b c"]:
    """Put each example's outputs side by side."""
    leaves = [at_least_float32(x) for x in jax.tree.leaves(outputs)]
    return jnp.concatenate([x.reshape(x.shape[0], -1) for x in leaves], axis=1)


def _unflatten(
    rows: Float[Array, "b c"],
    like: Outputs,
) -> Outputs:
    """Undo `_flatten`."""
    leaves, structure = jax.tree.flatten(like)
    parts, first = [], 0
    for x in leaves:
        size = math.prod(x.shape[1:])
        part = rows[:, first : first + size]
        parts.append(part.reshape(x.shape).astype(x.dtype))
        first += size
    return jax.tree.unflatten(structure, parts)
