"""A fit over batches, in float64: the factors of all rows together; saved, resumed and merged."""

import functools
import pathlib
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import CASES
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import curvax
from curvax._batch import batch_size, map_rows
from curvax.apps import influence
from curvax.kron._accumulate import PassOptions
from curvax.kron._fit import fit_passes
from curvax.kron._fit_passes import CovariancePass, EigenbasisPass, MomentPass, counting_passes
from curvax.kron._storage import checksum

pytestmark = pytest.mark.usefixtures("x64")

KEY = jax.random.key(5)
MODELS = ("mlp", "cnn", "attention", "lstm", "masked_sequence", "multi_head", "shared_targets")
FITS = {"factors": curvax.kron.fit_factors, "moments": curvax.kron.fit_moments}


@functools.cache
def layout_of(name):
    case = CASES[name]()
    return curvax.kron_layout(case.objective, case.params, case.batch)


def cut(batch, *bounds):
    """Cut a batch at row numbers into batches of different sizes."""
    size = batch_size(batch)
    edges = [0, *(bound for bound in bounds if bound < size), size]
    return [map_rows(lambda x, i=i, j=j: x[i:j], batch) for i, j in pairwise(edges)]


def fit(kind, name, batches, key=KEY, **options):
    case = CASES[name]()
    args = case.objective, layout_of(name), case.params, batches, key
    return FITS[kind](*args, **{"progress": False} | options)


@functools.cache
def uninterrupted(kind, fisher="mc"):
    return fit(kind, "attention", cut(CASES["attention"]().batch, 1, 3), fisher=fisher)


def means(tree):
    is_mean = lambda x: isinstance(x, curvax.kron.WeightedMean)
    return jax.tree.map(lambda x: x.mean, tree, is_leaf=is_mean)


def close(a, b, tolerance=1e-10):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * np.abs(y).max())


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


class Interrupted(Exception):
    pass


def interrupted_after(number, batches):
    yield from batches[:number]
    raise Interrupted


class FailsLater:
    """Batches that end in an exception after `number`, the `time`-th time that they are read."""

    def __init__(self, batches, number, time):
        self.batches, self.number, self.time = batches, number, time

    def __iter__(self):
        self.time -= 1
        yield from interrupted_after(self.number, self.batches) if self.time == 0 else self.batches


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_a_stream_has_the_factors_of_all_rows_together(name, fisher):
    case, layout = CASES[name](), layout_of(name)
    batches = cut(case.batch, 1)
    assert len(batches) > 1
    together = functools.partial(curvax.kron_factors, case.objective, layout, fisher=fisher)
    want = jax.jit(together)(case.params, case.batch, KEY)
    close(means(fit("factors", name, batches, fisher=fisher)), means(want))
    close(means(fit("factors", name, batches, fisher=fisher, microbatch=1)), means(want))


@pytest.mark.parametrize("name", ["mlp", "attention", "multi_head"])
def test_a_stream_has_the_moments_of_all_rows_together(name):
    case, layout = CASES[name](), layout_of(name)
    eigen = fit("moments", name, cut(case.batch, 1), fisher="exact")
    together = functools.partial(curvax.kron.kron_moments, case.objective, layout, fisher="exact")
    want = jax.jit(together)(eigen.basis, case.params, case.batch, KEY)
    close(means(eigen[1:]), means(want[1:]))
    factors = fit("factors", name, cut(case.batch, 1), fisher="exact")
    equal(eigen.basis, curvax.kron.kron_basis(layout, factors))


def test_draws_go_by_the_number_of_a_row_whatever_batch_it_is_in():
    batch = CASES["attention"]().batch
    want = fit("factors", "attention", [batch])
    close(fit("factors", "attention", cut(batch, 1)), want)
    close(fit("factors", "attention", cut(batch, 2, 3), microbatch=1), want)
    last = cut(batch, 1)[1]
    alone, within = fit("factors", "attention", [last]), fit("factors", "attention", cut(batch, 1))
    gap = jax.tree.map(lambda x, y: np.abs(x - y).max(), means(alone), means(within))
    assert max(jax.tree.leaves(gap)) > 1e-3  # numbers begin anew: other draws, and a row less
    with pytest.raises(AssertionError):
        close(fit("factors", "attention", [batch], key=jax.random.key(6)), want)


@pytest.mark.parametrize(
    ("kind", "time", "number"),
    [("factors", 1, 0), ("factors", 1, 1), ("factors", 1, 2), ("moments", 1, 2), ("moments", 2, 1)],
)
@pytest.mark.parametrize("save_every", [1, 2])
def test_a_resumed_fit_is_equal_in_every_bit(tmp_path, kind, time, number, save_every):
    batches = cut(CASES["attention"]().batch, 1, 3)
    options = {"folder": curvax.kron.Saving(tmp_path, save_every)}
    with pytest.raises(Interrupted):
        fit(kind, "attention", FailsLater(batches, number, time), **options)
    equal(fit(kind, "attention", batches, **options), uninterrupted(kind))
    # A complete fit is read: only the first batch is asked for.
    equal(fit(kind, "attention", batches[:1], **options), uninterrupted(kind))


