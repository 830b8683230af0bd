"""Products against dense matrices in float64, whole and in chunks.

Also that they are linear, differentiable, and pytrees.
"""

import collections
import functools

import chex
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from cases import CASES, SAMPLED, Mlp
from jax.experimental import io_callback
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax import losses
from curvax._batch import batch_size, with_index
from curvax.losses._shares import pseudo_gradient_by_example

pytestmark = pytest.mark.usefixtures("x64")

RAGGED = {2: 1, 4: 3, 5: 2, 7: 3}  # by batch size: chunks after which one example is left


def chunks(name):
    """Microbatches: whole, and chunks with a last one of one example.

    By one also where that example has nothing that counts.
    """
    ragged = RAGGED[batch_size(CASES[name]().batch)]
    return [None, ragged, *([1] if name.startswith("masked") or name == "multi_head" else [])]


def dense(product, objective, params, batch, **kwargs):
    return jax.jit(lambda p, b: curvax.to_dense(product(objective, p, b, **kwargs), p))(
        params, batch
    )


def all_dense(name, *variants):
    """Of each of some `(product, keywords)` of a case the dense matrix, all from one program."""
    objective, params, batch, _ = CASES[name]()
    every = lambda p, b: [
        curvax.to_dense(product(objective, p, b, **kwargs), p) for product, kwargs in variants
    ]
    return jax.jit(every)(params, batch)


@pytest.mark.parametrize("name", CASES)
def test_hvp_and_ggnvp_equal_dense_matrices(name):
    case = CASES[name]()
    H, G = oracle.hessian(case), oracle.of(name).ggn
    variants = [
        (product, {"microbatch": m}) for m in chunks(name) for product in (curvax.hvp, curvax.ggnvp)
    ]
    if name in ("mlp", "attention", "multi_head"):
        variants += [(curvax.hvp, {"mode": "rev_over_rev", "microbatch": 3})]
        variants += [(curvax.ggnvp, {"microbatch": 100})]  # larger than the batch
    for (product, _), got in zip(variants, all_dense(name, *variants), strict=True):
        np.testing.assert_allclose(
            got, {curvax.hvp: H, curvax.ggnvp: G}[product], rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("name", SAMPLED)
def test_fishervp_equals_outer_products_of_its_draws_whatever_the_chunks(name):
    case, key, matrices = CASES[name](), jax.random.key(3), oracle.of(name)
    targets, index = case.batch[1], with_index(case.batch)[1]
    draw = jax.jit(
        lambda key, f: pseudo_gradient_by_example(case.objective.loss, key, f, targets, index)
    )
    draws = [draw(jax.random.fold_in(key, k), matrices.outputs) for k in range(2)]
    expected = sum(oracle.sum_over_blocks(case, matrices, r) for r in draws) / 2
    variants = [
        (curvax.fishervp, {"key": key, "num_samples": 2, "microbatch": m}) for m in chunks(name)
    ]
    for got in all_dense(name, *variants):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_empirical_fisher_equals_outer_products_of_per_example_gradients(name):
    """Of N terms in B examples `N/B 1/B sum_b g_b g_b'`; heads and weighted positions apart."""
    case, matrices = CASES[name](), oracle.of(name)
    loss, targets = case.objective.loss, oracle.targets(case)
    r = oracle.empirical_gradient(loss, matrices.outputs, targets)
    expected = oracle.sum_over_examples(matrices, r)
    if not loss.heads and name != "masked_regression":  # whose mask has weights
        size, num_terms = batch_size(case.batch), loss.num_terms(matrices.outputs, targets)
        rows = jax.jit(lambda p, b: curvax.per_example_grads(case.objective, p, b))(
            case.params, case.batch
        )
        G = np.concatenate([np.reshape(x, (size, -1)) for x in jax.tree.leaves(rows)], axis=1)
        np.testing.assert_allclose(num_terms * G.T @ G / size**2, expected, rtol=0, atol=1e-10)
    variants = [(curvax.empirical_fishervp, {"microbatch": m}) for m in chunks(name)]
    for got in all_dense(name, *variants):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "attention", "masked_sequence", "multi_head"])
