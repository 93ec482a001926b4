"""`kl-plugins explain`: what gradient a configuration has, when it is biased, and what to use instead."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.layout import definitions, paragraph, print_table, word_table
from kl_plugins.core.registry import REVERSE_KL, KLLoss, all_losses, get_loss
from kl_plugins.errors import ConfigError
from kl_plugins.explain import explain_words
from kl_plugins.explain.verdict import MEANING, OFF_POLICY, TRAINERS, Explanation, not_offered
from kl_plugins.integration.choice import TREATMENTS, choose

_FILES = (".yaml", ".yml", ".json")


def explain(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME | FILE] [-- FLAGS]",
            help="A KL configuration by name, without one all of them; or a whole training configuration: a YAML or "
            "JSON file of TRL's options, flags of TRL, or with --host openrlhf flags of OpenRLHF and our --kl ones.",
        ),
    ] = None,
    host: Annotated[str | None, typer.Option(help="trl or openrlhf, whose flags these are.")] = None,
    trainer: Annotated[str | None, typer.Option(help=f"Of TRL: {', '.join(TRAINERS)}.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The same for machines.")] = False,
) -> None:
    """Say what gradient a KL has, and what to use instead.

    Of a whole training configuration: which KL the host really applies with it. Then the exit code is 0 if it is
    principled (or another divergence, which is said), 1 if its gradient is zero, biased or void,
    and 2 if it is refused or no configuration.

    \b
    kl-plugins explain k3_as_loss
    kl-plugins explain grpo.yaml
    kl-plugins explain grpo.yaml -- --num_iterations 4
    kl-plugins explain --trainer rloo -- --beta 0.05 --use_vllm true
    kl-plugins explain --host openrlhf -- --algo.kl.use_loss --algo.kl.estimator k3
    """
    words, console = words or [], Console()
    with user_errors():
        if _is_configuration(words) or host or trainer:
            found = explain_words(words, host=host, trainer=trainer)
            if as_json:
                print(json.dumps(asdict(found), indent=2))
            else:
                _show(console, found)
            raise typer.Exit(found.exit_code)
        if len(words) > 1:
            raise ConfigError(f"one name was expected, found {' '.join(words)}: give flags after --")
        if words == [REVERSE_KL]:
            print(json.dumps(_picks(), indent=2)) if as_json else _show_picks(console)
            return
        losses = {name: get_loss(name) for name in words} if words else all_losses()
        if as_json:
            print(json.dumps({name: _as_data(loss) for name, loss in losses.items()}, indent=2))
        elif words:
            _explain_loss(console, losses[words[0]])
        else:
            _list_losses(console, losses)


def _is_configuration(words: Sequence[str]) -> bool:
    """Whether these are a file or flags, not a name."""
    return bool(words) and (words[0].startswith("--") or words[0].endswith(_FILES) or Path(words[0]).is_file())


def _as_data(loss: KLLoss) -> dict[str, Any]:
    keys = ("name", "summary", "default_credit", "expected", "instead", "may_overflow", "source")
    return {key: getattr(loss, key) for key in keys} | {"gradient_of": dict(loss.gradient_of)}


REFUSED = ("zero", "biased")


def _colour(gradient: str) -> str:
    return "red" if gradient in REFUSED else "green" if "reverse" in gradient else "yellow"


def _list_losses(console: Console, losses: dict[str, KLLoss]) -> None:
    table = word_table("kl", "credit", "gradient of", "instead", title="The expected on-policy gradient of each KL")
    for loss in losses.values():
        for credit, gradient in loss.gradient_of.items():
            default = " (default)" if credit == loss.default_credit and len(loss.gradient_of) > 1 else ""
            shown = f"{gradient}, refused" if gradient in REFUSED else gradient
            table.add_row(
                *map(Text, (loss.name, credit + default)), Text(shown, style=_colour(gradient)), Text(loss.instead)
            )
    print_table(console, table)
    paragraph(console, "What is refused passes with kl_allow_biased=True, for ablations.")
    console.print()
    definitions(
        console,
        [
            ("what to take:", f'kl="{REVERSE_KL}", which picks for your trainer: kl-plugins explain {REVERSE_KL}'),
            ("more on one of them:", "kl-plugins explain NAME"),
            ("on your configuration:", "kl-plugins explain FILE, or kl-plugins explain -- FLAGS"),
        ],
        label_style="",
    )


def _picks() -> list[dict[str, Any]]:
    """What `reverse_kl` picks in each host."""
    picks = []
    for host, estimator in TREATMENTS:
        if host == "gmpo":  # as GRPO
            continue
        choice = choose(REVERSE_KL, {}, host=host, estimator=estimator)
        trainer = {"openrlhf": f"OpenRLHF, {estimator}", "grpo": "TRL GRPO, GMPO"}.get(host, f"TRL {host.upper()}")
        picks.append({"trainer": trainer, "kl": choice.kl, **choice.options, "why": choice.why})
    return picks


def _show_picks(console: Console) -> None:
    """The page of `reverse_kl`."""
    text = (
        f"picks, for the trainer at hand, what measured best (docs/evidence.md says where not): {MEANING[REVERSE_KL]}."
    )
    paragraph(console, text, label=f"{REVERSE_KL}:")
    console.print()
    table = word_table("trainer", "kl", "kl_credit", "kl_baseline", title="What it picks")
    for pick in _picks():
        table.add_row(*(Text(str(pick[name])) for name in ("trainer", "kl", "kl_credit", "kl_baseline")))
    print_table(console, table)
    paragraph(
        console,
        "A KL in the reward gets the credit and the baseline of the reward; in GRPO and RLOO, on samples of an "
        "older policy and without vLLM, also its ratio and clip (kl_clip='combined'). What you set yourself wins.",
    )


def _explain_loss(console: Console, loss: KLLoss) -> None:
    refused = set(REFUSED) & set(loss.gradient_of.values())
    paragraph(console, loss.summary, label=f"{loss.name}:")
    console.print()
    for credit, gradient in loss.gradient_of.items():
        default = " (default)" if credit == loss.default_credit else ""
        paragraph(console, gradient, label=f"credit {credit}{default}:", style=_colour(gradient))
        paragraph(console, MEANING[gradient], indent=2)
    console.print()
    how = f'kl="{loss.name}", kl_allow_biased=True' if refused else f'kl="{loss.name}"'
    only = "; only for ablations" if refused else ""
    rows = {
        "expected gradient:": loss.expected,
        "use instead:": loss.instead,
        "source:": loss.source,
        "from kl_plugins.trl:": f"GRPOConfig({how}, beta=0.04){only}",
    }
    definitions(console, [(label, text) for label, text in rows.items() if text])
    if not refused:
        console.print()
        paragraph(console, "Off-policy, by kl_off_policy:")
        definitions(console, OFF_POLICY.items(), indent=2)
        paragraph(console, "Weights cut by kl_weight_clip trade variance for bias; kl/clipped and kl/ess are logged.")
    if loss.may_overflow:
        console.print()
        paragraph(
            console,
            "The coefficient grows exponentially below the reference; kl_coefficient_bound (1e6) limits it.",
        )


_COLOURS = {"principled": "green", "another divergence": "yellow"}


def _show(console: Console, found: Explanation) -> None:
    """The page of a whole configuration."""
    verdict = f"{found.verdict} (exit code {found.exit_code})"
    paragraph(console, verdict, label=f"{found.host}:", style=f"bold {_COLOURS.get(found.verdict, 'red')}")
    console.print()
    given = ", ".join(f"{name}={found.configuration[name]}" for name in found.given)
    rows = {
        "given": given or "nothing that is about the KL",
        "ignored": ", ".join(found.ignored),
        "assumed": "\n".join(found.assumed),
        "KL term": f"{found.beta:g} times, in the {found.placement}: {found.term}",
        "coefficient": f"{found.coefficient}\n(of the score grad log policy; u = log policy - log reference)",
        "gradient": f"{found.gradient_of}: {found.meaning}",
        "samples": found.samples,
        "stale samples": found.stale,
        "engine mismatch": found.engine,
        "variance": found.variance,
        "dead zone": found.dead_zone or "none",
        "overflow": found.overflow,
        "read from": found.facts,
    }
    definitions(console, [(label, text) for label, text in rows.items() if text])
    for flaw in found.flaws:
        console.print()
        paragraph(console, flaw.says, label=f"{flaw.effect}:", label_style="bold red")
    for note in found.notes:
        console.print()
        paragraph(console, note, label="note:")
    console.print()
    instead = found.instead if found.change else "nothing has to change"
    paragraph(console, instead, label="use instead:", label_style="", style="bold" if found.change else "")
    _show_elsewhere(console, found)


def _show_elsewhere(console: Console, found: Explanation) -> None:
    """What each host makes of the same estimator: setting, on-policy gradient and coefficient."""
    if not found.elsewhere:
        return
    console.print()
    paragraph(
        console, f"What {found.estimator} is elsewhere: its on-policy gradient, and its coefficient", style="bold"
    )
    for row in found.elsewhere:
        console.print()
        host = f"{row['host']}:" if row["setting"] else row["host"]
        paragraph(console, row["setting"] + "   <- yours" * row["yours"], label=host)
        dead = f"\nexactly 0 at {row['dead_zone']}" if row["dead_zone"] else ""
        definitions(console, [(row["gradient_of"], row["coefficient"] + dead)], label_style="", indent=2)
    others = [f"{host} has {used} only" for host, used in not_offered(found.estimator).items()]
    if others:
        console.print()
        paragraph(console, f"Not offered: {'; '.join(others)}.")
