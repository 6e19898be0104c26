"""Tokenizers: what every tokenizer offers, and the one whose tokens are single characters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol


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

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of a prompt, in whatever format the policy is asked by."""

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with pad and stop ids dropped."""


@dataclass(frozen=True)
class CharTokenizer:
    """One token per character: id 0 pads, 1 stops, 2 + k is the k-th character of the alphabet.

    Args:
      alphabet: the characters that texts may contain, each once.

    Raises:
      ValueError: a character occurs twice.
    """

    alphabet: str

    pad_id: ClassVar[int] = 0
    stop_ids: ClassVar[tuple[int, ...]] = (1,)

    def __post_init__(self):
        repeated = sorted({c for c in self.alphabet if self.alphabet.count(c) > 1})
        if repeated:
            raise ValueError(f"alphabet {self.alphabet!r} repeats {repeated}")

    @property
    def vocab_size(self) -> int:
        """Pad, stop and the alphabet."""
        return 2 + len(self.alphabet)

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

    def encode_prompt(self, text: str) -> list[int]:
        """The same as ``encode``: prompts are asked as they are."""
        return self.encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ``ids``, with pad and stop ids dropped.

        Ids between the alphabet and the model's vocabulary have no text.

        Raises:
          ValueError: a negative id.
        """
        ids = [int(i) for i in ids]
        if min(ids, default=0) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        return "".join(self.alphabet[i - 2] for i in ids if 2 <= i < self.vocab_size)
