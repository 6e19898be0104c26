"""Wrong configs are refused with the field, its value and what is allowed, before any compile."""

import math

import pytest
from ml_collections import ConfigDict

from sapo_jax import cli, model, train
from sapo_jax.training import settings, startup
from tests import fakes, tiny_config


def changed(fields):
    config = tiny_config.get_config()
    with config.unlocked():
        for name in ("task", "tasks", "evals"):
            if name in fields:
                config[name] = ConfigDict(fields[name])
        flat = {k: v for k, v in fields.items() if not isinstance(v, dict)}
        config.update_from_flattened_dict(flat)
    return config


HALF = {"name": "countdown", "share": 0.5}
TIS = {"correction.name": "token_tis", "learner.old_logp": "recompute"}
LINEAR = {"objective.schedule": "linear"}
ROUNDED = {"reward.kl_coef": 0.1, "init_from": "somewhere"}
WRONG = [
    ({"objective.name": "sap"}, "'sap'", "nearest is 'sapo'"),
    (
        {"objective.name": "gpro"},
        "config.objective.name='gpro'",
        "my.py:name; the nearest is 'grpo'",
    ),
    ({"task.name": "chain_smu"}, "config.task.name='chain_smu'", "the nearest is 'chain_sum'"),
    ({"objective.k_pos": 3.0}, "'k_pos'", "sapo has no .*nearest is 'tau_pos'"),
    ({"objective.au_pos": None}, "'au_pos'", "nearest is 'tau_pos'"),
    ({"objective.nmae": "grpo"}, "'nmae'", "nearest is 'name'"),
    ({"objective.name": "mhpo", "objective.k_pos": "x"}, "k_pos=x", "a number > 0"),
    ({"objective.name": "mhpo", "objective.k_pos": True}, "k_pos=True", "a number > 0"),
    ({"objective.not-a-name": 3.0}, "not-a-name", "there is no such field"),
    ({"learner.lerning_rate": 1.0}, "lerning_rate", "nearest is 'learner.learning_rate'"),
    ({"dtype.compute": "int8"}, "config.dtype.compute='int8'", "float32, bfloat16$"),
    ({"dtype.cache": "float64"}, "dtype.cache='float64'", "float32, bfloat16"),
    ({"model.attention": "flash"}, "model.attention='flash'", "nearest is 'splash'"),
    (
        {"model.attention": "splash"},
        "model.attention='splash'",
        "'auto', 'blocked' or 'xla' on cpu",
    ),
    ({"model.attention": "cudnn", "dtype.compute": "bfloat16"}, "='cudnn'", "on cpu, .* of gpu"),
    ({"mesh.tensor": 3}, "config.mesh: data=1", "the number of devices"),
    (
        {"mesh.data": -1, "mesh.fsdp": -1},
        "config.mesh.data=-1: ",
        "only one axis can take the rest",
    ),
    ({"mesh.expert": -1, "mesh.tensor": 3}, "config.mesh.expert=-1: ", "the number of devices"),
    ({"model.head_dim": 3}, "model.head_dim=3", "even"),
    ({"task.options.digits": "2"}, "digits", "'2'"),
    ({"task": {"name": "prepared", "options": {"directory": 3}}}, "directory", "3"),
    ({"task": {"name": "countdown", "options": {"numbers": True}}}, "got True", "an integer"),
    ({"reward.function": "brief"}, "function='brief'", "of a file, my.py:name"),
    ({"objective.tau_neg": -1.0}, "tau_neg=-1.0", "> 0"),
    ({"objective.tau_pos": 0.0}, "tau_pos=0.0", "> 0"),
    ({"objective.name": "grpo", "objective.tau_pos": 1.0}, "'tau_pos'", "eps_low, eps_high"),
    ({"objective.eps_low": 0.1}, "'eps_low'", "tau_pos, tau_neg"),
    ({"objective.name": "dr_grpo"}, "'max_length'", "≥ 1"),
    ({"objective.aggregation": "mean"}, "'mean'", "token_mean"),
    ({"objective.kl": "k9"}, "'k9'", "k1, k2, k3"),
    ({"objective.kl_coef": 0.1}, "kl_coef=0.1", "init_from"),
    ({"objective.schedule": "linear"}, "schedule='linear'", "'constant' without .*objective.end"),
    ({"objective.schedule": "step"}, "'step'", "constant, linear, cosine"),
    ({"objective.end.tau_neg": 2.0}, "end={'tau_neg': 2.0}", "empty with .*'constant'"),
    (
        LINEAR | {"objective.end.tau_nge": 2.0},
        "'tau_nge'",
        "objective.end.tau_nge: .*nearest is 'tau_neg'",
    ),
    (
        LINEAR | {"objective.end.eps_low": 0.1},
        "'eps_low'",
        "objective.end.eps_low: .*tau_pos, tau_neg",
    ),
    (LINEAR | {"objective.end.tau_neg": -2.0}, "tau_neg=-2.0", "objective.end.tau_neg=.*> 0"),
    (LINEAR | {"objective.end.tau_neg": None}, "end.tau_neg=None", "a number"),
    (LINEAR | {"objective.end.tau_neg": True}, "end.tau_neg=True", "a number"),
    (LINEAR | {"objective.end.tau_neg": math.inf}, "end.tau_neg=inf", "finite"),
    (LINEAR | {"objective.end.kl_coef": 0.1}, "end.kl_coef=0.1", "init_from"),
    (
        LINEAR | {"objective.name": "grpo", "objective.end.dual_clip": 3.0},
        "end.dual_clip=3.0",
        "starts from inf",
    ),
    ({"reward.kl_coef": 0.1}, "reward.kl_coef=0.1", "init_from"),
    ({"reward.kl_coef": -0.1}, "reward.kl_coef=-0.1", "at least 0"),
    ({"reward.kl": "k9"}, "reward.kl='k9'", "k1, k2, k3"),
    ({"correction.name": "tis"}, "correction.name='tis'", "one of none, token_tis"),
    ({"correction.name": "icepop"}, "learner.old_logp='sampler'", "'recompute'"),
    ({"correction.high": 2.0}, "{'high': 2.0}", "empty with correction.name='none'"),
    (TIS | {"correction.low": 2.0}, "no bound 'low'", "it has high"),
    ({"batch.oversample": 0}, "batch.oversample=0", "at least 1"),
    ({"batch.oversample": 2, "advantages": "reinforce_pp"}, "oversample=2", "compare all rows"),
    ({"source": "rollouts"}, "'rollouts'", "nearest is 'rollout'"),
    ({"source": "demonstrations"}, "'sapo'", "'reinforce'"),
    ({"advantages": "grop"}, "'grop'", "nearest is 'group'"),
    ({"batch.group_size": 1}, "group_size=1", "at least 2"),
    ({"batch.group_size": 0}, "group_size=0", "at least 1"),
    # What would learn nothing, or rounding errors.
    ({"advantages": "mean", "batch.group_size": 1}, "group_size=1", "at least 2"),
    (
        {
            "advantages": "reinforce_pp",
            "batch.group_size": 1,
            "batch.prompts": 1,
            "batch.minibatches": 1,
            "sampler.slots": 0,
        },
        "prompts=1",
        "at least 2 with 1 row each",
    ),
    ({"reward.accuracy": 0.0}, "accuracy=0.0", "above 0"),
    ({"dtype.params": "bfloat16"}, "dtype.params='bfloat16'", "'float32'"),
    ({"dtype.params": "bfloat16", "source": "demonstrations"}, "'bfloat16'", "'float32'"),
    (ROUNDED | {"dtype.compute": "bfloat16"}, "old_logp='sampler'", "'recompute'"),
    (ROUNDED | {"dtype.cache": "bfloat16"}, "old_logp='sampler'", "'recompute'"),
    ({"batch.prompts": 7}, "prompts=7", "multiple of batch.minibatches=2"),
    ({"batch.micro_batches": 3}, "micro_batches=3", "divisor of 16"),
    ({"sampler.slots": 9}, "slots=9", "at most batch.prompts=8"),
    ({"sampler.temperature": 0.0}, "temperature=0.0", "greater than 0"),
    ({"sampler.max_new_tokens": -1}, "max_new_tokens=-1", "at least 0"),
    ({"model.preset": "tini"}, "'tini'", "nearest is 'tiny'"),
    ({"model.num_attention_heads": 3}, "num_attention_heads=3", "multiple of"),
    ({"model.max_position_embeddings": 6}, "max_position_embeddings=6", "at least"),
    ({"dtype.compute": "float16"}, "'float16'", "float32, bfloat16"),
    ({"task.name": "chainsum"}, "'chainsum'", "chain_sum"),
    ({"task.options.terms": 1}, "terms", ">= 2"),
    ({"task.options.colour": 1}, "'colour'", "terms"),
    ({"task": {"name": "prepared", "options": {}}}, "directory=''", "sapo_jax.datasets --jsonl"),
    ({"task": {"name": "gsm8k", "options": {}}}, "data/gsm8k", "--catalogue=gsm8k"),
    ({"tasks": {"a": {"name": "countdown"}}}, "tasks.a", "dictionary of name, share"),
    ({"tasks": {"a": HALF | {"weight": 1}}}, "tasks.a", "dictionary of name, share"),
    ({"tasks": {"a": HALF | {"options": 3}}}, "tasks.a.options=3", "a dictionary"),
    ({"tasks": {"a": HALF | {"name": ["x"]}}}, "tasks.a.name=['x']", "text"),
    ({"task": {"name": "chain_sum", "options": {"name": "x"}}}, "['name']", "it has terms"),
    ({"tasks": {"a": HALF}}, "tasks=", "add up to 1, not 0.5"),
    ({"tasks": {"a": HALF | {"share": 0.3}}}, "tasks.a.share=0.3", "whole number of the 8"),
    ({"tasks": {"a": HALF | {"share": True}}}, "tasks.a.share=True", r"in \(0, 1\]"),
    ({"tasks": {"a": HALF | {"share": 0}}}, "tasks.a.share=0", r"in \(0, 1\]"),
    ({"tasks": {"a": HALF, "b": HALF}, "eval.prompts": 1}, "prompts=1", "at least 2"),
    ({"eval.prompts": 5000}, "eval.prompts=5000", "at most 4096, for the test split of chain_sum"),
    ({"tasks": {"a": HALF, "b": HALF}, "eval.prompts": 8194}, "=8194", "at most 8192"),
    (
        {"tasks": {"a": HALF | {"name": "cuntdown"}}},
        "tasks.a.name='cuntdown'",
        "nearest is 'countdown'",
    ),
    ({"data.max_prompt_tokens": -1}, "max_prompt_tokens=-1", "at least 0"),
    ({"data.workers": -1}, "workers=-1", "at least 0"),
    ({"tokenizer.system": "Think."}, "system='Think.'", "empty without config.tokenizer.dir"),
    ({"tokenizer.directory": "nowhere"}, "config.tokenizer: nowhere", "no tokenizer.json"),
    ({"learner.schedule": "cosin"}, "'cosin'", "nearest is 'cosine'"),
    ({"learner.old_logp": "sample"}, "'sample'", "nearest is 'sampler'"),
    ({"learner.learning_rate": -1e-3}, "learning_rate=-0.001", "at least 0"),
    ({"learner.b2": 1.0}, "b2=1.0", r"\[0, 1\)"),
    ({"learner.max_grad_norm": 0.0}, "max_grad_norm=0.0", "greater than 0"),
    ({"learner.learning_rate": 1e308}, "learning_rate=1e+308", "a number of 32 bits"),
    ({"learner.weight_decay": 1e308}, "weight_decay=1e+308", "a number of 32 bits"),
    ({"learner.max_grad_norm": 1e39}, "max_grad_norm=1e+39", "a number of 32 bits"),
    ({"learner.eps": 1e-320}, "eps=1e-320", "a number of 32 bits"),
    ({"learner.b2": 1 - 1e-9}, "b2=0.999999999", "in float32 too"),
    ({"learner.router_aux_coef": math.nan}, "router_aux_coef=nan", "finite"),
    ({"learner.router_aux_coef": -0.1}, "router_aux_coef=-0.1", "at least 0"),
    ({"learner.max_skipped": 0}, "max_skipped=0", "at least 1"),
    ({"sampler.temperature": math.inf}, "temperature=inf", "finite"),
    ({"sampler.temperature": 1e-320}, "temperature=1e-320", "a number of 32 bits"),
    ({"eval.temperature": 1e-42}, "eval.temperature=1e-42", "a number of 32 bits"),
    ({"objective.tau_neg": math.inf}, "tau_neg=inf", "finite"),
    ({"objective.tau_pos": 1e39}, "tau_pos=1e+39", "a number of 32 bits"),
    ({"reward.accuracy": 1e308}, "accuracy=1e+308", "a number of 32 bits"),
    (TIS | {"correction.high": 1e300}, "high=1e+300", "a number of 32 bits"),
    ({"iterations": 0}, "iterations=0", "at least 1"),
    ({"learner.warmup": -(10**20)}, "warmup=-100000000000000000000", "at least -2147483647"),
    ({"task.options.slip": "x"}, "slip='x'", "a number"),
    ({"seed": -1}, "seed=-1", "at least 0"),
    ({"eval.top_p": 1.5}, "top_p=1.5", r"\(0, 1\]"),
    ({"eval.top_k": 0}, "top_k=0", "at least 1"),
    ({"evals": {"a": {"samples": 0}}}, "evals.a.samples=0", "at least 1"),
    ({"evals": {"a": {"samples": 2.0}}}, "evals.a.samples=2.0", "at least 1"),
    ({"evals": {"a": {"samples": 10**20}}}, "evals.a.samples=1000", "at most"),
    ({"evals": {"a": {"prompts": 0}}}, "evals.a.prompts=0", "at least 1"),
    ({"evals": {"a": {"prompts": 5000}}}, "evals.a.prompts=5000", "at most 4096, for the test"),
    ({"evals": {"a": {"temperature": -1.0}}}, "evals.a.temperature=-1.0", "at least 0"),
    ({"evals": {"a": {"temperature": math.nan}}}, "evals.a.temperature=nan", "finite"),
    ({"evals": {"a": {"top_p": 0.0}}}, "evals.a.top_p=0.0", r"in \(0, 1\]"),
    ({"evals": {"a": {"smaples": 3}}}, "evals.a.smaples=3", "no such field: .*is 'samples'"),
    ({"evals": {"a": 3}}, "evals.a=3", "a dictionary of task, prompts"),
    ({"evals": {"mean": {}}}, "evals.mean={}", "and not 'mean'"),
    ({"evals": {"a/b": {}}}, "evals.a/b={}", "letters, digits"),
    ({"evals": {"": {}}}, "evals.={}", "letters, digits"),
    ({"evals": {"a": {"task": {"name": "countdwn"}}}}, "a.task.name='countdwn'", "'countdown'"),
    ({"evals": {"a": {"task": "countdwn"}}}, "config.evals.a.task='countdwn'", "'countdown'"),
    ({"evals": {"a": {"task": {"options": {}}}}}, "evals.a.task=", "dictionary of name"),
    ({"evals": {"a": {"task": {"name": "chain_sum", "share": 1}}}}, "evals.a.task=", "of name"),
    ({"evals": {"a": {}}, "eval.best": "b"}, "eval.best='b'", "one of mean, a$"),
    ({"eval.best": "aime25"}, "eval.best='aime25'", "one of mean$"),
    ({"collapse.rule": "rewards"}, "collapse.rule='rewards'", "reward, entropy, either; the near"),
    ({"log.trackers": ("tensorbord",)}, "trackers=['tensorbord']", "some of tensorboard, wandb"),
    ({"collapse.window": 0}, "collapse.window=0", "at least 1"),
    ({"collapse.reward": 1.5}, "collapse.reward=1.5", r"in \[0, 1\]"),
    ({"checkpoint.every": 0}, "checkpoint.every=0", "at least 1"),
    ({"reward.buffer": -1}, "reward.buffer=-1", "at least 0"),
    # What would be made, counted or waited for before anything else refuses it.
    ({"reward.workers": 10**6}, "reward.workers=1000000", "at most 4096"),
    ({"data.workers": 10**6}, "data.workers=1000000", "at most 1024"),
    ({"batch.group_size": 10**9}, "batch.group_size=1000000000", "at most 26843545,"),
    ({"batch.oversample": 10**8}, "batch.oversample=100000000", "at most 6710886,"),
    ({"batch.prompts": 10**8}, "batch.prompts=100000000", "at most 53687091,"),
    ({"eval.samples": 10**8}, "eval.samples=100000000", "at most 26843545,"),
    ({"iterations": 2**30}, "iterations=1073741824", "at most 1073741823 with batch.minib"),
    ({"batch.minibatches": 2**30, "batch.prompts": 2**30}, "minibatches=1073741824", "at most 1 "),
    ({"sampler.max_new_tokens": 2**20}, "completions of 1048576", r"sampler.max_new_tokens\)"),
    ({"task.options.terms": 2**20}, "terms=1048576", "max_position_embeddings=.* at least"),
    ({"learner.head_chunk": 2**20}, "learner.head_chunk=1048576", "at most 65536"),
    ({"model.num_hidden_layers": 10**9}, "num_hidden_layers=1000000000", "at most 4096"),
    ({"task.options.modulus": 10**20}, "modulus=100000000000000000000", "at most 9"),
    ({"reward.accuracy": 1e308}, "reward.accuracy=1e+308", "below 3.4e38"),
    ({"init_from": "a" * 10**6}, "(1000002 characters)", "at most 65536"),
    ({"tokenizer.directory": "a\0b"}, r"tokenizer.directory='a\x00b'", "none of them NUL"),
]


