"""Architectures of public models, tiny, in our own words: what their programs do with parameters.

Each is a `Case`; the docstring names the model. What is not expected in a block has its reason.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo._case import Case, ids, linen, normal, shaken

NORM = {"scale": "mul", "bias": "not straight on a linear map's output"}


def _norm(x: Any) -> Any:
    """Layer norm without parameters."""
    return (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)


def _attend(q: Any, k: Any, v: Any, bias: Any = 0) -> Any:
    logits = jnp.einsum("...thd,...shd->...hts", q, k) / q.shape[-1] ** 0.5
    return jnp.einsum("...hts,...shd->...thd", jax.nn.softmax(logits + bias), v)


def _norms(*paths: str) -> dict[str, str]:
    """Reasons of scale and bias of norms."""
    return {f"{path}['{name}']": reason for path in paths for name, reason in NORM.items()}


# -- constants on kernels --------------------------------------------------------------------------


def maf() -> Case:
    """Masked autoregressive flow (flowjax): layers in a scan, with masks that are stacked."""
    degrees = np.arange(4) % 3
    first = degrees[None] >= np.arange(3)[:, None]
    second = np.arange(3)[None] > degrees[:, None]
    masks = [np.broadcast_to(mask, (2, *mask.shape)) for mask in (first, second)]

    def layer(carry: Any, weights: Any) -> Any:
        z, log_det = carry
        (w, b, v, c), (first, second) = weights
        h = jnp.tanh(z @ jnp.where(first, w, 0) + b)
        log_scale, shift = jnp.split(h @ jnp.where(jnp.tile(second, (1, 2)), v, 0) + c, 2, axis=-1)
        return (
            z[:, ::-1] * jnp.exp(jnp.tanh(log_scale)) + shift,
            log_det + log_scale.sum(-1),
        ), None

    def model(p: Any, x: Any) -> Any:
        weights = [p[name] for name in "wbvc"], [jnp.array(mask) for mask in masks]
        (z, log_det), _ = lax.scan(layer, (x, jnp.zeros(len(x), x.dtype)), weights)
        return jnp.concatenate([z, log_det[:, None]], axis=-1)

    params = {
        "w": normal(1, 2, 3, 4),
        "b": normal(2, 2, 4),
        "v": normal(3, 2, 4, 6),
        "c": normal(4, 2, 6),
    }
    return Case(model, params, normal(0, 4, 3), stacks={f"['{name}']": (2,) for name in params})


def arnn() -> Case:
    """Autoregressive network of spins (netket): a product with a mask, features for each site."""
    sites, features = 3, 2
    strict, below = np.triu(np.ones((sites, sites)), 1), np.triu(np.ones((sites, sites)))

    def model(p: Any, x: Any) -> Any:
        h = x @ (p["w"] * np.repeat(strict, features, axis=1))
        h = jax.nn.selu(h.reshape(-1, sites, features) + p["b"])
        mask = np.repeat(np.repeat(below, features, axis=0), features, axis=1)
        return (h.reshape(len(x), -1) @ (p["v"] * mask)).reshape(-1, sites, features) + p["c"]

    n = sites * features
    params = {
        "w": normal(1, sites, n),
        "b": normal(2, sites, features),
        "v": normal(3, n, n),
        "c": normal(4, sites, features),
    }
    return Case(model, params, normal(0, 4, sites))


ROTATIONS = (np.arange(4)[None] - np.arange(4)[:, None]) % 4


def gcnn() -> Case:
    """Group-equivariant network (netket): from sites to the group, then from the group to it."""

    def model(p: Any, x: Any) -> Any:
        h = jnp.einsum("bh,hog->bog", x, jnp.take(p["w"], ROTATIONS, axis=0).swapaxes(1, 2))
        h = jax.nn.selu(h + p["b"][:, None])
        kernel = jnp.take(p["v"], jnp.asarray(ROTATIONS), axis=2)  # [in, out, h, g]
        return lax.dot_general(h, kernel, (((1, 2), (0, 2)), ((), ()))) + p["c"][:, None]

    params = {"w": normal(1, 4, 2), "b": normal(2, 2), "v": normal(3, 2, 3, 4), "c": normal(4, 3)}
    return Case(model, params, normal(0, 4, 4))


def quantized() -> Case:
    """Quantization-aware training (AQT, qwix), its derivatives straight through."""

    def quantize(x: Any, axis: Any = None) -> Any:
        scale = jnp.max(abs(x), axis=axis, keepdims=True) / 7 + 1e-6  # a row may be zero
        return x + lax.stop_gradient(jnp.clip(jnp.round(x / scale), -7, 7) * scale - x)

    def model(p: Any, x: Any) -> Any:
        h = jax.nn.relu(x @ quantize(p["w"], 0) + p["b"])
        return quantize(h, -1) @ quantize(p["v"]) + p["c"]

    params = {"w": normal(1, 3, 4), "b": normal(2, 4), "v": normal(3, 4, 2), "c": normal(4, 2)}
    return Case(model, params, normal(0, 4, 3))


def e3nn() -> Case:
    """Equivariant network (e3nn): weights of paths over the root of their number."""

    def model(p: Any, x: Any) -> Any:
        scalars, vectors = x[:, :2], x[:, 2:].reshape(-1, 2, 3)
        gates = jax.nn.sigmoid(scalars @ (p["gates"] / jnp.sqrt(2.0)))
        mixed = jnp.einsum("bud,uv->bvd", vectors, p["vectors"]) / 2**0.5
        length = jnp.sum((mixed * gates[..., None]) ** 2, axis=-1)
        h = jnp.concatenate([scalars @ (2**-0.5 * p["scalars"]), length], axis=-1)
        return jnp.tanh(h) @ (p["out"] / np.sqrt(5))

    params = {
        "gates": normal(1, 2, 2),
        "vectors": normal(2, 2, 2),
        "scalars": normal(3, 2, 3),
        "out": normal(4, 5, 2),
    }
    return Case(model, params, normal(0, 4, 8))


def stylegan() -> Case:
    """Mapping network with equalized rates: kernels and biases times constants."""

    def model(p: Any, x: Any) -> Any:
        for w, b in p:
            x = jax.nn.leaky_relu(x @ (w * (1 / len(w) ** 0.5)) + b * 0.01, 0.2)
        return x

    params = [(normal(1, 3, 4), normal(2, 4)), (normal(3, 4, 2), normal(4, 2))]
    return Case(model, params, normal(0, 4, 3))


# -- experts, adapters, codes ----------------------------------------------------------------------


def ragged_moe() -> Case:
    """Sparse mixture of experts (MaxText): tokens sorted by expert, two ragged products, back."""

    def model(p: Any, x: Any) -> Any:
        tokens = x.reshape(-1, x.shape[-1])
        gates = jax.nn.softmax(tokens @ p["router"])
        expert = jnp.argmax(gates, axis=-1)
        order = jnp.argsort(expert)
        sizes = jnp.bincount(expert, length=3)
        h = jax.nn.silu(lax.ragged_dot(tokens[order], p["up"], sizes))
        y = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
        return (y * jnp.take_along_axis(gates, expert[:, None], axis=1)).reshape(x.shape)

    params = {"router": normal(1, 3, 3), "up": normal(2, 3, 3, 4), "down": normal(3, 3, 4, 3)}
    stacks = {"['up']": (3,), "['down']": (3,)}
    return Case(model, params, normal(0, 2, 3, 3), stacks=stacks, by_example=False)


def lora() -> Case:
    """Low-rank adapters (nnx.LoRALinear): beside kernels that are not trained."""
    frozen = [np.asarray(normal(5, 3, 4)), np.asarray(normal(6, 4, 2))]

    def model(p: Any, x: Any) -> Any:
        for number, w in enumerate(frozen):
            a, b = p[number]["a"], p[number]["b"]
            x = jnp.tanh(x @ w + (x @ a) @ b * 0.5)
        return x

    params = [
        {"a": normal(1, 3, 2), "b": normal(2, 2, 4)},
        {"a": normal(3, 4, 2), "b": normal(4, 2, 2)},
    ]
    return Case(model, params, normal(0, 4, 3))


def vqvae() -> Case:
    """Vector-quantized autoencoder (Haiku): the nearest code, its derivative straight through."""

    def model(p: Any, x: Any) -> Any:
        z = x @ p["encoder"] + p["b"]
        distances = jnp.sum(p["codes"] ** 2, 0) - 2 * z @ p["codes"]
        code = p["codes"].T[jnp.argmin(distances, axis=1)]
        quantized = z + lax.stop_gradient(code - z)
        commitment = jnp.sum((code - lax.stop_gradient(z)) ** 2, -1, keepdims=True)
        return jnp.concatenate([jnp.tanh(quantized) @ p["decoder"] + p["c"], commitment], axis=-1)

    params = {
        "encoder": normal(1, 3, 2),
        "b": normal(2, 2),
        "codes": normal(3, 2, 5),
        "decoder": normal(4, 2, 3),
        "c": normal(5, 3),
    }
    return Case(model, params, normal(0, 4, 3), {"['codes']": "integer_pow"})


# -- transformers ----------------------------------------------------------------------------------


def bert() -> Case:
    """Encoder as Equinox's example has it: lookups under vmap, positions counted in the model."""
    import equinox as eqx

    class Bert(eqx.Module):
        tokens: eqx.nn.Embedding
        segments: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __call__(self, ids: Any) -> Any:
            h = jax.vmap(self.tokens)(ids) + jax.vmap(self.segments)(jnp.zeros_like(ids))
            h = h + jax.vmap(self.positions)(jnp.arange(len(ids)))
            h = jax.vmap(self.norm)(h)
            h = h + self.attention(h, h, h)
            return h + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(h)))

    keys = jax.random.split(jax.random.key(1), 6)
    net = Bert(
        tokens=eqx.nn.Embedding(5, 4, key=keys[0]),
        segments=eqx.nn.Embedding(2, 4, key=keys[1]),
        positions=eqx.nn.Embedding(6, 4, key=keys[2]),
        norm=eqx.nn.LayerNorm(4),
        attention=eqx.nn.MultiheadAttention(2, 4, key=keys[3]),
        up=eqx.nn.Linear(4, 6, key=keys[4]),
        down=eqx.nn.Linear(6, 4, key=keys[5]),
    )
    params, static = eqx.partition(net, eqx.is_inexact_array)
    model = lambda params, ids: jax.vmap(eqx.combine(params, static))(ids)
    return Case(
        model, shaken(params), ids(0, 5, 3, 3), {".norm.weight": "mul", ".norm.bias": "add"}
    )


