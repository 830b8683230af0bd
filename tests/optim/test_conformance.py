"""Every optimizer in every optax wrapper. Adding an optimizer is adding a row to `OPTIMIZERS`.

A test that cannot apply to a row is left out by a property of the row, see `rows_that`.
"""

import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from example_rule import scale_by_eigen_sign
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax.optim import EigenBlockState
from curvax.solve import Dense, EigenDecomposition


def model(params, x):
    return jnp.tanh(x @ params["a"]["w"] + params["a"]["b"]) @ params["c"]


OBJECTIVE = curvax.Objective(model, curvax.losses.softmax_cross_entropy())
PARAMS = {
    "a": {"w": 0.5 * jax.random.normal(jax.random.key(0), (4, 8)), "b": jnp.zeros(8)},
    "c": 0.5 * jax.random.normal(jax.random.key(1), (8, 3)),
}
BATCH = (jax.random.normal(jax.random.key(2), (16, 4)), jnp.arange(16) % 3)


def mean(trees):
    return optax.tree.scale(0.5, optax.tree.add(*trees))


def mean_matvec(matvecs):
    return jax.tree_util.Partial(lambda pair, v: mean([matvec(v) for matvec in pair]), matvecs)


class Row(NamedTuple):
    """An optimizer: the one-liner `(learning_rate, objective, **options)`, its rule, what holds.

    The fields from `hyperparameter` on say which tests can apply.
    """

    build: Callable[..., Any]
    scale_by: Callable[..., Any]
    decay: str | None = None  # a decay rate of the rule
    averages: tuple[str, ...] = ()  # what the state holds in float32
    curvature: str = "curvature"  # the part of the state that changes with a refresh
    plain: tuple[Any, ...] = ()  # options that leave the rule and the learning rate alone
    more: tuple[Any, ...] = ()  # options that add `then` between the two
    then: Any = optax.identity()
    labels: Callable[[], Any] | None = None  # groups for optax.partition
    hyperparameter: str | None = "damping"  # one that may be injected or scheduled
    estimator: Callable[..., Any] | None = None  # None: a rule on gradients alone
    keeps: bool = True  # its curvature over steps; else it solves with that of every step
    draws: bool = False  # random numbers, in the estimator
    waits: bool = True  # for the first curvature; else it steps with the gradients so far
    masks: bool = True  # it acts on any part of params; else its solve is of all together
    rate: float | None = -0.02  # the factor of its rule's step; None: it searches its step itself
    combine: Callable[..., Any] | None = mean  # curvatures of two micro-batches, where that can be
    continuous: bool = True  # its step, so that another order of sums changes little
    ignores_value: bool = True  # the loss; else its step depends on the `value=` of an update
    diagonal: bool = False  # its state is a tree like params, and it is cheap enough op by op


def hessian_diagonal(params, batch, key):
    return curvax.hutchinson_diagonal(curvax.hvp(OBJECTIVE, params, batch), params, key).mean


def sampled_diagonal(params, batch, key):
    return curvax.gauss_newton_bartlett(OBJECTIVE, params, batch, key)


def by_leaf():
    return {"a": {"w": "rule", "b": "adam"}, "c": "rule"}


def by_block():
    return {"a": "rule", "c": "adam"}


DIAGONAL = {
    "decay": "b2",
    "averages": ("mu", "curvature"),
    "plain": (("weight_decay", 0.0),),
    "more": (("weight_decay", 0.01),),
    "then": optax.add_decayed_weights(0.01),
    "draws": True,
    "labels": by_leaf,
    "diagonal": True,
}
LAYOUT = curvax.kron_layout(OBJECTIVE, PARAMS, BATCH)
KRON = {
    "decay": "decay",
    "averages": ("curvature", "block_state"),
    "plain": (("momentum", 0.0), ("max_kl", None)),
    "more": (("momentum", 0.5), ("max_kl", None)),
    "then": optax.trace(0.5),
    "labels": by_block,
    "draws": True,
}
ON_MATRICES = {"averages": ("blocks",), "keeps": False, "waits": False}
SOLVES = {"keeps": False, "masks": False}


def factors(params, batch, key):
    return curvax.kron_factors(OBJECTIVE, LAYOUT, params, batch, key)


def eigen_curvature(params, batch, key):
    return curvax.kron.eigen_curvature(OBJECTIVE, LAYOUT, params, batch, key)


def hessian(params, batch, key):
    return curvax.hvp(OBJECTIVE, params, batch)


def dense_hessian(params, batch, key):
    return Dense(curvax.to_dense(curvax.hvp(OBJECTIVE, params, batch), params))


def of_layout(build):
    """The one-liner with that interval from the first step on, where its own would begin with 1."""

    def built(rate, objective, curvature_every=1, **options):
        number = curvature_every
        if isinstance(number, jax.Array) or (isinstance(number, int) and number > 1):
            curvature_every = lambda count: number
        options = {"damping": 0.3} | options
        return build(rate, objective, LAYOUT, curvature_every=curvature_every, **options)

    return built


def gradients(params, batch, key):
    rows = curvax.per_example_grads(OBJECTIVE, params, batch)
    # Signs change the window, and no product with it.
    signs = jax.random.rademacher(key, (len(batch[1]),), jnp.float32)
    return jax.tree.map(lambda x: signs.reshape(-1, *[1] * (x.ndim - 1)) * x, rows)


def windowed(rate, objective, curvature_every=1, seed=0, momentum=None, damping=0.1):
    window = curvax.estimating(
        curvax.scale_by_mfac(16, damping, "count", "leaf"), gradients, curvature_every, seed
    )
    momentum = [] if momentum is None else [optax.trace(momentum)]
    return optax.chain(window, *momentum, optax.scale_by_learning_rate(rate))


