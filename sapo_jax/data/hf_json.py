"""The JSON files of a Hugging Face directory: read, and held to a table of what fields may be."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from etils import epath

LARGEST = 2**31 - 1  # counts and ids are i32 on the device
MOST_LAYERS = 4096  # each has parameters of its own names
LARGEST_F32 = 3.4e38


class Kind(NamedTuple):
    """What a field may be: in words, and whether a value is that. Null is as if it were absent."""

    allowed: str
    holds: Callable[[Any], bool]


def _whole(least: int, most: int = LARGEST) -> Kind:
    def holds(x):
        return type(x) is int and least <= x <= most

    return Kind(f"a whole number in [{least}, {most}]", holds)


def _above(least: float) -> Kind:
    def holds(x):
        return type(x) in (int, float) and least < x < LARGEST_F32

    return Kind(f"a number above {least}, below {LARGEST_F32}", holds)


def _list_of(kind: Kind) -> Kind:
    def holds(x):
        return isinstance(x, list) and all(map(kind.holds, x))

    return Kind(f"a list, each of it {kind.allowed}", holds)


def _either(*kinds: Kind) -> Kind:
    return Kind(", or ".join(k.allowed for k in kinds), lambda x: any(k.holds(x) for k in kinds))


FLAG = Kind("true or false", lambda x: isinstance(x, bool))
TEXT = Kind("text", lambda x: isinstance(x, str))
OBJECT = Kind("an object", lambda x: isinstance(x, dict))
ANY_NUMBER = Kind("a finite number", lambda x: type(x) in (int, float) and abs(x) < LARGEST_F32)
TEXTS = Kind(
    "an object of texts", lambda x: isinstance(x, dict) and all(map(TEXT.holds, x.values()))
)
COUNT, NATURAL, ID = _whole(1), _whole(0), _whole(-1)  # −1: none
TOKEN = _either(TEXT, Kind("an object with a text, content", lambda x: _is_token(x)))
ROLES = Kind(
    "an object of tokens", lambda x: isinstance(x, dict) and all(map(TOKEN.holds, x.values()))
)
ADDED = Kind(
    "an object, to each id its token",
    lambda x: ROLES.holds(x) and all(id.isdecimal() for id in x),
)
TEMPLATE = Kind("an object with texts, name and template", lambda x: _has(x, "name", "template"))
SECTIONS = (
    "text_config", "vision_config", "rope_scaling", "rope_parameters", "image_processor", "size",
)  # fmt: skip


def _has(x: Any, *names: str) -> bool:
    return isinstance(x, dict) and all(isinstance(x.get(name), str) for name in names)


def _is_token(x: Any) -> bool:
    flags = ("special", "normalized", "lstrip", "rstrip", "single_word")
    return _has(x, "content") and all(isinstance(x.get(name, False), bool) for name in flags)


def _of(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


FIELDS: dict[str, Kind] = {  # of any of the files, in a section or outside of one
    **_of(COUNT, """
        vocab_size hidden_size intermediate_size num_attention_heads
        num_key_value_heads head_dim max_position_embeddings num_experts_per_tok
        moe_intermediate_size decoder_sparse_step num_heads num_position_embeddings patch_size
        temporal_patch_size in_channels spatial_merge_size out_hidden_size min_pixels max_pixels
        shortest_edge longest_edge image_token_id video_token_id vision_start_token_id
        vision_end_token_id num_local_experts"""),
    **_of(_whole(1, MOST_LAYERS), "num_hidden_layers depth"),
    **_of(NATURAL, "num_experts sliding_window max_window_layers"),
    **_of(ID, "pad_token_id"),
    **_of(_either(ID, _list_of(ID)), "bos_token_id"),
    **_of(_either(NATURAL, _list_of(NATURAL)), "eos_token_id"),
    **_of(_above(0), """
        rms_norm_eps factor low_freq_factor high_freq_factor original_max_position_embeddings
        attention_factor partial_rotary_factor"""),
    **_of(_above(1), "rope_theta"),
    **_of(ANY_NUMBER, "beta_fast beta_slow mscale mscale_all_dim"),
    **_of(FLAG, """
        attention_bias mlp_bias tie_word_embeddings norm_topk_prob use_sliding_window truncate
        mrope_interleaved split_special_tokens"""),
    **_of(TEXT, "model_type rope_type type"),
    **_of(OBJECT, " ".join(SECTIONS)),
    **_of(TEXTS, "weight_map"),
    **_of(ADDED, "added_tokens_decoder"),
    **_of(_list_of(NATURAL), "mlp_only_layers deepstack_visual_indexes mrope_section"),
    **_of(_list_of(TEXT), "layer_types"),
    **_of(TOKEN, "bos_token eos_token pad_token unk_token"),  # see `_kind` for others
    **_of(_either(ROLES, _list_of(TOKEN)), "extra_special_tokens additional_special_tokens"),
    **_of(_either(TEXT, TEXTS, _list_of(TEMPLATE)), "chat_template"),
}  # fmt: skip


def read(path: Any, each: Kind | None = None) -> dict[str, Any]:
    """The JSON object of a file, whose fields are what they may be.

    Args:
      path: of the file.
      each: what every field is, in a file whose fields have names of their own.

    Raises:
      ValueError: no such file, or no JSON object in it, or a field that is something else; named.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; a Hugging Face model directory has one")
    try:
        content = json.loads(path.read_bytes())  # bytes may begin with a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds {type(content).__name__}, must be an object")
    _check(f"{path}: ", content, each)
    return content


def _check(start: str, content: dict[str, Any], each: Kind | None = None) -> None:
    for field, value in content.items():
        kind = each or _kind(field, value)
        if kind and (each or value is not None) and not kind.holds(value):
            raise ValueError(f"{start}{field}={value!r:.100}: must be {kind.allowed}")
        if field in SECTIONS and not each and value:
            _check(f"{start}{field}.", value)


def _kind(field: str, value: Any) -> Kind | None:
    if field.endswith("_token") and isinstance(value, dict):
        return TOKEN  # of any role; what begins with add_ is none
    return FIELDS.get(field)