def vit() -> Case:
    """Vision transformer (google-research): patches, a class token, added positions."""
    import flax.linen as nn

    class Vit(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.Conv(4, (2, 2), strides=(2, 2), name="patches")(x)
            x = x.reshape(len(x), -1, 4)
            token = self.param("class", nn.initializers.zeros, (1, 1, 4), x.dtype)
            x = jnp.concatenate([jnp.tile(token, (len(x), 1, 1)), x], axis=1)
            x = x + self.param("positions", nn.initializers.normal(), (1, 5, 4), x.dtype)
            h = nn.LayerNorm(name="norm")(x)
            x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(h)
            x = x + nn.Dense(4, name="down")(nn.gelu(nn.Dense(6, name="up")(x)))
            return nn.Dense(2, name="head")(x[:, 0])

    return linen(Vit(), normal(0, 3, 4, 4, 1), {"['class']": "tile", **_norms("['norm']")})


def gpt2() -> Case:
    """Decoder (Hugging Face): tied logits, one kernel for queries, keys and values."""

    def model(p: Any, tokens: Any) -> Any:
        h = p["tokens"][tokens] + p["positions"][jnp.arange(tokens.shape[1])]
        qkv = jnp.split(_norm(h) @ p["qkv"] + p["b"], 3, axis=-1)
        q, k, v = (x.reshape(*x.shape[:2], 2, 2) for x in qkv)
        bias = jnp.where(jnp.tril(jnp.ones((3, 3), bool)), 0, -1e9)
        h = h + _attend(q, k, v, bias).reshape(h.shape) @ p["out"] + p["c"]
        h = h + jax.nn.gelu(_norm(h) @ p["up"] + p["d"]) @ p["down"]
        return (_norm(h) * p["scale"]) @ p["tokens"].T

    shapes = {
        "tokens": (5, 4),
        "positions": (6, 4),
        "qkv": (4, 12),
        "b": (12,),
        "out": (4, 4),
        "c": (4,),
        "up": (4, 6),
        "d": (6,),
        "down": (6, 4),
        "scale": (4,),
    }
    params = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    return Case(model, params, ids(0, 5, 3, 3), {"['scale']": "mul"})


def llama() -> Case:
    """Decoder (Llama, Gemma, Qwen): rotary positions, shared keys, gated layers, in a scan."""

    def rotate(x: Any) -> Any:
        angles = jnp.arange(x.shape[1])[:, None, None] * 0.3
        first, second = jnp.split(x, 2, axis=-1)
        turned = first * jnp.cos(angles) - second * jnp.sin(angles)
        return jnp.concatenate([turned, first * jnp.sin(angles) + second * jnp.cos(angles)], -1)

    def layer(h: Any, p: Any) -> Any:
        x = _norm(h) * (1 + p["scale"])
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in ("q", "k", "v"))
        k, v = (jnp.repeat(each, 2, axis=2) for each in (rotate(k), v))
        bias = jnp.where(jnp.tril(jnp.ones((3, 3), bool)), 0, -1e9)
        h = h + jnp.einsum("bthe,hed->btd", _attend(rotate(q), k, v, bias), p["out"])
        return h + (jax.nn.silu(_norm(h) @ p["gate"]) * (_norm(h) @ p["up"])) @ p["down"], None

    def model(p: Any, tokens: Any) -> Any:
        h = p["tokens"][tokens] * 2.0
        h, _ = lax.scan(layer, h, p["layers"])
        return _norm(h) @ p["head"]

    shapes = {
        "scale": (4,),
        "q": (4, 2, 2),
        "k": (4, 1, 2),
        "v": (4, 1, 2),
        "out": (2, 2, 4),
        "gate": (4, 5),
        "up": (4, 5),
        "down": (5, 4),
    }
    layers = {
        name: normal(number, 2, *shape) for number, (name, shape) in enumerate(shapes.items())
    }
    params = {"tokens": normal(20, 5, 4), "layers": layers, "head": normal(21, 4, 5)}
    stacks = {f"['layers']['{name}']": (2,) for name in shapes}
    return Case(model, params, ids(0, 5, 3, 3), {"['layers']['scale']": "mul"}, stacks)


