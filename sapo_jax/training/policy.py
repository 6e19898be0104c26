"""The policy that a config describes: its shape, its adapters, and the room for its images."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

from etils import epath

from sapo_jax import model, tasks
from sapo_jax.data import hf_tokenizer
from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.model import lora, params
from sapo_jax.tasks.base import Task
from sapo_jax.training.checks import choice, of_field, require

OF_TOWER = ("min_pixels", "max_pixels", "train_vision")


def is_hf(directory: str) -> bool:
    """Whether a directory is laid out as Hugging Face does, and is no run of this project."""
    path = epath.Path(directory or "/").expanduser()
    return (path / "config.json").exists() and not (path / "checkpoints").exists()


def make_model(c: Any, tokenizer: Tokenizer) -> model.ModelConfig:
    """The policy's shape: that of a preset, with the fields that the config gives, or of a
    Hugging Face directory.
    """
    fields = {key: value for key, value in vars(c.model).items() if value is not None}
    preset = fields.pop("preset")
    of_tower = {name: fields.pop(name) for name in OF_TOWER if name in fields}
    chosen = {f"{field.removesuffix('s')}_dtype": value for field, value in vars(c.dtype).items()}
    chosen["attention"] = fields.pop("attention")
    for field, value in vars(c.dtype).items():
        choice(f"dtype.{field}", value, model.config.DTYPES)
    choice("model.attention", chosen["attention"], model.config.ATTENTION)
    stop = {"stop_tokens": tokenizer.stop_ids, "pad_token": tokenizer.pad_id}
    if is_hf(c.init_from):
        same = f"{c.init_from!r} too, whose config.json gives the shape of the weights there"
        require(preset == c.init_from, "model.preset", preset, same)
    if not is_hf(preset):
        names = f"{', '.join(model.PRESETS)}, or a Hugging Face directory, which has config.json"
        require("/" not in preset, "model.preset", preset, f"one of {names}")
        if "vocab_size" in model.PRESETS.get(preset, {}):
            fields["vocab_size"] = max(model.PRESETS[preset]["vocab_size"], tokenizer.vocab_size)
        if tower := model.PRESETS.get(preset, {}).get("vision"):
            fields["vision"] = dataclasses.replace(tower, **getattr(tokenizer, "vision_ids", {}))
        with of_field("model", named=True):
            vocab_size = {"vocab_size": tokenizer.vocab_size}
            shape = model.make(preset, **vocab_size | fields | chosen | stop)
        return _seeing(shape, **of_tower)
    alone = "None: the shape is that of config.model.preset, a Hugging Face directory"
    for field, value in fields.items():
        require(False, f"model.{field}", value, alone)
    with of_field("model.preset"):
        shape = model.hf.read_config(epath.Path(preset).expanduser(), c.dtype.params)
        hf_tokenizer.check_vocabulary(tokenizer, shape.vocab_size, preset)
    return _seeing(dataclasses.replace(shape, **chosen, **stop), **of_tower)


def _seeing(shape: model.ModelConfig, train_vision: bool, **pixels: int) -> model.ModelConfig:
    """The shape with fields of its tower; one of text alone has none."""
    if shape.vision is None:
        for name, value in {"train_vision": train_vision, **pixels}.items():
            blind = f"None, or False: the model is {shape.model_type!r}, which sees nothing"
            require(not value, f"model.{name}", value, blind)
        return shape
    with of_field("model", named=True):
        tower = dataclasses.replace(shape.vision, **pixels)
        return dataclasses.replace(shape, vision=tower, train_vision=train_vision)


def make_room(c: Any, made: Mapping[str, Task], shape: model.ModelConfig) -> Any:
    """What the images of a prompt have room in; None where no task has any."""
    tokens, count = c.data.max_image_tokens, tasks.Mixture(made).max_images
    if not count:
        for field in ("data.max_image_tokens", "model.train_vision", "data.swap_images"):
            value = operator.attrgetter(field)(c)
            require(not value, field, value, "0 or False: no task has images")
        return None
    sees = f"of Qwen3-VL, for the tasks have images, which {shape.model_type!r} does not see"
    require(shape.vision is not None, "model.preset", c.model.preset, sees)
    require(tokens > 0, "data.max_image_tokens", tokens, "at least 1: the tasks have images")
    whole = "0 with data.swap_images: completions that go on would see another image"
    budget = c.sampler.budget
    require(not (budget and c.data.swap_images), "sampler.budget", budget, whole)
    return model.vision.Room(shape, tokens, count)


def add_adapters(c: Any, shape: model.ModelConfig) -> model.ModelConfig:
    """The shape with the adapters that the config describes."""
    rank, alpha, targets, width = c.lora.rank, c.lora.alpha, c.lora.targets, shape.hidden_size
    if rank is None:
        require(not targets, "lora.targets", targets, "() without config.lora.rank")
        return shape
    most = f"at least 1 and at most model.hidden_size={width}; None: all parameters are learnt"
    require(1 <= rank <= width, "lora.rank", rank, most)
    require(alpha > 0, "lora.alpha", alpha, "greater than 0")
    texts = all(isinstance(name, str) for name in targets)
    require(texts, "lora.targets", targets, "a tuple of names")
    names = ",".join(targets).replace(" ", "").split(",") if targets else ()  # "q,v" of a flag
    with of_field("lora.targets"):
        found = lora.targets(names, params.layer_table(shape))
    return dataclasses.replace(shape, lora_rank=rank, lora_targets=found)
