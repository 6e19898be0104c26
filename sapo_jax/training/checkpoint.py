"""Asynchronous checkpoints of a run: the newest and the best scored, on a local disk or on gs://."""

from __future__ import annotations

import json
import zlib
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import path as orbax_path
from orbax.checkpoint import v1 as ocp

from sapo_jax.parallel import distributed
from sapo_jax.training.digest import digests, file_of, lost, named
from sapo_jax.training.files import is_remote, normal, sync

FORMAT, STATE = "sapo_jax/1", "state"
UNFINISHED = orbax_path.atomicity_types.TMP_DIR_SUFFIX
COMMIT_FILE = orbax_path.atomicity_types.COMMIT_SUCCESS_FILE
_is_committed = orbax_path.step.is_path_finalized
DAMAGED = ".damaged"
Leaves = dict[str, str]  # path in the state → dtype and shape


class DamagedError(ValueError):
    """A checkpoint that does not read back as it was saved."""


class Checkpoints:
    """The checkpoints ``<directory>/<iteration>/`` of one run; leaving the context waits.

    A checkpoint is deleted only after a newer one is committed and was read back. Reading leaves
    the directory as it is: what a kill left behind is removed by `tidy`, or at the first save.
    """

    def __init__(self, directory: epath.PathLike):
        self.directory = normal(directory)
        self._thread = futures.ThreadPoolExecutor(1)  # reading back many leaves takes a while
        self._saving: futures.Future | None = None
        self._scores: dict[int, float | None] | None = None  # known from the first save on

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()

    def save(
        self,
        iteration: int,
        state: Any,
        meta: dict,
        *,
        score: float | None = None,
        finite: bool = False,
    ) -> None:
        """Start saving a pytree of arrays, each with a checksum; its buffers may be donated then.

        Args:
          iteration: number of finished iterations, above that of every checkpoint so far.
          state: what to save.
          meta: JSON-able dict, such as the data position, handed back by `restore`.
          score: held-out score of this state, higher is better.
          finite: whether to refuse a state that is not.

        Raises:
          ValueError: the iteration is not new, ``meta`` or ``score`` changes in JSON, the
            previous save cannot be read back, or the state is not finite.
        """
        given = {"format": FORMAT, "score": None if score is None else float(score), "meta": meta}
        record = json.loads(json.dumps(given, default=str))  # `meta` may change during the save
        if record != given:
            raise ValueError(
                f"score {score} and meta {meta} do not survive JSON; expected numbers other than "
                "NaN, strings, lists, and dicts with string keys"
            )
        self.wait()
        if self._scores is None:
            if jax.process_index() == 0:
                self._remove_unfinished()
            self._scores = self._read_scores()
        newest = max(self._scores, default=-1)
        if iteration <= newest:
            raise ValueError(
                f"cannot save iteration {iteration} into {self.directory}, which holds iteration "
                f"{newest}; expected a later one: resume from {newest}, or use another directory"
            )
        path, found = self.directory / str(iteration), digests(state)
        if finite and lost(found):
            raise ValueError(
                f"iteration {iteration} is not saved: {lost(found)} is not finite; "
                f"{self.directory} keeps the iterations {sorted(self._scores)}"
            )
        record["checksums"] = {name: digest.checksum for name, digest in found.items()}
        record["checksum"] = _checksum(record)
        response = ocp.save_checkpointables_async(path, {STATE: state}, custom_metadata=record)
        self._saving = self._thread.submit(self._finish, path, response, record, _leaves(state))

    def wait(self) -> None:
        """Return when the last save is committed, read back, and its predecessors are pruned.

        Raises:
          ValueError: what was committed reads back differently; nothing was deleted.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def latest(self, *, before: float = float("inf")) -> int | None:
        """Newest committed iteration, below ``before``, or None."""
        return max((i for i in self.committed() if i < before), default=None)

    def best(self) -> int | None:
        """Iteration with the highest score (the newest of equals), or None if none was scored."""
        return _best(self._read_scores(strict=True))

    def set_aside(self, iteration: int) -> None:
        """Make a damaged checkpoint none, in process 0; its files stay, but on object stores."""
        path = self.directory / str(iteration)
        if jax.process_index() == 0 and is_remote(path):
            (path / COMMIT_FILE).unlink()
        elif jax.process_index() == 0:
            path.rename(path.with_name(path.name + DAMAGED))

    def restore(
        self, iteration: int, abstract_state: Any, *, finite: bool = False
    ) -> tuple[Any, dict]:
        """Read a checkpoint back, bit for bit.

        Args:
          iteration: one of the committed, for instance ``latest()``.
          abstract_state: pytree of `jax.ShapeDtypeStruct`; without a sharding, leaves go to the
            default device.
          finite: whether to refuse a state that is not.

        Returns:
          The state, of the same pytree type, and the ``meta`` of its save.

        Raises:
          DamagedError: it is not what was saved, or not finite.
          ValueError: there is no such checkpoint, it is another program's, or a name, shape or
            dtype is not the wanted one.
        """
        path = self.directory / str(iteration)
        if iteration not in (committed := self.committed()):
            raise ValueError(
                f"nothing to restore: {path} is no finished checkpoint; {self.directory} holds the "
                f"iterations {committed}: name one of those or another directory"
            )
        record, stored = _read(path)
        _check_leaves(path, stored, _leaves(abstract_state))
        return _load(path, abstract_state, record, finite=finite), record["meta"]

    def tidy(self, restored: int) -> None:
        """Remove what kills left behind: unfinished saves, and checkpoints that have a successor.

        Args:
          restored: the iteration that was read back; later ones stay, and so does the best.
        """
        self._scores = self._read_scores()
        distributed.any_process(False)  # nothing goes while another process reads it
        if jax.process_index() == 0:
            self._remove_unfinished()
        self._prune(restored)

    def _finish(self, path: epath.Path, response: Any, record: dict, leaves: Leaves) -> None:
        # Commit, read back, and only then delete: at any moment a checkpoint that can be read lies
        # there. Scores are those of the directory, so a kill before the deletion loses no best one.
        try:
            response.result()
        except Exception as error:
            error.add_note(f"while saving {path}; the checkpoints before it are untouched")
            raise
        if jax.process_index() == 0 and _read(path) != (record, leaves):
            raise _damaged(path, "it does not read back as what was saved")
        sync(path)
        self._scores[int(path.name)] = record["score"]
        self._prune(max(self._scores))

    def committed(self) -> list[int]:
        """The iterations that have a finished checkpoint."""
        numbered = [p for p in _entries(self.directory) if p.name.isdecimal()]
        return sorted(i for p in numbered if str(i := int(p.name)) == p.name and _is_committed(p))

    def _read_scores(self, *, strict: bool = False) -> dict[int, float | None]:
        def score(iteration):
            try:
                return _read(self.directory / str(iteration))[0]["score"]
            except DamagedError:
                if strict:
                    raise
                return None  # an older one that is damaged stops no run

        return {iteration: score(iteration) for iteration in self.committed()}

    def _prune(self, restored: int) -> None:
        older = {iteration for iteration in self._scores if iteration < restored}
        for iteration in sorted(older - {_best(self._scores)}):
            if jax.process_index() == 0:
                _delete(self.directory / str(iteration))
            del self._scores[iteration]

    def _remove_unfinished(self) -> None:
        for path in _entries(self.directory):
            iteration, dot, suffix = path.name.partition(".")
            # on gs:// an unfinished checkpoint has its final name and lacks the commit file
            bare = is_remote(path) and (path / STATE).exists() and not _is_committed(path)
            if iteration.isdecimal() and (UNFINISHED in dot + suffix or bare):
                path.rmtree()


def find(directory: Any, *, which: str = "latest") -> int:
    """The iteration of the newest or best checkpoint of a run's directory of checkpoints.

    Raises:
      ValueError: there is none.
    """
    choices = {"latest": Checkpoints.latest, "best": Checkpoints.best}
    if which not in choices:
        raise ValueError(f"which is {which!r}; expected one of {list(choices)}")
    checkpoints = Checkpoints(directory)
    directory, iteration = checkpoints.directory, choices[which](checkpoints)
    if iteration is None:
        found = sorted(p.name for p in _entries(directory))
        raise ValueError(
            f"nothing to restore: {directory} has no {which} checkpoint; expected directories "
            f"named by iteration (saved with a score for best), found {found[:8] or 'nothing'}"
        )
    return iteration


def restore_params(
    directory: Any, abstract_params: Any, *, which: str = "latest", iteration: int | None = None
) -> Any:
    """Read only the ``params`` of the state in another run's directory of checkpoints.

    ``which`` is "latest", or "best" for the highest score; ``iteration`` names one instead. Raises
    ValueError as `Checkpoints.restore` does, and when none was scored.
    """
    iteration = find(directory, which=which) if iteration is None else iteration
    path, wanted = normal(directory) / str(iteration), {"params": abstract_params}
    record, leaves = _read(path)
    stored = {k: v for k, v in leaves.items() if k.startswith("params/")}
    _check_leaves(path, stored, _leaves(wanted))
    return _load(path, wanted, record)["params"]


def meta_of(directory: Any, iteration: int) -> dict:
    """The ``meta`` that was saved with a checkpoint."""
    return _read(normal(directory) / str(iteration))[0]["meta"]


def _read(path: epath.Path) -> tuple[dict, Leaves]:
    """The record and the leaves of a committed checkpoint, of which no array is read."""
    try:
        stored = ocp.checkpointables_metadata(path)
    except ocp.errors.InvalidLayoutError as error:
        raise (_damaged(path, error) if (path / STATE).exists() else _foreign(path)) from error
    record, state = stored.custom_metadata or {}, stored.metadata.get(STATE)
    if record.get("checksum", (right := _checksum(record))) != right:
        raise _damaged(path, f"the record in {path / '_CHECKPOINT_METADATA'} fails its checksum")
    ours = record.get("format") == FORMAT
    if ours and state is not None:
        return record, _leaves(state)
    # Orbax answers an unreadable file with None and a log line, not with an exception.
    if ours or (STATE in stored.metadata and stored.init_timestamp_nsecs is None):
        raise _damaged(path, f"the metadata in {STATE} cannot be read")
    raise _foreign(path)


def _checksum(record: dict) -> int:
    whole = {key: value for key, value in record.items() if key != "checksum"}
    return zlib.crc32(json.dumps(whole, sort_keys=True).encode())


def _load(path: epath.Path, abstract: Any, record: dict, *, finite: bool = False) -> Any:
    """The arrays named by ``abstract``, which may be part of those stored, as they were saved."""
    device = jnp.zeros(()).sharding
    placed = jax.tree.map(
        lambda x: x if x.sharding else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        abstract,
    )
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    try:
        with context:
            loaded = ocp.load(path, placed, checkpointable_name=STATE)
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise  # the device is at fault, not the file
    except Exception as error:  # Orbax raises bare Exceptions for missing and truncated files
        raise _damaged(path, error) from error
    saved = record.get("checksums", {})  # none of before there were any
    for name, digest in digests(loaded).items():
        if saved.get(name, digest.checksum) != digest.checksum:
            raise _damaged(
                path, f"{name} fails its checksum; see {STATE}/{file_of(path / STATE, name)}"
            )
        if finite and not digest.finite:
            raise _damaged(path, f"{name} is not finite")
    return loaded


def _leaves(tree: Any) -> Leaves:
    """The same for a state and for the plain dicts and lists that Orbax describes it by."""
    return {name: f"{x.dtype}{list(x.shape)}" for name, x in named(tree).items()}


def _check_leaves(path: epath.Path, stored: Leaves, wanted: Leaves) -> None:
    for name in [*wanted, *stored]:
        has, wants = stored.get(name, "nothing"), wanted.get(name, "nothing")
        if has != wants:
            raise ValueError(
                f"checkpoint {path} does not fit: {name} is stored as {has} and wanted as {wants}; "
                "restore with the model and optimizer that it was saved with, or name another one"
            )


def _entries(directory: epath.Path) -> list[epath.Path]:
    return list(directory.iterdir()) if directory.exists() else []


def _best(scores: dict[int, float | None]) -> int | None:
    return max(((s, i) for i, s in scores.items() if s is not None), default=(0, None))[1]


def _damaged(path: epath.Path, why: object) -> DamagedError:
    return DamagedError(
        f"checkpoint of iteration {path.name} in {path.parent} is damaged: {str(why)[:300]}; "
        f"expected every file of a finished save; to go on from an older one, delete or move {path}"
    )


def _foreign(path: epath.Path) -> ValueError:
    return ValueError(
        f"{path} is not a checkpoint of sapo_jax: it lacks the record {FORMAT!r} that every save "
        "writes; name another directory, or move it away"
    )


def _delete(path: epath.Path) -> None:
    """A kill half way leaves what the next start takes for unfinished, never for a checkpoint."""
    if is_remote(path):
        (path / COMMIT_FILE).unlink()  # renaming would copy every file
    else:
        path = path.rename(path.with_name(path.name + UNFINISHED))
    path.rmtree()
