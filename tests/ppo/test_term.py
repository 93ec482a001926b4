"""What reaches TRL's advantages and loss, sample by sample, written out here; padding, weights and metrics."""

from __future__ import annotations

import pytest
import torch

from kl_plugins.trl.ppo import PPOTrainer

EOS, V, LENGTH, ROWS = 1, 16, 6, 16
LENGTHS = torch.arange(ROWS) % LENGTH + 1  # of the completions, with the end of sequence; the last kind has none
MASK = torch.arange(LENGTH) < LENGTHS[:, None]
COUNT = int(MASK.sum())


class Recording(PPOTrainer):
    """Keeps what the hooks were given and gave."""

    def compute_kl_terms(self, *, logp, ref_logp, mask, behavior_logp, **more):
        terms = super().compute_kl_terms(logp=logp, ref_logp=ref_logp, mask=mask, behavior_logp=behavior_logp, **more)
        vars(self).setdefault("seen", []).append((logp, behavior_logp, ref_logp, mask, terms))
        return terms

    def _kl_advantages(self, advantages, *inputs):
        result = super()._kl_advantages(advantages, *inputs)
        vars(self).setdefault("advantages", []).append((advantages, result, inputs))
        return result


@pytest.fixture
def rollout(scripted):
    """Ragged completions from another policy than the one that is trained."""
    generator = torch.Generator().manual_seed(5)
    responses = torch.randint(2, 12, (ROWS, LENGTH), generator=generator)
    ended = LENGTHS < LENGTH
    responses[ended, LENGTHS[ended] - 1] = EOS
    logits = torch.randn(ROWS, LENGTH, V, generator=generator, dtype=torch.float64)
    scripted(responses, logits)
    return responses, logits.log_softmax(-1).gather(-1, responses[..., None]).squeeze(-1)


def forward(model, responses):
    prompt = torch.tensor([[3, 12, 4, 13]]).expand(ROWS, -1)
    logits = model(torch.cat([prompt, responses], dim=1)).logits[:, 3:-1]
    return logits.log_softmax(-1).gather(-1, responses[..., None]).squeeze(-1)


@pytest.fixture
def moved(make_trainer, parameters):
    """`moved(**config)`: the trainer after one update, and the gradient of what a `kl_coef` of 1 adds to the loss."""

    def run(**options):
        def one(kl_coef):
            trainer = make_trainer(
                **{
                    "cls": Recording,
                    "updates": 1,
                    "dtype": torch.float64,
                    "rate": 1e-3,
                    "prompts": [[3, 12, 4, 13]] * ROWS,
                }
                | options,
                kl_coef=kl_coef,
            )
            start = parameters(trainer)
            trainer.train()
            return trainer, (start - parameters(trainer)) / 1e-3

        (_, large), (trainer, small) = one(1.1), one(0.1)
        return trainer, large - small

    return run


def suffix(x):
    return x.flip(-1).cumsum(-1).flip(-1)


CLIP = 10.0
TERMS = {
    "k2": ({"kl": "k2_as_loss"}, lambda u, rho: rho.clamp(max=CLIP) * u),
    "k3": ({"kl": "k3_as_loss"}, lambda u, rho: rho.clamp(max=CLIP) * (1 - (-u).exp())),
    "no weights": ({"kl": "k2_as_loss", "kl_off_policy": "none"}, lambda u, rho: u),
    "masked weights": (
        {"kl": "k2_as_loss", "kl_weight_clip": [0.5, 2.0], "kl_weight_clip_mode": "mask"},
        lambda u, rho: torch.where((rho >= 0.5) & (rho <= 2.0), rho, 0.0) * u,
    ),
    "to go": ({"kl": "k1_in_reward", "kl_placement": "loss"}, lambda u, rho: rho.clamp(max=CLIP) * suffix(u)),
    "clipped head": (
        {"kl": "k2_as_loss", "kl_clip": "separate"},
        lambda u, rho: torch.where(((u > 0) & (rho < 0.8)) | ((u < 0) & (rho > 1.2)), 0.0, rho.clamp(max=CLIP)) * u,
    ),
}


