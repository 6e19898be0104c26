"""Records of prepared datasets, read back from ArrayRecord files."""

from __future__ import annotations

from collections.abc import Sequence

from etils import epath

HOW = (
    "prepare it with `python -m sapo_jax.datasets --jsonl=train=FILE --jsonl=test=FILE --out=DIR`, "
    "or `--catalogue=gsm8k --out=DIR` (on a machine with network, then copy DIR here)"
)


def locate(directory: epath.PathLike) -> epath.Path:
    """The directory of a prepared dataset: itself, or the only one at most three levels below.

    Raises:
      ValueError: there is none, or several; the message says how to prepare one.
    """
    directory = epath.Path(directory).expanduser()
    for levels in range(4):
        found = [p.parent for p in directory.glob("*/" * levels + "dataset_info.json")]
        if len(found) == 1:
            return found[0]
        if found:
            names = ", ".join(str(p) for p in sorted(found))
            raise ValueError(f"{directory} holds several datasets: name one of {names}")
    raise ValueError(f"no prepared dataset at {directory}: {HOW}")


def _text(value: bytes) -> str | bytes:
    try:
        return value.decode()
    except UnicodeDecodeError:  # a picture
        return value


class Records(Sequence[dict[str, str]]):
    """The records of one split, texts decoded, read where they are asked for.

    Args:
      directory: see ``locate``.
      split: a name, or a part of one such as ``train[:1000]``.

    Raises:
      ValueError: nothing is prepared there, no such split, no records, another file format, or
        files that are missing or damaged.
    """

    def __init__(self, directory: epath.PathLike, split: str):
        import tensorflow_datasets as tfds

        directory = locate(directory)
        self._directory = directory
        try:
            builder = tfds.builder_from_directory(str(directory))
        except Exception as error:  # protobuf's are its own
            raise self._damaged(error) from error
        splits = [name for name in builder.info.splits if name != "all"]
        if split.partition("[")[0] not in splits:
            raise ValueError(f"{directory} has no split {split!r}; it has {', '.join(splits)}")
        if builder.info.file_format.value != "array_record":
            raise ValueError(
                f"{directory} is in the format {builder.info.file_format.value}: a run reads "
                "array_record (download_and_prepare(file_format='array_record') writes it)"
            )
        for path in builder.info.splits[split.partition("[")[0]].filepaths:
            if not path.exists():
                raise self._damaged(f"{path.name} is missing")
        self._source = builder.as_data_source(split)
        if not len(self._source):
            raise ValueError(f"{directory} has no records in the split {split!r}")
        for end in (0, -1):
            _ = self[end]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, str]:
        position = range(len(self))[index]  # the source itself raises no IndexError
        try:
            record = self._source[position]
        except RuntimeError as error:
            raise self._damaged(error) from error
        if None in record.values():  # what a cut file gives
            raise self._damaged(f"record {position} cannot be read")
        return {k: _text(v) if isinstance(v, bytes) else v for k, v in record.items()}

    def _damaged(self, why: object) -> ValueError:
        return ValueError(f"{self._directory} is damaged: {why}; delete it and prepare it again")
