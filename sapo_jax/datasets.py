"""Prepare a dataset for runs: JSON lines, or one of the TFDS catalogue, as ArrayRecord files.

Only preparing downloads; a run reads what is there, or fails at once. No TensorFlow is needed.
"""

from __future__ import annotations

import json
import math
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from etils import epath

from sapo_jax import cli
from sapo_jax.tasks import jsonl
from sapo_jax.tasks.records import Records

VERSION = "1.0.0"
FIELDS = ("prompt", "answer", "demonstration")
CATALOGUE = {  # module that registers the builder, and where it downloads from
    "gsm8k": ("tensorflow_datasets.text.gsm8k", "https://raw.githubusercontent.com"),
}
RAW = {"gsm8k": {"question": "", "answer": "#### "}}  # texts of a line, with what is once in each
PROBE_SECONDS = 10  # the catalogue's own downloads go on trying for minutes

FLAGS = cli.Flags("datasets", __doc__, "--jsonl=SPLIT=FILE --out=…", "--catalogue=NAME --out=…")
FLAGS.strings("jsonl", [], "SPLIT=FILE of JSON lines, once or more; a bare FILE is train's.")
FLAGS.string("catalogue", "", f"A dataset of the TFDS catalogue: {', '.join(CATALOGUE)}.")
FLAGS.string("out", "", "Data directory.", required=True)
FLAGS.string("prompt", "prompt", "Field of the file that holds the prompt.")
FLAGS.string("answer", "answer", "Field of the file that holds the answer.")
FLAGS.string("demonstration", "", "Field of the file that holds a worked answer.")


def _is_text(value: Any) -> bool:
    """Half of a surrogate pair, which JSON can escape, is no character."""
    return isinstance(value, str) and value.encode(errors="ignore").decode() == value


def prompt_records(path: epath.PathLike, fields: Mapping[str, str]) -> list[dict[str, str]]:
    """Prompts and answers of a JSON-lines file.

    Args:
      path: the file.
      fields: which field of the file holds the ``prompt`` and the ``answer`` (text, or a number),
        and, if it has any, a worked ``demonstration``.

    Raises:
      ValueError: a line is broken or lacks a field, named by its number; or there are none.
    """
    records = []
    for number, line in jsonl.read(path):
        record = dict.fromkeys(FIELDS, "")
        for field, source in fields.items():
            value = line.get(source)
            if type(value) is int or (type(value) is float and math.isfinite(value)):
                value = str(value)
            if not _is_text(value) or (field == "prompt" and not value):
                got = "nothing" if source not in line else repr(value)
                raise ValueError(
                    f"{path}, line {number}: {source!r} must be text or a number, got {got}; "
                    f"the line has {', '.join(map(str, line)) or 'no field'}"
                )
            record[field] = value
        records.append(record)
    return records


def prepare_jsonl(
    files: Mapping[str, epath.PathLike],
    out: epath.PathLike,
    fields: Mapping[str, str] | None = None,
) -> epath.Path:
    """Write a dataset of prompts and answers; returns the directory that ``source`` reads.

    Args:
      files: JSON-lines file of each split.
      out: data directory; the dataset is ``<out>/prompts/1.0.0``, in the order of the files.
      fields: see ``prompt_records``; by default ``prompt`` and ``answer``.

    Raises:
      ValueError: as ``prompt_records``, or the dataset is there already.
    """
    import tensorflow_datasets as tfds

    names = fields or {"prompt": "prompt", "answer": "answer"}
    splits = {split: prompt_records(path, names) for split, path in files.items()}

    class Prompts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        """Prompts with reference answers, and demonstrations where there are any."""

        name = "prompts"
        VERSION = tfds.core.Version(VERSION)

        def _info(self):
            features = tfds.features.FeaturesDict({f: tfds.features.Text() for f in FIELDS})
            return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {split: enumerate(records) for split, records in splits.items()}

        def _generate_examples(self):
            raise NotImplementedError

    return write(Prompts(data_dir=str(out), file_format="array_record"))


