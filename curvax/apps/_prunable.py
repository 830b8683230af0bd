"""Which weights pruning and quantization change unless they are told otherwise."""

from __future__ import annotations

from jaxtyping import Array


def kernels(path: str, leaf: Array) -> bool:
    """Tell whether a leaf has two or more axes: kernels and embeddings, not biases or scales."""
    del path  # a predicate on leaves gets the path as well; this one needs the shape only
    return leaf.ndim >= 2
