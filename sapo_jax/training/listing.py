"""What a config can name: model presets, tasks, shipped configs, objectives; and metrics."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator

from sapo_jax import cli, model, tasks
from sapo_jax.objectives import OBJECTIVES
from sapo_jax.training.metrics import METRICS

FLAGS = cli.Flags("list", __doc__)


def presets() -> Iterator[tuple]:
    """Shapes that ``model.preset`` names."""
    yield "preset", "layers", "hidden_size", "heads", "kv_heads", "experts", "vocabulary"
    for name, fields in model.PRESETS.items():
        shape = model.ModelConfig(**{"vocab_size": 2, **fields})
        experts = f"{shape.num_experts_per_tok} of {shape.num_experts}" if shape.num_experts else ""
        heads = shape.num_attention_heads, shape.num_key_value_heads
        vocabulary = fields.get("vocab_size", "the tokenizer's")
        yield name, shape.num_hidden_layers, shape.hidden_size, *heads, experts, vocabulary


def task_names() -> Iterator[tuple]:
    """What ``task.name`` names, with its ``task.options``."""
    yield "task", "options", ""
    for name, kind in tasks.TASKS.items():
        text = (inspect.getdoc(kind) or "").partition("\n")[0].replace("``", "")
        yield name, ", ".join(inspect.signature(kind).parameters), text


def configs() -> Iterator[tuple]:
    """What ``--config`` names."""
    yield "config", ""
    for name, path in cli.shipped_configs().items():
        yield name, ast.get_docstring(ast.parse(path.read_text())).partition("\n")[0]


def objectives() -> Iterator[tuple]:
    """What ``objective.name`` names, with the fields of ``objective`` that it has."""
    yield "objective", "ratio", "aggregation", "hyperparameters"
    for name, preset in OBJECTIVES.items():
        values = (f"{key}={value}" for key, value in preset.hyperparameters.items())
        yield name, preset.ratio, preset.aggregation, ", ".join(values)


def metrics() -> Iterator[tuple]:
    """What a record of metrics/part-*.jsonl holds."""
    yield "key", "unit", "written with", "healthy", ""
    for key, metric in METRICS.items():
        yield key, metric.unit, metric.when, metric.healthy, metric.meaning


TABLES = {
    "presets": presets,
    "tasks": task_names,
    "configs": configs,
    "objectives": objectives,
    "metrics": metrics,
}
FLAGS.enum("what", None, list(TABLES), "What to list.", positional=True)


def main(given: cli.Flags) -> None:
    """Print a table."""
    print("\n".join(cli.table(TABLES[given.what]())))


if __name__ == "__main__":
    cli.run(main, FLAGS)
