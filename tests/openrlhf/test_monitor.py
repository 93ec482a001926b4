"""`kl_monitor`: its numbers against plain loops, of OpenRLHF's own KL and of ours; and that it changes nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from plain_monitor import plain_metrics
from tiny_openrlhf import FLAGS, ROWS, experience, experience_maker, gradients, made_up, parse, step, train
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from kl_plugins import ConfigError, PatchError
from kl_plugins.openrlhf import monitor, worker
from kl_plugins.openrlhf.actor import ppo_train
from kl_plugins.openrlhf.experience import dispatch_prompts
from kl_plugins.patching import Patching, load_patches

IN_LOSS = ("--algo.kl.use_loss", "--algo.kl.estimator")
REINFORCE = ("--algo.advantage.estimator", "reinforce")
ONE_UPDATE = ("--train.batch_size", str(ROWS))
# OpenRLHF's own KL, and whether its clamp leaves a token at log-ratio u without a gradient.
STOCK = {
    "k1": ((*IN_LOSS, "k1"), lambda u: abs(u) > 10),
    "k2": ((*IN_LOSS, "k2"), lambda u: u * u / 2 > 10),
    "k3": ((*IN_LOSS, "k3"), lambda u: (-u).exp() - 1 + u > 10),
    "unbiased": ((*IN_LOSS, "k3", "--algo.kl.unbiased_gradient"), lambda u: u.isnan()),
    "reward": (REINFORCE, None),
}
stock = pytest.mark.parametrize("name", STOCK)


@pytest.fixture
def make_watched(make_actor, planned, model_folder):
    """A trainer whose KL is watched, with a tokenizer."""

    def make(*flags, **options):
        args = planned(*ONE_UPDATE, *flags, kl_monitor=True, **options)
        trainer = make_actor(args)
        trainer.tokenizer = AutoTokenizer.from_pretrained(model_folder)
        return args, trainer

    return make


def scored(args, trainer, *, engine=True, spread=5.0):
    """A micro-batch with prompts of unequal lengths, ends, other special tokens, and a reference far away."""
    batch, _ = made_up(args, trainer)
    longer = (batch.action_mask.sum(-1) > 2) & (torch.arange(ROWS) % 2 == 0)
    batch.action_mask[longer, batch.action_mask[longer].argmax(-1)] = 0
    assert longer.any()
    assert not longer.all()
    mask = batch.action_mask
    batch.sequences[1, -6], batch.sequences[2, -5], batch.sequences[3, -4] = 0, 1, 1
    with torch.no_grad():
        logp = trainer.actor(batch.sequences, mask, attention_mask=batch.attention_mask)
    generator = torch.Generator().manual_seed(7)
    near, far, gap = (torch.randn(logp.shape, generator=generator) for _ in range(3))
    batch.action_log_probs = logp + 0.5 * near
    batch.base_action_log_probs = logp + spread * far
    if engine:
        batch.rollout_log_probs = batch.action_log_probs + 0.1 * gap
    return batch, logp


def plainly(batch, logp, dead=None, *, with_the_prompt=False):
    """What should be logged, from completions that are cut out of the sequences row by row."""
    starts = [0 if with_the_prompt else int(row.nonzero()[0]) for row in batch.action_mask]

    def cut(x):
        rows = [] if x is None else [row[start:] for row, start in zip(x, starts, strict=True)]
        return pad_sequence(rows, batch_first=True) if rows else None

    ids = batch.sequences[:, 1:]
    found = plain_metrics(
        logp=cut(logp),
        mask=cut(batch.action_mask),
        ref_logp=cut(batch.base_action_log_probs),
        old_logp=cut(batch.action_log_probs),
        engine_logp=cut(batch.rollout_log_probs),
        classes=cut(torch.where(ids == 1, 1, torch.where(ids == 0, 2, 0))),
    )
    if dead is not None:
        u = (logp - batch.base_action_log_probs)[batch.action_mask.bool()]
        found["kl/dead"] = float(dead(u[u.isfinite()]).float().mean())
    return found


def numbers(status):
    return {name: value for name, value in status.items() if name.startswith("kl/")}


def close(found, wanted):
    return found.keys() == wanted.keys() and found == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("engine", [False, True], ids=["old_policy", "vllm"])
@stock
def test_openrlhfs_own_kl_in_plain_loops(make_watched, hooked, name, engine):
    flags, dead = STOCK[name]
    args, trainer = make_watched(*flags)
    batch, logp = scored(args, trainer, engine=engine)
    wanted = plainly(batch, logp, dead)
    assert {"kl/class/eos", "kl/class/special", "kl/position/4-15_se", "kl/sequence_se"} <= wanted.keys()
    assert (0 < wanted.get("kl/dead", 0)) is (name in ("k1", "k2", "k3"))
    assert close(numbers(train(trainer, args, batch)), wanted)
    assert not close(wanted, plainly(batch, logp, dead, with_the_prompt=True))  # twin


def test_a_second_training_starts_from_nothing(make_watched, hooked):
    args, trainer = make_watched(*STOCK["k2"][0])
    for spread in (1.0, 5.0):
        batch, logp = scored(args, trainer, spread=spread)
        wanted = plainly(batch, logp, STOCK["k2"][1])
        assert close(numbers(train(trainer, args, batch)), wanted)


def test_a_reference_that_is_not_finite_is_counted(make_watched, hooked):
    args, trainer = make_watched(*STOCK["reward"][0])
    batch, logp = scored(args, trainer)
    row, column = batch.action_mask.nonzero()[0].tolist()
    batch.base_action_log_probs[row, column] = torch.nan
    batch.base_action_log_probs[row, 0] = torch.nan  # of the prompt
    found = numbers(train(trainer, args, batch))
    assert found["kl/nonfinite"] == 1
    assert close(found, plainly(batch, logp))


@pytest.mark.parametrize("options", [{"kl": "k2_as_loss"}, {"kl": "k1_in_reward"}], ids=lambda o: o["kl"])
def test_our_own_kl(make_watched, hooked, options):
    args, trainer = make_watched(*REINFORCE, **options)
    batch, logp = scored(args, trainer)
    wanted = plainly(batch, logp, None if args.kl_plugins.in_reward else torch.isnan)
    batch.info = {"kl/advantage_scale": torch.ones(ROWS)}
    found = numbers(train(trainer, args, batch))
    ours = {"kl/beta", "kl/dropped", "kl/loss", "kl/ess", "kl/weight_max", "kl/clipped", "kl/unscored"}
    ours.add("kl/advantage_scale")
    assert close({name: value for name, value in found.items() if name not in ours}, wanted)


def test_our_own_names_stay_ours(make_watched, hooked):
    args, trainer = make_watched(kl="k2_as_loss", kl_leave_out=["first"])
    batch, logp = scored(args, trainer)
    mask = batch.action_mask.bool()
    u = logp - batch.base_action_log_probs
    others = mask & (batch.action_mask.cumsum(-1) > 1)
    found = train(trainer, args, batch)
    assert found["kl/k1"] == pytest.approx(u[others].mean().item(), rel=1e-4)
    assert found["kl/k1"] != pytest.approx(u[mask].mean().item(), rel=1e-2)  # twin
    assert "kl/position/0" not in found  # it is left out, and isn't dead by that
    assert found["kl/dead"] == 0


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_in_the_dead_zone_every_token_is_dead(make_watched, hooked, estimator):
    shares = {}
    for name in ("stock", "unbiased", "ours"):
        flags = STOCK[estimator][0] + (("--algo.kl.unbiased_gradient",) if name == "unbiased" else ())
        kl = {"kl": f"{estimator}_as_loss"} if name == "ours" else {}
        args, trainer = make_watched(*flags, **kl)
        batch, logp = made_up(args, trainer)
        log_ratio = torch.zeros_like(logp)
        log_ratio[batch.action_mask.bool()] = torch.linspace(-20, -5, int(batch.action_mask.sum()))
        batch.base_action_log_probs = logp - log_ratio
        shares[name] = train(trainer, args, batch)["kl/dead"]
    assert shares == {"stock": 1, "unbiased": 0, "ours": 0}


def three_steps(make_actor, args):
    """Gradients, and what a step returns, of steps on three micro-batches."""
    trainer = make_actor(args)
    found = []
    for seed in range(3):
        batch, logp = made_up(args, trainer, seed=seed)
        batch.base_action_log_probs = logp + 8 * (batch.base_action_log_probs - logp)
        batch.rollout_log_probs = batch.action_log_probs + 0.1
        status, gradient = step(trainer, batch)
        found.append((gradient, status["metrics"]))
    return found


def same(one, other):
    return all(
        torch.equal(gradient, theirs)
        and metrics.keys() == others.keys()
        and all(torch.equal(torch.as_tensor(x), torch.as_tensor(others[name])) for name, x in metrics.items())
        for (gradient, metrics), (theirs, others) in zip(one, other, strict=True)
    )


@stock
def test_a_watched_step_is_the_same_bit_for_bit(make_actor, planned, monkeypatch, name):
    flags = (*STOCK[name][0], "--algo.advantage.is_correction_level", "token")
    wanted = three_steps(make_actor, parse(*FLAGS, *flags))
    args = planned(*flags, kl_monitor=True)
    with Patching(load_patches("openrlhf")):
        assert same(three_steps(make_actor, args), wanted)
        if name != "reward":  # twin: what looks at the KL takes part in the step

            def accumulating(kl, logp, mask):
                kl[mask.bool()].sum().backward(retain_graph=True)

            monkeypatch.setattr(monitor, "coefficient", accumulating)
            assert not same(three_steps(make_actor, args), wanted)


def test_ours_is_the_same_bit_for_bit(make_actor, planned, hooked):
    wanted = three_steps(make_actor, planned(kl="k2_as_loss"))
    assert same(three_steps(make_actor, planned(kl="k2_as_loss", kl_monitor=True)), wanted)
    assert not same(three_steps(make_actor, planned(kl="k3_as_loss", kl_monitor=True)), wanted)  # twin


def rollout(args, *, without_reference=False, kl_coef=0.1):
    """Experiences of two prompts with 4 completions each, in two micro-batches, far from the reference."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.randint(2, 12, (8, 9), generator=generator)
    lengths = torch.randint(1, 6, (8, 1), generator=generator)
    position = torch.arange(-3, 5)
    mask = ((position >= 0) & (position < lengths)).long()
    logp, ref_logp, values = (4 * torch.randn(8, 8, generator=generator) - 3 for _ in range(3))
    rewards = torch.randn(8, generator=generator)
    samples, parts = [], torch.arange(8).split(4)
    for rows in parts:
        one = experience(args, sequences[rows], mask[rows], rewards=rewards[rows], index=rows.tolist())
        one.action_log_probs = one.base_action_log_probs = one.advantages = None
        one.info = {"reward": rewards[rows]}
        samples.append(one)
    gae = args.algo.advantage.estimator == "gae"
    answers = {
        "logp": [logp[rows] for rows in parts],
        "ref_logp": [ref_logp[rows] for rows in parts],
        "values": [values[rows] for rows in parts] if gae else None,
    }
    with experience_maker(args, **answers, kl_coef=kl_coef) as maker:
        if without_reference:
            maker.initial_model_group = None
        return maker.compute_advantages_and_returns(maker.make_experience(samples)), ref_logp


