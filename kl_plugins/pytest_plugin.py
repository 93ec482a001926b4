"""The options of `pytest --pyargs kl_plugins.conformance`. Loaded in every pytest run: nothing else is imported."""

from __future__ import annotations

from typing import Any


def pytest_addoption(parser: Any) -> None:
    """Options of the conformance kit."""
    group = parser.getgroup("kl_plugins", "the KL term that kl_plugins.conformance judges")
    group.addoption("--kl-function", metavar="MODULE:NAME", help="(logp, ref_logp, mask, old_logp) -> loss")
    group.addoption(
        "--kl-claims",
        default="none",
        choices=["none", "reverse_kl", "local_reverse_kl", "forward_kl", "local_forward_kl", "zero"],
        help="whose gradient it should have; none: only say whose it has",
    )
    group.addoption(
        "--kl-kind",
        default="loss",
        choices=["loss", "reward", "coefficient"],
        help="what it returns: a loss, a penalty for the reward, or coefficients of the score",
    )
    group.addoption("--kl-on-policy-only", action="store_true", help="it is never used on stale samples")
    group.addoption("--kl-reach", type=float, default=50.0, help="log-ratios (nats) that it must stand")
    group.addoption("--kl-grouped", action="store_true", help="it needs the completions of a prompt, in groups")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print what the conformance kit measured of the function, as a section of pytest's summary."""
    lines = getattr(terminalreporter.config, "kl_plugins_learned", None)
    if lines:
        terminalreporter.section("KL gradient")
        for line in lines:
            terminalreporter.write_line(line)
