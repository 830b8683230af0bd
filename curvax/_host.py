"""Work on the host: loops in Python over compiled parts, and arrays of several processes."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree

T = TypeVar("T")


@dataclass(frozen=True)
class OnHost:
    """A function that loops in Python over compiled parts, and therefore cannot be traced.

    Args:
      function: is called with arrays, never with tracers.
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        """Call the function with `jit` in force, whatever surrounds it."""
        if any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(args)):
            raise TypeError(
                "a matvec over batches on the host cannot be traced. Call what uses it outside of "
                "jax.jit, vmap and grad, and hand it over as curvax.streamed returned it; if it is "
                "part of a function of your own, call that under `with jax.disable_jit():`, where "
                "JAX runs loops in Python."
            )
        # The solver around runs under `disable_jit`; the product itself should be compiled.
        with jax.disable_jit(False):
            return self.function(*args)


def loops_for(matvec: Any) -> contextlib.AbstractContextManager[None]:
    """Return the context for loops that call `matvec`.

    In it, `lax` loops run in Python if `matvec` is `OnHost`; otherwise it changes nothing.
    """
    return jax.disable_jit() if isinstance(matvec, OnHost) else contextlib.nullcontext()


def loops_in_python() -> bool:
    """Tell whether `jax.disable_jit` is in force."""
    # The attribute is not declared to type checkers.
    return bool(getattr(jax.config, "jax_disable_jit", False))


def on_host(tree: PyTree[Array]) -> PyTree[np.ndarray]:
    """Return arrays as NumPy arrays, with the parts of them that other processes hold.

    Where arrays are sharded over several processes, all of these must call it alike.
    """

    def of_leaf(x: Array) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            # One leaf at a time, so that a device never has more than one of them in one piece.
            return np.asarray(multihost_utils.process_allgather(x, tiled=True))
        return np.asarray(x)

    return jax.tree.map(of_leaf, tree)


def is_first_process() -> bool:
    """Tell whether this is the process that writes and prints for all."""
    return jax.process_index() == 0


def wait_for_all(event: str) -> None:
    """Return when all processes have come here, if there are several."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"curvax: {event}")


def compiled(
    fn: Callable[..., T],
    donate: tuple[int, ...] = (),
    static: tuple[int, ...] = (),
) -> Callable[..., T]:
    """Return `fn` as one compiled call where loops run in Python.

    Elsewhere `fn` is called as it is, and becomes part of the program around it. This is for
    functions at the top level of a module, so that each is compiled once. Buffers of the arguments
    `donate` are reused; `static` arguments are Python values.
    """
    program = jax.jit(fn, donate_argnums=donate, static_argnums=static)

    @functools.wraps(fn)
    def call(*args: Any) -> T:
        if not loops_in_python():
            return fn(*args)
        # One step of the Python loop: compiled as a unit, not run operation by operation.
        with jax.disable_jit(False):
            result: T = program(*args)
        return result

    return call
