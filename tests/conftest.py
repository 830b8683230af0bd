"""Eight host devices for every test; float64 where a module asks for it."""

import os
import tempfile

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # before NumPy is imported: its threads would fight XLA's

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
# Programs that two tests, or two processes of one run, compile alike are compiled once.
run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
jax.config.update("jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"curvax-tests-{run}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield
