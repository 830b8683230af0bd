"""Ground states by variational Monte Carlo: SPRING and stochastic reconfiguration against Adam.

    python examples/vmc.py                       # three minutes on two cores
    python examples/vmc.py --problem heisenberg  # one of oscillator, heisenberg, chain, helium
    python examples/vmc.py --smoke               # does it run? some seconds

A network gives log psi. Walkers are drawn from psi^2 by Metropolis' method, the energy is the mean
of `E = H psi / psi` over them, and `curvax.losses.local_energy` has its gradient and the metric of
wavefunctions. So each method of the library that takes an objective is one of this field: `engd` is
stochastic reconfiguration in the space of walkers (minSR), `spring` has momentum there, `kfac` is
that of FermiNet. The problems have known energies:

* oscillator: three coordinates of a harmonic oscillator, 3/2 exactly.
* heisenberg: a ring of spins with `H = sum_i S_i S_i+1`. All configurations without magnetization
  are summed with their weights, and psi is positive after Marshall's sign.
* chain: the same by draws.
* helium: -2.903724 hartree. A factor gives psi its cusps, and a network of distances the rest.

Twelve spins in 300 steps, relative error 1e-4: by sums SPRING takes 14 steps, stochastic
reconfiguration 43; by 256 walkers, fewer than the 312 parameters, SPRING 67 and no other method
gets there. For helium SPRING's energy is exact to its standard error of 1e-4 after 200 steps.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _common import print_table
from tqdm import tqdm

import curvax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)

Params = dict[str, Any]
LogPsi = Callable[[Params, jax.Array], jax.Array]

COLORS = {"spring": "C0", "sr": "C1", "kfac": "C2", "adam": "C3"}


class Problem(NamedTuple):
    """A Hamiltonian, a wavefunction for it, and how to draw from its square.

    Attributes:
      log_psi: `(params, walkers) -> [n]`.
      params: initial ones.
      walkers: initial ones; those of `heisenberg` are all configurations.
      energies: `(params, walkers) -> [n]`, the local energies.
      move: `(params, walkers, key) -> walkers`, some sweeps; None to sum over all walkers.
      exact: the ground state's energy.
      measure: `params -> energy` without sampling, or None.
      rates: `{method: (learning rate, damping)}`.
      steps: how many to take.
    """

    log_psi: LogPsi
    params: Params
    walkers: jax.Array
    energies: Callable[[Params, jax.Array], jax.Array]
    move: Callable[[Params, jax.Array, jax.Array], jax.Array] | None
    exact: float
    measure: Callable[[Params], jax.Array] | None
    rates: dict[str, tuple[float, float]]
    steps: int


def dense(key: jax.Array, widths: tuple[int, ...], scale: float = 1.0) -> list[Params]:
    """Initial weights of variance `scale^2 / inputs`."""
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        w = jax.random.normal(jax.random.fold_in(key, number), (inputs, outputs))
        layers.append({"w": scale * w / inputs**0.5, "b": jnp.zeros(outputs)})
    return layers


def mlp(layers: list[Params], x: jax.Array) -> jax.Array:
    *hidden, last = layers
    for layer in hidden:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ last["w"] + last["b"]


# Particles: local energies by derivatives, moves by Gaussian steps


def kinetic(log_psi: LogPsi, params: Params, walkers: jax.Array) -> jax.Array:
    """`-1/2 psi'' / psi = -1/2 (tr H + |g|^2)`, with gradient g and Hessian H of log psi."""

    def of_walker(x: jax.Array) -> jax.Array:
        flat, shape = x.ravel(), x.shape
        gradient = jax.grad(lambda flat: log_psi(params, flat.reshape(1, *shape))[0])
        # Forward over reverse, a direction after the other: H e_k of every unit vector.
        g, push = jax.linearize(gradient, flat)
        second = jax.vmap(push)(jnp.eye(flat.size))
        return -0.5 * (jnp.trace(second) + g @ g)

    return jax.vmap(of_walker)(walkers)


def gaussian_moves(log_psi: LogPsi, width: float, sweeps: int) -> Callable[..., jax.Array]:
    """Metropolis: all coordinates of a walker move at once, and it stays where psi^2 says so."""

    def move(params: Params, walkers: jax.Array, key: jax.Array) -> jax.Array:
        def sweep(carry: Any, key: jax.Array) -> tuple[Any, None]:
            x, log = carry
            step, coin = jax.random.split(key)
            proposed = x + width * jax.random.normal(step, x.shape)
            log_proposed = log_psi(params, proposed)
            ratio = jnp.exp(2 * (log_proposed - log))
            accepted = jax.random.uniform(coin, log.shape) < ratio
            broadcast = accepted.reshape(-1, *[1] * (x.ndim - 1))
            return (jnp.where(broadcast, proposed, x), jnp.where(accepted, log_proposed, log)), None

        start = walkers, log_psi(params, walkers)
        (walkers, _), _ = jax.lax.scan(sweep, start, jax.random.split(key, sweeps))
        return walkers

    return move


def oscillator(key: jax.Array, small: bool) -> Problem:
    """`(-psi'' + x^2 psi) / 2` in three dimensions, from a Gaussian that is too wide."""

    def log_psi(params: Params, x: jax.Array) -> jax.Array:
        return -0.3 * jnp.sum(x**2, axis=-1) + mlp(params["net"], x)[:, 0]

    def energies(params: Params, x: jax.Array) -> jax.Array:
        return kinetic(log_psi, params, x) + 0.5 * jnp.sum(x**2, axis=-1)

    return Problem(
        log_psi=log_psi,
        params={"net": dense(key, (3, 24, 24, 1))},
        walkers=jax.random.normal(key, (32 if small else 512, 3)),
        energies=energies,
        move=gaussian_moves(log_psi, 0.6, 10),
        exact=1.5,
        measure=None,
        rates={
            "spring": (0.1, 1e-3),
            "sr": (0.1, 1e-3),
            "kfac": (0.2, 1e-2),
            "adam": (1e-2, 0.0),
        },
        steps=300,
    )


def helium(key: jax.Array, small: bool) -> Problem:
    """Two electrons at a nucleus of charge 2; units of hartree and bohr."""

    def distances(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """To the nucleus, `[n, 2]`, and between the electrons, `[n]`."""
        between = jnp.linalg.norm(x[:, 0] - x[:, 1], axis=-1)
        return jnp.linalg.norm(x, axis=-1), between

    def log_psi(params: Params, x: jax.Array) -> jax.Array:
        r, r12 = distances(x)
        # Cusps: slope -2 at the nucleus and 1/2 where electrons meet, which cancel the poles of the
        # potential. Far out the decay is slower.
        nucleus = jnp.sum((2 * r + 1.6 * r**2) / (1 + r), axis=-1)
        pair = 0.5 * r12 / (1 + 0.5 * r12)
        # Even functions of distances leave the cusps; the sum over both orders is symmetric.
        features = jnp.log1p(jnp.stack([r[:, 0], r[:, 1], r12], axis=-1) ** 2)
        orders = jnp.stack([features, features[:, jnp.array([1, 0, 2])]], axis=1)
        return pair - nucleus + jnp.sum(mlp(params["net"], orders), axis=(1, 2))

    def energies(params: Params, x: jax.Array) -> jax.Array:
        r, r12 = distances(x)
        return kinetic(log_psi, params, x) - jnp.sum(2 / r, axis=-1) + 1 / r12

    return Problem(
        log_psi=log_psi,
        params={"net": dense(key, (3, 24, 24, 1), scale=0.5)},
        walkers=jax.random.normal(key, (32 if small else 512, 2, 3)),
        energies=energies,
        move=gaussian_moves(log_psi, 0.3, 20),
        exact=-2.903724,
        measure=None,
        rates={
            "spring": (0.05, 1e-3),
            "sr": (0.05, 1e-3),
            "kfac": (0.2, 1e-2),
            "adam": (5e-3, 0.0),
        },
        steps=300,
    )


# Spins: configurations are rows of +1 and -1


def ring(key: jax.Array, num_spins: int, by_draws: bool, num_walkers: int) -> Problem:
    """`H = sum_i S_i S_i+1` on a ring with as many spins up as down."""
    ups = list(itertools.combinations(range(num_spins), num_spins // 2))
    sector = -np.ones((len(ups), num_spins))
    np.put_along_axis(sector, np.array(ups), 1.0, axis=1)
    bonds = [(i, (i + 1) % num_spins) for i in range(num_spins)]
    # A configuration with the spins of one bond exchanged: [bond, spin] -> spin.
    exchanges = np.tile(np.arange(num_spins), (num_spins, 1))
    for number, (i, j) in enumerate(bonds):
        exchanges[number, [i, j]] = j, i

    def log_psi(params: Params, s: jax.Array) -> jax.Array:
        h = s @ params["w"] + params["b"]
        return jnp.sum(jnp.logaddexp(h, -h), axis=-1)

    def energies(params: Params, s: jax.Array) -> jax.Array:
        """S_i S_j exchanges spins that differ, with 1/2, which is -1/2 after Marshall's sign."""
        differ = s != jnp.roll(s, -1, axis=-1)
        exchanged = s[:, exchanges]
        log = log_psi(params, exchanged.reshape(-1, num_spins)).reshape(differ.shape)
        ratios = jnp.exp(log - log_psi(params, s)[:, None])
        return jnp.sum(jnp.where(differ, -0.25 - 0.5 * ratios, 0.25), axis=-1)

    def move(params: Params, s: jax.Array, key: jax.Array) -> jax.Array:
        """Metropolis: exchange two spins, anywhere on the ring."""

        def sweep(carry: Any, key: jax.Array) -> tuple[Any, None]:
            s, log = carry
            of_pair, coin = jax.random.split(key)
            rows = jnp.arange(len(s))[:, None]
            pair = jax.random.randint(of_pair, (len(s), 2), 0, num_spins)
            proposed = s.at[rows, pair].set(s[rows, pair[:, ::-1]])
            log_proposed = log_psi(params, proposed)
            uniform = jax.random.uniform(coin, log.shape)
            accepted = uniform < jnp.exp(2 * (log_proposed - log))
            s = jnp.where(accepted[:, None], proposed, s)
            return (s, jnp.where(accepted, log_proposed, log)), None

        keys = jax.random.split(key, 2 * num_spins)
        (s, _), _ = jax.lax.scan(sweep, (s, log_psi(params, s)), keys)
        return s

    def measure(params: Params) -> jax.Array:
        weights = jax.nn.softmax(2 * log_psi(params, sector))
        return weights @ energies(params, sector)

    w = 0.1 * jax.random.normal(key, (num_spins, 2 * num_spins))
    start = jnp.resize(jnp.array([1.0, -1.0]), (num_walkers, num_spins))
    return Problem(
        log_psi=log_psi,
        params={"w": w, "b": 0.1 * jax.random.normal(key, (2 * num_spins,))},
        walkers=start if by_draws else jnp.array(sector),
        energies=energies,
        move=move if by_draws else None,
        exact=exact_energy(sector, exchanges),
        measure=measure,
        rates={
            "spring": (0.1 if by_draws else 0.2, 1e-3),
            "sr": (0.2 if by_draws else 0.4, 1e-3),
            "kfac": (0.5, 3e-2),
            "adam": (3e-2, 0.0),
        },
        steps=300,
    )


