"""A command as a process: what it refuses is one line; its compiled programs are kept."""

from __future__ import annotations

import importlib.util
import pathlib
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

from absl import app, logging

from sapo_jax.cli.configs import PACKAGE
from sapo_jax.cli.flags import Flags
from sapo_jax.cli.signals import Signals, Stopped, end

EXTRAS = {  # of the package, with the modules that they bring
    "survival": ("lifelines",),
    "wandb": ("wandb",),
    "plots": ("jinja2", "markupsafe", "matplotlib", "tensorboardX"),
    "data": ("importlib_resources", "tensorflow_datasets", "tokenizers"),
    "vision": ("PIL",),
    "tasks": ("mpmath", "reasoning_gym"),
}
OF_PATHS = {
    FileNotFoundError: "is not there",
    NotADirectoryError: "is a file, or lies in one; must be a directory, or lie in one",
    FileExistsError: "is a file; must be a directory, or not be there",
    IsADirectoryError: "is a directory; must be a file",
    PermissionError: "may not be read, or not be written, by this user",
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
                print(f"error: {given.as_typed(_text(error))}", file=sys.stderr)
            if failed:
                failed(1)
            sys.exit(1)

    with Signals(end):  # while flags are parsed, and a config file runs
        app.run(guarded, flags_parser=given.parse)


def _text(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return missing(error)
    if type(error) in OF_PATHS and error.filename:
        return f"{error.filename}: {OF_PATHS[type(error)]}"
    origin = traceback.extract_tb(error.__traceback__)[-1].filename
    return " ".join(f"{error}".splitlines()) + " (--verbosity=0 shows where)" * (
        not origin.startswith(str(PACKAGE))
    )


def missing(error: ImportError) -> str:
    """What is not installed, with all that the same extra of the package brings."""
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        lacking = [name for name in modules if importlib.util.find_spec(name) is None]
        if module in modules and lacking:
            them = "them" if len(lacking) > 1 else "it"
            brings = f'pip install "sapo_jax[{extra}]" brings {them}'
            return f"not installed: {', '.join(lacking)}; {brings}"
    return str(error)


def use_cache(directory: str, name: str = "config.compilation_cache") -> None:
    """Keep compiled programs in a directory; "" keeps none.

    Raises:
      ValueError: naming the flag or field of the directory: no files can be written there.
    """
    import jax

    if directory:
        try:
            if "://" not in directory:
                pathlib.Path(directory).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=directory).close()
        except OSError as error:
            why = f"{error.strerror}; must be a directory to write in, or empty"
            raise ValueError(f"{name}={directory}: {why}") from None
        jax.config.update("jax_compilation_cache_dir", directory)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
