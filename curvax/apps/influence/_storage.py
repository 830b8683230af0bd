"""Passes over data that are saved as they go, so that one that was interrupted goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree, UInt

from curvax._batch import batch_size
from curvax._checks import describe
from curvax._trees import by_path
from curvax._types import Batch, Params
from curvax.kron._layout import Layout

FACTS = "fit.json"
"""What the passes of a folder are made of."""


class Position(NamedTuple):
    """How far a pass has come.

    Attributes:
      batches: that it has taken in.
      examples: that it has taken in.
      digest: of those batches, in order; 0 where nothing is saved.
      begin: that of the first batch.
      complete: whether it has come to the end.
    """

    batches: int = 0
    examples: int = 0
    digest: int = 0
    begin: int = 0
    complete: bool = False

    def after(self, batch: Batch, with_digest: bool) -> Position:
        """Return the position after one more batch."""
        digest = int(checksum(batch, np.uint32(self.digest))) if with_digest else 0
        return Position(
            self.batches + 1, self.examples + batch_size(batch), digest, self.begin or digest
        )


class Store(NamedTuple):
    """Where passes are saved, each in a folder of its own; nowhere if there is none.

    Attributes:
      folder: absolute path, or None.
      every: batches between saves.
    """

    folder: Path | None
    every: int

    def read(self, name: str, like: PyTree[Any]) -> tuple[PyTree[Array], Position] | None:
        """Return what is saved of a pass, in the containers of `like` (arrays or their shapes); None if nothing is."""
        if self.folder is None or not (self.folder / name).is_dir():
            return None
        with _manager(self.folder / name) as manager:
            step = manager.latest_step()
            if step is None:
                return None
            args, empty = _orbax().args, [np.zeros(x.shape, x.dtype) for x in jax.tree.leaves(like)]
            parts = {"sums": args.StandardRestore(_numbered(empty)), "at": args.JsonRestore()}
            found = manager.restore(step, args=args.Composite(**parts))
        arrays = [jnp.asarray(x) for _, x in sorted(found["sums"].items())]
        return jax.tree.unflatten(jax.tree.structure(like), arrays), Position(**found["at"])

    def write(self, name: str, sums: PyTree[Array], at: Position) -> None:
        """Save a pass in place of what was saved of it before; an interruption leaves one of both, whole."""
        if self.folder is None:
            return
        args = _orbax().args
        leaves = args.StandardSave(_numbered(jax.device_get(jax.tree.leaves(sums))))
        with _manager(self.folder / name) as manager:
            manager.save(
                at.batches + at.complete,
                args=args.Composite(sums=leaves, at=args.JsonSave(at._asdict())),
            )


def open_store(folder: Path | str | None, facts: Mapping[str, Any], every: int) -> Store:
    """Begin to save in a folder what is made of `facts`, or go on if it holds that.

    Raises:
      ValueError: a folder that holds something else.
    """
    if folder is None:
        return Store(None, every)
    path = Path(folder).absolute()
    if (path / FACTS).exists():
        check_facts(read_facts(path), facts)
    else:
        path.mkdir(parents=True, exist_ok=True)
        unfinished = path / f"{FACTS}.{os.getpid()}"
        unfinished.write_text(json.dumps(facts, indent=1))
        unfinished.replace(path / FACTS)
    return Store(path, every)


def read_facts(folder: Path | str) -> dict[str, Any]:
    """Return what a folder's passes are made of.

    Raises:
      FileNotFoundError: a folder without any.
    """
    path = Path(folder) / FACTS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no fit: there is no {FACTS}. fit(..., folder=...) makes one."
        )
    try:
        read: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove the folder, and fit again."
        ) from error
    return read


def facts_of(layout: Layout, params: Params) -> dict[str, Any]:
    """Return what a fit is made of: leaves, blocks, and a checksum of the values of params."""
    return {
        "leaves": {path: describe(x) for path, x in by_path(params).items()},
        "blocks": {
            b.name: f"{list(b.shape)} {b.a_structure} x {b.g_structure}, {b.sharing}"
            for b in layout.blocks
        },
        "outside": {leaf.path: leaf.outside or "" for leaf in layout.leaves},
        "params": int(checksum(params)),
    }


def check_facts(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless what was saved agrees with all of one's own facts, naming the first that differs."""
    for name in own:
        there, here = saved.get(name), own[name]
        if there == here:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            where = next(path for path in (*there, *here) if there.get(path) != here.get(path))
            name, there, here = (
                f"{name}: {where}",
                there.get(where, "absent"),
                here.get(where, "absent"),
            )
        elif name in ("params", "key"):
            name, there, here = f"the values of {name}", f"checksum {there}", f"checksum {here}"
        raise ValueError(
            f"the folder holds a fit of something else; {name} is {there} there, here {here}. "
            "Give what it was fitted with, or another folder."
        )


@jax.jit
def checksum(tree: PyTree, start: Any = 0) -> UInt[Array, ""]:
    """Add up the bits of all leaves, weighted by their place: the same on any number of devices."""
    total = jnp.asarray(start, jnp.uint32)
    for x in jax.tree.leaves(tree):
        words = _words(jnp.asarray(x)).ravel()
        total = 31 * total + jnp.sum(
            words * (2 * jnp.arange(words.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32
        )
    return total


def _words(x: Array) -> UInt[Array, "..."]:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.asarray(jax.random.key_data(x), jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)])
    if x.dtype == bool or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        return x.astype(jnp.int32).astype(jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    return {f"{i:06d}": x for i, x in enumerate(leaves)}


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("passes are saved with orbax: pip install 'curvax[influence]'") from error
    return orbax.checkpoint


def _manager(folder: Path) -> Any:
    options = _orbax().CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return _orbax().CheckpointManager(folder, options=options)
