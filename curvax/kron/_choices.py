"""Choices for leaves of params, for all of them or by path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias, TypeVar

T = TypeVar("T")

ByPath: TypeAlias = T | Mapping[str, T]
"""A choice for all leaves, or by path.

The longest key with which a leaf's path begins counts; "" begins all.
"""

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
"""Shapes of the leaves of params, by path."""


class Choice(NamedTuple):
    """What was chosen for a leaf.

    Attributes:
      key: the key by which it was chosen; "" where the choice is for all.
      value: the choice.
    """

    key: str
    value: Any


def by_key(name: str, choice: Any, shapes: Shapes) -> Mapping[str, Any]:
    """Return a choice as a dict by beginnings of paths; raise if no path begins with one."""
    choices = choice if isinstance(choice, Mapping) else {"": choice}
    for key in choices:
        # A key that no path begins with is a slip, which would otherwise choose nothing, unseen.
        if not any(path.startswith(key) for path in shapes):
            raise ValueError(
                f"{name}: no leaf's path begins with {key!r}; the paths are {', '.join(shapes)}."
            )
    return choices


def by_path(choices: Mapping[str, Any], shapes: Shapes, default: Any) -> Mapping[str, Choice]:
    """Resolve choices by beginnings of paths for every path."""
    resolved = {}
    for path in shapes:
        # A longer key names a smaller part of the tree, and so overrides the shorter ones.
        matching = [key for key in choices if path.startswith(key)]
        longest = max(matching, key=len, default=None)
        value = default if longest is None else choices[longest]
        resolved[path] = Choice(longest or "", value)
    return resolved


def check_positive(name: str, choices: Mapping[str, Any]) -> None:
    """Raise unless every choice is an integer of at least 1."""
    for value in choices.values():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}.")
