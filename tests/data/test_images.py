"""Examples with images as prompts: placeholders expanded, and what is refused by id and field."""

import dataclasses
import io
import json

import numpy as np
import pytest
from PIL import Image

from sapo_jax import model
from sapo_jax.data import encode, hf_tokenizer
from sapo_jax.data.stream import Fits
from sapo_jax.data.tokenizer import VISION, CharTokenizer
from sapo_jax.tasks import make
from sapo_jax.tasks.base import IMAGE, make_example
from sapo_jax.training import settings
from tests import tiny_config

TOKENIZER = CharTokenizer("0123456789+-;= abcdeghilnoqrstuw", images=True)
CONFIG = model.make(
    "tiny_vl", vocab_size=TOKENIZER.vocab_size,
    vision=dataclasses.replace(model.config.TINY_TOWER, **TOKENIZER.vision_ids),
)  # fmt: skip
ROOM = model.vision.Room(CONFIG, 12, 2)


def picture(width, height):
    return Image.fromarray(
        np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8)
    )


def example(prompt, *images):
    return make_example(prompt, "1", "1", images=images, shows=str(len(images)))


def test_prompts_with_images():
    """Each prompt has its own images; the ids of placeholders stand for tokens of theirs."""
    examples = [
        example(f"a{IMAGE}b{IMAGE}=", picture(16, 8), picture(8, 16)),
        example("1+1="),
        example(f"{IMAGE}c", picture(16, 16)),
    ]
    prompts = encode.encode_prompts(examples, TOKENIZER, 20, ROOM)
    image, start, end = (
        TOKENIZER.vision_ids[f"{name}_id"]
        for name in ("image_token", "vision_start_token", "vision_end_token")
    )
    a, b, equals = (TOKENIZER.encode(x)[0] for x in "ab=")
    row = [a, start, image, image, end, b, start, image, image, end, equals]
    assert prompts.tokens[0, : len(row)].tolist() == row
    assert prompts.length.tolist() == [11, 4, 7]
    assert prompts.images.grids.tolist() == [
        [[1, 2, 4], [1, 4, 2]], [[0] * 3] * 2, [[1, 4, 4], [0] * 3]
    ]  # fmt: skip
    assert prompts.images.patches.shape == (3, 48, 96)
    whole = model.vision.process([picture(16, 8), picture(8, 16)], CONFIG)
    np.testing.assert_array_equal(prompts.images.patches[0, :16], whole.patches[:16])
    batch = encode.encode_demonstrations(examples, TOKENIZER, 24, ROOM)
    np.testing.assert_array_equal(batch.images.grids, prompts.images.grids)
    assert batch.mask.sum() == 6
    assert encode.encode_prompts(examples[1:2], TOKENIZER, 20).images is None


TEMPLATE = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif content.type == 'video' or 'video' in content %}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' }}
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""  # as that of Qwen3-VL, without tools


