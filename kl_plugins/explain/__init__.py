"""What a whole training configuration does about the KL, for `kl-plugins explain`. Loads neither torch nor a host.

`reading` reads it, `run` makes a run of it, `host_terms` and `pitfalls` are what is known of the hosts, and
`verdict.explain_run` puts these together.
"""

from __future__ import annotations

from collections.abc import Sequence

from kl_plugins.errors import ConfigError
from kl_plugins.explain.reading import from_flags, read_file, read_flags
from kl_plugins.explain.run import infer_trainer
from kl_plugins.explain.verdict import TRAINERS, Explanation, explain_run

HOSTS = ("trl", "openrlhf")


def explain_words(words: Sequence[str], *, host: str | None = None, trainer: str | None = None) -> Explanation:
    """The explanation of a file, of flags, or of a file that flags override. Raises what `explain_run` raises."""
    for option, asked, offered in (("--host", host, HOSTS), ("--trainer", trainer, TRAINERS)):
        if asked not in (None, *offered):
            raise ConfigError(f"{option} {asked} is not offered: choose from {', '.join(offered)}")
    file = words[0] if words and not words[0].startswith("--") else None
    flags = read_flags(words[1:] if file else words)
    assumed: list[str] = []
    if host is None and not trainer and any("." in flag for flag in flags):
        host = "openrlhf"
        assumed.append("--host openrlhf: its flags have dots in their names")
    if host == "openrlhf":
        if file or trainer:
            what = f"the file {file}" if file else f"--trainer {trainer}"
            raise ConfigError(f"{what} was given, but OpenRLHF has none: give its flags after --")
        return explain_run(from_flags(flags, trl=False), "openrlhf", assumed)
    given = from_flags(flags, trl=True)
    if "config" in given:  # as TRL's own command line takes a file
        file = str(given.pop("config"))
    given = {**(read_file(file) if file else {}), **given}
    return explain_run(given, infer_trainer(given, trainer, assumed), assumed)


__all__ = ["Explanation", "explain_run", "explain_words"]
