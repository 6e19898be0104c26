"""Streams resume exactly and keep their shares in every batch."""

import json
import os
import pathlib
import subprocess
import sys
import time
from collections import Counter

import grain
import pytest

from sapo_jax import datasets, tasks
from sapo_jax.data.stream import Fits, Stream, slots
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.tasks.base import make_example
from tests.data import killed_stream

TASK = tasks.make("chain_sum", terms=3)


def examples(count, prefix=""):
    return [make_example(f"{prefix}{i}", str(i), "") for i in range(count)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """40 prompts, of which every fourth is too long."""
    root = tmp_path_factory.mktemp("stream")
    rows = [{"prompt": f"{i}+{'0' * (20 * (i % 4 == 0))}{i}=", "answer": i} for i in range(40)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": root / "train.jsonl", "test": root / "train.jsonl"}
    return datasets.prepare_jsonl(files, root / "out")


def test_a_stream_resumes_where_it_was():
    """A stream that restarts its epoch, or skips what was not consumed, trains on other data."""
    whole = Stream({"sum": TASK.examples("train")}, seed=3)
    expected = [whole.take(5) for _ in range(4)]
    first = Stream({"sum": TASK.examples("train")}, seed=3)
    got = [first.take(5) for _ in range(2)]
    second = Stream({"sum": TASK.examples("train")}, seed=3)
    second.position = json.loads(json.dumps(first.position))
    assert got + [second.take(5) for _ in range(2)] == expected


def test_the_order_is_grains():
    """The order of the runs that were recorded before there were mixtures."""
    order = grain.MapDataset.range(50).seed(3).shuffle().repeat()
    stream = Stream({"a": examples(50)}, seed=3)
    assert [int(e.prompt) for e in stream.take(120)] == [int(order[i]) for i in range(120)]


def test_an_epoch_visits_each_example_once_and_epochs_differ():
    stream = Stream({"a": examples(7)}, seed=0)
    epochs = [stream.take(7) for _ in range(3)]
    for epoch in epochs:
        assert sorted(e.prompt for e in epoch) == sorted(e.prompt for e in examples(7))
    assert epochs[0] != epochs[1] != epochs[2]
    assert Stream({"a": examples(7)}, seed=1).take(7) != epochs[0]


@pytest.mark.parametrize(
    ("shares", "count", "expected"),
    [
        ({"a": 0.5, "b": 0.25, "c": 0.25}, 8, [0, 1, 2, 0, 0, 1, 2, 0]),
        ({"a": 1.0}, 3, [0, 0, 0]),
        ({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 3, [0, 1, 2]),
        ({"a": 0.9, "b": 0.1}, 3, [0, 0, 0]),
    ],
)
def test_slots(shares, count, expected):
    assert slots(shares, count) == expected


def test_every_minibatch_has_the_shares():
    """Tasks in blocks would make one update all math and the next all code."""
    shares = {"math": 0.375, "code": 0.25, "logic": 0.25, "sums": 0.125}
    row = slots(shares, 64)
    for parts in (1, 2, 4, 8):
        size = 64 // parts
        for start in range(0, 64, size):
            counts = Counter(row[start : start + size])
            assert [counts[k] for k in range(4)] == [share * size for share in shares.values()]


def test_tasks_do_not_disturb_each_other():
    """Each task has its own epochs: a small one repeats while a large one does not."""
    sources = {"small": examples(4, "s"), "large": examples(1000, "l")}
    stream = Stream(sources, seed=1, shares={"small": 0.5, "large": 0.5})
    taken = [stream.take(8) for _ in range(10)]
    for batch in taken:
        assert Counter(e.prompt for e in batch if e.task == 0) == Counter(
            e.prompt for e in sources["small"]
        )
    large = [e.prompt for batch in taken for e in batch if e.task == 1]
    assert len(set(large)) == len(large) == 40


def test_long_prompts_are_dropped_and_counted(prepared):
    stream = killed_stream.make(prepared)
    taken = [e for _ in range(15) for e in stream.take(8) if e.task == 0]  # two epochs
    assert len(taken) == 60
    assert max(len(e.prompt) for e in taken) <= 14
    assert max(Counter(e.prompt for e in taken).values()) == 2
    assert 10 <= stream.dropped <= 20
    assert stream.position["prepared"]["read"] == 60 + stream.dropped


def test_demonstrations_need_room_for_the_stop_token():
    fits = Fits(CharTokenizer("ab"), width=2, room=3)
    row = make_example("ab", "", "ba")
    assert fits(row)
    assert not fits(make_example("ab", "", "bab"))
    assert not fits(make_example("aba", "", "b"))


def test_what_cannot_be_streamed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'b' has no examples"):
        Stream({"a": examples(1), "b": []}, seed=0)
    monkeypatch.setattr("sapo_jax.data.stream.MAX_DROPPED", 20)
    fits = Fits(CharTokenizer("0123456789"), width=0)
    with pytest.raises(ValueError, match=r"20 examples in a row .*max_prompt_tokens"):
        Stream({"a": examples(5)}, seed=0, keep=fits).take(1)
    stream = Stream({"a": examples(5)}, seed=0)
    for position in ({"b": {"read": 1, "dropped": 0}}, 7):
        with pytest.raises(ValueError, match="not one in the tasks a"):
            stream.position = position


def spawn(prepared, workdir, batches, workers):
    command = [
        sys.executable,
        "-m",
        "tests.data.killed_stream",
        prepared,
        workdir,
        batches,
        workers,
    ]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)


def children_of(pid):
    """Ids of the child processes, where the system has a /proc."""
    every = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for path in every for child in path.read_text().split()]


def is_alive(pid):
    """Whether a process runs; one that ended and was not waited for has no command line."""
    try:
        return bool(pathlib.Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize(("workers", "then"), [(0, 0), pytest.param(2, 1, marks=pytest.mark.slow)])
def test_a_killed_process_resumes_exactly(prepared, tmp_path, workers, then):
    """SIGKILL after batches that no saved position knows; what was read ahead must not be lost."""
    process = spawn(prepared, tmp_path, 10**6, workers)
    assert process.stdout.readline() == "3\n"
    assert process.stdout.readline() == "6\n"
    children = children_of(process.pid)
    assert len(children) >= 3 * workers or not os.path.exists("/proc/self")
    process.kill()
    process.wait()
    after = json.loads((tmp_path / "state.json").read_text())[1]
    process = spawn(prepared, tmp_path, after + 9, then)
    assert process.wait() == 0
    lines = [json.loads(line) for line in (tmp_path / "batches.jsonl").read_text().splitlines()]
    assert len(lines) == after + 9
    stream = killed_stream.make(prepared)
    deadline = time.monotonic() + 30
    while any(is_alive(child) for child in children):
        assert time.monotonic() < deadline, "workers outlived the process that was killed"
        time.sleep(0.05)
    assert lines == [[[e.task, e.prompt, e.answer] for e in stream.take(8)] for _ in lines]