def solving(build, damping=0.3):
    """A one-liner that has no interval and no seed, for it estimates exactly and in every step."""
    return lambda rate, objective, curvature_every=1, seed=0, **options: build(
        rate, objective, **{"damping": damping} | options
    )


def lazy(rate, objective, seed=0, **options):
    return curvax.lazy_newton(rate, objective, **{"damping": 0.3} | options)


def searching(rate, objective, seed=0, **options):
    return curvax.gradient_regularized_newton(objective, **options)


# Near the hard case a step is as ill-conditioned as `(H + M r / 2 I)^-1`, so M begins large.
def with_cubic_term(rate, objective, seed=0, **options):
    return curvax.cubic_newton(objective, regularization=300.0, **options)


def in_krylov_space(rate, objective, curvature_every=1, seed=0, **options):
    return curvax.krylov_descent(objective, order=4, **options)


def with_one_rate(build):
    """A one-liner whose fallback has the rate of the matrices, and which averages no curvature."""

    def built(rate, objective, curvature_every=1, seed=0, **options):
        return build(rate, layout=LAYOUT, fallback_learning_rate=rate, **options)

    return built


def with_inputs(rate, objective, curvature_every=1, seed=0, **options):
    # A schedule, since the one-liner would begin with an interval of one step.
    interval = 1 if curvature_every == 1 else lambda count: curvature_every
    options = {"fallback_learning_rate": rate, "curvature_every": interval} | options
    return curvax.optim.newton_muon(rate, objective, LAYOUT, inverse_every=1, **options)


def input_factors(params, batch, key):
    return curvax.kron.input_factors(OBJECTIVE, LAYOUT, params, batch, key)


def on_gradients(rate, objective, curvature_every=1, seed=0, **options):
    return optax.chain(scale_by_eigen_sign(LAYOUT, **options), optax.scale_by_learning_rate(rate))


def mean_vectors(params, batch, key):
    return curvax.kron.mean_vectors(OBJECTIVE, LAYOUT, params, batch)


def rank_one(rate, objective, curvature_every=1, seed=0, **options):
    number = curvature_every
    if isinstance(number, jax.Array) or (isinstance(number, int) and number > 1):
        curvature_every = lambda count: number
    # Steps are as long as gradients, which here are short.
    tx = curvax.optim.mkor(10.0, objective, LAYOUT, curvature_every, **options)
    return optax.chain(tx, optax.scale_by_learning_rate(rate, flip_sign=False))


def with_oasis_rate(rate, objective, **options):
    return curvax.oasis_auto(objective, num_first=1, first_rate=rate, **options)


def with_length_by_loss(rate, objective, curvature_every=1, seed=0, **options):
    return curvax.sania(objective, curvax.optim.scale_by_adam_sqr(**options))


def quasi_newton(rate, objective, curvature_every=1, seed=0):
    return curvax.optim.ssbroyden(objective)


def of_matrices(build, rule, rate, **options):
    """A row of a rule on the gradients' matrices, by a one-liner that needs no objective."""

    def built(learning_rate, objective, curvature_every=1, seed=0, **more):
        # In Adam's units, where other rows have those of a curvature.
        tx = build(rate, LAYOUT, refresh_every=curvature_every, **options, **more)
        return optax.chain(tx, optax.scale_by_learning_rate(learning_rate, flip_sign=False))

    return Row(
        build=built,
        scale_by=functools.partial(rule, LAYOUT),
        averages=("blocks",),
        hyperparameter="b1",
        keeps=False,
        waits=False,
        decay="b1",
        rate=-0.02 * rate,
        # First gradients are of low rank; rounding decides what is beside their rows and columns.
        # tests/optim/test_matrix_rules.py has eight devices with gradients of full rank.
        continuous=False,
    )


