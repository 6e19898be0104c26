"""Checkpoints come back bit for bit, survive kills, and refuse what does not fit."""

import gc
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as orbax_v0
import pytest
from absl import logging
from etils import epath

from sapo_jax.training import checkpoint
from sapo_jax.training.checkpoint import Checkpoints, restore_params
from sapo_jax.training.digest import digests
from sapo_jax.types import TrainState

ROOT = pathlib.Path(checkpoint.__file__).parents[2]
OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.constant_schedule(1e-3)))


def make_state(seed=0, width=16):
    """A real state, one update from its start, with values that a lossy path would change."""
    keys = jax.random.split(jax.random.key(seed), 2)
    params = {
        "embed": jax.random.normal(keys[0], (32, width)),
        "layers": {
            "kernel": jax.random.normal(keys[1], (2, width, width)).astype(jnp.bfloat16),
            "scale": jnp.array([jnp.nan, -0.0, 1e-42, jnp.inf, -jnp.inf, 1 / 3]),
        },
    }
    grads = jax.tree.map(jnp.ones_like, params)
    updates, opt_state = OPTIMIZER.update(grads, OPTIMIZER.init(params), params)
    params = optax.apply_updates(params, updates)
    return TrainState(jnp.int32(seed), jnp.int32(4 * seed), params, opt_state)


def abstract(state):
    return jax.eval_shape(lambda: state)


def to_bytes(tree):
    return [(x.dtype, x.shape, x.weak_type, np.asarray(x).tobytes()) for x in jax.tree.leaves(tree)]


def assert_same(restored, saved):
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    assert to_bytes(restored) == to_bytes(saved)


def names(directory):
    return sorted(p.name for p in pathlib.Path(directory).iterdir())


@pytest.mark.filterwarnings("error:Sharding info not provided")
def test_round_trip_is_bit_exact(tmp_path, monkeypatch):
    """Guards against optax NamedTuples that come back as dicts, a cast through another dtype, and
    a restore that warns about shardings in every run."""
    monkeypatch.setattr(logging, "warning", lambda *message: pytest.fail(str(message)))
    state, meta = make_state(3), {"position": 2**53 + 1, "lr": 0.1, "epochs": [1, {"a": None}]}
    with Checkpoints(tmp_path / "new" / "checkpoints") as checkpoints:
        checkpoints.save(3, state, meta)
    reader = Checkpoints(tmp_path / "new" / "checkpoints")
    assert reader.latest() == 3
    restored, restored_meta = reader.restore(3, abstract(state))
    assert_same(restored, state)
    assert restored_meta == meta
    assert all(x.sharding == jnp.zeros(()).sharding for x in jax.tree.leaves(restored))


def test_restores_onto_the_wanted_sharding(tmp_path):
    """Guards against a restore that ignores the mesh and leaves everything on one device."""
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    wanted = abstract(state)
    wanted.params["embed"] = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=sharding)
    restored, _ = checkpoints.restore(1, wanted)
    assert restored.params["embed"].sharding == sharding
    assert_same(restored, state)


def test_caller_may_donate_state_and_change_meta_after_save(tmp_path):
    """Guards against a background write that reads buffers or a dict the next update overwrites."""
    state = {"w": jnp.arange(4_000_000.0), "b": [jnp.full((250_000,), i) for i in range(8)]}
    expected = jax.tree.map(np.array, state)
    step = jax.jit(lambda s: jax.tree.map(lambda x: x - 1, s), donate_argnums=0)
    meta = {"position": [1]}
    with Checkpoints(tmp_path) as checkpoints:
        shapes = abstract(state)
        checkpoints.save(1, state, meta)
        for _ in range(5):
            state = step(state)
            meta["position"][0] += 1
    restored, restored_meta = checkpoints.restore(1, shapes)
    jax.tree.map(np.testing.assert_array_equal, restored, expected)
    assert restored_meta == {"position": [1]}


