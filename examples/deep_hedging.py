"""Hedge an option with an LSTM: K-FAC, with its recurrent kernels over time, against Adam.

    python examples/deep_hedging.py            # four minutes on two cores
    python examples/deep_hedging.py --smoke    # does it run? some seconds

A call at the money is sold, and hedged every day for thirty days at a proportional cost. Prices
follow Heston's model: a volatility that wanders, and falls as prices rise. The network sees price,
volatility and the time that is left, and says how much to hold; what is minimized is the expected
exponential disutility of what is left at the end, a single number for each path. So outputs are
profits, and the Gauss-Newton matrix has the second derivative of the disutility in its middle.

Kernels of an LSTM act at every time. K-FAC takes times as independent, or (Martens, Ba and Johnson,
2018) as a chain: `sharing="time_symmetric"` and `"time_infinite"` in the layout. The configuration
is ours: it replicates no paper. At the end a check: without costs, at a constant volatility, what
the network holds is near the delta of Black and Scholes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from _common import print_table, with_error
from jax.scipy.stats import norm
from tqdm import tqdm

import curvax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Params = dict[str, jax.Array]

DAYS, DAY = 30, 1 / 365
WIDTH = 16
# Risk aversion, per unit of the initial price: of 1 % of it, exp(0.5) is the change in disutility.
AVERSION = 50.0


class Market(NamedTuple):
    """Heston's model, and what trading costs.

    Attributes:
      variance: at the start, and in the long run.
      reversion: kappa, how fast the variance returns, a year.
      volatility: xi, of the variance; 0 makes it constant.
      correlation: rho, of price and variance.
      cost: of a trade, as a part of its value.
    """

    variance: float = 0.04
    reversion: float = 2.0
    volatility: float = 0.3
    correlation: float = -0.7
    cost: float = 1e-3


def simulate(market: Market, key: jax.Array, num_paths: int) -> tuple[jax.Array, jax.Array]:
    """Return prices `[b, t + 1]`, which begin at 1, and variances alike; Euler's scheme.

    The truncation is full: where a step makes the variance negative, both equations see zero.
    """
    noise = jax.random.normal(key, (DAYS, 2, num_paths)) * DAY**0.5

    def step(carry: Any, noise: jax.Array) -> Any:
        log_price, variance = carry
        positive = jnp.maximum(variance, 0)
        root = jnp.sqrt(positive)
        of_price, other = noise
        rho = market.correlation
        of_variance = rho * of_price + jnp.sqrt(1 - rho**2) * other
        log_price += root * of_price - positive * DAY / 2
        pull = market.reversion * (market.variance - positive) * DAY
        variance += pull + market.volatility * root * of_variance
        return (log_price, variance), (log_price, jnp.maximum(variance, 0))

    start = jnp.zeros(num_paths), jnp.full(num_paths, market.variance)
    _, (log_prices, variances) = jax.lax.scan(step, start, noise)
    all_log_prices = jnp.vstack([start[0][None], log_prices]).T
    return jnp.exp(all_log_prices), jnp.vstack([start[1][None], variances]).T


def init(key: jax.Array) -> Params:
    """Initial weights of variance 1 / inputs; the forget gate is open."""
    keys = jax.random.split(key, 3)
    draw = lambda key, inputs, outputs: jax.random.normal(key, (inputs, outputs)) / inputs**0.5
    gates = jnp.zeros(4 * WIDTH).at[WIDTH : 2 * WIDTH].set(1.0)
    return {
        "inputs": draw(keys[0], 3, 4 * WIDTH),
        "hidden": draw(keys[1], WIDTH, 4 * WIDTH),
        "gates": gates,
        "head": draw(keys[2], WIDTH, 1),
        "bias": jnp.zeros(1),
    }


def holdings(params: Params, prices: jax.Array, variances: jax.Array) -> jax.Array:
    """Return how much is held from each day to the next, `[b, t]`, by an LSTM."""
    left = jnp.broadcast_to(1 - jnp.arange(DAYS) / DAYS, prices[:, :-1].shape)
    volatility = jnp.sqrt(variances[:, :-1]) / 0.2 - 1
    features = jnp.stack([20 * jnp.log(prices[:, :-1]), 3 * volatility, left], axis=-1)

    def step(carry: Any, x: jax.Array) -> Any:
        h, cell = carry
        gates = x @ params["inputs"] + h @ params["hidden"] + params["gates"]
        i, f, new, o = jnp.split(gates, 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(new)
        h = jax.nn.sigmoid(o) * jnp.tanh(cell)
        return (h, cell), jax.nn.sigmoid(h @ params["head"] + params["bias"])[:, 0]

    zeros = jnp.zeros((len(prices), WIDTH))
    _, held = jax.lax.scan(step, (zeros, zeros), features.swapaxes(0, 1))
    return held.T


def costs_of(market: Market, held: jax.Array, prices: jax.Array) -> jax.Array:
    """Return what the trades of each path cost, with those that begin and end the hedge."""
    zero = jnp.zeros((len(held), 1))
    trades = jnp.diff(jnp.concatenate([zero, held, zero], axis=1), axis=1)
    return market.cost * jnp.sum(jnp.abs(trades) * prices, axis=1)


def profits(market: Market) -> Callable[[Params, Any], jax.Array]:
    """Return the model: what is left of each path, `[b]`, without the premium."""

    def model(params: Params, paths: Any) -> jax.Array:
        prices, variances = paths
        held = holdings(params, prices, variances)
        gains = jnp.sum(held * jnp.diff(prices, axis=1), axis=1)
        payoff = jnp.maximum(prices[:, -1] - 1, 0)
        return gains - payoff - costs_of(market, held, prices)

    return model


def disutility(profit: jax.Array, targets: None) -> jax.Array:
    """Exponential, in the unit of a price; its second derivative is positive."""
    return jnp.mean(jnp.exp(-AVERSION * profit)) / AVERSION


def entropic_risk(profit: jax.Array) -> jax.Array:
    """The certain loss that is as bad: the premium at which the seller is indifferent."""
    return jnp.log(jnp.mean(jnp.exp(-AVERSION * profit))) / AVERSION


class Trained(NamedTuple):
    """Trainings with several seeds; each array begins with an axis of seeds.

    Attributes:
      params: after the last step.
      risks: entropic risk on paths that are not trained on, at every tenth step.
      seconds: of one step of one seed, after compilation.
    """

    params: Params
    risks: np.ndarray
    seconds: float


def trainer(
    market: Market, build: Callable[[Any], Any], num_steps: int, num_paths: int
) -> Callable[[Any, Any], Trained]:
    """Return `(rates, seeds) -> Trained`, one training for each pair, on fresh paths in every step.

    It is compiled once for each number of pairs.
    """
    objective = objective_of(market)
    held_out = simulate(market, jax.random.key(-1), 4096)

    def run(pair: tuple[jax.Array, jax.Array]) -> tuple[Params, jax.Array]:
        rate, seed = pair
        tx = optax.with_extra_args_support(
            build(optax.cosine_decay_schedule(rate, num_steps, alpha=0.05))
        )
        key_params, key_paths = jax.random.split(jax.random.key(seed))
        params = init(key_params)

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            batch = simulate(market, key, num_paths), None
            gradient = jax.grad(objective)(params, batch)
            updates, state = tx.update(gradient, state, params, batch=batch)
            return (optax.apply_updates(params, updates), state), None

        def ten_steps(carry: Any, keys: jax.Array) -> tuple[Any, jax.Array]:
            carry, _ = jax.lax.scan(step, carry, keys)
            return carry, entropic_risk(objective.model(carry[0], held_out))

        keys = jax.random.split(key_paths, (num_steps // 10, 10))
        (params, _), risks = jax.lax.scan(ten_steps, (params, tx.init(params)), keys)
        return params, risks

    # One after another: a step then takes the time that it takes alone.
    run_all = jax.jit(lambda rates, seeds: jax.lax.map(run, (rates, seeds)))

    def train(rates: Any, seeds: Any) -> Trained:
        rates, seeds = jnp.asarray(rates, jnp.float32), jnp.asarray(seeds)
        compiled = run_all.lower(rates, seeds).compile()
        start = time.perf_counter()
        params, risks = jax.block_until_ready(compiled(rates, seeds))
        seconds = (time.perf_counter() - start) / (num_steps * len(seeds))
        return Trained(params, np.asarray(risks), seconds)

    return train


def objective_of(market: Market) -> curvax.Objective:
    return curvax.Objective(profits(market), curvax.losses.from_function(disutility))


def methods_of(market: Market) -> dict[str, tuple[Callable[[Any], Any], tuple[float, ...]]]:
    """Optimizers by rate, each with the rates that are tried."""
    objective = objective_of(market)
    paths = jax.eval_shape(lambda: simulate(market, jax.random.key(0), 4))
    shapes = jax.eval_shape(init, jax.random.key(0))
    layout = curvax.kron_layout(objective, shapes, (paths, None))
    print(layout)

    def kfac(sharing: str) -> Callable[[Any], Any]:
        over_time = layout
        for path in ("['inputs']", "['hidden']"):
            over_time = over_time.edit(path, sharing=sharing)
        return lambda rate: curvax.kfac(
            rate, objective, over_time, damping=1e-3, inverse_every=5, fisher="exact"
        )

    rates = (0.01, 0.03, 0.1)
    return {
        "Adam": (optax.adam, (1e-2, 3e-2, 1e-1)),
        "K-FAC, times independent": (kfac("expand"), rates),
        "K-FAC, time_symmetric": (kfac("time_symmetric"), rates),
        "K-FAC, time_infinite": (kfac("time_infinite"), rates),
    }


def compare(args: Any) -> dict[str, Trained]:
    """Train with every method at the best of its rates, and print what came out."""
    market = Market()
    chosen: dict[str, tuple[float, Trained]] = {}
    methods = methods_of(market)
    if args.smoke:
        methods = {name: methods[name] for name in ("Adam", "K-FAC, time_infinite")}
    for name, (build, rates) in tqdm(methods.items(), desc="methods"):
        train = trainer(market, build, args.steps, args.paths)
        best = rates[0]
        if not args.smoke:
            # The rate is chosen by another seed than those that count. A training that failed has
            # no number, which is no minimum.
            risks = train(rates, [100] * len(rates)).risks[:, -1]
            best = rates[int(np.argmin(np.nan_to_num(risks, nan=np.inf)))]
        chosen[name] = best, train([best] * args.seeds, np.arange(args.seeds))

    prices, variances = simulate(market, jax.random.key(-2), 8192)
    goal = chosen["Adam"][1].risks[:, -1].mean()
    rows = []
    for name, (rate, trained) in chosen.items():
        profit = jax.vmap(lambda p: profits(market)(p, (prices, variances)))(trained.params)
        held = jax.vmap(lambda p: holdings(p, prices, variances))(trained.params)
        costs = jax.vmap(lambda x: costs_of(market, x, prices).mean())(held)
        risk = jax.vmap(entropic_risk)(profit)
        reached = np.nonzero(trained.risks.mean(axis=0) <= goal)[0]
        steps = f"{10 * (reached[0] + 1)}" if len(reached) else "-"
        rows.append(
            [
                name,
                f"{rate:g}",
                with_error(100 * risk, 4),
                with_error(100 * profit.std(axis=1), 4),
                with_error(100 * costs, 4),
                steps,
                f"{1e3 * trained.seconds:.1f}",
            ]
        )
    header = ("method", "rate", "risk", "deviation", "costs", "steps to Adam's risk", "ms a step")
    print_table(f"{args.steps} steps, {args.seeds} seeds; % of the price", header, rows)
    return {name: trained for name, (_, trained) in chosen.items()}


def black_scholes(prices: jax.Array, variance: float) -> jax.Array:
    """The delta of a call at strike 1 on each day."""
    left = DAY * (DAYS - jnp.arange(DAYS))
    deviation = jnp.sqrt(variance * left)
    return norm.cdf(jnp.log(prices[:, :-1]) / deviation + deviation / 2)


def check_delta(args: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Train without costs at a constant volatility, and compare with the known delta."""
    market = Market(volatility=0.0, cost=0.0)
    objective = objective_of(market)
    paths = simulate(market, jax.random.key(0), 4)
    layout = curvax.kron_layout(objective, init(jax.random.key(0)), (paths, None))
    build = lambda rate: curvax.kfac(
        rate, objective, layout, damping=1e-3, inverse_every=5, fisher="exact"
    )
    trained = trainer(market, build, args.steps, args.paths)([0.1], [0])
    prices, variances = simulate(market, jax.random.key(-2), 4096)
    held = holdings(jax.tree.map(lambda x: x[0], trained.params), prices, variances)
    delta = black_scholes(prices, market.variance)
    error = jnp.sqrt(jnp.mean((held - delta) ** 2))
    print(f"\nwithout costs, against the delta of Black and Scholes: RMSE {error:.3f}")
    return prices, held, delta


