"""From a config to what is asked: tasks with their shares, the tokenizer, room for tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from etils import epath

from sapo_jax import model, tasks
from sapo_jax.data import hf_tokenizer, stream
from sapo_jax.data.tokenizer import CharTokenizer, Tokenizer
from sapo_jax.tasks.base import Task
from sapo_jax.training.checks import require


def make_tasks(c: dict) -> tuple[dict[str, Task], dict[str, float]]:
    """The tasks by name, with their shares of a batch.

    Raises:
      ValueError: a task is unknown, refuses its options, has no data, or a share does not fit.
    """
    entries = c["tasks"] or {c["task"]["name"]: c["task"] | {"share": 1.0}}
    made, shares = {}, {}
    for key, entry in entries.items():
        field = f"tasks.{key}" if c["tasks"] else "task"
        wanted = "a dictionary of name, share and, if need be, options"
        known = isinstance(entry, dict) and {"name", "share"} <= set(entry)
        require(known and not set(entry) - {"name", "share", "options"}, field, entry, wanted)
        share, prompts = entry["share"], c["batch"]["prompts"]
        number = isinstance(share, int | float) and 0 < share <= 1
        require(number, f"{field}.share", share, "a number in (0, 1]")
        whole = f"a whole number of the {prompts} of batch.prompts"
        require(
            abs(share * prompts - round(share * prompts)) < 1e-6, f"{field}.share", share, whole
        )
        try:
            task = tasks.make(entry["name"], **entry.get("options", {}))
            task.examples("train")
            if c["eval"]["every"]:
                task.examples("test")
        except ValueError as error:
            raise ValueError(f"config.{field}: {error}") from None
        made[key], shares[key] = task, float(share)
    total = sum(shares.values())
    require(abs(total - 1) < 1e-6, "tasks", shares, f"shares that add up to 1, not {total:g}")
    least = f"at least {len(made)}, one of each task"
    require(c["eval"]["prompts"] >= len(made), "eval.prompts", c["eval"]["prompts"], least)
    return made, shares


def make_tokenizer(c: dict, made: Mapping[str, Task]) -> Tokenizer:
    """The tokenizer of the directory that the config names, or one of the tasks' characters.

    Raises:
      ValueError: the directory has none that can be used.
    """
    options = dict(c["tokenizer"])
    directory = options.pop("directory")
    for field in ("system", "template_options"):
        alone = "empty without config.tokenizer.directory"
        require(bool(directory) or not options[field], f"tokenizer.{field}", options[field], alone)
    if not directory:
        return CharTokenizer(tasks.Mixture(made).alphabet)
    try:
        return hf_tokenizer.load(directory, **options)
    except ValueError as error:
        raise ValueError(f"config.tokenizer: {error}") from None


def is_hf(directory: str) -> bool:
    """Whether a directory is laid out as Hugging Face does, and is no run of this project."""
    path = epath.Path(directory or "/").expanduser()
    return (path / "config.json").exists() and not (path / "checkpoints").exists()


def make_model(c: dict, tokenizer: Tokenizer) -> model.ModelConfig:
    """The policy's shape: that of a preset, with the fields that the config gives, or of a
    Hugging Face directory.

    Raises:
      ValueError: an unknown preset, a field out of range, or a vocabulary that is not the
        tokenizer's.
    """
    fields = {key: value for key, value in c["model"].items() if value is not None}
    preset, chosen = fields.pop("preset"), {"attention": fields.pop("attention")}
    chosen |= {f"{kind}_dtype": c["dtype"][kind] for kind in ("compute", "cache")}
    chosen["param_dtype"] = c["dtype"]["params"]
    stop = {"stop_tokens": tokenizer.stop_ids, "pad_token": tokenizer.pad_id}
    if is_hf(c["init_from"]):
        same = f"{c['init_from']!r} too, whose config.json gives the shape of the weights there"
        require(preset == c["init_from"], "model.preset", preset, same)
    if not is_hf(preset):
        names = f"{', '.join(model.PRESETS)}, or a Hugging Face directory, which has config.json"
        require("/" not in preset, "model.preset", preset, f"one of {names}")
        if "vocab_size" in model.PRESETS.get(preset, {}):
            fields["vocab_size"] = max(model.PRESETS[preset]["vocab_size"], tokenizer.vocab_size)
        return model.make(
            preset, **{"vocab_size": tokenizer.vocab_size, **fields, **chosen, **stop}
        )
    alone = "None: the shape is that of config.model.preset, a Hugging Face directory"
    for field, value in fields.items():
        require(False, f"model.{field}", value, alone)
    try:
        shape = model.hf_config.read(epath.Path(preset).expanduser(), c["dtype"]["params"])
        hf_tokenizer.check_vocabulary(tokenizer, shape.vocab_size, preset)
    except ValueError as error:
        raise ValueError(f"config.model.preset: {error}") from None
    return dataclasses.replace(shape, **chosen, **stop)


def lengths(
    c: dict, made: Mapping[str, Task], tokenizer: Tokenizer, shape: model.ModelConfig
) -> tuple[int, int, stream.Fits | None]:
    """Tokens of room for a prompt and for a completion, and the filter of what has none.

    Raises:
      ValueError: no bound is known, or the policy's context is too short.
    """
    width, room = c["data"]["max_prompt_tokens"], c["sampler"]["max_new_tokens"]
    supervised = c["source"] == "demonstrations"
    keep = None
    if isinstance(tokenizer, CharTokenizer):
        whole = tasks.Mixture(made)
        longest, needed = whole.max_prompt_chars, whole.max_completion_chars
        if supervised:
            least = f"at least {needed + 1}, the longest demonstration with its stop token"
            require(
                room == 0 or room > needed,
                "sampler.max_new_tokens",
                room,
                f"{least} (0 takes that)",
            )
        width, room = width or longest, room or (needed and needed + 1)
        bounded = width >= longest
    else:
        bounded = False
    for field, value in (("data.max_prompt_tokens", width), ("sampler.max_new_tokens", room)):
        require(value > 0, field, value, "at least 1: the tasks have no bound of their own")
    if not bounded:
        keep = stream.Fits(tokenizer, width, room if supervised else None)
    context = shape.max_position_embeddings
    least = f"at least {width + room}: prompts of {width} and completions of {room} tokens"
    require(width + room <= context, "model.max_position_embeddings", context, least)
    return width, room, keep
