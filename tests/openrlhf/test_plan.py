"""Which options and OpenRLHF flags go together, on arguments from OpenRLHF's own parser; how the hook is reached."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
from tiny_openrlhf import FLAGS, import_openrlhf, parse
from typer.testing import CliRunner

from kl_plugins import ConfigError, PatchError, UnknownLossError, cli
from kl_plugins.openrlhf import driver, experience, worker
from kl_plugins.openrlhf.plan import OpenRLHFOptions, check_options, plan_of, plan_run
from kl_plugins.patching import ALLOW_UNTESTED

GRPO = ("--algo.advantage.estimator", "group_norm")
RLOO = ("--algo.advantage.estimator", "rloo")
REINFORCE = ("--algo.advantage.estimator", "reinforce")


@pytest.mark.parametrize(
    ("flags", "options", "in_loss", "spec"),
    [
        (GRPO, {"kl": "k2_as_loss"}, True, {"credit": "token", "baseline": None, "gradient_of": "local_reverse_kl"}),
        (GRPO, {"kl": "k1_in_reward"}, False, {"credit": "sequence", "baseline": "group_mean", "clip": "combined"}),
        (RLOO, {"kl": "k1_in_reward"}, False, {"credit": "sequence", "baseline": "leave_one_out"}),
        (GRPO, {"kl": "k1_in_reward", "kl_placement": "loss"}, True, {"baseline": "group_mean", "clip": None}),
        (GRPO, {"kl": "k1_in_reward", "kl_baseline": "none"}, False, {"credit": "sequence", "baseline": None}),
        (GRPO, {"kl": "k1_in_reward", "kl_credit": "to_go"}, False, {"credit": "to_go", "baseline": "group_mean"}),
        (RLOO, {"kl": "k2_in_reward", "kl_allow_biased": True}, False, {"baseline": "leave_one_out"}),
        (REINFORCE, {"kl": "k1_in_reward"}, False, {"credit": "to_go", "baseline": None}),
        (REINFORCE, {"kl": "k1_in_reward", "kl_credit": "sequence"}, False, {"credit": "sequence", "baseline": None}),
        ((), {"kl": "k1_in_reward"}, False, {"credit": "to_go", "baseline": None, "gamma": 1.0}),  # gae
        (GRPO, {"kl": "k3_as_loss"}, True, {"coefficient_bound": 1e6}),
        (REINFORCE, {"kl": "k2_in_reward", "kl_allow_biased": True}, False, {"gradient_of": "biased"}),
        (
            (*GRPO, "--algo.advantage.gamma", "0.9"),  # which OpenRLHF itself sets to 1 for this estimator
            {"kl": "k1_in_reward"},
            False,
            {"gamma": 1.0},
        ),
    ],
)
def test_what_a_plan_sets(planned, flags, options, in_loss, spec):
    args = planned(*flags, **options)
    assert args.algo.kl.use_loss is in_loss
    assert args.algo.kl.estimator == f"kl_plugins:{args.kl_plugins.spec.name}"
    assert plan_of(args) is args.kl_plugins
    assert {name: getattr(args.kl_plugins.spec, name) for name in spec} == spec


@pytest.mark.parametrize(
    ("flags", "options", "picked", "because"),
    [
        (RLOO, {}, "kl_credit='sequence', kl_baseline='leave_one_out'", "less the mean of its group's others"),
        (GRPO, {}, "kl_credit='sequence', kl_baseline='group_mean'", "nats against rewards of deviation 1"),
        (
            ("--algo.advantage.estimator", "dr_grpo"),
            {},
            "kl_credit='sequence', kl_baseline='group_mean'",
            "cancels the reward's own noise",
        ),
        ((), {}, "kl_credit='to_go', kl_baseline=None", "what its critic expects"),
        (REINFORCE, {}, "kl_credit='to_go', kl_baseline=None", "sums rewards from each token on"),
        (RLOO, {"kl_credit": "to_go"}, "kl_baseline='leave_one_out'", "It left kl_credit='to_go' as set"),
        (RLOO, {"kl_placement": "loss"}, "kl_credit='sequence'", "less the mean of its group's others"),
    ],
)
def test_what_reverse_kl_picks_can_be_written_by_hand_and_is_said(planned, flags, options, picked, because):
    plan = planned(*flags, kl="reverse_kl", **options).kl_plugins
    by_hand = planned(*flags, kl="k1_in_reward", **options).kl_plugins
    assert plan == replace(by_hand, picked=plan.picked)
    assert plan.picked.startswith("kl='reverse_kl' picked kl='k1_in_reward', ")
    assert picked in plan.picked
    assert because in plan.picked
    assert plan.picked in driver.describe(plan)
    assert by_hand.picked == ""
    assert "picked" not in driver.describe(by_hand)


def test_the_discount_is_the_hosts(planned):
    lambd = ("--algo.advantage.lambd", "0.9")
    assert planned(*lambd, kl="k1_in_reward").kl_plugins.discount == 0.9
    assert planned(*GRPO, *lambd, kl="k1_in_reward").kl_plugins.discount == 1
    gamma = (*REINFORCE, "--algo.advantage.gamma", "0.5")
    assert planned(*gamma, kl="k1_in_reward", kl_allow_biased=True).kl_plugins.discount == 0.5


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (
            GRPO,
            {"kl": "exact_in_reward"},
            "^exact_in_reward needs the full .*OpenRLHF's actor only gives.*use reverse_kl",
        ),
        (GRPO, {"kl": "exact_as_loss"}, "^exact_as_loss needs the full next-token distributions.*use reverse_kl"),
        ((), {}, "no KL was named"),
        ((), {"kl": "k1_as_loss"}, "expected gradient is zero"),
        (REINFORCE, {"kl": "k3_in_reward"}, "expected gradient is biased"),
        (GRPO, {"kl": "k2_as_loss", "kl_placement": "reward"}, "is a term of the loss"),
        (GRPO, {"kl": "k2_as_loss", "kl_placement": "advantage"}, "choose from auto, loss, reward"),
        (GRPO, {"kl": "k2_as_loss", "kl_clip": "combined"}, "use kl_placement='reward'"),
        (REINFORCE, {"kl": "k1_in_reward", "kl_off_policy": "prefix"}, "not used in the reward"),
        (REINFORCE, {"kl": "k1_in_reward", "kl_gamma": 0.5}, "not used in the reward"),
        (RLOO, {"kl": "k1_in_reward", "kl_credit": "token"}, "credit 'to_go' or 'sequence'"),
        ((), {"kl": "k1_in_reward", "kl_credit": "sequence"}, r"gae and gamma 1: .*leave kl_credit out \(with gae\)"),
        (
            (*REINFORCE, "--algo.advantage.gamma", "0.9"),
            {"kl": "k1_in_reward", "kl_credit": "sequence"},
            "reinforce and gamma 0.9: .*use --algo.advantage.gamma 1",
        ),
        ((*REINFORCE, "--algo.advantage.gamma", "0.9"), {"kl": "k1_in_reward"}, "; use --algo.advantage.gamma 1 "),
        (("--algo.advantage.gamma", "0.9"), {"kl": "k1_in_reward"}, "; use --algo.advantage.gamma 1 "),
        ((), {"kl": "k1_in_reward", "kl_baseline": "leave_one_out"}, "whose critic is the baseline"),
        ((), {"kl": "k1_in_reward", "kl_baseline": "group_mean"}, "'group_mean' with gae, whose critic"),
        (
            (*REINFORCE, "--rollout.n_samples_per_prompt", "1"),
            {"kl": "k2_as_loss", "kl_baseline": "leave_one_out"},
            "n_samples_per_prompt of 2 or more",
        ),
        ((*GRPO, "--algo.kl.init_coef", "0"), {"kl": "k2_as_loss"}, "it is beta"),
        ((*GRPO, "--algo.kl.estimator", "k3"), {"kl": "k2_as_loss"}, "--algo.kl.estimator k3"),
        ((*REINFORCE, "--algo.kl.use_loss"), {"kl": "k1_in_reward"}, "--algo.kl.use_loss"),
        ((*GRPO, "--algo.kl.target", "6"), {"kl": "k2_as_loss"}, "--algo.kl.target"),
        ((*GRPO, "--rollout.top_p", "0.9"), {"kl": "k2_as_loss"}, "--rollout.top_p 0.9"),
        ((*GRPO, "--train.async_enable"), {"kl": "k2_as_loss"}, "is_correction_level token"),
        ((*GRPO, "--actor.policy_loss_type", "gspo"), {"kl": "k1_in_reward"}, "gspo"),
        ((*REINFORCE, "--actor.loss_agg_mode", "seq-mean-token-mean"), {"kl": "k1_in_reward"}, "by its length"),
        ((*GRPO, "--algo.kl.use_loss", "--algo.kl.unbiased_gradient"), {"kl": "k3_as_loss"}, "unbiased_gradient"),
    ],
)
def test_what_is_refused(flags, options, message):
    args = parse(*FLAGS, *flags)
    with pytest.raises(ConfigError, match=message):
        plan_run(OpenRLHFOptions(**options), args)
    assert not hasattr(args, "kl_plugins")


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((*GRPO, "--algo.kl.use_loss"), {"kl": "k2_as_loss"}),
        (
            (*GRPO, "--algo.kl.use_loss", "--algo.kl.estimator", "k2", "--algo.kl.unbiased_gradient"),
            {"kl": "k2_as_loss"},
        ),
        ((*GRPO, "--algo.kl.use_loss", "--algo.kl.estimator", "k3"), {"kl": "k3_as_loss"}),
        ((*REINFORCE, "--algo.kl.target", "6"), {"kl": "k1_in_reward"}),
        ((*GRPO, "--rollout.top_p", "0.9"), {"kl": "k2_as_loss", "kl_allow_biased": True}),
        ((*GRPO, "--train.async_enable", "--algo.advantage.is_correction_level", "token"), {"kl": "k2_as_loss"}),
        ((*GRPO, "--actor.policy_loss_type", "gspo"), {"kl": "k1_in_reward", "kl_placement": "loss"}),
    ],
)
def test_what_is_not(planned, flags, options):
    planned(*flags, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "no KL was named"),
        ({"kl_monitor": True, "kl_clip": "separate"}, "but no KL was named"),
        ({"kl": "k1_as_loss"}, "expected gradient is zero"),
        ({"kl": "exact_in_reward"}, "full next-token distributions"),
        ({"kl": "k2_as_loss", "kl_placement": "reward"}, "is a term of the loss"),
        ({"kl": "k2_as_loss", "kl_placement": "advantage"}, "choose from auto, loss, reward"),
        ({"kl": "k1_in_reward", "kl_leave_out": ["eos"]}, "use kl_placement='loss'"),
        (
            {"kl": "k2_in_reward", "kl_placement": "loss", "kl_leave_out": ["eos"], "kl_allow_biased": True},
            "known for k1 only",
        ),
    ],
)
def test_options_that_no_flag_can_mend_are_refused_without_any(options, message):
    with pytest.raises(ConfigError, match=message):
        check_options(OpenRLHFOptions(**options))
    with pytest.raises(UnknownLossError, match="k2_as_loss"):
        check_options(OpenRLHFOptions(kl="k2_as_los"))


@pytest.mark.parametrize(
    "options",
    [
        {"kl_monitor": True},
        {"kl": "k2_as_loss"},
        {"kl": "k1_in_reward"},
        {"kl": "k1_as_loss", "kl_allow_biased": True},
        {"kl": "k1_in_reward", "kl_baseline": "group_mean"},  # where there are groups
        {"kl": "k1_in_reward", "kl_credit": "sequence"},  # and returns that aren't discounted
    ],
)
def test_options_that_may_be_right_are_left_to_the_flags(options):
    check_options(OpenRLHFOptions(**options))


def test_all_problems_at_once_and_an_unknown_name():
    args = parse(*FLAGS, *GRPO, "--rollout.top_p", "0.9", "--algo.kl.estimator", "k3")
    with pytest.raises(ConfigError) as refused:
        plan_run(OpenRLHFOptions(kl="k1_as_loss"), args)
    assert len(refused.value.args) == 3
    with pytest.raises(UnknownLossError, match="k2_as_loss"):
        plan_run(OpenRLHFOptions(kl="k2_as_los"), args)


def test_a_filter_is_warned_about(planned):
    with pytest.warns(UserWarning, match="the prompts that remain"):
        planned(*GRPO, "--algo.dynamic_filtering_enable", kl="k2_as_loss")


def test_nodes_with_another_version_are_refused(planned, monkeypatch):
    args = planned(*GRPO, kl="k2_as_loss")
    monkeypatch.setattr("kl_plugins.openrlhf.plan.__version__", "0.0.1")
    with pytest.raises(PatchError, match="the same version on every node"):
        plan_of(args)


@pytest.fixture
def hook(monkeypatch):
    """The hook in a driver that starts from nothing."""
    names = (driver.RAY_HOOK, driver.OPTIONS, driver.CHAINED_HOOK, worker.IN_WORKER, ALLOW_UNTESTED)
    for name in (*names, "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
        monkeypatch.setenv(name, "")  # so that what a test leaves is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(driver, "_plan", None)
    monkeypatch.setattr(driver, "_options", None)
    return driver.runtime_env_hook


class TestByEnvironment:
    """`RAY_RUNTIME_ENV_HOOK`, as Ray calls it within OpenRLHF's own `ray.init`."""

    def test_the_plan_is_made_and_the_workers_are_told(self, hook, monkeypatch, capsys):
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss --kl-weight-clip 0 5 --kl-off-policy token")
        envs = []
        args = parse(*FLAGS, *GRPO, at_ray_init=lambda options: envs.append(hook(options["runtime_env"])))
        assert args.kl_plugins.spec.weight_clip == (0.0, 5.0)
        assert args.algo.kl.use_loss
        assert envs[0]["worker_process_setup_hook"] == worker.SETUP_HOOK
        assert envs[0]["env_vars"]["NCCL_DEBUG"] == "WARN"  # OpenRLHF's own
        assert "k2_as_loss in the loss" in capsys.readouterr().out

    def test_openrlhfs_own_kl_is_watched_and_nothing_set(self, hook, monkeypatch, capsys):
        monkeypatch.setenv(driver.OPTIONS, "--kl-monitor")
        args = parse(*FLAGS, *GRPO, at_ray_init=lambda options: hook(options["runtime_env"]))
        assert (args.kl_plugins.in_reward, args.kl_plugins.monitor) == (True, True)
        assert (args.algo.kl.use_loss, args.algo.kl.estimator) == (False, "k1")
        said = capsys.readouterr().out
        assert "OpenRLHF's own KL stays as it is" in said
        assert "watched: the KL in the reward" in said
        assert "no kl/dead" in said

    def test_what_was_waived_is_said(self, hook, monkeypatch, capsys):
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss --kl-allow-biased")
        flags = ("--rollout.top_p", "0.9", "--train.async_enable")
        parse(*FLAGS, *GRPO, *flags, at_ray_init=lambda options: hook(options["runtime_env"]))
        said = capsys.readouterr().out
        assert "BIASED (allowed by kl_allow_biased): --rollout.top_p 0.9" in said
        assert "BIASED (allowed by kl_allow_biased): --train.async_enable" in said

    def test_a_second_run_in_one_process_gets_its_own_plan(self, hook, monkeypatch):
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
        runs = [parse(*FLAGS, *GRPO, at_ray_init=lambda options: hook(options["runtime_env"])) for _ in range(2)]
        assert runs[0].kl_plugins is not runs[1].kl_plugins

    def test_a_training_that_a_hooked_job_starts_is_hooked_too(self, hook, monkeypatch):
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
        monkeypatch.setenv(worker.IN_WORKER, "1")
        assert parse(*FLAGS, *GRPO, at_ray_init=lambda options: hook(options["runtime_env"])).kl_plugins

    def test_the_users_own_hooks_are_chained(self, hook, monkeypatch):
        theirs = SimpleNamespace(hook=lambda env: env | {"worker_process_setup_hook": "their.setup", "pip": ["x"]})
        monkeypatch.setitem(sys.modules, "their_hooks", theirs)
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
        monkeypatch.setenv(driver.CHAINED_HOOK, "their_hooks.hook")
        envs = []
        parse(*FLAGS, *GRPO, at_ray_init=lambda options: envs.append(hook(options["runtime_env"])))
        assert envs[0]["pip"] == ["x"]
        assert envs[0]["worker_process_setup_hook"] == worker.SETUP_HOOK
        assert envs[0]["env_vars"][worker.CHAINED_SETUP_HOOK] == "their.setup"

    def test_a_worker_runs_the_chained_setup_too(self, monkeypatch):
        called = []
        monkeypatch.setitem(sys.modules, "their_hooks", SimpleNamespace(setup=lambda: called.append(1)))
        monkeypatch.setenv(worker.CHAINED_SETUP_HOOK, "their_hooks.setup")
        monkeypatch.setattr(worker, "_patching", mock.Mock())
        worker.setup()
        assert called == [1]

    def test_a_setup_function_that_cannot_be_named_is_refused(self, hook, monkeypatch):
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
        with pytest.raises(ConfigError, match="which can't be chained"):
            parse(*FLAGS, *GRPO, at_ray_init=lambda _: hook({"worker_process_setup_hook": print}))

    def test_what_a_worker_starts_is_left_alone(self, hook, monkeypatch):
        monkeypatch.setenv(worker.IN_WORKER, "1")
        assert hook({"env_vars": {"A": "1"}}) == {"env_vars": {"A": "1"}}
        assert hook(None) == {}

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            ("", "no KL was chosen"),
            ("--kl k2_as_loss --kl-of-policy token", "No such option"),
            ("--kl k2_as_loss --kl-weight-clip 1", "weight-clip"),
            ("--kl k2_as_loss -- --algo.kl.init_coef 1", "only options of the KL"),
            ("--kl k1_as_loss", "expected gradient is zero"),
        ],
    )
    def test_wrong_words_are_refused_before_ray_starts(self, hook, monkeypatch, words, message):
        monkeypatch.setenv(driver.OPTIONS, words)
        with pytest.raises(ConfigError, match=message):
            parse(*FLAGS, *GRPO, at_ray_init=lambda options: hook(options["runtime_env"]))

    def test_a_script_of_ones_own_must_prepare_its_arguments(self, hook, monkeypatch):
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
        with pytest.raises(PatchError, match="prepare"):
            hook(None)
        args = parse(*FLAGS, *GRPO)
        for name in (driver.CHAINED_HOOK, "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
            monkeypatch.setenv(name, "")  # taken back afterwards
        theirs = SimpleNamespace(hook=lambda env: {"pip": ["x"]})
        monkeypatch.setitem(sys.modules, "their_hooks", theirs)
        monkeypatch.setenv(driver.RAY_HOOK, "their_hooks.hook")
        driver.prepare(OpenRLHFOptions(kl="k2_as_loss"), args)
        assert hook(None)["worker_process_setup_hook"] == worker.SETUP_HOOK
        assert hook(None)["pip"] == ["x"]
        assert os.environ[driver.RAY_HOOK] == driver.HOOK

    def test_a_script_of_ones_own_learns_all_that_is_wrong_at_once(self, hook):
        args = parse(*FLAGS, *GRPO, "--algo.kl.init_coef", "0", "--rollout.top_p", "0.9")
        with pytest.raises(ConfigError) as refused:
            driver.prepare(OpenRLHFOptions(kl="k1_as_loss"), args)
        assert len(refused.value.args) == 3

    def test_another_version_of_the_host_is_refused_before_ray_starts(self, hook, monkeypatch):
        import_openrlhf()
        monkeypatch.setenv(driver.OPTIONS, "--kl k2_as_loss")
        monkeypatch.setattr("openrlhf.trainer.ray.ppo_actor.compute_approx_kl", lambda log_probs: log_probs)
        with pytest.raises(PatchError, match="ppo_actor:compute_approx_kl"):
            parse(*FLAGS, *GRPO, at_ray_init=lambda options: hook(options["runtime_env"]))


class TestLauncher:
    """`kl-plugins openrlhf`, up to the moment when Ray would start."""

    @pytest.fixture
    def launch(self, hook, monkeypatch):
        import_openrlhf()
        for name in (driver.RAY_HOOK, driver.CHAINED_HOOK, "RAY_ENABLE_UV_RUN_RUNTIME_ENV"):
            monkeypatch.setenv(name, "")  # so that what the launcher sets is taken back
        monkeypatch.setattr(sys, "argv", [])
        started = []

        def ray_init(runtime_env):
            path = os.environ[driver.RAY_HOOK]
            started.append(worker.resolve(path)(runtime_env) if call_hook else runtime_env)
            raise KeyboardInterrupt

        call_hook = True
        monkeypatch.setattr("ray.init", ray_init)

        def run(*words):
            result = CliRunner().invoke(cli.app, ["openrlhf", *words])
            return result, started

        return run

    def test_it_starts_openrlhf_hooked(self, launch):
        flags = ("--actor.model_name_or_path", "m", *FLAGS, *GRPO)
        _, started = launch("--kl", "k2_as_loss", "--", *flags)
        assert started[0]["worker_process_setup_hook"] == worker.SETUP_HOOK

    def test_dry_run_stops_before_ray_starts(self, launch):
        result, started = launch("--kl", "reverse_kl", "--dry-run", "--", *FLAGS, *GRPO)
        assert (result.exit_code, started) == (0, [])
        assert "kl='reverse_kl' picked kl='k1_in_reward', kl_credit='sequence'" in result.output
        assert "expected gradient: reverse_kl" in result.output
        assert "watched" not in result.output

    @pytest.mark.parametrize("kl", [("--kl", "k2_as_loss"), ()], ids=["ours", "stock"])
    def test_the_monitor_is_said_to_be_there(self, launch, kl):
        result, _ = launch(*kl, "--kl-monitor", "--dry-run", "--", *FLAGS, *GRPO, "--algo.kl.use_loss")
        assert result.exit_code == 0
        assert "watched: the KL in the loss" in result.output
        assert ("expected gradient: local_reverse_kl" in result.output) is bool(kl)
        assert ("OpenRLHF's own KL stays as it is" in result.output) is not bool(kl)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (("--kl", "k1_as_loss", "--", *FLAGS, *GRPO), "expected gradient is zero"),
            (("--kl", "k2_as_los", "--", *FLAGS, *GRPO), "k2_as_loss"),
            (("--kl-monitor", "--kl-clip", "separate", "--", *FLAGS, *GRPO), "but no KL was named"),
            (("--kl-monitor", "--", *FLAGS, *GRPO, "--algo.kl.init_coef", "0"), "--algo.kl.init_coef 1e-30"),
            (("--kl", "k2_as_loss", "--", *FLAGS, *GRPO, "--algo.kl.estimator", "k3"), "leave it out"),
            (("--kl", "k2_as_loss", *FLAGS), "-- OPENRLHF_FLAGS"),
            (("--kl", "k2_as_loss", "--kl-off-polcy", "token", "--"), "No such option"),
        ],
    )
    def test_errors_are_one_message_and_exit_code_2(self, launch, words, message):
        result, started = launch(*words)
        assert result.exit_code == 2
        assert message in result.output
        assert not started

    def test_a_ray_that_runs_already_is_refused(self, launch, monkeypatch):
        monkeypatch.setattr("ray.is_initialized", lambda: True)
        result, started = launch("--kl", "k2_as_loss", "--", *FLAGS, *GRPO)
        assert (result.exit_code, started) == (2, [])
        assert "running in this process already" in result.output

    def test_options_in_both_places_are_refused(self, launch, monkeypatch):
        monkeypatch.setenv(driver.OPTIONS, "--kl k3_as_loss")
        result, started = launch("--kl", "k2_as_loss", "--", *FLAGS, *GRPO)
        assert (result.exit_code, started) == (2, [])
        assert "keep one of the two" in result.output

    def test_a_ray_that_never_calls_the_hook_is_refused(self, launch, monkeypatch):
        monkeypatch.setattr("ray.init", lambda **_: None)  # as for ray:// addresses
        result, _ = launch("--kl", "k2_as_loss", "--", *FLAGS, *GRPO)
        assert result.exit_code == 2
        assert "no process would be hooked" in result.output.replace("\n", " ")