def t5() -> Case:
    """Attention with a bias for each distance (T5): looked up by numbers that are constants."""
    distance = np.minimum(abs(np.arange(3)[:, None] - np.arange(3)), 2)

    def model(p: Any, x: Any) -> Any:
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[name]) for name in "qkv")
        bias = p["distances"][distance].transpose(2, 0, 1)
        return jnp.einsum("bthe,hed->btd", _attend(q, k, v, bias), p["out"])

    kernels = {name: normal(number, 3, 2, 2) for number, name in enumerate("qkv")}
    params = {**kernels, "distances": normal(5, 3, 2), "out": normal(6, 2, 2, 3)}
    return Case(model, params, normal(0, 3, 3, 3))


def mixer() -> Case:
    """MLP-Mixer (google-research): dense layers over patches, and over channels."""
    import flax.linen as nn

    class Mixer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.LayerNorm(name="norm")(x).swapaxes(1, 2)
            h = nn.Dense(3, name="tokens 2")(nn.gelu(nn.Dense(4, name="tokens 1")(h)))
            x = x + h.swapaxes(1, 2)
            x = x + nn.Dense(2, name="channels 2")(nn.gelu(nn.Dense(3, name="channels 1")(x)))
            return nn.Dense(2, name="head")(x.mean(axis=1))

    return linen(Mixer(), normal(0, 3, 3, 2), _norms("['norm']"))


