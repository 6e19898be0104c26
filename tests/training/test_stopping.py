"""What is saved when a run is asked to stop, and when; tests/test_train.py has real signals."""

import signal
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sapo_jax.parallel import distributed
from sapo_jax.training import startup, stopping
from sapo_jax.training.engine import Bundle
from sapo_jax.training.stopping import Finished, Interrupted, Stop


class Stream:
    position = 0


class Checkpoints:
    waited = 0

    def wait(self):
        self.waited += 1


class Lease:
    lost = False

    def check(self):
        if self.lost:
            raise RuntimeError("another process took it")


@pytest.fixture
def saved(monkeypatch):
    """(iteration, value of the state, positions) of what is saved."""
    found = []

    def save(_, iteration, bundles, positions, *, alone, score):
        found.append((iteration, float(bundles[0].state["w"][0]), list(positions)))

    monkeypatch.setattr(startup, "save", save)
    return found


def runs(iteration):
    stream = Stream()
    stream.position = iteration
    return [Bundle(None, {"w": jnp.full(4, iteration, jnp.float32)}, None, (stream,))]


@jax.jit
def _updated(state):
    return jax.tree.map(lambda x: x + 1, state)


update = jax.jit(_updated, donate_argnums=0)


def started(minutes=0.0, lease=None):
    stop = Stop(Checkpoints(), lease or Lease(), minutes, alone=True)
    stop.begin(0, runs(0))
    return stop


def iteration_of(stop, number):
    stop.hold(evaluates=False)
    stop.finish(Finished.now(number, runs(number)))
    stop.release()


@pytest.mark.parametrize("kind", [{"evaluates": True}, {"evaluates": False, "apart": True}])
def test_a_long_iteration_leaves_a_copy_behind(kind, saved):
    """Guards against an update that has taken the buffers of the state that is to be saved, and
    against positions of streams that have gone on."""
    stop = started()
    iteration_of(stop, 1)
    bundles = stop._finished.bundles
    # For the first time: how long it will take is not known.
    assert stop.hold(**kind) == stop.check
    jax.block_until_ready(update(bundles[0].state))
    assert bundles[0].state["w"].is_deleted()
    bundles[0].streams[0].position = 7
    stop._note(signal.SIGTERM)
    with pytest.raises(Interrupted):
        stop.check()
    assert stop.leave().code == 143
    assert saved == [(1, 1.0, [1])]
    assert stop._checkpoints.waited == 1


def test_a_short_iteration_is_waited_for(saved):
    """No copy is taken of every state: where the rest of an iteration is short, it is done."""
    stop = started()
    iteration_of(stop, 1)
    assert stop.hold(evaluates=False) is None
    assert not stop._finished.copied
    stop._note(signal.SIGINT)
    stop.check()
    stop.finish(Finished.now(2, runs(2)))
    assert stop.wants_saving()
    stop.save()
    stop.release()
    with pytest.raises(Interrupted):
        stop.check()
    error = stop.leave()
    assert error.code == 130
    assert error.text == "stopped by Ctrl-C: iteration 2 is saved; the same command goes on"
    assert saved == [(2, 2.0, [2])]
    with pytest.raises(KeyboardInterrupt):
        stop._note(signal.SIGINT)


def test_what_is_saved_is_not_saved_again(saved):
    stop = started()
    stop._note(signal.SIGTERM)
    assert stop.leave().text == "stopped by SIGTERM: the same command goes on"
    iteration_of(stop, 1)
    stop.save()
    assert "iteration 1 is saved" in stop.leave().text
    assert len(saved) == 1


def test_processes_look_at_each_other_now_and_then(monkeypatch):
    """Guards against a collective for each of the many segments of a short rollout."""
    now, looks = [0.0], []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "all_gather", lambda x: looks.append(x) or np.asarray(x)[None])
    stop = started()
    for number in range(1, 4):
        looks.clear()
        for _ in range(100):
            now[0] += 0.1
            stop.pause()
        assert len(looks) == (100 if number == 1 else 5)  # each 2 s, when it is known
        iteration_of(stop, number)
    now[0] += 100.0
    stop.pause()
    iteration_of(stop, 4)
    looks.clear()
    stop.pause()
    assert len(looks) == 1


def test_checkpoints_come_by_time_too(saved, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    stop, never = started(minutes=2.0), started()
    wanted = []
    for iteration in range(1, 7):
        now[0] += 50.0
        for each in (stop, never):
            iteration_of(each, iteration)
        wanted.append(stop.wants_saving())
        if wanted[-1]:
            stop.save()
        assert not never.wants_saving()
    assert wanted == [False, False, True, False, False, True]
    assert [iteration for iteration, *_ in saved] == [3, 6]


@pytest.fixture
def ended(monkeypatch):
    found = []
    monkeypatch.setattr(stopping.signals, "end", lambda number, text: found.append((number, text)))
    return found


def test_a_loop_that_does_not_answer_is_saved_beside_it(saved, ended, monkeypatch):
    """Guards against a run that compiles, or decodes one long segment, until SIGKILL comes."""
    stop = started()
    iteration_of(stop, 1)
    stop._overdue(signal.SIGTERM)
    assert saved == [(1, 1.0, [1])]
    assert ended == [(15, "stopped by SIGTERM: iteration 1 is saved; the same command goes on")]
    iteration_of(stop, 2)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    stop._overdue(signal.SIGTERM)  # saving takes all processes, so this one comes to the next check
    assert len(saved) == len(ended) == 1


def test_a_loop_in_its_updates_is_given_up_on(saved, ended, monkeypatch):
    """What it has taken the buffers of cannot be saved any more; an older checkpoint has to do."""
    monkeypatch.setattr(stopping, "SHORT", 0.2)
    stop = started()
    iteration_of(stop, 1)
    stop.hold(evaluates=False)
    thread = threading.Thread(target=stop._overdue, args=(signal.SIGTERM,))
    thread.start()
    thread.join()
    assert saved == []
    assert ended == [(15, "stopped by SIGTERM: the same command goes on")]


def test_a_run_that_lost_its_lease_saves_nothing(saved, ended):
    """Guards against the last checkpoint of a suspended run beside those of its successor."""
    lease = Lease()
    stop = started(lease=lease)
    iteration_of(stop, 1)
    lease.lost = True
    stop._note(signal.SIGINT)
    with pytest.raises(RuntimeError, match="another process"):
        stop.leave()
    stop._overdue(signal.SIGINT)
    assert saved == []
    assert len(ended) == 1


def test_copies_come_back_as_they_were(monkeypatch):
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(np.arange(8 * jax.device_count(), dtype=np.float32), sharding)
    again = stopping._copied(x)()
    assert again.sharding == x.sharding
    np.testing.assert_array_equal(again, x)
    assert not distributed.any_process(False)
