"""Command line: ``python -m sapo_jax.main --config=configs/quickstart.py --workdir=runs/q``."""

from __future__ import annotations

import sys

import jax
from absl import app, flags
from ml_collections import config_flags

from sapo_jax import report, rundir, settings, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, local or gs://…")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Run the experiment, or go on with it."""
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.<field>=<value>")
    try:
        checked = settings.resolve(_CONFIG.value)
        if checked.config["compilation_cache"]:
            jax.config.update("jax_compilation_cache_dir", checked.config["compilation_cache"])
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
        path = train.run(checked, _WORKDIR.value)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError):
            raise
        sys.exit(f"error: {error}")
    numbers = report.summary(rundir.read_metrics(_WORKDIR.value))
    print(f"report: {path}")
    print("  ".join(f"{name} {value}" for name, value in numbers.items()))


if __name__ == "__main__":
    app.run(main)
