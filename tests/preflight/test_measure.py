"""Preflight lowers what trains, counts it, and demands what it should."""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import jax
import pytest
from ml_collections import ConfigDict

from configs.pod import qwen3_4b_v5e, qwen3_8b_v6e, qwen3_30b_a3b_v5p
from experiments.pods import run
from sapo_jax import cli, preflight, train
from sapo_jax.model import params
from sapo_jax.preflight import chips, costs, demands, hlo, measure, model_flops, programs
from sapo_jax.report import preflight_tables
from sapo_jax.report.run import write
from sapo_jax.training import settings
from tests import tiny_config


def tiny(devices=None, /, **fields):
    config = tiny_config.get_config()
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return settings.from_config(config, devices=devices)


def module(text):
    """The operations of a module, without its name and locations."""
    location = r'loc\((?:"[^"]*"|\([^()]*\)|[^()"])*\)'
    text = re.sub(rf"(?m)^#loc.*$|\s*{location}", "", text)
    return re.sub(r"module @\S+", "module", text).strip()


def differing(directory, **more):
    """Names of programs whose StableHLO is not among what a run compiles, as JAX writes it down."""
    fields = {"iterations": 1, "eval.every": 0, "batch.group_size": 2, "sampler.slots": 0,
              "batch.oversample": 2, "correction.name": "token_tis", "compilation_cache": "",
              "learner.old_logp": "recompute"}  # fmt: skip
    checked = tiny(**fields | more)
    dumped = pathlib.Path(directory) / "stablehlo"
    jax.clear_caches()
    jax.config.update("jax_dump_ir_to", str(dumped))
    try:
        train.run(checked, pathlib.Path(directory) / "run")
    finally:
        jax.config.update("jax_dump_ir_to", "")
    trained = {module(path.read_text()) for path in dumped.glob("*")}
    lowered = {k: module(p.lower().as_text()) for k, p in programs.programs(checked).items()}
    return [name for name, text in lowered.items() if text not in trained]


def test_the_programs_are_those_that_train(tmp_path):
    assert differing(tmp_path) == []


