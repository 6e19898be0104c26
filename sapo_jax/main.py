"""Command line: ``python -m sapo_jax.main --config=configs/quickstart.py --workdir=runs/q``."""

from __future__ import annotations

import sys
import traceback

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from sapo_jax import train
from sapo_jax.parallel import distributed
from sapo_jax.training import progress, settings, workdir

_CONFIG = config_flags.DEFINE_config_file("config", None, "The experiment.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Run directory, local or gs://…")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; by default the environment decides."
)
_PROCESSES = flags.DEFINE_integer("processes", None, "Number of processes.", 1)
_PROCESS = flags.DEFINE_integer("process", None, "Index of this process.", 0)
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


def use_cache(directory: str) -> None:
    """Keep compiled programs in a directory; "" keeps none."""
    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def main(argv: list[str]) -> None:
    """Run the experiment, or go on with it."""
    if len(argv) > 1:
        sys.exit(f"error: unknown argument {argv[1]!r}; fields are set by --config.<field>=<value>")
    try:
        timeout = _CONFIG.value.distributed.timeout
        distributed.start(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, timeout=timeout)
        checked = settings.from_config(_CONFIG.value)
        use_cache(checked.config.compilation_cache)
        path = train.run(checked, _WORKDIR.value)
    except Exception as error:
        internal = isinstance(error, jax.errors.JaxRuntimeError)
        foreseen = isinstance(error, (ValueError, RuntimeError)) and not internal
        if foreseen and not flags.FLAGS["verbosity"].present:
            print(f"error: {error}\n(--verbosity=0 shows where)", file=sys.stderr)
        else:
            traceback.print_exc()
        distributed.end(1)
        sys.exit(1)
    if jax.process_index() > 0:
        return
    print(progress.reached(workdir.read_metrics(_WORKDIR.value)))
    print(f"report: {path}" if path else "stopped by SIGTERM and saved: the same command goes on")


if __name__ == "__main__":
    app.run(main, flags_parser=parse)