def same_experiences(one, other):
    return all(
        torch.equal(a.advantages, b.advantages)
        and torch.equal(a.returns, b.returns)
        and torch.equal(a.info["kl"], b.info["kl"])
        and a.kl is b.kl is None
        and a.info.keys() == b.info.keys()
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("estimator", ["gae", "reinforce", "rloo", "group_norm"])
def test_a_watched_experience_is_the_same_bit_for_bit_and_keeps_the_reference(planned, estimator):
    flags = ("--algo.advantage.estimator", estimator)
    wanted, ref_logp = rollout(parse(*FLAGS, *flags))
    assert wanted[0].base_action_log_probs is None
    with Patching(load_patches("openrlhf")):
        found, _ = rollout(planned(*flags, kl_monitor=True))
        assert same_experiences(found, wanted)
        kept = torch.cat([x.base_action_log_probs for x in found])
        assert torch.equal(kept, ref_logp)
        in_loss, _ = rollout(planned(*flags, *STOCK["k2"][0], kl_monitor=True))
        assert not same_experiences(in_loss, wanted)  # twin


def test_vllm_is_asked_as_openrlhf_asks(planned):
    dispatch = dispatch_prompts(lambda generator, prompts, labels, **kwargs: kwargs)
    assert dispatch(SimpleNamespace(args=planned(kl_monitor=True)), [], []) == {}
    assert dispatch(SimpleNamespace(args=planned(kl="k2_as_loss")), [], []) == {"min_new_tokens": 0}  # twin


def test_two_ranks_are_as_one_with_all_rows(make_watched, hooked):
    args, trainer = make_watched(*STOCK["k2"][0], "--train.micro_batch_size", "4")
    whole, _ = scored(args, trainer)
    wanted = numbers(train(trainer, args, whole))

    def half(rows):
        batch, _ = scored(args, trainer)
        names = ("sequences", "attention_mask", "action_mask", "action_log_probs", "base_action_log_probs")
        for name in (*names, "rollout_log_probs", "advantages"):
            setattr(batch, name, getattr(batch, name)[rows])
        return batch

    sent = []
    trainer.strategy.all_reduce = lambda data, op="mean": data if isinstance(data, dict) else sent.append(data) or data
    alone = numbers(train(trainer, args, half(slice(0, 4))))
    assert len(sent) == 2

    def with_the_other(data, op="mean"):
        if isinstance(data, dict):
            return data
        other = sent.pop(0)
        return data + other if op == "sum" else torch.maximum(data, other)

    trainer.strategy.all_reduce = with_the_other
    assert close(numbers(train(trainer, args, half(slice(4, 8)))), wanted)
    assert not close(alone, wanted)  # twin


@pytest.mark.parametrize(("copies", "unscored"), [(1, 2), (2, 1)])
def test_copies_of_the_same_rows_count_once(make_watched, hooked, copies, unscored):
    args, trainer = make_watched(*STOCK["reward"][0])
    args.ds.ring_attn_size = copies
    batch, logp = scored(args, trainer)
    batch.base_action_log_probs[tuple(batch.action_mask.nonzero()[0].tolist())] = torch.nan
    two_ranks = {"sum": lambda x: 2 * x, "max": lambda x: x, "mean": lambda x: x}
    trainer.strategy.all_reduce = lambda data, op="mean": two_ranks[op](data)
    found = numbers(train(trainer, args, batch))
    assert found["kl/nonfinite"] == unscored
    wanted = plainly(batch, logp)
    assert found["kl/ratio_max"] == pytest.approx(wanted["kl/ratio_max"], rel=1e-4)
    assert (found["kl/sequence_se"] == pytest.approx(wanted["kl/sequence_se"], rel=1e-4)) is (copies == 2)


@pytest.mark.parametrize(
    ("options", "recorded"), [({}, []), ({"kl": "k2_as_loss"}, ["sum", "sum"])], ids=["stock", "ours"]
)
def test_a_rank_without_a_step_takes_part_in_the_reductions(make_watched, options, recorded):
    _, trainer = make_watched(*IN_LOSS, "k2", **options)
    reduced = []
    trainer.strategy.all_reduce = lambda data, op="mean": reduced.append(op) or data
    assert ppo_train(lambda trainer, kl_ctl: {"actor_lr": 1.0})(trainer, 0.1) == {"actor_lr": 1.0}
    assert reduced == ["sum", "max", *recorded]


def test_a_trainer_without_a_tokenizer_has_no_classes(make_watched, hooked):
    args, trainer = make_watched(*STOCK["k2"][0])
    trainer.tokenizer = None
    batch, _ = scored(args, trainer)
    found = train(trainer, args, batch)
    assert "kl/k1" in found
    assert not any(name.startswith("kl/class/") for name in found)


def after_adam(trainer, beta, *, advantages=True):
    """The parameters after three steps."""
    optimizer = torch.optim.AdamW(trainer.actor.parameters(), lr=1e-2)
    for seed in range(3):
        batch, _ = made_up(trainer.args, trainer, seed=seed)
        batch.advantages = batch.advantages * advantages
        step(trainer, batch, beta=beta)
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in trainer.actor.parameters()])


