"""The tensors of a Hugging Face directory, under the names that the parameter table has."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from sapo_jax.model import hf_config

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Entry(NamedTuple):
    """Where a tensor lies: the file, its key there, and the part of what that key holds."""

    file: str
    key: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]
    dtype: str


class Reader(contextlib.ExitStack):
    """The tensors of a directory by name, read when asked for.

    As in ``transformers``, one file goes before an index, and files say themselves what they hold.

    Raises:
      ValueError: no safetensors file, one that the index names is missing or damaged, or two keys
        for a tensor.
    """

    def __init__(self, directory: pathlib.Path):
        super().__init__()
        self.directory, self._open = directory, {}
        if (directory / SINGLE).is_file():
            places = [SINGLE]
        elif (directory / INDEX).is_file():
            places = list(hf_config.read_json(directory / INDEX).get("weight_map", {}).values())
        else:
            raise ValueError(f"{directory}: has neither {SINGLE} nor {INDEX}")
        self.where: dict[str, Entry] = {}
        for file in sorted(set(places)):
            if not (directory / file).is_file():
                count = places.count(file)
                raise ValueError(
                    f"{directory / file}: missing shard; {INDEX} places {count} tensors in it"
                )
            for name, entry in _entries(self._file(file), file):
                if self.where.setdefault(name, entry).key != entry.key:
                    same = f"{self.where[name].key} and {entry.key}"
                    raise ValueError(f"{directory}: {same} are the same tensor: must be one")
                self.where[name] = entry

    def _file(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            with open(self.directory / name, "rb"):  # whose errors say what is wrong
                pass
            try:
                opened = safe_open(self.directory / name, framework="numpy", backend="pread")
            except SafetensorError as error:
                raise ValueError(f"{self.directory / name}: damaged: {error}") from None
            self._open[name] = self.enter_context(opened)
        return self._open[name]

    def tensor(self, name: str, rows: slice | None = None) -> np.ndarray:
        """One tensor, or some rows of it."""
        entry = self.where[name]
        file, part = self._file(entry.file), rows or entry.part
        return file.get_slice(entry.key)[part] if part else file.get_tensor(entry.key)


def _entries(opened: Any, file: str) -> Iterator[tuple[str, Entry]]:
    """The tensors of a file by the names of the table.

    Keys may lack "model."; the experts of a layer may lie in one tensor, gate above up.
    """
    for key in list(opened.keys()):
        view = opened.get_slice(key)
        shape, dtype = tuple(view.get_shape()), view.get_dtype()
        name = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
        fused = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)
        if not fused or len(shape) != 3:
            yield name, Entry(file, key, (), shape, dtype)
            continue
        experts, out, width = shape
        parts = ("gate", "up") if fused[2] == "gate_up" else ("down",)
        size = out // len(parts)
        for expert, (n, part) in itertools.product(range(experts), enumerate(parts)):
            where = expert, slice(n * size, (n + 1) * size)
            entry = Entry(file, key, where, (size, width), dtype)
            yield f"{fused[1]}.{expert}.{part}_proj.weight", entry
