"""Losses on model outputs: value, curvature, sampled targets, pseudo-gradients.

A term is what the mean is taken over: a label for `softmax_cross_entropy`, a row of the leading
axis for the other losses, a position of the mask under `masked`. Losses *sum* over the components
of a term and take the *mean* over terms. `curvax/objective.py` says how work on parts of a batch
adds up to that mean.

What to write for a loss that is not one of a model's outputs and targets
-------------------------------------------------------------------------

Each is a test of less than a hundred lines in `tests/recipes/`, which trains by K-FAC.

* ELBO (`test_vae.py`): the model returns a dict with the reconstruction and the code's mean and
  log-variance, its noise comes with the inputs; `weighted_sum` of a likelihood and `gaussian_kl`.
* flow, or any model of log densities (`test_flow.py`): `negative_log_density`; it has no
  Gauss-Newton matrix, so `fisher="empirical"`, or the same on draws from the model.
* contrastive (`test_contrastive.py`): the model returns a pair of embeddings; `contrastive`.
* preferences, DPO (`test_dpo.py`): the model returns the difference of log-ratios;
  `sigmoid_cross_entropy` with the target 1.
* PPO (`test_ppo.py`): `from_function` of the surrogate, with the curvature and the draws of
  `softmax_cross_entropy`, which are the policy's own Fisher; the critic is a head of a
  `weighted_sum`.
* GAN (`test_gan.py`): an objective and an optimizer for each network, the other network in the
  inputs as `curvax.Shared`.
* energy-based model (`test_energy.py`): `variance` of energies at draws from the model is the
  metric; the gradient is passed to `update` apart.
* wavefunction, stochastic reconfiguration (`examples/vmc.py`): `local_energy` is metric and
  gradient; the local energies are the targets.
* distillation (`test_distillation.py`): `from_function` of the cross-entropy with probabilities and
  a `sample` of labels, beside the labels' own in a `weighted_sum`.
* several heads with missing targets (`test_mixed.py`): `weighted_sum`, `masked`, `ignore_index`.
* parts with batches of their own, and penalties on params: `curvax.total`.

Where targets come from is a choice of the estimator, `fisher=`: drawn from the model ("mc"), their
expectation ("exact"), or those of the data, with products of gradients of examples ("empirical") or
of terms ("empirical_by_term"). All four have the same unit, that of the curvature of the mean loss:
at targets of the model the last two are the Fisher in expectation. So `damping` means the same
under each.
"""

from curvax.losses._combine import masked, weighted_sum
from curvax.losses._coupled import contrastive, variance
from curvax.losses._density import negative_log_density
from curvax.losses._energy import local_energy
from curvax.losses._gaussian import gaussian, gaussian_kl
from curvax.losses._likelihoods import poisson, sigmoid_cross_entropy, squared_error
from curvax.losses._loss import Loss, as_loss, from_function, pseudo_gradient
from curvax.losses._softmax import softmax_cross_entropy

__all__ = [
    "Loss",
    "as_loss",
    "contrastive",
    "from_function",
    "gaussian",
    "gaussian_kl",
    "local_energy",
    "masked",
    "negative_log_density",
    "poisson",
    "pseudo_gradient",
    "sigmoid_cross_entropy",
    "softmax_cross_entropy",
    "squared_error",
    "variance",
    "weighted_sum",
]