def test_the_tower_is_counted():
    """Its pass over the images is a program; where it is learnt, updates are three of it."""
    fields = {"task.name": "count_shapes", "task.options": {"size": 64}, "model.preset": "tiny_vl",
              "data.max_image_tokens": 64, "init_from": "runs/cold"}  # fmt: skip
    found = programs.programs(tiny(**fields))
    settled = tiny(**fields | {"model.train_vision": True})
    learnt = programs.programs(settled)
    flops = model_flops.tower(settled, 4)  # prompts of a minibatch
    assert found["see"].model_flops == 2 * flops
    assert learnt["update"].model_flops - found["update"].model_flops == pytest.approx(3 * flops)
    kinds = programs.bytes_per_chip(found["see"].arguments["rows"]), found["see"].result["rows"]
    assert kinds[0] == 8 * (256 * 96 * 4 + 12)
    assert programs.bytes_per_chip(kinds[1]) == 8 * (2 * 64 * 128 * 4 + 12)
    vision = settled.model.vision
    blocks = vision.depth * (2 * 64 * (4 * 64 + 2 * 192) + 4 * 64 * 256)
    mergers = 2 * 2 * (256 * 256 + 256 * 128) / 4
    assert flops == 4 * 256 * (2 * 96 * 64 + blocks + mergers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"model.preset": "tiny_vl", "task.name": "count_shapes", "data.max_image_tokens": 4,
         "task.options": {"size": 16, "cells": 2}, "model.train_vision": True, "mesh.fsdp": 4},
        {"mesh.fsdp": 2, "mesh.tensor": 2},
        {"mesh.fsdp": 4, "sampler.mesh.tensor": 2},
        {"mesh.fsdp": 2, "mesh.tensor": 2, "lora.rank": 2},
        {"mesh.fsdp": 2, "mesh.expert": 2, "model.preset": "nano_moe",
         "learner.routing_replay": "R2"},
    ],
)  # fmt: skip
def test_the_programs_are_those_that_train_on_a_mesh(tmp_path, fields):
    """On four devices of the CPU; a sparse policy replays the experts of its scoring."""
    call = f"differing({str(tmp_path)!r}, **{fields})"
    code = f"from tests.preflight.test_measure import differing; print({call})"
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | flags,
        cwd=pathlib.Path(__file__).parents[2],
    )  # fmt: skip
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_memory_of_an_update_of_adapters_compiled_for_tpu():
    """Of a shape of 1.7B parameters: no moments, no gradients and no copies of the base."""
    pytest.importorskip("libtpu", reason="compiles for TPU: pip install libtpu")
    devices, _ = chips.devices("v5p:2x2x1")
    fields = {
        "model.preset": "qwen3_1_7b", "dtype.compute": "bfloat16", "learner.remat": True,
        "mesh.data": -1, "batch.prompts": 16, "batch.group_size": 8, "batch.minibatches": 4,
        "batch.micro_batches": 8, "sampler.slots": 0, "learner.head_chunk": 1024,
        "data.max_prompt_tokens": 256, "sampler.max_new_tokens": 768,
    }  # fmt: skip
    found = {}
    for rank in (None, 16):
        checked = tiny(devices, **fields, **{"lora.rank": rank})
        program = programs.programs(checked)["update"]
        found[rank] = measure.measure(checked, "update", program, chips.chip_of("v5p:2x2x1"))
    full, adapters = (found[rank]["memory"] for rank in (None, 16))
    assert adapters["kinds"]["parameters"] < 1.02 * full["kinds"]["parameters"]
    assert adapters["kinds"]["optimizer"] < 0.02 * full["kinds"]["optimizer"]
    assert adapters["total"] <= 0.35 * full["total"]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_collectives_of_an_update_compiled_for_tpu(axis):
    """Data parallelism adds up gradients once; `fsdp` gathers parameters, and scatters gradients.

    With remat each parameter of a layer is gathered forward and backward; a gradient summed after
    the loop over micro-batches, or gathered parameters kept over it, would show here.
    """
    pytest.importorskip("libtpu", reason="compiles for TPU: pip install libtpu")
    micro_batches, devices = 2, chips.devices("v5e:2x2")[0]
    fields = {f"mesh.{axis}": -1, "model.preset": "tiny", "batch.micro_batches": micro_batches,
              "learner.remat": True, "dtype.compute": "bfloat16"}  # fmt: skip
    checked = tiny(devices, **fields)
    program = programs.programs(checked)["update"]
    compiled = hlo.parse(hlo.compiled(program.lower()).as_text())
    moved = costs.collectives(compiled, unknown=program.turns)
    sizes = 4 * params.count(checked.model)
    by_kind = {kind: [c for c in moved if c.kind == kind] for kind in costs.COLLECTIVES}
    used = {kind for kind, found in by_kind.items() if found}
    if axis == "data":
        assert used == {"all-reduce"}
        assert sum(c.times * c.bytes for c in moved) == pytest.approx(sizes, rel=0.01)
        return
    assert used <= {"all-reduce", "all-gather", "reduce-scatter"}
    split = [s for s in params.layer_table(checked.model).values() if "embed" in s.axes]
    layers = checked.model.num_hidden_layers
    for kind, passes in (("all-gather", 2), ("reduce-scatter", 1)):
        inside = [c for c in by_kind[kind] if c.loops == (micro_batches, layers)]
        assert 0 < len(inside) <= passes * len(split)
    outside = [c for c in by_kind["all-gather"] if layers not in c.loops]
    assert len(outside) <= 2  # the embedding and the last norm


