"""A controller of ours in the place of OpenRLHF's: what it is asked, what it is told, and checkpoints."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_openrlhf import FLAGS, made_up, parse, step

from kl_plugins import ConfigError
from kl_plugins.core.controllers import ControllerSpec
from kl_plugins.core.metrics import SUMS
from kl_plugins.openrlhf import actor, experience
from kl_plugins.openrlhf.plan import OpenRLHFOptions, plan_run

PI = {"kl": "k2_as_loss", "kl_controller": "pi", "kl_target": 0.5}


def sums(k1, tokens, sequences):
    made = torch.zeros(len(SUMS))
    for name, value in (("k1", k1), ("tokens", tokens), ("sequences", sequences)):
        made[SUMS.index(name)] = value
    return made


@pytest.fixture
def controlling(planned, monkeypatch):
    """`controlling(sums, ..., **options)`: a trainer whose steps end with these sums, and what it saw of beta."""
    monkeypatch.setattr(experience.worker, "report", lambda: None)

    def make(*batches, **options):
        args = planned("--algo.kl.init_coef", "0.1", **options)
        own = SimpleNamespace(value=0.1)
        maker = SimpleNamespace(kl_ctl=own)
        batches = iter(batches)

        def host(trainer, samples, global_step):
            assert trainer.kl_ctl is trainer.experience_maker.kl_ctl
            trainer.seen.append(trainer.kl_ctl.value)
            found = next(batches)
            return {"kl": 3.0} | ({} if found is None else {actor.KL_SUMS: found}), global_step + 1

        trainer = SimpleNamespace(args=args, kl_ctl=own, experience_maker=maker, seen=[])
        trainer.step = lambda: experience.train_step(host)(trainer, [], 0)[0]
        return trainer

    return make


@pytest.mark.parametrize("per", ["token", "sequence"])
def test_beta_follows_the_sums_of_the_batch(controlling, per):
    batches = [sums(2.0, 10, 2), None, sums(30.0, 12, 4)]  # the second step did not train the policy
    trainer = controlling(*batches, **PI, kl_target_per=per)
    plain = ControllerSpec(kl_controller="pi", kl_target=0.5, kl_target_per=per).start(0.1)
    wanted = [0.1, plain.update(kl_sum=2.0, tokens=10, sequences=2)]
    statuses = [trainer.step() for _ in batches]
    last = plain.update(kl_sum=30.0, tokens=12, sequences=4)
    assert trainer.seen == [*wanted, wanted[1]]
    assert [status.get("kl/beta") for status in statuses] == [wanted[1], None, last]
    assert all(actor.KL_SUMS not in status for status in statuses)  # it would be logged
    assert trainer.kl_ctl.value == last != wanted[1]


def test_without_one_openrlhfs_own_stays(controlling):
    trainer = controlling(sums(2.0, 10, 2), kl="k2_as_loss")
    own = trainer.kl_ctl
    assert "kl/beta" not in trainer.step()
    assert trainer.kl_ctl is own
    assert experience.init_checkpoint_states(lambda trainer: {"episode": 3})(trainer) == {"episode": 3}


def test_it_continues_from_a_checkpoint_bit_for_bit(controlling):
    batches = [sums(2.0 + i, 10, 2) for i in range(4)]
    whole, first, resumed = (
        controlling(*batches, **PI),
        controlling(*batches[:2], **PI),
        controlling(*batches[2:], **PI),
    )
    kept = {}

    def keep(trainer, global_step, logs_dict, client_states):
        kept.update(json.loads(json.dumps(client_states)))

    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
        states = {"episode": 1}
        experience.save_logs_and_checkpoints(keep)(first, 1, {}, states)
        assert states["kl_controller"] == first.kl_ctl.controller.state_dict()  # for the best checkpoint
    assert experience.init_checkpoint_states(lambda trainer: kept)(resumed) is kept
    assert resumed.kl_ctl.value == first.kl_ctl.value
    for _ in range(2):
        resumed.step()
    assert first.seen + resumed.seen == whole.seen
    assert resumed.kl_ctl.controller.state_dict() == whole.kl_ctl.controller.state_dict()


def test_the_sums_are_those_of_the_actors_steps(make_actor, planned, hooked):
    args = planned("--algo.kl.init_coef", "0.1", **PI)
    trainer = make_actor(args)
    batch, logp = made_up(args, trainer)
    step(trainer, batch)
    found = trainer.kl_plugins_recorder.since_update()
    mask = batch.action_mask.bool()
    u = (logp - batch.base_action_log_probs)[mask].sum()
    total = dict(zip(SUMS, found.tolist(), strict=True))
    assert total["k1"] == pytest.approx(u.item(), rel=1e-4)
    assert (total["tokens"], total["sequences"]) == (mask.sum(), len(mask))


def test_two_controllers_are_refused():
    args = parse(*FLAGS, "--algo.kl.target", "6", "--algo.kl.init_coef", "0.1")
    with pytest.raises(ConfigError, match=r"--algo.kl.target with kl_controller='pi': keep one of the two"):
        plan_run(OpenRLHFOptions(**PI | {"kl": "k1_in_reward"}), args)
    with pytest.raises(ConfigError, match="needs kl_target"):
        plan_run(OpenRLHFOptions(kl="k2_as_loss", kl_controller="pi"), parse(*FLAGS))