def exact_energy(sector: np.ndarray, exchanges: np.ndarray) -> float:
    """The least eigenvalue of H among the configurations of a sector, by a dense matrix."""
    powers = 2 ** np.arange(sector.shape[1])
    order = np.argsort((sector > 0) @ powers)
    codes = ((sector > 0) @ powers)[order]
    H = np.zeros((len(sector), len(sector)))
    for number, exchange in enumerate(exchanges):
        differ = sector[:, number] != np.roll(sector, -1, axis=1)[:, number]
        partner = order[np.searchsorted(codes, (sector[:, exchange] > 0) @ powers)]
        rows = np.flatnonzero(differ)
        H[rows, partner[rows]] += 0.5
        np.fill_diagonal(H, H.diagonal() + np.where(differ, -0.25, 0.25))
    return float(np.linalg.eigvalsh(H)[0])


# Training


def clipped(energies: jax.Array, weights: jax.Array) -> jax.Array:
    """Keep outliers within five mean deviations of the mean, as FermiNet does.

    Only the gradient sees them so; the energy that is reported is that of all.
    """
    mean = weights @ energies / jnp.sum(weights)
    deviation = weights @ jnp.abs(energies - mean) / jnp.sum(weights)
    return jnp.clip(energies, mean - 5 * deviation, mean + 5 * deviation)


