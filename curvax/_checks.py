"""Checks of arguments at trace time.

An error says what is wrong, what came (by path, shape, dtype), and what to do.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PyTree

T = TypeVar("T")

CALL_WITH_BATCH = (
    "tx.update(grads, state, params, batch=batch), or with nnx.Optimizer update(model, grads, "
    "batch=batch). Where a loop drops it, as Flax's TrainState.apply_gradients and optax's "
    "MultiSteps.gradient_transformation() do, call the update itself: see examples/loops."
)
"""How the batch gets to an optimizer, as errors say it where it has not."""


def is_masked(x: object) -> bool:
    """Tell whether `x` stands where `optax.masked` took a leaf or subtree out."""
    return isinstance(x, optax.MaskedNode)


def describe(x: Any) -> str:
    """Give shape and dtype of an array-like, or the type of anything else."""
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"{x.dtype}{list(x.shape)}"
    return type(x).__name__


def check_params(params: PyTree) -> None:
    """Raise unless `params` is a non-empty pytree of float arrays (`MaskedNode`s aside)."""
    # optax hands over None if the caller left params out; as a pytree that would just be empty.
    if params is None:
        raise ValueError(
            "params are missing: got None; pass the pytree of float arrays, e.g. "
            "update(..., params)."
        )
    # A mask that takes everything out leaves `MaskedNode`s, which are no leaves: allowed.
    if not jax.tree.leaves(params, is_leaf=is_masked):
        raise ValueError(
            f"params is an empty pytree ({type(params).__name__}); pass at least one float array."
        )
    advice = (
        "Keep what is not trained out of params (eqx.partition and nnx.split take it out): close "
        "over it, or pass it in inputs as curvax.Shared(tree)."
    )
    check_floats(params, "params", advice)


def check_floats(
    tree: PyTree,
    name: str,
    advice: str,
) -> None:
    """Raise unless every leaf of `tree` is a float array; the error ends with `advice`."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{name} must hold float arrays: got {describe(leaf)} at {where}. {advice}"
            )


def check_no_masked(tree: PyTree, name: str, purpose: str, advice: str) -> None:
    """Raise if some leaf of `tree` was taken out by `optax.masked` or `optax.partition`.

    The error says `purpose`, the first path that is missing, and `advice`.
    """
    for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=is_masked):
        if is_masked(leaf):
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise ValueError(f"{purpose}, but {where} is masked out. {advice}")


def params_and_batch(params: Any, batch: Any, purpose: str) -> tuple[Any, Any]:
    """Return both, or raise if an update came without one; the error begins with `purpose`."""
    if params is None or batch is None:
        raise ValueError(f"{purpose}: {CALL_WITH_BATCH}")
    return params, batch


def check_like(
    tree: PyTree,
    reference: PyTree,
    name: str,
    reference_name: str,
) -> None:
    """Raise unless `tree` has the paths and shapes of `reference`; name the first other path.

    Where `reference` holds an `optax.MaskedNode`, `tree` may hold anything.
    """
    nodes = dict(jax.tree.leaves_with_path(reference, is_leaf=is_masked))
    want = {path: leaf for path, leaf in nodes.items() if not is_masked(leaf)}
    masked = nodes.keys() - want.keys()

    # A whole subtree may stand where the reference is masked: any beginning of a path counts.
    def below_masked(path: tuple[Any, ...]) -> bool:
        return any(path[:k] in masked for k in range(len(path) + 1))

    leaves = jax.tree.leaves_with_path(tree)
    got = {path: leaf for path, leaf in leaves if not below_masked(path)}

    # First what is missing, then what is too much or of another shape.
    for path in want:
        if path not in got:
            raise ValueError(
                f"{name} has no leaf at {jax.tree_util.keystr(path)}, where {reference_name} has "
                f"{describe(want[path])}; give {name} the structure of {reference_name}."
            )
    for path, leaf in got.items():
        where = jax.tree_util.keystr(path)
        if path not in want:
            raise ValueError(
                f"{name} has a leaf {describe(leaf)} at {where}, where {reference_name} has none; "
                f"give {name} the structure of {reference_name}."
            )
        if jnp.shape(leaf) != jnp.shape(want[path]):
            raise ValueError(
                f"{name}{where} is {describe(leaf)}, {reference_name}{where} is "
                f"{describe(want[path])}; shapes must agree."
            )

    # The same paths in other containers (a list for a tuple): `jax.tree.map` would refuse them.
    ours = str(jax.tree.structure(tree))
    theirs = str(jax.tree.structure(reference))
    if not masked and ours != theirs:
        raise ValueError(
            f"{name} and {reference_name} hold the same leaves in different containers: {ours} "
            f"and {theirs}."
        )


