"""The flags of a command, with --help; what is wrong on the command line is refused in one line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from functools import partialmethod
from typing import Any, NoReturn

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_dict, config_flags

from sapo_jax.cli.configs import CONFIGS, OPEN, from_config, make_room
from sapo_jax.cli.text import flat, literal, nearest, table

COMMANDS = {  # the module of each, and what it does
    "train": ("sapo_jax.main", "train a policy, or go on with a run"),
    "sweep": ("sapo_jax.sweep", "train many runs that share their programs"),
    "evaluate": ("sapo_jax.evaluate", "Pass@k of a run, or of a Hugging Face directory"),
    "export": ("sapo_jax.export", "a run's policy as a Hugging Face directory"),
    "report": ("sapo_jax.report", "the page of a run, a sweep or a gradient lab again"),
    "preflight": ("sapo_jax.preflight", "what a config takes on a pod that is not there"),
    "datasets": ("sapo_jax.datasets", "prepare a dataset for runs"),
    "list": ("sapo_jax.training.listing", "what a config can name"),
}
AGAIN = ";\n    repeat this option to specify a list of values"  # absl ends help by
WRONG = {  # what Python says of a value, and what the value must be
    "invalid literal for int": "must be a whole number",
    "Exceeds the limit": "must be a smaller number",
    "could not convert string to float": "must be a number",
    "Non-boolean argument": "must be true or false",
}


class Flags(flags.FlagValues):
    """The flags of one command, apart from those of other commands in the same process.

    Args:
      command: its name in `COMMANDS`, or the module of one that is not there.
      text: what --help says first: the docstring of the command's module.
      *usage: the flags of a call, where it needs others than all that are required.
    """

    def __init__(self, command: str, text: str, *usage: str):
        super().__init__()
        self.set_gnu_getopt()  # flags may follow positional arguments
        # Past __setattr__, which sets flags.
        vars(self).update(command=command, text=text, usage=usage, own=[], fields={})
        vars(self).update(required=[], positional=[])
        self.boolean("help", False, "Show this.", short_name="h")

    def _define(
        self, define: Callable, name: str, default: Any, *details: Any,
        required: bool = False, positional: bool = False, field: str = "", **options: Any,
    ) -> None:  # fmt: skip
        assert not hasattr(Flags, name), name  # it would hide the flag's value
        define(name, default, *details, flag_values=self, **options)
        self[name].help = self[name].help.replace(AGAIN, "")
        self.own.append(name)
        self.fields.update({name: field} if field else {})
        self.required.extend([name] * (required or positional))
        self.positional.extend([name] * positional)

    # Each is called as absl's: (name, default, help, …); `field` is that of the config which the
    # flag is short for.
    boolean = partialmethod(_define, flags.DEFINE_boolean)
    enum = partialmethod(_define, flags.DEFINE_enum)
    integer = partialmethod(_define, flags.DEFINE_integer, upper_bound=2**31 - 1)
    number = partialmethod(_define, flags.DEFINE_float)
    string = partialmethod(_define, flags.DEFINE_string)
    strings = partialmethod(_define, flags.DEFINE_multi_string)
    words = partialmethod(_define, flags.DEFINE_list)

    def config_file(self) -> None:
        """Define --config, and by it a flag --config.<field> for each field of the experiment."""
        text = "The experiment: a shipped one by name (sapo-jax list configs), or a file."
        new = {"accept_new_attributes": True, "lock_config": False}  # see _ConfigParser
        self._define(config_flags.DEFINE_config_file, "config", None, text, required=True, **new)
        self["config"].parser = _ConfigParser(fields=())
        config_flags.register_flag_parser_for_type(ConfigDict, _DictionaryParser())
        config_flags.register_flag_parser_for_type(object, _LiteralParser())

    def reward_function(self) -> None:
        """Define --reward, short for a field of the config."""
        text = "my.py:name, a reward function: short for --config.reward.function."
        self.string("reward", "", text, field="reward.function")

    def cluster(self) -> None:
        """Define the flags of one process of several; by default the environment decides."""
        text = "host:port of process 0; by default the environment decides."
        self.string("coordinator", None, text)
        self.integer("processes", None, "Number of processes.", 1)
        self.integer("process", None, "Index of this process.", 0)

    def parse(self, argv: Sequence[str]) -> Flags:
        """Take the values of the command line, ``sys.argv``; what is wrong there ends the process.

        Flags of absl (--verbosity) and of other libraries are taken, too. Nothing is left of an
        earlier command line of the same process.
        """
        for name in self.own:
            self[name].unparse()
        for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
            if flag.name not in self:
                self[flag.name] = flag
        flags.FLAGS.mark_as_parsed()
        if "config" in self:
            self["config"].parser.fields = _fields_of(argv)
        try:
            _, *rest = self(argv)
            for name, argument in zip(self.positional, rest, strict=False):
                self[name].parse(argument)
        except flags.UnrecognizedFlagError as error:
            refuse(self._unknown_flag(error.flagname))
        except (flags.Error, ValueError, TypeError, KeyError, AttributeError) as error:
            if any(re.match(r"--?v(erbosity)?\b", argument) for argument in argv):
                raise
            replaced = _replaced(argv) if isinstance(error, KeyError) else ""
            refuse(replaced or self._wrong_value(error))
        if self.help:
            print(self.describe())
            sys.exit()
        for argument in rest[len(self.positional) :]:
            how = "fields are set by --config.<field>=<value>" if "config" in self else "see --help"
            refuse(f"unknown argument {argument!r}; {how}")
        for name in self.required:
            if not self[name].value:
                what = " ".join(self[name].help.split()).rstrip(".")
                refuse(f"{self._shown(name)} is missing: {what} (see --help)")
        for name, field in self.fields.items():
            if self[name].value and "config" in self:
                self.config.update_from_flattened_dict({field: self[name].value})
        return self

    def as_typed(self, text: str) -> str:
        """A refusal that names the flags which were given, not the fields they are short for."""
        for name, field in self.fields.items():
            if self[name].value:
                text = re.sub(rf"\b(config\.)?{re.escape(field)}\b", f"--{name}", text)
        return text

    def _shown(self, name: str, value: str = "") -> str:
        return f"{name.upper()}{value}" if name in self.positional else f"--{name}{value}"

    def describe(self) -> str:
        """What --help shows: the flags, and the fields of the config that is given, or of base."""
        needed = [
            name.upper() if name in self.positional else f"--{name}=…" for name in self.required
        ]
        module = COMMANDS.get(self.command, (self.command,))[0]
        starts = [f"sapo-jax {self.command}"] * (self.command in COMMANDS) + [f"python -m {module}"]
        free = " [flags]" * (set(self.own) > {"help", *self.required})
        free += " [--config.<field>=…]" * ("config" in self)
        calls = [f"    {a} {b}{free}" for a in starts for b in self.usage or [" ".join(needed)]]
        rows = []
        for flag in map(self.__getitem__, self.own):
            default = "" if flag.default in (None, "", []) else f"={flag.default}"
            first = "Needed. " if flag.name in self.required else ""
            rows.append((self._shown(flag.name, default), first + flag.help))
        rows.append(("--verbosity=-1", "0: what is refused shows its traceback, too."))
        lines = [self.text.strip(), "", *calls, ""]
        lines += ["Flags:", *table(rows)]
        if "config" in self:
            name = self["config"].config_filename if self["config"].present else "base"
            lines += ["", f"Fields of --config={name}:", *table(self._fields())]
        return "\n".join(lines)

    def _fields(self) -> list[list[str]]:
        """Fields and values, with the comments and in the order of configs/base.py."""
        line = r"^ +c\.(\S+) = (?!ConfigDict\(\)$).*?(?:  # (.+))?$"
        listed = re.findall(line, (CONFIGS / "base.py").read_text(), re.M)
        rows = []
        for field, value in flat(self._config()).items():
            found = (i for i, (name, _) in enumerate(listed) if f"{field}.".startswith(f"{name}."))
            place = next(found, -1)  # what lies in a dictionary has its comment
            rows.append((place, f"--config.{field}={value!r}", listed[place][1] * (place >= 0)))
        return [row for _, *row in sorted(rows)]

    def _config(self) -> ConfigDict:
        return self["config"].parser.config or from_config("base")

    def _unknown_flag(self, name: str) -> str:
        fields = flat(self._config()) if "config" in self else {}
        ends = [field for field in fields if f".{field}".endswith(f".{name}")]
        if ends:
            return f"unknown flag --{name}; a field is set by --config.{ends[0]}=<value>"
        if name.startswith("config.") and "config" in self:
            return f"--{name}: of which config? --config=… must come first"
        last = name.rpartition(".")[2]  # of --config.tokenizer.chat, where no config is taken
        near = f"; the flag is --{last}" if last in self.own else nearest(name, self.own, "--{}")
        return f"unknown flag --{name}{near or ' (see --help)'}"

    def _wrong_value(self, error: Exception) -> str:
        text = " ".join(str(error.args[-1] if error.args else error).split()).removeprefix("flag ")
        text = re.sub(r"^--config=.*?: (?=--config\.)", "", text)
        for start, meaning in WRONG.items():
            text = re.sub(f": .{{0,2}}{start}.*", f": {meaning}", text)
        if one := re.fullmatch(r"--(\w+)=(.*): value should be one of <(.*)>", text):
            allowed = one[3].split("|")
            near = nearest(one[2], allowed)
            return f"{self._shown(one[1])}={one[2]}: must be one of {', '.join(allowed)}{near}"
        return text


def _fields_of(argv: Sequence[str]) -> list[str]:
    return re.findall(r"^--?(?:no)?config\.([^=\n]+)", "\n".join(argv), re.M)


def _replaced(argv: Sequence[str]) -> str:
    """What is wrong where the command line replaces a section and sets a field that it had."""
    fields = _fields_of(argv)
    pairs = [(a, b) for a in fields for b in fields if b.startswith(f"{a}.")]
    return "".join(f"--config.{b}: there is no such field in --config.{a}" for a, b in pairs[:1])


class _ConfigParser(flags.ArgumentParser):
    def __init__(self, *, fields: Sequence[str]):  # absl shares parsers without keywords
        self.config: ConfigDict | None = None
        self.fields = fields  # that the command line sets

    def parse(self, name: str) -> ConfigDict:
        self.config = from_config(name)
        kind = type(self.config)
        if not issubclass(kind, ConfigDict) or issubclass(kind, FrozenConfigDict):
            raise ValueError(f"get_config() must return a ConfigDict, not {kind.__name__}")
        try:
            known = flat(self.config, sections=True)
        except (config_dict.RequiredValueError, RecursionError) as error:
            raise ValueError(f"what get_config() returns cannot be read: {error}") from None
        if not known:
            raise ValueError("get_config() must return a ConfigDict with fields, not an empty one")
        for field in self.fields:
            section, _, _ = field.rpartition(".")
            if section.endswith(".options"):
                section = section.removesuffix(".options")
            if field not in known and not (OPEN.fullmatch(field) and section in known):
                near = nearest(field, known, "--config.{}") or " (see --help)"
                raise ValueError(f"--config.{field}: there is no such field{near}")
        make_room(self.config, self.fields)
        return self.config.lock()


class _DictionaryParser(flags.ArgumentParser):
    def parse(self, argument: str | ConfigDict) -> ConfigDict:
        value = argument if isinstance(argument, ConfigDict) else literal(argument)
        if not isinstance(value, dict | ConfigDict):
            raise ValueError("must be a dictionary, such as \"{'terms': 4}\"")
        return ConfigDict(value)


class _LiteralParser(flags.ArgumentParser):
    def parse(self, argument: str) -> Any:
        number = argument.lstrip("+-") in ("inf", "nan")
        return float(argument) if number else literal(argument)


def refuse(text: str) -> NoReturn:
    """End the process with one line."""
    sys.exit(f"error: {text}")
