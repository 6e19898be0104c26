"""Character tokens: round trips, reserved ids, and errors that name what was wrong."""

from __future__ import annotations

import random

import pytest

from sapo_jax.data.tokenizer import CharTokenizer

ALPHABET = "+-0123456789;="


def test_ids_are_pad_stop_then_the_alphabet_in_the_given_order():
    tokenizer = CharTokenizer("ba")
    assert (tokenizer.pad_id, tokenizer.stop_ids, tokenizer.vocab_size) == (0, (1,), 4)
    assert tokenizer.encode("abba") == [3, 2, 2, 3]


def test_decode_inverts_encode():
    tokenizer = CharTokenizer(ALPHABET)
    rng = random.Random(0)
    for length in range(100):
        text = "".join(rng.choices(ALPHABET, k=length))
        ids = tokenizer.encode(text)
        assert len(ids) == length
        assert not {tokenizer.pad_id, *tokenizer.stop_ids} & set(ids)
        assert max(ids, default=0) < tokenizer.vocab_size
        assert tokenizer.decode(ids) == text


def test_every_character_has_its_own_id_up_to_the_end_of_the_vocabulary():
    """An off-by-two between the alphabet and the reserved ids loses characters at an end."""
    tokenizer = CharTokenizer(ALPHABET)
    assert tokenizer.encode(ALPHABET) == list(range(2, tokenizer.vocab_size))


def test_decode_drops_pad_and_stop_wherever_they_are():
    tokenizer = CharTokenizer("ab")
    assert tokenizer.decode([0, 2, 1, 3, 1, 0, 0]) == "ab"
    assert tokenizer.decode([]) == ""


def test_decode_refuses_negative_ids():
    """A negative index would silently pick a character from the end of the alphabet."""
    with pytest.raises(ValueError, match="-1 is negative"):
        CharTokenizer("ab").decode([2, -1])


def test_ids_of_a_larger_model_have_no_text():
    """A policy with rows of padding samples them; the run must not end there."""
    assert CharTokenizer("ab").decode([4, 2, 96, 3, 151_935]) == "ab"


def test_encode_names_the_first_unknown_character_its_position_and_the_alphabet():
    with pytest.raises(ValueError, match=r"'x' at position 2 .*'ab'"):
        CharTokenizer("ab").encode("abxay")


def test_repeated_characters_are_refused():
    with pytest.raises(ValueError, match=r"'abca'.*\['a'\]"):
        CharTokenizer("abca")


def test_equal_alphabets_make_equal_hashable_tokenizers():
    assert {CharTokenizer("ab"), CharTokenizer("ab")} == {CharTokenizer("ab")}
