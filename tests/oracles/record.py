"""Record logits of ``transformers`` (eager attention, f32) for the tests: one .npz per model.

Needs torch, transformers, safetensors and numpy; the package itself is not imported:

    python tests/oracles/record.py                          # all recordings
    python tests/oracles/record.py --forward DIR OUT.npy    # logits of one saved model
    python tests/oracles/record.py --generate DIR PROMPTS.json OUT.json
"""

import argparse
import json
import pathlib
import sys
import tempfile

import numpy as np
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import drawn

HERE = pathlib.Path(__file__).parent
VOCAB = 97
COMMON = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64, "tie_word_embeddings": False, "eos_token_id": [2, 5],
    "pad_token_id": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
EXPERTS = {
    "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
    "norm_topk_prob": True, "mlp_only_layers": [],
}  # fmt: skip


def rope(kind, theta=1e4, **parameters):
    """A ``rope_parameters`` entry, as version 5 has it."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


YARN = {"factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
CASES = {
    "qwen3_tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_untied_one_kv_head": ("qwen3", {"num_key_value_heads": 1}),
    "qwen3_bias_wide_heads": (
        "qwen3",
        {"attention_bias": True, "num_key_value_heads": 4, "head_dim": 16},
    ),
    "qwen3_yarn": ("qwen3", rope("yarn", 1e6, **YARN)),
    "qwen3_yarn_attention_factor": (
        "qwen3",
        rope("yarn", attention_factor=1.3, beta_fast=4.0, beta_slow=0.5, truncate=False, **YARN),
    ),
    "qwen3_yarn_mscale": ("qwen3", rope("yarn", mscale=0.7, mscale_all_dim=1.1, **YARN)),
    "qwen3_yarn_older_config": ("qwen3", rope("yarn", 5e3, **YARN)),
    "qwen3_linear": ("qwen3", rope("linear", factor=2.5)),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True, **rope("default", 1e6)}),
    "qwen2_untied_one_kv_head": ("qwen2", {"num_key_value_heads": 1}),
    "qwen2_older_config": ("qwen2", rope("default", 1e6)),
    "llama_tied_three_heads": (
        "llama",
        {
            "num_attention_heads": 3,
            "num_key_value_heads": 1,
            "hidden_size": 48,
            "head_dim": 16,
            "tie_word_embeddings": True,
        },
    ),
    "llama_llama3": ("llama", rope("llama3", 100.0, **LLAMA3)),
    "llama_bias": ("llama", {"attention_bias": True, "num_key_value_heads": 4}),
    "moe": ("qwen3_moe", EXPERTS),
    "moe_not_normalised": (
        "qwen3_moe",
        {**EXPERTS, "norm_topk_prob": False, "num_experts_per_tok": 3},
    ),
    "moe_every_second": (
        "qwen3_moe",
        {**EXPERTS, "num_hidden_layers": 4, "decoder_sparse_step": 2},
    ),
    "moe_dense_first_tied_yarn": (
        "qwen3_moe",
        {**EXPERTS, "mlp_only_layers": [0], "tie_word_embeddings": True, **rope("yarn", **YARN)},
    ),
    "moe_bias_one_expert": (
        "qwen3_moe",
        {**EXPERTS, "num_experts": 16, "num_experts_per_tok": 1, "attention_bias": True},
    ),
}


def older(config):
    """The config as version 4 wrote it: θ and scaling at the top level."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    return config


def load(directory):
    """A model directory for evaluation in f32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def forward(directory):
    """Logits of a model directory for the drawn tokens, f32[B, S, V]."""
    model = load(directory)
    with torch.no_grad():
        return model(torch.tensor(drawn.tokens(model.config.vocab_size))).logits.numpy()


def generate(directory, prompts, length):
    """Greedy completions of chat prompts, and the two best logits' distance at each token."""
    model = load(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    rows = []
    for prompt in prompts:
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        out = model.generate(
            ids, max_new_tokens=length, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        best = [torch.topk(x[0], 2).values for x in out.logits]
        rows.append(
            {
                "text": text,
                "prompt": ids[0].tolist(),
                "completion": out.sequences[0, ids.shape[1] :].tolist(),
                "margins": [float(b[0] - b[1]) for b in best],
            }
        )
    return rows


def record(name, out):
    """Save a model of the case, draw its weights, and record what it computes."""
    kind, fields = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **fields})
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        file = folder / "model.safetensors"
        drawn_weights = {
            key: drawn.tensor(key, value.shape)
            for key, value in safetensors.numpy.load_file(file).items()
        }
        safetensors.numpy.save_file(drawn_weights, file, metadata={"format": "pt"})
        content = json.loads((folder / "config.json").read_text())
        if "older" in name:
            content = older(content)
            (folder / "config.json").write_text(json.dumps(content))
        logits = forward(folder)
    shapes = {key: list(value.shape) for key, value in drawn_weights.items()}
    versions = {m.__name__: m.__version__ for m in (torch, transformers, np)}
    np.savez_compressed(
        out / f"{name}.npz", logits=logits, config=json.dumps(content),
        shapes=json.dumps(shapes), versions=json.dumps(versions),
    )  # fmt: skip


def main():
    """Record every case, or run one directory."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--only", nargs="+", choices=CASES)
    parser.add_argument("--forward", nargs=2, metavar=("DIR", "OUT"))
    parser.add_argument("--generate", nargs=3, metavar=("DIR", "PROMPTS.json", "OUT.json"))
    options = parser.parse_args()
    if options.forward:
        np.save(options.forward[1], forward(options.forward[0]))
        return
    if options.generate:
        directory, prompts, out = options.generate
        rows = generate(directory, json.loads(pathlib.Path(prompts).read_text()), 64)
        pathlib.Path(out).write_text(json.dumps(rows))
        return
    for name in options.only or CASES:
        record(name, options.out)


if __name__ == "__main__":
    main()
