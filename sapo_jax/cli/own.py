"""Code of a user's own: "my.py:name" is what a file outside of the package holds by that name.

What such code decides must be the same in every process of a run and after every restart. `agree`
has processes compute it that differ in what must not matter: the order of sets, chance, the clock.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

from sapo_jax.cli.configs import PACKAGE, import_file, line_of
from sapo_jax.cli.text import nearest

HASH_SEEDS = (0, 1, 2)  # of the processes
PATIENCE = 120.0  # seconds that they have together
CHILD = "import sys; sys.path[:] = {path!r}; from sapo_jax.cli import own; own.answer()"


def is_reference(name: Any) -> bool:
    """Whether a name means something in a file: "my.py:name"."""
    return isinstance(name, str) and name.partition(":")[0].endswith(".py")


def path_of(reference: str) -> pathlib.Path:
    """The file that a reference names.

    Raises:
      ValueError: there is none.
    """
    path = pathlib.Path(reference.partition(":")[0]).expanduser()
    if not path.is_file():
        raise ValueError(f"{reference}: there is no file {path} (seen from {os.getcwd()})")
    return path


def fingerprint(reference: str) -> str:
    """SHA-256 of the file that a reference names."""
    return hashlib.sha256(path_of(reference).read_bytes()).hexdigest()


def fingerprints(names: Iterable[Any]) -> list[list[str]]:
    """Path and fingerprint of each file that names refer to, as JSON holds them."""
    files = {name.partition(":")[0]: fingerprint(name) for name in names if is_reference(name)}
    return [[path, sha256] for path, sha256 in sorted(files.items())]


def load(reference: str) -> Any:
    """What a file holds by a name; a file is executed once, and again where it has changed.

    Raises:
      ValueError: there is no such file or name, or the file fails; the line is named.
    """
    path, name = path_of(reference), reference.partition(":")[2]
    module = _module(path.resolve(), fingerprint(reference))
    if name not in vars(module):
        own = [key for key, value in vars(module).items() if _is_defined(module, key, value)]
        near = nearest(name, own, f"{path}:{{}}") or "; it has " + (", ".join(own[:9]) or "none")
        raise ValueError(f"{reference}: must name what {path} holds, as in my.py:name{near}")
    return getattr(module, name)


def _is_defined(module: Any, name: str, value: Any) -> bool:
    """Whether a file defines what it has by a name, and did not import it."""
    imported = isinstance(value, ModuleType)
    if callable(value) and hasattr(value, "__qualname__"):  # a function or a class
        imported = value.__module__ != module.__name__
    return not (imported or name.startswith("_"))


@functools.cache
def _module(path: pathlib.Path, sha256: str) -> Any:
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # as a script finds the files beside it
    with line_of(path):
        module = import_file(f"own_{path.stem}_{sha256[:12]}", path)
    with contextlib.suppress(ImportError):
        import cloudpickle  # Grain's: its workers cannot import the module by its name

        cloudpickle.register_pickle_by_value(module)
    return module


def agree(what: str, probe: Callable[..., Mapping[str, Callable]], *arguments: Any) -> dict:
    """What a probe finds, where processes agree on it.

    Args:
      what: the name of the code, for refusals.
      probe: a function of a module; from JSON values to calls by name, whose results are JSON
        values. Each process makes the calls in an order of its own.
      arguments: of the probe.

    Raises:
      ValueError: a call fails, does not end, or has different results.
    """
    given = json.dumps([probe.__module__, probe.__name__, arguments])
    references = tuple(filter(is_reference, arguments))
    return _agree(what, given, tuple(map(fingerprint, references)))


@functools.cache
def _agree(what: str, given: str, fingerprints: tuple[str, ...]) -> dict:
    del fingerprints  # of files that have changed, the answer is another
    path = [str(PACKAGE.parent), os.getcwd(), *sys.path]
    command = [sys.executable, "-c", CHILD.format(path=path)]
    processes = []
    for seed in HASH_SEEDS:
        different = {"PYTHONHASHSEED": str(seed), "JAX_PLATFORMS": "cpu"}
        processes.append(subprocess.Popen(
            command, env=os.environ | different, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        ))  # fmt: skip
    try:
        for process in processes:
            process.stdin.write(given)
            process.stdin.close()
            process.stdin = None
        end = time.monotonic() + PATIENCE
        texts = [p.communicate(timeout=max(0.0, end - time.monotonic()))[0] for p in processes]
    except subprocess.TimeoutExpired:
        raise ValueError(f"{what}: does not end within {PATIENCE:g} s") from None
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if not all(texts):
        raise ValueError(f"{what}: ends the process that calls it")
    first, *others = map(json.loads, texts)
    for call, other in [(call, other) for other in others for call in first]:
        if "error" in (found := first[call] | other.get(call, {})):
            raise ValueError(f"{what}: {call} raises {found['error']}")
        one, two = first[call]["value"], found["value"]
        if call not in other or one != two:
            raise ValueError(
                f"{what}: {call} is not the same in every process: {_different(one, two)}; it must "
                "not depend on hash(), the order of a set, chance, the clock, or earlier calls"
            )
    return {call: found["value"] for call, found in first.items()}


def _different(one: Any, two: Any) -> str:
    texts = json.dumps(one), json.dumps(two)
    equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(*texts, strict=False))
    start = max(0, len(list(equal)) - 30)
    return " and ".join("…" * (start > 0) + text[start : start + 80] for text in texts)


def answer() -> None:
    """Make the calls of a probe, in one of the processes of `agree`."""
    out = os.dup(1)
    os.dup2(2, 1)  # what the code prints is no answer
    module, name, arguments = json.loads(sys.stdin.read())
    chance, found = random.SystemRandom(), {}
    clock = _Clock()
    try:
        calls = dict(getattr(importlib.import_module(module), name)(*arguments))
    except Exception as error:
        calls, found = {}, {"using it": {"error": _shown(error)}}
    for call in chance.sample(list(calls), len(calls)):
        random.seed()
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed()
        clock.shift = chance.uniform(-1e9, 1e9)
        try:
            found[call] = {"value": calls[call]()}
            json.dumps(found[call])
        except Exception as error:
            found[call] = {"error": _shown(error)}
    os.write(
        out, json.dumps({call: found[call] for call in [*calls, *(found.keys() - calls)]}).encode()
    )
    os._exit(0)


def _shown(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:500]


class _Clock:
    """The time of day, shifted."""

    def __init__(self):
        self.shift = random.SystemRandom().uniform(-1e9, 1e9)
        now, of_day = time.time, datetime.datetime
        here = {name: getattr(time, name) for name in ("localtime", "gmtime", "ctime")}

        class Shifted(of_day):
            @classmethod
            def now(cls, tz=None):
                return cls.fromtimestamp(time.time(), tz)

            @classmethod
            def utcnow(cls):
                return cls.now(datetime.UTC).replace(tzinfo=None)

            @classmethod
            def today(cls):
                return cls.now()

        class Today(datetime.date):
            @classmethod
            def today(cls):
                return cls.fromtimestamp(time.time())

        time.time = lambda: now() + self.shift
        time.time_ns = lambda: int(time.time() * 1e9)
        for name, function in here.items():
            setattr(time, name, lambda *at, function=function: function(*at or (time.time(),)))
        datetime.datetime, datetime.date = Shifted, Today
