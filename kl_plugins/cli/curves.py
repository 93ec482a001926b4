"""`kl-plugins curves`: what each KL term multiplies the score with, against the log-ratio."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.layout import paragraph, unwrapped
from kl_plugins.errors import ConfigError


def curves(
    out: Annotated[Path, typer.Option(help="The picture: png, svg or pdf.")] = Path("curves.png"),
    data: Annotated[Path | None, typer.Option(help="The numbers, too: json or csv.")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="For a dark page.")] = False,
) -> None:
    """Draw each KL term's coefficient against the log-ratio.

    That is what the score grad log policy is multiplied with. Ours and the hosts' own: where their gradient dies
    (value clamps), and where float32 loses it.
    """
    from kl_plugins.explain.curves import all_curves
    from kl_plugins.report.curves import plot, write

    with user_errors(OSError):
        _check_paths(out, data)
        found, left_out = all_curves()
        plot(found, out, dark=dark)
        if data is not None:
            write(found, data)
    console = Console()
    for curve in found:
        zeros = "".join(f"; exactly 0 for u in [{low:.4g}, {high:.4g}]" for low, high in curve.zeros)
        paragraph(console, f"{curve.panel}: {curve.name}", style="bold")
        paragraph(console, curve.how + zeros, indent=2)
    for line in left_out:
        paragraph(console, line)
    written = " and ".join(str(path) for path in (out, data) if path)
    unwrapped(console, f"wrote {written}")


def _check_paths(out: Path, data: Path | None) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out {out}: a picture ends in .png, .svg or .pdf")
    if data is not None and data.suffix not in (".json", ".csv"):
        raise ConfigError(f"--data {data}: the numbers end in .json or .csv")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("drawing needs matplotlib, which isn't installed: pip install 'kl_plugins[plot]'") from error
