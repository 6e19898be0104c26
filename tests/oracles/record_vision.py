"""Record what ``transformers`` computes for models that see, and its image processor on Pillow.

Needs torch, transformers, safetensors, numpy and Pillow; the package itself is not imported:

    python tests/oracles/record_vision.py                        # small models, images
    python tests/oracles/record_vision.py --forward CASE DIR OUT.npy …   # logits of saved models
"""

import argparse
import json
import pathlib
import sys
import tempfile
import zlib

import numpy as np
import PIL
import safetensors.numpy
import torch
import transformers
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as processing

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.oracles import drawn, seen

HERE = pathlib.Path(__file__).parent / "vision"
TEXT = {
    "vocab_size": seen.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256, "eos_token_id": [2, 5], "pad_token_id": 2,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True}
VISION = {
    "depth": 3, "hidden_size": 32, "intermediate_size": 40, "num_heads": 4, "patch_size": 2,
    "num_position_embeddings": 25, "deepstack_visual_indexes": [0, 1], "out_hidden_size": 32,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# The text model, its sections of M-RoPE, the tower, and whether embeddings are tied.
CASES = {
    "dense": ({}, [4, 2, 2], {}, False),
    "tied_one_kv_head": ({"num_key_value_heads": 1, "head_dim": 32}, [6, 5, 5], {}, True),
    "no_deepstack": ({}, [2, 3, 3], {"deepstack_visual_indexes": []}, False),
    "deepstack_in_every_layer": ({}, [4, 2, 2], {"deepstack_visual_indexes": [0, 1, 2]}, False),
    "merges_three": ({}, [4, 2, 2], {"spatial_merge_size": 3, "temporal_patch_size": 1}, False),
    "older_config": ({"attention_bias": True}, [4, 2, 2], {"num_position_embeddings": 4}, False),
    "text_alone": ({}, [4, 2, 2], {}, False),
    "moe": (EXPERTS, [4, 2, 2], {}, False),
    "moe_square_up": (EXPERTS | {"moe_intermediate_size": 16}, [4, 2, 2], {}, True),
    "moe_square_down": (EXPERTS | {"moe_intermediate_size": 32}, [4, 2, 2], {}, False),
    "moe_every_second": (
        EXPERTS | {"num_hidden_layers": 4, "decoder_sparse_step": 2}, [4, 2, 2], {}, False,
    ),
}  # fmt: skip


def save(name, folder):
    """Save a model of the case with drawn weights; its config, and the shapes of its tensors."""
    text, sections, vision, tied = CASES[name]
    rope = {"rope_parameters": {**ROPE, "mrope_section": sections}}
    config = transformers.AutoConfig.for_model(
        "qwen3_vl_moe" if "num_experts" in text else "qwen3_vl",
        text_config={**TEXT, **rope, **text}, vision_config={**VISION, **vision},
        tie_word_embeddings=tied, **seen.TOKENS,
    )  # fmt: skip
    transformers.AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {k: list(v.shape) for k, v in safetensors.numpy.load_file(file).items()}
    content = json.loads((folder / "config.json").read_text())
    if name == "older_config":
        text = content["text_config"]
        text["rope_scaling"] = text.pop("rope_parameters")
        text["rope_theta"] = text["rope_scaling"].pop("rope_theta")
        content["vision_config"]["model_type"] = content["model_type"]
        del content["vision_config"]["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(content))
    tensors = {key: drawn.tensor(key, shape) for key, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})
    return content, shapes


def forward(name, folder):
    """Logits of a saved model for the rows of the case; its features, positions and deltas."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()
    tokens, mask, grids, patches = seen.rows(name, VISION | CASES[name][2])
    ids, kinds = torch.tensor(tokens), torch.tensor(tokens == seen.IMAGE).int()
    inputs, grid = {"input_ids": ids, "attention_mask": torch.tensor(mask).int()}, None
    found = {}
    with torch.no_grad():
        if len(grids):
            grid, pixels = torch.tensor(grids), torch.tensor(patches)
            inputs |= {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": kinds}
            tower = model.model.visual(pixels, grid_thw=grid)
            found["features"] = np.stack([tower.pooler_output, *tower.deepstack_features])
        found["logits"] = model(**inputs).logits.numpy()
        positions, delta = model.model.get_rope_index(
            ids, kinds, grid, attention_mask=inputs["attention_mask"]
        )
    return found | {"positions": positions.numpy(), "delta": delta.numpy()[:, 0]}


def record(name, out):
    """Record what a model of the case computes."""
    with tempfile.TemporaryDirectory() as folder:
        content, shapes = save(name, pathlib.Path(folder))
        found = forward(name, folder)
    vision = json.dumps(VISION | CASES[name][2])
    np.savez_compressed(
        out / f"{name}.npz", config=json.dumps(content), shapes=json.dumps(shapes), vision=vision,
        versions=json.dumps({m.__name__: m.__version__ for m in (torch, transformers, np)}),
        **found,
    )  # fmt: skip


def images():
    """What the processor makes of the images: grid, checksum, some values; and `smart_resize`."""
    found = {"versions": {m.__name__: m.__version__ for m in (transformers, np, PIL)}}
    for limits in seen.LIMITS:
        size = dict(zip(("shortest_edge", "longest_edge"), limits, strict=True))
        processor = processing.Qwen2VLImageProcessorPil(
            size=size, patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3
        )
        for name, image in seen.pictures().items():
            made = processor(image, return_tensors="np")
            pixels = np.ascontiguousarray(made["pixel_values"], np.float32)
            found[f"{name} {limits}"] = {
                "grid": made["image_grid_thw"][0].tolist(),
                "checksum": zlib.crc32(pixels.tobytes()),
                "values": pixels.reshape(-1)[:: seen.SOME].tolist(),
            }
    found["sizes"] = [
        [size, processing.smart_resize(*size, 32, *seen.LIMITS[0])] for size in seen.SIZES
    ]
    return found


def main():
    """Record the small models and the processor, or what one directory gives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--forward", nargs="+", metavar="CASE DIR OUT.npy")
    options = parser.parse_args()
    if options.forward:
        for name, folder, out in zip(*(options.forward[i::3] for i in range(3)), strict=True):
            np.save(out, forward(name, folder)["logits"])
        return
    options.out.mkdir(exist_ok=True)
    for name in CASES:
        record(name, options.out)
    (options.out / "images.json").write_text(json.dumps(images()) + "\n")


if __name__ == "__main__":
    main()
