"""Hugging Face directories in and out: safetensors, one tensor at a time, and what lies beside.

Beyond the parameters themselves, `load` holds one tensor of the file and one per-device shard of
one parameter (twice while the shard is handed to its device).
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import pathlib
import shutil
from typing import Any

import jax
import numpy as np

from sapo_jax.model import hf_config, hf_vision
from sapo_jax.model.config import ModelConfig
from sapo_jax.model.hf_tensors import INDEX, SINGLE, Reader, fuse, fused_name
from sapo_jax.model.params import shardings, table
from sapo_jax.model.spec import Spec

HEAD = "lm_head.weight"
DTYPES = ("F32", "BF16", "F16", "F64")
CARRIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "chat_template.json",
    "generation_config.json", "additional_chat_templates", "video_preprocessor_config.json",
    *hf_vision.PROCESSORS,
)  # fmt: skip


def _untie(reader: Reader, config: ModelConfig) -> ModelConfig:
    """The config as the files are: with a head of its own where theirs differs from the embedding.

    Where there is a head alone, it serves for both.
    """
    if not config.tie_word_embeddings or HEAD not in reader.where:
        return config
    head, embed = reader.where[HEAD], table(config)["embed"].hf_name
    size = head.shape[0]
    rows = [slice(i, min(i + 4096, size)) for i in range(0, size, 4096)]
    if reader.where.setdefault(embed, head).shape == head.shape and all(
        np.array_equal(reader.tensor(embed, part), reader.tensor(HEAD, part)) for part in rows
    ):
        del reader.where[HEAD]
        return config
    return dataclasses.replace(config, tie_word_embeddings=False)


def _list(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(names[:8]) + more


def _check(reader: Reader, config: ModelConfig) -> None:
    """Compare names, shapes and dtypes with the table before anything is read."""
    specs = jax.tree.leaves(table(config))
    expected = {name: spec.hf_shape for spec in specs for _, name in spec.tensors()}
    missing = [name for name in expected if name not in reader.where]
    extra = [
        entry.key
        for name, entry in reader.where.items()
        if name not in expected and not name.endswith(".inv_freq")
    ]
    if missing or extra:
        raise ValueError(
            f"{reader.directory}: tensors do not match config.json"
            + (f"; missing: {_list(missing)}" if missing else "")
            + (f"; left over: {_list(list(dict.fromkeys(extra)))}" if extra else "")
        )
    wrong = []
    for name, shape in expected.items():
        entry = reader.where[name]
        if entry.shape != shape:
            wrong.append(f"{entry.key} is {list(entry.shape)}, must be {list(shape)}")
        elif entry.dtype not in DTYPES:
            wrong.append(f"{entry.key} is {entry.dtype}, must be one of {'/'.join(DTYPES)}")
    if wrong:
        raise ValueError(f"{reader.directory}: {_list(wrong)}")


def _read_part(reader: Reader, spec: Spec, index: tuple[slice, ...], dtype) -> np.ndarray:
    """One shard of a parameter: ``index`` has a slice with start and stop for each axis."""
    depth = len(spec.lead)
    part = np.empty([i.stop - i.start for i in index], dtype)
    for at in itertools.product(*(range(i.start, i.stop) for i in index[:depth])):
        own = spec.from_hf(reader.tensor(spec.name(at)))
        place = tuple(n - i.start for n, i in zip(at, index[:depth], strict=True))
        part[place] = own[index[depth:]]
    return part


def _read(reader: Reader, spec: Spec, dtype, sharding: Any) -> jax.Array:
    whole = tuple(slice(0, n) for n in spec.shape)
    if sharding is None:
        return jax.device_put(_read_part(reader, spec, whole, dtype))
    devices: dict[tuple, list] = {}
    for device, index in sharding.addressable_devices_indices_map(spec.shape).items():
        bounds = tuple(i.indices(n)[:2] for i, n in zip(index, spec.shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    arrays = []
    for bounds, copies in devices.items():
        part = _read_part(reader, spec, tuple(slice(*b) for b in bounds), dtype)
        arrays += [jax.block_until_ready(jax.device_put(part, device)) for device in copies]
    return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)


def read_config(directory: pathlib.Path, dtype: str) -> ModelConfig:
    """`hf_config.read`, untied where the weights, if there are any, are not tied.

    Raises:
      ValueError: as `load`.
    """
    config, directory = hf_config.read(directory, dtype), pathlib.Path(directory)
    if any((directory / name).is_file() for name in (SINGLE, INDEX)):
        with Reader(directory) as reader:
            config = _untie(reader, config)
    return config


def load(
    directory: str | pathlib.Path, dtype: Any = "float32", mesh: jax.sharding.Mesh | None = None
) -> tuple[ModelConfig, Any]:
    """A model from a Hugging Face directory: config.json and safetensors, sharded or not.

    Args:
      directory: of a model of one of `config.MODEL_TYPES`.
      dtype: float32 or bfloat16, for parameters, computation and cache; `dataclasses.replace` the
        config for a mixture.
      mesh: places the parameters by `params.shardings`; None puts them on the default device.

    Returns:
      (config, params).

    Raises:
      ValueError: naming the file, field or tensor that is missing, left over or of a wrong shape.
    """
    directory = pathlib.Path(directory)
    config = hf_config.read(directory, np.dtype(jax.numpy.dtype(dtype)).name)
    with Reader(directory) as reader:
        config = _untie(reader, config)
        specs, treedef = jax.tree.flatten(table(config))
        places = [None] * len(specs)
        if mesh is not None:
            places = jax.tree.leaves(shardings(config, mesh))
        _check(reader, config)
        leaves = [
            _read(reader, spec, jax.numpy.dtype(dtype), sharding)
            for spec, sharding in zip(specs, places, strict=True)
        ]
    return config, treedef.unflatten(leaves)


def _plan_files(
    specs: list[Spec], config: ModelConfig, itemsize: int, limit: int
) -> list[dict[str, list[tuple[int, tuple]]]]:
    """Files of up to ``limit`` bytes: for each tensor its parts (leaf, place)."""
    parts: dict[str, list[tuple[int, tuple]]] = {}
    for number, spec in enumerate(specs):
        for at, name in spec.tensors():
            # Models that see have the experts of a layer in one tensor.
            name = fused_name(name) if config.vision else name
            parts.setdefault(name, []).append((number, at))
    files: list[dict] = [{}]
    size = 0
    for name, places in parts.items():
        own = sum(math.prod(specs[number].hf_shape) for number, _ in places) * itemsize
        if files[-1] and size + own > limit:
            files.append({})
            size = 0
        files[-1][name] = places
        size += own
    return files


def save(
    directory: str | pathlib.Path,
    config: ModelConfig,
    params: Any,
    *,
    files_from: str | pathlib.Path | None = None,
    shard_bytes: int = 4 * 2**30,
) -> None:
    """Write a directory that ``transformers`` loads; tensors keep the dtype of the parameters.

    Args:
      directory: made if need be; weights that lie there are replaced.
      config: the model's shape.
      params: as the learner has them.
      files_from: directory whose tokenizer and generation files are carried along.
      shard_bytes: a file holds at most this much, or one tensor; one file's worth is on the host.

    Raises:
      ValueError: ``files_from`` is no directory, or the parameters are not the config's.
    """
    from safetensors.numpy import save_file

    directory = pathlib.Path(directory)
    specs, treedef = jax.tree.flatten(table(config))
    if jax.tree.structure(params) != treedef:
        raise ValueError("save: the parameters are not those that the config describes")
    if files_from is not None and not pathlib.Path(files_from).is_dir():
        raise ValueError(f"files_from={str(files_from)!r}: no such directory")
    leaves = jax.tree.leaves(params)
    directory.mkdir(parents=True, exist_ok=True)
    for old in (*directory.glob("model*.safetensors"), *directory.glob(INDEX)):
        old.unlink()
    itemsize = np.dtype(leaves[0].dtype).itemsize
    files = _plan_files(specs, config, itemsize, shard_bytes)
    where = {}
    for n, content in enumerate(files, 1):
        file = SINGLE if len(files) == 1 else f"model-{n:05}-of-{len(files):05}.safetensors"
        arrays = {}
        for name, places in content.items():
            parts = [specs[i].to_hf(leaves[i], at) for i, at in places]
            arrays[name] = fuse(parts, config) if len(parts) > 1 else parts[0]
        save_file(arrays, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)
        where |= dict.fromkeys(arrays, file)
    if len(files) > 1:
        total = sum(leaf.size for leaf in leaves) * itemsize
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    if files_from is not None and pathlib.Path(files_from).resolve() != directory.resolve():
        for source in (pathlib.Path(files_from) / name for name in CARRIED):
            if source.is_dir():
                shutil.copytree(source, directory / source.name, dirs_exist_ok=True)
            elif source.is_file():
                shutil.copyfile(source, directory / source.name)
    contents = {"config.json": hf_config.to_json(config)}
    if config.vision:
        contents[hf_vision.PROCESSORS[0]] = hf_vision.processor(config.vision)
    for name, content in contents.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")