def test_keeps_the_best_and_the_latest(tmp_path):
    """Guards against pruning the best checkpoint, also after a restart, and against keeping all."""
    state = make_state()
    kept = []
    scores = {1: 0.25, 2: 0.5, 4: None, 5: 0.25, 7: 0.5, 8: 0.125}
    for some in ([1, 2, 4], [5], [7, 8]):
        with Checkpoints(tmp_path) as checkpoints:
            for iteration in some:
                checkpoints.save(iteration, state, {}, score=scores[iteration])
                checkpoints.wait()
                kept.append(names(tmp_path))
    assert kept == [["1"], ["2"], ["2", "4"], ["2", "5"], ["7"], ["7", "8"]]
    assert (checkpoints.latest(), checkpoints.best()) == (8, 7)


def test_what_a_kill_left_is_removed_at_the_next_start(tmp_path, monkeypatch):
    """Guards against old checkpoints that stay for ever: killed between commit and pruning, in a
    save, or in a deletion, in a run that has nothing more to save."""
    state = make_state()
    checkpoints = Checkpoints(tmp_path)
    monkeypatch.setattr(Checkpoints, "_prune", lambda *_: None)  # killed before
    for iteration, score in {1: 0.5, 2: 0.25, 3: 0.25, 5: 0.125}.items():
        checkpoints.save(iteration, state, {}, score=score)
        checkpoints.wait()
    monkeypatch.undo()
    for name in ("4", "6"):
        (tmp_path / f"{name}{checkpoint.UNFINISHED}123").mkdir()
    again = Checkpoints(tmp_path)
    again.tidy(3)  # 5 is damaged, say
    assert names(tmp_path) == ["1", "3", "5"]
    again.tidy(5)
    assert names(tmp_path) == ["1", "5"]
    again.save(7, state, {}, score=1.0)
    again.wait()
    assert names(tmp_path) == ["7"]


def test_without_scores_only_the_latest_is_kept(tmp_path):
    """Guards against taking a missing score for a number."""
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest() is None
        for iteration in (0, 1, 2):
            checkpoints.save(iteration, {"params": jnp.ones(3)}, {})
    assert names(tmp_path) == ["2"]
    assert checkpoints.best() is None


def test_predecessor_stays_until_its_successor_reads_back(tmp_path, monkeypatch):
    """Guards against deleting the last good checkpoint because a damaged one was committed."""
    read = checkpoint._read

    def read_damaged(path):
        assert names(tmp_path) == ["1", "2"]
        os.truncate(tmp_path / "2" / "state" / "_METADATA", 100)
        return read(path)

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    monkeypatch.setattr(checkpoint, "_read", read_damaged)
    checkpoints.save(2, make_state(2), {})
    with pytest.raises(ValueError, match=r"iteration 2 .*damaged"):
        checkpoints.wait()
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "2")
    restored, _ = Checkpoints(tmp_path).restore(1, abstract(make_state()))
    assert_same(restored, make_state(1))


def test_a_checkpoint_is_on_the_disk_before_its_predecessor_goes(tmp_path, monkeypatch):
    """Guards against a loss of power that takes the new one, when the old one is gone."""
    synced, fsync = set(), os.fsync

    def noted(file):
        synced.add(os.path.realpath(f"/proc/self/fd/{file}"))
        fsync(file)

    def delete(path):
        new = tmp_path / "2"
        assert synced >= {str(p) for p in (*new.rglob("*"), new, tmp_path)}

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(), {})
        checkpoints.wait()
        monkeypatch.setattr(os, "fsync", noted)
        monkeypatch.setattr(checkpoint, "_delete", delete)
        checkpoints.save(2, make_state(), {})
    assert synced


KILLED = """
    import os, signal, sys, time
    import jax.numpy as jnp, numpy as np
    from sapo_jax.training.checkpoint import Checkpoints

    directory = sys.argv[1]
    checkpoints = Checkpoints(directory)
    checkpoints.save(1, {"params": jnp.arange(8.0)}, {"position": 1})
    checkpoints.wait()
    noise = np.random.default_rng(0).standard_normal((30, 1 << 19), dtype=np.float32)
    checkpoints.save(2, {"params": [jnp.asarray(x) for x in noise]}, {})
    while not any(name.startswith("2.") for name in os.listdir(directory)):
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_during_a_save_leaves_the_previous_one(tmp_path):
    """Guards against taking a half-written checkpoint for the latest, against a cleanup that never
    happens, and against a reader that cleans the directory of a live run."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        timeout=120,
        check=False,
    )
    assert run.returncode == -signal.SIGKILL
    left = names(tmp_path)
    assert left[0] == "1"
    assert left[1].startswith("2.")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() == 1
    state, meta = checkpoints.restore(1, {"params": jax.ShapeDtypeStruct((8,), jnp.float32)})
    assert (list(state["params"]), meta) == (list(range(8)), {"position": 1})
    assert names(tmp_path) == left
    with checkpoints:
        checkpoints.save(3, state, {})
        assert not any(name.startswith("2") for name in names(tmp_path))
    assert names(tmp_path) == ["3"]


