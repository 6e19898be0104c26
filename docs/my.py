"""The tutorial's own task and objective, as a file outside of the package holds them."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from sapo_jax.objectives import Objective
from sapo_jax.tasks.base import GeneratedExamples, draw, make_example


def hinge(x, hp):
    """sg(c)·A·log π with c = exp(−max(0, |log r| − δ)/δ)."""
    beyond = jnp.maximum(jnp.abs(x.log_ratio) - hp["delta"], 0)
    return jax.lax.stop_gradient(jnp.exp(-beyond / hp["delta"])) * x.advantages * x.logp


my_objective = Objective(hinge, "token", "seq_mean", {"delta": 0.2})


@dataclass(frozen=True)
class Reverse:
    """A word of the letters a to e is to be written backwards; its teacher guesses some letters."""

    length: int = 5
    guesses: float = 0.2  # share of a demonstration's letters

    name: ClassVar[str] = "reverse"
    alphabet: ClassVar[str] = "<abcde"
    max_prompt_chars = property(lambda self: self.length + 1)
    max_completion_chars = property(lambda self: self.length)

    def examples(self, split):
        """The words of a split."""
        return GeneratedExamples(split, self._generate)

    def verify(self, example, completion):
        """1.0 iff the completion is the word backwards."""
        return float(completion == example.answer)

    def _generate(self, key):
        word = "".join("abcde"[i] for i in draw(key, [5] * self.length))
        answer, dice = word[::-1], draw(f"{key}/guesses", [1000, 5] * self.length)
        taught = [
            "abcde"[guess] if luck < 1000 * self.guesses else letter
            for letter, luck, guess in zip(answer, dice[::2], dice[1::2], strict=True)
        ]
        return make_example(f"{word}<", answer, "".join(taught))
