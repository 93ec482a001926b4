"""`kl-plugins audit`: bias and variance of every KL term's gradient on your own model, reference and prompts."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.layout import paragraph, print_table, unwrapped, word_table

INTERRUPTED = 130


def audit(
    model: Annotated[str | None, typer.Option(help="The policy: a folder or the name of a model on the hub.")] = None,
    reference: Annotated[str | None, typer.Option(help="The model that the KL is taken to, likewise.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="JSON lines; completions are drawn from the policy.")] = None,
    prompt_column: Annotated[str, typer.Option(help="Where they hold a text, or a chat's messages.")] = "prompt",
    rollouts: Annotated[
        Path | None,
        typer.Option(
            help="Instead of --prompts: saved completions as JSON lines of prompt_ids (or the prompt column), "
            "completion_ids and, if another policy or engine drew them, behavior_logp."
        ),
    ] = None,
    completions: Annotated[int, typer.Option(min=2, help="Of each prompt, to audit.")] = 8,
    target_completions: Annotated[int, typer.Option(min=2, help="Others of each prompt, for the target.")] = 32,
    max_prompts: Annotated[int, typer.Option(min=1, help="More than these are thinned out at random.")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where a completion ends at the latest.")] = 64,
    batch: Annotated[
        int, typer.Option(min=1, help="Completions in a forward pass; memory grows with it, tokens and vocabulary.")
    ] = 8,
    mse_batch: Annotated[int, typer.Option(min=1, help="Completions that the squared error is stated for.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the choice of prompts, the sampling and the resampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto is a GPU if there is one.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of both models: float32, bfloat16 or float16.")] = "float32",
    vllm: Annotated[
        bool, typer.Option("--vllm", help="Draw what is audited with vLLM, off-policy by its own log-probs.")
    ] = False,
    reward_column: Annotated[
        str, typer.Option(help="Where --rollouts hold rewards: judge the whole gradient, of reward and KL.")
    ] = "",
    reward: Annotated[
        str, typer.Option(help="Instead: a reward function as TRL calls it, package.module:name or file.py:name.")
    ] = "",
    beta: Annotated[float, typer.Option(help="What a nat of KL costs in the whole gradient.")] = 0.04,
    trainer: Annotated[
        str, typer.Option(help="grpo or rloo: how rewards are baselined, what is recommended.")
    ] = "grpo",
    num_generations: Annotated[
        int | None, typer.Option(help="Completions that are baselined together; by default half of a prompt's.")
    ] = None,
    scale_rewards: Annotated[
        str | None, typer.Option(help="none or group, as in TRL; by default the trainer's own: group in GRPO.")
    ] = None,
    hosts: Annotated[bool, typer.Option(help="Run the KL terms of TRL, OpenRLHF and verl, too.")] = True,
    out: Annotated[Path, typer.Option(help="Folder for audit.html and audit.json.")] = Path("audit"),
) -> None:
    """Measure on your models which KL gives training the best gradient.

    That is of every configuration of kl_plugins, and of what the installed hosts do themselves. With rewards: how far
    a batch's gradient of E[R] - beta KL is off with each of them. In any case: the bias and variance of the KL's
    gradient by itself, against those of the KL of whole completions and of the next-token KLs, and a line to paste.
    Ctrl-C leaves a report on the prompts that are done (exit code 130).
    """
    options = dict(locals())
    del options["out"]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from rich import progress as bars

    from kl_plugins.audit.run import AuditOptions, run_audit, write_report

    console = Console(stderr=True)
    bar = (bars.BarColumn(bar_width=24), bars.MofNCompleteColumn(), bars.TimeElapsedColumn())
    columns = (bars.TextColumn("{task.description}"), *bar, bars.TimeRemainingColumn())
    with user_errors(ValueError), ExitStack() as ended:
        asked = AuditOptions(**{name: value for name, value in options.items() if value is not None})
        progress = bars.Progress(*columns, console=console)
        task = progress.add_task("Prompts", start=False)

        def done(count: int, total: int) -> None:
            if count == 0:  # the models are loaded
                ended.enter_context(progress)
                progress.start_task(task)
            progress.update(task, completed=count, total=total)

        try:
            result = run_audit(asked, say=lambda text: unwrapped(console, text), done=done)
        except KeyboardInterrupt:
            ended.close()
            console.print("Interrupted before a prompt was done: there is nothing to report.")
            raise typer.Exit(INTERRUPTED) from None
    written = write_report(result, out)
    _show(Console(), result)
    for path in written:
        unwrapped(console, f"wrote {path}")
    if result["status"] != "complete":
        raise typer.Exit(INTERRUPTED)


def _show(console: Console, result: dict[str, Any]) -> None:
    """The summary in the terminal; it ends with the line to paste."""
    if result["whole"]:
        _show_whole(console, result)
    if not result["data"]["policy_is_reference"]:
        _show_kl(console, result)
    for line in (*result["notices"], *result["left_out"]):
        paragraph(console, line)
    console.print()
    paragraph(console, result["recommended"]["why"])
    unwrapped(console, result["recommended"]["line"])


def _show_whole(console: Console, result: dict[str, Any]) -> None:
    from kl_plugins.audit import whole_page
    from kl_plugins.report.page import compact, fixed, with_interval

    whole, batch = result["whole"], result["data"]["mse_batch"]
    styles = {"better": "green", "worse": "red"}
    table = word_table("KL term", "squared error / reverse_kl's", "verdict", "/ gradient²")
    for column in (table.columns[1], table.columns[3]):
        column.justify = "right"
    for row in sorted(whole["rows"], key=lambda row: (row["ratio"]["value"] is None, row["ratio"]["value"])):
        word = "= reverse_kl" if row["picked"] else whole_page.verdict(row)
        ratio = with_interval(row["ratio"], fixed)
        table.add_row(Text(row["label"]), ratio, Text(word, styles.get(word, "")), compact(row["error"]["value"]))
    for line in (whole_page.judged(whole, batch), whole_page.alone(whole), *whole_page.told_from_zero(whole)):
        paragraph(console, line)
    console.print()
    print_table(console, table)
    console.print()


def _show_kl(console: Console, result: dict[str, Any]) -> None:
    from kl_plugins.audit.pages import size
    from kl_plugins.audit.whole_page import NOT_THE_AIM

    said = {None: Text("?"), True: Text("no", style="red"), False: Text("yes", style="green")}
    table = word_table("term", "declared", "found", "whole", "local", "dead")
    for column in table.columns[3:]:
        column.justify = "right"
    for row in result["rows"]:
        own = row["own_name"]
        sizes = (size(row["against"][of]["bias"]) for of in ("reverse_kl", "local_reverse_kl"))
        words = [Text(row["label"]), Text(row["gradient_of"] or "a KL")]
        table.add_row(*words, said[own["seen"]] if own else "", *sizes, f"{row['dead']:.1%}")
    paragraph(
        console,
        "The gradient of each KL term by itself: its distance from that of the KL of whole completions (whole) and "
        "from that of the next-token KLs (local), relative to their norm; whether it is the declared one (found); the "
        "share of tokens at which it is exactly 0 though the policy has left the reference (dead).",
    )
    paragraph(console, NOT_THE_AIM)
    console.print()
    print_table(console, table)
    console.print()
