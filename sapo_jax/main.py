"""Command line: ``python -m sapo_jax.main --config=configs/quickstart.py --workdir=runs/q``."""

from __future__ import annotations

import sys

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sapo_jax import report, rundir, settings, train

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, local or gs://…")
flags.mark_flags_as_required(["config", "workdir"])


def parse(argv: list[str]) -> list[str]:
    """Parse the flags; a wrong override is one line that names the nearest field."""
    try:
        rest = app.parse_flags_with_usage(argv)
        _ = _CONFIG.value  # raises where the file could not be read
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        text = " ".join(str(error.args[-1]).replace("\\n", " ").replace("'", "").split())
        sys.exit(f"error: in --config or a --config.<field>=<value>: {text}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    return rest


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
    print(_reached(report.summary(rundir.read_metrics(_WORKDIR.value))))
    print(f"report: {path}")


def _reached(numbers: dict) -> str:
    """The end of a run in one line."""
    parts = [f"{numbers['iterations']} iterations in {numbers['minutes']:.1f} minutes"]
    for name, key in (("reward", "reward"), ("loss", "loss"), ("Pass@1", "pass_at_1")):
        first, last = numbers[f"{key}_first"], numbers[f"{key}_last"]
        if first is not None and not (name == "loss" and numbers["reward_last"] is not None):
            parts.append(f"{name} {first:.3f} → {last:.3f}")
    if numbers["pass_at_1_last"] is not None:
        low, high = numbers["pass_at_1_last_low"], numbers["pass_at_1_last_high"]
        parts.append(f"95% interval {low:.3f} to {high:.3f}")
    return ", ".join(parts)


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