@pytest.mark.parametrize(("fields", "value", "allowed"), WRONG, ids=[w[1] for w in WRONG])
def test_wrong_configs_are_refused(fields, value, allowed):
    with fakes.Compilations() as compilations, pytest.raises(ValueError, match=allowed) as refusal:
        settings.from_config(changed(fields))
    assert value in str(refusal.value)
    assert str(refusal.value).startswith("config.")
    assert compilations.count == 0


def test_too_few_distinct_held_out_prompts_are_refused_before_any_compile(tmp_path):
    """One minute of compiling came first; a set of enough examples may still repeat itself."""
    few = settings.from_config(changed({"task.options.terms": 2, "eval.prompts": 1000}))
    with (
        fakes.Compilations() as compilations,
        pytest.raises(ValueError, match=r"config.eval.prompts=1000: must be smaller: the test"),
    ):
        train.run(few, tmp_path)
    assert compilations.count == 0


INTEGERS = [
    field
    for field, value in cli.flat(tiny_config.get_config()).items()
    if (isinstance(value, int) and not isinstance(value, bool))
    or (value is None and isinstance(model.PRESETS["nano"].get(field[6:]), int))
    or field == "eval.top_k"
]


def hex_digits(value):
    """Python writes integers of more than 4300 digits in no other way, pytest's names included."""
    return hex(value)[:20]


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [10**20, 2**31, -(10**20), 10**5000], ids=hex_digits)
def test_no_integer_is_too_large_to_be_refused(field, value):
    """Guards against lists as long as a number says, and numbers that wrap around on the device."""
    if value == 2**31 and field in ("seed", "task.options.modulus"):
        return
    with pytest.raises(ValueError, match="must be") as refusal:
        settings.from_config(changed({field: value}))
    assert len(str(refusal.value)) < 400