def test_kill_during_a_deletion_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    """Guards against a half-deleted checkpoint that a restart reports as damaged."""

    def killed(path):
        os.remove(path / "state" / "_METADATA")
        raise KeyboardInterrupt

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(), {})
    checkpoints.wait()
    monkeypatch.setattr(type(epath.Path(tmp_path)), "rmtree", killed)
    checkpoints.save(2, make_state(), {})
    with pytest.raises(KeyboardInterrupt):
        checkpoints.wait()
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2
    with Checkpoints(tmp_path) as restarted:
        assert restarted.latest() == 2
        restarted.save(3, make_state(), {})
    assert names(tmp_path) == ["3"]


@pytest.mark.filterwarnings("ignore:coroutine", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_damaged_files_are_named_or_harmless(tmp_path):
    """Guards against a missing or truncated file that restores as zeros or as a raw traceback."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    state = make_state(1)
    with Checkpoints(good) as checkpoints:
        checkpoints.save(41, state, {"position": 1}, score=0.5)
    files = [p.relative_to(good) for p in good.rglob("*") if p.is_file()]
    refused = set()
    for file in files:
        for damage in (os.remove, lambda p: os.truncate(p, p.stat().st_size // 2)):
            shutil.copytree(good, bad)
            damage(bad / file)
            message = None
            try:
                restored, meta = Checkpoints(bad).restore(41, abstract(state))
            except ValueError as error:
                message = str(error)
            if message is None:
                assert_same(restored, state)
                assert meta == {"position": 1}
            else:
                assert f"iteration 41 in {bad} is damaged: " in message
                assert f"delete or move {bad / '41'}" in message
                refused.add(file.name)
            shutil.rmtree(bad)
    assert refused >= {"_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt"}
    assert refused & {file.name for file in files if file.parent.name == "d"}
    shutil.copytree(good, bad)
    shutil.rmtree(bad / "41" / "state")
    with pytest.raises(ValueError, match=r"iteration 41 .* is damaged"):
        Checkpoints(bad).restore(41, abstract(state))
    gc.collect()  # Orbax abandons its reads of a damaged file, which warn wherever they are freed


def test_foreign_directories_are_refused_and_left_alone(tmp_path):
    """Guards against restoring, pruning or cleaning what another program wrote."""
    with orbax_v0.CheckpointManager(tmp_path / "v0") as manager:
        manager.save(4, args=orbax_v0.args.StandardSave({"params": {"w": jnp.ones(3)}}))
    orbax_v0.v1.save(tmp_path / "v1" / "4", {"params": {"w": jnp.ones(3)}})
    (tmp_path / "hf" / "4").mkdir(parents=True)
    (tmp_path / "hf" / "4" / "model.safetensors").write_bytes(b"\0" * 64)
    wanted = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    for kind in ("v0", "v1", "hf"):
        before = sorted((tmp_path / kind).rglob("*"))
        message = rf"{tmp_path / kind / '4'} is not a checkpoint of sapo_jax.*another directory"
        with pytest.raises(ValueError, match=message):
            restore_params(tmp_path / kind, wanted)
        with pytest.raises(ValueError, match=message):
            Checkpoints(tmp_path / kind).save(5, {"params": {"w": jnp.ones(3)}}, {})
        assert sorted((tmp_path / kind).rglob("*")) == before


def test_nothing_to_restore(tmp_path):
    """Guards against a bare StopIteration or None where a directory has no checkpoint."""
    wanted = {"w": jax.ShapeDtypeStruct((3,), jnp.float32)}
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "007").mkdir()
    (tmp_path / "run" / "5.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run" / "9").write_text("a file")
    with pytest.raises(ValueError, match=r"run has no latest checkpoint.*found \['007', '5"):
        restore_params(tmp_path / "run", wanted)
    with pytest.raises(ValueError, match=r"missing has no latest checkpoint.*found nothing"):
        restore_params(tmp_path / "missing", wanted)
    assert not (tmp_path / "missing").exists()
    with Checkpoints(tmp_path / "run") as checkpoints:
        checkpoints.save(3, {"params": {"w": jnp.ones(3)}}, {})
    with pytest.raises(ValueError, match=r"run/2 is no finished checkpoint.*\[3\]"):
        checkpoints.restore(2, {"params": wanted})
    with pytest.raises(ValueError, match=r"run has no best checkpoint.*with a score"):
        restore_params(tmp_path / "run", wanted, which="best")
    with pytest.raises(ValueError, match=r"which is 'newest'"):
        restore_params(tmp_path / "run", wanted, which="newest")


def test_mismatches_name_the_first_parameter(tmp_path):
    """Guards against Orbax's silent casts, and against its page-long tree differences."""
    state = make_state()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state, {})

    def check(message, **params):
        wanted = abstract(state)
        wanted = wanted.replace(params=wanted.params | params)
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(1, wanted)
        with pytest.raises(ValueError, match=message):
            restore_params(tmp_path, wanted.params)

    check(
        r"params/embed is stored as float32\[32, 16\] and wanted as float32\[32, 8\]",
        embed=jax.ShapeDtypeStruct((32, 8), jnp.float32),
    )
    check(
        r"params/embed is stored as float32\[32, 16\] and wanted as bfloat16\[32, 16\]",
        embed=jax.ShapeDtypeStruct((32, 16), jnp.bfloat16),
    )
    check(
        r"params/head is stored as nothing and wanted as float32\[4\]",
        head=jax.ShapeDtypeStruct((4,), jnp.float32),
    )
    check(r"params/layers/kernel is stored as bfloat16\[2, 16, 16\] and wanted as noth", layers={})
    with pytest.raises(ValueError, match=r"opt_state/1/0/count is stored as int32\[\] and wanted"):
        checkpoints.restore(1, abstract(state).replace(opt_state=()))


