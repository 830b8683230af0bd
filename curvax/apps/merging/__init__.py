"""One model from several that were trained from one start: averages weighted by curvature."""

from curvax.apps.merging._merge import MergeInfo, merge
from curvax.apps.merging._methods import merge_layout

__all__ = ["MergeInfo", "merge", "merge_layout"]
