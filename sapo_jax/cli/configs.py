"""Config files: found by path, or by name among those of the project."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, config_dict

from sapo_jax.cli.signals import Stopped
from sapo_jax.cli.text import nearest

PACKAGE = pathlib.Path(__file__).parents[1]
# In a wheel the configs lie in the package, in a checkout beside it.
CONFIGS = next(
    filter(pathlib.Path.is_dir, (PACKAGE / "configs", PACKAGE.parent / "configs")), PACKAGE
)

# The fields in these sections are those of what config.objective.name, config.task.name, … name.
OPEN = re.compile(
    r"(objective(?:\.end)?|evals\.[^.]+|(?:task|tasks\.[^.]+|evals\.[^.]+\.task)\.options|"
    r"tokenizer\.template_options)\.(\w+)"
)


def shipped_configs() -> dict[str, pathlib.Path]:
    """The configs of the project by name, such as "pod/qwen3_8b_v6e"."""
    paths = sorted(path for path in CONFIGS.rglob("*.py") if path.name != "__init__.py")
    return {path.relative_to(CONFIGS).with_suffix("").as_posix(): path for path in paths}


def from_config(name: str, function: str = "get_config", purpose: str = "") -> Any:
    """What a function of a config file returns.

    Args:
      name: path of the file, or the name of a shipped one; an argument of the function may follow
        after a colon.
      function: its name.
      purpose: of the function, for the refusal of a file that has none.

    Raises:
      ValueError: there is no such file or function, or it fails; the line is named.
    """
    name, *argument = name.split(":", 1)
    path, shipped = pathlib.Path(name).expanduser(), shipped_configs()
    if not path.is_file():
        name = name.removeprefix("configs/").removesuffix(".py")
        if name not in shipped:
            near = nearest(name, shipped, "{}")
            raise ValueError(f"there is no such file{near} (see sapo-jax list configs)")
        path = shipped[name]
    with line_of(path):
        if "configs" not in sys.modules:  # so that any config can import the shipped ones
            import_file(
                "configs", CONFIGS / "__init__.py", [str(CONFIGS), os.path.abspath("configs")]
            )
        module = import_file("config_file", path)
    if not hasattr(module, function):
        why = f": {purpose}" if purpose else ""
        raise ValueError(f"{path}: must have a function {function}(){why}")
    with line_of(path):
        return getattr(module, function)(*argument)


def make_room(config: ConfigDict, fields: Iterable[str]) -> None:
    """Let a config have fields that only the objective, or a task, of a run knows.

    Of other fields nothing changes, and so of those that have a value of a plain type.
    """
    with config.unlocked():
        for parents, key in (match.groups() for match in map(OPEN.fullmatch, fields) if match):
            section = config
            for name in parents.split("."):
                if name == "options" and name not in section:
                    section.options = ConfigDict(type_safe=False)
                section = section[name] if name in section else ConfigDict()
            held = section.get_type(key) if key in section else None
            plain = (float, str) if parents == "objective" else (bool, int, float, str)
            if held not in (*plain, ConfigDict):
                value = section.get(key)
                if key in section:
                    del section[key]  # a field keeps its type
                section[key] = config_dict.FieldReference(value, object)


def import_file(name: str, path: pathlib.Path, folders: list[str] | None = None) -> ModuleType:
    """Execute a file as a module; with folders, as a package of what lies in them."""
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(
        name, path, loader=loader, submodule_search_locations=folders
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def line_of(path: pathlib.Path) -> Iterator[None]:
    """Say in which line a config file fails."""
    try:
        yield
    except Stopped:
        raise
    except SyntaxError as error:
        where = f", line {error.lineno}" if error.lineno else ""
        raise ValueError(f"{error.filename or path}{where}: {error.msg}") from error
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        line = [frame.lineno for frame in frames if frame.filename == str(path)][-1:]
        where = f"{path}, line {line[0]}" if line else str(path)
        # Without the whole config, which ml_collections lists.
        text = re.sub(r"(?s)Other fields present.*?(Did you mean|$)", r"\1", str(error))
        raise ValueError(f"{where}: {type(error).__name__}: {text}") from error
