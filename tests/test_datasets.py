"""Datasets are prepared without TensorFlow, read back as written, and refused with a reason."""

import codecs
import json
import pickle
import shutil
import subprocess
import sys
import time

import pytest

from sapo_jax import datasets, tasks
from sapo_jax.tasks.records import Records, locate

PAIRS = [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(50)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """By the command, in a process that says whether TensorFlow was imported."""
    root = tmp_path_factory.mktemp("datasets")
    train, test = jsonl(root / "train.jsonl", PAIRS), jsonl(root / "test.jsonl", PAIRS[:7])
    command = [
        sys.executable, "-X", "importtime", "-m", "sapo_jax.datasets", f"--jsonl=train={train}",
        f"--jsonl=test={test}", f"--out={root / 'out'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "50 in train" in done.stdout
    assert "7 in test" in done.stdout
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "tensorflow_datasets" in modules
    assert "tensorflow" not in modules
    return root / "out"


def test_records_come_back_in_the_order_of_the_file(prepared):
    records = Records(prepared, "train")
    expected = [
        {"prompt": p["prompt"], "answer": str(p["answer"]), "demonstration": ""} for p in PAIRS
    ]
    assert list(records) == expected
    assert list(pickle.loads(pickle.dumps(records))) == expected
    assert len(Records(prepared / "prompts" / "1.0.0", "train[:10]")) == 10


def test_fields_may_have_other_names(tmp_path):
    """The format of AIME sets: ``problem``, and an integer answer; text in any script."""
    path = jsonl(tmp_path / "aime.jsonl", [{"problem": "Où ∑ 数?", "answer": 204, "id": 3}])
    path.write_bytes(2 * (codecs.BOM_UTF8 + path.read_bytes()))  # two files, one after the other
    fields = {"prompt": "problem", "answer": "answer"}
    out = datasets.prepare_jsonl({"test": path}, tmp_path / "out", fields)
    assert Records(out, "test")[0]["prompt"] == "Où ∑ 数?"
    assert [row["answer"] for row in Records(out, "test")] == ["204", "204"]


def test_gsm8k_is_parsed_by_the_catalogue(tmp_path):
    worked = "She has 48/2 = <<48/2=24>>24.\nIn all 48+24 = <<48+24=1072>>1,072.\n#### 1,072"
    path = jsonl(tmp_path / "raw.jsonl", [{"question": "How many?", "answer": worked}] * 3)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    files = {"train": path, "test": path}
    out = datasets.prepare_catalogued("gsm8k", tmp_path / "out", files)
    assert out == tmp_path / "out" / "gsm8k" / "1.0.0"
    records = Records(tmp_path / "out", "test")
    assert len(records) == 3
    assert records[0]["short_answer"] == "1,072"
    assert records[0]["annotation"] == worked.removesuffix("#### 1,072")


def test_gsm8k_as_a_task(tmp_path):
    """The worked answer is the demonstration, and it is right by the task's own verdict."""
    rows = [{"question": f"{i}?", "answer": f"It is <<{i}=9>>9.\n#### {i},000"} for i in (1, 2)]
    files = dict.fromkeys(("train", "test"), jsonl(tmp_path / "raw.jsonl", rows))
    datasets.prepare_catalogued("gsm8k", tmp_path / "data", files)
    task = tasks.make("gsm8k", directory=str(tmp_path / "data" / "gsm8k"))
    for example in task.examples("train"):
        assert task.verify(example, example.demonstration) == 1
        assert task.verify(example, f"It is {int(example.answer[0]) * 1000}") == 1
        assert task.verify(example, "It is 9") == 0


def test_demonstrations_are_kept(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"q": "2+2=", "a": "4", "why": "2+2=4"}])
    fields = {"prompt": "q", "answer": "a", "demonstration": "why"}
    out = datasets.prepare_jsonl({"train": path, "test": path}, tmp_path / "out", fields)
    task = tasks.make("prepared", directory=str(out))
    assert task.examples("train")[0].demonstration == "2+2=4"
    assert (task.alphabet, task.max_completion_chars) == ("+24=", 5)


