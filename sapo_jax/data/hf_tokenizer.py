"""The tokenizer of a Hugging Face directory: its ids, its stop tokens, its chat template."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from sapo_jax.data import hf_json
from sapo_jax.data.chat_template import find_template, render
from sapo_jax.data.tokenizer import SHOWN, VISION, CharTokenizer
from sapo_jax.tasks.base import IMAGE

ENDS = (  # stop a completion wherever they are special tokens
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|eot|>",
    "<|end|>", "<|EOT|>", "<|end_of_turn|>", "<end_of_turn>", "<end_of_utterance>", "<eos>", "</s>",
    "<｜end▁of▁sentence｜>",
)  # fmt: skip
PLACEHOLDER = "".join(VISION[name] for name in SHOWN)
TOKEN_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")


@dataclasses.dataclass(frozen=True, eq=False)
class HFTokenizer:
    """Text to ids and back exactly as ``transformers`` does it, without ``transformers``.

    Attributes:
      backend: a ``tokenizers.Tokenizer``.
      pad_id: fills rows; it may be one of the stop ids, since rows carry their lengths.
      stop_ids: the ids that end a completion; the first is what a demonstration ends with.
      vocab_size: one more than the largest id.
      chat_template: Jinja source, "" where the directory has none.
      special_tokens: texts by role (``eos_token``, …), which templates refer to.
      chat: whether a prompt is the first message of a conversation, or plain text.
      system: text of a system message before it; "" for none.
      template_options: further variables of the template, such as ``enable_thinking``.
    """

    backend: Any
    pad_id: int
    stop_ids: tuple[int, ...]
    vocab_size: int
    chat_template: str = ""
    special_tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chat: bool = False
    system: str = ""
    template_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with no special ids added; the names of special ones are read.

        Raises:
          ValueError: the tokenizer knows no ids for it.
        """
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the Rust side raises bare Exceptions
            raise ValueError(f"the tokenizer cannot encode {text!r:.100}: {error}") from None

    def encode_prompt(self, text: str, images: int = 0) -> list[int]:
        """Token ids of a prompt: where ``chat``, a conversation whose answer comes next."""
        if not self.chat:
            return self.encode(text.replace(IMAGE, PLACEHOLDER) if images else text)
        system = [{"role": "system", "content": self.system}] if self.system else []
        parts = filter(None, re.split(f"({IMAGE})", text))
        shown = [{"type": "image"} if x == IMAGE else {"type": "text", "text": x} for x in parts]
        messages = [*system, {"role": "user", "content": shown if images else text}]
        return self.encode(self.apply_chat_template(messages, add_generation_prompt=True))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with pad, stop and other special ids dropped.

        Ids between the tokenizer's vocabulary and the model's have no text.

        Raises:
          ValueError: a negative id.
        """
        dropped = {self.pad_id, *self.stop_ids}
        ids = [i for i in map(int, ids) if i not in dropped]
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        return self.backend.decode(ids, skip_special_tokens=True)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = False,
        **options: Any,
    ) -> str:
        """A conversation as text, by the directory's template.

        Args:
          messages: dicts of ``role`` and ``content``, in order.
          add_generation_prompt: whether the text ends where the assistant's answer begins.
          options: further variables of the template, over ``template_options``.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        if not self.chat_template:
            raise ValueError(
                "the tokenizer's directory has no chat template; expected chat_template.jinja, or "
                "chat_template in tokenizer_config.json (config.tokenizer.chat=False needs none)"
            )
        variables = {"tools": None, "documents": None, **self.special_tokens}
        variables |= {**self.template_options, **options}
        variables["add_generation_prompt"] = add_generation_prompt
        return render(self.chat_template, messages, **variables)


def _json(directory: epath.Path, name: str, each: hf_json.Kind | None = None) -> dict:
    return hf_json.read(directory / name, each) if (directory / name).exists() else {}