def test_what_does_not_fit_is_told_and_a_micro_batch_that_fits_is_found(monkeypatch):
    """The compiler refuses 8 rows; 4 leave too little to spare."""
    refusal = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 32G of 15.75G hbm.\nDetails")

    def measure(checked, name, program, chip):
        rows = 16 // checked.hp.static.micro_batches
        if rows >= 8:
            raise refusal
        return {"memory": {"total": 2**32 * rows}}

    monkeypatch.setattr("sapo_jax.preflight.measure.measure", measure)
    checked, chip = tiny(**{"batch.pack": False}), chips.CHIPS["v5e"]

    def settings_of(micro_batches):
        return tiny(**{"batch.pack": False, "batch.micro_batches": micro_batches})

    tried = preflight.largest_micro_batch(settings_of, chip)
    assert [(t["rows"], t["fits"]) for t in tried] == [(1, True), (2, True), (4, False)]
    assert "--config.batch.micro_batches=8" in preflight_tables.fit_text(tried, chip.hbm)
    found = preflight.report(checked, "v5e:1x1", ["update"], tpu=False)
    assert found["refused"] == {"update": "RESOURCE_EXHAUSTED: Used 32G of 15.75G hbm."}
    with pytest.raises(ValueError, match=r"'scores' must be one of .*update"):
        preflight.report(checked, "v5e:1x1", ["scores"], tpu=False)
    refusal = jax.errors.JaxRuntimeError("INTERNAL: a mistake")
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        preflight.report(checked, "v5e:1x1", ["update"], tpu=False)


@pytest.fixture(scope="module")
def report():
    """Everything about the programs of a tiny run, on one device of the CPU."""
    return preflight.report(tiny(**{"learner.old_logp": "recompute"}), "v5e:1x1", tpu=False)


def test_memory_is_told_by_kind(report):
    checked = tiny()
    weights = 4 * params.count(checked.model)
    for r in report["programs"]:
        kinds = r["memory"]["kinds"]
        assert kinds["parameters"] == weights
        assert kinds["optimizer"] == pytest.approx(2 * weights, rel=1e-3)
        parts = sum(kinds.values()) + r["memory"]["temporaries"]
        # The total is the compiler's, which rounds each array up, and knows of a few scalars more.
        assert parts == pytest.approx(r["memory"]["total"], rel=0.02)


def test_flops_are_those_of_the_model_and_what_is_computed_again(report):
    by_name = {r["program"]: r for r in report["programs"]}
    score, update = by_name["score"], by_name["update"]
    assert update["model_flops"] == 3 * score["model_flops"]
    # Forward and backward (twice), nothing again; XLA computes all S·S scores.
    assert 1 < score["flops"] / score["model_flops"] < 1.5
    assert score["flops"] * 2.9 < update["flops"] < score["flops"] * 3.1


def test_a_report_is_readable(report):
    text = preflight_tables.text(report)
    assert "without libtpu" in text
    for name in ("prefill", "decode", "score", "update", "temporaries", "% "):
        assert name in text or name == "% "
    assert json.loads(json.dumps(report)) == report
    assert preflight_tables.markdown([report]).count("\n") == 2 + len(report["programs"])
    refused = report | {"refused": {"update": "Used 20G of 16G hbm."}}
    assert "update DOES NOT FIT: Used 20G" in preflight_tables.text(refused)
    assert "| update | does not fit |" in preflight_tables.markdown([refused])


def test_a_run_shows_the_preflight_that_lies_in_its_directory(report, tmp_path):
    assert "Preflight" not in write(tmp_path).read_text()
    (tmp_path / "preflight.json").write_text(json.dumps(report))
    page = write(tmp_path).read_text()
    for said in ("Preflight", "without libtpu", "prefill", "executed ÷ model FLOPs"):
        assert said in page


def test_what_is_too_large_is_named(report):
    """Each demand can fail: with a chip of half the memory, logits of whole rows, and so on."""
    checked = tiny()
    model = dataclasses.replace(checked.model, vocab_size=5000)  # of small ones logits are nothing
    checked = dataclasses.replace(checked, model=model)
    results = json.loads(json.dumps(report["programs"]))
    update = next(r for r in results if r["program"] == "update")
    decode = next(r for r in results if r["program"] == "decode")
    update["flops"] = 1.5 * update["model_flops"]
    update["logits_rows"] = 10_000
    gather = {"kind": "all-gather", "in_layers": False, "once": 10**9, "largest": 10**9}
    update["collectives"] = decode["collectives"] = [gather]
    update["gathered_share"] = 1.0
    decode["memory"]["temporaries"] = 10**9
    found = demands.checks(checked, results, 1.05 * update["memory"]["total"])
    missed = {c.name for c in found if not c.met}
    assert missed >= {
        "update: memory, GiB", "update: rows of logits at a time",
        "update: gathered outside of layers, GiB", "update: executed / model FLOPs",
        "decode: temporaries, GiB", "decode: largest array gathered, MB",
        "update: share of layers gathered at once",
    }  # fmt: skip