@pytest.mark.parametrize("name", ["k2", "reward"])
def test_a_reference_without_a_kl_is_had_as_the_refusal_says(make_actor, planned, name):
    """`--algo.kl.init_coef 0` has no reference; with 1e-30, not with 1e-9, training is as without a KL."""
    flags = STOCK[name][0]
    without = parse(*FLAGS, *flags, "--algo.kl.init_coef", "0")
    args = planned(*flags, "--algo.kl.init_coef", "1e-30", kl_monitor=True)
    wanted, moved = rollout(without, without_reference=True)[0], after_adam(make_actor(without), 0.0)
    with Patching(load_patches("openrlhf")):
        assert torch.equal(after_adam(make_actor(args), 1e-30), moved)
        for kl_coef, unchanged in ((1e-30, True), (0.1, name != "reward")):
            found = rollout(args, kl_coef=kl_coef)[0]
            pairs = zip(found, wanted, strict=True)
            assert all(torch.equal(one.advantages, other.advantages) for one, other in pairs) is unchanged
            assert all(one.base_action_log_probs is not None for one in found)
        if name == "k2":  # where no reward says anything, Adam makes whole steps of any gradient
            small, tiny, none = (after_adam(make_actor(args), beta, advantages=False) for beta in (1e-9, 1e-30, 0.0))
            assert torch.equal(tiny, none)
            assert (small - none).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        ((), {"kl_monitor": True, "kl_off_policy": "none"}, "kl_off_policy='none', but no KL was named"),
        ((), {"kl_monitor": True, "kl_placement": "loss"}, "kl_placement='loss', but no KL was named"),
        ((), {"kl_monitor": True, "kl_leave_out": ["eos"]}, "kl_leave_out=.*but no KL was named"),
        ((), {"kl_monitor": True, "kl_weight_clip": (0.5, 2.0)}, "kl_weight_clip=.*but no KL was named"),
        (("--algo.kl.init_coef", "0"), {"kl_monitor": True}, "loads no reference then.*init_coef 1e-30"),
        ((), {"kl_off_policy": "none"}, "or --kl-monitor to watch OpenRLHF's own"),
    ],
)
def test_refused(planned, flags, options, message):
    with pytest.raises(ConfigError, match=message):
        planned(*flags, **options)


