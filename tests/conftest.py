"""Shared fixtures; compiled programs are cached in .cache/tests between runs."""

import gc
import os
import pathlib
import signal

from jaxlib.version import __version_info__ as version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", ".cache/tests")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
# The programs of tests are small and many: to compile them well takes longer than it saves. With an
# empty XLA_FLAGS in the environment they are compiled as for users, which takes four times as long.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
    + ("" if version >= (0, 11) else " --xla_cpu_use_fusion_emitters=false"),
)

import jax
import numpy as np
import pytest

from sapo_jax import model
from sapo_jax.model import params
from tests import fakes

# A shell starts background jobs with SIGINT ignored, which the commands that tests start would
# inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

gc.set_threshold(200_000, 50, 100)  # tracing makes many objects, which stay


@pytest.fixture(scope="session")
def nano():
    """A two-layer policy with a prime vocabulary, every parameter perturbed so that all matter."""
    config = model.make("nano", vocab_size=fakes.VOCAB, max_position_embeddings=256)
    return config, fakes.perturbed(jax.jit(params.init, static_argnums=0)(config, 0))


@pytest.fixture(scope="module", autouse=True)
def _few_mappings():
    """A compiled program holds six mappings of memory or more; Linux gives a process 65,530.

    Without any left, the next compilation is a segmentation fault.
    """
    yield
    maps = pathlib.Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def no_plots():
    """Pages without their plots, which take as long as a tiny run; tests/report looks at them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sapo_jax.report.page.plots", fakes.no_plots)
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# What starts late runs on while the other workers have nothing left: the longest files come first.
FIRST = (
    "parallel/test_processes", "parallel/test_sharding", "sweep/test_population", "test_train",
    "cli/test_own", "objectives/test_loss", "tasks/test_sandbox", "sampler/test_engine",
)  # fmt: skip


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """One more than cores: tests of several processes spend much of their time in waiting."""
    return os.cpu_count() + 1


def pytest_collection_modifyitems(items):
    def rank(item):
        name = item.nodeid.removeprefix("tests/").partition(".py")[0]
        return FIRST.index(name) if name in FIRST else len(FIRST)

    items.sort(key=rank)
