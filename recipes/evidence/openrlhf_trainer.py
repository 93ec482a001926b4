"""The known optimum through OpenRLHF's own trainers.

Real: OpenRLHF's command line, `BasePPOTrainer.train_step`, `RemoteExperienceMaker` with its advantage estimators, the
replay buffer, `Actor`, `ActorPPOTrainer`, `CriticPPOTrainer`, and our hooks, where an arm is one of ours: OpenRLHF's
own arms run without any. Made up: `openrlhf_host` says what stands in for DeepSpeed and Ray, the policy draws its
completions itself, in vLLM's place, and the critic of a table is a table, too.
"""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from evidence.markov_model import Trunk, markov_model, markov_tokenizer
from evidence.openrlhf_host import on_cpu, parse, ppo_trainer, ray_at_once
from evidence.trl_regimes import LENGTH, ROWS, SEEDS, evaluated, reward_of
from torch import nn

from kl_plugins.conformance.known_optimum import PROBLEMS
from kl_plugins.openrlhf import OpenRLHFOptions, plan_run
from kl_plugins.patching import Patching, load_patches

BETA, GROUP = 0.3, 8
ADAM = [
    word.format(name)
    for name in ("actor", "critic")
    for word in (
        *("--{}.adam.lr", "0.05", "--{}.adam.betas", "0.9", "0.99"),
        *("--{}.lr_scheduler", "constant", "--{}.max_norm", "1e9"),
    )
]
IN_LOSS = ("--algo.kl.use_loss", "--algo.kl.estimator")
OWN = {
    "no KL": ("--algo.kl.init_coef", "0"),
    "OpenRLHF's own": (),  # k1 in the reward
    "OpenRLHF's k1 in loss": (*IN_LOSS, "k1"),
    "OpenRLHF's k3 in loss": (*IN_LOSS, "k3"),
    "OpenRLHF's unbiased_gradient": (*IN_LOSS, "k3", "--algo.kl.unbiased_gradient"),
}
"""OpenRLHF's own KLs, by its flags."""
OURS = {
    "k2_as_loss": {"kl": "k2_as_loss"},
    "k1_in_reward, to_go, leave_one_out": {
        "kl": "k1_in_reward",
        "kl_credit": "to_go",
        "kl_baseline": "leave_one_out",
    },
    "reverse_kl": {"kl": "reverse_kl"},
}
"""Ours, by the options of `kl-plugins openrlhf`."""


@dataclass(frozen=True)
class Regime:
    """How the table is trained; the updates of all regimes see as many samples."""

    arms: tuple[str, ...]
    estimator: str = "rloo"
    problem: str = "terminal"
    epochs: int = 1
    """Updates with each rollout."""


# By default OpenRLHF divides rewards (group_norm) or advantages (reinforce_baseline, gae) by a standard deviation.
# A KL in the loss is added after that, with group_norm one in the reward, too: then beta counts scaled rewards.
REGIMES = {
    "rloo": Regime((*OWN, *OURS)),
    "reinforce_baseline": Regime(("OpenRLHF's own", "reverse_kl"), estimator="reinforce_baseline"),
    "group_norm": Regime(("OpenRLHF's own", "OpenRLHF's k3 in loss", "reverse_kl"), estimator="group_norm"),
    "dr_grpo": Regime(("OpenRLHF's own", "reverse_kl"), estimator="dr_grpo"),
    "gae": Regime(("OpenRLHF's own", "k2_as_loss", "reverse_kl"), estimator="gae"),
    "dense reward": Regime(("OpenRLHF's own", "reverse_kl"), problem="dense"),
    "hackable reward": Regime(("OpenRLHF's own", "OpenRLHF's k3 in loss", "reverse_kl"), problem="hackable"),
    "4 updates a rollout": Regime(("OpenRLHF's own", "OpenRLHF's unbiased_gradient", "reverse_kl"), epochs=4),
}
STEPS = 200


def jobs(quick):
    """The runs; with `quick` none: importing OpenRLHF alone would take the time."""
    if quick:
        return []
    return [
        {"part": "OpenRLHF", "regime": name, "estimator": regime.estimator, "arm": arm, "seed": seed, "steps": STEPS}
        for name, regime in REGIMES.items()
        for arm in regime.arms
        for seed in range(SEEDS)
    ]


