"""The counter of FLOPs and bytes in compiled programs, that `examples/benchmarks/scale.py` uses."""

import jax
import jax.numpy as jnp
import pytest
from _hlo import work
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P


def test_work_and_bytes_of_one_device_are_counted():
    mesh = jax.make_mesh((4, 2), ("data", "model"))
    placed = lambda shape, *spec: jax.ShapeDtypeStruct(
        shape, jnp.float32, sharding=NamedSharding(mesh, P(*spec))
    )

    def of_device(x, y, is_costly):
        # In shard_map each device has x [2, 6, 6] and y [6, 5].
        root, _ = jax.lax.scan(lambda c, _: (c @ c, None), x[0], length=7)
        root = jax.lax.linalg.cholesky(jnp.stack([root, x[1]]))
        solved = jax.lax.linalg.triangular_solve(root[0], y, left_side=True)
        vectors, _ = jnp.linalg.eigh(x)
        branch = jax.lax.cond(is_costly, lambda x: x @ x @ x, lambda x: x @ x, x[0])
        everything = jax.lax.all_gather(y, ("data",), axis=0, tiled=True)
        mine = jax.lax.psum_scatter(everything, ("data", "model"), scatter_dimension=0, tiled=True)
        total = jax.lax.psum(mine, "model")
        moved = jax.lax.ppermute(branch, "model", [(0, 1), (1, 0)])
        return root, solved, vectors, moved, total

    fn = jax.shard_map(
        of_device,
        mesh=mesh,
        in_specs=(P(("data", "model")), P("data"), P()),
        out_specs=P(("data", "model")),
        check_vma=False,
    )
    arguments = placed((16, 6, 6), ("data", "model")), placed((24, 5), "data")
    text = jax.jit(fn).lower(*arguments, jax.ShapeDtypeStruct((), bool)).compile().as_text()
    counted = work(text)

    assert counted.matrix_flops == 7 * 2 * 6**3 + 2 * 2 * 6**3
    assert counted.lapack_flops == pytest.approx(2 * 6**3 / 3 + 6**2 * 5 + 2 * 10 * 6**3)
    assert counted.num_factorizations == 2 + 2
    sent = {}
    for collective in counted.collectives:
        sent[collective.kind] = sent.get(collective.kind, 0) + collective.sent
    assert sent == {
        "all-gather": 3 / 4 * 4 * 24 * 5,
        "reduce-scatter": 7 / 8 * 4 * 24 * 5,
        "all-reduce": 2 * 1 / 2 * 4 * 3 * 5,
        "collective-permute": 4 * 6 * 6,
    }


def test_products_of_sharded_matrices_are_counted_by_device():
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    x = jax.ShapeDtypeStruct((64, 3), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    text = jax.jit(lambda x: x.T @ x).lower(x).compile().as_text()
    counted = work(text)
    assert counted.matrix_flops == 2 * 8 * 3 * 3
    assert counted.sent == 2 * 7 / 8 * 4 * 3 * 3


def test_what_cannot_be_counted_is_an_error():
    halve = lambda x: jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x / 2, x)
    text = jax.jit(halve).lower(jnp.eye(4)).compile().as_text()
    with pytest.raises(ValueError, match="unknown number of rounds"):
        work(text)
