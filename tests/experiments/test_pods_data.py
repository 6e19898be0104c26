"""The data of the pod configs: what the judge can check, each problem once, nothing of the test."""

import json

from experiments.pods import data
from sapo_jax import tasks


def test_data_is_what_the_task_can_read(tmp_path):
    """A test problem in the training set, or an answer that nothing meets, would be trained on."""
    test = [{"problem": "What is 2+3?", "answer": "5"}]
    train = [
        {"problem": "What is\n2+3?", "answer": "5"},
        {"problem": "Which circle?", "answer": "the one \\boxed{"},
        {"problem": "Half of 7", "answer": "\\frac{7}{2}", "source": "x"},
        {"problem": "Half of 7", "answer": "3.5"},
        {"problem": "Twice 7", "answer": 14},
    ]
    seen = set()
    counts = data.write(test, tmp_path / "test.jsonl", seen)
    assert counts == {"rows": 1, "kept": 1, "repeated": 0, "unchecked": 0}
    counts = data.write(train, tmp_path / "math" / "train.jsonl", seen)
    assert counts == {"rows": 5, "kept": 2, "repeated": 2, "unchecked": 1}
    files = {"train": str(tmp_path / "math" / "train.jsonl"), "test": str(tmp_path / "test.jsonl")}
    task = tasks.make("math_answer", **files)
    assert [e.answer for e in task.examples("train")] == [r"\frac{7}{2}", "14"]
    assert json.loads((tmp_path / "test.jsonl").read_text())["problem"] == "What is 2+3?"
