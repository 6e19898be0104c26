"""What lies where a command is to write stays, unless the command wrote it."""

import json

import pytest

from sapo_jax import evaluate, export, train
from sapo_jax.report import __main__ as report
from sapo_jax.report import page
from sapo_jax.sweep import cohorts, schedule
from sapo_jax.training import files, settings, workdir
from tests import fakes, tiny_config, tiny_sweep

HF = {"config.json": '{"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}'}
FOREIGN = [
    {"thesis.tex": "years of work"},
    {"metrics/part-00000.jsonl": "{}", "samples/iteration-000009.jsonl": "", "notes": "mine"},
    HF,
    HF | {"model.safetensors": "weights"},
    {"config.json": '{"seed": 1}'},
    {".git/HEAD": "ref"},
    {"manifest.json": '{"icons": []}'},
    {"manifest.json": '{"runs": [1]}', "lease.json": "{}"},
]


def fill(directory, contents):
    for name, text in contents.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return directory


def contents_of(directory):
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def tiny(**fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def start_run(directory):
    train.run(settings.from_config(tiny()), directory)


def start_sweep(directory):
    parts = cohorts.make(tiny_sweep.get_config(), tiny_sweep.get_sweep())
    schedule.run(parts, directory)


def start_export(directory):
    run = directory.parent / "run"
    workdir.write_config(run, json.loads(tiny().to_json_best_effort()))
    export.export(run, directory)


@pytest.mark.parametrize("start", [start_run, start_sweep, start_export])
@pytest.mark.parametrize("contents", FOREIGN, ids=str)
def test_a_directory_of_other_files_is_refused_and_left_alone(start, contents, tmp_path):
    """Guards against samples that are cut, weights that are replaced and leases that are left in a
    directory that was named by mistake."""
    directory = fill(tmp_path / "home", contents)
    before = contents_of(directory)
    with fakes.Compilations() as compilations, pytest.raises(ValueError, match="be new, empty, or"):
        start(directory)
    assert contents_of(directory) == before
    assert compilations.count == 0


def test_a_run_is_no_place_for_an_export_nor_for_a_sweep(tmp_path):
    """Guards against a config.json that an export replaces, after which the run is none."""
    run = tmp_path / "run"
    workdir.write_config(run, json.loads(tiny().to_json_best_effort()))
    before = contents_of(run)
    for start in (start_export, start_sweep):
        with pytest.raises(ValueError, match="must be new, empty, or"):
            start(run)
    assert contents_of(run) == before
    workdir.check_workdir(run)


def test_a_file_is_no_directory(tmp_path):
    (tmp_path / "file").write_text("text")
    for start in (start_run, start_sweep, start_export):
        with pytest.raises(ValueError, match="is a file; must be a directory"):
            start(tmp_path / "file")


def test_what_a_killed_start_leaves_is_no_other_file(tmp_path):
    """Guards against a run that cannot be started again, because it was killed too early."""
    workdir.check_workdir(tmp_path / "new")
    fill(tmp_path, dict.fromkeys([".lock", "lease.json", "lease.json.tmp", "config.json.tmp"], ""))
    workdir.check_workdir(tmp_path)
    schedule.check_manifest(epath_of(tmp_path), {"runs": []})


def epath_of(path):
    return files.normal(path)


def run_command(module, *arguments):
    given = module.FLAGS
    given.unparse_flags()
    return module.main(given.parse(["command", *arguments]))


@pytest.mark.parametrize("content", ["notes", '{"mine": 1}', "[]"])
def test_results_replace_results_only(content, tmp_path):
    """Before hours of evaluation, not behind them."""
    file = tmp_path / "file"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"--out=.*file: exists and is not an earlier result"):
        run_command(evaluate, f"--hf={tmp_path}", "--task=countdown", f"--out={file}")
    with pytest.raises(ValueError, match="is a directory"):
        run_command(evaluate, f"--hf={tmp_path}", "--task=countdown", f"--out={tmp_path}")
    run = fill(tmp_path / "run", {"metrics/part-00000.jsonl": '{"iteration": 1}\n'})
    with pytest.raises(ValueError, match=r"--picture=.*file: exists and is not a PNG"):
        run_command(report, str(run), f"--picture={file}")
    with pytest.raises(ValueError, match=r"file: exists and is not a report"):
        page.write(files.normal(file), "run")
    assert file.read_text() == content
    files.check_file(tmp_path / "new", "--out=", evaluate.is_result, "an earlier result")


def test_a_model_directory_is_no_run_to_report(tmp_path):
    fill(tmp_path, HF)
    with pytest.raises(ValueError, match="is a model directory"):
        run_command(report, str(tmp_path))
    assert not (tmp_path / "report.html").exists()
