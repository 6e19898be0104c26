"""The paper's comparison over several tasks (section 5.2, Figure 6), in text.

Claim     The paper's, of Qwen3-VL-30B-A3B on text and images: after 500 gradient steps SAPO 0.758,
          GSPO and GRPO-R2 0.749 by one aggregated score; none collapses (one run each). Here the
          text tasks alone: maths, coding, logic.
Command   On every host of a v5p 4x4x8 slice (docs/pods.md), after configs/paper/cold_start.py; data
          as docs/paper.md says:
          python -m sapo_jax.sweep --config=configs/paper/multitask.py --workdir=gs://.../fig6
          trains the three runs one after the other, each on the whole slice; with
          --config.mesh.run=2 those that share their programs (SAPO and GSPO) side by side, each on
          half of it.
Time      Not measured; by preflight at least 1.4 minutes an iteration (docs/pods.md).
Result    Not measured.
"""

from ml_collections import ConfigDict

from configs.paper import controlled


def get_config() -> ConfigDict:
    c = controlled.get_config()
    c.unlock()
    c.name = "paper_multitask"  # ours
    maths = c.task.options.to_dict()
    c.tasks = ConfigDict(
        {
            "maths": {"name": "math_answer", "share": 0.5, "options": maths},
            "code": {
                "name": "programs",
                "share": 0.25,
                "options": {
                    "train": "data/paper/code.jsonl",
                    "test": "data/paper/livecodebench_v6.jsonl",
                },
            },
            "logic": {
                "name": "reasoning_gym",
                "share": 0.25,
                "options": {"dataset": "zebra_puzzles"},
            },
        },
        type_safe=False,
    )  # paper: maths, coding, logic in fixed shares; ours: which shares, and the data
    c.batch.minibatches = 2  # paper
    c.batch.micro_batches = 8  # ours: 1 row of 8192 tokens on a chip
    c.iterations = 250  # paper: 500 gradient steps are shown
    c.eval.every = 25  # ours
    c.evals = controlled.evaluations(aime25=30)  # paper; MathVision: paper/qwen3_vl_30b_a3b
    c.evals.aime25.samples = 32  # paper
    c.evals.livecodebench_v6 = ConfigDict(
        {"task": "code", "prompts": 175, "samples": 8}, type_safe=False
    )  # paper: the set and 8 samples
    c.evals.zebra = ConfigDict(
        {"task": "logic", "prompts": 64, "samples": 8}, type_safe=False
    )  # ours, in place of the paper's ZebraLogic
    return c.lock()


def get_sweep() -> list[dict]:
    return controlled.comparison()
