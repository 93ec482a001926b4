"""What the commands print: readable in 80 columns, whole words, and nobody's text is read as markup."""

from __future__ import annotations

from collections import Counter

import pytest
import typer
from rich.console import Console
from rich.table import Table
from typer.testing import CliRunner

from kl_plugins import all_losses
from kl_plugins.cli import app
from kl_plugins.cli.errors import user_errors
from kl_plugins.cli.layout import definitions, paragraph, print_table, word_table
from kl_plugins.errors import ConfigError
from kl_plugins.openrlhf import driver
from kl_plugins.report import summary_table
from kl_plugins.report.plots import SUMMARY

IDENTIFIER = "trl.trainer.grpo_trainer:GRPOTrainer._get_per_token_logps_and_entropies"


def printed(*words, columns, env=None):
    return CliRunner().invoke(app, list(words), env={"COLUMNS": str(columns), **(env or {})}).output


def words(said):
    """How often each word was said, lines of tables left aside."""
    return Counter(word for word in said.split() if any(letter.isalnum() for letter in word))


def fits(say, columns=80):
    """Whether no line of `say(columns)` is longer, and all words are as they are where there is room."""
    narrow, wide = say(columns), say(1000)
    assert len(words(wide)) > 3
    return max(map(len, narrow.splitlines())) <= columns and words(narrow) == words(wide)


COMMANDS = [
    ["doctor"],
    ["explain"],
    *(["explain", name] for name in all_losses()),
    ["explain", "--host", "openrlhf", "--", *["--algo.kl.use_loss", "--algo.kl.estimator", "k3"]],
    ["explain", "--host", "openrlhf", "--", "--kl", "k2_as_loss", "--", "--rollout.top_p", "0.9"],
    ["explain", "--trainer", "grpo", "--", "--beta", "0.04", "--loss_type", "grpo"],
    [
        "explain",
        "--trainer",
        "rloo",
        "--",
        "--kl",
        "k1_in_reward",
        "--kl_clip",
        "combined",
    ],
    ["explain", "--trainer", "gmpo", "--", "--beta", "0.04", "--kl", "k2_as_loss"],
    ["explain", "--trainer", "ppo", "--", "--kl_estimator", "k3"],
    ["patches", "trl"],
    ["--help"],
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_80_columns_are_enough_and_no_word_is_broken(words):
    assert fits(lambda columns: printed(*words, columns=columns))


def test_the_table_of_a_run_fits():
    keys = {key: 0.123456 for _, (key, *_), _ in SUMMARY}
    rows = [{"step": step, "eval_reward": 0.5} | keys for step in range(100)]

    def say(columns):
        console = Console(width=columns)
        with console.capture() as captured:
            console.print(summary_table(rows, "GRPO with k2_as_loss"))
        return captured.get()

    assert "sampler and trainer differ by" in say(80)
    assert fits(say)


def boxed(columns):
    """As it was: a table whose cells are folded."""
    console = Console(width=columns)
    table = Table("name", "how", "host, tested versions", "can be hooked", "hooked now")
    table.add_row("grpo", IDENTIFIER, "trl 1.12.0, 1.13.0, 1.14.2", "no: trl 1.99.0 is not a tested version", "no")
    for column in table.columns:
        column.overflow = "fold"
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def cut(columns):
    """As it was: columns that are wider than the console together."""
    console = Console(width=columns)
    table = Table()
    for name in ("where", "coefficient", "gradient"):
        table.add_column(name, min_width=36)
    table.add_row("TRL GRPOTrainer", "rho * u", "local_reverse_kl")
    with console.capture() as captured:
        console.print(table)
    return captured.get()


@pytest.mark.parametrize(
    "say", [boxed, cut, lambda columns: "a line that nobody has wrapped between its words at all " * 2]
)
def test_a_layout_that_breaks_or_cuts_words_or_lines_is_noticed(say):
    assert not fits(say)


def test_a_word_without_room_stands_on_a_line_below_and_is_whole():
    console = Console(width=40)
    with console.capture() as captured:
        paragraph(console, f"a {IDENTIFIER} b", label="target:", indent=2)
        definitions(console, [("one", "1 [2] :smile:"), ("three", "x " * 20)])
    assert captured.get().splitlines() == [
        "  target:",
        "    a",
        f"    {IDENTIFIER}",
        "    b",
        "one    1 [2] :smile:",
        "three  " + "x " * 16 + "x",
        "       x x x",
    ]


def test_a_table_is_wider_than_the_console_rather_than_cut():
    console = Console(width=40)
    table = word_table("target", "state")
    table.add_row(IDENTIFIER, "[same]")
    table.columns[1].justify = "right"
    with console.capture() as captured:
        print_table(console, table)
    assert IDENTIFIER in captured.get()
    assert console.width == 40


HOSTILE = "[bold]k2[/bold] [/red] :boom:"


@pytest.mark.parametrize(
    "words", [["explain", HOSTILE], ["doctor", HOSTILE], ["patches", HOSTILE], ["report", HOSTILE], [HOSTILE]]
)
def test_words_of_users_are_shown_as_they_are(words):
    assert HOSTILE in printed(*words, columns=500)


def test_words_of_the_environment_are_shown_as_they_are():
    assert HOSTILE in printed(
        "doctor", columns=500, env={driver.OPTIONS: f"--kl '{HOSTILE}'", driver.RAY_HOOK: driver.HOOK}
    )


def test_an_error_ends_with_code_2_on_stderr_and_others_pass():
    command = typer.Typer()

    @command.command()
    def run(kind: str):
        with user_errors(OSError):
            raise {"config": ConfigError("first", "second"), "os": OSError("disk"), "key": KeyError("key")}[kind]

    found = CliRunner().invoke(command, ["config"])
    assert (found.exit_code, found.stderr, found.stdout) == (2, "error: - first\n- second\n", "")
    assert CliRunner().invoke(command, ["os"]).stderr == "error: disk\n"
    assert isinstance(CliRunner().invoke(command, ["key"]).exception, KeyError)
