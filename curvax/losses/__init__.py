"""Losses on model outputs: value, curvature, sampled targets, pseudo-gradients.

A term is what the mean is taken over: a label for `softmax_cross_entropy`, a row of the leading
axis for the other losses, a position of the mask under `masked`. Losses *sum* over the components
of a term and take the *mean* over terms. `curvax/objective.py` says how work on parts of a batch
adds up to that mean.
"""

from curvax.losses._combine import masked, weighted_sum
from curvax.losses._likelihoods import gaussian, poisson, sigmoid_cross_entropy, squared_error
from curvax.losses._loss import Loss, as_loss, from_function, pseudo_gradient
from curvax.losses._softmax import softmax_cross_entropy

__all__ = [
    "Loss",
    "as_loss",
    "from_function",
    "gaussian",
    "masked",
    "poisson",
    "pseudo_gradient",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "weighted_sum",
]
