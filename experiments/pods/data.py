"""The data of the pod configs: data/math/{train,test}.jsonl from two datasets of Hugging Face.

    pip install datasets
    python -m experiments.pods.data

Problems to train on are DeepScaleR's, those of the test are MATH-500's; what the judge cannot check
is left out, and so is a problem to train on that is tested, or stands there twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from sapo_jax import cli
from sapo_jax.tasks import math_answer

SOURCES = {  # split here: dataset, its split
    "test": ("HuggingFaceH4/MATH-500", "test"),
    "train": ("agentica-org/DeepScaleR-Preview-Dataset", "train"),
}
FLAGS = cli.Flags("experiments.pods.data", __doc__)
FLAGS.string("out", "data/math", "Directory to write.")


def write(rows: Iterable[Mapping[str, Any]], path: epath.Path, seen: set[str]) -> dict[str, int]:
    """Write the rows that can be used; adds their problems to ``seen``. Returns counts."""
    lines, counts = [], {"rows": 0, "kept": 0, "repeated": 0, "unchecked": 0}
    for row in rows:
        counts["rows"] += 1
        problem, answer = row["problem"], str(row["answer"])
        key = " ".join(problem.split())
        try:
            math_answer.reference(answer)
        except ValueError:
            counts["unchecked"] += 1
            continue
        if key in seen:
            counts["repeated"] += 1
            continue
        seen.add(key)
        lines.append(json.dumps({"problem": problem, "answer": answer}) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines))
    return counts | {"kept": len(lines)}


def main(given: cli.Flags) -> None:
    """Download both, and write what can be used."""
    from datasets import load_dataset

    seen: set[str] = set()
    for split, (name, part) in SOURCES.items():  # the test first: nothing of it is trained on
        path = epath.Path(given.out).expanduser() / f"{split}.jsonl"
        print(path, write(load_dataset(name, split=part), path, seen))


if __name__ == "__main__":
    cli.run(main, FLAGS)