def test_logits_of_whole_rows_are_seen():
    checked = tiny()
    v = checked.model.vocab_size
    buffers = [
        costs.Buffer(0, f"f32[{v},{checked.model.hidden_size}]", "fusion", ""),
        costs.Buffer(0, f"f32[8,31,{v}]", "fusion", ""),
    ]
    assert demands.logits_rows(buffers, checked, None) == 8 * 31
    # As many rows as a multiple of the model's width: a parameter of that size there is not.
    many = costs.Buffer(0, f"f32[{2 * checked.model.hidden_size},{v}]", "fusion", "")
    assert demands.logits_rows([many], checked, None) == 2 * checked.model.hidden_size


def test_stored_tables_are_those_of_the_results():
    """Otherwise: python -m experiments.pods.run --table."""
    reports = run.stored()
    assert (run.ROOT / "docs" / "preflight.md").read_text() == run.page(reports)
    assert "Every demand is met" in run.verdict(reports)
    assert run.RUNS.findall((run.ROOT / "docs" / "pods.md").read_text()) == [run.runs(reports)]


@pytest.mark.parametrize(
    ("config", "count"), [(qwen3_4b_v5e, 16), (qwen3_8b_v6e, 16), (qwen3_30b_a3b_v5p, 128)]
)
def test_pod_configs_are_those_of_the_paper(config, count):
    """Their weights, data and tokenizer are elsewhere; 4 minibatches a rollout, SAPO as it is
    written: Eq. 5-6 with τ of 1 and 1.05, the group's advantages, no KL. See test_paper.
    """
    c = preflight.stand_in(config.get_config())
    assert c.batch.minibatches == 4
    assert (c.objective.name, c.advantages, c.reward.kl_coef) == ("sapo", "group", 0)
    sizes = {**c.mesh}
    assert count % (sizes["tensor"] * sizes["expert"]) == 0
    checked = settings.from_config(_on_one(c))
    objective = checked.hp.objective
    assert objective.hyperparameters == {"kl_coef": 0.0, "tau_pos": 1.0, "tau_neg": 1.05}
    assert (objective.ratio, objective.aggregation) == ("token", "seq_mean")
    assert checked.model.vocab_size == 151936
    assert checked.width + checked.max_new_tokens in (4096, 8192)


def _on_one(c: ConfigDict) -> ConfigDict:
    c.mesh.update(data=1, fsdp=1, tensor=1, expert=1)
    c.sampler.mesh.tensor = 0
    return c


class Device(types.SimpleNamespace):
    """What a mesh asks of a chip that is not there."""

    __eq__, __hash__ = object.__eq__, object.__hash__


@pytest.mark.parametrize(("name", "topology", "count"), run.PODS)
def test_pod_configs_divide_by_the_pods_that_they_name(name, topology, count):
    chip = {"platform": "cpu", "device_kind": "cpu", "process_index": 0, "memory_stats": dict}
    devices = [Device(id=i, **chip) for i in range(chips.parse(topology)[1])]
    c = preflight.stand_in(cli.from_config(name))
    c.mesh.run = count
    settled = settings.from_config(c, devices=devices)
    assert settled.mesh.size == settled.sampler_mesh.size == len(devices)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:2x", "4x4"])
def test_an_unknown_topology_is_refused(name):
    with pytest.raises(ValueError, match="topology"):
        chips.parse(name)


def test_chips_of_a_topology_are_counted():
    assert chips.parse("v5p:4x4x8") == ("v5p", 128)
    assert chips.parse("v6e:4x4") == ("v6e", 16)