OPTIMIZERS = {
    "adahessian": Row(
        build=curvax.adahessian,
        scale_by=curvax.scale_by_adahessian,
        estimator=hessian_diagonal,
        hyperparameter="b1",
        **DIAGONAL,
    ),
    "sophia_h": Row(
        build=curvax.sophia_h,
        scale_by=functools.partial(curvax.scale_by_sophia, gamma=0.01),
        estimator=hessian_diagonal,
        hyperparameter="gamma",
        **DIAGONAL,
    ),
    "sophia_g": Row(
        build=curvax.sophia_g,
        scale_by=curvax.scale_by_sophia,
        estimator=sampled_diagonal,
        hyperparameter="gamma",
        **DIAGONAL,
    ),
    "oasis": Row(
        # At interval 1 the first curvature is that of one probe, as the tests' estimator gives it.
        build=functools.partial(curvax.oasis, num_first=1),
        scale_by=curvax.scale_by_oasis,
        estimator=hessian_diagonal,
        hyperparameter="alpha",
        **DIAGONAL
        | {
            "averages": ("curvature",),
            "plain": (("momentum", 0.0), ("max_kl", None)),
            "more": (("momentum", 0.5), ("max_kl", None)),
            "then": optax.trace(0.5),
        },
    ),
    "oasis_auto": Row(
        build=with_oasis_rate,
        scale_by=functools.partial(curvax.optim.scale_by_oasis_auto, OBJECTIVE, first_rate=0.02),
        estimator=hessian_diagonal,
        decay="b2",
        averages=("curvature",),
        hyperparameter=None,
        draws=True,
        masks=False,
        rate=None,
    ),
    # With the rule of its default; it is a wrapper around any of the other rows' rules.
    "sania": Row(
        build=with_length_by_loss,
        scale_by=curvax.optim.scale_by_adam_sqr,
        decay="b2",
        averages=("nu",),
        hyperparameter=None,
        keeps=False,
        waits=False,
        rate=None,
        ignores_value=False,
    ),
    "kfac": Row(
        build=of_layout(curvax.kfac),
        scale_by=functools.partial(curvax.scale_by_kfac, LAYOUT, 0.3),
        estimator=factors,
        **KRON,
    ),
    "ekfac": Row(
        build=of_layout(curvax.ekfac),
        scale_by=functools.partial(curvax.scale_by_ekfac, LAYOUT, 0.3),
        estimator=eigen_curvature,
        **KRON,
        combine=lambda curvatures: curvax.kron.merge(*curvatures),
    ),
    # With a window of the batch's gradients, one by one; test_mfac.py has that over steps.
    "mfac": Row(
        build=windowed,
        scale_by=functools.partial(curvax.scale_by_mfac, 16, 0.1, "count", "leaf"),
        estimator=gradients,
        averages=("curvature",),
        labels=by_leaf,
        more=(("momentum", 0.5),),
        then=optax.trace(0.5),
        # Of each batch every other row, as many as one batch has.
        combine=lambda curvatures: jax.tree.map(lambda *x: jnp.concatenate(x)[::2], *curvatures),
        draws=True,
        waits=False,
    ),
    "gauss_newton": Row(
        build=solving(functools.partial(curvax.gauss_newton, tol=1e-6)),
        scale_by=functools.partial(
            curvax.scale_by_newton, functools.partial(curvax.cg, tol=1e-6, max_steps=50), 0.3
        ),
        estimator=lambda params, batch, key: curvax.ggnvp(OBJECTIVE, params, batch),
        combine=mean_matvec,
        **SOLVES,
    ),
    # The smallest eigenvalue of H is -0.45, so this damping makes it definite; test_newton.py has
    # the case in which it is not.
    "newton_cg": Row(
        build=solving(functools.partial(curvax.newton_cg, tol=1e-6), damping=0.5),
        scale_by=functools.partial(
            curvax.scale_by_newton, functools.partial(curvax.cg, tol=1e-6, max_steps=50), 0.5
        ),
        estimator=hessian,
        combine=mean_matvec,
        **SOLVES,
    ),
    "saddle_free_newton": Row(
        build=solving(functools.partial(curvax.saddle_free_newton, num_steps=8)),
        scale_by=functools.partial(
            curvax.scale_by_newton,
            functools.partial(curvax.spectra.absolute_krylov, num_steps=8),
            0.3,
        ),
        estimator=hessian,
        combine=mean_matvec,
        **SOLVES,
    ),
    "egn": Row(
        build=solving(curvax.egn),
        scale_by=functools.partial(curvax.scale_by_newton, curvax.solve.direct, 0.3),
        estimator=lambda params, batch, key: curvax.solve.sample_space(OBJECTIVE, params, batch),
        combine=None,  # the space of one batch's examples
        **SOLVES,
    ),
    "spring": Row(
        build=solving(functools.partial(curvax.spring, momentum=0.5)),
        scale_by=functools.partial(curvax.scale_by_spring, 0.3, 0.5),
        estimator=lambda params, batch, key: curvax.solve.sample_space(OBJECTIVE, params, batch),
        averages=("direction",),
        combine=None,  # the space of one batch's examples
        **SOLVES,
    ),
    "lazy_newton": Row(
        build=lazy,
        scale_by=functools.partial(curvax.scale_by_lazy_newton, 0.3),
        estimator=dense_hessian,
        averages=("curvature",),
        masks=False,
    ),
    "gradient_regularized_newton": Row(
        build=searching,
        scale_by=functools.partial(curvax.scale_by_gradient_regularized_newton, OBJECTIVE),
        estimator=dense_hessian,
        averages=("curvature",),
        hyperparameter=None,
        masks=False,
        rate=None,
    ),
    "cubic_newton": Row(
        build=with_cubic_term,
        scale_by=functools.partial(curvax.scale_by_cubic_newton, OBJECTIVE, 300.0),
        estimator=dense_hessian,
        averages=("curvature",),
        hyperparameter=None,
        masks=False,
        rate=None,
    ),
    "krylov_descent": Row(
        build=in_krylov_space,
        scale_by=functools.partial(curvax.scale_by_krylov_descent, OBJECTIVE, order=4),
        estimator=hessian,
        combine=mean_matvec,
        hyperparameter=None,
        rate=None,
        **SOLVES,
    ),
    "muon": Row(
        build=with_one_rate(curvax.optim.muon),
        scale_by=functools.partial(curvax.optim.scale_by_muon, LAYOUT),
        decay="b",
        hyperparameter="b",
        **ON_MATRICES,
    ),
    "newton_muon": Row(
        build=with_inputs,
        scale_by=functools.partial(curvax.optim.scale_by_newton_muon, LAYOUT, refresh_every=1),
        estimator=input_factors,
        decay="decay",
        labels=by_block,
        more=(("weight_decay", 0.01),),
        then=optax.add_decayed_weights(0.01),
        **ON_MATRICES,
    ),
    "fismo": Row(
        build=with_one_rate(curvax.optim.fismo),
        scale_by=functools.partial(curvax.optim.scale_by_fismo, LAYOUT),
        decay="decay",
        **ON_MATRICES,
    ),
    "eigen_sign": Row(
        build=on_gradients,
        scale_by=functools.partial(scale_by_eigen_sign, LAYOUT),
        averages=("momentum", "left", "right"),
        hyperparameter="b1",
        keeps=False,
        waits=False,
        continuous=False,  # another order of sums, and with it rounding, decides signs near zero
    ),
    "mkor": Row(
        build=rank_one,
        scale_by=functools.partial(curvax.optim.scale_by_mkor, LAYOUT),
        estimator=mean_vectors,
        **KRON
        | {
            "averages": ("blocks",),
            "curvature": "blocks",
            "plain": (("momentum", 0.0),),
            "more": (("momentum", 0.5),),
            "hyperparameter": "decay",
            "draws": False,
            "rate": -0.2,
        },
    ),
    "ssbroyden": Row(
        build=quasi_newton,
        scale_by=curvax.optim.scale_by_ssbroyden,
        averages=("inverse", "gradient"),
        hyperparameter=None,
        keeps=False,
        waits=False,
        masks=False,
        rate=None,
    ),
    "shampoo": of_matrices(curvax.shampoo, curvax.scale_by_shampoo, 2.5),
    "asgo": of_matrices(curvax.asgo, curvax.scale_by_asgo, 10.0),
    "soap": of_matrices(curvax.soap, curvax.scale_by_soap, 2.5),
    "kl_shampoo": of_matrices(curvax.kl_shampoo, curvax.scale_by_kl_shampoo, 2.5),
    "kl_soap": of_matrices(curvax.kl_soap, curvax.scale_by_kl_soap, 2.5),
    "psgd": of_matrices(
        lambda rate, layout, **options: curvax.psgd(rate, None, layout, **options),
        curvax.scale_by_psgd,
        1.0,
    ),
}