def _content(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _special_tokens(directory: epath.Path, backend: Any, config: dict) -> dict[str, str]:
    """Special tokens by role; ``backend`` gets those that only other files name.

    As in ``transformers``, special_tokens_map.json and added_tokens.json count where
    tokenizer_config.json has no ``added_tokens_decoder``. All keep the ids that the files give.
    """
    import tokenizers

    def added(token, special):
        flags = {k: token[k] for k in TOKEN_FLAGS if k in token} if isinstance(token, dict) else {}
        return tokenizers.AddedToken(_content(token), **{"special": special, **flags})

    if config.get("added_tokens_decoder") is not None:
        source, named = "tokenizer_config.json", config
        declared = {int(number): token for number, token in config["added_tokens_decoder"].items()}
    else:
        source, named = "added_tokens.json", config | _json(directory, "special_tokens_map.json")
        ids = _json(directory, source, hf_json.NATURAL)
        declared = {number: token for token, number in ids.items()}
    extra = named.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        named, extra = named | extra, []
    roles = {k: v for k, v in named.items() if k.endswith("_token") and v}
    roles = {role: token for role, token in roles.items() if isinstance(token, str | dict)}
    special = {role: _content(token) for role, token in roles.items()}
    tokens = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    known = {*special.values(), *map(_content, extra)}
    for _, token in sorted(declared.items(), key=lambda item: item[0]):
        tokens[_content(token)] = added(token, _content(token) in known)
    for token in (*roles.values(), *extra):
        tokens.setdefault(_content(token), added(token, True))
    for text in special.values():
        tokens[text].special = True
    backend.add_tokens(list(tokens.values()))  # of those that it has, the flags change
    for number, token in declared.items():
        if (found := backend.token_to_id(_content(token))) != number:
            raise ValueError(
                f"{directory}: {_content(token)!r} has the id {found} by tokenizer.json and "
                f"{number} by {source}; the files belong to different tokenizers"
            )
    return special


def _stop_ids(directory: epath.Path, backend: Any, eos: str | None) -> tuple[int, ...]:
    """The tokenizer's own end first, then those of generation_config and config, then ``ENDS``."""
    found = [] if eos is None else [backend.token_to_id(eos)]
    for name in ("generation_config.json", "config.json"):
        ids = _json(directory, name).get("eos_token_id")
        found += ids if isinstance(ids, list) else [ids]
    special = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    found += [backend.token_to_id(text) for text in ENDS if text in special]
    return tuple(dict.fromkeys(i for i in found if i is not None))


def load(
    directory: epath.PathLike,
    *,
    vocab_size: int | None = None,
    chat: bool = False,
    system: str = "",
    template_options: Mapping[str, Any] | None = None,
) -> HFTokenizer:
    """The tokenizer of a directory laid out as Hugging Face does.

    Args:
      directory: holds tokenizer.json, and the further files that describe it.
      vocab_size: rows of the model's embedding; given, the tokenizer is checked against it.
      chat, system, template_options: see ``HFTokenizer``.

    Raises:
      ValueError: a file is missing or broken, no token ends a completion, there is no chat template
        though ``chat``, or the tokenizer is not the model's.
    """
    import tokenizers

    directory = epath.Path(directory).expanduser()
    path = directory / "tokenizer.json"
    if not path.exists():
        raise ValueError(
            f"{directory} has no tokenizer.json: name a Hugging Face directory that has one "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…) of transformers writes it)"
        )
    try:
        backend = tokenizers.Tokenizer.from_str(path.read_bytes().decode("utf-8-sig"))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the Rust side raises bare Exceptions, and panics
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    backend.no_truncation()  # whatever the file was saved with
    backend.no_padding()
    config = _json(directory, "tokenizer_config.json")
    if config.get("split_special_tokens"):
        raise ValueError(f"{directory}: split_special_tokens=true would split those of templates")
    special = _special_tokens(directory, backend, config)
    stop_ids = _stop_ids(directory, backend, special.get("eos_token"))
    if not stop_ids:
        raise ValueError(
            f"{directory}: no token ends a completion; expected eos_token in tokenizer_config.json "
            "or eos_token_id in generation_config.json"
        )
    pad_id = backend.token_to_id(special.get("pad_token", ""))
    found = HFTokenizer(
        backend=backend,
        pad_id=stop_ids[0] if pad_id is None else pad_id,
        stop_ids=stop_ids,
        vocab_size=1 + max(backend.get_vocab().values(), default=-1),
        chat_template=find_template(directory, _json(directory, "chat_template.json") | config),
        special_tokens=special,
        chat=chat,
        system=system,
        template_options=template_options or {},
    )
    if chat:
        found.encode_prompt("")  # refuses what has no template
    check_vocabulary(found, found.vocab_size if vocab_size is None else vocab_size, directory)
    return found


def save_characters(directory: epath.PathLike, tokenizer: CharTokenizer) -> None:
    """Write a tokenizer of single characters as `load` and ``transformers`` read it."""
    import tokenizers

    shown = [VISION[name] for name in tokenizer.vision_ids]
    words = ["<pad>", "<stop>", *tokenizer.alphabet, *shown]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)})
    )
    backend.add_special_tokens(words[:2] + words[len(words) - len(shown) :])
    whole = tokenizers.Regex(r"[\s\S]")
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(whole, "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": words[0],
        "eos_token": words[1],
        "clean_up_tokenization_spaces": False,
    }
    directory = epath.Path(directory)
    (directory / "tokenizer.json").write_text(backend.to_str())
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=1))


def check_vocabulary(tokenizer: HFTokenizer, vocab_size: int, directory: Any = "the model") -> None:
    """Refuse a tokenizer that is not the model's, which may have rows of padding.

    Raises:
      ValueError: it has ids that the model lacks.
    """
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids, tokenizer.pad_id)
    if largest >= vocab_size:
        raise ValueError(
            f"the tokenizer does not match {directory}: its ids reach {largest}, the model's "
            f"vocabulary has {vocab_size}"
        )
