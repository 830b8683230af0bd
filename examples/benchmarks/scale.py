"""Work, bytes sent and state of each device, as a training step is spread over 1, 2, 4, 8 devices.

    python examples/benchmarks/scale.py [--json FILE] [--full] [--strong] [--smoke]
    python examples/benchmarks/scale.py --models transformer --devices 8 --optimizers "kfac owners"

Programs are compiled for host devices and never run: what counts is in their optimized HLO, read by
`_hlo.py`. All is for one device and one step with new factors and new inverses.

* matrix, LAPACK: FLOPs over one n-th of what a single device does with the global batch; 1 is
  ideal, n is everything on every device. Inversions consist of both.
* factorized: matrices that go through a factorization; inversions take large ones apart. `slots`:
  those of a device's slots, and of the blocks that are on every device.
* sent: megabytes that a device sends on a ring, beside the formula, which is (n-1)/n times: AdamW
  2P for P bytes of parameters (with `--full` what AdamW's program sends); beyond it, for F bytes
  of factors and P of kernels, both padded, kfac 2F; owners F + P; everyone 2F; ekfac 2F + 2P; ekfac
  owners 2F + 2P; mfac 2P, whose window is spread by gradients. With `--full`, P / n takes a step to
  its owner, and P / n back; mfac has nothing to send, as its window is spread like parameters.
* state: megabytes of optimizer state, and that over one n-th of the state on a single device.
* misses, of placed methods: matrix > 1.3 (not where everyone preconditions), factorized > slots,
  sent > 1.2 of the formula, gathered factors (but EK-FAC's bases, and everyone's inverses),
  gathered rows of the global batch.

The compiler for CPUs makes no reduce-scatter of its own, so that with `--full` each program sends
more than it would on accelerators.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _harness import parser, report, write_json
from _hlo import Work, work
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import curvax

WINDOW = 16  # gradients that M-FAC holds
Shape = jax.ShapeDtypeStruct


class Model(NamedTuple):
    """Shapes of a model to train; `batch(size)` has so many examples of `length` rows each."""

    name: str
    objective: curvax.Objective
    params: Any
    batch: Callable[[int], Any]
    size: int
    length: int

    @property
    def layout(self) -> curvax.kron.Layout:
        return curvax.kron_layout(self.objective, self.params, self.batch(self.size))


def mlp(smoke: bool) -> Model:
    """A perceptron of tanh layers with biases."""
    widths = (32, 48, 48, 16) if smoke else (256, 512, 512, 512, 64)

    def model(params, x):
        *hidden, last = params
        for layer in hidden:
            x = jnp.tanh(x @ layer["w"] + layer["b"])
        return x @ last["w"] + last["b"]

    params = [
        {"w": Shape((i, o), jnp.float32), "b": Shape((o,), jnp.float32)}
        for i, o in itertools.pairwise(widths)
    ]
    batch = lambda size: (Shape((size, widths[0]), jnp.float32), Shape((size,), jnp.int32))
    # No number of rows may be that of a width: rows are told from weights by their number.
    return Model("mlp", softmax(model), params, batch, 40 if smoke else 528, 1)


def transformer(smoke: bool) -> Model:
    """A scanned stack of layers with attention, and a head that is not tied to the embedding."""
    layers, width, length, vocabulary = (2, 32, 8, 96) if smoke else (4, 256, 32, 1000)

    def normalized(h):
        return h * jax.lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + 1e-6)

    def layer(h, params):
        qkv = (normalized(h) @ params["qkv"]).reshape(*h.shape[:2], 3, 4, width // 4)
        mixed = jax.nn.dot_product_attention(*jnp.moveaxis(qkv, 2, 0), is_causal=True)
        h = h + mixed.reshape(h.shape) @ params["out"]
        return h + jax.nn.gelu(normalized(h) @ params["up"]) @ params["down"], None

    def model(params, tokens):
        h, _ = jax.lax.scan(layer, params["table"][tokens], params["layers"])
        return normalized(h) @ params["head"]

    stacked = lambda *sides: Shape((layers, *sides), jnp.float32)
    params = {
        "table": Shape((vocabulary, width), jnp.float32),
        "layers": {
            "qkv": stacked(width, 3 * width),
            "out": stacked(width, width),
            "up": stacked(width, 4 * width),
            "down": stacked(4 * width, width),
        },
        "head": Shape((width, vocabulary), jnp.float32),
    }
    batch = lambda size: (Shape((size, length), jnp.int32),) * 2
    return Model("transformer", softmax(model), params, batch, 8 if smoke else 64, length)


def softmax(model: Callable[..., Any]) -> curvax.Objective:
    return curvax.Objective(model, curvax.losses.softmax_cross_entropy())


def kron(one_liner: Callable[..., Any], model: Model, placement: Any) -> Any:
    return one_liner(0.1, model.objective, model.layout, placement=placement)


class Method(NamedTuple):
    """An optimizer, `build(model, placement)`; `precondition` is what its placement has, if any."""

    build: Callable[..., optax.GradientTransformation]
    precondition: str | None = None


KFAC, EKFAC = (partial(kron, one_liner) for one_liner in (curvax.kfac, curvax.ekfac))
METHODS = {
    "adamw": Method(lambda model, _: optax.adamw(1e-3)),
    "kfac": Method(KFAC),
    "kfac owners": Method(KFAC, "owners"),
    "kfac everyone": Method(KFAC, "everyone"),
    "ekfac": Method(EKFAC),
    "ekfac owners": Method(EKFAC, "owners"),
    "mfac": Method(lambda model, _: curvax.mfac(1e-2, WINDOW)),
}
MODELS = {"mlp": mlp, "transformer": transformer}


def mesh_of(num_devices: int) -> jax.sharding.Mesh:
    """The first so many devices in a line; the compiler spreads what is not said."""
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=devices)


class Counted(NamedTuple):
    """A compiled step: work and bytes of state of one device, and its placement."""

    work: Work
    state: int
    placement: curvax.kron.Placement | None


def compiled(model: Model, method: Method, num_devices: int, size: int, is_full: bool) -> Counted:
    """Compile a training step with a global batch of `size` examples, and count."""
    mesh = mesh_of(num_devices)

    def placed(x: Shape, *spec: str | None) -> Shape:
        return Shape(x.shape, x.dtype, sharding=NamedSharding(mesh, P(*spec)))

    def placed_param(x: Shape) -> Shape:
        divisible = [size if size % num_devices == 0 else 0 for size in x.shape]
        axes: list[str | None] = [None] * x.ndim
        if is_full and any(divisible):
            axes[int(np.argmax(divisible))] = "data"
        return placed(x, *axes)

    params = jax.tree.map(placed_param, model.params)
    batch = jax.tree.map(lambda x: placed(x, "data"), model.batch(size))
    placement = None
    if method.precondition is not None:
        placement = curvax.kron_placement(
            model.layout, mesh, precondition=method.precondition, min_size=16
        )
    tx = optax.with_extra_args_support(method.build(model, placement))
    shardings = curvax.state_shardings(tx, params)
    state = jax.tree.map(
        lambda x, sharding: Shape(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
        shardings,
    )

    def step(params, state, batch):
        gradient = jax.grad(model.objective)(params, batch)
        updates, state = tx.update(gradient, state, params, batch=batch)
        return optax.apply_updates(params, updates), state

    results = jax.tree.map(lambda x: x.sharding, (params, state))
    lowered = jax.jit(step, out_shardings=results).lower(params, state, batch)
    # How well each operation becomes machine code is of no interest here.
    text = lowered.compile({"xla_backend_optimization_level": 0}).as_text()
    bytes_of = lambda x: math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return Counted(work(text), sum(map(bytes_of, jax.tree.leaves(state))), placement)


@cache
def calls_of_inverse(size: int) -> int:
    """How many matrices are factorized in the inversion of one of this size."""
    inverse = jax.jit(lambda x: curvax.kron.Full(x).inverse())
    lowered = inverse.lower(Shape((1, size, size), jnp.float32))
    return work(lowered.compile({"xla_backend_optimization_level": 0}).as_text()).num_factorizations


def slots(name: str, placement: curvax.kron.Placement) -> int:
    """How many matrices a device factorizes: of its slots, and of blocks that are everywhere."""
    numbers: dict[int, int] = {}  # by size
    for block in placement.layout.blocks:
        share = placement.owners.number if block in placement.blocks else 1
        for structure, side in zip(block.structures, block.shape[1:], strict=True):
            if structure == "full":
                numbers[side] = numbers.get(side, 0) + block.shape[0] // share
    if name.startswith("ekfac"):
        return sum(numbers.values())
    total, padded = 0, 0
    for side, number in sorted(numbers.items(), reverse=True):
        # A width joins the loop of the same width with its bias.
        if padded - side > max(1, padded // 64) or padded == 0:
            padded = side
        total += number * calls_of_inverse(padded)
    return total


def megabytes(blocks: Sequence[curvax.kron.Block]) -> tuple[float, float]:
    """Factors F, and matrices P."""
    factors = sum(math.prod(shape) for block in blocks for shape in block.factor_shapes)
    return 4e-6 * factors, 4e-6 * sum(math.prod(block.shape) for block in blocks)


def formula(name: str, model: Model, counted: Counted, n: int, is_full: bool) -> float:
    """Megabytes that a device sends beyond what AdamW has it send."""
    factors, kernels = megabytes(model.layout.blocks)
    if counted.placement is None:
        params = 4e-6 * sum(x.size for x in jax.tree.leaves(model.params))
        sent = {
            "kfac": 2 * factors,
            "ekfac": 2 * (factors + kernels),
            "mfac": 0 if is_full else 2 * params,
        }[name]
        return sent * (n - 1) / n
    blocks = counted.placement.blocks
    others = [block for block in counted.placement.layout.blocks if block not in blocks]
    factors, kernels = megabytes(blocks)
    steps = 2 * kernels / n if is_full else kernels
    sent = {
        "kfac owners": factors + steps,
        "kfac everyone": 2 * factors,
        "ekfac owners": 2 * factors + kernels + steps,
    }[name]
    # What stays on every device is reduced by all.
    factors, kernels = megabytes(others)
    sent += 2 * (factors + kernels * name.startswith("ekfac"))
    return sent * (n - 1) / n


def gathered(counted: Counted, plain: Counted, model: Model, size: int) -> list[str]:
    """What is gathered that should not be: factors, and rows of the global batch."""
    assert counted.placement is not None
    sides = {side for b in counted.placement.layout.blocks for side in b.shape[1:]}
    # Gradients and steps go to owners and back; square ones look like factors.
    usual = {x.shape for c in plain.work.collectives for x in c.results}
    for block in counted.placement.blocks:
        usual |= {block.shape, *(member.block.shape for member in block.members)}
    problems = []
    for collective in counted.work.collectives:
        for x in collective.results:
            if collective.kind != "all-gather" or x.shape in usual:
                continue
            if len(x.shape) > 1 and x.shape[-1] == x.shape[-2] and x.shape[-1] in sides:
                problems.append(f"factor {list(x.shape)}")
            pairs = list(itertools.pairwise(x.shape))
            has_rows = size * model.length in x.shape or (size, model.length) in pairs
            # The labels and tokens themselves are no more than that.
            if has_rows and math.prod(x.shape) > size * model.length:
                problems.append(f"rows {list(x.shape)}")
    return problems


def rows_of(model: Model, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compile all programs of a model, and return what is printed."""
    count = cache(lambda name, *rest: compiled(model, METHODS[name], *rest))
    rows = []
    layouts = (False, True) if args.full else (False,)
    cases = [
        (is_full, n, name) for is_full in layouts for n in args.devices for name in args.methods
    ]
    for is_full, n, name in tqdm(cases, desc=model.name, leave=False):
        size = model.size if args.strong else n * model.size
        single = count(name.split()[0], 1, size, False)
        plain = count("adamw", n, size, is_full)
        counted = count(name, n, size, is_full) if n > 1 or " " in name else single
        one, here = single.work, counted.work
        sent, expected = 1e-6 * here.sent, 1e-6 * plain.work.sent
        if name != "adamw":
            expected += formula(name, model, counted, n, is_full)
        row = {
            "model": model.name,
            "layout": "full" if is_full else "data",
            "optimizer": name,
            "n": n,
            "matrix": n * here.matrix_flops / one.matrix_flops,
            "LAPACK": n * here.lapack_flops / one.lapack_flops if one.lapack_flops else "",
            "factorized": here.num_factorizations,
            "slots": "",
            "sent": sent,
            "formula": expected,
            "state": 1e-6 * counted.state,
            "state x": n * counted.state / single.state,
            "misses": "",
        }
        if counted.placement is not None:
            row["slots"] = slots(name, counted.placement)
            problems = gathered(counted, plain, model, size)
            if name != "kfac owners":  # bases or inverses are sent
                problems = [x for x in problems if not x.startswith("factor")]
            problems += ["matrix"] * (row["matrix"] > 1.3 and "everyone" not in name)
            problems += ["factorized"] * (row["factorized"] > row["slots"])
            problems += ["sent"] * (n > 1 and sent > 1.2 * expected)
            row["misses"] = ", ".join(dict.fromkeys(problems))
        rows.append(row)
    return rows


