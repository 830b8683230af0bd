"""A folder of saved passes, from which an interrupted fit resumes where it was."""

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
from curvax._checks import check_count, describe
from curvax._host import is_first_process, on_host, wait_for_all
from curvax._types import Batch, Params
from curvax._xla import with_auto_sharding
from curvax.kron._layout import Layout, named_leaves

FACTS = "fit.json"
"""The file of a folder that says which fit the folder belongs to."""


class Position(NamedTuple):
    """How far a pass has come in the data.

    Attributes:
      batches: the number of batches that have been added.
      examples: the number of examples in these batches.
      digest: a checksum of these batches in their order; 0 if nothing is saved.
      begin: the checksum of the first batch.
      complete: whether the pass has reached the end of the data.
    """

    batches: int = 0
    examples: int = 0
    digest: int = 0
    begin: int = 0
    complete: bool = False

    def after(self, batch: Batch, *, with_digest: bool) -> Position:
        """Return the position after one more batch."""
        # Each batch's checksum starts from that of the batches before it, so that the same batches
        # in another order have another digest.
        digest = int(checksum(batch, np.uint32(self.digest))) if with_digest else 0
        return Position(
            batches=self.batches + 1,
            examples=self.examples + batch_size(batch),
            digest=digest,
            begin=self.begin or digest,
            complete=False,
        )


class Snapshot(NamedTuple):
    """The state of a pass, complete or not.

    Attributes:
      value: the sums over the batches so far, or the result of a pass without data.
      position: how far the pass has come in the data.
    """

    value: Any
    position: Position


class Saving(NamedTuple):
    """Where a fit is saved, and how often.

    Attributes:
      folder: the path of the folder.
      every: the number of batches between two saves.
    """

    folder: Path | str
    every: int = 100


class Store(NamedTuple):
    """The folder in which a fit saves its passes, each in a subfolder.

    Attributes:
      folder: the absolute path, or None if nothing is saved.
      save_every: the number of batches between two saves.
    """

    folder: Path | None
    save_every: int

    def read(self, name: str, like: PyTree[Any]) -> Snapshot | None:
        """Read a pass from its subfolder, or return None if the pass has not been saved.

        Args:
          name: the name of the pass.
          like: a tree with the containers, shapes and dtypes of the saved value.
        """
        if self.folder is None:
            return None
        is_saved = (self.folder / name).is_dir()
        # None may begin to save before all have seen what was saved before.
        wait_for_all(f"reading {name}")
        if not is_saved:
            return None
        args = _orbax().args
        leaves, structure = jax.tree.flatten(like)
        # orbax restores into arrays of NumPy, so that nothing is placed on a device that it names.
        templates = [np.zeros(leaf.shape, leaf.dtype) for leaf in leaves]
        sums = args.StandardRestore(_numbered(templates))
        parts = args.Composite(sums=sums, at=args.JsonRestore())
        with _manager(self.folder / name) as manager:
            step = manager.latest_step()
            if step is None:  # the process was killed before its first save was complete
                return None
            restored = manager.restore(step, args=parts)
        by_number = sorted(restored["sums"].items())
        arrays = [jnp.asarray(leaf) for _, leaf in by_number]
        value = jax.tree.unflatten(structure, arrays)
        return Snapshot(value, Position(**restored["at"]))

    def write(self, name: str, value: PyTree[Array], position: Position) -> None:
        """Save a pass in place of its last save; an interruption leaves one of the two intact.

        Of several processes the first one writes, and all wait for it.
        """
        if self.folder is None:
            return
        args = _orbax().args
        # Arrays of NumPy: orbax writes them once, however many processes call it.
        leaves = on_host(jax.tree.leaves(value))
        sums = args.StandardSave(_numbered(leaves))
        parts = args.Composite(sums=sums, at=args.JsonSave(position._asdict()))
        # Steps must increase: the end of a pass, after its last batch, is one step more.
        step = position.batches + position.complete
        with _manager(self.folder / name) as manager:
            manager.save(step, args=parts)


def as_saving(folder: Path | str | Saving | None) -> Saving | None:
    """Return a folder with how often it is saved to; a path alone gets the default."""
    if folder is None:
        return None
    saving = folder if isinstance(folder, Saving) else Saving(folder)
    check_count(1, every=saving.every)
    return saving


def open_store(saving: Saving | None, facts: Mapping[str, Any]) -> Store:
    """Open a folder for saving; an existing one must belong to a fit with the same facts.

    Raises:
      ValueError: the folder belongs to another fit.
    """
    if saving is None:
        return Store(folder=None, save_every=1)
    path = Path(saving.folder).absolute()
    store = Store(path, saving.every)
    exists = (path / FACTS).exists()
    wait_for_all("looking for a folder")
    if exists:
        check_facts(read_facts(path), facts)
        return store
    if is_first_process():
        path.mkdir(parents=True, exist_ok=True)
        # A rename is atomic: a process that is killed here leaves no half-written facts behind.
        unfinished = path / f"{FACTS}.{os.getpid()}"
        unfinished.write_text(json.dumps(facts, indent=1))
        unfinished.replace(path / FACTS)
    wait_for_all("opening a folder")
    return store