def rows_that(*properties):
    """Parametrize a test by the rows that have all these properties, which are fields of `Row`."""
    chosen = {
        name: row
        for name, row in OPTIMIZERS.items()
        if all(getattr(row, property) for property in properties)
    }
    return pytest.mark.parametrize("row", chosen.values(), ids=chosen)


every_optimizer = rows_that()


@jax.jit
def gradient(params=PARAMS, batch=BATCH):
    return jax.grad(OBJECTIVE)(params, batch)


def step_with(tx, **extra):
    """A training step `(params, state, batch) -> (params, state)`."""

    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params, batch=batch, **extra)
        return optax.apply_updates(params, updates), state

    return step


@functools.cache
def compiled(row, every=1):
    """The optimizer with that interval, and its compiled step; shared by the tests."""
    tx = row.build(0.02, OBJECTIVE, curvature_every=every)
    return tx, jax.jit(step_with(tx))


@functools.cache
def updating(row):
    """The optimizer without momentum or decay, compiled: `(grads, state, params, batch) ->`."""
    tx = row.build(0.02, OBJECTIVE, **dict(row.plain))
    return tx, jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))


@functools.cache
def passing(row):
    """The update of `updating` with a curvature as data: `(grads, state, curvature) ->`."""
    tx, _ = updating(row)
    return jax.jit(lambda g, s, c: tx.update(g, s, PARAMS, curvature=c, batch=BATCH))


@functools.cache
def ruling(row):
    """The rule, and its compiled `(grads, state, curvature) -> (updates, state)`."""
    rule = row.scale_by()
    return rule, jax.jit(lambda g, s, c: rule.update(g, s, PARAMS, curvature=c, batch=BATCH))


@functools.cache
def estimating(row):
    """The compiled estimator; of a rule on gradients, none."""
    return (lambda params, batch, key: None) if row.estimator is None else jax.jit(row.estimator)


def train(step, tx, num_steps=7, params=PARAMS, batch=BATCH):
    carry = params, tx.init(params)
    for _ in range(num_steps):
        carry = step(*carry, batch)
    return carry


def same(a, b, rtol=2e-5, atol=1e-6):
    """Compare trees; not eigenvectors, whose signs (and more) are arbitrary."""
    is_piece = lambda x: isinstance(x, EigenBlockState | EigenDecomposition)
    settled = lambda tree: jax.tree.map(
        lambda x: None if is_piece(x) else x, tree, is_leaf=is_piece
    )
    chex.assert_trees_all_close(settled(a), settled(b), rtol=rtol, atol=atol)


@every_optimizer
def test_jit_equals_eager_traces_once_and_learns(row):
    tx, step = compiled(row, 3)
    params, state = train(step, tx, 30)
    types = [
        jax.tree.map(jax.typeof, carry) for carry in ((PARAMS, tx.init(PARAMS)), (params, state))
    ]
    assert types[0] == types[1]  # and so jit has nothing to trace again
    assert OBJECTIVE(params, BATCH) < 0.8 * OBJECTIVE(PARAMS, BATCH)
    # Of the others, the docstring examples run op by op, which takes as long as compiling.
    if row.diagonal:
        same(train(step, tx, 2), train(step_with(tx), tx, 2))
    assert optax.tree.get(state, "num_nonfinite") == 0


@every_optimizer
def test_donated_buffers(row):
    """`init` gives fresh buffers, each its own: params and state can be donated together."""
    tx, _ = compiled(row)
    arrays = jax.tree.leaves((PARAMS, tx.init(PARAMS)))
    assert len({x.unsafe_buffer_pointer() for x in arrays if x.size}) == len(arrays)


@rows_that("keeps")  # of the others, nothing is refreshed
def test_refreshes_only_when_due_and_before_the_first_use(row):
    tx, step = compiled(row, 3)
    carry, held = (PARAMS, tx.init(PARAMS)), []
    for _ in range(7):
        before = carry[0]
        carry = step(*carry, BATCH)
        assert optax.tree.norm(optax.tree.sub(carry[0], before)) > 0
        held.append(
            np.concatenate(
                [x.ravel() for x in jax.tree.leaves(optax.tree.get(carry[1], row.curvature))]
            )
        )
    changed = [bool((a != b).any()) for a, b in itertools.pairwise(held)]
    assert held[0].any() and changed == [False, False, True, False, False, True]
    text = lambda every: str(
        jax.make_jaxpr(step_with(row.build(0.1, OBJECTIVE, curvature_every=every)))(*carry, BATCH)
    )
    assert "cond[" in text(2) and "cond[" not in text(1)


@rows_that("estimator")
def test_is_the_rule_with_its_estimator_in_a_chain(row):
    every = 3 if row.keeps else 1
    chained = optax.chain(
        optax.clip_by_global_norm(0.1),
        curvax.estimating(row.scale_by(), row.estimator, curvature_every=every, seed=5),
        row.then,
        optax.identity() if row.rate is None else optax.scale(row.rate),
    )
    params = train(jax.jit(step_with(chained)), chained)[0]
    one_liner = optax.chain(
        optax.clip_by_global_norm(0.1),
        row.build(0.02, OBJECTIVE, curvature_every=every, seed=5, **dict(row.more)),
    )
    same(params, train(jax.jit(step_with(one_liner)), one_liner)[0])