def main() -> None:
    flags = parser(__doc__.partition("\n\n")[0])
    flags.add_argument("--models", default="mlp,transformer")
    flags.add_argument("--optimizers", help=f"of {', '.join(METHODS)}; default: all")
    flags.add_argument("--devices", default="1,2,4,8", help="numbers of devices")
    flags.add_argument("--full", action="store_true", help="also with fully sharded parameters")
    flags.add_argument(
        "--strong", action="store_true", help="one global batch; by default it grows with devices"
    )
    args = flags.parse_args()
    jax.config.update("jax_num_cpu_devices", 8)  # does nothing where there are accelerators
    args.devices = [2] if args.smoke else [int(n) for n in args.devices.split(",")]
    args.methods = args.optimizers.split(",") if args.optimizers else list(METHODS)
    if args.smoke:
        args.models, args.methods = "mlp", ["adamw", "kfac owners"]
    unknown = {*args.methods} - {*METHODS} | {*args.models.split(",")} - {*MODELS}
    if unknown:
        flags.error(f"unknown: {unknown}; models {list(MODELS)}, optimizers {list(METHODS)}")
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.models.split(","):
        model = MODELS[name](args.smoke)
        if args.methods != ["adamw"]:
            mesh = mesh_of(max(args.devices))
            print(f"\n{curvax.kron_placement(model.layout, mesh, min_size=16)}")
        results[name] = rows_of(model, args)
        scaling = "strong" if args.strong else "weak"
        report(f"{name}, for each device, {scaling} scaling", results[name])
    write_json(args.json, results)


if __name__ == "__main__":
    main()
