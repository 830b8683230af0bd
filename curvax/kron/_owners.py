"""Devices that own parts of stacked arrays, as axes of a mesh."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

T = TypeVar("T")


@dataclass(frozen=True)
class Owners:
    """The devices that own slices, as axes of a mesh.

    Attributes:
      mesh: the mesh.
      axes: names of its axes over which slices are spread.
    """

    mesh: Mesh | AbstractMesh
    axes: tuple[str, ...]

    @property
    def number(self) -> int:
        """How many parts there are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def spec(self) -> PartitionSpec:
        """Leading axis of an array spread over the owners."""
        return PartitionSpec(self.axes)

    @property
    def mesh_here(self) -> Mesh | AbstractMesh:
        """The mesh as it is in this context, where axes may be those of the compiler for a time."""
        context = jax.sharding.get_abstract_mesh()
        if context.empty:
            return self.mesh
        for axis in self.axes:
            if context.shape.get(axis) != self.mesh.shape[axis]:
                raise ValueError(
                    f"the placement is for a mesh {dict(self.mesh.shape)}, and the mesh in context "
                    f"is {dict(context.shape)}: make a placement for it."
                )
        return context

    def spread(self, tree: T) -> T:
        """Place arrays on their owners, by their leading axis."""
        return self._placed(tree, self.spec)

    def everywhere(self, tree: T) -> T:
        """Place arrays on every device."""
        return self._placed(tree, PartitionSpec())

    def gathered(self, stacks: T, count: int) -> T:
        """Place stacks on every device, of which only the first `count` slices are not zero."""

        def gather(x: Array) -> Array:
            num_rows = self.few_rows(len(x), count)
            if num_rows is None:
                return self.everywhere(x)

            def of_owner(part: Array) -> Array:
                start = len(part) * lax.axis_index(self.axes)
                part = jnp.where(start < num_rows, part, 0)
                alone = jnp.zeros((num_rows, *part.shape[1:]), part.dtype)
                alone = lax.dynamic_update_slice_in_dim(alone, part, start, axis=0)
                return jnp.asarray(lax.psum(alone, self.axes))

            summed = self.each(of_owner, self.spec, PartitionSpec())(x)
            return pad_to(summed, *x.shape)

        result: T = jax.tree.map(gather, stacks)
        return result

    def few_rows(self, stack: int, count: int) -> int | None:
        """Return how many rows of a stack to sum over devices; None where most are in use.

        What is gathered or scattered is sent once, with the slices that are empty. A sum is sent
        twice, and only of the parts with some of the first `count` slices.
        """
        slots = stack // self.number
        num_rows = slots * math.ceil(count / slots)
        return num_rows if 2 * num_rows < stack else None

    def each(self, fn: Callable[..., T], in_specs: Any, out_specs: Any) -> Callable[..., T]:
        """Return `fn` as every device does it for itself, a `shard_map` over these axes."""
        placed: Callable[..., T] = jax.shard_map(
            fn,
            mesh=self.mesh_here,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=set(self.axes),
            check_vma=False,
        )
        return placed

    def _placed(self, tree: T, spec: PartitionSpec) -> T:
        sharding = NamedSharding(self.mesh_here, spec)
        types = dict(zip(sharding.mesh.axis_names, sharding.mesh.axis_types, strict=True))
        is_explicit = types[self.axes[0]] == AxisType.Explicit
        place = jax.sharding.reshard if is_explicit else lax.with_sharding_constraint
        placed: T = jax.tree.map(lambda x: place(x, sharding), tree)
        return placed


def pad_to(x: Array, *shape: int) -> Array:
    """Append zeros up to a shape."""
    missing = np.subtract(shape, x.shape)
    return jnp.pad(x, [(0, number) for number in missing])
