"""Losses on model outputs: value, curvature, sampled targets, pseudo-gradients.

A term is what the mean is taken over: a label for `softmax_cross_entropy`, a row of the leading axis for the other
losses, a position of the mask under `masked`. Losses *sum* over the components of a term and take the *mean* over terms.
"""

from curvax.losses.combine import masked as masked
from curvax.losses.combine import weighted_sum as weighted_sum
from curvax.losses.likelihoods import gaussian as gaussian
from curvax.losses.likelihoods import poisson as poisson
from curvax.losses.likelihoods import sigmoid_cross_entropy as sigmoid_cross_entropy
from curvax.losses.likelihoods import squared_error as squared_error
from curvax.losses.loss import Loss as Loss
from curvax.losses.loss import as_loss as as_loss
from curvax.losses.loss import from_function as from_function
from curvax.losses.loss import pseudo_gradient as pseudo_gradient
from curvax.losses.softmax import softmax_cross_entropy as softmax_cross_entropy
