"""`kl-plugins report`: training runs side by side on one page, seeds of a configuration averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.layout import unwrapped


def report(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders of runs, folders of such folders, or their logs.", show_default=False),
    ] = None,
    group: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=PATH,PATH: seeds of one configuration. Without it, names that end in seed0, seed1 ..."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("report.html"),
) -> None:
    """Put training runs side by side on one HTML page.

    Reward, KL, weights and beta over the steps. Reads the metrics.jsonl that the recipes write, TensorBoard's event
    files (TRL's, OpenRLHF's), or the trainer_state.json of a checkpoint; also of a run that still goes on or was
    interrupted.
    """
    from kl_plugins.report.page import write
    from kl_plugins.report.run_page import report_page
    from kl_plugins.report.runs import read_runs

    with user_errors(OSError):
        write(out, report_page(read_runs(runs or [], group or [])))
    unwrapped(Console(stderr=True), f"wrote {out}")