def test_a_policy_larger_than_the_machine_is_refused():
    """Before XLA, whose message has a traceback and no field."""
    checked = settings.from_config(changed({"model.hidden_size": 10**9}))
    with pytest.raises(ValueError, match=r"config\.model: .* GiB of a device, which has"):
        startup.check_memory(checked)
    startup.check_memory(settings.from_config(tiny_config.get_config()))


def test_a_missing_start_is_refused_before_any_compile(tmp_path):
    run = settings.from_config(changed({"init_from": str(tmp_path / "nowhere")}))
    missing = pytest.raises(ValueError, match=r"config.init_from='.*nowhere': there is no such")
    with fakes.Compilations() as compilations, missing:
        train.run(run, tmp_path / "run")
    assert compilations.count == 0


def test_prompts_without_room_are_refused_before_any_compile(tmp_path):
    """Guards against a refusal of the number of evaluated prompts, when none is short enough."""
    fields = {"data.max_prompt_tokens": 3, "sampler.max_new_tokens": 4}
    run = settings.from_config(changed(fields))
    with pytest.raises(ValueError, match=r"config.data.max_prompt_tokens=3: must be larger: no"):
        train.run(run, tmp_path / "run")


def test_the_defaults_are_accepted():
    checked = settings.from_config(tiny_config.get_config())
    assert checked.rows == 32
    assert checked.hp.objective.hyperparameters == {"kl_coef": 0.0, "tau_pos": 1.0, "tau_neg": 1.05}


