"""Devices that own parts of stacked arrays, as axes of a mesh."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeVar

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

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
        return self.mesh if context.empty else context

    def spread(self, tree: T) -> T:
        """Place arrays on their owners, by their leading axis."""
        return self._placed(tree, self.spec)

    def everywhere(self, tree: T) -> T:
        """Place arrays on every device."""
        return self._placed(tree, PartitionSpec())

    def _placed(self, tree: T, spec: PartitionSpec) -> T:
        sharding = NamedSharding(self.mesh_here, spec)
        is_explicit = AxisType.Explicit in sharding.mesh.axis_types
        place = jax.sharding.reshard if is_explicit else lax.with_sharding_constraint
        placed: T = jax.tree.map(lambda x: place(x, sharding), tree)
        return placed
