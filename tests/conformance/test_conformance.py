"""The conformance kit: right KL functions pass it, wrong ones are told what they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kl_plugins
from kl_plugins import ConfigError, KLSpec
from kl_plugins.conformance import from_function, from_spec, learn, load, problems
from kl_plugins.core.registry import LOSSES

UNBOUNDED = (0.0, float("inf"))
PRINCIPLED = [
    (name, credit, off_policy)
    for name, loss in LOSSES.items()
    for credit, gradient in loss.gradient_of.items()
    if gradient not in ("zero", "biased")
    for off_policy in (
        ("token", "prefix") if credit == "token" else ("sequence" if credit == "sequence" else "prefix",)
    )
]


@pytest.mark.parametrize(("name", "credit", "off_policy"), PRINCIPLED)
def test_our_configurations_conform(name, credit, off_policy):
    weightless = name.startswith("exact") and (credit, off_policy) == ("token", "token")
    unbounded = {} if weightless else {"weight_clip": UNBOUNDED}
    spec = KLSpec(name=name, credit=credit, off_policy=off_policy, **unbounded)
    learned = learn(from_spec(spec), spec.gradient_of)
    assert problems(learned, spec.gradient_of) == {}
    assert not learned.masking.remarks()


def test_ours_with_a_baseline_conforms():
    spec = KLSpec(name="k1_in_reward", off_policy="prefix", weight_clip=UNBOUNDED, baseline="leave_one_out")
    assert problems(learn(from_spec(spec)), "reverse_kl") == {}


def k1(logp, ref_logp):
    return logp - ref_logp


def k2(logp, ref_logp, mask, old_logp):
    return (logp - old_logp).exp().detach() * (logp - ref_logp).square() / 2


def k2_mean(logp, ref_logp, mask, old_logp):
    return torch.where(mask, k2(logp, ref_logp, mask, old_logp), 0.0).sum(-1).mean()


def k2_engine(logp, ref_logp, mask, old_logp, engine_logp=None):
    return k2(logp, ref_logp, mask, old_logp if engine_logp is None else engine_logp)


def k2_token_mean(logp, ref_logp, mask, old_logp):
    return torch.where(mask, k2(logp, ref_logp, mask, old_logp), 0.0).sum() / mask.sum()


def k2_ratio_live(logp, ref_logp, mask, old_logp):
    return (logp - old_logp).exp() * (logp - ref_logp).square() / 2


def k2_negative(logp, ref_logp, mask, old_logp):
    return -k2(logp, ref_logp, mask, old_logp)


def k2_half(logp, ref_logp, mask, old_logp):
    return k2(logp, ref_logp, mask, old_logp) / 2


def k2_unweighted(logp, ref_logp):
    return (logp - ref_logp).square() / 2


def k3(logp, ref_logp):
    return (ref_logp - logp).exp() + logp - ref_logp - 1


def k3_ratio(logp, ref_logp, mask, old_logp):
    return (logp - old_logp).exp() * k3(logp, ref_logp)


def k3_plus_clamped(logp, ref_logp):
    value = (logp - ref_logp).square() / 2
    return value.clamp(max=800.0)  # beyond the log-ratios of the enumerated policies


def k2_reads_padding(logp, ref_logp, mask, old_logp):
    center = (logp - ref_logp).detach().sum(-1, keepdim=True)
    return k2(logp, ref_logp, mask, old_logp) + 0 * logp + 1e-3 * center * logp


@pytest.mark.parametrize("function", [k2, k2_mean, k2_engine])
def test_a_right_function_of_another_framework_passes(function):
    learned = learn(from_function(function), "local_reverse_kl")
    assert problems(learned, "local_reverse_kl") == {}
    assert learned.range.shape == "u"
    assert learned.range.right == (-1000.0, 1000.0)


def test_k1_in_the_reward_is_the_sequence_kl_on_policy_only():
    learned = learn(from_function(k1, kind="reward"), "reverse_kl")
    assert problems(learned, "reverse_kl", off_policy=False) == {}
    (problem,) = problems(learned, "reverse_kl").values()
    assert "on-policy it is right, so what is missing are importance weights of whole prefixes" in problem


WRONG = [
    (k1, "local_reverse_kl", "on-policy gradient", "measured: the gradient of nothing: it is zero"),
    (k3, "reverse_kl", "on-policy gradient", "measured: the gradient of the next-token forward KLs"),
    (k2, "reverse_kl", "on-policy gradient", "measured: the gradient of the next-token reverse KLs"),
    (k2_ratio_live, "local_reverse_kl", "on-policy gradient", "the gradient of none of the divergences"),
    (k2_half, "local_reverse_kl", "on-policy gradient", "times 2 it would be right"),
    (k2_negative, "local_reverse_kl", "on-policy gradient", "times -1 it would be right (a reward, where a loss"),
    (k2_token_mean, "local_reverse_kl", "on-policy gradient", "the gradient of none of the divergences"),
    (k2_unweighted, "local_reverse_kl", "gradient on stale samples", "what is missing are importance weights"),
    (k3_plus_clamped, "local_reverse_kl", "dead zone", "exactly 0 below u = -40.01 and above u = 40.01"),
    (k3_ratio, "local_reverse_kl", "float32", "only for u in [-15.2"),
    (k2_reads_padding, "local_reverse_kl", "masks and lengths", "numbers at masked positions change the gradient"),
]


@pytest.mark.parametrize(("function", "claims", "check", "says"), WRONG, ids=lambda x: getattr(x, "__name__", None))
def test_twin_a_wrong_function_fails_and_is_told_why(function, claims, check, says):
    found = problems(learn(from_function(function), claims), claims)
    assert says in found[check]


def test_twin_a_mismatch_that_the_function_knows_of_and_ignores():
    def ignores(logp, ref_logp, mask, old_logp, engine_logp=None):
        return k2(logp, ref_logp, mask, old_logp)

    assert set(problems(learn(from_function(ignores)), "local_reverse_kl")) == {"gradient under an engine mismatch"}
    assert problems(learn(from_function(k2)), "local_reverse_kl") == {}  # can't know


def test_overflow_is_named():
    found = learn(from_function(k3), "local_forward_kl")
    assert found.range.nonfinite == (pytest.approx(-88.73), None)
    assert "NaN or inf from u = -88.73" in problems(found, "local_forward_kl", reach=100)["float32"]
    assert "NaN or inf from u = -88.73 down" in "\n".join(found.lines())


def test_whatever_stands_at_masked_positions_is_remarked_on():
    found = learn(from_function(k2_unweighted))
    assert found.masking.problems() == []
    assert found.masking.remarks()[0] == "a NaN at a masked position reaches the gradient"


@pytest.mark.parametrize(
    ("path", "says"),
    [("torch", "write package.module:function"), ("torch:nothing", "can't be loaded"), ("torch:e.real", "not a fun")],
)
def test_paths_that_name_no_function(path, says):
    with pytest.raises(ConfigError, match=says):
        load(path)


def test_other_signatures_and_shapes_are_refused():
    with pytest.raises(ConfigError, match="takes 1 tensors"):
        from_function(lambda logp: logp)
    with pytest.raises(ConfigError, match="kind='value'"):
        from_function(k1, kind="value")
    with pytest.raises(ConfigError, match=r"returned a tensor of shape"):
        learn(from_function(lambda logp, ref_logp: (logp - ref_logp).sum(-1)))
    for kind in ("reward", "coefficient"):  # which would be spread over the tokens
        with pytest.raises(ConfigError, match=r"returned a tensor of shape \(31, 1\)"):
            learn(from_function(lambda logp, ref_logp: (logp - ref_logp).sum(-1, keepdim=True), kind=kind))
    with pytest.raises(ConfigError, match="returned a NoneType"):
        learn(from_function(lambda logp, ref_logp: None))
    with pytest.raises(ConfigError, match="needs beta"):
        from_function(lambda logp, ref_logp, *, beta: beta * (logp - ref_logp))
    with pytest.raises(ConfigError, match="claims='kl'"):
        problems(learn(from_function(k2)), "kl")


MODULE = """
import torch

