"""Contestants in PyTorch: ``python -m experiments.benchmarks.peers.plain_torch NAME SHAPE``.

Plain torch with transformers' Qwen3, TRL's GRPO loss as its trainer calls it, transformers'
generate.
"""

from __future__ import annotations

import os
import sys
import tempfile
from functools import partial

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import torch
import transformers

from experiments.benchmarks import contestant, workload


def policy(shape):
    """transformers' model with the workload's weights."""
    model = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_dim,
            rms_norm_eps=workload.NORM_EPS, tie_word_embeddings=True, attention_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": workload.ROPE_THETA},
            max_position_embeddings=max(2048, shape.width), pad_token_id=workload.PAD,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    weights = {name: torch.from_numpy(w) for name, w in workload.weights(shape).items()}
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.name_or_path = "tiny-qwen3"
    return model


def tensors(shape):
    """The batch in TRL's terms."""
    rows = workload.rollouts(shape)
    mask = torch.from_numpy(rows.mask).long()
    return {
        "prompt_ids": torch.from_numpy(rows.prompt).long(),
        "prompt_mask": torch.ones(rows.prompt.shape, dtype=torch.long),
        "completion_ids": torch.from_numpy(rows.completion).long() * mask,
        "completion_mask": mask,
        "advantages": torch.from_numpy(rows.advantages),
        "old_per_token_logps": torch.from_numpy(rows.old_logp),
        "num_items_in_batch": mask.sum(),
    }


def sapo(model, x):
    """SAPO as one would write it first: full logits of the completion."""
    ids = torch.cat([x["prompt_ids"], x["completion_ids"]], 1)
    exists = torch.cat([x["prompt_mask"], x["completion_mask"]], 1)
    last = x["completion_ids"].shape[1] + 1
    out = model(input_ids=ids, attention_mask=exists, use_cache=False, logits_to_keep=last)
    logits = out.logits[:, :-1]
    logp = torch.gather(logits, -1, x["completion_ids"][..., None])[..., 0]
    ratio = torch.exp(logp - logits.logsumexp(-1) - x["old_per_token_logps"])
    advantages, mask = x["advantages"][:, None], x["completion_mask"]
    tau = torch.where(advantages > 0, workload.TAU_POS, workload.TAU_NEG)
    surrogate = 4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages
    return -((surrogate * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()


def update(shape):
    """Forward, backward and AdamW of plain torch."""
    model, x = policy(shape).train(), tensors(shape)
    optimizer = torch.optim.AdamW(
        model.parameters(), workload.LEARNING_RATE, (workload.B1, workload.B2), workload.EPS,
        weight_decay=workload.WEIGHT_DECAY,
    )  # fmt: skip

    def once():
        loss = sapo(model, x)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return {"loss": float(loss)}

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return once, {"objective": "sapo", **versions}


def _tokenizer(vocab):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t3"))
    special = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2", "unk_token": "t3"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def trl_update(shape):
    """The same by GRPOTrainer's own loss, optimizer and backward."""
    import datasets
    import trl

    trainer = trl.GRPOTrainer(
        model=policy(shape),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=trl.GRPOConfig(
            output_dir=tempfile.mkdtemp(), use_cpu=True, bf16=False, fp16=False, report_to=[],
            gradient_checkpointing=False, disable_tqdm=True, gradient_accumulation_steps=1,
            per_device_train_batch_size=shape.rows, num_generations=shape.group,
            max_completion_length=shape.completion, temperature=1.0, beta=0.0,
            learning_rate=workload.LEARNING_RATE, adam_beta1=workload.B1, adam_beta2=workload.B2,
            adam_epsilon=workload.EPS, weight_decay=workload.WEIGHT_DECAY, loss_type="sapo",
            sapo_temperature_pos=workload.TAU_POS, sapo_temperature_neg=workload.TAU_NEG,
        ),
        train_dataset=datasets.Dataset.from_dict({"prompt": ["t5 t6"] * shape.rows}),
        processing_class=_tokenizer(shape.vocab),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1  # which its loop sets before the first step
    model, x = trainer.model.train(), tensors(shape)
    trainer.create_optimizer()

    def once():
        loss = trainer._compute_loss(model, x)
        trainer.accelerator.backward(loss)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return {"loss": float(loss)}

    return once, {"objective": "sapo", "torch": torch.__version__, "trl": trl.__version__}


def generate(shape):
    """transformers' generate with its dynamic cache."""
    model, rows = policy(shape).eval(), workload.rollouts(shape)
    prompt = torch.from_numpy(rows.prompt).long()
    options = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=shape.completion,
        pad_token_id=workload.PAD, use_cache=True,
        eos_token_id=list(shape.stop_ids),
    )  # fmt: skip
    torch.manual_seed(0)

    @torch.inference_mode()
    def once():
        mask = torch.ones_like(prompt)
        out = model.generate(prompt, attention_mask=mask, generation_config=options)
        new = out[:, shape.prompt :]
        # Tokens up to the first stop token, which counts; pads follow it.
        ended = torch.isin(new, torch.tensor(shape.stop_ids)).int()
        live = ended.cumsum(1) - ended == 0
        return {"tokens": int(live.sum())}

    return once, {"torch": torch.__version__, "transformers": transformers.__version__}


CONTESTANTS = {"update": update, "trl": trl_update, "generate": generate}

if __name__ == "__main__":
    name, shape = sys.argv[1:]
    contestant.serve(partial(CONTESTANTS[name], workload.SHAPES[shape]))
