"""Levenberg-Marquardt-Langevin sampling of a two-dimensional mixture, and what float32 does to it.

    python examples/langevin.py            # a minute on two cores
    python examples/langevin.py --smoke    # does it run? some seconds

A diffusion sampler steps along the noise u that it predicts. Levenberg-Marquardt-Langevin replaces
u by a damped Newton direction, with curvature of rank one from the noise itself:

    d = (lam I + v v')^-1 u  ~  u - v (v.u) / (lam + |v|^2),    v = kappa u_before + (1 - kappa) u,

rescaled to the length of u. Two things are measured.

First, with `kappa = 0` (the default of every script that was released with the method, as far as
we read them) v is u, so that `d = u lam / (lam + |u|^2)`: a multiple of u, and rescaled, u itself.
The method does nothing then. But the formula subtracts two nearly equal vectors; in float32, with
`|u|^2` in the thousands and lam of 1e-3, next to nothing but rounding remains. The first table has
the cosine of what is computed to u, where it should be 1, for the sizes of images. Woodbury's
identity for a window of gradients, `curvax.solve.woodbury`, subtracts too; it reports a residual
above its tolerance.

Second, the sampler with the exact score of a mixture of Gaussians: ten steps of a deterministic
sampler (DDIM), by kappa and lam. In two dimensions v is one of two directions, where in images it
is one of thousands: this tests the arithmetic, and says little about images. The safe form is used:
the part of u along v is scaled by `lam / (lam + |v|^2)`, with nothing subtracted from it. Measured:
at kappa 0 the sampler is the plain one; with kappa 0.5 and lam 1 the distance falls by 6 %. With
kappa above 0 and lam 1e-3 the samples are useless: the step, at full length, goes across v.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _common import print_table, with_error
from jax.scipy.special import logsumexp
from matplotlib.figure import Figure
from tqdm import tqdm

import curvax

MEANS = 4 * jnp.array([[jnp.cos(a), jnp.sin(a)] for a in 2 * jnp.pi * jnp.arange(6) / 6])
WEIGHTS = jnp.array([0.3, 0.2, 0.2, 0.1, 0.1, 0.1])
WIDTH = 0.3
FIRST, LAST = 20.0, 0.02  # noise levels of the sampler


def published_form(u: jax.Array, v: jax.Array, lam: float) -> jax.Array:
    """Return `u - v (v.u) / (lam + |v|^2)`, as it stands."""
    return u - v * (v @ u) / (lam + v @ v)


def rank1_damped_solve(u: jax.Array, v: jax.Array, lam: float) -> jax.Array:
    """Return `lam (lam I + v v')^-1 u` with nothing lost for v near u.

    `u = u_v + u_p` along v and perpendicular to it: the inverse is `lam / (lam + |v|^2)` on u_v and
    the identity on u_p. For v = u the remainder u_p is zero but for rounding, and is projected
    once more, so that what is left of it is perpendicular to v.
    """
    square = v @ v
    nonzero = jnp.where(square > 0, square, 1)
    along = v * ((v @ u) / nonzero)
    across = u - along
    across = across - v * ((v @ across) / nonzero)
    # Below the rounding of u what is across v is rounding alone, and would count for much once the
    # part along v is scaled down.
    is_rounding = jnp.linalg.norm(across) < 4 * jnp.finfo(u.dtype).eps * jnp.linalg.norm(u)
    across = jnp.where(is_rounding, 0, across)
    return along * (lam / (lam + square)) + across


def as_long_as(x: jax.Array, u: jax.Array) -> jax.Array:
    length = jnp.linalg.norm(x)
    return x * (jnp.linalg.norm(u) / jnp.where(length > 0, length, 1))


def check() -> None:
    """Compare with a dense solve in float64, and v = 0, v = u with what they have to give."""
    with jax.enable_x64(True):
        u, v = jax.random.normal(jax.random.key(0), (2, 5))
        dense = jnp.linalg.solve(0.3 * jnp.eye(5) + jnp.outer(v, v), 0.3 * u)
        pairs = (
            (rank1_damped_solve(u, v, 0.3), dense),
            (rank1_damped_solve(u, 0 * v, 0.3), u),
            (rank1_damped_solve(u, u, 0.3), u * 0.3 / (0.3 + u @ u)),
        )
        apart = max(float(jnp.max(jnp.abs(x - y))) for x, y in pairs)
    if apart > 1e-12:
        raise SystemExit(f"the rank-one solve is off by {apart}")


# --- what float32 does at kappa = 0 ---------------------------------------------------------------


def cosines(dimension: int, lam: float, num_seeds: int) -> list[np.ndarray]:
    """Cosines to u of three forms, computed in float32 and measured in float64."""

    def forms_of(key: jax.Array) -> tuple[jax.Array, ...]:
        u = jax.random.normal(key, (dimension,), jnp.float32)
        by_window, _ = curvax.solve.woodbury(curvax.solve.window_of(u[None]), u, damping=lam)
        return u, published_form(u, u, lam), by_window, rank1_damped_solve(u, u, lam)

    # No jit: a compiler may fuse the product and the subtraction, and so round otherwise.
    results = [forms_of(key) for key in jax.random.split(jax.random.key(0), num_seeds)]
    u, *forms = (np.array(x, np.float64) for x in zip(*results, strict=True))
    norm = lambda x: np.linalg.norm(x, axis=1)
    return [(u * d).sum(1) / (norm(u) * np.maximum(norm(d), 1e-300)) for d in forms]


def float32_table(dimensions: list[int], lams: list[float], num_seeds: int) -> None:
    rows = []
    for dimension in dimensions:
        for lam in lams:
            published, by_window, safe = cosines(dimension, lam, num_seeds)
            row = [f"{dimension}", f"{lam:g}", f"{published.mean():.4f}"]
            row += [f"{published.min():.4f}", f"{published.max():.4f}"]
            rows.append([*row, f"{by_window.min():.4f}", f"{safe.min():.7f}"])
    header = (
        *("dimension", "lambda", "published form", "least", "largest"),
        *("woodbury, least", "safe form, least"),
    )
    print_table("cosine to u at kappa = 0 in float32 (exactly: 1)", header, rows)


# --- sampling -------------------------------------------------------------------------------------


def score(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """The gradient of the log density of the mixture with noise of deviation sigma."""

    def log_density(x: jax.Array) -> jax.Array:
        variance = WIDTH**2 + sigma**2
        squares = jnp.sum((x - MEANS) ** 2, axis=-1)
        return logsumexp(-squares / (2 * variance), b=WEIGHTS)

    return jax.grad(log_density)(x)


@functools.partial(jax.jit, static_argnums=(1, 2))
def sample(
    key: jax.Array, number: int, num_steps: int, kappa: jax.Array, lam: jax.Array
) -> jax.Array:
    """Points after deterministic steps from noise; `lam = inf` is the plain sampler."""
    sigmas = jnp.geomspace(FIRST, LAST, num_steps + 1)

    def one(x: jax.Array) -> jax.Array:
        def step(carry: tuple[jax.Array, jax.Array], levels: jax.Array) -> tuple[tuple, None]:
            x, before = carry
            sigma, next_sigma = levels
            # The score is that of predicted noise u: score = -u / sigma.
            u = -sigma * score(x, sigma)
            v = jnp.where(jnp.isnan(before), u, kappa * before + (1 - kappa) * u)
            direction = as_long_as(rank1_damped_solve(u, v, lam), u)
            direction = jnp.where(jnp.isinf(lam), u, direction)
            return (x + (next_sigma - sigma) * direction, u), None

        levels = jnp.stack([sigmas[:-1], sigmas[1:]], axis=1)
        (x, _), _ = jax.lax.scan(step, (x, jnp.full(2, jnp.nan)), levels)
        return x

    return jax.vmap(one)(FIRST * jax.random.normal(key, (number, 2)))


def draw(key: jax.Array, number: int) -> jax.Array:
    which, noise = jax.random.split(key)
    means = MEANS[jax.random.choice(which, len(MEANS), (number,), p=WEIGHTS)]
    return means + WIDTH * jax.random.normal(noise, (number, 2))


@jax.jit
def sliced_wasserstein(x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean over 64 directions of the distance `W_1` of the projected points."""
    angles = jnp.pi * jnp.arange(64) / 64
    directions = jnp.stack([jnp.cos(angles), jnp.sin(angles)])
    return jnp.mean(jnp.abs(jnp.sort(x @ directions, axis=0) - jnp.sort(y @ directions, axis=0)))


def sampling_table(args: argparse.Namespace) -> dict[str, jax.Array]:
    settings = {"plain": (0.0, jnp.inf)}
    for kappa in args.kappas:
        for lam in args.lams:
            settings[f"kappa {kappa:g}, lambda {lam:g}"] = (kappa, lam)
    distances: dict[str, list[float]] = {name: [] for name in ("another draw", *settings)}
    points = {}
    for seed in tqdm(range(args.seeds), unit="seed", leave=False):
        key, own, other = jax.random.split(jax.random.key(seed), 3)
        exact = draw(own, args.points)
        distances["another draw"].append(float(sliced_wasserstein(draw(other, args.points), exact)))
        for name, (kappa, lam) in settings.items():
            # The same noise for all settings: differences are of pairs.
            x = sample(key, args.points, args.steps, kappa, lam)
            distances[name].append(float(sliced_wasserstein(x, exact)))
            points.setdefault(name, x)
        points.setdefault("exact", exact)
    plain, rows = np.array(distances["plain"]), []
    for name, values in distances.items():
        x = np.array(values)
        difference = "" if name == "plain" else with_error(x - plain, 4, "+")
        rows.append([name, with_error(x, 4), difference])
    title = f"sliced Wasserstein distance after {args.steps} steps, {args.seeds} seeds"
    print_table(title, ("sampler", "distance", "against plain, by seed"), rows)
    best = min(list(settings)[1:], key=lambda name: np.mean(distances[name]))
    return {name: points[name] for name in ("exact", "plain", best)}


