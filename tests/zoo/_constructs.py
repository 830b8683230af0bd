"""Tiny models, one construct of a library each."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from zoo._case import Case, ids, linen, normal, random_params, shaken


def dense() -> Case:
    """Perceptron with biases."""
    import flax.linen as nn

    return linen(nn.Sequential([nn.Dense(4), nn.relu, nn.Dense(2)]), normal(0, 4, 3))


def dense_general() -> Case:
    """Several contracted axes and several axes of features."""
    import flax.linen as nn

    layers = [nn.DenseGeneral((3, 2), axis=(-2, -1)), nn.tanh, nn.DenseGeneral(2, axis=(-1, 1))]
    return linen(nn.Sequential(layers), normal(0, 4, 2, 3))


def attention() -> Case:
    """Self-attention of two heads, with all its biases."""
    import flax.linen as nn

    return linen(nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=4), normal(0, 4, 3, 2))


def conv_1d() -> Case:
    """Sequence of three."""
    import flax.linen as nn

    return linen(nn.Sequential([nn.Conv(3, (2,)), nn.tanh, nn.Conv(2, (3,))]), normal(0, 4, 3, 2))


def conv_2d() -> Case:
    """Strides, padded to keep the size."""
    import flax.linen as nn

    return linen(
        nn.Sequential([nn.Conv(3, (3, 2), strides=2, padding="SAME"), nn.tanh]),
        normal(0, 4, 5, 4, 2),
    )


def conv_3d() -> Case:
    """Three spatial axes."""
    import flax.linen as nn

    return linen(nn.Sequential([nn.Conv(2, (2, 2, 2)), nn.tanh]), normal(0, 4, 3, 2, 2, 2))


def conv_dilated() -> Case:
    """Holes in the kernel."""
    import flax.linen as nn

    return linen(
        nn.Sequential([nn.Conv(3, (2, 2), kernel_dilation=2), nn.tanh]), normal(0, 4, 4, 3, 2)
    )


def conv_transposed() -> Case:
    """Holes in the input."""
    import flax.linen as nn

    return linen(
        nn.Sequential([nn.ConvTranspose(3, (3, 2), strides=(2, 2)), nn.tanh]),
        normal(0, 4, 2, 3, 2),
    )


def conv_grouped() -> Case:
    """Two groups of features."""
    import flax.linen as nn

    module = nn.Sequential([nn.Conv(6, (2, 2), feature_group_count=2), nn.tanh])
    return linen(module, normal(0, 4, 3, 3, 4), stacks=dict.fromkeys(_dense("layers_0"), (2,)))


def conv_depthwise() -> Case:
    """A group for each of three channels, two features each."""
    import flax.linen as nn

    module = nn.Sequential([nn.Conv(6, (2, 2), feature_group_count=3), nn.tanh])
    return linen(module, normal(0, 4, 3, 3, 3), stacks=dict.fromkeys(_dense("layers_0"), (3,)))


def embed() -> Case:
    """Lookup of integers."""
    import flax.linen as nn

    return linen(nn.Sequential([nn.Embed(5, 3), nn.Dense(2)]), ids(0, 5, 4, 3))


def tied() -> Case:
    """One table looks up and gives the logits."""
    import flax.linen as nn

    table = nn.Embed(5, 3)

    def model(params: Any, ids: Any) -> Any:
        h = jnp.tanh(table.apply({"params": params}, ids))
        return table.apply({"params": params}, h, method="attend")

    return linen(table, ids(0, 5, 4, 3))._replace(model=model)


def layer_norm() -> Case:
    """Norm between two layers."""
    import flax.linen as nn

    module = nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.Dense(2)])
    diagonal = {"['layers_1']['scale']": "mul", "['layers_1']['bias']": "add"}
    return linen(module, normal(0, 4, 3), diagonal)


def lstm_optimized() -> Case:
    """Kernels of the gates are joined before the product."""
    import flax.linen as nn

    return _recurrent(nn.OptimizedLSTMCell)


def lstm() -> Case:
    """One product for each gate."""
    import flax.linen as nn

    return _recurrent(nn.LSTMCell)


def gru() -> Case:
    """The reset gate multiplies a product with its bias."""
    import flax.linen as nn

    return _recurrent(nn.GRUCell)


def simple_cell() -> Case:
    """Two products and a tanh."""
    import flax.linen as nn

    return _recurrent(nn.SimpleCell)


def scan_rnn() -> Case:
    """Weights that the steps of a scan share; the bias comes after the sum of two products."""

    def model(params: Any, x: Any) -> Any:
        def step(h: Any, x: Any) -> Any:
            h = jnp.tanh(x @ params["wx"] + h @ params["wh"] + params["b"])
            return h, h

        start = jnp.zeros((len(x), 3), x.dtype)
        return lax.scan(step, start, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return Case(
        model,
        {"wx": normal(1, 2, 3), "wh": normal(2, 3, 3), "b": normal(3, 3)},
        normal(0, 4, 3, 2),
    )


def scan_layers() -> Case:
    """Three layers of linen in a scan."""
    import flax.linen as nn

    scan = nn.scan(
        nn.Sequential, variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    module = nn.Sequential([scan([nn.Dense(3), nn.tanh, lambda h: (h, None)]), lambda h, _: h])
    return linen(
        module, normal(0, 4, 3), stacks=dict.fromkeys(_dense("layers_0", "layers_0"), (3,))
    )


def scan_layers_plain() -> Case:
    """Layers with a norm in a scan over their weights."""

    def layer(h: Any, weights: Any) -> Any:
        z = h @ weights["w"] + weights["b"]
        return jnp.tanh(
            z * lax.rsqrt(jnp.mean(z**2, axis=-1, keepdims=True) + 1e-3) * weights["scale"]
        ), None

    params = {"w": normal(1, 3, 2, 2), "b": normal(2, 3, 2), "scale": 1 + 0.1 * normal(3, 3, 2)}
    model = lambda params, x: lax.scan(layer, x, params)[0]
    return Case(
        model, params, normal(0, 4, 2), {"['scale']": "mul"}, {"['w']": (3,), "['b']": (3,)}
    )


def remat() -> Case:
    """Layers that are computed again."""
    import flax.linen as nn

    first = nn.remat(nn.Sequential)([nn.Dense(4), nn.tanh, nn.Dense(3), nn.tanh])
    return linen(nn.Sequential([first, nn.remat(nn.Dense)(2)]), normal(0, 4, 3))


def bf16_compute() -> Case:
    """Params are rounded before use, outputs come back in the precision of the inputs."""
    import flax.linen as nn

    module = nn.Sequential(
        [nn.Dense(4, dtype=jnp.bfloat16), nn.tanh, nn.Dense(2, dtype=jnp.bfloat16)]
    )
    case = linen(module, normal(0, 4, 3))
    return case._replace(model=lambda params, x: case.model(params, x).astype(x.dtype))


def bf16_params() -> Case:
    """All in bfloat16: params, inputs and outputs."""
    import flax.linen as nn

    case = linen(nn.Sequential([nn.Dense(4), nn.tanh, nn.Dense(2)]), normal(0, 4, 3))
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (case.params, case.inputs))
    return Case(case.model, *rounded)


def nnx_split() -> Case:
    """Params are a State."""
    from flax import nnx

    definition, state = nnx.split(_nnx())
    return Case(lambda params, x: nnx.merge(definition, params)(x), shaken(state), normal(0, 4, 3))


def nnx_pure() -> Case:
    """Params are a plain tree."""
    from flax import nnx

    definition, state = nnx.split(_nnx())
    params = shaken(nnx.to_pure_dict(state))
    return Case(lambda params, x: nnx.merge(definition, params)(x), params, normal(0, 4, 3))


def equinox() -> Case:
    """A module for one example, under vmap."""
    import equinox as eqx

    mlp = eqx.nn.MLP(in_size=3, out_size=2, width_size=4, depth=1, key=jax.random.key(1))
    params, rest = eqx.partition(mlp, eqx.is_inexact_array)
    return Case(
        lambda params, x: jax.vmap(eqx.combine(params, rest))(x), shaken(params), normal(0, 4, 3)
    )


def haiku() -> Case:
    """Transformed function."""
    import haiku as hk

    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([4, 2])(x)))
    x = normal(0, 4, 3)
    return Case(net.apply, shaken(net.init(jax.random.key(1), x)), x)


def einsum() -> Case:
    """Axes in odd orders, the kernel on either side, two axes contracted."""

    def model(params: Any, x: Any) -> Any:
        h = jnp.tanh(jnp.einsum("bti,oi->tbo", x, params[0]))
        h = jnp.tanh(jnp.einsum("oi,tbi->otb", params[1], h))
        return jnp.einsum("jto,otb->jb", params[2], h).T

    return Case(model, [normal(1, 4, 2), normal(2, 3, 4), normal(3, 2, 3, 3)], normal(0, 4, 3, 2))


def fused_qkv() -> Case:
    """Queries, keys and values of one leaf: cut before the product, then after it."""

    def model(params: Any, x: Any) -> Any:
        parts = [slice(2 * i, 2 * i + 2) for i in range(3)]
        h = _attend(*(x @ params["cut"]["w"][:, part] + params["cut"]["b"][part] for part in parts))
        return _attend(*jnp.split(h @ params["whole"]["w"] + params["whole"]["b"], 3, axis=-1))

    layer = lambda seed: {"w": normal(seed, 2, 6), "b": normal(seed + 1, 6)}
    return Case(model, {"cut": layer(1), "whole": layer(3)}, normal(0, 4, 3, 2))


def lora() -> Case:
    """Product of low rank beside a full one."""
    params = {"w": normal(1, 4, 3), "a": normal(2, 4, 2), "b": normal(3, 2, 3)}
    return Case(
        lambda params, x: x @ params["w"] + (x @ params["a"]) @ params["b"],
        params,
        normal(0, 4, 4),
    )


def ensemble() -> Case:
    """Three members under vmap, each with inputs of its own."""

    def member(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    def model(params: Any, x: Any) -> Any:
        return jax.vmap(member)(params, jnp.broadcast_to(x, (3, *x.shape))).swapaxes(0, 1)

    params = {
        "w1": normal(1, 3, 2, 4),
        "b1": normal(2, 3, 4),
        "w2": normal(3, 3, 4, 2),
        "b2": normal(4, 3, 2),
    }
    return Case(model, params, normal(0, 4, 2), stacks={f"['{name}']": (3,) for name in params})


def mixture() -> Case:
    """Each example goes to one of three experts; seed 8 of the gate leaves none of them idle."""

    def model(params: Any, x: Any) -> Any:
        gate = jax.nn.softmax(x @ params["gate"])
        chosen = jax.nn.one_hot(jnp.argmax(gate, axis=-1), 3, dtype=x.dtype)
        dispatched = jnp.einsum("be,bi->ebi", chosen, x)
        h = jnp.einsum("ebi,eio->ebo", dispatched, params["w"]) + params["b"][:, None]
        return jnp.einsum("be,ebo->bo", chosen * gate, h)

    params = {"gate": normal(8, 2, 3), "w": normal(2, 3, 2, 4), "b": normal(3, 3, 4)}
    return Case(model, params, normal(0, 4, 2), stacks={"['w']": (3,), "['b']": (3,)})


def nested_jit() -> Case:
    """One compiled layer for two sets of weights, its bias outside the inner function."""
    product = jax.jit(lambda w, x: x @ w)
    layer = jax.jit(lambda params, x: product(params["w"], x) + params["b"])
    model = lambda params, x: layer(params[1], jnp.tanh(layer(params[0], x)))
    return Case(
        model, [{"w": normal(i, 3, 3), "b": normal(i + 2, 3)} for i in (1, 2)], normal(0, 4, 3)
    )


def cond() -> Case:
    """Branches with weights of their own (under vmap over examples: both run, one is selected)."""

    def model(params: Any, inputs: Any) -> Any:
        first = lambda x: jnp.tanh(x @ params["w1"] + params["b1"])
        second = lambda x: jnp.sin(x @ params["w2"])
        return lax.cond(inputs["flag"].sum() > 0, first, second, inputs["x"]) @ params["out"]

    params = {
        "w1": normal(1, 3, 4),
        "b1": normal(2, 4),
        "w2": normal(3, 3, 4),
        "out": normal(4, 4, 2),
    }
    return Case(model, params, {"x": normal(0, 4, 3), "flag": jnp.ones(4, int)})


def custom_vjp_attention() -> Case:
    """Attention with a derivative of its own; it takes no params."""

    @jax.custom_vjp
    def attend(q: Any, k: Any, v: Any) -> Any:
        return _attend(q, k, v)

    attend.defvjp(lambda *qkv: jax.vjp(_attend, *qkv), lambda pullback, ct: pullback(ct))

    def model(params: Any, x: Any) -> Any:
        q, k, v = (x @ params[name]["w"] + params[name]["b"] for name in "qkv")
        return attend(q, k, v)

    params = {
        name: {"w": normal(i, 2, 3), "b": normal(i + 3, 3)} for i, name in enumerate("qkv", 1)
    }
    return Case(model, params, normal(0, 4, 3, 2))


def input_gradient() -> Case:
    """A network and its derivative in the inputs,
    which uses the kernels transposed and the biases as before.

    The first product of the derivative is of `w2` and ones,
    which under vmap over examples have no axis of examples.
    """

    def network(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]

    def model(params: Any, x: Any) -> Any:
        gradient = jax.grad(lambda x: network(params, x).sum())(x)
        return jnp.concatenate([network(params, x), gradient], axis=-1)

    params = {
        "w1": normal(1, 2, 4),
        "b1": normal(2, 4),
        "w2": normal(3, 4, 1),
        "b2": normal(4, 1),
    }
    return Case(model, params, normal(0, 4, 2))


def weight_norm() -> Case:
    """Kernel is made of a direction and a length."""

    def model(params: Any, x: Any) -> Any:
        v, g = params["v"], params["g"]
        return jnp.tanh(x @ (v * g / jnp.linalg.norm(v, axis=0))) @ params["w"]

    params = {"v": normal(1, 3, 4), "g": 1 + 0.1 * normal(2, 4), "w": normal(3, 4, 2)}
    return Case(model, params, normal(0, 4, 3), {"['v']": "mul", "['g']": "mul"})


def product() -> Case:
    """Kernel is a product of two leaves."""
    params = {"a": normal(1, 3, 2), "b": normal(2, 2, 4)}
    diagonal = {"['a']": "parameter", "['b']": "parameter"}
    return Case(
        lambda params, x: x @ (params["a"] @ params["b"]), params, normal(0, 4, 3), diagonal
    )


def custom_vjp_param() -> Case:
    """A leaf that only a function with a derivative of its own takes."""

    @jax.custom_vjp
    def scaled(x: Any, scale: Any) -> Any:
        return x * scale

    scaled.defvjp(
        lambda x, scale: (x * scale, (x, scale)),
        lambda kept, ct: (ct * kept[1], (ct * kept[0]).sum(0)),
    )
    params = {"w": normal(1, 3, 4), "scale": normal(2, 4)}
    model = lambda params, x: scaled(jnp.tanh(x @ params["w"]), params["scale"])
    return Case(model, params, normal(0, 4, 3), {"['scale']": "custom_vjp"})


def while_param() -> Case:
    """Loop with a fixed number of steps, all with the same weights."""

    def model(params: Any, x: Any) -> Any:
        return lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h @ params["w"] + params["b"]), x)

    return Case(model, {"w": normal(1, 3, 3), "b": normal(2, 3)}, normal(0, 4, 3))


def shuffled() -> Case:
    """Kernel is two leaves, one reversed and one transposed, side by side."""

    def model(params: Any, x: Any) -> Any:
        kernel = jnp.concatenate([params["a"][::-1], jnp.flip(params["b"], axis=1).T], axis=1)
        return jnp.tanh(x @ kernel)

    return Case(model, {"a": normal(1, 3, 4), "b": normal(2, 2, 3)}, normal(0, 4, 3))


def overlapping() -> Case:
    """Two leaves make a kernel as in `shuffled`, and then, split and stacked,
    another of the same entries.
    """

    def model(params: Any, x: Any) -> Any:
        a, b = params["a"], params["b"]
        h = jnp.tanh(x @ jnp.concatenate([a[::-1], jnp.flip(b, axis=1).T], axis=1))
        halves = jnp.stack(jnp.split(jnp.concatenate([a, b.T], axis=1), 2, axis=1), axis=1)
        return jnp.einsum("bij,ijo->bo", h.reshape(-1, 3, 2), halves)

    diagonal = dict.fromkeys(["['a']", "['b']"], "overlap")
    return Case(model, {"a": normal(1, 3, 4), "b": normal(2, 2, 3)}, normal(0, 4, 3), diagonal)


def two_uses() -> Case:
    """One layer applied twice."""
    import flax.linen as nn

    case = linen(nn.Dense(3), normal(0, 4, 3))
    return case._replace(
        model=lambda params, x: case.model(params, jnp.tanh(case.model(params, x)))
    )


def positions() -> Case:
    """Tokens are looked up, rows of a table of positions are added."""

    def model(params: Any, ids: Any) -> Any:
        return jnp.tanh(params["tokens"][ids] + params["positions"]) @ params["w"]

    params = {"tokens": normal(1, 5, 4), "positions": normal(2, 3, 4), "w": normal(3, 4, 2)}
    return Case(model, params, ids(0, 5, 4, 3))


def tied_entries() -> Case:
    """A convolution over the cyclic group of three, its kernel gathered by constants, with a bias
    for each feature; then columns in another order.
    """
    table = np.arange(3)[None] - np.arange(3)[:, None]  # [h, g] -> g - h

    def model(params: Any, x: Any) -> Any:
        h = jnp.einsum("bhi,ihog->bog", x, params["w"][:, table % 3].transpose(0, 1, 3, 2))
        h = jnp.tanh(h + params["b"][:, None])
        return h.reshape(len(x), -1) @ params["v"][jnp.array([5, 3, 4, 1, 0, 2])]

    params = {"w": normal(1, 2, 3, 2), "b": normal(2, 2), "v": normal(3, 6, 2)}
    return Case(model, params, normal(0, 4, 3, 2))


def scaled() -> Case:
    """Kernels and biases that constants multiply: one number, one for each input, and for each
    output.
    """

    def model(params: Any, x: Any) -> Any:
        h = jnp.tanh(x @ (params["w"] / jnp.sqrt(3)) + params["b"] * 2)
        return h @ (-params["v"] * jnp.arange(1.0, 5)[:, None] * jnp.array([0.5, 2]))

    params = {"w": normal(1, 3, 4), "b": normal(2, 4), "v": normal(3, 4, 2)}
    return Case(model, params, normal(0, 4, 3))


def masked() -> Case:
    """Layers in a scan, each with a mask of its own; then a triangular kernel."""
    masks = np.random.default_rng(3).integers(2, size=(2, 3, 3))
    masks[:, 1] = 1  # no column without entries

    def layer(h: Any, weights: Any) -> Any:
        w, b, mask = weights
        return jnp.tanh(h @ jnp.where(mask > 0, w, 0) + b), None

    def model(params: Any, x: Any) -> Any:
        h, _ = lax.scan(layer, x, (params["w"], params["b"], jnp.asarray(masks)))
        return h @ jnp.tril(params["v"])

    params = {"w": normal(1, 2, 3, 3), "b": normal(2, 2, 3), "v": normal(3, 3, 3)}
    stacks = {"['w']": (2,), "['b']": (2,)}
    return Case(model, params, normal(0, 4, 3), stacks=stacks)


def straight_through() -> Case:
    """Rounded kernels with the derivative of those that are not."""

    def rounded(w: Any) -> Any:
        scale = jnp.max(abs(w))
        return w + lax.stop_gradient(jnp.round(w / scale) * scale - w)

    model = lambda p, x: jnp.tanh(x @ rounded(p["w"]) + p["b"]) @ rounded(p["v"])
    params = {"w": normal(1, 3, 4), "b": normal(2, 4), "v": normal(3, 4, 2)}
    return Case(model, params, normal(0, 4, 3))


def lookups() -> Case:
    """A table under vmap, as in Equinox; one for each feature; one by two numbers."""

    def model(params: Any, ids: Any) -> Any:
        h = jax.vmap(lambda i: params["under vmap"][i])(ids[:, 0])
        of_features = lambda row: jax.vmap(lambda table, i: table[i])(params["features"], row)
        h = h + jax.vmap(of_features)(ids).sum(axis=1)
        h = jnp.tanh(h + params["pairs"][ids[:, 0], ids[:, 1] % 3])
        # As with named axes (penzai): one number after the other, one feature after the other.
        of_feature = jax.vmap(lambda column, i: column[i], in_axes=(1, None))
        tied = jax.vmap(lambda i: of_feature(params["tied"], i))(ids[:, 2])
        return (h @ params["w"] + tied) @ params["tied"].T

    params = {
        "under vmap": normal(1, 5, 4),
        "features": normal(2, 3, 5, 4),
        "pairs": normal(3, 5, 3, 4),
        "w": normal(4, 4, 2),
        "tied": normal(5, 5, 2),
    }
    return Case(model, params, ids(0, 5, 4, 3), stacks={"['features']": (3,)})


def experts() -> Case:
    """Rows in groups, one for each of three experts, the second without rows."""

    def model(params: Any, x: Any) -> Any:
        sizes = jnp.array([len(x) // 2, 0, len(x) - len(x) // 2])
        h = jnp.tanh(lax.ragged_dot(x, params["w"], sizes))
        return lax.ragged_dot(h, params["v"], sizes)

    params = {"w": normal(1, 3, 3, 4), "v": normal(2, 3, 4, 2)}
    return Case(
        model, params, normal(0, 5, 3), stacks={"['w']": (3,), "['v']": (3,)}, by_example=False
    )


def _recurrent(cell: Any) -> Case:
    """Run a cell over sequences; it makes its start in the precision of `param_dtype`."""
    import flax.linen as nn

    module = lambda x: nn.Sequential([nn.RNN(cell(2, param_dtype=x.dtype)), nn.Dense(2)])
    x = normal(0, 4, 3, 2)
    return Case(
        lambda params, x: module(x).apply({"params": params}, x), random_params(module(x), x), x
    )


def _nnx() -> Any:
    from flax import nnx

    rngs = nnx.Rngs(1)
    return nnx.Sequential(nnx.Linear(3, 4, rngs=rngs), jnp.tanh, nnx.Linear(4, 2, rngs=rngs))


def _dense(*names: str) -> list[str]:
    """Paths of the kernel and the bias of a layer."""
    prefix = "".join(f"['{name}']" for name in names)
    return [f"{prefix}['kernel']", f"{prefix}['bias']"]


def _attend(q: Any, k: Any, v: Any) -> Any:
    return jax.nn.softmax(q @ k.swapaxes(-1, -2)) @ v


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (
        *(
            dense,
            dense_general,
            attention,
            embed,
            tied,
            layer_norm,
            remat,
            bf16_compute,
            bf16_params,
            two_uses,
        ),
        *(conv_1d, conv_2d, conv_3d, conv_dilated, conv_transposed, conv_grouped, conv_depthwise),
        *(
            lstm_optimized,
            lstm,
            gru,
            simple_cell,
            scan_rnn,
            scan_layers,
            scan_layers_plain,
            while_param,
        ),
        *(nnx_split, nnx_pure, equinox, haiku, nested_jit, cond, input_gradient),
        *(einsum, fused_qkv, lora, ensemble, mixture, shuffled, overlapping, positions),
        *(custom_vjp_attention, weight_norm, product, custom_vjp_param),
        *(tied_entries, scaled, masked, straight_through, lookups, experts),
    )
}
