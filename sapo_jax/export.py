"""A run's policy as a Hugging Face directory, with its tokenizer."""

from __future__ import annotations

from etils import epath

from sapo_jax import cli
from sapo_jax.data import hf_tokenizer
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.model import hf, params
from sapo_jax.training import checkpoint, settings

FLAGS = cli.Flags("export", __doc__)
FLAGS.string("workdir", "", "Run directory.", required=True)
FLAGS.string("out", "", "Hugging Face directory to write.", required=True)
FLAGS.enum("which", "latest", ["latest", "best"], "Checkpoint.")


def export(workdir: epath.PathLike, out: epath.PathLike, *, which: str = "latest") -> epath.Path:
    """Write a run's parameters and tokenizer as a Hugging Face directory.

    Args:
      workdir: of the run.
      out: the directory to write; weights that lie there are replaced.
      which: checkpoint, "latest" or "best".

    Returns:
      ``out``.

    Raises:
      ValueError: ``workdir`` is no run, or has no such checkpoint.
    """
    workdir, out = epath.Path(workdir).expanduser(), epath.Path(out).expanduser()
    checked = settings.of_run(workdir)
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
