"""A command as a process: what it refuses is one line; its compiled programs are kept."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, logging

from sapo_jax.cli.configs import PACKAGE
from sapo_jax.cli.flags import Flags
from sapo_jax.cli.signals import Signals, Stopped

EXTRAS = {  # of the package, with the modules that they bring
    "plots": ("jinja2", "markupsafe", "matplotlib", "tensorboardX"),
    "data": ("importlib_resources", "tensorflow_datasets", "tokenizers"),
    "tasks": ("mpmath", "reasoning_gym"),
}


def run(
    main: Callable[[Flags], None], given: Flags, *, failed: Callable[[int], None] | None = None
) -> None:
    """Run a command: parse, call ``main(given)``, and turn what it refuses into one line.

    Args:
      main: raises ValueError, RuntimeError or OSError where the user is to read why. It is left by
        SIGTERM with the status 143, by Ctrl-C with 130.
      given: the flags, as defined.
      failed: called with the exit status before a failed command ends.
    """

    def guarded(_: Any) -> None:
        verbose = given["verbosity"].present
        if not verbose:
            logging.set_verbosity(logging.WARNING)
        try:
            with Signals():
                main(given)
        except (Stopped, KeyboardInterrupt) as error:
            stopped = error if isinstance(error, Stopped) else Stopped(signal.SIGINT)
            print(stopped.text, file=sys.stderr)
            if failed:
                failed(stopped.code)
            sys.exit(stopped.code)
        except Exception as error:
            internal = type(error).__name__ == "JaxRuntimeError"
            foreseen = isinstance(error, ValueError | RuntimeError | OSError | ModuleNotFoundError)
            if verbose or internal or not foreseen:
                traceback.print_exc()
            else:
                text = missing(error) if isinstance(error, ModuleNotFoundError) else error
                origin = traceback.extract_tb(error.__traceback__)[-1].filename
                where = "" if origin.startswith(str(PACKAGE)) else " (--verbosity=0 shows where)"
                print(f"error: {text}{where}", file=sys.stderr)
            if failed:
                failed(1)
            sys.exit(1)

    app.run(guarded, flags_parser=given.parse)


def missing(error: ImportError) -> str:
    """What cannot be imported, and the extra of the package that brings it."""
    module = (error.name or "").partition(".")[0]
    extras = [extra for extra, modules in EXTRAS.items() if module in modules]
    return f"{error}" + "".join(f'; pip install "sapo_jax[{extra}]" brings it' for extra in extras)


def use_cache(directory: str) -> None:
    """Keep compiled programs in a directory; "" keeps none."""
    import jax

    if directory:
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
