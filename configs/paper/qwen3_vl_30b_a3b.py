"""The paper's comparison over several tasks (section 5.2, Figure 6), with the policy that sees.

Claim     The paper's, of Qwen3-VL-30B-A3B on text and images: after 500 gradient steps SAPO 0.758,
          GSPO and GRPO-R2 0.749 by one aggregated score; none collapses (one run each).
Command   On every host of a v5p 4x4x4 slice (docs/pods.md), with a cold start of
          Qwen/Qwen3-VL-30B-A3B in models/Qwen3-VL-30B-A3B; data as docs/paper.md says:
          python -m sapo_jax.sweep --config=configs/paper/qwen3_vl_30b_a3b.py \
              --workdir=gs://.../fig6
          Does it fit? python -m sapo_jax.preflight --config=configs/paper/qwen3_vl_30b_a3b.py \
              --topology=v5p:4x4x4
Time      Not measured; by preflight at least 2.0 minutes an iteration (docs/pods.md).
Result    Not measured.

What no source states is marked as ours: the tower, which stays as it is, and the size of images.
"""

from ml_collections import ConfigDict

from configs.paper import controlled, multitask


def get_config() -> ConfigDict:
    c = multitask.get_config()
    c.unlock()
    c.name = "paper_qwen3_vl_30b_a3b"  # ours
    c.model.preset = "models/Qwen3-VL-30B-A3B"  # paper; sets tokenizer.directory, too
    c.init_from = "models/Qwen3-VL-30B-A3B"  # paper: a cold start of it; by which data is open
    c.model.train_vision = False  # ours
    c.model.max_pixels = 1024 * 1024  # ours: at most 1024 tokens
    c.data.max_image_tokens = 1024  # ours
    c.data.max_prompt_tokens = 2048  # ours
    c.sampler.max_new_tokens = 6144  # ours
    c.tasks.maths.share = 0.25  # ours: a half of text, a half of images
    c.tasks.code.share = c.tasks.logic.share = 0.125  # ours
    c.tasks.vision = ConfigDict(
        {
            "name": "mathvision",
            "share": 0.5,
            "options": {
                "train": "data/paper/vision_train.jsonl",
                "test": "data/paper/mathvision.jsonl",
            },
        },
        type_safe=False,
    )  # paper: images among the tasks; ours: these
    c.evals.mathvision = ConfigDict(
        {"task": "vision", "prompts": 304, "samples": 8}, type_safe=False
    )  # paper: the set; ours: its 304 problems called testmini, and 8 samples
    return c.lock()


def get_sweep() -> list[dict]:
    return controlled.comparison()
