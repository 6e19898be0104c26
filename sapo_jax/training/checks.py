"""Refusals of config fields: the field, its value, and what is allowed."""

from __future__ import annotations

import contextlib
import keyword
import math
import operator
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from sapo_jax.cli import OPEN, flat, from_config, nearest, own

LARGEST = 2**31 - 1  # counts are i32 on the device
MOST = {"seed": 2**32 - 1, "reward.workers": 4096, "data.workers": 1024}
# What others read: up to 64 bits.
OF_TASKS = re.compile(r"(task|tasks|evals\.[^.]+\.task|tokenizer\.template_options)\..*")
CHARACTERS = 2**16
# Fields of others' names.
INSIDE = ("task.options.", "tasks.", "evals.", "tokenizer.template_options.")
TYPES = {
    bool: (bool, "True or False"),
    int: (int, "a whole number"),
    float: ((int, float), "a number"),
    str: (str, "text"),
    tuple: ((list, tuple), "a list of texts"),
    ConfigDict: (dict, "a section, or a dictionary"),
}


def shown(value: Any) -> str:
    """A value as a refusal shows it, in a hundred characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integer of more than 4300 digits
        return "(a longer integer)"
    return text if len(text) <= 100 else f"{text[:80]}… ({len(text)} characters)"


# On the device.
COMPUTED = {"objective", "correction", "reward", "sampler", "learner", "eval", "evals"}
MAY_BE_INFINITE = {  # no bound
    "objective.eps_low", "objective.eps_high", "objective.dual_clip", "correction.high",
    "learner.max_grad_norm",
}  # fmt: skip


def check_sizes(config: Mapping[str, Any]) -> None:
    """Refuse numbers and texts that are too large for anything, before anything reads them.

    Raises:
      ValueError: naming the field.
    """
    for field, value in flat(config).items():
        if isinstance(value, float) and math.isfinite(value):
            held = value == 0 or 2.0**-126 <= abs(value) < 2.0**128
            allowed = "a number of 32 bits, below 3.4e38 and, but for 0, above 1.2e-38"
            require(held, field, value, allowed)
        elif isinstance(value, float) and field.partition(".")[0] in COMPUTED:
            no_bound = value == math.inf and field in MAY_BE_INFINITE
            require(no_bound, field, value, "finite")
        elif isinstance(value, int):
            most = MOST.get(field, 2**63 - 1 if OF_TASKS.fullmatch(field) else LARGEST)
            bound = f"at most {most}" if value > 0 else f"at least {-most}"
            require(abs(value) <= most, field, value, bound)
        elif isinstance(value, str):
            characters = f"at most {CHARACTERS} characters, none of them NUL"
            require(len(value) <= CHARACTERS and "\0" not in value, field, value, characters)


def check_fields(plain: Mapping[str, Any]) -> None:
    """Refuse a config that lacks a field, has one too many, or one of another type.

    Raises:
      ValueError: naming the field.
    """
    base, given = from_config("base"), flat(plain, sections=True)
    wanted = flat(base, sections=True)
    for field in given:
        key = field.rpartition(".")[2]
        named = OPEN.fullmatch(field) and key.isidentifier() and not keyword.iskeyword(key)
        if not (field in wanted or named or field.startswith(INSIDE)):
            raise ValueError(f"config.{field}: there is no such field{nearest(field, wanted)}")
    for field in wanted:
        if field not in given:
            if field == "task.options":
                continue
            raise ValueError(f"config.{field} is missing: a config starts from configs/base.py")
        check_type(base, field, given[field])


def check_type(base: ConfigDict, field: str, value: Any) -> None:
    """Refuse a value of another type than the field has in a config; nothing of unknown fields.

    Raises:
      ValueError: naming the field.
    """
    section, _, key = field.rpartition(".")
    try:
        held = operator.attrgetter(section)(base) if section else base
        kind = held.get_type(key)
    except (AttributeError, KeyError):
        return
    if (value is None and held[key] is None) or kind not in TYPES:
        return
    kinds, text = TYPES[kind]
    proper = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    proper = proper and (kind is not tuple or all(isinstance(x, str) for x in value))
    require(proper, field, value, text)


def require(condition: bool, field: str, value: Any, allowed: str) -> None:
    """Refuse a value unless the condition holds.

    Raises:
      ValueError: it does not.
    """
    if not condition:
        raise ValueError(f"config.{field}={shown(value)}: must be {allowed}")


def choice(field: str, value: str, allowed: Collection[str], more: str = "") -> None:
    """Refuse a value that is not among those allowed, and name the nearest.

    Args:
      field, value: of the config.
      allowed: the values.
      more: what is allowed besides, which the caller has ruled out.

    Raises:
      ValueError: it is not.
    """
    if value not in allowed:
        require(False, field, value, f"one of {', '.join(allowed)}{more}{nearest(value, allowed)}")


def check_name(field: str, name: str, known: Collection[str], example: str) -> None:
    """Refuse what is neither among the names known nor code of a file.

    Raises:
      ValueError: naming the field.
    """
    if not own.is_reference(name):
        choice(field, name, known, f", or one of a file, {example}")
    else:
        with of_field(field):
            own.load(name)


@contextlib.contextmanager
def of_field(field: str, keys: Iterable[str] = (), *, named: bool = False) -> Iterator[None]:
    """Refusals inside the context name the field; if they do by themselves, only ``config.``.

    One of a key in it, "sapo: tau_neg=-1 must be …", names that: "config.objective.tau_neg=-1 …".
    """
    try:
        yield
    except ValueError as error:
        text = str(error) if named else f"{field}: {error}"
        for key in () if named else keys:
            last = re.escape(key.rpartition(".")[2])
            if about := re.match(rf"(?:[^:=]*: )?{last}((?:=|: | must be ).*)", str(error)):
                text = f"{field}.{key}{about[1]}"
            elif re.match(rf".* (has no|needs the) \w+ \[?'{last}'", str(error)):
                text = f"{field}.{key}: {error}"
        raise ValueError(f"config.{text}") from None
