"""Every field of an experiment with its default; other configs start from here.

``--help`` of a command shows the comment at the end of a field's line. None: what the comment says.
"""

from ml_collections import ConfigDict, config_dict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.name = "base"
    c.seed = 0  # of parameters, data order and sampling noise
    c.source = "rollout"  # RL; "demonstrations": supervised learning of worked answers
    c.init_from = ""  # run or Hugging Face directory with the first parameters; "": random ones
    c.iterations = 100  # each is one rollout and its updates
    c.staleness = 0  # iterations until a rollout is learnt from, see docs/offpolicy.md

    # Tasks: what the policy is asked, and how it is judged.
    c.task = ConfigDict()
    c.task.name = "chain_sum"  # sapo-jax list tasks
    c.task.options = ConfigDict(type_safe=False)  # arguments of the task's class
    # Shares are of the prompts of every batch, and add up to 1.
    c.tasks = ConfigDict(type_safe=False)  # a mixture: {"a": {"name": …, "options": …, "share": …}}

    # Data: from the tasks' text to token ids.
    c.data = ConfigDict()
    c.data.max_prompt_tokens = 0  # longer prompts are dropped and counted; 0: the task's own bound
    c.data.max_image_tokens = 0  # of a prompt's images; prompts with more are dropped, too
    c.data.swap_images = False  # a control: each prompt is shown the images of another one
    c.data.workers = 0  # processes that read ahead, for each task; speed, not results

    c.tokenizer = ConfigDict()
    c.tokenizer.directory = ""  # Hugging Face directory; "": one token per character of the task
    c.tokenizer.chat = True  # prompts by the directory's chat template, not as plain text
    c.tokenizer.system = ""  # system message of each prompt; "": none
    c.tokenizer.template_options = ConfigDict(type_safe=False)  # such as enable_thinking

    # Model. None: the preset's.
    c.model = ConfigDict()
    c.model.preset = "tiny"  # sapo-jax list presets; or a Hugging Face directory, with its shape
    c.model.hidden_size = config_dict.placeholder(int)
    c.model.intermediate_size = config_dict.placeholder(int)
    c.model.num_hidden_layers = config_dict.placeholder(int)
    c.model.num_attention_heads = config_dict.placeholder(int)
    c.model.num_key_value_heads = config_dict.placeholder(int)
    c.model.head_dim = config_dict.placeholder(int)
    c.model.max_position_embeddings = config_dict.placeholder(int)
    c.model.min_pixels = config_dict.placeholder(int)  # of an image: smaller ones are enlarged
    c.model.max_pixels = config_dict.placeholder(int)  # … and larger ones made smaller
    c.model.train_vision = False  # whether updates change the vision tower, or it stays as it is
    c.model.attention = "auto"  # splash (TPU), triton, cudnn (GPU), blocked, xla

    # LoRA: low-rank adapters are learnt beside frozen parameters, see docs/lora.md.
    c.lora = ConfigDict()
    c.lora.rank = config_dict.placeholder(int)  # of the adapters; None: all parameters are learnt
    c.lora.alpha = 32.0  # adapters count alpha/rank
    c.lora.targets = ()  # projections that have one, such as ("q", "v", "mlp"); (): all there are

    c.dtype = ConfigDict()
    c.dtype.params = "float32"  # or, of the frozen ones of LoRA, "bfloat16"
    c.dtype.compute = "float32"  # or "bfloat16": activations and inputs of matmuls
    c.dtype.cache = "float32"  # or "bfloat16": the sampler's keys and values

    # Mesh: devices along each axis; -1: the rest. All are used, but where every axis is 1.
    c.mesh = ConfigDict()
    c.mesh.run = 1  # runs of a sweep side by side, each on its part of the devices
    c.mesh.data = 1  # rows are split
    c.mesh.fsdp = 1  # rows and parameters are split
    c.mesh.tensor = 1  # heads, widths and vocabulary are split
    c.mesh.expert = 1  # rows and experts are split

    # Objective: the algorithm. None: its own default. Each has the hyperparameters that
    # sapo-jax list objectives shows, these and others.
    c.objective = ConfigDict()
    c.objective.name = "sapo"  # sapo-jax list objectives
    c.objective.aggregation = config_dict.placeholder(str)  # seq_mean, token_mean, const_len, …
    c.objective.kl = "k3"  # estimator of the KL to the reference: k1, k2, k3; times r: k1_r, k3_r
    c.objective.tau = config_dict.placeholder(float)  # sharpness of a smooth gate
    c.objective.tau_pos = config_dict.placeholder(float)  # … where the advantage is positive
    c.objective.tau_neg = config_dict.placeholder(float)  # … where it is negative
    c.objective.eps_low = config_dict.placeholder(float)  # the band is [1 − eps_low, 1 + eps_high]
    c.objective.eps_high = config_dict.placeholder(float)
    c.objective.dual_clip = config_dict.placeholder(float)  # bound of r where A < 0; inf: none
    c.objective.max_length = config_dict.placeholder(float)  # tokens that const_len divides by
    c.objective.kl_coef = config_dict.placeholder(float)  # of KL in the loss; needs init_from
    c.objective.schedule = "constant"  # constant, linear, cosine: of what has an end, by iteration
    c.objective.end = ConfigDict(type_safe=False)  # {"tau_neg": 2.0}: values in the last iteration

    # Correction: weights of tokens by π_old / π_sampler, see sapo_jax.corrections.
    c.correction = ConfigDict()
    c.correction.name = "none"  # {token,sequence}_tis, {token,sequence}_mis, icepop, geometric
    c.correction.low = config_dict.placeholder(float)  # bounds of the ratio; None: its own
    c.correction.high = config_dict.placeholder(float)

    # Reward: R = Σ weight · part, see sapo_jax.rewards.Recipe.
    c.reward = ConfigDict()
    c.reward.accuracy = 1.0  # weight of the task's verdict
    c.reward.function = ""  # of a file, "my.py:name": takes the verdict's place and weight
    c.reward.format = 0.0  # weight of <think>…</think>, then an answer
    c.reward.overlong = 0.0  # of a soft penalty in the last `buffer` tokens before `max_length`
    c.reward.repetition = 0.0  # of a penalty on repeated n-grams
    c.reward.language = 0.0  # of a penalty on letters of other writing systems than the prompt's
    c.reward.think = False  # judge only what follows </think>
    c.reward.opened = False  # prompts end with <think>
    c.reward.max_length = 0  # 0: the room for a completion
    c.reward.buffer = 0  # tokens
    c.reward.ngram = 4  # words
    c.reward.workers = 1  # rows judged at a time, while the device works
    c.reward.kl_coef = 0.0  # R − kl_coef · Σ KL(π_old‖π_ref) over the completion; needs init_from
    c.reward.kl = "k1"  # its estimator: k1, k2, k3

    c.advantages = "group"  # group, leave_one_out, mean, reinforce_pp

    # Batch: how an iteration's rows are drawn and split.
    c.batch = ConfigDict()
    c.batch.prompts = 32  # per iteration
    c.batch.oversample = 1  # draw that many times the prompts, learn from the first with a signal
    c.batch.group_size = 8  # completions per prompt
    c.batch.minibatches = 4  # updates per iteration
    c.batch.micro_batches = 1  # forward-backward passes per update, at least; memory, not results
    c.batch.pack = True  # several completions in a row of the update, and no pads; speed
    c.batch.share_prefix = config_dict.placeholder(bool)  # a group's prompt once; None: if it pays

    # Sampler.
    c.sampler = ConfigDict()
    c.sampler.max_new_tokens = 0  # 0: the task's own bound
    c.sampler.temperature = 1.0  # of the learner's log π, too
    c.sampler.slots = 0  # groups' worth of rows in flight; 0: as many as sampler.make_plan takes
    # Rows of decode steps an iteration; the rest goes on in the next. 0: no end.
    c.sampler.budget = 0
    c.sampler.devices = 0  # of its own, beside the learner's mesh; 0: those of the mesh
    # A shape of its own for the mesh's devices. 0: where all are, that of c.mesh; else the rest for
    # data, 1 for the others.
    c.sampler.mesh = ConfigDict()
    c.sampler.mesh.data = 0  # rows are split
    c.sampler.mesh.tensor = 0  # heads, widths, vocabulary and the cache are split
    c.sampler.mesh.expert = 0  # rows and experts are split

    # Learner: AdamW, and what an update computes.
    c.learner = ConfigDict()
    c.learner.learning_rate = 1e-4
    c.learner.schedule = "constant"  # constant, linear, cosine
    c.learner.warmup = 0  # updates
    c.learner.weight_decay = 0.0
    c.learner.max_grad_norm = 1.0  # longer gradients are scaled down to it
    c.learner.max_skipped = 3  # updates in a row with a number that is not finite stop the run
    c.learner.b1 = 0.9
    c.learner.b2 = 0.95
    c.learner.eps = 1e-8
    c.learner.old_logp = "sampler"  # "sampler": its own; "recompute": the learner's, one more pass
    c.learner.routing_replay = "none"  # "R2" (old policy), "R3" (sampler), "none": the objective's
    c.learner.router_aux_coef = 0.0  # weight of the load-balancing loss
    c.learner.head_chunk = 0  # tokens whose logits exist at a time; 0: by the vocabulary
    c.learner.remat = False  # recompute activations in the backward pass; memory, not results

    # Evaluation on held-out prompts.
    c.eval = ConfigDict()
    c.eval.every = 10  # iterations; 0: never
    c.eval.prompts = 128
    c.eval.samples = 8  # per prompt
    c.eval.temperature = 1.0  # 0: greedy
    c.eval.top_k = config_dict.placeholder(int)  # keep the k likeliest tokens; None: all
    c.eval.top_p = config_dict.placeholder(float)  # keep the least set of this probability
    c.eval.best = "mean"  # which of evals the best checkpoint goes by, and eval/pass_at_1 is
    # Each with any of task, prompts, samples, temperature, top_k, top_p; what one lacks is that of
    # c.eval, and one without a task is of the run's own.
    c.evals = ConfigDict(
        type_safe=False
    )  # sets by name: {"a": {"task": {"name": …}, "samples": …}}

    # Collapse: since when a run has lost what it had learnt, see sapo_jax.training.collapse. A run
    # that is down by the rule has the iteration in run/collapsed_at, and 0 once it recovers.
    c.collapse = ConfigDict()
    c.collapse.rule = "reward"  # reward, entropy, either
    c.collapse.window = 10  # iterations of the running means that are compared
    c.collapse.reward = 0.5  # down below this share of the best accuracy so far
    c.collapse.least = 0.05  # a lower best accuracy is nothing to lose
    c.collapse.entropy = 0.1  # down below this share of the first entropy

    # Population: how the runs of a sweep share the hardware, see sapo_jax.sweep.population. Of a
    # mesh they are mesh.run at a time.
    c.population = ConfigDict()
    c.population.method = "auto"  # map (in turn), vmap (all at once), devices (split over them)

    # Edge: processes, files, clocks.
    c.distributed = ConfigDict()
    c.distributed.timeout = 3600.0  # seconds without a finished phase that end a process; 0: none

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 20  # iterations; the last is always kept
    c.checkpoint.minutes = 30.0  # between checkpoints at most, iterations being finished; 0: any

    c.log = ConfigDict()
    c.log.trackers = ("tensorboard",)  # and "wandb", where they are installed; () for none
    c.log.samples_every = 10  # iterations between written samples
    c.log.samples = 32  # rows

    c.profile_steps = 0  # iterations to trace with the JAX profiler, after the first two
    c.compilation_cache = ".cache/xla"  # compiled programs, reused by later runs; "" for none
    c.lock()  # but for what only objectives, tasks and chat templates know
    c.objective.unlock()
    c.objective.end.unlock()
    c.task.options.unlock()
    c.tokenizer.template_options.unlock()
    return c
