"""Fits: interrupted and resumed, saved and read, merged, held fixed;
and what is told when something does not fit.
"""

import dataclasses
import functools
import json
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import losses
from curvax.apps import influence
from curvax.kron import Saving
from curvax.kron._storage import checksum

KEY = jax.random.key(7)


class Interrupted(Exception):
    pass


class Failing:
    """Batches that end in an exception after some, the n-th time that they are gone through."""

    def __init__(self, batches, after, time):
        self.batches, self.after, self.time = batches, after, time

    def __iter__(self):
        self.time -= 1
        for number, batch in enumerate(self.batches):
            if self.time == 0 and number == self.after:
                raise Interrupted
            yield batch


@functools.cache
def problem():
    model = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"] * p["scale"]
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    params = {"w": draw(3, 4), "b": draw(4), "v": draw(4, 2), "scale": draw(2)}
    objective = curvax.Objective(model, losses.softmax_cross_entropy())
    batches = [(draw(size, 3), jnp.asarray(rng.integers(0, 2, size))) for size in (4, 4, 4, 2)]
    return objective, params, batches, curvax.kron_layout(objective, params, batches[0])


def fit(batches=None, key=KEY, layout=None, params=None, **options):
    objective, own, data, found = problem()
    args = (
        objective,
        layout or found,
        own if params is None else params,
        data if batches is None else batches,
        key,
    )
    return influence.fit(*args, progress=False, **options)


@functools.cache
def whole(method="ekfac"):
    return fit(method=method)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize(("method", "time"), [("ekfac", 1), ("ekfac", 2), ("diagonal", 1)])
def test_a_resumed_fit_is_equal_in_every_bit(tmp_path, method, time, after):
    objective, params, batches, layout = problem()
    passes = {"ekfac": ("covariances", "eigenbases", "eigenvalues"), "diagonal": ("eigenvalues",)}[
        method
    ]
    options = {"method": method, "folder": Saving(tmp_path, 2)}
    with pytest.raises(Interrupted):
        fit(Failing(batches, after, time), **options)
    part = influence.load(tmp_path, objective, layout, params)
    assert part.missing == (passes if time == 1 else ("eigenvalues",))
    for use in (
        lambda: influence.influence(part, objective, params, batches[0], batches),
        lambda: influence.self_influence(part, objective, params, batches),
        lambda: influence.mean_eigenvalues(part),
    ):
        with pytest.raises(
            ValueError, match=f"the fit is not complete: .*{' and '.join(part.missing)} did not"
        ):
            use()
    resumed = fit(Failing(batches, 0, -1), **options)
    equal(resumed, whole(method))
    # what is complete is read, not made again; of the data the first batch is asked for
    equal(fit(batches[:1], **options), whole(method))
    with pytest.raises(
        ValueError, match=r"the pass over .* that is saved began with another batch"
    ):
        fit(batches[1:], **options)
    equal(influence.load(str(tmp_path), objective, layout, params), whole(method))


def test_a_process_that_is_killed_goes_on(tmp_path):
    """Killed without warning, in the second pass, after a save and a batch that was not saved."""
    program = textwrap.dedent("""
        import os, signal, sys
        sys.path[:0] = {path!r}
        import test_influence_fit as t
        class Killing:
            count = 0
            def __iter__(self):
                for batch in t.problem()[2]:
                    Killing.count += 1
                    if Killing.count == 8:
                        os.kill(os.getpid(), signal.SIGKILL)
                    yield batch
        t.fit(Killing(), folder=t.Saving({folder!r}, 2))
    """).format(path=sys.path, folder=str(tmp_path))
    assert (
        subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    )
    objective, params, _, layout = problem()
    assert influence.load(tmp_path, objective, layout, params).missing == ("eigenvalues",)
    equal(fit(folder=Saving(tmp_path, 2)), whole())


