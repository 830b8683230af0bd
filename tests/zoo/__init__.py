"""Tiny models: `CASES`, each a construct, and `ARCHITECTURES`, public models rebuilt."""

from zoo._architectures import ARCHITECTURES
from zoo._case import Case, normal
from zoo._constructs import CASES

__all__ = ["ARCHITECTURES", "CASES", "Case", "normal"]
