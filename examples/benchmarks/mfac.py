"""How near M-FAC comes to the memory's speed, and how exact it is in float32.

    python examples/benchmarks/mfac.py                    # two minutes, 6 GB
    python examples/benchmarks/mfac.py --json mfac.json

"speed": a step (`scale_by_mfac`) reads the window twice and writes one row; bytes per second of
that, as a share of the best that a plain product `G @ v` or a sum over the same array reaches in
the same run. "solve" is the share of the step that the m x m work takes, "temporary" the memory
beside the window, both relative. The bounds we aim at: 0.6 of the speed, 0.05 for the solve at m =
256, 0.15 for temporary memory.

"accuracy": relative residual of the inverse times a gradient, for damping relative to the largest
eigenvalue of the window's Fisher matrix, on gradients of a trained network; beside it, the
published recurrence over the rows in float32. "step" is the product of the newest row, as the
optimizer computes it.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _harness import parser, report, seconds, write_json
from jax.flatten_util import ravel_pytree
from sklearn.datasets import load_digits

import curvax
from curvax.solve import init_window, insert

SIZES = ((1_000_000, 128), (1_000_000, 256), (10_000_000, 64))  # d, m


def speed(d: int, m: int, rounds: int) -> dict[str, Any]:
    """Time a step, a plain product and a plain sum, taking turns."""
    params = {"w": jnp.zeros((d // 2000, 1000)), "v": jnp.zeros(d - d // 2000 * 1000)}
    tx = curvax.scale_by_mfac(m, 1e-3)
    state = tx.init(params)
    grads = jax.tree.map(lambda p: jax.random.normal(jax.random.key(0), p.shape), params)
    step = jax.jit(tx.update, donate_argnums=1).lower(grads, state).compile()
    memory = step.memory_analysis()
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    window = sum(x.nbytes for x in jax.tree.leaves(state.curvature.rows))

    def run() -> Any:
        nonlocal state
        updates, state = step(grads, state)
        return updates

    for _ in range(m):  # distinct rows, so that the solve is one of full rank
        grads = jax.tree.map(lambda g: jnp.roll(g, 1) * 1.01, grads)
        run()
    flat, vector = jnp.ones((m, d)), jnp.ones(d)
    product = jax.jit(lambda G, v: G @ v).lower(flat, vector).compile()
    total = jax.jit(jnp.sum).lower(flat).compile()
    gram = state.curvature.gram[0] + jnp.eye(m)
    right = jnp.ones(m)
    solve = jax.jit(
        lambda S, b: jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(S, lower=True), b)
    )
    solve = solve.lower(gram, right).compile()
    calls = {
        "step": run,
        "product": lambda: product(flat, vector),
        "sum": lambda: total(flat),
        "solve": lambda: solve(gram, right),
    }
    times = seconds(calls, rounds)
    best = window / min(times["product"], times["sum"])
    reached = (2 * window + window / m) / times["step"]
    return {
        "d": d,
        "m": m,
        "step ms": 1e3 * times["step"],
        "GB/s": reached / 1e9,
        "best plain GB/s": best / 1e9,
        "share": reached / best,
        "solve / step": times["solve"] / times["step"],
        "temporary / window": beside / window,
    }


def recurrence(G: np.ndarray, damping: np.float32, x: np.ndarray) -> np.ndarray:
    """Multiply by the inverse through the published matrices D and B, in the dtype of G."""
    m = len(G)
    U = m * np.eye(m, dtype=G.dtype) + G @ G.T / damping
    for k in range(m):
        U[k + 1 :, k:] -= np.outer(U[k + 1 :, k] / U[k, k], U[k, k:])
    D = np.triu(U - m * np.eye(m, dtype=G.dtype))
    q, B, p = m + np.diag(D), np.eye(m, dtype=G.dtype) / damping, G @ x / damping
    for i in range(m):
        B[i] -= (D[:i, i] / q[:i]) @ B[:i]
        p[i + 1 :] -= D[i, i + 1 :] * p[i] / q[i]
    return x / damping - G.T @ (B.T @ (p / q))


def accuracy(m: int, steps: int) -> list[dict[str, Any]]:
    """Residuals on gradients of a perceptron trained on digits."""
    inputs, labels = load_digits(return_X_y=True)
    inputs, labels = jnp.asarray(inputs / 16, jnp.float32), jnp.asarray(labels)
    model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(128), nn.relu, nn.Dense(10)])
    objective = curvax.Objective(model.apply, curvax.losses.softmax_cross_entropy())
    tx, rng = optax.adam(1e-3), np.random.default_rng(0)
    params = model.init(jax.random.key(0), inputs[:1])
    state = tx.init(params)
    gradient = jax.jit(
        lambda params, rows: jax.grad(objective)(params, (inputs[rows], labels[rows]))
    )
    for _ in range(steps):
        updates, state = tx.update(gradient(params, rng.integers(0, 1500, 64)), state)
        params = optax.apply_updates(params, updates)
    window, add = init_window(params, m), jax.jit(insert)
    for _ in range(m):
        window = add(window, gradient(params, rng.integers(0, 1500, 32)))
    v = gradient(params, jnp.arange(1500, 1797))
    newest = jax.tree.map(lambda x: x[-1], window.rows)
    G = np.stack(
        [
            np.asarray(ravel_pytree(jax.tree.map(lambda x, i=i: x[i], window.rows))[0])
            for i in range(m)
        ]
    )
    wide = G.astype(np.float64)
    largest = np.linalg.eigvalsh(wide @ wide.T)[-1] / m
    older = curvax.solve.Window(
        window.rows, window.gram, window.count - 1
    )  # about to take the newest row once more

    def residual(got: Any, v: Any, damping: float) -> float:
        x = np.asarray(ravel_pytree(got)[0], np.float64)
        want = np.asarray(ravel_pytree(v)[0], np.float64)
        return float(
            np.linalg.norm(damping * x + wide.T @ (wide @ x) / m - want) / np.linalg.norm(want)
        )

    rows = []
    for relative in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8):
        damping = relative * largest
        ours = jax.jit(lambda v, damping=damping: curvax.solve.window_inverse(window, damping)(v))(
            v
        )
        step = curvax.scale_by_mfac(m, damping)
        state = step.init(params)._replace(curvature=older)
        theirs = recurrence(G, np.float32(damping), np.asarray(ravel_pytree(v)[0]))
        rows.append(
            {
                "damping / largest": f"{relative:g}",
                "window_inverse": residual(ours, v, damping),
                "recurrence": residual(theirs, v, damping),
                "step": residual(jax.jit(step.update)(newest, state)[0], newest, damping),
            }
        )
    return rows


def main() -> None:
    flags = parser(__doc__).parse_args()
    sizes = ((20_000, 8),) if flags.smoke else SIZES
    speeds = [speed(d, m, 1 if flags.smoke else flags.rounds) for d, m in sizes]
    report("speed of a step", speeds)
    exact = accuracy(16 if flags.smoke else 512, 20 if flags.smoke else 300)
    report("relative residual in float32", exact)
    write_json(flags.json, {"mfac": {"speed": speeds, "accuracy": exact}})


if __name__ == "__main__":
    main()