def test_nothing_is_set_for_openrlhfs_own(planned):
    flags = (*IN_LOSS, "k3", "--algo.kl.target", "6")
    args, own = planned(*flags, kl_monitor=True, kl_weight_clip=(0.0, 10.0)), parse(*FLAGS, *flags)
    args.__dict__.pop("kl_plugins")
    assert args == own


def test_a_step_that_looks_otherwise_is_refused(make_watched, hooked):
    args, trainer = make_watched(*STOCK["k2"][0])
    batch, _ = scored(args, trainer)
    args.algo.kl.use_loss = False  # as a version would look that computes it elsewhere
    loss_fn = trainer.actor_loss_fn
    with pytest.raises(PatchError, match="compute its KL 1 times in the loss, found 1 and 0"):
        step(trainer, batch)
    assert trainer.actor_loss_fn is loss_fn
    args.algo.kl.use_loss = True
    step(trainer, batch)  # twin
    assert trainer.actor_loss_fn is loss_fn
    assert gradients(trainer).abs().max() > 0


def test_an_experience_without_a_reference_is_refused(make_watched, hooked):
    args, trainer = make_watched(*STOCK["reward"][0])
    batch, _ = scored(args, trainer)
    batch.base_action_log_probs = None
    with pytest.raises(PatchError, match="came without the reference's log-probs"):
        step(trainer, batch)


STEP = "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step"
LOSS = "openrlhf.trainer.ray.ppo_actor:compute_approx_kl"
REWARD = "openrlhf.trainer.ppo_utils.experience_maker:compute_approx_kl"


@pytest.mark.parametrize(
    ("name", "called", "missing"),
    [
        ("k2", [STEP, STEP, LOSS, LOSS], 0),
        ("k2", [STEP, STEP, LOSS], 1),
        ("k2", [STEP, LOSS, LOSS], 1),
        ("reward", [STEP, STEP, REWARD], 0),
        ("reward", [STEP, STEP], 1),
        ("reward", [STEP, REWARD], 1),
    ],
)
def test_every_actor_must_have_been_watched(planned, name, called, missing):
    plan = planned(*STOCK[name][0], kl_monitor=True).kl_plugins
    reports = [{"bindings": [{"target": target, "bound": True, "calls": 1}]} for target in called]
    problems = worker.missing_proof(reports, plan, actors=2)
    assert len(problems) == missing
    assert all("isn't watched" in problem for problem in problems)
