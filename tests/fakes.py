"""Small stand-ins that several tests share."""

import collections
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from sapo_jax.model import params
from sapo_jax.types import Prompts

VOCAB = 23


def perturbed(tree, scale=0.1, seed=1):
    """The tree with noise on every leaf: norms that are exactly 1 would hide mistakes."""
    leaves, treedef = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    noisy = [x + scale * rng.standard_normal(x.shape).astype(np.float32) for x in leaves]
    return treedef.unflatten([np.asarray(x, np.float32) for x in noisy])


def weights(config, scale=0.1):
    """Parameters of a model, with no program to compile: norms around 1, the rest around 0."""
    whole = jax.tree.map(
        lambda s: np.full(s.shape, "norm" in s.hf_name, np.float32), params.table(config)
    )
    return perturbed(whole, scale)


def prompts(count, width, seed=0, vocab=VOCAB):
    """Random prompts of mixed lengths."""
    rng = np.random.default_rng(seed)
    length = rng.integers(1, width + 1, count).astype(np.int32)
    tokens = rng.integers(2, vocab, (count, width)).astype(np.int32)
    tokens[np.arange(width)[None] >= length[:, None]] = 0
    return Prompts(tokens, length, np.arange(100, 100 + count, dtype=np.uint32), length * 0)


def no_plots(panels, *_):
    """What `page.plots` returns where there is nothing to draw."""
    return dict.fromkeys(panels)


class Compilations:
    """Counts XLA compilations (or loads of compiled programs) inside its context, also by name."""

    EVENT = "/jax/core/compile/backend_compile_duration"

    def __enter__(self):
        self.count = 0
        self.names = collections.Counter()
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *exception):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, duration, fun_name="", **_):
        self.count += event == self.EVENT
        self.names[fun_name.removeprefix("jit(").removesuffix(")")] += event == self.EVENT


def on_eight_devices(file, *options):
    """Run a file of tests in a process whose CPU counts as eight devices."""
    # Devices that share a busy core wait long for one another: XLA would give up after 40 s.
    flags = (
        os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8",
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
    )  # fmt: skip
    own = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "PYTEST_ADDOPTS": ""}
    environment = os.environ | own
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", file, *options]
    root = pathlib.Path(__file__).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
