"""`kl-plugins report`: training runs side by side on one page, seeds of a configuration averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kl_plugins.errors import ConfigError


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
    """Training runs side by side on one HTML page: reward, KL, weights and beta over the steps.

    Reads the metrics.jsonl that the recipes write, TensorBoard's event files (TRL's, OpenRLHF's), or the
    trainer_state.json of a checkpoint; also of a run that still goes on or was interrupted.
    """
    from kl_plugins.report.page import write
    from kl_plugins.report.run_page import report_page
    from kl_plugins.report.runs import read_runs

    console = Console(stderr=True)
    try:
        write(out, report_page(read_runs(runs or [], group or [])))
    except (ConfigError, OSError) as error:
        console.print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from error
    console.print(f"wrote {out}", highlight=False, markup=False, soft_wrap=True)