def right(logp, ref_logp, mask, old_logp):
    return (logp - old_logp).exp().detach() * (logp - ref_logp) ** 2 / 2

def wrong(logp, ref_logp):
    return logp - ref_logp

def broken(logp, ref_logp):
    return logp @ ref_logp
"""


def pyargs(folder, *arguments):
    """As a user of another framework starts it, in a folder of theirs."""
    (folder / "mykl.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    # The plugin by name, for checkouts that were installed before it had an entry point.
    command += ["-p", "kl_plugins.pytest_plugin", "--pyargs", "kl_plugins.conformance", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{Path(kl_plugins.__file__).parents[1]}"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--kl-function", "mykl:right", "--kl-claims", "local_reverse_kl"), 0, "5 passed, 1 skipped"),
        (("--kl-function", "mykl:wrong", "--kl-claims", "local_reverse_kl"), 1, "it is zero"),
        (("--kl-function", "mykl:wrong"), 0, "coefficient of a token: 1"),
        (
            ("--kl-function", "mykl:wrong", "--kl-kind", "reward"),
            0,
            "the gradient of the reverse KL of whole",
        ),
        (("--kl-function", "mykl:none"), 4, "'mykl:none' can't be loaded"),
        (("--kl-function", "mykl:broken"), 4, "raised RuntimeError: "),
        ((), 4, "no KL function: pass --kl-function"),
    ],
    ids=["right", "wrong", "learn", "reward", "missing", "broken", "nothing"],
)
def test_pytest_pyargs(tmp_path, arguments, code, says):
    done = pyargs(tmp_path, *arguments)
    assert done.returncode == code, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_the_options_cost_nothing_in_other_runs():
    code = "import sys, kl_plugins.pytest_plugin; print([m for m in ('torch', 'pytest') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