def test_tokens_left_out_of_the_term_in_the_loss(make_trainer, moved, rollout):
    trainer, found = moved(kl="k1_in_reward", kl_placement="loss", kl_off_policy="none", kl_leave_out=["eos", "id:5"])
    fresh = make_trainer(dtype=torch.float64)
    logp = forward(fresh.policy_model, rollout[0])
    out = ((rollout[0] == EOS) | (rollout[0] == 5)) & MASK
    with torch.no_grad():
        u = torch.where(MASK, logp - forward(fresh.ref_model, rollout[0]), 0.0)
        instead = torch.where(out, 1 - (-u).exp(), u)
        coefficient = suffix(instead) - torch.where(out, instead, 0.0)

    def gradient(c):
        fresh.policy_model.zero_grad()
        (torch.where(MASK, c, 0.0) * logp).sum().div(COUNT).backward(retain_graph=True)
        return torch.cat([p.grad.flatten() for p in fresh.policy_model.parameters()])

    wanted = gradient(coefficient)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    for twin in (suffix(instead), suffix(torch.where(out, 0.0, u)), suffix(u)):
        assert (gradient(twin) - wanted).norm() > 1e-2 * wanted.norm()
    log = trainer.state.log_history[-1]
    assert log["kl/left_out"] == pytest.approx(int(out.sum()) / COUNT)
    assert log["kl/left_out_k1"] == pytest.approx(u[out].mean().item())


@pytest.mark.parametrize("name", TERMS)
def test_the_term_in_the_loss_of_ragged_off_policy_completions(make_trainer, moved, rollout, name):
    options, coefficient = TERMS[name]
    trainer, found = moved(**options)

    fresh = make_trainer(dtype=torch.float64)  # the policy before the update
    logp = forward(fresh.policy_model, rollout[0])
    with torch.no_grad():
        u = torch.where(MASK, logp - forward(fresh.ref_model, rollout[0]), 0.0)
        rho = torch.where(MASK, (logp - rollout[1]).exp(), 0.0)

    def gradient(c):
        fresh.policy_model.zero_grad()
        (torch.where(MASK, c, 0.0) * logp).sum().div(COUNT).backward(retain_graph=True)
        return torch.cat([p.grad.flatten() for p in fresh.policy_model.parameters()])

    wanted = gradient(coefficient(u, rho))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    for twin in (2 * u, rho * u.square() / 2, TERMS["k3" if name == "k2" else "k2"][1](u, rho)):
        assert (gradient(twin) - wanted).norm() > 1e-2 * wanted.norm()

    # Padding: TRL's mask, its sentinel 1.0 where there is no token, and numbers over tokens only.
    logp, old, ref, mask, _ = trainer.seen[-1]
    order = [int(row) for row in (old[:, :1] - rollout[1][:, 0]).abs().argmin(1)]  # TRL shuffles
    assert torch.equal(mask, MASK[order])
    for each in (logp, old, ref):
        assert (each[~mask] == 1.0).all()
        assert (each[mask] < 0).all()
    log = trainer.state.log_history[-1]
    assert log["kl/k1"] == pytest.approx(u.sum().item() / COUNT)
    assert log["kl/k1"] != pytest.approx(u.sum().item() / MASK.numel(), rel=1e-2)
    if options.get("kl_off_policy") == "none":
        assert log["kl/ess"] == pytest.approx(1.0)


def test_what_masked_positions_hold_does_not_matter(moved, rollout):
    """They get TRL's sentinel before we see them; were it NaN, nothing would change."""

    class Poisoned(Recording):
        def compute_kl_terms(self, *, ref_logp, mask, behavior_logp, **more):
            poison = torch.full_like(behavior_logp, torch.nan)
            return super().compute_kl_terms(
                ref_logp=torch.where(mask, ref_logp, poison),
                mask=mask,
                behavior_logp=torch.where(mask, behavior_logp, poison),
                **more,
            )

    _, clean = moved(kl="k2_as_loss")
    _, poisoned = moved(kl="k2_as_loss", cls=Poisoned)
    assert torch.equal(clean, poisoned)
    assert clean.isfinite().all()


def gae(rewards, discount):
    """Advantages of a critic that says 0, by the recursion."""
    out, last = torch.zeros_like(rewards), torch.zeros(len(rewards), dtype=rewards.dtype)
    for t in reversed(range(rewards.size(1))):
        last = rewards[:, t] + discount * last
        out[:, t] = last
    return out


def test_advantages_follow_the_policy(make_trainer):
    """Two epochs of two mini-batches: the first update is TRL's own, each later one has the KL of its policy."""
    schedule = {"updates": 1, "num_ppo_epochs": 2, "num_mini_batches": 2, "learning_rate": 1e-2, "rate": 0.5}
    trainer = make_trainer(Recording, kl="k1_in_reward", kl_coef=0.1, lam=0.9, dtype=torch.float64, **schedule)
    trainer.train()
    scale = trainer.state.log_history[-1]["kl/advantage_scale"]
    first, *later = trainer.advantages
    assert len(later) == 3
    assert first[0] is first[1]
    for before, after, (logp, old, ref, mask) in later:
        logp = logp.detach()
        difference = [gae(torch.where(mask, -0.1 * (each - ref), 0.0), 0.9) for each in (logp, old)]
        change = scale * (difference[0] - difference[1])
        wanted = (before + change) / (1 + change[mask].square().mean()).sqrt()  # still whitened
        torch.testing.assert_close(after[mask], wanted[mask], rtol=1e-5, atol=1e-6)  # TRL samples in single precision
        assert (after - before)[mask].abs().max() > 1e-3  # the twin: leaving it as it was


