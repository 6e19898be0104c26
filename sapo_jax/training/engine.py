"""What computes runs, and runs as they stand. Here: one run, streamed; R at once: `Population`.

The loop, the experience and the evaluation are written once, over lists with an entry for each run
of an engine. What they put on the device goes by an engine's few methods; its trees hold one run,
or R with a leading axis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sapo_jax import learner, sampler
from sapo_jax.data.stream import Stream
from sapo_jax.model import lora
from sapo_jax.parallel import sharding
from sapo_jax.training.carry import Carry
from sapo_jax.training.queue import Experience
from sapo_jax.training.settings import Settings
from sapo_jax.types import Batch, Frozen, Prompts, Rollout, TrainState


class Ends(NamedTuple):
    """How the completions of a run's rollout ended, and what they took."""

    length: np.ndarray  # i[B]
    finished: np.ndarray  # i[B]
    computed: int  # rows computed in decode steps, used or not


class Bundle(NamedTuple):
    """Runs that are computed together, as they stand.

    Attributes:
      engine: `Streamed`, or `sweep.population.Population`.
      state: of the engine's runs.
      reference: parameters of their reference policies; None where no KL penalty needs them.
      streams: the training examples of each run.
      origins: which checkpoint its reference, or the base of its adapters, is, and that one's
        fingerprint; None without one.
      frozen: what is not learnt, with LoRA the base: the same for all runs; None without.
      waiting: batches that later iterations learn from, the next one first.
      carry: with a budget, what the next rollout begins with.
    """

    engine: Any
    state: TrainState
    reference: Any
    streams: tuple[Stream, ...]
    origins: tuple[dict | None, ...] = ()
    frozen: Frozen | None = None
    waiting: tuple[Experience, ...] = ()
    carry: Carry | None = None


class Streamed:
    """One run on its device or mesh: its groups are judged while others are decoded.

    It calls the functions of one run as they are. Several such engines with settings that differ in
    traced values share every program, and each run among them is the run alone, bit for bit.
    """

    def __init__(self, run: Settings):
        self.runs, self.hp = (run,), run.hp

    def join(self, trees: Iterable[Any]) -> Any:
        """Trees of the runs, on the host, as one for `call`."""
        (tree,) = trees
        return tree

    def to_host(self, tree: Any) -> list[Any]:
        """A tree of the engine as one on the host for each run."""
        return [sharding.to_host(tree)]

    def place(self, trees: Iterable[Any]) -> Any:
        """Trees of the runs as one on the device; on a mesh they lie there already."""
        (run,) = self.runs
        tree = self.join(trees)
        return jax.device_put(tree, jax.devices()[0]) if run.mesh is None else tree

    def each(self, tree: Any) -> Iterator[Any]:
        """The arrays of each run, on the host."""
        return iter(self.to_host(tree))

    def rows(self, batch: Batch) -> Batch:
        """Rows, of the host too, split over the learner's mesh."""
        return sharding.place(batch, self.runs[0].mesh)

    def share(self, frozen: Frozen) -> Frozen:
        """What all of the runs have in common, for `call`."""
        return frozen

    def call(self, function: Callable, *trees: Any, **static: Any) -> Any:
        """A jitted function of one run, of the engine's runs."""
        return function(*trees, **static)

    def to_sampler(self, params: Any, frozen: Frozen | None = None) -> Any:
        """See `sampler.to_sampler`."""
        (run,) = self.runs
        policy = lora.join(params, frozen, self.hp.lora_scale)
        return sampler.to_sampler(policy, run.model, run.sampler_mesh)

    def rollout(
        self,
        weights: Any,
        prompts: Sequence[Prompts],
        on_groups: Sequence[sampler.OnGroups],
        *,
        iteration: int,
        policy_step: int | None = None,
        evaluation: str | None = None,
        carry: Carry | None = None,
        warm_up: Callable[[str], None] | None = None,
        on_segment: Callable[[], None] | None = None,
    ) -> tuple[Rollout, list[Ends]]:
        """See `sampler.rollout`; prompts, ``on_groups`` and ends are of each run.

        With ``carry`` see `sampler.partial_rollout`.
        """
        (run,), computed = self.runs, [0]
        given = weights, run.model, self.join(prompts)
        options = run.sampling(evaluation) | {
            "policy_step": iteration if policy_step is None else policy_step,
            "on_groups": self.join(on_groups),
            "on_end": computed.append,
            "warm_up": warm_up,
            "on_segment": on_segment,
        }
        if carry is None:
            rollout = sampler.rollout(*given, iteration=iteration, **options)
            return self._moved(rollout), [Ends(*sampler.ends(rollout), computed[-1])]
        own = {"begun_P": carry.tokens > 0, "budget": run.config.sampler.budget}
        rollout, begun = sampler.partial_rollout(*given, carry.begun, **own, **options)
        ends = Ends(*sampler.ends(rollout), computed[-1])
        carry.leave(begun, ends.length, ends.finished)
        return self._moved(rollout), [ends]

    def _moved(self, rollout: Rollout) -> Rollout:
        """From devices of the sampler's own to the learner's one, if it has one."""
        return self.place([rollout]) if self.runs[0].config.sampler.devices else rollout

    def learn(
        self, state: TrainState, minibatches: tuple[Batch, ...], frozen: Frozen | None = None
    ) -> tuple[TrainState, list[dict[str, Any]]]:
        """See `learner.learn`; a record for each run."""
        state, record = learner.learn(state, minibatches, self.hp, frozen)
        return state, [record]


def stack(trees: Iterable[Any]) -> Any:
    """Trees of R runs as one on the host with a leading axis R; numbers become f32 or i32."""

    def join(*leaves):
        stacked = np.stack(leaves)
        return stacked.astype(jax.dtypes.canonicalize_dtype(stacked.dtype), copy=False)

    return jax.tree.map(join, *trees)


def pick(tree: Any, run: int) -> Any:
    """One run of a tree with a leading axis R."""
    return jax.tree.map(lambda x: x[run, ...], tree)


@jax.jit
def copied(tree: Any) -> Any:
    """Copies of arrays, where they lie.

    By one program: as many as there are arrays would queue behind a collective that is under way,
    and XLA's CPU client, whose queues are short, then waits for ever.
    """
    return jax.tree.map(jnp.copy, tree)