def test_one_pass_takes_a_generator_and_more_do_not(tmp_path):
    batches = cut(CASES["attention"]().batch, 1, 3)
    with pytest.raises(Interrupted):
        fit(
            "factors",
            "attention",
            interrupted_after(2, batches),
            folder=curvax.kron.Saving(tmp_path, 1),
        )
    got = fit("factors", "attention", (b for b in batches), folder=curvax.kron.Saving(tmp_path, 1))
    equal(got, uninterrupted("factors"))
    with pytest.raises(TypeError, match=r"batches is an iterator .*, which can be gone through"):
        fit("moments", "attention", iter(batches))


def test_fits_of_two_halves_merge_into_that_of_all():
    first, second = cut(CASES["attention"]().batch, 2)
    halves = [fit("factors", "attention", [half], fisher="exact") for half in (first, second)]
    close(curvax.kron.merge(*halves), fit("factors", "attention", [first, second], fisher="exact"))


def test_a_folder_of_another_fit_is_refused(tmp_path):
    case, layout = CASES["attention"](), layout_of("attention")
    batches = cut(case.batch, 1, 3)
    saved = functools.partial(fit, "factors", "attention", folder=tmp_path)
    want = saved(batches)
    refused = lambda text: pytest.raises(ValueError, match=text)
    with refused("the values of key is checksum"):
        saved(batches, key=jax.random.key(6))
    with refused("fisher is mc there, here exact"):
        saved(batches, fisher="exact")
    with refused("method is kfac there, here ekfac"):
        fit("moments", "attention", batches, folder=tmp_path)
    with refused("began with another batch"):
        saved(batches[::-1])
    other = jax.tree.map(lambda x: x + 1e-9, case.params)
    with refused("the values of params is checksum"):
        curvax.kron.fit_factors(case.objective, layout, other, batches, KEY, folder=tmp_path)
    with refused("the layout is of other params"):
        curvax.kron.fit_factors(
            case.objective, layout_of("mlp"), case.params, batches, KEY, folder=tmp_path
        )
    equal(saved(batches), want)


def test_influence_reads_a_fit_that_was_made_here(tmp_path):
    case, layout = CASES["attention"](), layout_of("attention")
    batches = cut(case.batch, 1, 3)
    load = functools.partial(influence.load, tmp_path, case.objective, layout, case.params)
    equal(fit("moments", "attention", batches, folder=tmp_path), uninterrupted("moments"))
    equal(load().require_eigen(), uninterrupted("moments"))
    # Moments without the basis that they were taken in would be read in another one.
    shutil.rmtree(tmp_path / "eigenbases")
    assert load().missing == ("eigenbases", "eigenvalues")
    with pytest.raises(ValueError, match="method 'ekfac' and holds no second moments"):
        load().require_eigen()
    with pytest.raises(ValueError, match="method 'ekfac' and holds no window of gradients"):
        load().require_window()
    equal(load().require_factors(), uninterrupted("factors"))


@dataclass(frozen=True)
class GradientPass:
    """A pass that is not in the library: the gradient of the mean loss, put where moments are."""

    objective: curvax.Objective
    options: PassOptions
    name = "gradient"

    def init(self, params):
        return jax.tree.map(jnp.zeros_like, params)

    def contribution(self, results, params, batch, key, first):
        share = batch_size(batch) / results.terms
        return jax.tree.map(lambda g: share * g, jax.grad(self.objective)(params, batch))

    def put(self, results, value):
        return results._replace(eigen=value)


def test_any_list_of_passes_runs_and_says_which_pass_is_missing(tmp_path):
    case, layout = CASES["mlp"](), layout_of("mlp")
    options = PassOptions("empirical", 1, None, by_example=True)
    batches = cut(case.batch, 1, 3)

    def run(*passes, folder=None):
        return fit_passes(
            passes,
            layout,
            case.params,
            batches,
            KEY,
            method="test",
            options=options,
            folder=folder,
            progress=False,
        )

    covariances, moments = (
        kind(case.objective, layout, options) for kind in (CovariancePass, MomentPass)
    )
    (totals,) = counting_passes(case.objective, layout, options)
    gradient = GradientPass(case.objective, options)
    for _ in range(2):  # computed, then read
        results = run(totals, gradient, folder=tmp_path)
        close(results.eigen, jax.grad(case.objective)(case.params, case.batch))
        assert results.examples == results.terms == batch_size(case.batch)
    with pytest.raises(ValueError, match="no CovariancePass where its result is needed"):
        run(EigenbasisPass(layout), moments)
    with pytest.raises(ValueError, match="no EigenbasisPass where its result is needed"):
        run(covariances, moments)
    with pytest.raises(ValueError, match="no MomentPass where its result is needed"):
        run(covariances).require_eigen()


def test_two_processes_save_and_resume_what_they_share(tmp_path):
    """No process alone has the params, the batches or the sums: the first one writes them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    script = pathlib.Path(__file__).with_name("processes.py")
    command = [sys.executable, str(script), str(port)]
    processes = []
    for rank in range(2):
        run = [*command, str(rank), str(tmp_path)]
        processes.append(subprocess.Popen(run, stderr=subprocess.PIPE, text=True))
    try:
        # Where one fails, the other may wait for it for long.
        errors = [process.communicate(timeout=90)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)


def test_the_checksum_is_the_same_on_any_number_of_devices():
    x = jnp.arange(6.0 * 8).reshape(6, 8)
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Explicit,))
    sharded = jax.device_put(x, NamedSharding(mesh, P(None, "data")))
    assert checksum([sharded, 3]) == checksum([x, 3]) != checksum([sharded, 4])