def test_empirical_fisher_by_term_takes_every_term_by_itself(name):
    """Only one entry of the targets' axes at a time is in the gradient: of other terms no product
    is taken. Its diagonal, and the factors with signs, are of the same matrix.
    """
    case, matrices = CASES[name](), oracle.of(name)
    expected = oracle.empirical_fisher_by_term(case, matrices)
    variants = [(curvax.empirical_fishervp, {"by": "term", "microbatch": m}) for m in chunks(name)]
    for got in all_dense(name, *variants):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-10)
    diagonal = jax.jit(
        lambda p, b: curvax.empirical_fisher_diagonal(case.objective, p, b, by="term", microbatch=2)
    )(case.params, case.batch)
    np.testing.assert_allclose(oracle.flat(diagonal), np.diag(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    ["mlp", "multi_head", "masked_regression", "gaussian", "shared_targets", "masked_sequence"],
)
def test_mc_fisher_is_unbiased_for_the_ggn(name):
    """The quadratic form v' F v of many independent draws, by z-test."""
    case = CASES[name]()
    v = jax.tree.map(jnp.ones_like, case.params)
    form = lambda key: (
        oracle.flat(curvax.fishervp(case.objective, case.params, case.batch, key)(v))
        @ oracle.flat(v)
    )
    draws = jax.lax.map(form, jax.random.split(jax.random.key(0), 4000), batch_size=500)
    exact = oracle.of(name).ggn.sum()
    assert abs(draws.mean() - exact) < 4 * draws.std(ddof=1) / len(draws) ** 0.5
    assert draws.std(ddof=1) / len(draws) ** 0.5 < 0.05 * exact  # the test can tell a wrong factor


def test_ggn_equals_hessian_of_a_linear_model():
    objective = curvax.Objective(lambda w, x: x @ w, losses.softmax_cross_entropy())
    x, w = (
        jax.random.normal(jax.random.key(0), (5, 3)),
        jax.random.normal(jax.random.key(1), (3, 4)),
    )
    batch = (x, jnp.arange(5) % 4)
    ours = [dense(product, objective, w, batch) for product in (curvax.ggnvp, curvax.hvp)]
    np.testing.assert_allclose(*ours, atol=1e-12)


@pytest.mark.parametrize("microbatch", [None, 3])
@pytest.mark.parametrize("product", [curvax.hvp, curvax.ggnvp, curvax.empirical_fishervp])
def test_products_are_linear_self_adjoint_vmappable_and_differentiable(product, microbatch):
    case = CASES["mlp"]()
    flat_params, unravel = ravel_pytree(case.params)
    u, v = (np.asarray(jax.random.normal(jax.random.key(i), flat_params.shape)) for i in range(2))
    build = functools.partial(product, case.objective, microbatch=microbatch)
    mv = lambda p, v: oracle.flat(build(unravel(p), case.batch)(unravel(v)))

    @jax.jit
    def transformed(p, u, v):
        rows = jax.vmap(functools.partial(mv, p))(jnp.stack([u, v]))
        return rows, jax.grad(lambda u: u @ mv(p, u) / 2)(u), jax.grad(lambda p: u @ mv(p, v))(p)

    apply = jax.jit(mv)
    of = lambda v, p=flat_params: np.asarray(apply(p, v))
    np.testing.assert_allclose(of(2 * u - 3 * v), 2 * of(u) - 3 * of(v), atol=1e-12)
    np.testing.assert_allclose(u @ of(v), v @ of(u), atol=1e-12)
    rows, gradient, slope = transformed(flat_params, u, v)
    np.testing.assert_allclose(rows, [of(u), of(v)], atol=1e-12)
    np.testing.assert_allclose(gradient, of(u), atol=1e-12)
    step = 1e-5
    change = u @ (of(v, flat_params + step * u) - of(v, flat_params - step * u)) / (2 * step)
    np.testing.assert_allclose(slope @ u, change, rtol=1e-6)


@pytest.mark.parametrize("microbatch", [None, 2])
def test_matvec_crosses_jit_as_an_argument_without_retracing(microbatch):
    case = CASES["mlp"]()
    matvec = curvax.ggnvp(case.objective, case.params, case.batch, microbatch=microbatch)
    apply = jax.jit(chex.assert_max_traces(lambda mv, v: mv(v), n=1))
    chex.clear_trace_counter()
    for scale in (1.0, 2.0):
        v = jax.tree.map(lambda p, s=scale: s * jnp.ones_like(p), case.params)
        chex.assert_trees_all_close(apply(matvec, v), matvec(v), atol=1e-12)


@pytest.mark.parametrize("container", ["list", "namedtuple", "none", "nnx_state"])
def test_any_pytree(container):
    w1, w2 = (
        jax.random.normal(jax.random.key(0), (3, 4)),
        jax.random.normal(jax.random.key(1), (4, 2)),
    )
    Weights = collections.namedtuple("Weights", ["a", "b"])
    if container == "nnx_state":
        graph, params = nnx.split(
            nnx.Sequential(
                nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.tanh, nnx.Linear(4, 2, rngs=nnx.Rngs(1))
            )
        )
        model = lambda p, x: nnx.merge(graph, p)(x)
    else:
        params = {
            "list": [w1, w2],
            "namedtuple": Weights(w1, w2),
            "none": {"a": w1, "b": w2, "off": None},
        }[container]
        model = lambda p, x: functools.reduce(lambda h, w: jnp.tanh(h @ w), jax.tree.leaves(p), x)
    objective = curvax.Objective(model, losses.squared_error())
    batch = (jax.random.normal(jax.random.key(2), (5, 3)), jnp.ones((5, 2)))
    flat_params, unravel = ravel_pytree(params)
    H = jax.jit(jax.hessian(lambda p: objective(unravel(p), batch)))(flat_params)
    product = jax.eval_shape(lambda p: curvax.hvp(objective, p, batch)(p), params)
    assert jax.tree.structure(product) == jax.tree.structure(params)
    got = dense(curvax.hvp, objective, params, batch)
    np.testing.assert_allclose(got, H, atol=1e-6 if container == "nnx_state" else 1e-12)


def test_part_of_the_params_with_the_rest_frozen():
    case = CASES["mlp"]()
    frozen, part = case.params["Dense_0"], case.params["Dense_1"]
    model = lambda p, x: case.objective.model({"Dense_0": frozen, "Dense_1": p}, x)
    block = dense(curvax.ggnvp, curvax.Objective(model, case.objective.loss), part, case.batch)
    np.testing.assert_allclose(
        block, oracle.of("mlp").ggn[-len(block) :, -len(block) :], atol=1e-12
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("product", [curvax.hvp, curvax.ggnvp, curvax.empirical_fishervp])
def test_lower_precision_gives_its_own_dtype_and_its_own_accuracy(product, dtype):
    case = CASES["mlp"]()
    inputs, labels = case.batch
    apply = lambda p, x, v, m=None: product(case.objective, p, (x, labels), microbatch=m)(v)
    compiled = jax.jit(apply, static_argnums=3)
    v = jax.tree.map(lambda p: np.sin(np.arange(p.size)).reshape(p.shape), case.params)
    exact = np.concatenate([np.ravel(x) for x in jax.tree.leaves(compiled(case.params, inputs, v))])
    coarse = jax.tree.map(lambda x: x.astype(dtype), (case.params, inputs, v))
    got = compiled(*coarse, 3)
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    error = np.concatenate([np.ravel(x).astype(float) for x in jax.tree.leaves(got)]) - exact
    assert np.linalg.norm(error) < 20 * jnp.finfo(dtype).eps * np.linalg.norm(exact)
    # a wide vector on narrow params comes back wide
    wide = jax.eval_shape(apply, *coarse[:2], v)
    assert {x.dtype for x in jax.tree.leaves(wide)} == {jnp.dtype(jnp.float64)}


def backward_only(fun, slope):
    """`fun` with its derivative `slope` given for reverse mode only."""
    kernel = jax.custom_vjp(fun)
    kernel.defvjp(lambda x: (kernel(x), x), lambda x, g: (g * slope(x),))
    return kernel


# A kernel whose backward pass is a kernel too: forward mode has no way through either.
backward_only_slope = backward_only(
    lambda x: 1 / jnp.cosh(x) ** 2, lambda x: -2 * jnp.tanh(x) / jnp.cosh(x) ** 2
)
backward_only_tanh = backward_only(jnp.tanh, backward_only_slope)


def test_kernel_with_a_backward_pass_only():
    case = CASES["mlp"]()
    w = jax.random.normal(jax.random.key(0), (3, 3))
    batch = (case.batch[0], case.batch[1])
    build = lambda tanh: curvax.Objective(lambda w, x: tanh(x @ w), losses.softmax_cross_entropy())
    reverse = dense(curvax.hvp, build(backward_only_tanh), w, batch, mode="rev_over_rev")
    plain = dense(curvax.hvp, build(jnp.tanh), w, batch)
    np.testing.assert_allclose(reverse, plain, atol=1e-12)
    for product in (curvax.hvp, curvax.ggnvp, curvax.empirical_fishervp):
        for microbatch in (None, 3):
            apply = lambda w, product=product, m=microbatch: product(
                build(backward_only_tanh), w, batch, microbatch=m
            )(w)
            for call in (apply, jax.jit(apply)):  # JAX itself refuses only when it compiles
                with pytest.raises(TypeError, match=r'hvp\(.*mode="rev_over_rev"'):
                    call(w)
    with pytest.raises(TypeError, match=r'hvp\(.*mode="rev_over_rev"'):
        tx = curvax.adahessian(0.1, build(backward_only_tanh))
        jax.jit(lambda w: tx.update(w, tx.init(w), w, batch=batch))(w)


def test_a_model_that_calls_back_to_the_host():
    seen = []

    def model(w, x):
        io_callback(lambda x: seen.append(x.shape), None, x)
        return jnp.tanh(x @ w)

    w, batch = jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.zeros((4, 2)))
    got = curvax.hvp(curvax.Objective(model, losses.squared_error()), w, batch)(w)
    silent = curvax.Objective(lambda w, x: jnp.tanh(x @ w), losses.squared_error())
    np.testing.assert_allclose(got, curvax.hvp(silent, w, batch)(w), atol=1e-12)
    assert seen


def test_integer_vectors_and_other_float_types_are_taken_as_what_params_are():
    matvec = curvax.hvp(lambda w: jnp.sum(0.3 * w**2), jnp.ones(2))
    np.testing.assert_allclose(matvec(jnp.array([1, 2])), [0.6, 1.2])
    assert matvec(np.ones(2, np.float32)).dtype == jnp.float32


def test_outputs_in_any_container():
    w, x = (
        jax.random.normal(jax.random.key(0), (3, 2)),
        jax.random.normal(jax.random.key(1), (5, 3)),
    )
    Pair = collections.namedtuple("Pair", ["mean", "log_variance"])
    heads = losses.weighted_sum({"b": (2.0, losses.squared_error()), "a": (1.0, losses.poisson())})
    two = {"a": jnp.ones((5, 2)), "b": jnp.zeros((5, 2))}
    ordered = lambda h: collections.OrderedDict([("b", h), ("a", 2 * h)])
    for loss, containers, targets in (
        (
            losses.gaussian(),
            (lambda h: (h, 2 * h), lambda h: [h, 2 * h], lambda h: Pair(h, 2 * h)),
            jnp.ones((5, 2)),
        ),
        (heads, (lambda h: {"a": 2 * h, "b": h}, ordered), two),
    ):

        def of(container, w, batch, loss=loss):
            objective, key = (
                curvax.Objective(lambda w, x: container(jnp.tanh(x @ w)), loss),
                jax.random.key(0),
            )
            diagonal = curvax.gauss_newton_bartlett(objective, w, batch, key)
            return (
                diagonal,
                curvax.ggnvp(objective, w, batch)(w),
                curvax.fishervp(objective, w, batch, key)(w),
            )

        every = jax.jit(
            lambda w, batch, of=of, containers=containers: [of(c, w, batch) for c in containers]
        )
        results = every(w, (x, targets))
        for other in results[1:]:
            chex.assert_trees_all_close(other, results[0], atol=1e-12)


def test_a_loss_whose_curvature_comes_in_another_precision():
    loss = losses.from_function(
        lambda f, y: jnp.mean((f.astype(jnp.float32) - y) ** 2) / 2,
        curvature_product=lambda f, y, v: v * jnp.float32(0.5),
    )
    objective = curvax.Objective(lambda w, x: (x @ w).astype(jnp.bfloat16), loss)
    assert jnp.isfinite(
        curvax.ggnvp(objective, jnp.ones((3, 1)), (jnp.ones((2, 3)), jnp.ones((2, 1))))(
            jnp.ones((3, 1))
        )
    ).all()


def test_explicitly_sharded_params_and_batch():
    """Shardings in the types, as `jax.make_mesh` gives them by default."""
    mesh = jax.make_mesh((8,), ("data",))
    w, batch = (
        jax.random.normal(jax.random.key(0), (8, 3)),
        (jax.random.normal(jax.random.key(1), (16, 8)), jnp.ones((16, 3))),
    )

    def results(gather, w, batch):
        objective = curvax.Objective(
            lambda w, x: jnp.tanh(gather(w).T @ x.T).T, losses.squared_error()
        )
        key = jax.random.key(2)
        return (
            curvax.hutchinson_diagonal(curvax.hvp(objective, w, batch), w, key, 2).mean,
            curvax.fishervp(objective, w, batch, key)(w),
            curvax.ggnvp(objective, w, batch, microbatch=8)(jnp.ones((8, 3))),
        )

    with jax.set_mesh(mesh):
        spread = lambda x: jax.device_put(x, NamedSharding(mesh, P("data")))
        gather = lambda w: jax.sharding.reshard(w, P())
        got = jax.device_get(
            jax.jit(functools.partial(results, gather))(spread(w), jax.tree.map(spread, batch))
        )
    alone = jax.device_get(jax.jit(functools.partial(results, lambda w: w))(w, batch))
    chex.assert_trees_all_close(got, alone, atol=1e-12)


@pytest.mark.parametrize("product", [curvax.hvp, curvax.ggnvp])
def test_remat_scan_and_bfloat16_compute_inside_the_model(product):
    def model(params, x, block=lambda f: f):
        layer = block(lambda h, w: (jnp.tanh(h @ w), None))
        return jax.lax.scan(layer, x, params)[0]

    params = jax.random.normal(jax.random.key(0), (3, 4, 4))
    batch = (jax.random.normal(jax.random.key(1), (6, 4)), jnp.arange(6) % 4)
    loss = losses.softmax_cross_entropy()
    expected = dense(product, curvax.Objective(model, loss), params, batch)
    remat = curvax.Objective(lambda p, x: model(p, x, jax.checkpoint), loss)
    np.testing.assert_allclose(dense(product, remat, params, batch), expected, atol=1e-12)
    half = curvax.Objective(
        lambda p, x: model(*jax.tree.map(lambda a: a.astype(jnp.bfloat16), (p, x))), loss
    )
    got = jax.jit(lambda p, b: product(half, p, b)(p))(params, batch)
    want = expected @ np.ravel(params)
    assert np.linalg.norm(np.ravel(got) - want) < 0.05 * np.linalg.norm(want)


def test_chunks_of_a_sharded_batch_are_computed_without_gathering_it():
    mesh = jax.make_mesh((8,), ("data",))
    case = CASES["mlp"]()
    x = jax.random.normal(jax.random.key(0), (64, 3))
    batch = (x, jnp.arange(64) % 3)
    sharded = jax.device_put(batch, NamedSharding(mesh, P("data")))
    params = jax.device_put(case.params, NamedSharding(mesh, P()))
    apply = jax.jit(lambda p, b, v: curvax.ggnvp(case.objective, p, b, microbatch=16)(v))
    compiled = apply.lower(params, sharded, params).compile()
    assert "all-gather" not in compiled.as_text() and "all-to-all" not in compiled.as_text()
    chex.assert_trees_all_close(
        compiled(params, sharded, params), apply(case.params, batch, case.params), atol=1e-12
    )


def test_microbatch_bounds_memory():
    params = {"w1": jnp.zeros((64, 256)), "w2": jnp.zeros((256, 8))}
    objective = curvax.Objective(
        lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], losses.squared_error()
    )
    batch = (jnp.zeros((4096, 64)), jnp.zeros((4096, 8)))

    def peak(product, microbatch):
        apply = jax.jit(lambda p, b, v: product(objective, p, b, microbatch=microbatch)(v))
        return apply.lower(params, batch, params).compile().memory_analysis().temp_size_in_bytes

    for product in (curvax.hvp, curvax.ggnvp, curvax.empirical_fishervp):
        assert peak(product, 512) < 0.4 * peak(product, None)


