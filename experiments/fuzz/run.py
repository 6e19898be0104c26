"""Odd configs, in one process and without a compilation: each is accepted, or refused by name.

    python -m experiments.fuzz.run --count=600

Exit status 1: something but a refusal that names a field and its value, or an answer that takes too
long.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import pathlib
import random
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict

from sapo_jax import cli
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.tasks import TASKS
from sapo_jax.training import settings
from tests import tiny_config

HERE = pathlib.Path(__file__).parent
_COUNT = flags.DEFINE_integer("count", 600, "Odd configs.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of what is odd about them.", 0)
_OUT = flags.DEFINE_string("out", str(HERE / "results"), "For fuzz.jsonl and table.md.")
LIMIT = 10  # seconds of a config
NUMBERS = [
    0, 1, -1, 2, 3, 7, 2**31, 2**63, 10**20, -(10**20), 0.0, -0.0, 0.5, 1.5, 1e-320, 1e-8, 1e20,
    1e308, -1e308, float("inf"), float("-inf"), float("nan"),
]  # fmt: skip
TEXTS = [
    "", " ", "x", "None", "true", "null", "1", "nan", "sapo", "gpro", "token_mean", "float16",
    "bf16", "../..", "/dev/null", "my.py:x", "a" * 300, "\u0661", "café", "a=b", "{}",
]  # fmt: skip
OTHERS = [None, True, False, [], [1], {}, {"a": 1}, {"name": "sapo"}]
HYPERPARAMETERS = sorted({key for preset in OBJECTIVES.values() for key in preset.hyperparameters})
OPTIONS = "terms", "digits", "modulus", "slip", "numbers", "directory", "verifier", "level"
FEW = {"objective.name": sorted(OBJECTIVES), "task.name": sorted(TASKS)}  # often right, too


class Hang(BaseException):
    """A config took more than `LIMIT` seconds."""


@contextlib.contextmanager
def limited() -> Iterator[None]:
    """Raise `Hang` inside, once the time is over."""

    def ring(*_):
        raise Hang

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)


def misspelt(name: str, rng: random.Random) -> str:
    """A name with a letter less, or two that changed places."""
    i = rng.randrange(len(name) - 1)
    middle = "" if rng.random() < 0.5 else name[i + 1] + name[i]
    return name[:i] + middle + name[i + 1 + bool(middle) :]


def draw(rng: random.Random, fields: list[str]) -> dict[str, Any]:
    """One to three fields, and a value of each that is odd, or may be."""
    changes = {}
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        field = rng.choice(fields)
        kind = rng.random()
        if kind < 0.1:
            field = misspelt(field, rng)
        elif kind < 0.25:
            field = f"objective.{rng.choice(HYPERPARAMETERS)}"
        elif kind < 0.35:
            field = f"task.options.{rng.choice(OPTIONS)}"
        pool = rng.choice((NUMBERS, NUMBERS, TEXTS, OTHERS))
        if field in FEW and rng.random() < 0.7:
            pool = FEW[field]
        changes[field] = rng.choice(pool)
    return changes


def by_flags(changes: dict[str, Any]) -> settings.Settings:
    """The settings of a command line; a refusal of it is a ValueError, too."""
    given = cli.Flags("train", "")
    given.config_file()
    argv = ["train", "--config=tests/tiny_config.py"]
    argv += [f"--config.{field}={value}" for field, value in changes.items()]
    held, sys.argv = sys.argv, argv
    try:
        return settings.from_config(given.parse(argv).config)
    except SystemExit as end:
        raise ValueError(end.code) from None
    finally:
        sys.argv = held


def by_hand(changes: dict[str, Any]) -> settings.Settings:
    """The settings of a config that Python code changed, past the types of its fields."""
    plain = tiny_config.get_config().to_dict()
    for field, value in changes.items():
        section, (*parents, key) = plain, field.split(".")
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ValueError(f"config.{field}={value!r}: {parent} is replaced by {section!r}")
        section[key] = value
    return settings.from_config(ConfigDict(plain))


def names(text: str, changes: dict[str, Any]) -> bool:
    """Whether a refusal names a field that was changed, with its value or, misspelt, its name."""
    for field, value in changes.items():
        last = field.rpartition(".")[2]
        shown = {str(value), repr(value), f"{value!r:.40}", json.dumps(value, default=str)}
        if isinstance(value, int) and not isinstance(value, bool):
            shown.add(repr(float(value)))
        unknown = re.search(r"no such field|no hyperparameter|no option|is missing", text)
        if last in text and (unknown or any(part in text for part in shown)):
            return True
    return False


def outcome(how: Any, changes: dict[str, Any]) -> tuple[str, str]:
    """What became of a config: accepted, refused, unnamed, hang, or the name of an exception."""
    try:
        with limited():
            how(changes)
    except Hang:
        return "hang", f"more than {LIMIT} s"
    except (ValueError, OSError, ModuleNotFoundError) as error:
        text = str(error)
        return ("refused" if names(text, changes) else "unnamed"), text
    except Exception as error:
        return type(error).__name__, str(error)
    return "accepted", ""


def main(argv: list[str]) -> None:
    """Try them, write what happened, and end with 1 where something was neither."""
    del argv
    logging.set_verbosity(logging.ERROR)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    rng, out = random.Random(_SEED.value), pathlib.Path(_OUT.value)
    fields = sorted(cli.flat(tiny_config.get_config(), sections=True))
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    slowest, lines = 0.0, []
    for i in range(_COUNT.value):
        how, changes = (by_flags, by_hand)[i % 2], draw(rng, fields)
        begun = time.monotonic()
        what, text = outcome(how, changes)
        slowest = max(slowest, time.monotonic() - begun)
        counts[how.__name__][what] += 1
        record = {"how": how.__name__, "changes": changes, "outcome": what, "text": text[:500]}
        lines.append(json.dumps(record, default=str))
    out.mkdir(parents=True, exist_ok=True)
    (out / "fuzz.jsonl").write_text("\n".join(lines) + "\n")
    kinds = sorted({what for each in counts.values() for what in each})
    rows = [["", *kinds], ["---"] * (len(kinds) + 1)]
    rows += [[how, *(str(each[what]) for what in kinds)] for how, each in counts.items()]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    (out / "table.md").write_text(f"{table}\n\nSeed {_SEED.value}; slowest {slowest:.1f} s.\n")
    print((out / "table.md").read_text())
    sys.exit(bool(set(kinds) - {"accepted", "refused"}))


if __name__ == "__main__":
    app.run(main)