def check_scalar(value: Array, name: str) -> Array:
    """Return `value`, or raise unless it is one real floating-point number."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or value.shape != () or not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a real scalar, got {describe(value)}. Reduce with jnp.mean; "
            "a function that returns (value, aux) needs has_aux=True in curvax.Objective."
        )
    return value


def check_choice(
    name: str,
    value: str,
    choices: Collection[str],
) -> None:
    """Raise unless `value` is one of `choices`, and list those, in their order."""
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; valid: {', '.join(map(repr, choices))}.")


def look_up(
    name: str,
    value: str,
    choices: Mapping[str, T],
) -> T:
    """Return `choices[value]`, or raise as `check_choice` does."""
    check_choice(name, value, choices)
    return choices[value]


def check_function(
    name: str,
    value: Any,
    signature: str,
    valid: str,
) -> None:
    """Raise unless `value` is callable; tell its signature and some that are valid."""
    if not callable(value):
        raise TypeError(f"{name} must be a function {signature}, such as {valid}; got {value!r}.")


def check_at_least(minimum: float, **values: Any) -> None:
    """Raise if a named value is a concrete number below `minimum`.

    Arrays, tracers and schedules pass.
    """
    for name, value in values.items():
        # `not >=` also refuses NaN.
        if isinstance(value, int | float | np.number) and not value >= minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}.")


def check_positive(**values: Any) -> None:
    """Raise if a named value is a concrete number that is not above 0; arrays and tracers pass."""
    for name, value in values.items():
        # `not >` also refuses NaN.
        if isinstance(value, int | float | np.number) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}.")


def check_count(minimum: int, **values: Any) -> None:
    """Raise unless every named value is a concrete integer of at least `minimum`."""
    for name, value in values.items():
        if not isinstance(value, int | np.integer):
            raise TypeError(
                f"{name} must be a Python integer, known when the function is traced; "
                f"got {describe(value)}."
            )
    check_at_least(minimum, **values)


def check_integer(low: int, high: int, **values: Any) -> None:
    """Raise unless every named value is an integer, and if it is concrete, in [low, high].

    It may be traced.
    """
    for name, value in values.items():
        # A schedule has no dtype to ask for.
        if callable(value) or not jnp.issubdtype(jnp.result_type(value), jnp.integer):
            raise TypeError(f"{name} must be an integer (perhaps traced), got {describe(value)}.")
        if isinstance(value, int | np.integer) and not low <= value <= high:
            raise ValueError(f"{name} must lie in [{low}, {high}], got {value}.")


def check_decay(**values: Any) -> None:
    """Raise if a named decay rate is a function, or a concrete number outside [0, 1)."""
    for name, value in values.items():
        if callable(value):
            raise TypeError(
                f"{name} must be a number, got a function; let optax.inject_hyperparams follow "
                "the schedule."
            )
        if isinstance(value, int | float | np.number) and not 0 <= value < 1:
            raise ValueError(f"{name} must lie in [0, 1), got {value}.")


def check_precision(**values: Any) -> None:
    """Raise if a named hyperparameter arrives in a 16-bit float, where 0.999 rounds to 1."""
    for name, value in values.items():
        dtype = getattr(value, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            continue
        # optax.inject_hyperparams casts hyperparameters to the dtype of params unless told not to.
        if jnp.finfo(dtype).bits < 32:
            raise TypeError(
                f"{name} arrives as {dtype}, too coarse for a decay rate or damping. "
                "Under optax.inject_hyperparams pass hyperparam_dtype=jnp.float32."
            )


def check_damping(damping: Any, allow_zero: bool = False) -> None:
    """Raise if a concrete damping is not positive, or no number, array or schedule."""
    if hasattr(damping, "as_schedule"):
        raise TypeError(
            f"damping is {damping}, which only scale_by_kfac, scale_by_ekfac, kfac and ekfac take: "
            "they know the curvature that it is a fraction of. Here it is a number or a schedule."
        )
    if not isinstance(damping, int | float | np.number):
        return
    # Zero is for callers that divide by what is not zero only.
    if not (damping > 0 or (allow_zero and damping == 0)):
        raise ValueError(
            f"damping must be positive, got {damping}: a matrix without full rank has no inverse."
        )
