"""`kl-plugins openrlhf`: OpenRLHF's own command line with a KL of ours."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.host_imports import import_failure
from kl_plugins.errors import PatchError
from kl_plugins.integration.flags import with_flags
from kl_plugins.openrlhf.plan import OpenRLHFOptions

# How typer registers the command.
FLAGS_AFTER_OURS: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True},
    "options_metavar": "--kl NAME [OPTIONS] -- OPENRLHF_FLAGS",
}
DRY_RUN = typer.Option("--dry-run", help="Check everything, say what would be done, and stop before Ray starts.")


def openrlhf(context: typer.Context, dry_run: bool, **options: Any) -> None:
    """Run OpenRLHF with the KL of your choice in every process.

    OPENRLHF_FLAGS, after a `--`, are those of openrlhf.cli.train_ppo_ray; --algo.kl.init_coef is the coefficient.
    """
    from kl_plugins.openrlhf.driver import launch

    with user_errors():
        try:
            launch(OpenRLHFOptions(**options), context.args, dry_run=dry_run)
        except ModuleNotFoundError as error:
            if error.name is None:  # of a worker, in Ray's words: that is no import of this process
                raise
            raise PatchError(import_failure("openrlhf", error)) from error


with_flags(openrlhf, OpenRLHFOptions, dry_run=(Annotated[bool, DRY_RUN], False))
