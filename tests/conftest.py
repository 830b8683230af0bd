"""Eight host devices for every test; float64 where a module asks for it."""

import gc
import itertools
import os
import pathlib
import tempfile

os.environ.setdefault(
    "OPENBLAS_NUM_THREADS", "1"
)  # before NumPy is imported: its threads would fight XLA's

import jax
import pytest

# Compiling is nearly all of the work, of programs that run once or twice:
# the simplest code that XLA can generate will do.
# `XLA_FLAGS= pytest` has what users get, as the examples have; it takes three times as long.
flags = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if jax.__version_info__ < (0, 11):  # a flag that XLA does not know any more would end the process
    flags += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", flags)  # read when the first array is made
jax.config.update("jax_num_cpu_devices", 8)
# Programs that two tests, or two processes of one run, compile alike are compiled once.
run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
jax.config.update(
    "jax_compilation_cache_dir", os.path.join(tempfile.gettempdir(), f"curvax-tests-{run}")
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
# Where in the source an operation came from is for profilers; writing it down takes time.
jax.config.update("jax_traceback_in_locations_limit", 0)
# Traced programs are many small objects that live long: Python's collector would go through all
# of them again and again, a tenth of the time of the tests.
gc.set_threshold(50_000, 10, 20)


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


# Every compiled program keeps some memory mappings, of which Linux gives a process 65,530; past
# that XLA fails with "Failed to materialize symbols", and no thread can be started any more.
MAX_MAPPINGS, TESTS_BETWEEN_COUNTS = 40_000, 20
MAPPINGS = pathlib.Path("/proc/self/maps")
tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def few_mappings():
    """Forget compiled programs before they take all mappings of the process."""
    yield
    if next(tests_run) % TESTS_BETWEEN_COUNTS or not MAPPINGS.exists():
        return
    if MAPPINGS.read_bytes().count(b"\n") > MAX_MAPPINGS:
        jax.clear_caches()
        gc.collect()