def methods_of(problem: Problem, objective: curvax.Objective, num_steps: int) -> dict[str, Any]:
    """Optimizers with the rates of a problem, all falling as `1 / (1 + 4 t / steps)`."""

    def schedule(name: str) -> Callable[[Any], Any]:
        rate, _ = problem.rates[name]
        return lambda count: rate / (1 + 4 * count / num_steps)

    damping = {name: damping for name, (_, damping) in problem.rates.items()}
    n = len(problem.walkers)
    layout = curvax.kron_layout(
        objective, problem.params, (problem.walkers, (jnp.zeros(n), jnp.ones(n)))
    )
    spring = curvax.spring(
        schedule("spring"), objective, damping["spring"], momentum=0.9, max_norm=1.0
    )
    sr = curvax.spring(schedule("sr"), objective, damping["sr"], momentum=0.0, max_norm=1.0)
    kfac = curvax.kfac(schedule("kfac"), objective, layout, damping=damping["kfac"])
    adam = optax.with_extra_args_support(optax.adam(schedule("adam")))
    return {"spring": spring, "sr": sr, "kfac": kfac, "adam": adam}


def train(
    problem: Problem, objective: curvax.Objective, tx: Any, num_steps: int, label: str
) -> tuple[Params, jax.Array, np.ndarray, np.ndarray]:
    """Return the trained params, walkers, and energy and seconds after each step."""

    def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
        params, state, walkers = carry
        weights = jnp.ones(len(walkers))
        if problem.move is None:
            weights = jax.nn.softmax(2 * problem.log_psi(params, walkers))
        else:
            walkers = problem.move(params, walkers, key)
        energies = problem.energies(params, walkers)
        batch = walkers, (clipped(energies, weights), weights)
        gradient = jax.grad(objective)(params, batch)
        updates, state = tx.update(gradient, state, params, batch=batch)
        energy = weights @ energies / jnp.sum(weights)
        # Of spins the energy that counts is that of the whole sector.
        shown = energy if problem.measure is None else problem.measure(params)
        return (optax.apply_updates(params, updates), state, walkers), shown

    chunk = min(20, num_steps)
    start = problem.params, tx.init(problem.params), problem.walkers
    keys = jax.random.split(jax.random.key(1), (num_steps // chunk, chunk))
    if problem.move is not None and len(keys) > 1:
        # Walkers start in no order: let them find psi^2. (A smoke test has no time for it.)
        for key in keys[0]:
            start = *start[:2], jax.jit(problem.move)(start[0], start[2], key)
    run = jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))
    run = run.lower(start, keys[0]).compile()
    carry, energies, seconds, elapsed = start, [], [], 0.0
    with tqdm(total=num_steps, desc=label, unit="step", leave=False) as bar:
        for of_chunk in keys:
            begin = time.perf_counter()
            carry, values = jax.block_until_ready(run(carry, of_chunk))
            lasted = time.perf_counter() - begin
            energies.extend(values.tolist())
            seconds.extend(elapsed + lasted * np.arange(1, chunk + 1) / chunk)
            elapsed += lasted
            bar.set_postfix(energy=f"{np.mean(energies[-chunk:]):.5f}")
            bar.update(chunk)
    params, _, walkers = carry
    return params, walkers, np.array(energies), np.array(seconds)