GOOD = b'{"prompt": "a", "answer": "b"}\n'
BROKEN = [
    (GOOD + b'{"prompt": "a"\n', "line 2: no JSON"),
    (GOOD + b"\n\n" + b'["a"]\n', "line 4: expected an object, got list"),
    (GOOD * 2 + b'{"prompt": "a"}\n', "line 3: 'answer' must be text or a number, got nothing"),
    (b'{"prompt": "", "answer": "b"}', "line 1: 'prompt' must be"),
    (b'{"prompt": "a", "answer": null}', "line 1: 'answer' must be .*got None"),
    (b'{"prompt": "a", "answer": true}', "line 1: 'answer' must be .*got True"),
    (b'{"prompt": "a", "answer": NaN}', "line 1: 'answer' must be .*got nan"),
    (b'{"prompt": "\\ud83d", "answer": "b"}', "line 1: 'prompt' must be text"),
    (GOOD + b'{"prompt": "\xff", "answer": "b"}', "line 2: no JSON.*utf-8"),
    (b"[" * 100_000, "line 1: no JSON"),
    (b"", "is empty"),
    (b"\n \n", "is empty"),
]


@pytest.mark.parametrize(("content", "message"), BROKEN, ids=[b[1] for b in BROKEN])
def test_broken_files_are_refused_by_line(tmp_path, content, message):
    (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match=rf"train.jsonl.* ?{message}"):
        datasets.prepare_jsonl({"train": tmp_path / "train.jsonl"}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_raw_files_are_refused_by_line(tmp_path):
    (tmp_path / "raw.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n{\n')
    with pytest.raises(ValueError, match=r"raw.jsonl, line 2: no JSON"):
        datasets.prepare_catalogued("gsm8k", tmp_path, {"train": tmp_path / "raw.jsonl"})


def test_missing_data_says_how_to_prepare_it(prepared, tmp_path):
    begin = time.monotonic()
    with pytest.raises(ValueError, match=r"no prepared dataset.*python -m sapo_jax.datasets"):
        Records(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match=r"no split 'dev'; it has .*train"):
        Records(prepared, "dev")
    with pytest.raises(ValueError, match="no such file"):
        datasets.prepare_jsonl({"train": tmp_path / "nothing.jsonl"}, tmp_path)
    assert time.monotonic() - begin < 5


def damage(directory, what):
    shard = next(directory.glob("*train.array_record*"))
    if what == "missing":
        shard.unlink()
    elif what == "features":
        (directory / "features.json").unlink()
    elif what == "info":
        (directory / "dataset_info.json").write_text("{")
    else:
        shard.write_bytes(shard.read_bytes()[: {"cut": 30_000, "empty": 0}[what]])


@pytest.mark.parametrize("what", ["missing", "cut", "empty", "features", "info"])
def test_damaged_files_are_refused(prepared, tmp_path, what):
    """A shard that was cut short would otherwise give records of nothing."""
    copy = tmp_path / "copy"
    shutil.copytree(prepared / "prompts" / "1.0.0", copy)
    assert len(Records(copy, "train")) == 50
    damage(copy, what)
    with pytest.raises(ValueError, match=r"copy is damaged: .*prepare it again"):
        Records(copy, "train")


def test_a_second_preparation_is_refused(prepared, tmp_path):
    """TFDS would keep the old records and say nothing."""
    path = jsonl(tmp_path / "other.jsonl", PAIRS[:1])
    with pytest.raises(ValueError, match="exists already"):
        datasets.prepare_jsonl({"train": path}, prepared)


def test_several_datasets_are_told_apart(prepared, tmp_path):
    for name in ("a", "b"):
        directory = tmp_path / name / "1.0.0"
        directory.mkdir(parents=True)
        (directory / "dataset_info.json").write_text("{}")
    with pytest.raises(ValueError, match=r"several datasets: name one of .*a/1.0.0"):
        locate(tmp_path)


def test_downloads_fail_at_once_without_a_network(tmp_path, monkeypatch):
    """The catalogue's own downloader goes on trying for minutes."""
    offline = {"gsm8k": ("tensorflow_datasets.text.gsm8k", "http://127.0.0.1:9")}
    monkeypatch.setattr(datasets, "CATALOGUE", offline)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match=r"cannot be downloaded.*machine with network"):
        datasets.prepare_catalogued("gsm8k", tmp_path)
    assert time.monotonic() - begin < 5
    with pytest.raises(ValueError, match="'math'; the catalogue has gsm8k"):
        datasets.prepare_catalogued("math", tmp_path)
