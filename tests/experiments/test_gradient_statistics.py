"""The gradient lab as a command: refusals before any compile, numbers that no plot takes down."""

import json
import types

import pytest

from experiments.gradient_statistics import run
from experiments.sampler_gap import run as sampler_gap
from sapo_jax.report import gradlab
from sapo_jax.training import workdir
from tests import tiny_config


@pytest.fixture
def flags(tmp_path):
    """The command's flags for a run that has been started."""
    config = json.loads(tiny_config.get_config().to_json_best_effort())
    workdir.write_config(tmp_path / "run", config)
    given = {name: run.FLAGS[name].default for name in run.FLAGS.own}
    given |= {"workdir": str(tmp_path / "run"), "compilation_cache": ""}
    return lambda **changes: types.SimpleNamespace(**given | changes)


REFUSED = [
    ({"objectives": ["grop"]}, "--objectives: objective='grop': .*; the nearest is 'grpo'"),
    ({"objectives": ["sapo", "dr_grpo"]}, "--objectives: dr_grpo needs .*'max_length'"),
    ({"objectives": []}, "--focus=: must be among --objectives, which are nothing"),
    ({"updates": ["1", "x"]}, "--updates=1,x: must be whole numbers from 0 on"),
    ({"objectives": ["grpo"], "focus": "sapo"}, "--focus=sapo: .* --objectives, which are grpo"),
    ({"workdir": "none"}, "none has no config.json: name the --workdir of a run"),
    ({"workdir": ""}, "--workdir is missing"),
]


def test_images_are_refused_at_once(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "examine", pytest.fail)
    config = tiny_config.get_config()
    fields = {"task.name": "maze", "model.preset": "tiny_vl", "data.max_image_tokens": 64}
    config.update_from_flattened_dict(fields | {"task.options": {}})
    workdir.write_config(tmp_path / "seen", json.loads(config.to_json_best_effort()))
    with pytest.raises(ValueError, match=r"data.max_image_tokens=64: must be 0: the lab is of"):
        run.main(flags(workdir=str(tmp_path / "seen")))
    with pytest.raises(ValueError, match=r"data.max_image_tokens=64: must be 0: gaps are"):
        sampler_gap.main(types.SimpleNamespace(config=config))


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_would_fail_in_the_end_is_refused_at_once(flags, changes, message, monkeypatch):
    monkeypatch.setattr(run, "examine", pytest.fail)
    with pytest.raises(ValueError, match=message):
        run.main(flags(**changes))


def test_the_numbers_outlive_whatever_happens_after_them(flags, tmp_path, monkeypatch, capsys):
    """They are in the run's directory after each stage; a page that fails takes nothing away."""
    path = tmp_path / "run" / "gradlab" / "mine.json"
    seen = []

    def examine(*_):
        for count in (1, 2):
            yield {"stages": list(range(count))}
            seen.append(json.loads(path.read_text()))

    def fail(_):
        raise ValueError("Data has no positive values")

    monkeypatch.setattr(run, "examine", examine)
    monkeypatch.setattr(gradlab, "write", fail)
    monkeypatch.setattr(run.cli, "use_cache", lambda _: None)
    run.main(flags(name="mine"))
    assert seen == [{"stages": [0]}, {"stages": [0, 1]}]
    assert str(path) in capsys.readouterr().out
    assert [p.name for p in path.parent.iterdir()] == ["mine.json"]
