"""Train a small transformer on the characters of a text with AdamW, curvature, and preconditioners.

    python examples/char_lm.py                                      # Python's standard library
    python examples/char_lm.py --optimizers adamw,kfac,soap,muon    # some of them
    python examples/char_lm.py --data tinyshakespeare.txt --steps 2000
    python examples/char_lm.py --smoke                              # does it run? 20 seconds

Two layers with Flax's own attention, under `nn.scan`, with parameters in float32; nothing in the
model knows of curvax. The layout, printed first, shows what is found: each kernel of a layer is a
stack of two. By default layers compute in bfloat16 on GPUs and TPUs, and in float32 on CPUs, which
have no fast bfloat16 products (`--dtype` decides). `_compare.py` says how the table is made.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from _compare import Method, Task, compare, grid, parse, parser

import curvax

LENGTH = 64  # of a sequence
CHARACTERS = 96  # printable ASCII, and one for the rest


class Layer(nn.Module):
    """Causal self-attention and a perceptron, each on a normalized residual stream."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, h, mask):
        norm = nn.LayerNorm(dtype=self.dtype)(h)
        h = h + nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype)(norm, mask=mask)
        wide = nn.gelu(
            nn.Dense(4 * h.shape[-1], dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(h))
        )
        return h + nn.Dense(h.shape[-1], dtype=self.dtype)(wide), None


class Transformer(nn.Module):
    """Logits `[batch, length, CHARACTERS]` of the next character."""

    width: int
    layers: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens):
        h = nn.Embed(CHARACTERS, self.width, dtype=self.dtype)(tokens)
        h = h + nn.Embed(LENGTH, self.width, dtype=self.dtype)(jnp.arange(tokens.shape[1]))
        scanned = nn.scan(
            Layer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=self.layers,
        )
        h, _ = scanned(self.heads, self.dtype)(h, nn.make_causal_mask(tokens))
        return nn.Dense(CHARACTERS, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(h)).astype(
            jnp.float32
        )


def kfac(task: Task, rate: float, damping: float) -> optax.GradientTransformation:
    """K-FAC whose damping comes down to its value in fifty steps."""
    return curvax.kfac(
        rate, task.objective, task.layout, falling(damping), curvature_every=2, inverse_every=10
    )


def ekfac(task: Task, rate: float, damping: float) -> optax.GradientTransformation:
    """EK-FAC, likewise."""
    return curvax.ekfac(
        rate, task.objective, task.layout, falling(damping), curvature_every=2, inverse_every=10
    )


def falling(damping: Any) -> optax.Schedule:
    return lambda step: damping * (1 + 99 * 0.9**step)


def on_matrices(
    one_liner: Callable[..., optax.GradientTransformation], *rates: float, **options: Any
) -> Method:
    """A rule on gradients, on the matrices that the model uses."""
    return Method(lambda task, rate: one_liner(rate, task.layout, **options), grid(rate=rates))


def of_model(
    one_liner: Callable[..., optax.GradientTransformation], *rates: float, **options: Any
) -> Method:
    """A method that measures inputs, or inputs and cotangents, of the model."""
    return Method(
        lambda task, rate: one_liner(rate, task.objective, task.layout, **options),
        grid(rate=rates),
    )


METHODS = {
    "adamw": Method(lambda task, rate: optax.adamw(rate), grid(rate=(1e-3, 3e-3, 1e-2))),
    "sophia_g": Method(
        lambda task, rate: curvax.sophia_g(rate, task.objective), grid(rate=(3e-4, 1e-3, 3e-3))
    ),
    "kfac": Method(kfac, grid(rate=(0.01, 0.03), damping=(1e-3, 3e-3, 1e-2))),
    "ekfac": Method(ekfac, grid(rate=(0.01, 0.03), damping=(1e-2,))),
    "shampoo": on_matrices(curvax.shampoo, 3e-3, 1e-2, 3e-2),
    "soap": on_matrices(curvax.soap, 3e-3, 1e-2, 3e-2),
    "kl_shampoo": on_matrices(curvax.kl_shampoo, 1e-2, 3e-2, 0.1),
    "kl_soap": on_matrices(curvax.kl_soap, 3e-3, 1e-2, 3e-2),
    "asgo": on_matrices(curvax.asgo, 3e-3, 1e-2, 3e-2),
    "muon": on_matrices(curvax.muon, 0.01, 0.02, 0.05, fallback_learning_rate=3e-3),
    "newton_muon": of_model(curvax.newton_muon, 0.01, 0.02, 0.05, fallback_learning_rate=3e-3),
    "fismo": on_matrices(curvax.fismo, 1e-2, 3e-2, 0.1),
    "mkor": of_model(curvax.mkor, 0.03, 0.1, 0.3),
    "psgd": on_matrices(lambda rate, layout: curvax.psgd(rate, layout=layout), 1e-3, 3e-3, 1e-2),
    "optax_muon": Method(lambda task, rate: optax.contrib.muon(rate), grid(rate=(0.01, 0.02))),
}
SMOKE = ("kfac",)


def read_text(path: Path | None, limit: int = 1_000_000) -> np.ndarray:
    """Read a text, by default sources of the standard library, as numbers below CHARACTERS."""
    if path is not None:
        text = path.read_text(errors="ignore")
    else:
        text = ""
        for source in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
            text += source.read_text(errors="ignore")
            if len(text) > limit:
                break
    codes = np.frombuffer(text[:limit].encode("ascii", "ignore"), np.uint8).astype(np.int32)
    return np.where((codes >= 32) & (codes < 127), codes - 32, CHARACTERS - 1)


def language_model(codes: np.ndarray, model: Transformer, seed: int) -> Task:
    """Predict every next character; the last tenth of the text is for validation."""
    count = (len(codes) - 1) // LENGTH
    cut = lambda start: jnp.asarray(codes[start : start + count * LENGTH].reshape(count, LENGTH))
    pairs, num_train = (cut(0), cut(1)), count * 9 // 10
    train, test = tuple(x[:num_train] for x in pairs), tuple(x[num_train:][:128] for x in pairs)
    objective = curvax.Objective(model.apply, curvax.losses.softmax_cross_entropy())
    params = jax.jit(model.init)(jax.random.key(seed), train[0][:2])
    return Task("character model", objective, params, train, test, "validation loss", objective)


def main() -> None:
    flags = parser(__doc__, METHODS, steps=500, batch=32, smoke=SMOKE)
    flags.add_argument(
        "--data", type=Path, help="a text file; default: sources of Python's standard library"
    )
    flags.add_argument("--width", type=int, default=128)
    flags.add_argument("--layers", type=int, default=2)
    flags.add_argument("--heads", type=int, default=4)
    fast = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    flags.add_argument(
        "--dtype", default=fast, choices=("float32", "bfloat16"), help="that layers compute in"
    )
    args = parse(flags, METHODS)
    width = 16 if args.smoke else args.width
    model = Transformer(width, args.layers, args.heads, jnp.dtype(args.dtype))
    task = language_model(
        read_text(args.data, 100_000 if args.smoke else 1_000_000), model, args.seed
    )
    print(task.layout)
    compare([task], args, "char_lm.png")


if __name__ == "__main__":
    main()
