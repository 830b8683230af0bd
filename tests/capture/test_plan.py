"""A plan is a static fact of a model, made once; and it records what autodiff gives."""

import gc
import weakref

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import curvax
from curvax import capture
from curvax.kron._plan import layout_plan


class Counted:
    """A model with a gain in no kernel, that counts how often its Python runs."""

    def __init__(self, scale=1.0):
        self.traces = 0
        self.scale = scale

    def __call__(self, params, x):
        self.traces += 1
        h = jnp.tanh(x @ params["w1"] + params["b1"]) * params["gain"]
        return self.scale * h @ params["w2"]


def problem(model):
    params = {
        "w1": jnp.arange(12.0).reshape(4, 3) / 12,
        "b1": jnp.ones(3),
        "gain": jnp.arange(1.0, 4),
        "w2": jnp.eye(3, 2),
    }
    batch = jnp.arange(20.0).reshape(5, 4) / 20, jnp.zeros((5, 2))
    objective = curvax.Objective(model, curvax.losses.squared_error())
    return objective, params, batch, curvax.kron_layout(objective, params, batch)


@pytest.mark.parametrize("per_example", [False, True])
def test_a_plan_is_hashable_and_the_same_when_made_again(per_example):
    objective, params, batch, layout = problem(Counted())
    first, second = (
        layout_plan(objective, layout, params, batch[0], per_example) for _ in range(2)
    )
    assert first == second and hash(first) == hash(second)
    other = layout_plan(objective, layout, params, batch[0], not per_example)
    assert first != other
    assert first.leaves == ("['gain']",)
    assert [(name, len(uses)) for name, uses in first.uses] == [("['w1']", 1), ("['w2']", 1)]


def test_a_second_trace_of_a_step_does_not_run_the_model_again():
    model = Counted()
    objective, params, batch, layout = problem(model)
    key = jax.random.key(0)
    before = model.traces
    for fisher, traces in (("mc", 0), ("exact", 1)):  # by example, a batch of one is another shape
        for _ in range(2):
            jax.make_jaxpr(
                lambda p, fisher=fisher: curvax.kron_factors(
                    objective, layout, p, batch, key, fisher=fisher
                )
            )(params)
        assert model.traces == before + traces


def test_a_trace_under_other_settings_is_another():
    model = Counted()
    objective, params, batch, layout = problem(model)
    key = jax.random.key(0)
    before = model.traces
    with jax.default_matmul_precision("highest"):
        curvax.kron_factors(objective, layout, params, batch, key)
    assert model.traces == before + 1


def test_a_plan_refuses_another_program():
    objective, params, batch, layout = problem(Counted())
    planned = layout_plan(objective, layout, params, batch[0], per_example=False)
    with pytest.raises(ValueError, match=r"of another program: inputs was float32\[5,4\] there"):
        capture.record(planned, params, batch[0][:3])
    with pytest.raises(ValueError, match=r"of another model: it was made for params \['b1'\]"):
        capture.record(planned, {"w": params["w1"]}, batch[0])
    planned = layout_plan(objective, layout, params, batch[0], per_example=True)
    recorded = capture.record(planned, params, batch[0][:3])  # any number of rows
    assert recorded.outputs.shape == (3, 2)
    with pytest.raises(ValueError, match=r"inputs was float32\[1,4\] for one row there"):
        capture.record(planned, params, batch[0][:, :3])


@pytest.mark.parametrize("fisher", ["mc", "exact"])
def test_a_model_that_closes_over_traced_values_sees_each_of_them(fisher):
    """One function object, whose closure holds another tracer in every trace."""
    model = Counted()
    objective, params, batch, layout = problem(model)
    key = jax.random.key(0)

    def second_moment(scale):
        model.scale = scale
        factors = curvax.kron_factors(objective, layout, params, batch, key, fisher=fisher)
        return factors.blocks["['w1']"].g.total.sum()

    values = [jax.jit(lambda s, n=n: second_moment(s))(float(n)) for n in (1, 2)]
    if fisher == "exact":  # the curvature goes with the square of the scale
        np.testing.assert_allclose(values[1], 4 * values[0], rtol=1e-5)
    mapped = jax.vmap(second_moment)(jnp.array([1.0, 2.0]))
    np.testing.assert_allclose(mapped, values, rtol=1e-5)
    assert bool(jnp.isfinite(jax.grad(second_moment)(2.0)))


def test_no_tracer_leaks_from_a_model_that_is_made_inside_of_a_trace():
    _, params, batch, layout = problem(Counted())

    def second_moment(scale):
        objective = curvax.Objective(
            lambda p, x: Counted(scale)(p, x), curvax.losses.squared_error()
        )
        factors = curvax.kron_factors(objective, layout, params, batch, jax.random.key(0))
        return factors.blocks["['w1']"].g.total.sum()

    with jax.checking_leaks():
        for transformed in (jax.jit(second_moment), jax.jit(jax.grad(second_moment))):
            assert bool(jnp.isfinite(transformed(2.0)))


def test_neither_the_model_nor_its_arrays_are_kept():
    class Frozen:
        def __init__(self):
            self.array = jnp.ones((3, 3))

        def __call__(self, params, x):
            return x @ self.array @ params

    def use_once():
        model = Frozen()
        objective = curvax.Objective(model, curvax.losses.squared_error())
        params, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
        layout = curvax.kron_layout(objective, params, batch)
        key = jax.random.key(0)
        jax.jit(lambda p: curvax.kron_factors(objective, layout, p, batch, key))(params)
        return weakref.ref(model)

    gone = use_once()
    gc.collect()
    assert gone() is None


def test_aux_is_dead_code():
    """A bias that reaches aux alone, and aux that mixes the batch, change nothing."""

    def model(params, x):
        outputs = x @ params["w"]
        return outputs, {"mean": outputs.mean(axis=0), "square": params["b"] ** 2}

    objective = curvax.Objective(model, curvax.losses.squared_error(), has_aux=True)
    params, x = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, jnp.ones((4, 3))
    kernels, reasons = capture.find_kernels(objective, params, x)
    assert [str(kernel.view) for kernel in kernels] == ["['w']"] and not reasons
    planned = capture.plan(
        objective, params, x, {"w": next(iter(kernels))}, leaves=[], per_example=True
    )
    recorded = capture.record(planned, params, x)
    chex.assert_trees_all_close(recorded.outputs, model(params, x)[0])
    with pytest.raises(TypeError, match="must return"):
        broken = curvax.Objective(lambda p, x: x @ p["w"], objective.loss, has_aux=True)
        capture.find_kernels(broken, params, x)


def test_uncovered_entries():
    view = capture.leaf_view("w", (4, 3))
    rows = capture.View("slice", (2, 3), ((0, 2, 1), (0, 3, 1)), (view,))
    other = capture.leaf_view("v", (2, 3))
    joined = capture.View("concatenate", (4, 3), (0,), (other, rows))
    assert capture.uncovered("w", (4, 3), [view]).sum() == 0
    assert capture.uncovered("u", (4, 3), [view]).all()
    for views in ([rows], [joined], [other, joined]):
        mask = capture.uncovered("w", (4, 3), views)
        np.testing.assert_array_equal(mask, np.arange(12).reshape(4, 3) >= 6)
    assert not capture.uncovered("v", (2, 3), [joined]).any()
