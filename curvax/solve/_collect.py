"""A window of gradients collected from a stream of batches."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Iterable
from typing import Any

import jax

from curvax._checks import check_count
from curvax._types import Batch, Params
from curvax.objective import Objective
from curvax.solve._window import Window, init_window, insert


def fisher_window(
    objective: Objective,
    params: Params,
    batches: Iterable[Batch],
    window_size: int,
    *,
    blocks: str = "full",
    dtype: Any = None,
) -> Window:
    """Collect the gradients of m batches, whose empirical Fisher is `F = (1/m) sum_i g_i g_i'`.

    Batches of one example give the empirical Fisher of the examples; larger ones that of mean
    gradients, which is smaller by about the size of a batch.

    Args:
      objective: the `curvax.Objective` whose gradients are collected.
      params: a pytree of float arrays.
      batches: an iterable of `(inputs, targets)`, of which the first m are read. Wrap it in
        `tqdm.tqdm` to see progress.
      window_size: m.
      blocks: "full", or "leaf" for a matrix without entries between leaves.
      dtype: the dtype in which gradients are stored. None stands for that of params, but at least
        float32.

    Returns:
      a `Window`, for `curvax.solve.window_inverse` and `curvax.solve.inverse_diagonal`. Gradients
      that are not finite are left out. If that or the end of the stream leaves it with fewer than
      m, it warns; its inverse is then right with `divisor="count"`.

    Raises:
      ValueError: no gradient is finite, or the window is below 1.

    Cost: m gradients, and a pass over the window for each. Memory: m d numbers.

    Example:
      >>> import jax.numpy as jnp, curvax
      >>> objective = curvax.Objective(lambda w, x: x @ w, curvax.losses.squared_error())
      >>> batches = [(jnp.eye(2)[None, i], jnp.ones((1, 1))) for i in range(2)]
      >>> window = curvax.solve.fisher_window(objective, jnp.zeros((2, 1)), batches, 2)
      >>> window.gram[0].tolist()
      [[1.0, 0.0], [0.0, 1.0]]

    References: Frantar, Kurtic and Alistarh (2021), M-FAC, https://arxiv.org/abs/2107.03356,
      section 3.1.
    """
    window = init_window(params, window_size, blocks=blocks, dtype=dtype)
    check_count(1, window_size=window_size)
    for batch in itertools.islice(batches, window_size):
        window = _with_gradient(objective, window, params, batch)
    count = int(window.count)
    if count == 0:
        raise ValueError(
            "batches gave no finite gradient: the stream is empty, "
            "or the loss is not finite at params."
        )
    if count < window_size:
        warnings.warn(
            f"batches gave {count} finite gradients for a window of {window_size}; "
            'take its inverse with divisor="count", or give more batches.',
            stacklevel=2,
        )
    return window


# The window's buffer is donated: a row of it is written in place.
@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _with_gradient(
    objective: Objective,
    window: Window,
    params: Params,
    batch: Batch,
) -> Window:
    return insert(window, jax.grad(objective)(params, batch))
