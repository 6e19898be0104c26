"""Odd configs, in one process: each is accepted, or refused by name before anything compiles.

    python -m experiments.fuzz.run --count=600

Exit status 1: something but a refusal that names a field and its value, or an answer that takes too
long; or an accepted config of those that are tried does not train.
"""

from __future__ import annotations

import collections
import contextlib
import json
import math
import os
import pathlib
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict

from experiments.fuzz import odd
from sapo_jax import cli, train
from sapo_jax.training import settings
from tests import tiny_config

HERE = pathlib.Path(__file__).parent
FLAGS = cli.Flags("experiments.fuzz.run", __doc__)
FLAGS.integer("count", 600, "Odd configs.", 1)
FLAGS.integer("seed", 0, "Of what is odd about them.", 0)
FLAGS.integer("trained", 5, "Accepted ones that are trained for an iteration.", 0)
FLAGS.string("out", str(HERE / "results"), "For fuzz.jsonl and table.md.")
LIMIT, TRAINING_LIMIT = 10, 120  # seconds of a config
TOKENS, PARAMETERS = 4096, 10**6  # that are trained at most
DEVICES = 4
UNKNOWN = "no such field|no hyperparameter|no option|is missing|will overwrite|not accept dots"


class Hang(BaseException):
    """It took too long."""


@contextlib.contextmanager
def limited(seconds: int) -> Iterator[None]:
    """Raise `Hang` inside, once the time is over."""

    def ring(*_):
        raise Hang(f"more than {seconds} s")

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def by_flags(changes: odd.Changes) -> settings.Settings:
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


def by_hand(changes: odd.Changes) -> settings.Settings:
    """The settings of a config that Python code changed, past the types of its fields."""
    plain = tiny_config.get_config().to_dict()
    for field, value in changes.items():
        section, (*parents, key) = plain, field.split(".")
        for parent in parents:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[key] = value
    return settings.from_config(ConfigDict(plain))


def names(text: str, changes: odd.Changes) -> bool:
    """Whether a refusal names a field that was changed, with its value.

    Of a field that does not exist its name will do, or that of a section that does not.
    """
    words = set(re.split(r"\W+", text))
    inner = {k: v for k, v in changes.items() if isinstance(v, dict)}
    for field, value in (changes | cli.flat(inner, sections=True)).items():
        if not words & set(field.split(".")):
            continue
        if re.search(UNKNOWN, text):
            return True
        shown = [str(value), repr(value), " ".join(str(value).split())]
        shown.append(os.path.expanduser(str(value)))
        if isinstance(value, set | tuple):  # as JSON has it
            shown.append(repr([*value]))
        with contextlib.suppress(ValueError):
            shown += [repr(float(str(value))), str(int(str(value)))]
        if any(form[:40] in text for form in shown):
            return True
    return False


def outcome(how: Callable, changes: odd.Changes) -> tuple[str, str, settings.Settings | None]:
    """What became of a config: accepted, refused, unnamed, hang, or the name of an exception."""
    try:
        with limited(LIMIT):
            return "accepted", "", how(changes)
    except Hang as error:
        return "hang", str(error), None
    except (ValueError, OSError, ModuleNotFoundError) as error:
        text = str(error)
        return ("refused" if names(text, changes) else "unnamed"), text, None
    except Exception as error:
        return type(error).__name__, str(error), None


def is_small(run: settings.Settings) -> bool:
    """Whether an iteration of it is a matter of seconds."""
    tokens = max(run.sampled, *(one.batch * one.samples for one in run.evals.values()))
    shape = run.model
    layer = shape.hidden_size * (4 * shape.hidden_size + 3 * shape.intermediate_size)
    small = shape.num_hidden_layers * layer <= PARAMETERS
    return small and tokens * (run.width + run.max_new_tokens) <= TOKENS


def trained(how: Callable, changes: odd.Changes) -> tuple[str, str]:
    """What became of an accepted config in its first iteration and evaluation."""
    less = {"iterations": 1, "eval.every": 1, "compilation_cache": "", "profile_steps": 0}
    with tempfile.TemporaryDirectory() as folder:
        try:
            with limited(TRAINING_LIMIT):
                train.run(how(less | changes), pathlib.Path(folder) / "run")
        except Hang as error:
            return "hang", str(error)
        except (ValueError, OSError, train.NotFiniteError) as error:
            return ("refused" if names(str(error), changes) else "unnamed"), str(error)
        except Exception as error:
            return type(error).__name__, str(error)
    return "trained", ""


def table(counts: dict[str, collections.Counter], sample: collections.Counter) -> str:
    """The outcomes of each kind of oddness, and of those that were trained."""
    total = sum(counts.values(), collections.Counter())
    named = {**counts, "all": total} | ({"a sample of the accepted": sample} if sample else {})
    columns = sorted(total | sample)
    rows = [["", *columns], ["---"] * (len(columns) + 1)]
    rows += [[kind, *(str(each[what] or "") for what in columns)] for kind, each in named.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(given: cli.Flags) -> None:
    """Try them, write what happened, and end with 1 where something was neither."""
    logging.set_verbosity(logging.ERROR)
    os.environ["TQDM_DISABLE"] = "1"
    jax.config.update("jax_num_cpu_devices", DEVICES)
    begun, out = time.monotonic(), pathlib.Path(given.out)
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    records, accepted, sample = [], [], collections.Counter()
    for i, (kind, changes) in enumerate(odd.draw(given.count, random.Random(given.seed))):
        how = (by_flags, by_hand)[i % 2]
        what, text, run = outcome(how, changes)
        counts[kind][what] += 1
        shown = {field: f"{value!r:.80}" for field, value in changes.items()}
        records.append(
            {"kind": kind, "how": how.__name__, "changes": shown, "outcome": what}
            | ({"text": text.replace(os.getcwd(), ".")[:300]} if text else {})
        )
        if run is not None and is_small(run):
            accepted.append((records[-1], how, changes))
    print(table(counts, sample), flush=True)
    for i in np.linspace(0, len(accepted) - 1, min(given.trained, len(accepted)), dtype=int):
        record, how, changes = accepted[i]
        what, text = trained(how, changes)
        text = text.replace(os.getcwd(), ".")
        record |= {"trained": what} | ({"text": text[:300]} if text else {})
        sample[what] += 1
        print(what, record["changes"], text, flush=True)
    seconds = math.ceil(time.monotonic() - begun)
    out.mkdir(parents=True, exist_ok=True)
    (out / "fuzz.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    notes = f"{len(records)} configs of seed {given.seed}, in {seconds} s."
    (out / "table.md").write_text(f"{table(counts, sample)}\n\n{notes}\n")
    print(f"\n{(out / 'table.md').read_text()}")
    sys.exit(bool({what for each in (sample, *counts.values()) for what in each} - odd.FINE))


if __name__ == "__main__":
    cli.run(main, FLAGS)
