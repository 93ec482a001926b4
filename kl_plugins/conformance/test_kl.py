"""The checks that `pytest --pyargs kl_plugins.conformance` runs on the function that it is pointed at."""

from __future__ import annotations

from typing import Any

import pytest

from kl_plugins.conformance import judge
from kl_plugins.conformance.subject import from_function, load
from kl_plugins.errors import ConfigError


@pytest.fixture(scope="session")
def learned(pytestconfig: Any) -> judge.Learned:
    """All measurements of the function."""
    path = pytestconfig.getoption("--kl-function", None)
    if not path:
        pytest.exit("no KL function: pass --kl-function package.module:name", returncode=pytest.ExitCode.USAGE_ERROR)
    try:
        subject = from_function(
            load(path),
            kind=pytestconfig.getoption("--kl-kind"),
            grouped=pytestconfig.getoption("--kl-grouped"),
            name=path,
        )
        found = judge.learn(subject, pytestconfig.getoption("--kl-claims"))
    except ConfigError as error:
        pytest.exit(f"kl_plugins.conformance: {error}", returncode=pytest.ExitCode.USAGE_ERROR)
    pytestconfig.kl_plugins_learned = [path, *(f"  {line}" for line in found.lines())]
    return found


@pytest.fixture
def claims(pytestconfig: Any, learned: judge.Learned) -> str:
    """Whose gradient the function is said to have."""
    found: str = pytestconfig.getoption("--kl-claims")
    if found == "none":
        pytest.skip("nothing is claimed: see the summary for what was measured")
    return found


def _judge(problem: str) -> None:
    if problem:
        pytest.fail(problem, pytrace=False)


def test_expected_gradient_on_policy(learned: judge.Learned, claims: str) -> None:
    """The expected gradient is the claimed one."""
    _judge(judge.gradient_problem(learned, "on_policy", claims))


def test_expected_gradient_on_stale_samples(learned: judge.Learned, claims: str, pytestconfig: Any) -> None:
    """The expected gradient is the claimed one where an older policy drew the tokens."""
    if pytestconfig.getoption("--kl-on-policy-only"):
        pytest.skip("--kl-on-policy-only")
    _judge(judge.gradient_problem(learned, "stale", claims))


def test_expected_gradient_under_an_engine_mismatch(learned: judge.Learned, claims: str, pytestconfig: Any) -> None:
    """The expected gradient is the claimed one where the rollout engine's log-probs differ and are passed in."""
    if pytestconfig.getoption("--kl-on-policy-only"):
        pytest.skip("--kl-on-policy-only")
    if not learned.subject.knows_engine:
        pytest.skip("the function takes no engine_logp: see the summary for what it does")
    _judge(judge.gradient_problem(learned, "mismatch", claims))


def test_dead_zone(learned: judge.Learned, claims: str, pytestconfig: Any) -> None:
    """The gradient doesn't vanish where the policy is far from the reference."""
    _judge(judge.dead_problem(learned, claims, pytestconfig.getoption("--kl-reach")))


def test_float32(learned: judge.Learned, claims: str, pytestconfig: Any) -> None:
    """The gradient keeps its digits, and is a number, at large log-ratios."""
    _judge(judge.float32_problem(learned, pytestconfig.getoption("--kl-reach")))


def test_masks_and_lengths(learned: judge.Learned) -> None:
    """What stands at masked positions, and how much padding there is, changes nothing."""
    _judge(judge.masking_problem(learned))