def prepare_catalogued(
    name: str, out: epath.PathLike, files: Mapping[str, epath.PathLike] | None = None
) -> epath.Path:
    """Prepare a dataset of the TFDS catalogue by the catalogue's own builder.

    Args:
      name: one of ``CATALOGUE``.
      out: data directory.
      files: the raw file of each split, where they were downloaded already.

    Raises:
      ValueError: unknown name, a broken line, or the dataset is there already.
      RuntimeError: the files are not given and the network is not there.
    """
    import importlib

    if name not in CATALOGUE:
        has = f"the catalogue has {', '.join(CATALOGUE)}{cli.nearest(name, CATALOGUE)}"
        raise ValueError(f"unknown dataset {name!r}; {has}")
    module, host = CATALOGUE[name]
    importlib.import_module(module)
    import tensorflow_datasets as tfds

    builder = tfds.builder_cls(name)
    with tempfile.TemporaryDirectory() as folder:
        if files:
            copies = {split: epath.Path(folder) / split for split in files}
            for split, path in files.items():  # read here: the builder's refusals name no line
                rows = jsonl.read(path, dict.fromkeys(RAW[name], str))
                for number, row in rows:
                    for field, part in RAW[name].items():
                        if part and row[field].count(part) != 1:
                            what = f"field {field!r} is {row[field]!r:.60}, must have one {part!r}"
                            raise ValueError(f"{path}, line {number}: {what}")
                copies[split].write_text("".join(json.dumps(row) + "\n" for _, row in rows))

            class Local(builder, skip_registration=True):
                """The catalogue's builder on files that are here."""

                def _split_generators(self, dl_manager):
                    del dl_manager
                    return {k: self._generate_examples(path) for k, path in copies.items()}

            Local.name = name
            builder = Local
        else:
            _probe(name, host)
        return write(builder(data_dir=str(out), file_format="array_record"))


def _probe(name: str, host: str) -> None:
    try:
        with urllib.request.urlopen(host, timeout=PROBE_SECONDS):
            pass
    except urllib.error.HTTPError:
        pass  # it answers
    except OSError as error:
        raise RuntimeError(
            f"{name} cannot be downloaded from {host}: {error}; run this on a machine with network "
            f"and copy the directory, or give the raw files: --jsonl=train=FILE --jsonl=test=FILE"
        ) from None


def write(builder: Any) -> epath.Path:
    """Run a TFDS builder, once; returns the directory that ``source`` reads.

    Raises:
      ValueError: the dataset is there already, or something else is in its place, or what was
        written is empty.
    """
    directory = epath.Path(builder.data_dir)
    if directory.exists():
        raise ValueError(f"{directory} exists already: delete it, or choose another directory")
    for place in directory.parents:
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file, and no directory: choose another --out")
    above = directory.parent
    strange = [p.name for p in above.iterdir() if p.name[0].isalpha()] if above.is_dir() else []
    if strange:
        raise ValueError(f"{above} is no dataset's, it holds {strange[:3]}: choose another --out")
    builder.download_and_prepare()
    for split in builder.info.splits:
        Records(directory, split)
    return directory


def main(given: cli.Flags) -> None:
    """Prepare what the flags say."""
    if not (given.jsonl or given.catalogue):
        raise ValueError("--jsonl=SPLIT=FILE, once or more, or --catalogue=NAME is missing")
    pairs = [item.partition("=") for item in given.jsonl]
    files = {split if path else "train": path or split for split, _, path in pairs}
    for item in given.jsonl:
        if item.startswith("=") or item.endswith("="):
            raise ValueError(f"--jsonl={item}: must be SPLIT=FILE, or FILE")
    if given.catalogue:
        path = prepare_catalogued(given.catalogue, given.out, files)
    else:
        fields = {field: given[field].value for field in FIELDS if given[field].value}
        path = prepare_jsonl(files, given.out, fields)
    counts = {split: len(Records(path, split)) for split in _splits(path)}
    print(f"{path}: " + ", ".join(f"{count} in {split}" for split, count in counts.items()))


def _splits(directory: epath.Path) -> list[str]:
    import tensorflow_datasets as tfds

    return list(tfds.builder_from_directory(str(directory)).info.splits)


if __name__ == "__main__":
    cli.run(main, FLAGS)