def picture(trained: dict[str, Trained], check: Any, path: Path) -> None:
    """Draw risks over steps, and holdings over prices half way."""
    prices, held, delta = check
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, result in trained.items():
        mean = result.risks.mean(axis=0)
        left.plot(10 * np.arange(1, len(mean) + 1), 100 * mean, label=name)
    left.set(xlabel="steps", ylabel="entropic risk, % of the price", ylim=(None, 3.5))
    left.legend()
    day = DAYS // 2
    right.plot(prices[:, day], held[:, day], ".", markersize=2, label="network")
    right.plot(prices[:, day], delta[:, day], ".", markersize=2, label="Black and Scholes")
    right.set(xlabel=f"price on day {day}", ylabel="held")
    right.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    plt.savefig(path, dpi=150)
    print(f"picture: {path}")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("--steps", type=int, default=300)
    flags.add_argument("--paths", type=int, default=512, help="in each step")
    flags.add_argument("--seeds", type=int, default=3)
    flags.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    flags.add_argument("--smoke", action="store_true", help="a few steps, to see that it runs")
    args = flags.parse_args()
    if args.smoke:
        args.steps, args.paths, args.seeds = 20, 32, 1
    trained = compare(args)
    picture(trained, check_delta(args), args.out / "deep_hedging.png")


if __name__ == "__main__":
    main()