def work(job):
    """Train a table of logits on a problem with a known optimum: one arm, from one seed."""
    torch.manual_seed(job["seed"])
    regime = REGIMES[job["regime"]]
    problem = PROBLEMS[regime.problem](length=LENGTH, beta=BETA, seed=job["seed"])
    args = arguments(job["arm"], regime.estimator, BETA, ROWS, *ADAM, "--train.max_epochs", str(regime.epochs))
    model, reference = markov_model(problem.reference), markov_model(problem.reference)
    prompts = torch.zeros(ROWS, 1, dtype=torch.long)

    def draw():
        return samples(args, model, prompts, LENGTH, lambda completions: reward_of(problem, completions))

    critic = Critic(model.config) if regime.estimator == "gae" else None
    tokenizer = markov_tokenizer(problem.reference.size(-1))
    train(args, model, reference, tokenizer, draw, job["steps"] // regime.epochs, critic)
    return evaluated(model, problem)


def arguments(arm, estimator, beta, rows, *flags):
    """What OpenRLHF makes of the flags of a run, with our plan in it where the arm is one of ours."""
    args = parse(
        *("--vllm.num_engines", "1", "--reward.remote_url", "reward.py"),
        *("--actor.num_gpus_per_node", "1", "--ref.num_gpus_per_node", "1"),
        *("--rollout.batch_size", str(rows // GROUP), "--rollout.n_samples_per_prompt", str(GROUP)),
        *("--rollout.micro_batch_size", str(rows)),
        *("--train.batch_size", str(rows), "--train.micro_batch_size", str(rows)),
        *("--algo.advantage.estimator", estimator, "--algo.kl.init_coef", str(beta)),
        *flags,
        *OWN.get(arm, ()),
    )
    if arm in OURS:
        plan_run(OpenRLHFOptions(**OURS[arm]), args)
    return args


def train(args, model, reference, tokenizer, draw, steps, critic=None):
    """Train `model` for `steps` rollouts of `draw`; the gradient norms of each one's last update, before clipping."""
    ours = hasattr(args, "kl_plugins")
    with on_cpu(), ray_at_once(), Patching(load_patches("openrlhf")) if ours else nullcontext():
        trainer = ppo_trainer(args, model, reference, tokenizer, steps, critic)
        return [trainer.train_step(draw(), step)[0]["actor_grad_norm"] for step in range(steps)]


def samples(args, model, prompts, most, pays):
    """What OpenRLHF makes of vLLM's answers: an `Experience` for each of the (B, P) prompts.

    A completion has at most `most` tokens, drawn at temperature 1; `pays` maps (B, T) of them to (B,) rewards.
    """
    from openrlhf.trainer.ppo_utils.experience import Experience

    drawn = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=most,
        min_new_tokens=0 if hasattr(args, "kl_plugins") else 1,  # OpenRLHF asks for it; see `dispatch_prompts`
        return_dict_in_generate=True,
        output_scores=True,
    )
    before = prompts.size(1) - 1  # places of an action mask that are the prompt's: the first token has none
    completions = drawn.sequences[:, before + 1 :]
    ended = (completions == model.generation_config.eos_token_id).long()
    lengths = (ended.cumsum(1) - ended == 0).sum(1)
    logp = torch.stack(drawn.scores, dim=1).log_softmax(-1).gather(-1, completions.unsqueeze(-1)).squeeze(-1)
    logp, mask = (nn.functional.pad(x, (before, 0)) for x in (logp, torch.ones_like(completions)))
    reported = args.algo.advantage.is_correction_level != "off"
    rewards, rows = pays(completions).float(), []
    for i, length in enumerate(lengths.tolist()):
        row, actions = slice(i, i + 1), before + length
        rows.append(
            Experience(
                sequences=drawn.sequences[row, : actions + 1],
                attention_mask=torch.ones(1, actions + 1, dtype=torch.long),
                action_mask=mask[row, :actions],
                rollout_log_probs=logp[row, :actions] if reported else None,
                rewards=rewards[row],
                response_length=lengths[row],
                total_length=lengths[row] + before + 1.0,
                truncated=ended[row].sum(1) == 0,
                info={"reward": rewards[row]},
            )
        )
    return rows


class Critic(nn.Module):
    """A value of each row of the table, called as OpenRLHF's critics are."""

    def __init__(self, config):
        super().__init__()
        self.model, self.score = Trunk(config), nn.Linear(config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def forward(self, input_ids, action_mask, attention_mask, return_output=False, **_):
        """(B, T) values before each action, 0 where the mask is."""
        hidden = self.model(input_ids, attention_mask)
        values = self.score(hidden.last_hidden_state).squeeze(-1)[:, :-1] * action_mask
        return (values, hidden) if return_output else values