class TestProof:
    """What the processes report after the first step."""

    def reports(self, *targets, bound=True):
        return [
            {
                "process": "openrlhf.trainer.ray.ppo_actor.PolicyModelActor",
                "node": "10.0.0.1",
                "pid": pid,
                "bindings": [
                    {
                        "target": target,
                        "role": "loss",
                        "host": "openrlhf",
                        "version": "0.11.2",
                        "digest": "ab" * 32,
                        "calls": calls,
                        "bound": bound,
                        "pid": pid,
                    }
                ],
            }
            for pid, (target, calls) in enumerate(targets)
        ]

    STEP = "openrlhf.trainer.ray.ppo_actor:ActorPPOTrainer.training_step"
    LOSS = "openrlhf.trainer.ray.ppo_actor:compute_approx_kl"
    REWARD = "openrlhf.trainer.ppo_utils.experience_maker:compute_approx_kl"
    SAMPLE = "openrlhf.trainer.ppo_utils.samples_generator:SamplesGenerator._dispatch_prompts_to_vllm"

    @pytest.mark.parametrize(
        ("kl", "targets", "missing"),
        [
            ("k2_as_loss", [(STEP, 1), (STEP, 1), (LOSS, 1), (LOSS, 1), (SAMPLE, 1)], 0),
            ("k2_as_loss", [(STEP, 1), (STEP, 1), (LOSS, 1), (LOSS, 0), (SAMPLE, 1)], 1),
            ("k2_as_loss", [(STEP, 1), (LOSS, 1), (SAMPLE, 1)], 2),
            ("k2_as_loss", [(STEP, 1), (STEP, 1), (LOSS, 1), (LOSS, 1)], 1),
            ("k1_in_reward", [(STEP, 1), (STEP, 1), (REWARD, 1), (SAMPLE, 1)], 0),
            ("k1_in_reward", [(STEP, 1), (STEP, 1), (SAMPLE, 1)], 1),
            ("k2_as_loss", [], 3),
        ],
    )
    def test_every_process_that_should_have_must_have_called_ours(self, planned, kl, targets, missing):
        plan = planned(*REINFORCE, kl=kl).kl_plugins
        assert len(worker.missing_proof(self.reports(*targets), plan, actors=2)) == missing

    def test_what_is_no_longer_bound_does_not_count(self, planned):
        plan = planned(*GRPO, kl="k2_as_loss").kl_plugins
        targets = ((self.STEP, 1), (self.LOSS, 1), (self.SAMPLE, 1))
        assert not worker.missing_proof(self.reports(*targets), plan, actors=1)
        assert len(worker.missing_proof(self.reports(*targets, bound=False), plan, actors=1)) == 3

    @pytest.mark.parametrize(("status", "asked"), [({"policy_loss": 1.0}, 1), ({}, 0), ({"critic_loss": 1.0}, 0)])
    def test_it_is_asked_for_once_and_only_after_the_policy_was_trained(self, planned, monkeypatch, status, asked):
        proofs = []
        monkeypatch.setattr(worker, "require_proof", lambda plan, actors: proofs.append(actors))
        trainer = SimpleNamespace(
            args=planned(*GRPO, kl="k2_as_loss"), actor_model_group=SimpleNamespace(_actor_handlers=[1, 2, 3])
        )
        step = experience.train_step(lambda trainer, samples, global_step: (status, global_step + 1))
        assert step(trainer, [], 0) == step(trainer, [], 0) == (status, 1)
        assert proofs == [3] * asked

    def test_the_table_names_process_target_host_digest_and_calls(self):
        table = worker.proof_table(self.reports((self.STEP, 7)))
        for cell in ("PolicyModelActor", "ActorPPOTrainer.training_step", "openrlhf 0.11.2", "ababab", "7"):
            assert cell in table

    def test_an_incomplete_proof_stops_the_run(self, planned, monkeypatch):
        monkeypatch.setattr(worker, "reports", lambda: self.reports((self.STEP, 1)))
        with pytest.raises(PatchError, match="should have been called"):
            worker.require_proof(planned(*GRPO, kl="k2_as_loss").kl_plugins, actors=1)


def test_vllm_is_not_asked_for_a_first_token_that_cannot_end_the_completion(planned, hooked):
    import_openrlhf()
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator

    asked = []
    engine = SimpleNamespace(
        get_num_unfinished_requests=SimpleNamespace(remote=lambda: 0),
        generate_responses=SimpleNamespace(remote=lambda **request: asked.append(request["sampling_params"])),
    )
    generator = SamplesGenerator.__new__(SamplesGenerator)
    generator.args, generator.vllm_engines, generator.tokenizer = planned(*GRPO, kl="k2_as_loss"), [engine], None
    with mock.patch("openrlhf.trainer.ppo_utils.samples_generator.ray.get", lambda refs: refs):
        generator._dispatch_prompts_to_vllm(["a"], ["b"], temperature=1.0, max_new_tokens=8)
        assert asked.pop().min_tokens == 0
        hooked.undo()
        generator._dispatch_prompts_to_vllm(["a"], ["b"], temperature=1.0, max_new_tokens=8)
        assert asked.pop().min_tokens == 1
        hooked.apply()
