"""The runs of `recipes/reward_hacking.py`: real trainers on the task of `hack_task`, one run a job.

TRL's own `GRPOTrainer` and `RLOOTrainer` and ours generate, score, reward and update as they do for a user; nothing of
them is replaced. With vLLM the runs of a worker process share one engine, which takes half a minute to start.
"""

import functools
import gc
import os
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

from evidence.hack_task import MOST_TOKENS, Task, evaluate, first, optimum, train_problems
from transformers.utils import logging

BATCH, GROUP = 128, 8
WARMUP, ADAM_BETA2 = 10, 0.99
SEEDS = 5

# What each arm sets in TRL's config; the others' options are TRL's own.
ARMS = {
    "no KL": {"beta": 0.0},
    "host's own": {"kl": None},
    "k1_as_loss": {"kl": "k1_as_loss", "kl_allow_biased": True},
    "k3_as_loss": {"kl": "k3_as_loss"},
    "k2_as_loss": {"kl": "k2_as_loss"},
    "exact_in_reward": {"kl": "exact_in_reward"},
    "k1_in_reward, to_go": {"kl": "k1_in_reward", "kl_credit": "to_go"},
    "reverse_kl": {"kl": "reverse_kl"},
    "k1_as_loss, no weights": {"kl": "k1_as_loss", "kl_off_policy": "none", "kl_allow_biased": True},
    "k2_as_loss, no weights": {"kl": "k2_as_loss", "kl_off_policy": "none", "kl_allow_biased": True},
}


@dataclass(frozen=True)
class Part:
    """An experiment: what is paid for, and how it is trained."""

    title: str
    exploit: str
    pays: float
    betas: tuple[float, ...]
    """The first is the one of which tables and claims speak."""
    learning_rate: float
    steps: int
    arms: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]
    """Arms of which the differences are shown, paired by seed."""
    front: tuple[str, ...] = ()
    """The arms that are trained at the other betas, too."""
    reuse: int = 1
    """Updates with each rollout: TRL's `num_iterations`."""
    warmed_up_to: float = 0.5
    """The accuracy at which the warm-up of the math model stops."""


PARTS = {
    "front": Part(
        title="An exploit that pays twice the right answer",
        exploit="0",
        pays=2.0,
        betas=(0.3, 0.15, 0.6),
        learning_rate=1e-3,
        steps=120,
        arms=(
            "no KL",
            "k1_as_loss",
            "host's own",
            "k3_as_loss",
            "k2_as_loss",
            "k1_in_reward, to_go",
            "exact_in_reward",
            "reverse_kl",
        ),
        front=("k3_as_loss", "k2_as_loss", "reverse_kl"),
        pairs=(
            ("k1_as_loss", "no KL"),
            ("k3_as_loss", "k2_as_loss"),
            ("host's own", "k2_as_loss"),
            ("k2_as_loss", "reverse_kl"),
            ("k1_in_reward, to_go", "reverse_kl"),
            ("exact_in_reward", "reverse_kl"),
        ),
    ),
    "sequence": Part(
        title="A rarer exploit, of three tokens",
        exploit="111",
        pays=1.0,
        betas=(0.25,),
        learning_rate=1e-3,
        steps=180,
        arms=("k3_as_loss", "k2_as_loss", "exact_in_reward", "reverse_kl"),
        pairs=(
            ("k3_as_loss", "k2_as_loss"),
            ("k2_as_loss", "reverse_kl"),
            ("exact_in_reward", "reverse_kl"),
        ),
        warmed_up_to=0.08,
    ),
    "reuse": Part(
        title="Each rollout used four times, no exploit",
        exploit="",
        pays=0.0,
        betas=(0.05,),
        learning_rate=1e-3,
        steps=120,
        reuse=4,
        arms=(
            "no KL",
            "k1_as_loss",
            "k1_as_loss, no weights",
            "k2_as_loss",
            "k2_as_loss, no weights",
            "reverse_kl",
        ),
        pairs=(
            ("k1_as_loss, no weights", "no KL"),
            ("k1_as_loss", "no KL"),
            ("k2_as_loss", "k2_as_loss, no weights"),
            ("k2_as_loss", "reverse_kl"),
        ),
    ),
}
HOSTS = {
    "RLOO": ("host's own", "reverse_kl"),
    "OpenRLHF": ("OpenRLHF's own", "OpenRLHF's k3 in loss", "reverse_kl"),
    "GRPO, vLLM": ("host's own", "k3_as_loss", "reverse_kl"),
}
QUICK_SEEDS = {"k1_as_loss": 3, "k3_as_loss": 3, "k2_as_loss": 6, "reverse_kl": 6}  # more where arms are nearer


def jobs(quick, parts=tuple(PARTS), seeds=None, steps=None):
    """The runs, one dict each. Those with vLLM come last: an engine stays in its worker."""

    def runs(part, beta, arms, host="GRPO"):
        options = {"part": part, "host": host, "beta": beta, "steps": steps or PARTS[part].steps}
        of_arm = {arm: seeds or (QUICK_SEEDS[arm] if quick else SEEDS) for arm in arms}
        return [
            options | {"arm": arm, "seed": seed}
            for seed in range(max(of_arm.values()))
            for arm in arms
            if seed < of_arm[arm]
        ]

    main_beta = PARTS["front"].betas[0]
    if quick:
        return runs("front", main_beta, QUICK_SEEDS)
    found = []
    for name in parts:
        first, *others = PARTS[name].betas
        found += runs(name, first, PARTS[name].arms)
        for beta in others:
            found += runs(name, beta, PARTS[name].front)
    if "front" in parts:
        for host, arms in HOSTS.items():
            found += runs("front", main_beta, arms, host)
    return found


