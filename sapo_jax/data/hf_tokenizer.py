"""The tokenizer of a Hugging Face directory: its ids, its stop tokens, its chat template."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from sapo_jax.data.tokenizer import CharTokenizer

ENDS = ("<|im_end|>", "<|endoftext|>")  # stop a completion wherever they are special tokens
PADDING = 1024  # rows by which a model's vocabulary may exceed its tokenizer's
TEMPLATE_DATE = (2024, 7, 26)  # what a chat template takes for today: prompts never change by day
ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


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
        """Token ids of ``text``, with no special ids added; the names of special ones are read."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt: where ``chat``, a conversation whose answer comes next."""
        if not self.chat:
            return self.encode(text)
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": text}]
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
        return render(
            self.chat_template, messages, add_generation_prompt=add_generation_prompt, **variables
        )


def render(template: str, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
    """Render a chat template in a sandbox that knows what ``transformers`` offers to templates.

    Raises:
      ValueError: the template is broken, or refuses the messages.
    """
    import jinja2

    try:
        return _compiled(template).render(messages=list(messages), **variables)
    except (jinja2.TemplateError, TypeError) as error:
        raise ValueError(f"the chat template refuses the messages: {error}") from error


@functools.cache  # compiling takes a hundred times as long as rendering
def _compiled(template: str) -> Any:
    import datetime

    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """``{% generation %}`` marks the assistant's words; it leaves them as they are."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    def refuse(message):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, **options):
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = datetime.datetime(*TEMPLATE_DATE).strftime
    return environment.from_string(template)


def _json(directory: epath.Path, name: str) -> dict:
    path = directory / name
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None


def _template(directory: epath.Path, config: dict) -> str:
    """The default template: of its own file, else of tokenizer_config.json."""
    path = directory / "chat_template.jinja"
    if path.exists():
        return path.read_text()
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {t["name"]: t["template"] for t in template}.get("default", "")
    return template


def _text(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def _add_missing(backend: Any, config: dict, directory: epath.Path) -> None:
    """Tokens that only tokenizer_config.json knows; they keep the ids that it gives them."""
    import tokenizers

    declared = config.get("added_tokens_decoder", {})
    for number, token in sorted(declared.items(), key=lambda item: int(item[0])):
        known = backend.token_to_id(token["content"])
        if known is None:
            flags = {k: v for k, v in token.items() if k not in ("content", "__type")}
            backend.add_tokens([tokenizers.AddedToken(token["content"], **flags)])
            known = backend.token_to_id(token["content"])
        if known != int(number):
            raise ValueError(
                f"{directory}: {token['content']!r} has the id {known} by tokenizer.json and "
                f"{number} by tokenizer_config.json; the files belong to different tokenizers"
            )


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
        backend = tokenizers.Tokenizer.from_str(path.read_text())
    except Exception as error:  # the Rust side raises bare Exceptions
        raise ValueError(f"{path} is no tokenizer: {error}") from None
    config = _json(directory, "tokenizer_config.json")
    _add_missing(backend, config, directory)
    named = _json(directory, "special_tokens_map.json") | config
    special = {role: _text(named[role]) for role in ROLES if named.get(role)}
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
        vocab_size=1 + max(backend.get_vocab().values()),
        chat_template=_template(directory, config),
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

    words = ["<pad>", "<stop>", *tokenizer.alphabet]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)})
    )
    backend.add_special_tokens(words[:2])
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
    """Refuse a tokenizer that is not the model's.

    Raises:
      ValueError: it has ids that the model lacks, or so few that the model's was another.
    """
    largest = max(tokenizer.vocab_size - 1, *tokenizer.stop_ids, tokenizer.pad_id)
    if largest >= vocab_size or vocab_size - tokenizer.vocab_size > PADDING:
        raise ValueError(
            f"the tokenizer does not match {directory}: its ids reach {largest}, the model's "
            f"vocabulary has {vocab_size} (expected at most {PADDING} rows of padding above "
            f"{tokenizer.vocab_size} tokens)"
        )
