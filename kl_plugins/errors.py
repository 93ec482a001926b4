"""The three exceptions of `kl_plugins`. Every message says what was asked, what was found and what to do."""


class ConfigError(ValueError):
    """A configuration that is unknown, contradictory, or whose gradient is zero or biased. `args` are its problems."""

    def __str__(self) -> str:
        return str(self.args[0]) if len(self.args) == 1 else "\n".join(f"- {problem}" for problem in self.args)


class UnknownLossError(KeyError):
    """A KL name that nobody registered."""

    def __str__(self) -> str:  # KeyError would show the message's repr
        return str(self.args[0]) if self.args else ""


class PatchError(RuntimeError):
    """A host that is not what was expected: an untested version, or a seam that was not used as before."""


def refuse(problems: list[str]) -> None:
    """Raise one `ConfigError` that lists every problem; return if there is none."""
    if problems:
        raise ConfigError(*problems)
