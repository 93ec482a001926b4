"""`kl-plugins curves`: what each KL term multiplies the score with, against the log-ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from kl_plugins.errors import ConfigError


def curves(
    out: Annotated[Path, typer.Option(help="The picture: png, svg or pdf.")] = Path("curves.png"),
    data: Annotated[Path | None, typer.Option(help="The numbers, too: json or csv.")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="For a dark page.")] = False,
) -> None:
    """Draw what each KL term multiplies the score grad log policy with, against the log-ratio.

    Ours and the hosts' own: where their gradient dies (value clamps), and where float32 loses it.
    """
    from kl_plugins.explain.curves import all_curves
    from kl_plugins.report.curves import plot, write

    try:
        _check_paths(out, data)
        found, left_out = all_curves()
        plot(found, out, dark=dark)
        if data is not None:
            write(found, data)
    except (ConfigError, OSError) as error:
        Console(stderr=True).print(Text.assemble(("error: ", "red"), str(error)), soft_wrap=True)
        raise typer.Exit(2) from error
    console = Console()
    for curve in found:
        zeros = "".join(f"; exactly 0 for u in [{low:.4g}, {high:.4g}]" for low, high in curve.zeros)
        console.print(f"{curve.panel}: {curve.name} ({curve.how}){zeros}", markup=False, highlight=False)
    for line in [*left_out, f"wrote {' and '.join(str(path) for path in (out, data) if path)}"]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _check_paths(out: Path, data: Path | None) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out {out}: a picture ends in .png, .svg or .pdf")
    if data is not None and data.suffix not in (".json", ".csv"):
        raise ConfigError(f"--data {data}: the numbers end in .json or .csv")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("drawing needs matplotlib, which isn't installed: pip install 'kl_plugins[plot]'") from error
