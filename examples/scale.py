"""Train the transformer of `char_lm.py` on many devices, in one process or in several.

    python examples/scale.py                                   # K-FAC, data parallel, 8 devices
    python examples/scale.py --optimizer ekfac --sharding full # parameters sharded as well
    python examples/scale.py --sharding both                   # 4 x 2: tensor parallel in pairs
    python examples/scale.py --processes 2                     # two processes with 4 devices each
    python examples/scale.py --checkpoint out/scale            # save every ten steps, or
    python examples/scale.py --checkpoint out/scale --resume --devices 4   # go on with four
    python examples/scale.py --smoke                           # does it run? 10 seconds

Devices are those of the machine; without accelerators, the processor counts as eight. The matrices
of K-FAC and EK-FAC are spread over all of them by `curvax.kron_placement`; `--replicated` has them
on each. Nothing else differs from training on one device: the same losses come out, whatever the
layout is, and after a restart on other devices. On a cluster, every host runs the program itself:
leave out `--processes`, and call `jax.distributed.initialize()`. What a step computes and sends is
counted by `benchmarks/scale.py`.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from _common import print_table
from _compare import Task
from char_lm import Transformer, language_model, read_text
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import curvax

# --- where things are -----------------------------------------------------------------------------


def mesh_of(sharding: str, num_devices: int | None) -> Mesh:
    """All devices in a line, or in pairs over which single products are divided."""
    devices = jax.devices()[:num_devices]
    is_paired = sharding == "both" and len(devices) % 2 == 0
    sizes = (len(devices) // 2, 2) if is_paired else (len(devices), 1)
    types = (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(sizes, ("data", "model"), types, devices=devices)


def spread(mesh: Mesh, axes: tuple[str, ...], x: Any) -> NamedSharding:
    """Spread the longest side of an array that can be divided among so many devices."""
    number = math.prod(mesh.shape[axis] for axis in axes)
    divisible = [size if size % number == 0 else 0 for size in x.shape]
    spec: list[Any] = [None] * len(x.shape)
    if any(divisible):
        spec[int(np.argmax(divisible))] = axes
    return NamedSharding(mesh, P(*spec))


def place(mesh: Mesh, sharding: str, params: Any) -> Any:
    """Put parameters where they belong, of which every process has the same."""
    axes = {"data": (), "full": ("data", "model"), "both": ("model",)}[sharding]
    shardings = jax.tree.map(partial(spread, mesh, axes), params)
    return jax.device_put(jax.tree.map(np.asarray, params), shardings)


def batches(mesh: Mesh, task: Task, size: int, seed: int, start: int) -> Iterator[Any]:
    """Yield global batches from step `start` on, of which each process reads its rows."""
    here, number = jax.process_index(), jax.process_count()
    data = jax.tree.map(np.asarray, task.train)
    for step in itertools.count(start):
        # A number of the step, so that whoever goes on from there has the same rows.
        rows = np.random.default_rng((seed, step)).integers(len(data[0]), size=size)
        local = rows.reshape(number, -1)[here]
        yield jax.tree.map(partial(global_rows, mesh, local), data)


def global_rows(mesh: Mesh, local: np.ndarray, data: np.ndarray) -> jax.Array:
    """Rows of all processes, of which this one has its share."""
    return jax.make_array_from_process_local_data(NamedSharding(mesh, P("data")), data[local])


# --- the optimizers -------------------------------------------------------------------------------


def of_placement(one_liner: Callable[..., Any], rate: float, task: Task, placement: Any) -> Any:
    """K-FAC or EK-FAC; their curvature and inverses get rarer in the first steps."""
    return one_liner(
        rate,
        task.objective,
        task.layout,
        curvature_every=2,
        inverse_every=10,
        placement=placement,
    )


OPTIMIZERS: dict[str, Callable[[Task, Any], optax.GradientTransformation]] = {
    "adamw": lambda task, _: optax.adamw(3e-3),
    "kfac": partial(of_placement, curvax.kfac, 0.03),
    "ekfac": partial(of_placement, curvax.ekfac, 0.03),
    "mfac": lambda task, _: curvax.mfac(1e-2, window_size=16),
}
PLACED = ("kfac", "ekfac")


def table(task: Task, mesh: Mesh, params: Any, placement: Any) -> None:
    """Print what a device holds of the state of every optimizer."""
    rows = []
    for name, build in OPTIMIZERS.items():
        single = math.nan
        for choice in (None, placement) if name in PLACED else (None,):
            tx = build(task, choice)
            shapes = jax.tree.leaves(jax.eval_shape(tx.init, params))
            shardings = jax.tree.leaves(curvax.state_shardings(tx, params))
            parts = [s.shard_shape(x.shape) for x, s in zip(shapes, shardings, strict=True)]
            here = sum(4e-6 * math.prod(shape) for shape in parts)
            if choice is None:
                single = sum(4e-6 * x.size for x in shapes)
            label = name if choice is None else f"{name}, placed"
            rows.append((label, f"{here:.3f}", f"{single:.3f}", f"{here * mesh.size / single:.2f}"))
    header = ("state", "MB on each", "MB on a single device", "each, in n-ths of that")
    print_table(f"{mesh.size} devices, {dict(mesh.shape)}", header, rows)


# --- checkpoints ----------------------------------------------------------------------------------


class Checkpoints:
    """Parameters and the state of the optimizer by step, in a form for any number of devices."""

    def __init__(self, folder: Path, mesh: Mesh, tx: Any, params: Any, placement: Any) -> None:
        options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager(folder.absolute(), options=options)
        # The stacks of owners depend on the number of devices, named blocks do not.
        unpack, pack = (
            partial(fn, placement) if placement is not None else lambda state: state
            for fn in (curvax.unpack_state, curvax.pack_state)
        )
        self.shapes = params, jax.eval_shape(lambda params: unpack(tx.init(params)), params)
        # No device should have to hold all that is saved.
        here = partial(spread, mesh, ("data", "model"))
        self.shardings = jax.tree.map(here, self.shapes)
        self.unpack = jax.jit(
            lambda params, state: (params, unpack(state)), out_shardings=self.shardings
        )
        param_shardings = jax.tree.map(lambda x: x.sharding, params)
        self.pack = jax.jit(
            lambda params, state: (params, pack(state)),
            out_shardings=(param_shardings, curvax.state_shardings(tx, params)),
        )

    def save(self, step: int, params: Any, state: Any) -> None:
        self.manager.save(step, args=ocp.args.StandardSave(self.unpack(params, state)))

    def restore(self) -> tuple[int, Any, Any] | None:
        """Return the latest step, parameters and state, if there are any."""
        step = self.manager.latest_step()
        if step is None:
            return None
        targets = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self.shapes,
            self.shardings,
        )
        saved = self.manager.restore(step, args=ocp.args.StandardRestore(targets))
        return step, *self.pack(*saved)


# --- training -------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """Train in this process, together with the others if there are any."""
    is_first = jax.process_index() == 0
    mesh = mesh_of(args.sharding, args.devices)
    model = Transformer(args.width, 2, 4, jnp.float32)
    task = language_model(read_text(args.data, 100_000), model, args.seed)
    params = place(mesh, args.sharding, task.params)
    placement = None
    if not args.replicated and args.optimizer in PLACED:
        # Owners are all devices; where rows are, is another matter.
        placement = curvax.kron_placement(
            task.layout, mesh, ("data", "model"), batch_axes=("data",), min_size=16
        )
    if is_first and placement is not None and not args.resume:
        print(placement)
        table(task, mesh, params, placement)
    tx = optax.with_extra_args_support(OPTIMIZERS[args.optimizer](task, placement))
    # A state that `jit` makes without being told where would be on one device.
    state = jax.jit(tx.init, out_shardings=curvax.state_shardings(tx, params))(params)

    start, checkpoints = 0, None
    if args.checkpoint is not None:
        checkpoints = Checkpoints(args.checkpoint, mesh, tx, params, placement)
        saved = checkpoints.restore() if args.resume else None
        start, params, state = saved or (start, params, state)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, state: Any, batch: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = jax.value_and_grad(task.objective)(params, batch)
        updates, state = tx.update(gradient, state, params, batch=batch)
        return optax.apply_updates(params, updates), state, loss

    steps = range(start, args.steps)
    rows = batches(mesh, task, args.batch, args.seed, start)
    with jax.set_mesh(mesh), tqdm(steps, disable=None if is_first else True, leave=False) as bar:
        for i, batch in zip(bar, rows, strict=False):
            params, state, loss = step(params, state, batch)
            if is_first:
                bar.write(f"step {i + 1:4}  loss {float(loss):.7f}", file=sys.stdout)
                sys.stdout.flush()
            if checkpoints is not None and (i + 1) % args.every == 0:
                checkpoints.save(i + 1, params, state)


def start_processes(args: argparse.Namespace) -> int:
    """Start this program again in several processes, and wait; if one fails, all end."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, *sys.argv, "--port", str(port), "--process"]
    processes = [subprocess.Popen([*command, str(i)]) for i in range(args.processes)]
    try:
        while any(process.poll() is None for process in processes):
            if any(process.poll() for process in processes):
                return 1
            time.sleep(0.1)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return max(process.returncode for process in processes)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    flags.add_argument("--optimizer", choices=list(OPTIMIZERS), default="kfac")
    flags.add_argument("--sharding", choices=("data", "full", "both"), default="data")
    flags.add_argument("--replicated", action="store_true", help="all of K-FAC on every device")
    flags.add_argument("--devices", type=int, help="how many, of all processes; default: all")
    flags.add_argument("--processes", type=int, default=1, help="started on this machine")
    flags.add_argument("--checkpoint", type=Path, help="a folder to save in")
    flags.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    flags.add_argument("--resume", action="store_true", help="go on from the latest checkpoint")
    flags.add_argument("--steps", type=int, default=50)
    flags.add_argument("--batch", type=int, default=32, help="sequences in a global batch")
    flags.add_argument("--width", type=int, default=64)
    flags.add_argument("--data", type=Path, help="a text file; default: Python's own sources")
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--smoke", action="store_true", help="four steps of a tiny model")
    flags.add_argument("--process", type=int, help=argparse.SUPPRESS)
    flags.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = flags.parse_args()
    if args.resume and args.checkpoint is None:
        flags.error("--resume: from where? Give --checkpoint FOLDER")
    if (args.devices or 8) % args.processes:
        flags.error("--devices: each of the processes has as many; give a multiple of their number")
    if args.smoke:
        args.steps, args.width, args.batch = 4, 16, 16
        # Compiled fast rather than well. A flag that XLA does not know would end the program.
        emitters = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""
        os.environ.setdefault("XLA_FLAGS", f"--xla_backend_optimization_level=0 {emitters}")
    if args.processes > 1 and args.process is None:
        raise SystemExit(start_processes(args))
    # Host devices, where there are no others; for accelerators this changes nothing.
    jax.config.update("jax_num_cpu_devices", (args.devices or 8) // args.processes)
    if args.process is not None:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{args.port}", args.processes, args.process)
    train(args)


if __name__ == "__main__":
    main()