def test_one_mini_batch_of_several_micro_batches_moves_the_policy_once(make_trainer):
    schedule = {"updates": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer = make_trainer(Recording, kl="k1_in_reward", **schedule)
    trainer.train()
    assert len(trainer.advantages) == 8
    assert all(before is after for before, after, _ in trainer.advantages)
    trainer = make_trainer(Recording, kl="k1_in_reward", num_ppo_epochs=2, **schedule)
    trainer.train()
    assert [before is after for before, after, _ in trainer.advantages] == 2 * ([True] * 4 + [False] * 4)


BOTH = {"kl/k1", "kl/k2", "kl/k3", "kl/dropped", "kl/beta"}


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"kl": "k1_in_reward"}, BOTH | {"kl/advantage_scale"}),
        (
            {"kl": "k2_as_loss"},
            BOTH | {"kl/loss", "kl/ess", "kl/weight_max", "kl/clipped", "kl/unscored"},
        ),
    ],
)
def test_metrics_of_every_update(make_trainer, options, names):
    trainer = make_trainer(Recording, num_ppo_epochs=2, **options)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "objective/kl" in row]
    assert len(rows) == 3
    terms = [terms for logp, *_, terms in trainer.seen if logp.requires_grad]
    for row, pair in zip(rows, zip(terms[::2], terms[1::2], strict=True), strict=True):
        assert {name for name in row if name.startswith("kl/")} == names
        u = torch.cat([each.log_ratio[each.mask] for each in pair])
        assert row["kl/k1"] == pytest.approx(u.mean().item(), rel=1e-4)
        assert row["kl/k2"] == pytest.approx((u.square() / 2).mean().item(), rel=1e-4)
        assert row["kl/beta"] == 0.1
        if "kl/loss" in names:
            assert row["kl/loss"] == pytest.approx(0.1 * row["kl/k2"], rel=1e-4)
            assert row["objective/non_score_reward"] == 0
            assert 0.5 < row["kl/ess"] <= 1
        else:
            assert row["objective/non_score_reward"] == pytest.approx(-0.1 * row["objective/kl"], rel=1e-4)
            assert row["kl/advantage_scale"] > 0
    assert rows[0]["kl/k1"] != rows[1]["kl/k1"]


def test_nonfinite_reference(make_trainer):
    """An -inf of the reference stops the run, or is dropped and counted; a NaN of the policy always stops it."""

    class Broken(PPOTrainer):
        def compute_kl_terms(self, *, ref_logp, **more):
            broken = ref_logp.clone()
            broken[:, 0] = -torch.inf
            return super().compute_kl_terms(ref_logp=broken, **more)

    with pytest.raises(ValueError, match="not finite"):
        make_trainer(Broken, kl="k2_as_loss").train()
    trainer = make_trainer(Broken, kl="k2_as_loss", kl_nonfinite="drop", updates=1)
    trainer.train()
    assert trainer.state.log_history[-1]["kl/dropped"] == ROWS


@pytest.mark.parametrize("kl", ["k1_in_reward", "k2_as_loss"])
def test_a_controller_moves_beta_after_each_rollout(make_trainer, kl):
    """A schedule's betas are those of the rewards and losses, and feedback is on the mean over a rollout's updates."""
    options = {"kl": kl, "updates": 4, "num_ppo_epochs": 2}
    schedule = {"kl_controller": "linear", "kl_beta_end": 0.05, "kl_beta_steps": 2}
    trainer = make_trainer(**options, **schedule)
    used = []
    reward, term = trainer._kl_reward, trainer._kl_term

    def seen(function):
        def call(*args):
            used.append(trainer.kl_beta)
            return function(*args)

        return call

    trainer._kl_reward, trainer._kl_term = seen(reward), seen(term)
    trainer.train()
    betas = [beta for beta in (0.1, 0.075, 0.05, 0.05) for _ in range(3)]  # a rollout, two updates
    assert used == pytest.approx(betas)
    logged = [row["kl/beta"] for row in trainer.state.log_history if "kl/beta" in row]
    assert logged == pytest.approx([0.1, 0.075, 0.05, 0.05])

    held = make_trainer(**options, kl_controller="proportional", kl_target=1e-4, kl_horizon=2.0)
    held.train()
    assert held.kl_beta == pytest.approx(0.1 * 1.1**4)  # 0.2 / 2 above, four times
    assert held.state.stateful_callbacks["kl_controller"] == {"controller": "proportional", "beta": held.kl_beta}