# -- convolutions ----------------------------------------------------------------------------------


def resnet() -> Case:
    """Residual network (Flax), its batch norm with running statistics."""
    import flax.linen as nn

    class ResNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(2, (3, 3), use_bias=False, name="stem")(x))
            scale = self.param("scale", nn.initializers.ones, (3,), x.dtype)
            bias = self.param("bias", nn.initializers.zeros, (3,), x.dtype)
            h = nn.Conv(3, (2, 2), (2, 2), use_bias=False, name="conv")(x)
            h = (h - 0.1) * 0.9 * scale + bias
            x = nn.relu(h + nn.Conv(3, (1, 1), (2, 2), use_bias=False, name="shortcut")(x))
            return nn.Dense(2, name="head")(x.mean(axis=(1, 2)))

    return linen(ResNet(), normal(0, 3, 4, 4, 1), {"['scale']": "mul", "['bias']": "add"})


def convnext() -> Case:
    """ConvNeXt (bonsai): depthwise convolution, inverted bottleneck, scaled residual."""
    import flax.linen as nn

    class ConvNext(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            h = nn.Conv(2, (3, 3), feature_group_count=2, name="depthwise")(x)
            h = nn.Dense(2, name="down")(
                nn.gelu(nn.Dense(4, name="up")(nn.LayerNorm(name="norm")(h)))
            )
            gamma = self.param("gamma", nn.initializers.ones, (2,), x.dtype)
            return nn.Dense(2, name="head")((x + gamma * h).mean(axis=(1, 2)))

    stacks = dict.fromkeys(["['depthwise']['kernel']", "['depthwise']['bias']"], (2,))
    return linen(
        ConvNext(), normal(0, 3, 4, 4, 2), {"['gamma']": "mul", **_norms("['norm']")}, stacks
    )


def unet() -> Case:
    """U-Net (fastMRI, diffusion): down, up by a transposed convolution, joined with what was."""
    import flax.linen as nn

    class UNet(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            before = nn.silu(nn.Conv(2, (3, 3), name="first")(x))
            h = nn.silu(nn.Conv(3, (3, 3), name="middle")(nn.avg_pool(before, (2, 2), (2, 2))))
            h = nn.ConvTranspose(2, (2, 2), (2, 2), name="up")(h)
            return nn.Conv(1, (1, 1), name="last")(jnp.concatenate([before, h], axis=-1))

    return linen(UNet(), normal(0, 3, 4, 4, 1))


def conformer() -> Case:
    """Conformer block (AlgoPerf): gated linear units around a depthwise convolution in time."""
    import flax.linen as nn

    class Conformer(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = x + 0.5 * nn.Dense(2, name="down")(nn.silu(nn.Dense(4, name="up")(x)))
            value, gate = jnp.split(nn.Dense(4, name="gated")(x), 2, axis=-1)
            h = nn.Conv(2, (3,), feature_group_count=2, name="depthwise")(value * nn.sigmoid(gate))
            return x + nn.Dense(2, name="out")(nn.silu(h))

    stacks = dict.fromkeys(["['depthwise']['kernel']", "['depthwise']['bias']"], (2,))
    return linen(Conformer(), normal(0, 3, 4, 2), stacks=stacks)


# -- recurrence ------------------------------------------------------------------------------------


def lstm() -> Case:
    """Character model (Haiku): a lookup, a cell with one kernel for all gates, logits."""
    import haiku as hk

    def forward(tokens: Any) -> Any:
        core = hk.LSTM(3)
        x = hk.Embed(5, 2)(tokens)
        zero = jnp.zeros((len(tokens), 3), x.dtype)
        outputs, _ = hk.dynamic_unroll(core, x.swapaxes(0, 1), hk.LSTMState(zero, zero))
        return hk.Linear(5)(outputs.swapaxes(0, 1))

    net = hk.without_apply_rng(hk.transform(forward))
    tokens = ids(0, 5, 3, 3)
    return Case(net.apply, shaken(net.init(jax.random.key(1), tokens)), tokens)


def seq2seq() -> Case:
    """Encoder and decoder (Flax): the state of one cell starts the other."""

    def cell(p: Any, state: Any, x: Any) -> Any:
        h, c = state
        i, f, g, o = jnp.split(x @ p["x"] + h @ p["h"] + p["b"], 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    def model(p: Any, inputs: Any) -> Any:
        zero = jnp.zeros((len(inputs["source"]), 2), p["out"].dtype)
        step = lambda name: lambda state, x: cell(p[name], state, x)
        one_hot = lambda x: jax.nn.one_hot(x.swapaxes(0, 1), 4, dtype=zero.dtype)
        state, _ = lax.scan(step("encoder"), (zero, zero), one_hot(inputs["source"]))
        _, hs = lax.scan(step("decoder"), state, one_hot(inputs["target"]))
        return hs.swapaxes(0, 1) @ p["out"]

    cells = [
        {"x": normal(n, 4, 8), "h": normal(n + 1, 2, 8), "b": normal(n + 2, 8)} for n in (1, 4)
    ]
    params = {"encoder": cells[0], "decoder": cells[1], "out": normal(7, 2, 4)}
    return Case(model, params, {"source": ids(0, 4, 3, 3), "target": ids(1, 4, 3, 2)})


def mamba() -> Case:
    """Selective state space (Mamba): rates and projections of the input, a scan over time."""

    def model(p: Any, x: Any) -> Any:
        x, gate = jnp.split(x @ p["in"], 2, axis=-1)
        rate = jax.nn.softplus(x @ p["rate"] + p["b"])
        b, c = jnp.split(x @ p["bc"], 2, axis=-1)
        decay = jnp.exp(-rate[..., None] * jnp.exp(p["a"]))
        drive = (rate * x)[..., None] * b[..., None, :]

        def step(h: Any, inputs: Any) -> Any:
            decay, drive, c = inputs
            h = decay * h + drive
            return h, jnp.einsum("bds,bs->bd", h, c)

        start = jnp.zeros((len(x), *p["a"].shape), x.dtype)
        inputs = jax.tree.map(lambda each: each.swapaxes(0, 1), (decay, drive, c))
        _, y = lax.scan(step, start, inputs)
        return ((y.swapaxes(0, 1) + p["d"] * x) * jax.nn.silu(gate)) @ p["out"]

    shapes = {
        "in": (3, 4),
        "rate": (2, 2),
        "b": (2,),
        "bc": (2, 4),
        "a": (2, 2),
        "d": (2,),
        "out": (2, 3),
    }
    params = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    return Case(model, params, normal(9, 3, 3, 3), {"['a']": "exp", "['d']": "mul"})


def s5() -> Case:
    """Diagonal state space (S5): complex maps, which are named as such, then a real one."""

    def model(p: Any, x: Any) -> Any:
        b, c = (p[name][..., 0] + 1j * p[name][..., 1] for name in "bc")
        decay = jnp.exp(-jnp.exp(p["rate"]) + 1j * p["angle"])
        drive = x.astype(complex) @ b
        pair = lambda left, right: (left[0] * right[0], left[1] * right[0] + right[1])
        decays = jnp.broadcast_to(decay, drive.shape)
        _, states = lax.associative_scan(pair, (decays, drive), axis=1)
        return jax.nn.gelu(jnp.real(states @ c)) @ p["out"]

    shapes = {"b": (3, 2, 2), "c": (2, 3, 2), "rate": (2,), "angle": (2,), "out": (3, 2)}
    params = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    diagonal = {"['b']": "complex", "['c']": "complex", "['rate']": "exp", "['angle']": "complex"}
    return Case(model, params, normal(9, 3, 4, 3), diagonal)


# -- graphs, physics, densities --------------------------------------------------------------------


def gcn() -> Case:
    """Graph network (jraph): messages along edges, all of it one graph."""
    edges = np.array([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])

    def model(p: Any, inputs: Any) -> Any:
        nodes, (senders, receivers) = inputs, edges
        for w, v in p["layers"]:
            messages = jnp.tanh(jnp.concatenate([nodes[senders], nodes[receivers]], -1) @ w)
            nodes = nodes @ v + jax.ops.segment_sum(messages, receivers, num_segments=5)
        return nodes @ p["out"]

    layers = [(normal(1, 6, 3), normal(2, 3, 3)), (normal(3, 6, 3), normal(4, 3, 3))]
    params = {"layers": layers, "out": normal(5, 3, 2)}
    return Case(model, params, normal(0, 5, 3), by_example=False)


def pinn() -> Case:
    """Burgers' equation (jaxpi): a modified perceptron with its derivatives in the inputs."""

    def network(p: Any, x: Any) -> Any:
        u, v = (jnp.tanh(x @ p[name]["w"] + p[name]["b"]) for name in "uv")
        h = jnp.tanh(x @ p["first"]["w"] + p["first"]["b"])
        h = h * u + (1 - h) * v
        return (h @ p["last"]["w"])[0]

    def residual(p: Any, x: Any) -> Any:
        u = lambda x: network(p, x)
        gradient, hessian = jax.grad(u)(x), jax.hessian(u)(x)
        return jnp.stack([gradient[0] + u(x) * gradient[1] - 0.01 * hessian[1, 1]])

    model = lambda p, x: jax.vmap(lambda x: residual(p, x))(x)
    dense = lambda n: {"w": normal(n, 2, 3), "b": normal(n + 1, 3)}
    params = {"u": dense(1), "v": dense(3), "first": dense(5), "last": {"w": normal(7, 3, 1)}}
    return Case(model, params, normal(0, 4, 2))


def coupling_flow() -> Case:
    """Affine coupling (distrax): a network of one half gives scale and shift of the other."""

    def model(p: Any, x: Any) -> Any:
        log_det = 0.0
        for w, b, v in p:
            fixed, moved = x[:, :2], x[:, 2:]
            log_scale, shift = jnp.split(jax.nn.relu(fixed @ w + b) @ v, 2, axis=-1)
            x = jnp.concatenate([moved * jnp.exp(jnp.tanh(log_scale)) + shift, fixed], axis=-1)
            log_det = log_det + jnp.tanh(log_scale).sum(-1)
        return jnp.concatenate([x, log_det[:, None]], axis=-1)

    params = [(normal(n, 2, 3), normal(n + 1, 3), normal(n + 2, 3, 4)) for n in (1, 4)]
    return Case(model, params, normal(0, 4, 4))


def vae() -> Case:
    """Variational autoencoder (Flax): mean and variance by two heads, a sample by noise."""

    def model(p: Any, inputs: Any) -> Any:
        h = jax.nn.relu(inputs["x"] @ p["encoder"] + p["b"])
        mean, log_variance = h @ p["mean"] + p["c"], h @ p["variance"] + p["d"]
        z = mean + inputs["noise"] * jnp.exp(0.5 * log_variance)
        decoded = jax.nn.relu(z @ p["hidden"] + p["e"]) @ p["decoder"]
        return jnp.concatenate([decoded, mean, log_variance], axis=-1)

    shapes = {
        "encoder": (3, 4),
        "b": (4,),
        "mean": (4, 2),
        "c": (2,),
        "variance": (4, 2),
        "d": (2,),
        "hidden": (2, 4),
        "e": (4,),
        "decoder": (4, 3),
    }
    params = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    return Case(model, params, {"x": normal(20, 4, 3), "noise": normal(21, 4, 2)})


def hypernetwork() -> Case:
    """Hypernetwork (HyperPINN): the kernels of one network are the outputs of another."""

    def model(p: Any, x: Any) -> Any:
        kernels = jnp.tanh(x[:, :2] @ p["w"] + p["b"]) @ p["v"]
        inner = kernels.reshape(-1, 2, 3)
        return jnp.tanh(jnp.einsum("bi,bio->bo", x[:, 2:], inner))

    params = {"w": normal(1, 2, 4), "b": normal(2, 4), "v": normal(3, 4, 6)}
    return Case(model, params, normal(0, 4, 4))


def neural_ode() -> Case:
    """Vector field in steps of a solver (diffrax with DirectAdjoint): one kernel in all stages."""

    def field(p: Any, y: Any) -> Any:
        return jnp.tanh(y @ p["w"] + p["b"]) @ p["v"]

    def model(p: Any, y: Any) -> Any:
        def step(y: Any, _: Any) -> Any:
            k1 = field(p, y)
            k2 = field(p, y + 0.1 * k1)
            return y + 0.05 * (k1 + k2), None

        return lax.scan(jax.checkpoint(step), y, None, length=3)[0]

    params = {"w": normal(1, 2, 4), "b": normal(2, 4), "v": normal(3, 4, 2)}
    return Case(model, params, normal(0, 4, 2))


def neural_ode_with_adjoint() -> Case:
    """The same with the derivative of an adjoint equation, which has no taps: a reason says so."""
    case = neural_ode()

    @jax.custom_vjp
    def solve(p: Any, y: Any) -> Any:
        return case.model(p, y)

    solve.defvjp(
        lambda p, y: (solve(p, y), (p, y)),
        lambda saved, g: jax.vjp(case.model, *saved)[1](g),
    )
    return case._replace(
        model=solve, diagonal=dict.fromkeys(["['w']", "['b']", "['v']"], "DirectAdjoint")
    )


def actor_critic() -> Case:
    """Actor and critic (PPO): two heads of one trunk of convolutions."""
    import flax.linen as nn

    class ActorCritic(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Conv(2, (3, 3), (2, 2), padding="VALID", name="conv")(x))
            x = nn.relu(nn.Dense(3, name="hidden")(x.reshape(len(x), -1)))
            return jnp.concatenate(
                [nn.Dense(3, name="policy")(x), nn.Dense(1, name="value")(x)], -1
            )

    return linen(ActorCritic(), normal(0, 3, 5, 5, 1))


def capacity_moe() -> Case:
    """Mixture of experts with capacities (MaxText): dispatched by zeros and ones, and combined."""

    def model(p: Any, x: Any) -> Any:
        gates = jax.nn.softmax(x @ p["router"])  # [b, t, e]
        chosen = jax.nn.one_hot(jnp.argmax(gates, axis=-1), 3, dtype=x.dtype)
        slot = jnp.cumsum(chosen, axis=1) * chosen - 1
        dispatch = chosen[..., None] * jax.nn.one_hot(slot.astype(int), 2, dtype=x.dtype)
        rows = jnp.einsum("btec,bti->ebci", dispatch, x)
        h = jax.nn.silu(jnp.einsum("ebci,eio->ebco", rows, p["up"]))
        y = jnp.einsum("ebci,eio->ebco", h, p["down"])
        return jnp.einsum("btec,bte,ebco->bto", dispatch, gates, y)

    params = {"router": normal(1, 3, 3), "up": normal(2, 3, 3, 4), "down": normal(3, 3, 4, 3)}
    return Case(model, params, normal(0, 3, 3, 3), stacks={"['up']": (3,), "['down']": (3,)})


def bilstm() -> Case:
    """Two directions of a recurrence, joined, and pooled by attention (sst2, DeepSpeech)."""

    def run(p: Any, x: Any, reverse: bool) -> Any:
        step = lambda h, x: (jnp.tanh(x @ p["x"] + h @ p["h"] + p["b"]),) * 2
        start = jnp.zeros((x.shape[0], 2), x.dtype)
        return lax.scan(step, start, x.swapaxes(0, 1), reverse=reverse)[1].swapaxes(0, 1)

    def model(p: Any, x: Any) -> Any:
        h = jnp.concatenate([run(p[0], x, False), run(p[1], x, True)], axis=-1)
        weights = jax.nn.softmax(jnp.tanh(h @ p[2]["keys"]) @ p[2]["query"], axis=1)
        return jnp.sum(weights * h, axis=1) @ p[2]["out"]

    cells = [
        {"x": normal(n, 3, 2), "h": normal(n + 1, 2, 2), "b": normal(n + 2, 2)} for n in (1, 4)
    ]
    head = {"keys": normal(7, 4, 3), "query": normal(8, 3, 1), "out": normal(9, 4, 2)}
    return Case(model, [*cells, head], normal(0, 3, 3, 3))


def ferminet() -> Case:
    """Wave function (FermiNet): streams of electrons and pairs, orbitals in envelopes."""

    def model(p: Any, x: Any) -> Any:
        pairs = x[:, :, None] - x[:, None]  # [b, n, n, 3]
        h = jnp.tanh(pairs @ p["pairs"] + p["a"]).mean(axis=2)
        mean = jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape)
        h = jnp.tanh(jnp.concatenate([x, mean, h], axis=-1) @ p["one"] + p["b"])
        radius = jnp.linalg.norm(x, axis=-1, keepdims=True)
        orbitals = (h @ p["orbitals"]) * p["pi"] * jnp.exp(-radius * p["sigma"])
        return jnp.log(abs(jnp.linalg.det(orbitals)))[:, None]

    shapes = {
        **{"pairs": (3, 2), "a": (2,), "one": (8, 4), "b": (4,)},
        **{"orbitals": (4, 2), "pi": (2,), "sigma": (2,)},
    }
    params = {name: normal(number, *shape) for number, (name, shape) in enumerate(shapes.items())}
    return Case(model, params, normal(9, 3, 2, 3), {"['pi']": "mul", "['sigma']": "mul"})


def weight_factorized() -> Case:
    """Kernels that are a product of two parameters (jaxpi): in no block, nor are their biases."""

    def model(p: Any, x: Any) -> Any:
        h = jnp.tanh(x @ (p["g"] * p["v"]) + p["b"])
        return h @ p["w"]

    params = {"g": normal(1, 4), "v": normal(2, 3, 4), "b": normal(3, 4), "w": normal(4, 4, 2)}
    diagonal = {"['g']": "another parameter", "['v']": "another parameter"}
    diagonal["['b']"] = "its map is in no block"
    return Case(model, params, normal(0, 4, 3), diagonal)


def batch_norm() -> Case:
    """Training with batch norm (ResNet): statistics of the batch mix its examples."""

    def model(p: Any, x: Any) -> Any:
        h = x @ p["w"]
        h = (h - h.mean(axis=0)) * lax.rsqrt(h.var(axis=0) + 1e-5) * p["scale"] + p["bias"]
        return jax.nn.relu(h) @ p["v"] + p["c"]

    params = {
        **{"w": normal(1, 3, 4), "scale": normal(2, 4), "bias": normal(3, 4)},
        **{"v": normal(4, 4, 2), "c": normal(5, 2)},
    }
    diagonal = {"['scale']": "mul", "['bias']": "add"}
    return Case(model, params, normal(0, 5, 3), diagonal, by_example=False)


ARCHITECTURES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        *(maf, arnn, gcnn, quantized, e3nn, stylegan, ragged_moe, lora, vqvae),
        *(bert, vit, gpt2, llama, t5, mixer, resnet, convnext, unet, conformer),
        *(lstm, seq2seq, mamba, s5, gcn, pinn, coupling_flow, vae, hypernetwork),
        *(neural_ode, neural_ode_with_adjoint, actor_critic),
        *(capacity_moe, bilstm, ferminet, weight_factorized, batch_norm),
    )
}