def test_a_fit_is_resumed_with_what_it_was_begun_with_only(tmp_path):
    objective, params, batches, layout = problem()
    begun = functools.partial(fit, folder=Saving(tmp_path, 1))
    with pytest.raises(Interrupted):
        begun(Failing(batches, 3, 1))
    refused, facts = (
        lambda text: pytest.raises(ValueError, match=text),
        (tmp_path / "fit.json").read_text(),
    )
    with refused(r"the values of params is checksum \d+ there, here checksum"):
        begun(params=params | {"b": params["b"] + 1e-6})
    with refused("the values of key is checksum"):
        begun(key=jax.random.key(8))
    with refused("fisher is mc there, here exact"):
        begun(fisher="exact")
    with refused("method is ekfac there, here kfac"):
        begun(method="kfac")
    with refused(r"blocks: \['v'\] is \[1, 4, 2\] full x full, expand there, here absent"):
        begun(layout=layout.edit("['v']", kind="identity"))
    wider = params | {"scale": jnp.ones((1, 2))}
    with refused(r"leaves: \['scale'\] is float32\[2\] there, here float32\[1, 2\]"):
        begun(params=wider, layout=curvax.kron_layout(objective, wider, batches[0]))
    with refused("the pass over covariances that is saved began with another batch"):
        begun([batches[1], batches[0], *batches[2:]])
    again = (
        "was interrupted after 3 batches, 12 examples; "
        "the first 3 batches now are not the same, with 12 examples"
    )
    for changed in ([batches[0], batches[2], batches[1]], [batches[0], batches[2], batches[2]]):
        with refused(again):
            begun([*changed, batches[3]])
    with refused("found 2 batches where 3 were expected"):
        begun(batches[:2])
    with refused(r"the layout is of other params: \['b'\] is \[4\] there, in params \[5\]"):
        begun(params=params | {"b": jnp.ones(5)})
    with pytest.raises(FileNotFoundError, match="holds no fit"):
        influence.load(tmp_path / "elsewhere", objective, layout, params)
    with pytest.raises(Interrupted):
        begun(Failing(batches, 0, 2))
    for other in (batches[:3], [*batches[:2], batches[1], batches[3]]):
        with refused(
            "the pass over eigenvalues went through .* the one before through 14 in 4, "
            "or through others"
        ):
            begun(other)
        shutil.rmtree(tmp_path / "eigenvalues")
    equal(begun(), whole())
    (tmp_path / "fit.json").write_text("{")
    with refused("fit.json is damaged"):
        influence.load(tmp_path, objective, layout, params)
    (tmp_path / "fit.json").write_text(facts)
    assert json.loads((tmp_path / "fit.json").read_text())["method"] == "ekfac"


def test_checksums_see_every_bit_and_no_device():
    x = {
        "a": jnp.arange(8, dtype=jnp.float32),
        "k": KEY,
        "b": jnp.array([True, False]),
        "h": jnp.ones(3, jnp.bfloat16),
    }
    assert (
        checksum(x)
        == checksum(jax.tree.map(lambda x: x, x))
        == checksum(x | {"a": np.arange(8, dtype=np.float32)})
    )
    changed = (
        {"a": x["a"].at[3].set(3.0000002)},
        {"a": x["a"][::-1]},
        {"k": jax.random.key(8)},
        {"b": ~x["b"]},
    )
    for odd in (jnp.array([1 + 2j, 3]), jnp.array([1, -2], jnp.int4)):
        assert checksum(odd) == checksum(odd + 0) != checksum(odd.at[1].set(2))
    for change in (*changed, {"h": x["h"].at[0].set(1.01)}, {"h": x["h"].astype(jnp.float16)}):
        assert checksum(x | change) != checksum(x)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    assert checksum(x | {"a": jax.device_put(x["a"], spread)}) == checksum(x)


def test_leaves_held_fixed_take_no_part():
    """Neither those of a whole leaf, nor the rest of one, nor with curvature across leaves."""
    objective, params, batches, layout = problem()
    batch = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
    fixed = layout.edit("['v']", kind="identity").edit("['scale']", kind="identity")
    inner = {name: params[name] for name in ("w", "b")}
    smaller = curvax.Objective(lambda p, x: objective.model(params | p, x), objective.loss)
    own = curvax.kron_layout(smaller, inner, batch)
    solver = functools.partial(curvax.cg, tol=1e-6)
    make = lambda objective, layout, params: influence.fit(
        objective, layout, params, [batch], KEY, progress=False
    )
    fits = make(objective, fixed, params), make(smaller, own, inner)
    for method in ("ekfac", "kfac", "identity", solver, "mfac"):
        results = []
        for fitted, loss, p in zip(fits, (objective, smaller), (params, inner), strict=True):
            if method == "mfac":
                window = curvax.solve.window_of(curvax.per_example_grads(loss, p, batch))
                fitted = influence.of_window(fitted.layout, window, terms=14)
            damping = None if method == "identity" else 0.1
            options = {"damping": damping, "method": method}
            results.append(
                influence.influence(fitted, loss, p, batch, [batch], **options)[0].change_if_removed
            )
        np.testing.assert_allclose(*results, rtol=1e-4, atol=1e-5 * np.abs(results[1]).max())
        assert np.abs(results[0]).max() > 1e-3
    for fitted, loss, p in zip(fits, (objective, smaller), (params, inner), strict=True):
        results.append(influence.self_influence(fitted, loss, p, [batch]))
    np.testing.assert_allclose(*results[-2:], rtol=1e-4)


