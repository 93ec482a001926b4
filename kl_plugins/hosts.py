"""The host versions that were tested, and the check that refuses any other before something is loaded."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from kl_plugins.errors import PatchError

TESTED: dict[str, tuple[str, ...]] = {"trl": ("1.12.0", "1.13.0", "1.14.2", "1.16.0")}


# GRPO and RLOO with vLLM, whose engine they ask for log-probs.
TESTED_WITH_VLLM = ("1.16.0",)


def installed_version(host: str) -> str | None:
    """The installed version of a host's distribution, or None."""
    try:
        return version(host)
    except PackageNotFoundError:
        return None


def require_tested(host: str, *, vllm: bool = False) -> None:
    """Raise `PatchError` unless the installed version of `host` is one that the project's tests run against."""
    found, tested = installed_version(host), TESTED_WITH_VLLM if vllm else TESTED[host]
    if found not in tested:
        what = f"{host} {found or '(not installed)'}{' with vLLM' * vllm}"
        raise PatchError(
            f"kl was asked for on {what}, which was not tested: its KL may be computed elsewhere. Install a tested "
            f"version ({host}=={tested[-1]}), or set kl=None to train with {host}'s own KL"
        )