def test_errors_say_what_and_where():
    case = CASES["mlp"]()
    objective, params, batch = case.objective, case.params, case.batch
    with pytest.raises(
        ValueError, match=r"unknown mode 'forward'; valid: 'fwd_over_rev', 'rev_over_rev'"
    ):
        curvax.hvp(objective, params, batch, mode="forward")
    with pytest.raises(TypeError, match=r"int64\[2\] at params\['n'\]"):
        curvax.ggnvp(objective, {"n": jnp.zeros(2, int), "w": jnp.zeros(2)}, batch)
    with pytest.raises(TypeError, match=r"complex128\[\] at params\[0\]"):
        curvax.hvp(objective, [jnp.array(1j)], batch)
    with pytest.raises(ValueError, match="empty pytree"):
        curvax.ggnvp(objective, {}, batch)
    with pytest.raises(ValueError, match=r"batch\[0\] has 7 rows, batch\[1\] is int\d+\[6\]"):
        curvax.ggnvp(objective, params, (batch[0], batch[1][:6]))
    with pytest.raises(ValueError, match=r"has no batch axis.*curvax.Shared"):
        curvax.ggnvp(objective, params, ({"x": batch[0], "rate": jnp.array(0.1)}, batch[1]))
    with pytest.raises(TypeError, match=r"pair \(inputs, targets\)"):
        curvax.ggnvp(objective, params, batch[0])
    with pytest.raises(ValueError, match=r"microbatch must be at least 1, got 0"):
        curvax.ggnvp(objective, params, batch, microbatch=0)
    with pytest.raises(ValueError, match=r"num_samples must be at least 1"):
        curvax.fishervp(objective, params, batch, jax.random.key(0), num_samples=0)
    with pytest.raises(TypeError, match=r"microbatch needs fun to be a curvax\.Objective"):
        curvax.hvp(lambda p, b: objective(p, b), params, batch, microbatch=2)
    with pytest.raises(TypeError, match=r"fun must return a real scalar, got float64\[3\]"):
        curvax.hvp(lambda w: w**2, jnp.ones(3))
    with pytest.raises(ValueError, match=r"v has no leaf at \['Dense_0'\]\['bias'\]"):
        curvax.ggnvp(objective, params, batch)({"Dense_0": {"kernel": params["Dense_0"]["kernel"]}})
    with pytest.raises(ValueError, match=r"v\['Dense_0'\]\['bias'\] is float64\[1\], params"):
        curvax.ggnvp(objective, params, batch)(jax.tree.map(lambda p: p[:1], params))
    flat_rows = curvax.Objective(
        lambda w, x: (x @ w).reshape(-1), lambda f, y: jnp.mean((f - jnp.repeat(y, 2)) ** 2)
    )
    with pytest.raises(ValueError, match="leading axis of 4 rows"):
        curvax.empirical_fishervp(flat_rows, jnp.ones((3, 2)), (jnp.ones((4, 3)), jnp.ones(4)))


