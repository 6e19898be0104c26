"""Cold start of the quickstart that sees: a tiny Qwen3-VL imitates teachers who slip.

Claim     Supervised learning of worked answers to two kinds of pictures and one of text gives a
          policy that reads pictures a little: something to reinforce.
Command   python -m sapo_jax.main --config=configs/quickstart_vl_sft.py \
              --workdir=runs/quickstart_vl_sft
Time      6 minutes, compiling included, on 2 CPU cores.
Result    Pass@1, mean of three seeds: sums 0.37, shapes 0.47, text 0.39 (experiments/vision). A
          teacher who slips in one step of four would be right in 0.56 of the sums (two steps each),
          and in 0.75 of the shapes.
"""

from ml_collections import ConfigDict

from configs import quickstart_sft


def get_config() -> ConfigDict:
    c = quickstart_sft.get_config()
    c.unlock()
    c.name = "quickstart_vl_sft"
    c.tasks = ConfigDict(
        {
            "sums": {
                "name": "visual_sum",
                "share": 0.375,
                "options": {"terms": 3, "dot": 1, "slip": 0.25},
            },
            "shapes": {
                "name": "count_shapes",
                "share": 0.375,
                "options": {"size": 24, "cells": 3, "kinds": 2, "colours": 2, "slip": 0.25},
            },
            "text": {"name": "chain_sum", "share": 0.25, "options": {"terms": 3, "slip": 0.25}},
        },
        type_safe=False,
    )
    c.model.preset = "tiny_vl"
    c.model.train_vision = True
    c.data.max_image_tokens = 9
    c.data.max_prompt_tokens = 26
    return c.lock()