@rows_that("estimator")
def test_curvature_as_data(row):
    """Rule and one-liner with a curvature passed equal the one-liner that estimates it."""
    tx, update = updating(row)
    expected, _ = update(gradient(), tx.init(PARAMS), PARAMS, BATCH)
    curvature = estimating(row)(PARAMS, BATCH, jax.random.fold_in(jax.random.key(0), 0))
    given, _ = passing(row)(gradient(), tx.init(PARAMS), curvature)
    same(given, expected)
    rule, apply = ruling(row)
    direction, _ = apply(gradient(), rule.init(PARAMS), curvature)
    same(optax.tree.scale(row.rate or 1.0, direction), expected)


@rows_that("keeps")  # tests/optim/test_newton.py has the error of those that need one in every step
def test_without_curvature_it_goes_on_with_the_last_one(row):
    curvature = estimating(row)(PARAMS, BATCH, jax.random.fold_in(jax.random.key(0), 0))
    rule, apply = ruling(row)
    _, state = apply(gradient(), rule.init(PARAMS), curvature)
    again, later = apply(gradient(), state, None)
    assert optax.tree.norm(again) > 0
    same(getattr(later, row.curvature), getattr(state, row.curvature))


@rows_that("keeps", "waits")  # the others have the gradients so far to step with
def test_updates_are_zero_before_the_first_curvature(row):
    rule, apply = ruling(row)
    nothing_yet, _ = apply(gradient(), rule.init(PARAMS), None)
    assert optax.tree.norm(nothing_yet) == 0


@rows_that("estimator", "masks")
def test_masked_needs_the_whole_model_and_leaves_the_rest(row):
    tx, _ = updating(row)
    masked = optax.masked(tx, {"a": True, "c": False})
    state = masked.init(PARAMS)
    with pytest.raises(ValueError, match=r"params\['c'\] is masked out.*model_params=params"):
        masked.update(gradient(), state, PARAMS, batch=BATCH)
    step = jax.jit(lambda g, s, p, b: masked.update(g, s, p, batch=b, model_params=p))
    updates, state = step(gradient(), state, PARAMS, BATCH)
    same(updates["c"], gradient()["c"])
    same(updates["a"], updating(row)[1](gradient(), tx.init(PARAMS), PARAMS, BATCH)[0]["a"])
    assert not any(
        x.shape == PARAMS["c"].shape for x in jax.tree.leaves(state)
    )  # no state for what is masked


@rows_that("estimator", "masks")
def test_partition_inside_estimating(row):
    groups = {"rule": row.scale_by(), "adam": optax.scale_by_adam()}
    labels = row.labels()
    tx = curvax.estimating(optax.partition(groups, labels), row.estimator, curvature_every=2)
    step = jax.jit(lambda g, s, p, b: tx.update(g, s, p, batch=b))
    updates, state = step(gradient(), tx.init(PARAMS), PARAMS, BATCH)
    whole, update = updating(row)
    expected = optax.tree.scale(
        1 / row.rate, update(gradient(), whole.init(PARAMS), PARAMS, BATCH)[0]
    )  # without its rate
    adam = optax.scale_by_adam()
    of_adam = adam.update(gradient(), adam.init(PARAMS))[0]
    spread = jax.tree.broadcast(labels, PARAMS)
    same(
        updates,
        jax.tree.map(lambda group, a, b: a if group == "rule" else b, spread, expected, of_adam),
    )
    step(gradient(), state, PARAMS, BATCH)


@rows_that("estimator", "combine")
def test_multisteps_with_averaged_curvature(row):
    """The recipe: MultiSteps averages gradients, the caller curvature."""
    tx, _ = updating(row)
    ms = optax.MultiSteps(tx, every_k_schedule=2)
    chained = optax.chain(
        optax.identity(), optax.GradientTransformationExtraArgs(ms.init, ms.update)
    )
    # Micro-batches of the size of the batch, so that what is compiled for it serves them.
    micro = [BATCH, (BATCH[0][::-1] + 1, BATCH[1])]
    grads = [gradient(batch=batch) for batch in micro]
    curvatures = [
        estimating(row)(PARAMS, batch, jax.random.key(i)) for i, batch in enumerate(micro)
    ]
    update = jax.jit(lambda g, s, p, c: chained.update(g, s, p, curvature=c, batch=BATCH))
    state = chained.init(PARAMS)
    updates, state = update(grads[0], state, PARAMS, curvatures[0])
    assert optax.tree.norm(updates) == 0
    updates, state = update(grads[1], state, PARAMS, row.combine(curvatures))
    expected, _ = passing(row)(mean(grads), tx.init(PARAMS), row.combine(curvatures))
    same(updates, expected)
    # and with batch= the estimate is that of the last micro-batch, as MultiSteps shows it
    with_batch = lambda g, s, p, b: chained.update(g, s, p, batch=b)
    updates, _ = jax.eval_shape(with_batch, grads[0], state, PARAMS, micro[0])
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, PARAMS)


@rows_that("hyperparameter")  # gamma of a search is the first radius, read by init alone
def test_inject_hyperparams(row):
    build = lambda learning_rate, other: row.build(
        learning_rate, OBJECTIVE, **dict(row.plain), **{row.hyperparameter: other}
    )
    injected = optax.inject_hyperparams(build)(learning_rate=0.02, other=0.5)
    plain, step = build(0.02, 0.5), jax.jit(step_with(injected))
    same(train(step, injected, 3)[0], train(jax.jit(step_with(plain)), plain, 3)[0])
    state = injected.init(PARAMS)
    doubled = state._replace(hyperparams={**state.hyperparams, "learning_rate": jnp.array(0.04)})
    moved = lambda state: optax.tree.sub(step(PARAMS, state, BATCH)[0], PARAMS)
    same(moved(doubled), optax.tree.scale(2.0, moved(state)))


