"""Named evaluations: each is what it is alone; those that sample alike share their programs."""

import json

import pytest
from ml_collections import ConfigDict

from sapo_jax import evaluate, learner, rewards, train
from sapo_jax.training import evaluation, parameters, settings, workdir
from sapo_jax.training.checkpoint import Checkpoints
from sapo_jax.training.engine import Bundle, Streamed
from tests import fakes, tiny_config
from tests.training.test_metrics import check

pytestmark = pytest.mark.usefixtures("no_plots")
MORE = {"name": "chain_sum", "options": {"terms": 3, "modulus": 10}}
EVALS = {
    "own": {},  # as eval says
    "greedy": {"samples": 2, "temperature": 0.0},
    "more": {"task": MORE},
}


# Room for both tasks, whichever are there.
SIZES = {
    "model.num_hidden_layers": 1, "data.max_prompt_tokens": 8, "sampler.max_new_tokens": 16,
    "sampler.slots": 0,
}  # fmt: skip


def settings_of(given=EVALS, sizes=SIZES, **fields):
    config = tiny_config.get_config()
    config.evals = ConfigDict(given, type_safe=False)
    config.update_from_flattened_dict(sizes | fields)
    return settings.from_config(config)


def found_by(run, warm_up=None):
    state = learner.init(parameters.random(run), run.hp)
    with rewards.Scorer(run.task, run.recipe) as scorer:
        found = evaluation.held_out(Bundle(Streamed(run), state, None, ()), scorer, warm_up)
    return found[0] if found else None


def test_a_named_evaluation_is_what_it_is_alone():
    """Sampled in one batch with others, with noise, prompts and judge of its own."""
    run = settings_of()
    assert [len(one.examples) for one in run.evals.values()] == [8, 8, 8]
    assert {example.task for example in run.evals["more"].examples} == {1}
    found = found_by(run)
    for name, entry in EVALS.items():
        alone = found_by(settings_of({name: entry}))
        keys = {key for key in found if key.startswith(f"eval/{name}/")}
        assert keys == {key for key in alone if key.startswith(f"eval/{name}/")}
        assert {key: found[key] for key in keys} == {key: alone[key] for key in keys}
        assert alone["eval/pass_at_1"] == alone[f"eval/{name}/pass_at_1"]
        assert alone["eval/pass_at_1_low"] == alone[f"eval/{name}/pass_at_1_low"]
    one_set = found_by(settings_of({}))
    assert one_set == {key.replace("/own/", "/"): x for key, x in found.items() if "/own/" in key}


def test_a_prompt_of_two_sets_has_the_same_samples_in_both():
    """Whether they lie in one batch or in two: how large it is, the mesh and batch.prompts say,
    and `sapo-jax evaluate` takes the sets one by one.
    """
    found = [
        found_by(settings_of({"a": {}, "b": {"prompts": 5}, "c": {}}, **{"batch.prompts": prompts}))
        for prompts in (8, 16)
    ]
    assert found[0] == found[1]
    for key in ("length_mean", "pass_at_1"):
        assert found[0][f"eval/a/{key}"] == found[0][f"eval/c/{key}"]


def test_evaluations_that_sample_alike_share_their_programs():
    """The second and third compile nothing, whatever their prompts and temperatures are."""
    given = {"a": {}, "b": {"task": MORE, "prompts": 3}, "c": {"temperature": 0.5, "prompts": 2}}
    run = settings_of(given)
    assert {one.batch for one in run.evals.values()} == {8}
    assert found_by(settings_of({"a": {}}), warm_up=str) is None
    with fakes.Compilations() as compilations:
        found_by(run)
    assert not compilations.count, compilations.names


def test_the_best_checkpoint_goes_by_a_chosen_one(tmp_path, monkeypatch):
    """By one whose best comes first; the mean and the other would take the last."""
    given = {name: EVALS[name] for name in ("greedy", "own")}
    scores = {"own": [0.1, 0.2, 0.9], "greedy": [0.1, 0.6, 0.5]}
    calls = iter(range(3))
    whole = evaluation._metrics

    def scripted(evals, judged, best):
        step = next(calls)
        found = whole(evals, judged, best)
        chosen = {name: own[step] for name, own in scores.items()}
        return found | {"eval/pass_at_1": chosen[best]}

    monkeypatch.setattr(evaluation, "_metrics", scripted)
    fields = {"iterations": 2, "eval.every": 1, "checkpoint.every": 1, "eval.best": "greedy"}
    run = settings_of(given, {}, **fields)
    train.run(run, tmp_path / "run")
    first, *_, last = workdir.read_metrics(tmp_path / "run")
    of_evals = [key for key in first if key.startswith("eval/") and key.count("/") == 2]
    for name, samples in (("own", 4), ("greedy", 2)):
        own = {key: first[key] for key in of_evals if f"/{name}/" in key}
        check(own, "an evaluation, evals", tasks=(name,), samples=samples)
    assert set(first) - set(of_evals) == {
        "iteration", "update", *(f"eval/pass_at_1{end}" for end in ("", "_low", "_high"))
    }  # fmt: skip
    assert last["eval/pass_at_1"] == 0.5
    assert Checkpoints(tmp_path / "run" / "checkpoints").best() == 1
    command = [f"--workdir={tmp_path / 'run'}", "--compilation_cache=", f"--out={tmp_path}/o.json"]
    evaluate.main(evaluate.FLAGS.parse(["evaluate", *command]))
    found = json.loads((tmp_path / "o.json").read_text())
    for name, own in found["sets"].items():
        assert own.pop("eval/prompts") == run.evals[name].prompts
        assert own == {key: last[key.replace("eval/", f"eval/{name}/")] for key in own}
    assert found["settings"]["evals"]["greedy"]["samples"] == 2
    evaluate.FLAGS["eval"].parse("gredy")
    with pytest.raises(ValueError, match="--eval=gredy: must be one of greedy, own"):
        evaluate.main(evaluate.FLAGS)