def final_energy(
    problem: Problem, params: Params, walkers: jax.Array, rounds: int
) -> tuple[float, float]:
    """Return the energy of trained params, and its standard error (0 without sampling)."""
    if problem.measure is not None:
        return float(problem.measure(params)), 0.0

    def sample(walkers: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        walkers = problem.move(params, walkers, key)
        return walkers, problem.energies(params, walkers)

    keys = jax.random.split(jax.random.key(2), rounds)
    _, energies = jax.jit(lambda walkers, keys: jax.lax.scan(sample, walkers, keys))(walkers, keys)
    # Draws of a walker depend on each other; walkers do not.
    by_walker = np.asarray(energies).mean(axis=0)
    return by_walker.mean(), by_walker.std(ddof=1) / len(by_walker) ** 0.5


def steps_to(errors: np.ndarray, seconds: np.ndarray, limit: float) -> str:
    """Say after how many steps and seconds the error stays below a limit for ten steps."""
    below = np.convolve(errors < limit, np.ones(10), "valid") == 10
    if not below.any():
        return "-"
    first = int(np.argmax(below))
    return f"{first + 1} / {seconds[first]:.1f} s"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = ("oscillator", "heisenberg", "chain", "helium")
    flags.add_argument("--problem", choices=("all", *names), default="all")
    flags.add_argument("--methods", nargs="+", choices=list(COLORS), default=list(COLORS))
    flags.add_argument("--steps", type=int, help="in place of those of each problem")
    flags.add_argument("--spins", type=int, default=12, help="length of the ring, even")
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = flags.parse_args()

    key, small = jax.random.key(0), args.smoke
    num_spins = 6 if small else args.spins
    # Fewer walkers than parameters, as with large networks: there momentum has most to bring.
    num_draws = 32 if small else 256
    builders = {
        "oscillator": lambda: oscillator(key, small),
        "heisenberg": lambda: ring(key, num_spins, False, num_draws),
        "chain": lambda: ring(key, num_spins, True, num_draws),
        "helium": lambda: helium(key, small),
    }
    chosen = names if args.problem == "all" else (args.problem,)
    # Compiling takes all of the time of a smoke test: a method for each kind of problem.
    smoke_methods = {"heisenberg": ["spring"], "oscillator": ["adam"]}
    _, axes = plt.subplots(1, len(chosen), figsize=(4.5 * len(chosen), 4), squeeze=False)
    for axis, name in zip(axes[0], chosen, strict=True):
        methods = smoke_methods.get(name, []) if small else args.methods
        if methods:
            compare(name, builders[name](), methods, 4 if small else args.steps, axis)
    plt.tight_layout()
    path = args.out / "vmc.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=120)
    print(f"\nwrote {path}")


def compare(
    name: str, problem: Problem, methods: list[str], num_steps: int | None, axis: Any
) -> None:
    """Train by each method; print a table, and draw the errors by steps."""
    num_steps = num_steps or problem.steps
    objective = curvax.Objective(problem.log_psi, curvax.losses.local_energy())
    built = methods_of(problem, objective, num_steps)
    size = sum(x.size for x in jax.tree.leaves(problem.params))
    limit = 1e-4 if problem.measure is not None else 1e-2
    rows = []
    for method in methods:
        label = f"{name}, {method}"
        params, walkers, energies, seconds = train(
            problem, objective, built[method], num_steps, label
        )
        energy, error = energies[-1], 0.0
        # A smoke test ends here.
        if num_steps >= 20:
            energy, error = final_energy(problem, params, walkers, rounds=200)
        relative = np.abs(energies / problem.exact - 1)
        row = [method, f"{energy:.6f}"]
        row += [f"{error:.1e}" if error else "-", f"{energy - problem.exact:+.1e}"]
        row += [steps_to(relative, seconds, limit), f"{seconds[-1]:.1f}"]
        rows.append(row)
        axis.semilogy(1 + np.arange(num_steps), relative, color=COLORS[method], label=method, lw=1)
    axis.set(title=f"{name}, {size} parameters", xlabel="steps", ylabel="relative error of energy")
    axis.legend()
    header = ("method", "energy", "standard error", "above exact", f"to {limit:.0e}", "seconds")
    print_table(f"{name}: {problem.exact:.6f} exactly, {num_steps} steps", header, rows)


if __name__ == "__main__":
    main()