@rows_that("keeps")
def test_inject_the_interval(row):
    traced = optax.inject_hyperparams(
        lambda every: row.build(0.02, OBJECTIVE, curvature_every=every)
    )(every=3)
    fixed, step = compiled(row, 3)
    same(train(jax.jit(step_with(traced)), traced, 5)[0], train(step, fixed, 5)[0])


@rows_that("rate", "continuous")
def test_schedules(row):
    """A rate that halves after one step: the second step is half of that at constant rate."""
    falling = row.build(
        optax.piecewise_constant_schedule(0.02, {1: 0.5}), OBJECTIVE, **dict(row.plain)
    )
    update = jax.jit(lambda s: falling.update(gradient(), s, PARAMS, batch=BATCH))
    one, state = update(falling.init(PARAMS))
    two, _ = update(state)
    constant, step = updating(row)
    expected_one, state = step(gradient(), constant.init(PARAMS), PARAMS, BATCH)
    expected_two, _ = step(gradient(), state, PARAMS, BATCH)
    same((one, two), (expected_one, optax.tree.scale(0.5, expected_two)))


def poison(tree):
    """The tree with one entry that is infinite."""
    leaves, structure = jax.tree.flatten(tree)
    bad = leaves[0].at[(0,) * leaves[0].ndim].set(jnp.inf)
    return jax.tree.unflatten(structure, [bad, *leaves[1:]])


@every_optimizer
def test_non_finite_gradient_leaves_the_last_good_state(row):
    rule, update = ruling(row)
    curvature = estimating(row)(PARAMS, BATCH, jax.random.key(0))
    _, good = update(gradient(), rule.init(PARAMS), curvature)
    emitted, after = update(poison(gradient()), good, curvature)
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(emitted))
    chex.assert_trees_all_equal(after._replace(info=None), good._replace(info=None))
    assert after.info.num_nonfinite == 1


@rows_that("keeps")  # tests/solve has those of a solver
def test_non_finite_curvature_leaves_the_last_good_one(row):
    rule, update = ruling(row)
    curvature = estimating(row)(PARAMS, BATCH, jax.random.key(0))
    _, good = update(gradient(), rule.init(PARAMS), curvature)
    stepped, after = update(gradient(), good, poison(curvature))
    chex.assert_tree_all_finite(stepped)
    assert optax.tree.norm(stepped) > 0
    same(getattr(after, row.curvature), getattr(good, row.curvature))
    assert after.info.num_nonfinite == 1 and after.num_refreshes == good.num_refreshes
    never = update(gradient(), rule.init(PARAMS), poison(curvature))[0]
    assert optax.tree.norm(never) == 0  # no curvature is known yet


@every_optimizer
def test_apply_if_finite(row):
    tx = optax.apply_if_finite(row.build(0.02, OBJECTIVE), max_consecutive_errors=3)
    update = jax.jit(lambda g, s: tx.update(g, s, PARAMS, batch=BATCH))
    _, state = update(gradient(), tx.init(PARAMS))
    updates, rejected = update(optax.tree.full_like(PARAMS, jnp.nan), state)
    assert optax.tree.norm(updates) == 0 and rejected.notfinite_count == 1
    chex.assert_trees_all_equal(rejected.inner_state, state.inner_state)


@functools.cache
def three_members(row):
    """Params and states of members with seeds of their own, and their compiled step."""
    seeds = jnp.arange(3, dtype=jnp.uint32)
    build = lambda seed: row.build(0.02, OBJECTIVE, curvature_every=3, seed=seed)
    params = jax.tree.map(lambda p: p + 0.1 * jnp.arange(3.0).reshape(-1, *(1,) * p.ndim), PARAMS)
    state = jax.vmap(lambda seed, p: build(seed).init(p))(seeds, params)
    step = jax.jit(jax.vmap(step_with(compiled(row, 3)[0]), in_axes=(0, 0, None)))
    return params, state, step.lower(params, state, BATCH).compile()


@rows_that("keeps")  # the others have no refresh that could be conditional
def test_vmap_over_members_with_their_own_seeds(row):
    build = lambda seed: row.build(0.02, OBJECTIVE, curvature_every=3, seed=seed)
    params, state, step = three_members(row)
    assert "conditional(" in step.as_text()
    carry = params, state
    for _ in range(5):
        carry = step(*carry, BATCH)
    for i in range(3):
        alone = jax.tree.map(lambda p, i=i: p[i], params)
        start = (
            alone,
            build(i).init(alone),
        )  # the seed is in the state: one compiled step serves all members
        expected = functools.reduce(
            lambda carry, _: compiled(row, 3)[1](*carry, BATCH), range(5), start
        )
        same(jax.tree.map(lambda x, i=i: x[i], carry), expected)
    seen = jax.tree.leaves(optax.tree.get(carry[1], row.curvature))
    assert any(not np.allclose(x[0], x[1]) for x in seen)


@rows_that("keeps")
def test_vmapped_members_out_of_step_refresh_each_in_its_own_time(row):
    tx, step = compiled(row, 3)
    states = [optax.tree.set(train(step, tx, 1)[1], count=jnp.int32(n)) for n in range(3)]
    carries = [(PARAMS, state) for state in states]
    got = three_members(row)[2](*jax.tree.map(lambda *x: jnp.stack(x), *carries), BATCH)
    for i, carry in enumerate(carries):
        same(jax.tree.map(lambda x, i=i: x[i], got), step(*carry, BATCH))
    refreshes = optax.tree.get(got[1], "num_refreshes")
    assert refreshes.tolist() == [2, 1, 1]


