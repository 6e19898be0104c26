"""What a config asks: tasks in shares, tokenizers from a directory, room for prompts; in a run."""

import json
import pickle
import shutil

import numpy as np
import pytest
from ml_collections import ConfigDict

from sapo_jax import datasets, model, rewards, train
from sapo_jax.data import encode
from sapo_jax.tasks import prepared
from sapo_jax.training import experience, settings, workdir
from tests import tiny_config
from tests.data.test_hf_tokenizer import small
from tests.training.test_metrics import check

pytestmark = pytest.mark.usefixtures("no_plots")
ROWS = [{"prompt": f"{i}+{i}=", "answer": 2 * i} for i in range(1, 35)]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return datasets.prepare_jsonl(dict.fromkeys(("train", "test"), root / "all.jsonl"), root)


def mixture(dataset, **fields):
    config = tiny_config.get_config()
    config.tasks = ConfigDict(
        {
            "doubles": {
                "name": "prepared",
                "options": {"directory": str(dataset), "verifier": "last_number"},
                "share": 0.25,
            },
            "sums": {"name": "chain_sum", "options": {"terms": 2, "modulus": 10}, "share": 0.75},
        }
    )
    config.sampler.max_new_tokens = 6  # shapes of tests/test_train.py, whose programs are cached
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def test_a_run_of_several_tasks(dataset, tmp_path):
    """Each row is judged by its own task, and each task has its own metrics."""
    checked = settings.from_config(mixture(dataset, iterations=1, **{"data.max_prompt_tokens": 4}))
    train.run(checked, tmp_path / "run")
    start, end = workdir.read_metrics(tmp_path / "run")
    conditions = ("", "source=rollout", "eval.every", "an evaluation")
    check([start, end], *conditions, "tasks", "an evaluation, tasks", tasks=("doubles", "sums"))
    for name in ("doubles", "sums"):
        assert 0 <= end[f"reward/{name}"] <= 1
        assert 0 <= start[f"eval/{name}/pass_at_1"] <= 1
    expected = 0.25 * end["reward/doubles"] + 0.75 * end["reward/sums"]
    assert end["reward/mean"] == pytest.approx(expected, abs=1e-6)
    rows = workdir.read_samples(tmp_path / "run", 1)
    assert max(len(row["prompt"]) for row in rows) == 4
    assert end["data/dropped"] > 0  # "10+10=" has no room


def test_rows_are_judged_by_their_own_task(dataset):
    checked = settings.from_config(mixture(dataset))
    stream = experience.open_stream(checked)
    examples = stream.take(8)
    prompts = encode.encode_prompts(examples, checked.tokenizer, checked.width)
    assert np.bincount(prompts.task).tolist() == [2, 6]
    for example in examples:
        assert checked.task.verify(example, f"={example.answer}") == 1
        assert checked.task.verify(example, f"{example.answer}") == (example.task == 0)
    turns = checked.task.examples("test")
    assert [turns[i].task for i in range(4)] == [0, 1, 0, 1]
    assert len(turns) == 2 * len(ROWS)


def test_a_tokenizer_from_a_directory(dataset, tmp_path):
    """Its stop and pad ids are the model's; prompts go through its chat template."""
    files = {"chat_template.jinja": "a{{ messages[0].content }}b"}
    directory = small(tmp_path / "tokenizer", files=files)
    fields = {"tokenizer.directory": str(directory), "tokenizer.template_options": ConfigDict()}
    with pytest.raises(ValueError, match=r"max_prompt_tokens=0: must be at least 1"):
        settings.from_config(mixture(dataset, **fields))
    fields["data.max_prompt_tokens"] = 3
    checked = settings.from_config(mixture(dataset, **fields))
    assert checked.tokenizer.chat
    assert checked.model.stop_tokens == (3,)
    assert checked.model.vocab_size == 4
    assert checked.width == 3
    (directory / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"config.tokenizer: .*no chat template"):
        settings.from_config(mixture(dataset, **fields))
    fields["sampler.max_new_tokens"] = 0
    fields["tokenizer.chat"] = False
    with pytest.raises(ValueError, match="max_new_tokens=0: must be at least 1"):
        settings.from_config(mixture(dataset, **fields))


