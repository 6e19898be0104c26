"""A run's policy as a Hugging Face directory, with its tokenizer; or its adapters for `peft`."""

from __future__ import annotations

import json
import shlex

from etils import epath

from sapo_jax import cli, evaluate, learner
from sapo_jax.data import hf_tokenizer
from sapo_jax.data.tokenizer import CharTokenizer
from sapo_jax.model import hf, hf_config, lora, peft
from sapo_jax.training import build, checkpoint, files, parameters, policy, settings

FLAGS = cli.Flags("export", __doc__)
FLAGS.string("workdir", "", "Run directory.", required=True)
FLAGS.string("out", "", "Hugging Face directory to write.", required=True)
FLAGS.enum("which", "latest", ["latest", "best"], "Checkpoint.")
FLAGS.boolean("adapters", False, "Those of LoRA alone, as peft loads them; else they are merged.")


def export(workdir: epath.PathLike, out: epath.PathLike, *, which: str = "latest") -> epath.Path:
    """Write a run's parameters, adapters merged, and tokenizer as a Hugging Face directory.

    Args:
      workdir: of the run.
      out: the directory to write, or that of an earlier export, which is replaced.
      which: checkpoint, "latest" or "best".

    Returns:
      ``out``.

    Raises:
      ValueError: ``workdir`` is no run, or has no such checkpoint, or ``out`` is not its to write.
    """
    run, workdir, out = settings.of_run(workdir), _path(workdir), _path(out)
    shape = lora.base(run.model)
    _check_out(out, run, "config.json", hf_config.to_json(shape))
    iteration = checkpoint.find(workdir / "checkpoints", which=which)
    weights = parameters.learnt(run, workdir, iteration)
    characters = isinstance(run.tokenizer, CharTokenizer)
    files_from = None if characters else run.config.tokenizer.directory
    weights = lora.merge(weights) if run.model.lora_rank else weights
    hf.save(out, shape, weights, files_from=files_from)
    if characters:
        hf_tokenizer.save_characters(out, run.tokenizer)
    return out


def export_adapters(
    workdir: epath.PathLike, out: epath.PathLike, *, which: str = "latest"
) -> epath.Path:
    """Write a run's adapters as a directory of `peft`; arguments and results as of `export`.

    Raises:
      ValueError: as `export`, or the run has no adapters, or see `peft.check`.
    """
    run, workdir, out = settings.of_run(workdir), _path(workdir), _path(out)
    c, shape = run.config, run.model
    if not shape.lora_rank:
        raise ValueError(f"--adapters: {workdir} has none: its config.lora.rank is None")
    base = c.init_from if policy.is_hf(c.init_from) else None
    _check_out(out, run, peft.CONFIG, peft.to_json(shape, c.lora.alpha, base))
    wanted = learner.abstract(run.hp).params
    weights = checkpoint.restore_params(workdir / "checkpoints", wanted, which=which)
    peft.save(out, shape, weights, alpha=c.lora.alpha, base=base)
    return out


def evaluation(workdir: epath.PathLike, out: epath.PathLike) -> str:
    """The command that evaluates what `export` wrote by the run's own tasks, in the same rooms."""
    run, command = settings.of_run(workdir), ["python", "-m", "sapo_jax.evaluate"]
    chat = {} if isinstance(run.tokenizer, CharTokenizer) else vars(run.config.tokenizer)
    flags = {"max_prompt_tokens": run.width, "max_new_tokens": run.max_new_tokens}
    flags |= {"max_image_tokens": run.images.tokens} if run.images else {}
    if not chat.get("chat"):
        flags["chat"] = False
    elif chat["system"]:
        flags["system"] = chat["system"]
    if chat.get("chat") and chat["template_options"]:
        flags["template_options"] = repr(dict(chat["template_options"]))
    try:
        entries = build.entries(run.config).values()
        tasks = [evaluate.task_text(task["name"], task.get("options", {})) for task in entries]
    except ValueError:  # options that no flag can say
        return shlex.join([*command, f"--workdir={workdir}"])
    words = [f"--hf={out}", *(f"--task={task}" for task in tasks)]
    return shlex.join([*command, *words, *(f"--{name}={value}" for name, value in flags.items())])


def _path(path: epath.PathLike) -> epath.Path:
    return epath.Path(path).expanduser()


def _check_out(out: epath.Path, run: settings.Settings, name: str, content: dict) -> None:
    """Refuse a directory that holds something else than an earlier export of this shape."""
    c, wanted = run.config, json.loads(json.dumps(content))
    sources = {c.init_from, c.model.preset, c.tokenizer.directory} - {""}
    first = out.resolve() in [_path(source).resolve() for source in sources]

    def is_export(path):
        return not first and files.read_json(path / name) == wanted

    files.check_directory(out, "--out=", is_export, "of an earlier export of this shape")


def main(given: cli.Flags) -> None:
    """Export what the flags say."""
    if given.adapters:
        out = export_adapters(given.workdir, given.out, which=given.which)
        print(f"{out}: load it by peft.PeftModel.from_pretrained(base, {str(out)!r})")
        return
    out = export(given.workdir, given.out, which=given.which)
    print(f"{out}: evaluate it by {evaluation(given.workdir, out)}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
