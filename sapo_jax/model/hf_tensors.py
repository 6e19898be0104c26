"""The tensors of a Hugging Face directory, under the names that the parameter table has."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from sapo_jax.data import hf_json
from sapo_jax.model.config import ModelConfig

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


EXPERTS = re.compile(r"(.*\.experts)\.(gate_up|down)_proj")  # of a layer in one tensor


class Entry(NamedTuple):
    """Where a tensor lies: the file, its key there, and the part of what that key holds."""

    file: str
    key: str
    part: tuple[int | slice, ...]
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False


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
            places = list((hf_json.read(directory / INDEX).get("weight_map") or {}).values())
        else:
            raise ValueError(f"{directory}: has neither {SINGLE} nor {INDEX}")
        found: dict[str, Entry] = {}
        for file in sorted(set(places)):
            if not (directory / file).is_file():
                count = places.count(file)
                raise ValueError(
                    f"{directory / file}: missing shard; {INDEX} places {count} tensors in it"
                )
            self._add(found, _entries(self._file(file), file))
        self.where: dict[str, Entry] = {}
        self._add(self.where, _experts(found))

    def _add(self, found: dict[str, Entry], entries: Iterable[tuple[str, Entry]]) -> None:
        for name, entry in entries:
            if found.setdefault(name, entry).key != entry.key:
                same = f"{found[name].key} and {entry.key}"
                raise ValueError(f"{self.directory}: {same} are the same tensor: must be one")
            found[name] = entry

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
        tensor = file.get_slice(entry.key)[part] if part else file.get_tensor(entry.key)
        return tensor.T if entry.transposed else tensor


def _entries(opened: Any, file: str) -> Iterator[tuple[str, Entry]]:
    """The tensors of a file, with "model." before the keys that lack it."""
    for key in list(opened.keys()):
        view = opened.get_slice(key)
        name = key if key.startswith(("model.", "lm_head.")) else f"model.{key}"
        yield name, Entry(file, key, (), tuple(view.get_shape()), view.get_dtype())


def _experts(found: dict[str, Entry]) -> Iterator[tuple[str, Entry]]:
    """The tensors by the names of the table, each expert's apart.

    The experts of a layer may lie in one tensor, [E, 2I, D] and [E, D, I] with gate above up, or
    [E, D, 2I] and [E, I, D]: a square one says nothing, but of the two of a layer one is none.
    """
    for name, entry in found.items():
        fused = EXPERTS.fullmatch(name)
        if not fused or len(entry.shape) != 3:
            yield name, entry
            continue
        both = [found.get(f"{fused[1]}.{part}_proj", entry) for part in ("gate_up", "down")]
        (_, d, wide), (_, i, out) = (e.shape if len(e.shape) == 3 else (0,) * 3 for e in both)
        transposed = (d, wide) == (out, 2 * i)
        experts, rows, columns = entry.shape
        rows, columns = (columns, rows) if transposed else (rows, columns)
        parts = ("gate", "up") if fused[2] == "gate_up" else ("down",)
        size = rows // len(parts)
        for expert, (n, part) in itertools.product(range(experts), enumerate(parts)):
            own = slice(n * size, (n + 1) * size)
            place = (expert, slice(None), own) if transposed else (expert, own)
            yield (
                f"{fused[1]}.{expert}.{part}_proj.weight",
                entry._replace(part=place, shape=(size, columns), transposed=transposed),
            )


def fused_name(name: str) -> str:
    """The tensor of a layer's experts that one of an expert is part of; others are their own."""
    name = re.sub(r"\.experts\.\d+\.(gate|up)_proj\.weight$", ".experts.gate_up_proj", name)
    return re.sub(r"\.experts\.\d+\.down_proj\.weight$", ".experts.down_proj", name)


def fuse(parts: list[np.ndarray], config: ModelConfig) -> np.ndarray:
    """The experts of a layer as one tensor: all gates, then all ups; or all downs.

    As on the hub, [E, in, out], but where ``transformers``, which decides for each tensor by its
    shape, would take that for [E, out, in].
    """
    e, d, i = config.num_experts, config.hidden_size, config.moe_intermediate_size
    each = np.stack(parts).reshape(-1, e, *parts[0].shape)
    whole = np.concatenate(list(each), axis=1)
    return whole if d in (i, 2 * i) else np.ascontiguousarray(whole.swapaxes(1, 2))