@every_optimizer
def test_scan_over_steps(row):
    tx, step = compiled(row, 3)
    body = lambda carry, _: (step_with(tx)(*carry, BATCH), None)
    carry, _ = jax.jit(lambda c: jax.lax.scan(body, c, length=7))((PARAMS, tx.init(PARAMS)))
    same(carry, train(step, tx, 7))


@rows_that("continuous")
def test_eight_devices_equal_one(row):
    eight_devices_equal_one(row, AxisType.Auto)


@rows_that("continuous")
def test_eight_devices_with_explicit_sharding_equal_one(row):
    eight_devices_equal_one(row, AxisType.Explicit)


def eight_devices_equal_one(row, axis_type):
    """Sharded batch and, where the compiler places the work, sharded params too; in float64.

    Another order of sums moves a solve in float32 by 4e-5, more than a mistake need move it.
    """
    with jax.enable_x64(True):
        on_eight_devices(row, axis_type)


@functools.cache
def five_steps(row):
    """Five steps as one program: alone they would be compiled once more for a state that moved."""
    step = step_with(compiled(row, 3)[0])

    def run(params, state, batch):
        body = lambda carry, _: (step(*carry, batch), None)
        return jax.lax.scan(body, (params, state), length=5)[0]

    return jax.jit(run)


def on_eight_devices(row, axis_type):
    in_float64 = lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x
    params_of_one, batch_of_one = jax.tree.map(in_float64, (PARAMS, BATCH))
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    spec = ("model",) if axis_type == AxisType.Auto else ()
    params = {
        "a": {
            "w": put(params_of_one["a"]["w"], None, *spec),
            "b": put(params_of_one["a"]["b"]),
        },
        "c": put(params_of_one["c"], *spec),
    }
    batch = jax.tree.map(lambda x: put(x, "data"), batch_of_one)
    tx, _ = compiled(row, 3)
    run = five_steps(row)
    got = run(params, tx.init(params), batch)
    same(got, run(params_of_one, tx.init(params_of_one), batch_of_one), rtol=1e-8, atol=1e-10)
    if axis_type == AxisType.Auto and row.diagonal:
        # The state of a sharded leaf is sharded as the leaf is.
        held = optax.tree.get(got[1], "curvature")["a"]["w"]
        assert held.sharding.is_equivalent_to(params["a"]["w"].sharding, held.ndim)


@every_optimizer
def test_bfloat16_params_with_float32_state(row):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    batch = BATCH[0].astype(jnp.bfloat16), BATCH[1]
    tx = row.build(0.02, OBJECTIVE, curvature_every=2)
    carry = train(jax.jit(step_with(tx)), tx, 30, params=params, batch=batch)
    assert {p.dtype for p in jax.tree.leaves(carry[0])} == {jnp.dtype(jnp.bfloat16)}
    for name in row.averages:
        held = [x.dtype for x in jax.tree.leaves(optax.tree.get(carry[1], name))]
        assert {x for x in held if jnp.issubdtype(x, jnp.floating)} == {jnp.dtype(jnp.float32)}
    assert OBJECTIVE(carry[0], batch) < 0.9 * OBJECTIVE(params, batch)


@rows_that("decay")
def test_decay_rates_that_arrive_in_bfloat16_are_refused_with_the_way_out(row):
    """They would round to 1."""
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    build = lambda decay: row.scale_by(**{row.decay: decay})
    coarse = optax.inject_hyperparams(build)(decay=0.999)
    with pytest.raises(
        TypeError, match=rf"{row.decay} arrives as bfloat16.*hyperparam_dtype=jnp.float32"
    ):
        coarse.update(params, coarse.init(params), params)
    optax.inject_hyperparams(build, hyperparam_dtype=jnp.float32)(decay=0.999).init(params)


@every_optimizer
def test_checkpoint_round_trip_continues_bitwise(row, tmp_path):
    tx, step = compiled(row, 3)
    carry = train(step, tx, 4)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "step4", carry)
        checkpointer.wait_until_finished()
        like = jax.tree.map(ocp.utils.to_shape_dtype_struct, (PARAMS, tx.init(PARAMS)))
        restored = checkpointer.restore(tmp_path / "step4", like)
    chex.assert_trees_all_equal(restored, carry)
    for _ in range(4):
        carry, restored = step(*carry, BATCH), step(*restored, BATCH)
    chex.assert_trees_all_equal(restored, carry)


class Hidden(nnx.Module):
    def __init__(self):
        self.w, self.b = nnx.Param(PARAMS["a"]["w"]), nnx.Param(PARAMS["a"]["b"])


class Net(nnx.Module):
    """The params as a module."""

    def __init__(self):
        self.a, self.c = Hidden(), nnx.Param(PARAMS["c"])


@every_optimizer
def test_in_nnx_optimizer(row):
    """Flax shows `init` arrays in boxes, and `update` the arrays: other paths, and other trees."""

    @nnx.jit
    def step(net, optimizer):
        params = nnx.state(net, nnx.Param)
        optimizer.update(net, jax.grad(OBJECTIVE)(params, BATCH), batch=BATCH)

    def train():
        net = Net()
        optimizer = nnx.Optimizer(net, row.build(0.02, OBJECTIVE), wrt=nnx.Param)
        step(net, optimizer)
        return nnx.to_pure_dict(nnx.state(net, nnx.Param)), optimizer.opt_state

    params, _ = jax.eval_shape(train)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, PARAMS)


@rows_that("estimator")
def test_in_a_train_state(row):
    tx = row.build(0.02, OBJECTIVE)
    state = TrainState.create(apply_fn=model, params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match=r"needs.*TrainState.apply_gradients.*examples/loops"):
        state.apply_gradients(grads=gradient())

    def step(state):
        grads = gradient(state.params)
        updates, opt_state = state.tx.update(grads, state.opt_state, state.params, batch=BATCH)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state)

    types = jax.tree.map(jax.typeof, (state.params, state.opt_state))
    after = jax.eval_shape(step, state)
    assert jax.tree.map(jax.typeof, (after.params, after.opt_state)) == types