def test_a_plain_function_that_is_no_objective_has_a_hessian():
    module, x = Mlp(), jnp.ones((2, 3))
    params = jax.jit(module.init)(jax.random.key(0), x)["params"]
    fun = lambda p, x: jnp.sum(jnp.sin(module.apply({"params": p}, x)))
    flat_params, unravel = ravel_pytree(params)
    H = jax.jit(jax.hessian(lambda p: fun(unravel(p), x)))(flat_params)
    np.testing.assert_allclose(dense(curvax.hvp, fun, params, x), H, atol=1e-6)


@pytest.mark.parametrize("product", [curvax.ggnvp, curvax.empirical_fishervp])
def test_a_vector_that_is_constant_in_part(product):
    """Under `jit` the compiler sees the zeros.

    jaxlib 0.10.2 multiplies by those wrongly if nothing hides them.
    """
    a, b = (
        jax.random.normal(jax.random.key(0), (64, 64)) / 8,
        jax.random.normal(jax.random.key(1), (64, 10)) / 8,
    )
    objective = curvax.Objective(lambda p, x: x @ p[0] @ p[1], losses.softmax_cross_entropy())
    batch = (jax.random.normal(jax.random.key(2), (512, 64)) / 8, jnp.arange(512) % 10)
    apply = lambda p, w: product(objective, p, batch)([a, w])
    constant = jax.jit(lambda p: apply(p, jnp.zeros_like(b)))([a, b])
    given = jax.jit(apply)([a, b], jnp.zeros_like(b))
    chex.assert_trees_all_close(constant, given, rtol=1e-4, atol=1e-7)