def read_facts(folder: Path | str) -> dict[str, Any]:
    """Read which fit a folder belongs to.

    Raises:
      FileNotFoundError: the folder holds no fit.
      ValueError: the file is damaged.
    """
    path = Path(folder) / FACTS
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} holds no fit: there is no {FACTS}. fit(..., folder=...) makes one."
        )
    try:
        facts: dict[str, Any] = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is damaged ({error}); remove the folder, and fit again."
        ) from error
    return facts


def facts_of(layout: Layout, params: Params) -> dict[str, Any]:
    """Return what identifies a fit: leaves, blocks, and a checksum of the params' values."""
    leaves = {path: describe(leaf) for path, leaf in named_leaves(layout, params).items()}
    blocks = {}
    for block in layout.blocks:
        structures = f"{block.a_structure} x {block.g_structure}"
        # Only what is not the default is added, so that folders of earlier fits are still read.
        positions = ", all positions" if block.positions == "all" else ""
        # Arrays are saved by number: fits whose second pair stood the other way round are refused.
        second = ", second A x G" if block.has_second_product else ""
        sharing = f"{block.sharing}{positions}{second}"
        blocks[block.name] = f"{list(block.shape)} {structures}, {sharing}"
    outside = {leaf.path: leaf.outside or "" for leaf in layout.leaves}
    return {
        "leaves": leaves,
        "blocks": blocks,
        "outside": outside,
        "params": int(checksum(params)),
    }


def check_facts(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise at the first of the current facts that differs from the saved one."""
    for name, here in current.items():
        there = saved.get(name)
        if there == here:
            continue
        if isinstance(here, Mapping) and isinstance(there, Mapping):
            path = _first_difference(there, here)
            subject = f"{name}: {path}"
            there = there.get(path, "absent")
            here = here.get(path, "absent")
        elif name in ("params", "key"):
            subject = f"the values of {name}"
            there = f"checksum {there}"
            here = f"checksum {here}"
        else:
            subject = name
        raise ValueError(
            f"the folder holds a fit of something else; {subject} is {there} there, here {here}. "
            "Give what it was fitted with, or another folder."
        )


def _first_difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    return next(path for path in (*first, *second) if first.get(path) != second.get(path))


@jax.jit
def checksum(tree: PyTree, start: Any = 0) -> UInt[Array, ""]:
    """Return `31 * previous + sum_j (2j + 1) word_j` over the leaves' bits, modulo 2^32.

    Odd weights are invertible modulo 2^32, so that every change of a single word is seen.
    """

    def add_up(leaves: list[Array], total: Array) -> UInt[Array, ""]:
        for leaf in leaves:
            words = _words(leaf).ravel()
            # Integer addition is associative: the sum is the same on any number of devices.
            weights = 2 * jnp.arange(words.size, dtype=jnp.uint32) + 1
            total = 31 * total + jnp.sum(words * weights, dtype=jnp.uint32)
        return total

    leaves = [jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)]
    return with_auto_sharding(add_up, leaves, jnp.asarray(start, jnp.uint32))


def _words(x: Array) -> UInt[Array, "..."]:
    """Return the bits of an array of any dtype as unsigned 32-bit integers."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.asarray(jax.random.key_data(x), jnp.uint32)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.stack([_words(x.real), _words(x.imag)])
    # JAX does not reinterpret the bits of booleans, and takes 4-bit integers in pairs; their values
    # fit a word.
    is_integer = jnp.issubdtype(x.dtype, jnp.integer)
    if x.dtype == bool or (is_integer and jnp.iinfo(x.dtype).bits < 8):
        return x.astype(jnp.int32).astype(jnp.uint32)
    # A 64-bit number becomes two words, along a new last axis.
    unsigned = {1: jnp.uint8, 2: jnp.uint16}.get(x.dtype.itemsize, jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, unsigned)
    return bits.astype(jnp.uint32)


def _numbered(leaves: list[Any]) -> dict[str, Any]:
    # Leaves are saved by number in a flat dict: orbax need not know the containers.
    return {f"{number:06d}": leaf for number, leaf in enumerate(leaves)}


def _orbax() -> Any:
    # Imported only where something is saved: orbax is an optional dependency.
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise ImportError("passes are saved with orbax: pip install 'curvax[influence]'") from error
    return orbax.checkpoint


def _manager(folder: Path) -> Any:
    # Saves are synchronous: a pass goes on only when its save is complete.
    options = _orbax().CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    return _orbax().CheckpointManager(folder, options=options)
