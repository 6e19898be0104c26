"""Hand back a run's policy: ``python -m sapo_jax.export --workdir=RUN --out=DIR``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from etils import epath
from ml_collections import ConfigDict

from sapo_jax.data import hf_tokenizer
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.model import hf, params
from sapo_jax.training import checkpoint, settings
from sapo_jax.training import workdir as rundir


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
    stored = rundir.read_config(workdir)
    if stored is None:
        raise ValueError(f"{workdir} has no config.json: name the --workdir of a run")
    checked = settings.from_config(ConfigDict(stored))
    wanted = params.abstract(checked.model)
    weights = checkpoint.restore_params(workdir / "checkpoints", wanted, which=which)
    characters = isinstance(checked.tokenizer, CharTokenizer)
    files_from = None if characters else checked.config.tokenizer.directory
    hf.save(out, checked.model, weights, files_from=files_from)
    if characters:
        hf_tokenizer.save_characters(out, checked.tokenizer)
    return out


def main(argv: Sequence[str]) -> None:
    """Export what the flags say."""
    from absl import flags, logging

    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    if len(argv) > 1 or not given.workdir or not given.out:
        sys.exit("error: expected --workdir=RUN and --out=DIR")
    try:
        out = export(given.workdir, given.out, which=given.which)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(f"{out}: evaluate it by python -m sapo_jax.evaluate --hf={out} --task=NAME,option=value")


if __name__ == "__main__":
    from absl import app, flags

    flags.DEFINE_string("workdir", "", "Run directory.")
    flags.DEFINE_string("out", "", "Hugging Face directory to write.")
    flags.DEFINE_enum("which", "latest", ["latest", "best"], "Checkpoint.")
    app.run(main)
