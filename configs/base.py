"""Every field of an experiment with its default; other configs start from here."""

from ml_collections import ConfigDict, config_dict


def _asked(c: ConfigDict) -> None:
    c.task = ConfigDict()
    c.task.name = "chain_sum"
    c.task.options = ConfigDict(type_safe=False)  # arguments of the task's class
    # A mixture in its place: {"a": {"name": …, "options": {…}, "share": 0.5}, …}. A share is of the
    # prompts of every batch; shares add up to 1.
    c.tasks = ConfigDict(type_safe=False)

    c.data = ConfigDict()
    c.data.max_prompt_tokens = 0  # longer prompts are dropped and counted; 0: the task's own bound
    c.data.workers = 0  # processes that read ahead, for each task; speed, not results

    c.tokenizer = ConfigDict()
    c.tokenizer.directory = ""  # Hugging Face directory; "": one token per character of the task
    c.tokenizer.chat = True  # prompts by the directory's chat template, not as plain text
    c.tokenizer.system = ""  # system message of each prompt; "": none
    c.tokenizer.template_options = ConfigDict(type_safe=False)  # such as enable_thinking


def _reward() -> ConfigDict:
    """R = Σ weight · part; see sapo_jax.rewards.Recipe."""
    c = ConfigDict()
    c.accuracy = 1.0
    c.format = 0.0  # <think>…</think>, then an answer
    c.overlong = 0.0  # a soft penalty in the last `buffer` tokens before `max_length`
    c.repetition = 0.0
    c.think = False  # judge only what follows </think>
    c.opened = False  # prompts end with <think>
    c.max_length = 0  # 0: the room for a completion
    c.buffer = 0
    c.ngram = 4
    c.workers = 1  # rows judged at a time, while the device works
    c.kl_coef = 0.0  # R − kl_coef · Σ KL(π_old‖π_ref) over the completion; needs `init_from`
    c.kl = "k1"  # its estimator: k1, k2, k3
    return c


def _model() -> ConfigDict:
    c = ConfigDict()
    c.preset = "tiny"  # or a Hugging Face directory, whose config.json gives the shape
    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings",
    ):  # fmt: skip
        c[name] = config_dict.placeholder(int)  # None: the preset's
    c.attention = "auto"  # "splash" on TPU, else "xla"; "cudnn" for long rows on GPU
    return c


def _mesh() -> ConfigDict:
    """Devices along each axis; -1: the rest. All of them are used, but where every axis is 1."""
    c = ConfigDict()
    c.data = 1  # rows are split
    c.fsdp = 1  # rows and parameters are split
    c.tensor = 1  # heads, widths and vocabulary are split
    c.expert = 1  # rows and experts are split
    return c


def _correction() -> ConfigDict:
    """Weights of tokens by π_old / π_sampler, see sapo_jax.corrections."""
    c = ConfigDict()
    c.name = "none"  # {token,sequence}_tis, {token,sequence}_mis, icepop, geometric
    for name in ("low", "high"):
        c[name] = config_dict.placeholder(float)  # bounds of the ratio; None: the correction's own
    return c


def _edge(c: ConfigDict) -> None:
    c.population = ConfigDict()
    # How the runs of a sweep share the hardware: map (one after the other), vmap (all at once),
    # devices (split over all of this process); auto: by the backend, see sapo_jax.sweep.population.
    c.population.method = "auto"

    c.distributed = ConfigDict()
    c.distributed.timeout = 3600.0  # seconds without a finished phase that end a process; 0: none

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # iterations; the last is always kept

    c.log = ConfigDict()
    c.log.samples_every = 10  # iterations between written samples
    c.log.samples = 32  # rows

    c.profile_steps = 0  # iterations to trace with the JAX profiler, after the first two
    c.compilation_cache = ".cache/xla"  # compiled programs, reused by later runs; "" for none


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "base"
    c.seed = 0  # of parameters, data order and sampling noise
    c.source = "rollout"  # "rollout": RL; "demonstrations": supervised learning of worked answers
    c.init_from = ""  # run or Hugging Face directory with the first parameters; "": random ones
    c.iterations = 100

    _asked(c)

    c.model = _model()
    c.dtype = ConfigDict()
    c.dtype.params = "float32"
    c.dtype.compute = "float32"
    c.dtype.cache = "float32"

    c.mesh = _mesh()
    c.objective = ConfigDict()
    c.objective.name = "sapo"
    c.objective.aggregation = config_dict.placeholder(str)  # None: the objective's own
    c.objective.kl = "k3"
    for name in (
        "tau", "tau_pos", "tau_neg", "eps_low", "eps_high", "dual_clip", "max_length", "kl_coef",
    ):  # fmt: skip
        c.objective[name] = config_dict.placeholder(float)  # None: the objective's own

    c.correction = _correction()
    c.reward = _reward()
    c.advantages = "group"  # group, leave_one_out, mean, reinforce_pp

    c.batch = ConfigDict()
    c.batch.prompts = 32  # per iteration
    c.batch.oversample = 1  # draw that many times the prompts, learn from the first with a signal
    c.batch.group_size = 8  # completions per prompt
    c.batch.minibatches = 4  # updates per iteration
    c.batch.micro_batches = 1  # forward-backward passes per update; memory, not results

    c.sampler = ConfigDict()
    c.sampler.max_new_tokens = 0  # 0: the task's own bound
    c.sampler.temperature = 1.0
    c.sampler.slots = 0  # prompts in flight; 0: all at once
    c.sampler.shrink = 0  # how often the slots halve while the last groups finish

    c.learner = ConfigDict()
    c.learner.learning_rate = 1e-4
    c.learner.schedule = "constant"  # constant, linear, cosine
    c.learner.warmup = 0  # updates
    c.learner.weight_decay = 0.0
    c.learner.max_grad_norm = 1.0
    c.learner.b1, c.learner.b2 = 0.9, 0.95
    c.learner.eps = 1e-8
    c.learner.old_logp = "sampler"  # "sampler": its own; "recompute": the learner's, one more pass
    c.learner.routing_replay = "none"  # "none", "R2" (old policy), "R3" (sampler)
    c.learner.router_aux_coef = 0.0  # weight of the load-balancing loss
    c.learner.head_chunk = 1024  # rows whose logits exist at a time
    c.learner.remat = False

    c.eval = ConfigDict()
    c.eval.every = 10  # iterations; 0: never
    c.eval.prompts = 128
    c.eval.samples = 8
    c.eval.temperature = 1.0
    c.eval.top_k = config_dict.placeholder(int)
    c.eval.top_p = config_dict.placeholder(float)

    _edge(c)
    return c.lock()