def test_a_part_of_a_leaf_may_be_held_fixed():
    objective = curvax.Objective(lambda w, x: x @ w[:, :2], losses.squared_error())
    params, batch = jnp.ones((3, 4)), (jnp.eye(3), jnp.zeros((3, 2)))
    for unmatched in ("identity", "diagonal"):
        layout = curvax.kron_layout(objective, params, batch, unmatched=unmatched)
        fitted = influence.fit(
            objective, layout, params, [batch], KEY, fisher="exact", progress=False
        )
        measure = lambda w, query: jnp.sum(w * query)
        result, _ = influence.influence(
            fitted,
            objective,
            params,
            jnp.ones((1, 1)),
            [batch],
            measurement=measure,
            damping=0.5,
            by="layer",
        )
        assert len(result.by_layer) == (1 if unmatched == "identity" else 2), result.by_layer
        # each row of the kernel has curvature 1/3, its gradient in both outputs is 1/3;
        # entries in no product have none
        np.testing.assert_allclose(
            result.change_if_removed, np.full((1, 3), 2 * (1 / 3) / (1 / 3 + 0.5)), rtol=1e-5
        )
        own = influence.self_influence(
            fitted, objective, params, [batch], damping=0.5
        )  # its own gradient: 1 in both
        np.testing.assert_allclose(own, np.full(3, 2 * (1 / 3) / (1 / 3 + 0.5)), rtol=1e-5)
        means = influence.mean_eigenvalues(
            fitted
        )  # the rest has no curvature, and gets that of the block
        assert len(means) == len(result.by_layer)
        jax.tree.map(
            lambda x: np.testing.assert_allclose(x, np.full(np.shape(x), 1 / 3), rtol=1e-5), means
        )


def test_each_pass_has_draws_of_its_own():
    """Eigenvalues that were measured on the draws that the basis was made of would be too large."""
    objective, params, batches, layout = problem()
    unsure = jax.tree.map(lambda x: 0.1 * x, params)
    fitted = fit([batches[0]], params=unsure)
    moments = lambda number: (
        curvax.kron.kron_moments(
            objective,
            layout,
            fitted.eigen.basis,
            unsure,
            batches[0],
            jax.random.fold_in(KEY, number),
        ).moments
    )
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, fitted.eigen.moments, moments(2))
    with pytest.raises(AssertionError):
        jax.tree.map(close, fitted.eigen.moments, moments(0))


def test_damping_of_each_block_is_a_tenth_of_its_mean_eigenvalue():
    objective, params, batches, _ = problem()
    means, (_, info) = (
        influence.mean_eigenvalues(whole()),
        influence.precondition(whole(), objective, params, batches[0]),
    )
    assert set(means) == {"['w']", "['v']", "['scale']"} == set(info.damping)
    for name, moments in whole().eigen.moments.items():
        np.testing.assert_allclose(means[name], [np.mean(moments.mean)], rtol=1e-5)
    np.testing.assert_allclose(
        means["['scale']"], np.mean(whole().eigen.diagonal["['scale']"].mean), rtol=1e-5
    )
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-6),
        info.damping,
        {k: 0.1 * x for k, x in means.items()},
    )
    # a block that the data never reach is damped as the largest
    dead = dataclasses.replace(
        whole(),
        eigen=whole().eigen._replace(moments=jax.tree.map(jnp.zeros_like, whole().eigen.moments)),
    )
    assert influence.mean_eigenvalues(dead)["['w']"] == means["['scale']"]


