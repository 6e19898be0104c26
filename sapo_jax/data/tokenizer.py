"""Tokenizers: what every tokenizer offers, and the one whose tokens are single characters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from sapo_jax.tasks.base import IMAGE

VISION = {  # in Qwen's vocabulary, by field of `VisionConfig`
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
SHOWN = ("vision_start_token_id", "image_token_id", "vision_end_token_id")  # for an image


class Tokenizer(Protocol):
    """The map between text and token ids that a run depends on."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def pad_id(self) -> int:
        """The id that fills rows after their last token."""

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a completion."""

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, with no special ids added."""

    def encode_prompt(self, text: str, images: int = 0) -> list[int]:
        """Token ids of a prompt, in whatever format the policy is asked by.

        With ``images`` a placeholder stands wherever the text has `tasks.base.IMAGE`.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with pad and stop ids dropped."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character: id 0 pads, 1 stops, 2 + k is the k-th character of the alphabet.

    Args:
      alphabet: the characters that texts may contain, each once.
      images: whether there are the tokens of `vision_ids` behind those.

    Raises:
      ValueError: a character occurs twice.
    """

    alphabet: str
    images: bool = False

    pad_id: ClassVar[int] = 0
    stop_ids: ClassVar[tuple[int, ...]] = (1,)

    def __post_init__(self):
        repeated = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if repeated:
            raise ValueError(f"alphabet {self.alphabet!r} repeats {repeated}")

    @property
    def vocab_size(self) -> int:
        """Pad, stop, the alphabet, and what stands for images."""
        return 2 + len(self.alphabet) + len(self.vision_ids)

    @property
    def vision_ids(self) -> dict[str, int]:
        """Ids of the placeholder of an image, and of what stands around it, by `VisionConfig`."""
        return {n: 2 + len(self.alphabet) + i for i, n in enumerate(VISION)} if self.images else {}

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, one per character.

        Raises:
          ValueError: a character is not in the alphabet.
        """
        ids = [2 + self.alphabet.find(character) for character in text]
        if 1 in ids:  # find() gave -1
            position = ids.index(1)
            raise ValueError(
                f"character {text[position]!r} at position {position} is not in the alphabet "
                f"{self.alphabet!r}"
            )
        return ids

    def encode_prompt(self, text: str, images: int = 0) -> list[int]:
        """The same as ``encode``, but for images: prompts are asked as they are."""
        if not images:
            return self.encode(text)
        first, *rest = map(self.encode, text.split(IMAGE))
        shown = [self.vision_ids[name] for name in SHOWN]
        return first + [i for part in rest for i in [*shown, *part]]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with pad and stop ids dropped.

        Ids between the alphabet and the model's vocabulary have no text.

        Raises:
          ValueError: a negative id.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        return "".join(self.alphabet[i - 2] for i in ids if 2 <= i < 2 + len(self.alphabet))