@pytest.mark.parametrize("vocab_size", [97, 2000])
def test_characters_in_a_model_of_more(dataset, tmp_path, vocab_size):
    """A sampled id above the alphabet has no text; it is no reason to fail after compiling."""
    shape = model.make("nano", vocab_size=vocab_size, stop_tokens=(5,))
    content = json.dumps(model.hf_config.to_json(shape))
    (tmp_path / "config.json").write_text(content)
    checked = settings.from_config(mixture(dataset, **{"model.preset": str(tmp_path)}))
    assert checked.model.vocab_size == vocab_size > checked.tokenizer.vocab_size
    assert checked.model.stop_tokens == checked.tokenizer.stop_ids
    assert checked.tokenizer.decode([vocab_size - 1, *checked.tokenizer.encode("7")]) == "7"


def test_prepared_tasks(dataset):
    task = prepared.Prepared(str(dataset), template="Q: {}", train="train[:10]")
    assert len(task.examples("train")) == 10
    assert task.examples("test")[0].prompt == "Q: 1+1="
    assert task.alphabet == " +0123456789:=Q"
    assert (task.max_prompt_chars, task.max_completion_chars) == (9, 0)
    example = task.examples("test")[3]
    assert task.verify(example, " 8\n") == 1
    assert task.verify(example, "=8") == 0


VERDICTS = [
    ("so 1,072.", "1,072", 1), ("1072.0", "1,072", 1), ("10,72", "1072", 0), ("-5", "5", 0),
    ("it is 7, not 8", "7", 0), ("", "7", 0), ("none", "7", 0), ("0.50", "0.5", 1),
    ("9" * 100_000, "7", 0), ("٣", "3", 0), ("$18", "18", 1), ("7" * 64, "7" * 64, 1),
    ("The answer is −5.", "5", 0), ("The answer is −5.", "-5", 1), ("x=–5", "-5", 1),
    ("The answer is -5.", "−5", 1), ("it is .5", "5", 0), ("it is .5", "0.5", 1),
    ("-.5", "-1/2", 1),
    ("-$5", "-5", 1), ("$-5", "-5", 1), ("−$1,000.50", "-1000.5", 1), ("10-5", "5", 1),
    ("10 - 5 = 5", "5", 1), ("pages 3–5", "5", 1), ("- 5 apples", "5", 1), ("= - 5", "-5", 1),
    ("1/2", "2", 0), ("so 18/2", "9", 1), ("5k", "5", 0), ("5 million", "5", 0), ("2^5", "5", 0),
    ("x_5", "5", 0), ("5/0", "5", 0), ("It is 5!", "5", 1), ("5%", "5", 1), ("(-5)", "-5", 1),
    ("1.5e3", "3", 0), ("5e+3", "3", 0), ("5 dozens", "5", 0), ("5 trillion", "5", 0),
    ("1e-3", "3", 0), ("2²", "2", 0), ("5½", "5", 0), ("1 1/2", "0.5", 0), (r"\frac{6}{2}", "2", 0),
    (r"2\sqrt{3}", "3", 0), ("**5**", "5", 1), (r"\boxed{5}", "5", 1), ("5 tables", "5", 1),
]  # fmt: skip


@pytest.mark.parametrize(("completion", "answer", "verdict"), VERDICTS)
def test_last_number(completion, answer, verdict):
    assert prepared.last_number(completion, answer) == verdict


def test_boxed_answers_are_compared_as_mathematics(dataset):
    task = prepared.Prepared(str(dataset), verifier="boxed")
    example = task.examples("test")[3]
    with rewards.Scorer(task):
        assert task.verify(example, r"\boxed{7} \boxed{\frac{16}{2}}") == 1
        assert task.verify(example, r"\boxed{9}") == task.verify(example, "8") == 0
        copy = pickle.loads(pickle.dumps(task.examples("train")))
        assert copy[0].prompt == "1+1="


REFUSED = [
    ({"verifier": "exat"}, "unknown verifier 'exat'; allowed: exact, last_number"),
    ({"template": "Q"}, r"must contain \{\}"),
    ({"prompt": "question"}, r"no field \['question'\]; it has .*prompt"),
    ({"train": "training"}, r"no split 'training'; it has .*train"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_wrong_options_are_refused(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        prepared.Prepared(str(dataset), **options).examples("train")


def test_a_dataset_that_went_away_is_refused(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    config = mixture(tmp_path / "copy")
    settings.from_config(config)
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"config.tasks.doubles: no prepared dataset at .*copy"):
        settings.from_config(config)