def test_restore_params_takes_the_wanted_ones_only(tmp_path):
    """Guards against init_from needing the optimizer of the other run, or taking its last
    parameters where the best were asked for."""
    with Checkpoints(tmp_path) as checkpoints:
        for seed, score in ((1, 0.1), (2, 0.9), (3, 0.5)):
            checkpoints.save(seed, make_state(seed), {}, score=score)
    wanted = abstract(make_state()).params
    assert_same(restore_params(tmp_path, wanted), make_state(3).params)
    assert_same(restore_params(str(tmp_path), wanted, which="best"), make_state(2).params)
    assert names(tmp_path) == ["2", "3"]


def test_save_refuses_what_would_not_come_back(tmp_path):
    """Guards against a checkpoint that overwrites a newer run, and a meta that changes in JSON."""
    state = {"params": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, state, {})
        for meta in ({"a": (1, 2)}, {1: "a"}, {"a": np.int32(1)}, {"a": float("nan")}):
            with pytest.raises(ValueError, match="do not survive JSON"):
                checkpoints.save(6, state, meta)
        with pytest.raises(ValueError, match="score nan"):
            checkpoints.save(6, state, {}, score=float("nan"))
        for iteration in (4, 5):
            with pytest.raises(ValueError, match=r"holds iteration 5; expected a later one"):
                checkpoints.save(iteration, state, {})
    assert names(tmp_path) == ["5"]


