"""Cold start of the quickstart that sees: a tiny Qwen3-VL imitates teachers who slip.

Claim     Supervised learning of worked answers to two kinds of pictures and one of text gives a
          policy that reads pictures a little: something to reinforce.
Command   python -m sapo_jax.main --config=configs/quickstart_vl_sft.py \
              --workdir=runs/quickstart_vl_sft
Time      Not measured; about 2 s an iteration beside other work, on 2 CPU cores.
Result    Not measured with seeds. One trial, with 2 kinds and 2 colours of shapes: Pass@1 of sums
          0.29, of shapes 0.90, of text 0.41.
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