def chat_directory(directory, words=()):
    """Qwen3-VL's template, and a tokenizer of words and characters; where images' ids are."""
    tokenizers = pytest.importorskip("tokenizers")
    known = ["user", "assistant", *words, *"abcdefgh0123456789+-=.,\\{}() \n"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(known)})
    )
    special = ["<|im_start|>", "<|im_end|>", *VISION.values()]
    backend.add_special_tokens(special)
    whole = tokenizers.Regex("|".join([*known[: 2 + len(words)], r"[\s\S]"]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(whole, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    (directory / "tokenizer.json").write_text(backend.to_str())
    described = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(described))
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return {field: backend.token_to_id(token) for field, token in VISION.items()}


def test_prompts_with_images_by_a_chat_template(tmp_path):
    """Where they stand in the text; placeholders are as many as tokens."""
    ids = chat_directory(tmp_path, ["Text"])
    config = model.make(
        "tiny_vl", vocab_size=64,
        vision=dataclasses.replace(model.config.TINY_TOWER, **ids),
    )  # fmt: skip
    tokenizer = hf_tokenizer.load(tmp_path, vocab_size=64, chat=True)
    examples = [
        example(f"{IMAGE}Text", picture(16, 8)),
        example(f"a{IMAGE}b {IMAGE}c", picture(16, 16), picture(8, 8)),
        example("Text"),
    ]
    room = model.vision.Room(config, 12, 2)
    prompts = encode.encode_prompts(examples, tokenizer, 40, room)
    shown = "<|vision_start|>{}<|vision_end|>"
    one, two, four = (shown.format("<|image_pad|>" * n) for n in (1, 2, 4))
    texts = f"{two}Text", f"a{four}b {one}c", "Text"
    for row, length, text in zip(prompts.tokens, prompts.length, texts, strict=True):
        whole = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.backend.decode(row[:length], skip_special_tokens=False) == whole
    grids = prompts.images.grids
    assert grids[:2].tolist() == [[[1, 2, 4], [0] * 3], [[1, 4, 4], [1, 2, 2]]]
    assert not grids[2].any()
    plain = hf_tokenizer.load(tmp_path, vocab_size=64)
    assert plain.encode_prompt(f"a{IMAGE}Text", 1) == plain.encode(f"a{one}Text")


def test_what_has_no_room_is_passed_over():
    fits = Fits(TOKENIZER, 14, images=ROOM)
    assert fits(example(f"a{IMAGE}b{IMAGE}=", picture(16, 8), picture(8, 16)))
    assert not fits(example(f"a{IMAGE}", picture(32, 32)))  # 16 tokens of 12
    assert not fits(example(f"a{IMAGE * 3}", *[picture(8, 8)] * 3))  # three of two
    assert not fits(example(f"abcde{IMAGE}abcde", picture(16, 16)))  # 16 tokens in all, of 14


def test_images_swapped():
    """Those of the next prompt of the task; prompts without any stay as they are."""
    task, text = make("maze"), make("chain_sum")
    mazes = [task.examples("train")[i] for i in range(3)]
    found = encode.swapped([mazes[0], text.examples("train")[0], *mazes[1:]])
    assert [e.prompt for e in found] == [mazes[0].prompt, found[1].prompt, *[mazes[1].prompt] * 2]
    assert [found[i].images for i in (0, 2, 3)] == [mazes[i].images for i in (1, 2, 0)]
    assert [found[i].answer for i in (0, 2, 3)] == [e.answer for e in mazes]


def corrupt():
    file = io.BytesIO()
    picture(64, 64).save(file, "PNG")
    return file.getvalue()[:200]


def animated():
    file = io.BytesIO()
    picture(8, 8).save(file, "GIF", save_all=True, append_images=[picture(9, 8)])
    return file.getvalue()


BAD = {
    "missing": ([f"a{IMAGE}", "none.png"], r"images\[0\]: .*none.png"),
    "corrupt": ([f"a{IMAGE}", corrupt()], r"images\[0\]: .*must be an image's path, bytes"),
    "no image": ([f"a{IMAGE}", b"text"], r"images\[0\]: cannot identify"),
    "second": ([f"a{IMAGE * 2}", picture(8, 8), 3], r"images\[1\]: is int: must be"),
    "aspect": ([f"a{IMAGE}", picture(201, 1)], r"images\[0\]: .*at most 200 times as long"),
    "too many": ([f"a{IMAGE * 2}", picture(8, 8)], "prompt: 2 <image> for 1 images: must be eq"),
    "too few": (["a", picture(8, 8)], "prompt: 0 <image> for 1 images: must be equal"),
    "too large": ([f"a{IMAGE}", picture(64, 64)], "images: 1 with 256 patches: there is room for"),
    "video": ([f"a{IMAGE}", animated()], r"images\[0\]: .*must be one frame, no video"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_images_are_refused(name):
    (prompt, *images), message = BAD[name]
    bad = example(prompt, *images)
    with pytest.raises(ValueError, match=f"example {bad.id}: {message}"):
        encode.encode_prompts([example("1"), bad], TOKENIZER, 99, ROOM)


def test_images_for_a_run_of_text_are_refused():
    bad = example(f"a{IMAGE}", picture(8, 8))
    with pytest.raises(ValueError, match=f"example {bad.id}: images: 1: must be none"):
        encode.encode_prompts([bad], TOKENIZER, 99)


def seeing(**fields):
    config = tiny_config.get_config()
    config.task.name, config.task.options = "count_shapes", {"size": 16, "cells": 2}
    config.model.preset, config.data.max_image_tokens = "tiny_vl", 4
    config.update_from_flattened_dict(fields)
    return config


FIELDS = {
    "text model": ({"model.preset": "nano"}, "model.preset='nano': must be of Qwen3-VL"),
    "no room": ({"data.max_image_tokens": 0}, "data.max_image_tokens=0: must be at least 1"),
    "text task": ({"task.name": "chain_sum", "task.options": {}}, "max_image_tokens=4: must be 0"),
    "pixels": ({"model.max_pixels": 0}, "model.vision.max_pixels=0: must be at least 1"),
    "swap": ({"data.swap_images": True, "sampler.budget": 64}, "sampler.budget=64: must be 0 with"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_fields_are_refused(name):
    fields, message = FIELDS[name]
    with pytest.raises(ValueError, match=message):
        settings.from_config(seeing(**fields))


@pytest.mark.parametrize("field", ["model.train_vision", "data.swap_images", "model.max_pixels"])
def test_fields_of_images_are_refused_without_images(field):
    config = tiny_config.get_config()
    config.update_from_flattened_dict({field: 64 if "pixels" in field else True})
    with pytest.raises(ValueError, match=f"{field}=.*: must be"):
        settings.from_config(config)


def test_settings_of_a_run_that_sees():
    run = settings.from_config(seeing(**{"model.max_pixels": 256}))
    assert (run.images.tokens, run.images.count) == (4, 1)
    assert run.model.vision.max_pixels == 256
    assert run.model.freezes
    assert run.width == 32 + 4
    assert not settings.from_config(seeing(**{"model.train_vision": True})).model.freezes
