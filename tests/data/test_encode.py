"""Rows are encoded as the learner wants them."""

import numpy as np
import pytest

from sapo_jax import tasks
from sapo_jax.data import encode
from sapo_jax.data.tokenizer import CharTokenizer

TASK = tasks.make("chain_sum", terms=3)
TOKENIZER = CharTokenizer(TASK.alphabet)


def test_held_out_prompts_are_distinct():
    task = tasks.make("chain_sum", terms=2)
    chosen = encode.held_out(task.examples("test"), 20)
    assert len({e.prompt for e in chosen}) == 20
    with pytest.raises(ValueError, match=r"eval.prompts=4000.*only"):
        encode.held_out(task.examples("test"), 4000)
    odd = encode.held_out(task.examples("test"), 8, keep=lambda e: int(e.answer) % 2, task=3)
    assert {int(e.answer) % 2 for e in odd} == {1}
    assert encode.encode_prompts(odd, CharTokenizer(task.alphabet), 9).task.tolist() == [3] * 8


def test_demonstrations_are_supervised_through_the_stop_token():
    examples = [TASK.examples("train")[i] for i in range(6)]
    batch = encode.encode_demonstrations(examples, TOKENIZER, 30)
    for row, example in enumerate(examples):
        target = TOKENIZER.decode(batch.tokens[row][batch.mask[row]])
        assert target == example.demonstration
        last = np.flatnonzero(batch.mask[row])[-1]
        assert batch.tokens[row, last] == TOKENIZER.stop_ids[0]
        assert batch.segments[row].sum() == last + 1
        prompt = batch.tokens[row, : len(example.prompt)]
        assert TOKENIZER.decode(prompt) == example.prompt
        assert not batch.mask[row, : len(example.prompt)].any()


def test_what_does_not_fit_is_refused():
    examples = [TASK.examples("train")[0]]
    with pytest.raises(ValueError, match="more than the 3"):
        encode.encode_prompts(examples, TOKENIZER, 3)
    with pytest.raises(ValueError, match="more than the 8"):
        encode.encode_demonstrations(examples, TOKENIZER, 8)
    countdown = tasks.make("countdown")
    bare = [e.__class__(e.id, e.prompt, e.answer, "") for e in [countdown.examples("train")[0]]]
    with pytest.raises(ValueError, match="no demonstration"):
        encode.encode_demonstrations(bare, CharTokenizer(countdown.alphabet), 40)
