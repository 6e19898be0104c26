"""The policy: Qwen and Llama decoders as plain pytrees and pure functions.

    config, params = hf.load(directory)             # Hugging Face's config.json and safetensors
    config = make("qwen3_0_6b", attention="xla")    # or a shape of PRESETS, for `params.init`
    logits_BSV = logits(params, config, tokens_BS)  # causal, of left-aligned rows

What lies where:

    config, hf_config    the shape: hashable, in Hugging Face's terms; its JSON
    params, spec         one table: shape, axes, initial value, HF name
    vision, images       the tower of models that see; pictures to patches, on the host
    lora, peft           low-rank adapters beside frozen parameters, and as files of peft
    hf, hf_tensors, …     files in and out
    transformer          a layer, and the scan over layers
    attention, splash    over whole rows (splash: on TPU), and over the sampler's cache
    rope                 rotary frequencies, and their scaling to longer contexts
    moe, routing         router, dropless dispatch, grouped matmuls; replay and balance
    head, vocab          log π and entropy without a [B·S, V] buffer, the vocabulary split or not
"""

from sapo_jax.model import hf, hf_config, vision
from sapo_jax.model.config import PRESETS, ModelConfig, make
from sapo_jax.model.transformer import logits

__all__ = ["PRESETS", "ModelConfig", "hf", "hf_config", "logits", "make", "vision"]
