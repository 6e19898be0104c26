"""A process that takes batches of a mixture with a length filter, and keeps its position."""

import json
import os
import sys
import time

from sapo_jax import tasks
from sapo_jax.data.stream import Fits, Stream
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.tasks.prepared import Prepared

SHARES = {"prepared": 0.5, "chain_sum": 0.25, "countdown": 0.25}


def make(directory, *, workers=0, seed=5):
    """Three tasks, of which the prepared one has prompts that are too long."""
    made = {
        "prepared": Prepared(directory=str(directory)),
        "chain_sum": tasks.make("chain_sum", terms=3),
        "countdown": tasks.make("countdown"),
    }
    characters = set().union(*(task.alphabet for task in made.values()))
    keep = Fits(CharTokenizer("".join(sorted(characters))), width=14)
    sources = {name: task.examples("train") for name, task in made.items()}
    return Stream(sources, seed, shares=SHARES, keep=keep, workers=workers)


def main(directory, workdir, batches, workers):
    """Append batches to a file; the position beside it says which of them count."""
    stream = make(directory, workers=int(workers))
    state, lines = os.path.join(workdir, "state.json"), os.path.join(workdir, "batches.jsonl")
    kept = []
    if os.path.exists(state):
        with open(state) as file:
            position, done = json.load(file)
        with open(lines) as file:
            kept = file.readlines()[:done]
        stream.position = position
    with open(lines, "w") as file:
        file.writelines(kept)
        for done in range(len(kept) + 1, int(batches) + 1):
            examples = stream.take(8)
            file.write(json.dumps([(e.task, e.prompt, e.answer) for e in examples]) + "\n")
            file.flush()
            time.sleep(0.01)  # so that the kill comes in the middle
            if done % 3 == 0:
                with open(state + ".new", "w") as new:
                    json.dump([stream.position, done], new)
                os.replace(state + ".new", state)
                print(done, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
