"""A run's policy as a Hugging Face directory, with its tokenizer."""

from __future__ import annotations

import json

from etils import epath

from sapo_jax import cli
from sapo_jax.data import hf_tokenizer
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.model import hf, hf_config, params
from sapo_jax.training import checkpoint, files, settings

FLAGS = cli.Flags("export", __doc__)
FLAGS.string("workdir", "", "Run directory.", required=True)
FLAGS.string("out", "", "Hugging Face directory to write.", required=True)
FLAGS.enum("which", "latest", ["latest", "best"], "Checkpoint.")


def export(workdir: epath.PathLike, out: epath.PathLike, *, which: str = "latest") -> epath.Path:
    """Write a run's parameters and tokenizer as a Hugging Face directory.

    Args:
      workdir: of the run.
      out: the directory to write, or that of an earlier export, which is replaced.
      which: checkpoint, "latest" or "best".

    Returns:
      ``out``.

    Raises:
      ValueError: ``workdir`` is no run, or has no such checkpoint, or ``out`` is not its to write.
    """
    workdir, out = epath.Path(workdir).expanduser(), epath.Path(out).expanduser()
    checked = settings.of_run(workdir)
    c, wanted = checked.config, json.loads(json.dumps(hf_config.to_json(checked.model)))
    sources = {c.init_from, c.model.preset, c.tokenizer.directory} - {""}
    first = out.resolve() in [epath.Path(source).expanduser().resolve() for source in sources]

    def is_export(path):
        return not first and files.read_json(path / "config.json") == wanted

    files.check_directory(out, "--out=", is_export, "of an earlier export of this shape")
    wanted = params.abstract(checked.model)
    weights = checkpoint.restore_params(workdir / "checkpoints", wanted, which=which)
    characters = isinstance(checked.tokenizer, CharTokenizer)
    files_from = None if characters else checked.config.tokenizer.directory
    hf.save(out, checked.model, weights, files_from=files_from)
    if characters:
        hf_tokenizer.save_characters(out, checked.tokenizer)
    return out


def main(given: cli.Flags) -> None:
    """Export what the flags say."""
    out = export(given.workdir, given.out, which=given.which)
    print(f"{out}: evaluate it by python -m sapo_jax.evaluate --hf={out} --task=NAME,option=value")


if __name__ == "__main__":
    cli.run(main, FLAGS)
