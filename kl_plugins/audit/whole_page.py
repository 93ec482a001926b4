"""The page's sections about the whole gradient, of reward and KL together, and what is recommended."""

from __future__ import annotations

from typing import Any

from kl_plugins.audit.dots import draw_dots, legend
from kl_plugins.report.page import INK, Picture, Section, Table, can_draw, compact, fixed, picture, with_interval

NOT_THE_AIM = (
    "The error of the KL's gradient by itself is not the aim. What is optimized is E[R] - beta KL, and at its optimum "
    "R - beta log(policy / reference) is the same number for every completion: a KL that gets the same credit and "
    "baseline as the reward cancels the reward's noise there, and one with less noise of its own doesn't."
)


def recommended(result: dict[str, Any]) -> Section:
    """The line to paste, and why."""
    found = result["recommended"]
    return Section(title="Recommended", text=[found["line"], found["why"]])


def whole_gradient(result: dict[str, Any]) -> Section:
    """How far a batch's whole gradient is off with each KL term."""
    whole, batch = result["whole"], result["data"]["mse_batch"]
    rows = sorted(whole["rows"], key=lambda row: _last_if_none(row["ratio"]["value"]))
    pictures = _pictures(rows, batch)
    table = Table(
        columns=(
            "KL term",
            "squared error, of reverse_kl's",
            "verdict",
            f"squared error, {batch} completions",
            "of it bias",
            "whose gradient",
        ),
        rows=[
            (
                row["label"] + (" = reverse_kl" if row["picked"] else ""),
                with_interval(row["ratio"], fixed),
                "" if row["picked"] else verdict(row),
                with_interval(row["error"]),
                compact(row["bias"]["value"]),
                (row["gradient_of"] or "a host's own") + (", refused" if row["refused"] else ""),
            )
            for row in rows
        ],
        caption="[99% interval] of the comparison, since many are compared at once, [95%] of the error, which is "
        "relative to the gradient's squared norm",
        words=frozenset({0, 2, 5}),
    )
    return Section(
        title="The whole gradient, of reward and KL",
        text=[judged(whole, batch), alone(whole), *told_from_zero(whole)],
        legend=legend(rows) if pictures else (),
        pictures=pictures,
        tables=[table],
    )


def judged(whole: dict[str, Any], batch: int) -> str:
    """What the numbers are about."""
    scale = "scaled by their group's standard deviation" if whole["scale_rewards"] == "group" else "not scaled"
    return (
        f"Squared error of the gradient of E[R] - beta KL that {batch} completions give, beta {whole['beta']:g}, in "
        f"groups of {whole['num_generations']} as {whole['trainer'].upper()} baselines them, rewards {scale}: bias "
        "squared plus variance, the prompts held fixed. Every term at the same beta: GRPO shrinks its advantages by "
        "1 - 1/G, which is divided out."
    )


def alone(whole: dict[str, Any]) -> str:
    """How much noise the reward has by itself."""
    found = whole["reward_alone"]
    return (
        f"The reward's gradient without any KL has {with_interval(found, fixed)} times the squared error that the "
        "whole has with reverse_kl: above 1 that KL cancels noise of the reward, below 1 it adds its own."
    )


def told_from_zero(whole: dict[str, Any]) -> list[str]:
    """A sentence where there is no gradient to relate errors to."""
    if whole["gradient"]["told_from_zero"]:
        return []
    return [
        "The gradient can't be told from 0 with these completions, so that errors are only compared with each other: "
        "are all rewards of a group equal, or is the policy at the optimum? More prompts or completions tell."
    ]


def verdict(row: dict[str, Any]) -> str:
    """The word for how a row compares with what `reverse_kl` picks."""
    return "can't be told" if row["verdict"] == "?" else str(row["verdict"])


def _last_if_none(value: float | None) -> float:
    return float("inf") if value is None else value


def _pictures(rows: list[dict[str, Any]], batch: int) -> list[Picture]:
    found = [row["ratio"] for row in rows]
    if not can_draw() or any(not numbers["value"] for numbers in found):
        return []
    ends = [numbers[end] or numbers["value"] for numbers in found for end in ("low", "high")]

    def draw(axis: Any) -> None:
        draw_dots(axis, rows, found, label="squared error / that of reverse_kl", log=True)
        if max(ends) < 10 * min(ends):
            axis.set_xscale("linear")  # where a logarithmic axis has a single tick, if any
        axis.axvline(1.0, color=INK["frame"], linewidth=0.8, linestyle=(0, (3, 3)))

    return [
        picture(
            draw,
            name="whole",
            alt="Squared error of the whole gradient with each KL term; the numbers are in the table below",
            caption=f"Squared error with {batch} completions as a multiple of that with reverse_kl (the dashed line); "
            "bars are 99% intervals.",
            size=(4.4, 0.75 + 0.18 * len(rows)),
        )
    ]