def test_what_has_no_bound_may_be_infinite():
    fields = {"objective.name": "grpo", "objective.eps_high": math.inf}
    checked = settings.from_config(changed(fields | {"learner.max_grad_norm": math.inf}))
    assert checked.hp.max_grad_norm == math.inf


def test_a_config_is_locked():
    """A misspelt field in a config file is an error, not a new field."""
    config = tiny_config.get_config()
    with pytest.raises(AttributeError, match="learner"):
        config.lerner = ConfigDict()


def test_a_config_lacks_nothing_and_keeps_its_types():
    """One that was put together by hand is refused where the configs' own types would have been."""
    plain = tiny_config.get_config().to_dict()
    for section, field, value, message in (
        ("batch", "prompts", "8", r"config.batch.prompts='8': must be a whole number"),
        ("batch", "prompts", 8.0, r"config.batch.prompts=8.0: must be a whole number"),
        ("learner", "remat", 1, r"config.learner.remat=1: must be True or False"),
        ("learner", "b1", None, r"config.learner.b1=None: must be a number"),
        ("model", "preset", ["nano"], r"config.model.preset=\['nano'\]: must be text"),
        ("sampler", "slots", None, r"config.sampler.slots=None: must be a whole number"),
    ):
        config = ConfigDict(plain | {section: plain[section] | {field: value}})
        with pytest.raises(ValueError, match=message):
            settings.from_config(config)
        del config[section][field]
        with pytest.raises(ValueError, match=f"config.{section}.{field} is missing"):
            settings.from_config(config)
    with pytest.raises(ValueError, match=r"config.log is missing"):
        settings.from_config(ConfigDict({k: v for k, v in plain.items() if k != "log"}))
    with pytest.raises(ValueError, match=r"config.log=3: must be a section"):
        settings.from_config(ConfigDict(plain | {"log": 3}))