@every_optimizer
def test_unknown_extra_arguments_are_ignored(row):
    tx, _ = compiled(row)
    extra = {"other": "x"} | ({"value": 1.0} if row.ignores_value else {})

    def program(**extra):
        jaxpr = jax.make_jaxpr(step_with(tx, **extra))(PARAMS, tx.init(PARAMS), BATCH)
        return re.sub("0x[0-9a-f]+", "", str(jaxpr))  # where functions lie in memory

    assert program(**extra) == program()
    rule = row.scale_by()
    curvature = estimating(row)(PARAMS, BATCH, jax.random.key(0))
    apply = lambda g, s, c: rule.update(g, s, PARAMS, curvature=c, batch=BATCH, value=1.0)
    jax.eval_shape(apply, gradient(), rule.init(PARAMS), curvature)


@every_optimizer
def test_state_holds_plain_arrays(row):
    state = row.build(0.02, OBJECTIVE).init(PARAMS)
    assert all(
        isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        for x in jax.tree.leaves(state)
    )


@rows_that("draws")
def test_the_seed_decides_the_draws(row):
    tx = row.build(0.02, OBJECTIVE, seed=1)
    state = tx.init(PARAMS)
    assert optax.tree.get(state, "seed").dtype == jnp.uint32
    update = lambda seed: compiled(row)[1](
        PARAMS, optax.tree.set(state, seed=jnp.uint32(seed)), BATCH
    )
    first, again, other = (optax.tree.get(update(seed)[1], "curvature") for seed in (1, 1, 2))
    chex.assert_trees_all_equal(first, again)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True)
    assert any(not np.allclose(a, b) for a, b in pairs)


@rows_that("estimator")  # a layout alone knows only that the params are others
def test_errors_of_params(row):
    tx = row.build(0.02, OBJECTIVE)
    with pytest.raises(
        TypeError, match=r"params must hold float arrays: got int32\[2\] at params\['n'\]"
    ):
        tx.init({"n": jnp.zeros(2, int)})
    with pytest.raises(ValueError, match="empty pytree"):
        tx.init({})


@rows_that("estimator")
def test_errors_say_what_and_where(row):
    tx = row.build(0.02, OBJECTIVE)
    state, grads = tx.init(PARAMS), gradient()
    with pytest.raises(
        ValueError, match=r"needs the batch: tx.update\(grads, state, params, batch=batch\)"
    ):
        tx.update(grads, state, PARAMS)
    with pytest.raises(
        ValueError, match=r"needs params: tx.update\(grads, state, params, batch=batch\)"
    ):
        tx.update(grads, state, batch=BATCH)
    with pytest.raises(
        TypeError, match=r"estimator must be a function \(params, batch, key\).*got 'hutchinson'"
    ):
        curvax.estimating(row.scale_by(), "hutchinson")
    with pytest.raises(ValueError, match="leading axes disagree"):
        tx.update(grads, state, PARAMS, batch=(BATCH[0], BATCH[1][:3]))


@rows_that("keeps")
def test_errors_of_the_interval(row):
    for every in (0, np.int64(0)):
        with pytest.raises(ValueError, match=r"curvature_every must lie in \[1, .*got 0"):
            row.build(0.02, OBJECTIVE, curvature_every=every)
    with pytest.raises(TypeError, match="curvature_every must be an integer"):
        row.build(0.02, OBJECTIVE, curvature_every=2.5)


def test_an_interval_may_be_a_schedule():
    """Of one step at first, then of three: refreshes in steps 0, 1, 2 and in those divided by 3."""
    row = OPTIMIZERS["sophia_g"]
    tx = row.build(0.02, OBJECTIVE, curvature_every=lambda count: jnp.where(count < 3, 1, 3))
    step = jax.jit(step_with(tx))
    carry, refreshes = (PARAMS, tx.init(PARAMS)), []
    for _ in range(8):
        carry = step(*carry, BATCH)
        refreshes.append(int(optax.tree.get(carry[1], "num_refreshes")))
    assert refreshes == [1, 2, 3, 4, 4, 4, 5, 5]


@rows_that("draws")
def test_errors_of_the_seed(row):
    for seed in (-1, 2**32):
        with pytest.raises(ValueError, match=r"seed must lie in \[0, 4294967295\], got"):
            row.build(0.02, OBJECTIVE, seed=seed)


@rows_that("decay")
def test_errors_of_the_decay(row):
    with pytest.raises(ValueError, match=rf"{row.decay} must lie in \[0, 1\), got 1"):
        row.scale_by(**{row.decay: 1.0})


@rows_that("diagonal")
def test_errors_of_diagonal_methods(row):
    tx = row.build(0.02, OBJECTIVE)
    state, grads = tx.init(PARAMS), gradient()
    with pytest.raises(
        ValueError, match=r"curvature has no leaf at \['a'\]\['b'\], where updates has float32\[8\]"
    ):
        tx.update(grads, state, PARAMS, curvature={"a": {"w": PARAMS["a"]["w"]}, "c": PARAMS["c"]})
    with pytest.raises(
        ValueError, match=r"curvature\['c'\] is float32\[3\], updates\['c'\] is float32\[8, 3\]"
    ):
        tx.update(grads, state, PARAMS, curvature={**PARAMS, "c": jnp.zeros(3)})
    with pytest.raises(
        TypeError, match=rf"{row.decay} must be a number, got a function.*inject_hyperparams"
    ):
        row.build(0.02, OBJECTIVE, **{row.decay: lambda count: 0.9})
    with pytest.raises(TypeError, match=r"curvature is an Estimate.*\.mean"):
        tx.update(grads, state, PARAMS, curvature=curvax.Estimate(grads, grads))