def plot(points: dict[str, jax.Array], path: Path) -> None:
    figure = Figure(figsize=(4 * len(points), 4), layout="constrained")
    for ax, (name, x) in zip(
        figure.subplots(1, len(points), sharex=True, sharey=True), points.items(), strict=True
    ):
        ax.scatter(*np.asarray(x[:2000]).T, s=2, alpha=0.5)
        ax.set(title=name, aspect="equal")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"\npicture: {path}")


def main() -> None:
    numbers = lambda text: list(map(float, text.split(",")))
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--seeds", type=int, default=10)
    flags.add_argument("--points", type=int, default=4000, help="that each sampler draws")
    flags.add_argument("--steps", type=int, default=10, help="of the sampler")
    flags.add_argument("--kappas", type=numbers, default=[0.0, 0.2, 0.5, 0.9])
    flags.add_argument("--lams", type=numbers, default=[0.001, 1.0, 10.0, 100.0])
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="two seeds, few points")
    args = flags.parse_args()
    if args.smoke:
        args.seeds, args.points, args.kappas, args.lams = 2, 200, [0.0, 0.5], [1.0]
    check()
    dimensions = [3 * 32 * 32, 4 * 64 * 64]  # an image of CIFAR-10; a latent of 64 x 64
    float32_table(dimensions, [8e-4, 1e-3, 1.0], 3 if args.smoke else 20)
    plot(sampling_table(args), args.out / "langevin.png")


if __name__ == "__main__":
    main()
