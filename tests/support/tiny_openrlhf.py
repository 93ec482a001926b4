"""OpenRLHF's own parser, actor and experience maker in one process, one step at a time.

`recipes/evidence/openrlhf_host.py` says what is real in that; the answers that `make_experience` gets are made up.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch

from kl_plugins import kl_terms
from kl_plugins.openrlhf.actor import recorder_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "recipes"))
from evidence.openrlhf_host import Strategy, actor_trainer, import_openrlhf, on_cpu, parse, ray_at_once

__all__ = ["actor_trainer", "import_openrlhf", "on_cpu", "parse"]  # of the host, for the tests

# What every run of the tests is started with, unless a test says otherwise; later flags win.
FLAGS = (
    *("--actor.num_gpus_per_node", "1", "--ref.num_gpus_per_node", "1"),
    *("--vllm.num_engines", "1", "--reward.remote_url", "reward.py"),
    *("--rollout.n_samples_per_prompt", "4", "--rollout.batch_size", "8", "--rollout.micro_batch_size", "4"),
    *("--train.batch_size", "32", "--train.micro_batch_size", "4", "--algo.kl.init_coef", "0.1"),
)


def experience(args, sequences, action_mask, **fields):
    """A real `Experience` of unpadded `sequences` (B, T) whose actions are `action_mask` (B, T - 1)."""
    from openrlhf.trainer.ppo_utils.experience import Experience

    rows, length = sequences.shape
    zeros = torch.zeros(rows, length - 1)
    return Experience(
        sequences=sequences,
        attention_mask=torch.ones_like(sequences),
        action_mask=action_mask,
        **{"advantages": zeros, "action_log_probs": zeros, "base_action_log_probs": zeros} | fields,
    )


def gradients(trainer) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.actor.parameters() if p.grad is not None])


def step(trainer, batch, *, beta=0.1, tokens=None) -> tuple[dict, torch.Tensor]:
    """One real `training_step` and the gradient that it leaves. `tokens` is what OpenRLHF divides the loss by."""
    trainer.actor.zero_grad()
    info = None
    if tokens is not None:
        info = {"dp_size": 1, "batch_num_tokens": tokens, "global_batch_size": 1.0}
    trainer.kl_plugins_recorder = recorder_of(trainer)
    status = trainer.training_step(batch, beta, 0, info)
    return status, gradients(trainer)


class Group:
    """Ray actors that have already answered: one result for each batch of samples."""

    def __init__(self, results):
        self.results = results

    def async_run_method_batch(self, method_name, **batches):
        return [self.results]


@contextmanager
def experience_maker(args, *, logp, ref_logp, values=None, kl_coef=0.1):
    """A real `RemoteExperienceMaker` whose actors score each batch of samples with what is given."""
    from openrlhf.trainer.ppo_utils import experience_maker as module
    from openrlhf.trainer.ppo_utils.kl_controller import FixedKLController

    with ray_at_once():
        yield module.RemoteExperienceMaker(
            Group(logp),
            None if values is None else Group(values),
            None,
            Group(ref_logp),
            FixedKLController(kl_coef),
            Strategy(args),
            SimpleNamespace(pad_token_id=0),
        )


def make_experiences(args, batch, *, micro=(4, 4), order=None, kl_coef=0.1):
    """What a real experience maker makes of `batch`, split into micro-batches of these sizes, rows in this order.

    `batch` is (sequences, action mask, rewards, log-probs, the reference's, values).
    """
    sequences, mask, reward, logp, ref_logp, values = batch
    order = torch.arange(len(sequences)) if order is None else torch.tensor(order)
    parts = order.split(list(micro))
    samples = []
    for rows in parts:
        one = experience(args, sequences[rows], mask[rows], rewards=reward[rows], index=rows.tolist())
        one.action_log_probs = one.base_action_log_probs = one.advantages = None
        one.info = {"reward": reward[rows]}
        samples.append(one)
    scored = {
        "logp": [logp[rows] for rows in parts],
        "ref_logp": [ref_logp[rows] for rows in parts],
        "values": [values[rows] for rows in parts] if args.algo.advantage.estimator == "gae" else None,
    }
    with experience_maker(args, **scored, kl_coef=kl_coef) as maker:
        return maker.compute_advantages_and_returns(maker.make_experience(samples))


ROWS, PROMPT, LENGTH = 8, 4, 6  # of `made_up`


def made_up(args, trainer, *, seed=0, **fields):
    """A ragged off-policy micro-batch, scored by the trainer's own actor plus noise."""
    generator = torch.Generator().manual_seed(seed)

    def noise(scale):
        return scale * torch.randn(ROWS, PROMPT + LENGTH - 1, generator=generator)

    sequences = torch.randint(2, 12, (ROWS, PROMPT + LENGTH), generator=generator)
    lengths = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=generator)
    mask = (torch.arange(1 - PROMPT, LENGTH) < lengths) & (torch.arange(1 - PROMPT, LENGTH) >= 0)
    with torch.no_grad():
        logp = trainer.actor(sequences, mask, attention_mask=torch.ones_like(sequences))
    scored = {
        "action_log_probs": (logp + noise(0.3)) * mask,
        "base_action_log_probs": (logp + noise(0.5)) * mask,
        "advantages": noise(1.0) * mask,
    }
    return experience(args, sequences, mask.long(), **(scored | fields)), logp


def expected_kl_gradient(trainer, batch, spec, beta=0.1):
    """beta times the token mean of `kl_terms`, differentiated without OpenRLHF's step."""
    trainer.actor.zero_grad()
    logp = trainer.actor(batch.sequences, batch.action_mask, attention_mask=batch.attention_mask)
    behavior = batch.action_log_probs if batch.rollout_log_probs is None else batch.rollout_log_probs
    terms = kl_terms(
        spec,
        logp=logp,
        ref_logp=batch.base_action_log_probs,
        mask=batch.action_mask,
        behavior_logp=behavior,
        baseline=batch.kl if spec.baseline else None,
    )
    (beta * terms.loss.sum() / batch.action_mask.sum()).backward()
    return gradients(trainer)


def train(trainer, args, batch):
    """A real `ppo_train` on the rows of `batch`."""
    batch.total_length = batch.attention_mask.sum(-1)
    args.rollout.batch_size = ROWS // 4
    trainer.replay_buffer.clear()
    trainer.replay_buffer.packing_samples = False
    trainer.replay_buffer.append(batch)
    return trainer.ppo_train(0.1)