def test_errors_say_what_and_where():
    objective, params, batches, layout = problem()

    def run(
        fitted=None,
        measure=objective,
        params=params,
        queries=batches[0],
        train=batches,
        **options,
    ):
        return influence.influence(
            fitted or whole(), objective, params, queries, train, measurement=measure, **options
        )

    refused = lambda text, error=ValueError: pytest.raises(error, match=text)
    with refused(r"the layout is of other params: \['b'\] is \[4\] there, in params \[5\]"):
        run(params=params | {"b": jnp.ones(5)})
    with refused(r"the layout is of other params: the layout has a leaf \['b'\], params has not"):
        run(params={name: x for name, x in params.items() if name != "b"})
    with refused(r"layout is of another model"):
        other = curvax.Objective(
            lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] * p["scale"] + 0 * jnp.sum(p["b"]),
            objective.loss,
        )
        influence.influence(whole(), other, params, batches[0], batches, measurement=objective)
    with refused(
        "the measurement of one query, given as a batch of one, "
        r"must return a real scalar, got float32\[1, 2\]",
        TypeError,
    ):
        run(measure=lambda p, query: objective.outputs(p, query[0]))
    positive = {"['w']": jnp.ones(1), "['v']": 1.0, "['scale']": np.float32(1.0)}
    run(damping=positive)
    for damping in (
        0,
        -1.0,
        jnp.array(-0.5),
        positive | {"['v']": 0.0},
        positive | {"['w']": jnp.array([-1.0])},
    ):
        with refused("damping must be positive, got"):
            run(damping=damping)
        with refused("damping must be positive, got"):
            influence.self_influence(whole(), objective, params, batches, damping=damping)
    for damping in (jnp.ones(2), positive | {"['w']": jnp.ones(2)}):
        with refused(
            r"damping of \['w'\] must be of shape .* got float32\[2\]|damping of \['v'\] must be"
        ):
            run(damping=damping)
    with refused("curvature is zero everywhere, or not finite"):
        nothing = curvax.Objective(
            objective.model, curvax.losses.from_function(lambda f, y: 0 * jnp.mean(f))
        )
        flat = influence.fit(
            nothing, layout, params, batches, KEY, fisher="empirical", progress=False
        )
        influence.self_influence(flat, nothing, params, batches)
    for method in (None, "cg"):
        with refused("the fit is not complete: it does not hold what .* divides by"):
            run(dataclasses.replace(whole(), eigen=None), method=method)
    with refused("the layout holds every leaf fixed"):
        fixed = functools.reduce(
            lambda own, path: own.edit(path, kind="identity"),
            ("['w']", "['v']", "['scale']"),
            layout,
        )
        held = influence.fit(objective, fixed, params, batches, KEY, progress=False)
        influence.influence(held, objective, params, batches[0], batches)
    for function in (run, fit):
        with refused("microbatch must be at least 1, got 0"):
            function(microbatch=0)
    with refused(r"damping has no entry for \['v'\]"):
        run(damping={"['w']": 1.0})
    with refused(
        "unknown method 'lissa'; valid: 'ekfac', 'kfac', 'cg', 'identity', 'diagonal', 'mfac'"
    ):
        run(method="lissa")
    with refused(
        "a fit of 'ekfac' serves 'ekfac', 'kfac', 'cg', 'identity'; "
        "'diagonal' needs one of 'diagonal'"
    ):
        run(method="diagonal")
    with refused("self_influence goes by the methods .* got 'cg'"):
        influence.self_influence(whole(), objective, params, batches, method="cg")
    with refused("unknown by 'word'; valid: 'example', 'layer', 'token'"):
        run(by="word")
    with refused(
        'by="token": no block is used at each of the 3 positions of the second axis of the inputs'
    ):
        run(by="token")
    for function in (influence.influence, influence.top_k):
        with refused("train_batches is empty|batches is empty"):
            if function is influence.influence:
                run(train=[])
            else:
                influence.top_k(
                    influence.precondition(whole(), objective, params, batches[0])[0],
                    objective,
                    params,
                    [],
                    3,
                )
    with refused("rank must be at least 1, got 0"):
        influence.compress(influence.precondition(whole(), objective, params, batches[0])[0], 0)
    with refused("unknown method 'cg'; valid: 'ekfac', 'kfac', 'diagonal', 'identity'"):
        fit(method="cg")
    with refused("batches is an iterator .*, which can be gone through but once", TypeError):
        fit(iter(batches))
    with refused("found 0 batches where at least 1 were expected"):
        fit([])
    with refused("mixes examples"):
        mixed = curvax.Objective(lambda p, x: objective.model(p, x) - jnp.mean(x), objective.loss)
        influence.fit(mixed, layout, params, batches, KEY, progress=False)


def test_low_precision_params_are_scored_in_float32():
    objective, params, batches, _ = problem()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    low = [(x.astype(jnp.bfloat16), y) for x, y in batches]
    fitted = fit(low, params=half)
    assert {x.dtype for x in jax.tree.leaves((fitted.factors, fitted.eigen))} == {
        jnp.dtype(jnp.float32)
    }
    got, _ = influence.influence(fitted, objective, half, low[0], low, damping=0.1)
    want, _ = influence.influence(whole(), objective, params, batches[0], batches, damping=0.1)
    assert got.change_if_removed.dtype == jnp.float32
    error = np.linalg.norm(got.change_if_removed - want.change_if_removed) / np.linalg.norm(
        want.change_if_removed
    )
    assert 0 < error < 0.05
