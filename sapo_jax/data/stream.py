"""The examples of a run in order: tasks in fixed shares, seeded shuffles, exact resumption."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sapo_jax.data.tokenizer import Tokenizer
from sapo_jax.tasks.base import Example

AHEAD = 64  # examples that a worker process reads ahead
MAX_DROPPED = 10_000  # in a row: a longer search would look like a hang


def slots(shares: Mapping[str, float], count: int) -> list[int]:
    """Which task each of ``count`` rows belongs to, spread so that any stretch has these shares.

    Args:
      shares: of each task, adding up to 1; what is no whole number of rows goes to the largest
        remainders.
      count: rows of a batch.

    Returns:
      Positions in ``shares``; with counts that m divides, every m-th part of them has equal counts.
    """
    exact = [share * count for share in shares.values()]
    counts = [int(x + 1e-6) for x in exact]
    short = sorted(range(len(exact)), key=lambda k: counts[k] - exact[k])[: count - sum(counts)]
    counts = [n + (k in short) for k, n in enumerate(counts)]
    return [
        k for _, k in sorted(((i + 0.5) / n, k) for k, n in enumerate(counts) for i in range(n))
    ]


@dataclasses.dataclass(frozen=True)
class Fits:
    """Whether an example has room: prompt tokens ≤ ``width``, and its demonstration's ≤ ``room``.

    Args:
      tokenizer: encodes both; the stop token after a demonstration counts.
      width: tokens of room for a prompt.
      room: tokens of room for a demonstration; None where none is learnt from.
      images: what images have room in, see `model.vision.Room`; None where no prompt has any.
    """

    tokenizer: Tokenizer
    width: int
    room: int | None = None
    images: Any = None

    def __call__(self, example: Example) -> bool:
        """True where it has room."""
        count, room, name = len(example.images), self.images, f"example {example.id}: images"
        expanded = room.tokens_of(example.images, name) if room else 0
        if room and (expanded > room.tokens or count > room.count):
            return False
        prompt = len(self.tokenizer.encode_prompt(example.prompt, count))
        if prompt + expanded - count > self.width:
            return False
        return self.room is None or len(self.tokenizer.encode(example.demonstration)) < self.room


@dataclasses.dataclass(frozen=True)
class _Read:
    """From an index to an example of a task, and whether it is one to keep."""

    examples: Sequence[Example]
    task: int
    keep: Callable[[Example], bool] | None

    def __call__(self, index: int) -> tuple[Example, bool]:
        example = dataclasses.replace(self.examples[int(index)], task=self.task)
        return example, self.keep is None or self.keep(example)


def _end_with_parent(worker: int, workers: int) -> None:
    """Workers of a run that was killed would otherwise stay for ever."""
    del worker, workers

    def watch():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _Reader:
    """The examples of one task, epoch after epoch, each epoch in an order of its own."""

    def __init__(self, read: _Read, seed: int, workers: int):
        import grain

        indices = grain.MapDataset.range(len(read.examples)).seed(seed).shuffle().repeat()
        self._order, self._workers = indices.map(read), workers
        self._ahead = None
        self.read = self.dropped = 0

    def move(self, read: int, dropped: int) -> None:
        """Go on from where ``read`` examples were read; what was read ahead is let go."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead, self.read, self.dropped = None, read, dropped

    def at(self, number: int) -> Example:
        """The example that was read as that one, counted from 0."""
        return self._order[number][0]

    def take(self) -> Example:
        """The next example to keep."""
        for _ in range(MAX_DROPPED):
            example, keep = self._order[self.read] if not self._workers else self._next()
            self.read += 1
            if keep:
                return example
            self.dropped += 1
        raise ValueError(
            f"{MAX_DROPPED} examples in a row have no room, such as the prompt "
            f"{example.prompt[:80]!r}: config.data.max_prompt_tokens is too small"
        )

    def _next(self) -> tuple[Example, bool]:
        if self._ahead is None:
            import grain
            from absl import flags

            if not flags.FLAGS.is_parsed():  # Grain's workers read a flag
                flags.FLAGS.mark_as_parsed()
            reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=AHEAD)
            workers = grain.MultiprocessingOptions(self._workers, per_worker_buffer_size=AHEAD)
            rest = self._order[self.read :].to_iter_dataset(reading)
            self._ahead = iter(rest.mp_prefetch(workers, worker_init_fn=_end_with_parent))
        return next(self._ahead)


class Stream:
    """Examples of the run's tasks in fixed shares of every batch, from a position to resume at.

    The order is a function of the seed and of the position alone: worker processes, the number of
    processes of a run and restarts do not change it. Every process of a run follows the whole
    order, which costs little beside sampling, so that the length filter never needs to communicate;
    `sharding.place` places its part.

    Args:
      sources: examples of each task by its name; ``Example.task`` counts them.
      seed: of the order; each epoch of each task has its own.
      shares: of each task in a batch, adding up to 1; equal ones by default.
      keep: examples for which it is false are passed over, and counted.
      workers: Grain worker processes that read ahead, for each task; 0 reads when asked.

    Raises:
      ValueError: a source is empty.
    """

    def __init__(
        self,
        sources: Mapping[str, Sequence[Example]],
        seed: int,
        *,
        shares: Mapping[str, float] | None = None,
        keep: Callable[[Example], bool] | None = None,
        workers: int = 0,
    ):
        for name, examples in sources.items():
            if not len(examples):
                raise ValueError(f"the task {name!r} has no examples to learn from")
        self.shares = dict.fromkeys(sources, 1 / len(sources)) if shares is None else dict(shares)
        self._readers = {
            name: _Reader(_Read(examples, k, keep), (seed + k) % 2**32, workers)
            for k, (name, examples) in enumerate(sources.items())
        }

    @property
    def position(self) -> dict[str, dict[str, int]]:
        """Examples read and dropped so far, by task: all that a checkpoint needs to keep."""
        return {name: {"read": r.read, "dropped": r.dropped} for name, r in self._readers.items()}

    @position.setter
    def position(self, position: Mapping[str, Mapping[str, int]]) -> None:
        if not isinstance(position, Mapping) or set(position) != set(self._readers):
            raise ValueError(
                f"the position {position} is not one in the tasks {', '.join(self._readers)}"
            )
        for name, reader in self._readers.items():
            reader.move(**position[name])

    @property
    def dropped(self) -> int:
        """Examples passed over so far because they had no room."""
        return sum(reader.dropped for reader in self._readers.values())

    def take(self, count: int) -> list[Example]:
        """The next ``count`` examples.

        Raises:
          ValueError: nothing has room.
        """
        return self.fill([None] * count)[0]

    def fill(self, places: Sequence[int | None]) -> tuple[list[Example], list[int]]:
        """A batch with an example in each place, and as which number of its task it was read.

        Args:
          places: the number of an example that was read before for this place; None for the next.

        Raises:
          ValueError: nothing has room.
        """
        readers, examples, numbers = list(self._readers.values()), [], []
        for k, number in zip(slots(self.shares, len(places)), places, strict=True):
            example = readers[k].take() if number is None else readers[k].at(number)
            examples.append(example)
            numbers.append(readers[k].read - 1 if number is None else number)
        return examples, numbers