def model_folder(part):
    """Where the math model of a part is, or will be: $KL_PLUGINS_MATH_MODEL, or beside it one with less warm-up."""
    folder = Path(os.environ.get("KL_PLUGINS_MATH_MODEL", ".cache/kl_plugins/math"))
    target = PARTS[part].warmed_up_to
    return folder if target == Part.warmed_up_to else folder.with_name(f"{folder.name}-{target:g}")


@functools.cache
def load_task(part):
    """The `Task` of a part, whose math model has been made."""
    logging.disable_progress_bar()  # of loading weights
    return Task.load(model_folder(part), PARTS[part].exploit, PARTS[part].pays)


def reference(part, beta):
    """What `evaluate` says of the reference, from which a part's policies start."""
    return evaluate(load_task(part), load_task(part).reference, beta)


def best(part, beta):
    """What it would say of the policy with the best J."""
    return optimum(load_task(part), beta)


def work(job):
    """Train one arm from one seed.

    What `evaluate` finds afterwards, and in `curve` on the way; the median and the largest gradient norm, before
    clipping, and in `norms` those of all steps.
    """
    if job["host"] == "OpenRLHF":
        from evidence import openrlhf_hack

        return openrlhf_hack.work(job)
    part, task = PARTS[job["part"]], load_task(job["part"])
    curve, few = [], first(task, 128)

    def watch(step, policy):
        found = evaluate(few, policy, job["beta"])
        curve.append({"step": step, **{name: round(value, 4) for name, value in found.items()}})

    policy, norms = _train_with_trl(job, part, task, watch)
    return {
        **evaluate(task, policy, job["beta"]),
        "median_norm": statistics.median(norms),
        "largest_norm": max(norms),
        "norms": [round(norm, 3) for norm in norms],
        "curve": curve,
    }


def _train_with_trl(job, part, task, watch):
    import datasets
    from transformers import PrinterCallback, TrainerCallback

    from kl_plugins.trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

    datasets.disable_progress_bars()
    gc.freeze()  # the trainer collects garbage: spare it what the imports left

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **_):
            if state.global_step % 20 == 0 and state.global_step < args.max_steps:
                watch(state.global_step, model.eval())
                model.train()

    def reward(completions, answer, **_):
        return [task.proxy(text, right) for text, right in zip(completions, answer, strict=True)]

    options = {
        "beta": job["beta"], "seed": job["seed"], "learning_rate": part.learning_rate, "max_steps": job["steps"],
        "num_iterations": part.reuse, "per_device_train_batch_size": BATCH, "num_generations": GROUP,
        "max_completion_length": MOST_TOKENS, "lr_scheduler_type": "linear", "warmup_steps": WARMUP,
        "adam_beta2": ADAM_BETA2,
        "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "logging_steps": 1, "report_to": "none",
        "save_strategy": "no", "disable_tqdm": True, "model_init_kwargs": {"dtype": "float32"},
    }  # fmt: skip
    if job["host"] == "RLOO":
        config, trainer_class = RLOOConfig, RLOOTrainer
    else:
        config, trainer_class = GRPOConfig, GRPOTrainer
        options["scale_rewards"] = "none"  # RLOO doesn't scale: beta means the same
    if job["host"] == "GRPO, vLLM":
        _share_engine()
        options |= {"use_vllm": True, "vllm_mode": "colocate", "vllm_max_model_length": 32}
    options |= ARMS[job["arm"]]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=str(task.folder),
            reward_funcs=reward,
            args=config(**options, output_dir=folder),
            train_dataset=datasets.Dataset.from_list(train_problems(task)),
            callbacks=[Watch()],
        )
        trainer.remove_callback(PrinterCallback)
        if job["host"] == "GRPO, vLLM":
            _follow_policy(trainer)
        trainer.train()
    norms = [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]
    return trainer.model.eval(), norms


def _share_engine():
    """Let TRL make one vLLM engine a process; whoever asks for the same one again gets it."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all workers' engines sit on the first cores
    from trl.generation import vllm_generation

    if getattr(vllm_generation.LLM, "shared", False):
        return
    make, made = vllm_generation.LLM, []

    def engine(**options):
        if not made:
            made.append((options, make(**options)))
        if options | {"seed": 0} != made[0][0] | {"seed": 0}:
            raise ValueError(f"the engine that there is was made with {made[0][0]}, asked for was {options}")
        return made[0][1]

    engine.shared = True
    vllm_generation.LLM = engine


def _follow_policy(trainer):
    """Our trainers' weight sync for CPU engines, which TRL's own trainer needs too."""
    from kl_plugins.trl.vllm import follow_policy_on_cpu

    if trainer.kl_spec is None:
        follow_policy_on_cpu(trainer.vllm_generation)