def flip(path, name, bit=3):
    """Another bit in the middle of the stored bytes of an array."""
    whole = bytearray(path.read_bytes())
    where = next(i for i in range(len(whole)) if name in whole[i : i + len(name)])
    whole[where + len(name) // 2] ^= 1 << bit
    path.write_bytes(whole)


def noise(seed):
    """Bytes that no compression shortens, so that they stand in a file as they are."""
    return np.random.default_rng(seed).integers(0, 2**32, 4096, np.uint32)


@pytest.mark.parametrize("name", ["params/layers/a", "opt_state/mu", "params/b"])
def test_a_flipped_bit_names_the_parameter_and_its_file(tmp_path, name):
    """Guards against weights that are silently others than those saved, and against a message
    that leaves open which disk block to look at."""
    state = {"params": {"layers": {"a": noise(0)}, "b": noise(1)}, "opt_state": {"mu": noise(2)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {"position": 3})
    value = {"params/layers/a": noise(0), "params/b": noise(1), "opt_state/mu": noise(2)}[name]
    (file,) = (p for p in tmp_path.rglob("d/*") if value.tobytes()[:64] in p.read_bytes())
    flip(file, value.tobytes())
    place = re.escape(f"{file.relative_to(tmp_path / '4')}")
    damaged = rf"iteration 4 in {tmp_path} is damaged: {name} fails its checksum; see {place}"
    with pytest.raises(ValueError, match=damaged):
        checkpoints.restore(4, abstract(state))
    wanted = abstract(state)["params"]
    if name.startswith("params"):
        with pytest.raises(ValueError, match=damaged):
            restore_params(tmp_path, wanted)
    else:  # what is not read is not looked at
        jax.tree.map(
            np.testing.assert_array_equal, restore_params(tmp_path, wanted), state["params"]
        )


def test_a_changed_record_is_damage(tmp_path):
    """Guards against a data position or a score with another digit."""
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, {"params": jnp.ones(3)}, {"position": 3}, score=0.5)
    path = tmp_path / "4" / "_CHECKPOINT_METADATA"
    whole = path.read_text()
    for before, after in (('"position": 3', '"position": 2'), ('"score": 0.5', '"score": 0.7')):
        path.write_text(whole.replace(before, after))
        with pytest.raises(ValueError, match="_CHECKPOINT_METADATA fails its checksum"):
            checkpoints.restore(4, {"params": jax.ShapeDtypeStruct((3,), jnp.float32)})


def test_checkpoints_without_checksums_are_read(tmp_path, monkeypatch):
    """Guards against runs that an older version has saved and that cannot go on."""
    state = make_state(1)
    monkeypatch.setattr(checkpoint, "digests", lambda tree: {})
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state, {})
    path = tmp_path / "4" / "_CHECKPOINT_METADATA"
    stored = json.loads(path.read_text())
    record = stored["custom_metadata"]
    assert record.pop("checksums") == {}
    record.pop("checksum")
    path.write_text(json.dumps(stored))
    monkeypatch.undo()
    assert_same(checkpoints.restore(4, abstract(state))[0], state)
    assert_same(restore_params(tmp_path, abstract(state).params), state.params)


def test_what_is_not_finite_is_not_saved(tmp_path):
    """Guards against a NaN that replaces the last healthy state."""
    healthy = {"params": {"a": jnp.ones(3), "b": jnp.ones((2, 2), jnp.bfloat16)}}
    lost = {"params": healthy["params"] | {"b": jnp.full((2, 2), jnp.inf, jnp.bfloat16)}}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, healthy, {}, finite=True)
        with pytest.raises(ValueError, match=r"2 is not saved: params/b is not finite; .* \[1\]"):
            checkpoints.save(2, lost, {}, finite=True)
        checkpoints.save(3, lost, {})
    assert names(tmp_path) == ["3"]
    with pytest.raises(ValueError, match="params/b is not finite"):
        checkpoints.restore(3, abstract(lost), finite=True)


BITS = [np.float32, jnp.bfloat16, np.int32, np.uint8, bool]


@pytest.mark.parametrize("dtype", BITS)
def test_a_checksum_sees_each_bit_and_each_place(dtype):
    """Guards against sums in which two elements may change places, or high bits are lost."""
    x = np.random.default_rng(0).integers(0, 2, (3, 4)).astype(dtype)
    others = [x.T.reshape(3, 4), np.roll(x, 1, 0), np.roll(x, 1, 1)]
    for bit in range(8 * x.dtype.itemsize if dtype is not bool else 1):
        other = x.copy()
        raw = other.view(np.uint8).reshape(-1)
        raw[5 * x.dtype.itemsize + bit // 8] ^= 1 << bit % 8
        others.append(other)
    found = [digests({"x": y})["x"].checksum for y in [x, *others]]
    assert len(set(found)) == len(found)
