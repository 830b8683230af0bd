"""What benchmarks share: models on real or random data, interleaved timing, tables and JSON."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import curvax


class Problem(NamedTuple):
    """A model with its objective, parameters and one batch."""

    name: str
    objective: curvax.Objective
    params: Any
    batch: Any


class Mlp(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (512, 512):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class Cnn(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (32, 64):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class Transformer(nn.Module):
    vocabulary: int = 96
    width: int = 128
    layers: int = 2

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(self.vocabulary, self.width)(tokens)
        h = h + self.param("position", nn.initializers.normal(0.02), (tokens.shape[1], self.width))
        causal = nn.make_causal_mask(tokens)
        for _ in range(self.layers):
            h = h + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(h), mask=causal)
            h = h + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        return nn.Dense(self.vocabulary)(nn.LayerNorm()(h))


def problems(smoke: bool) -> list[Problem]:
    """Three networks with softmax cross-entropy; with `smoke` the first, on a small batch."""
    key, size = jax.random.key(0), 128 if smoke else 1024

    def problem(name: str, module: nn.Module, inputs: jax.Array, labels: jax.Array) -> Problem:
        params = jax.jit(module.init)(key, inputs)["params"]
        model = lambda params, x: module.apply({"params": params}, x)
        return Problem(
            name,
            curvax.Objective(model, curvax.losses.softmax_cross_entropy()),
            params,
            (inputs, labels),
        )

    mlp = problem("mlp", Mlp(), jax.random.normal(key, (size, 64)), jnp.arange(size) % 10)
    if smoke:
        return [mlp]
    tokens = jax.random.randint(key, (32, 64), 0, 96)
    return [
        mlp,
        problem("cnn", Cnn(), jax.random.normal(key, (256, 8, 8, 1)), jnp.arange(256) % 10),
        problem("transformer", Transformer(), tokens, jnp.roll(tokens, -1, axis=1)),
    ]


def seconds(functions: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median time of each function over `rounds` rounds in which all take turns, after one warm-up
    each.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round in range(-1, rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function())
            if round >= 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def parser(description: str | None) -> argparse.ArgumentParser:
    """The flags that every benchmark has."""
    flags = argparse.ArgumentParser(description=description)
    flags.add_argument(
        "--rounds",
        type=int,
        default=30,
        help="times that each measurement is repeated, interleaved",
    )
    flags.add_argument("--json", type=Path, help="also write the rows to this file")
    flags.add_argument(
        "--smoke", action="store_true", help="one small problem, two rounds; figures mean nothing"
    )
    return flags


def report(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as an aligned table."""
    show = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    table = [list(rows[0]), *([show(x) for x in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print(f"\n{title}")
    for line in table:
        print(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        )


def write_json(path: Path | None, results: Mapping[str, Any]) -> None:
    """Write the results with the device and versions they were measured on, if a path was given."""
    if path is not None:
        device = jax.devices()[0]
        about = {"device": device.device_kind, "platform": device.platform, "jax": jax.__version__}
        path.write_text(json.dumps({"about": about, **results}, indent=2))
