"""Influence functions: which training examples made the model say this."""

from curvax.apps.influence._bm25 import Candidates, bm25
from curvax.apps.influence._fitting import Fitted, fit, load
from curvax.apps.influence._methods import mean_eigenvalues, of_window
from curvax.apps.influence._partition import partition
from curvax.apps.influence._queries import (
    Compression,
    Queries,
    QueryInfo,
    Summed,
    compress,
    precondition,
)
from curvax.apps.influence._scoring import Influence, TopK, influence, score, top_k
from curvax.apps.influence._self_influence import self_influence
from curvax.apps.influence._validation import (
    LeaveOneOut,
    leave_one_out,
    linear_datamodeling_score,
    random_subsets,
    retrain,
)

__all__ = [
    "Candidates",
    "Compression",
    "Fitted",
    "Influence",
    "LeaveOneOut",
    "Queries",
    "QueryInfo",
    "Summed",
    "TopK",
    "bm25",
    "compress",
    "fit",
    "influence",
    "leave_one_out",
    "linear_datamodeling_score",
    "load",
    "mean_eigenvalues",
    "of_window",
    "partition",
    "precondition",
    "random_subsets",
    "retrain",
    "score",
    "self_influence",
    "top_k",
]
