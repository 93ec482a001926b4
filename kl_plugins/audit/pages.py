"""The audit's page: what was measured, against what, and what it means."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kl_plugins.audit import whole_page
from kl_plugins.audit.dots import draw_dots, kind, legend
from kl_plugins.audit.statistics import RESOLVED
from kl_plugins.report.page import (
    Picture,
    Section,
    Table,
    can_draw,
    compact,
    fixed,
    picture,
    provenance,
    render,
    with_interval,
)

Row = dict[str, Any]

DIVERGENCES = {
    "reverse_kl": "KL(policy || reference) of whole completions",
    "local_reverse_kl": "the sum of next-token KLs, visited prefixes held fixed",
    "local_forward_kl": "the sum of next-token KL(reference || policy), visited prefixes held fixed",
    "zero": "nothing",
}
# A row whose expected |coefficient| rests on tokens this rare by more than this share has tails that were not drawn.
HEAVY = 0.1


def audit_page(result: dict[str, Any]) -> str:
    """HTML of what `kl_plugins.audit.run` writes as JSON."""
    data, rows = result["data"], result["rows"]
    lead = [
        f"Policy {data['model']}, reference {data['reference']}; {data['prompts']} prompts, "
        f"{data['completions']} completions of {data['mean_length']:.1f} tokens on average, {data['sampling']}.",
        f"KL to the reference: {data['exact_kl']:.4g} nats a token (exact over the vocabulary); log-ratios of the "
        f"sampled tokens from {data['lowest']:.3g} to {data['highest']:.3g}.",
    ]
    notices = list(result["notices"])
    if not can_draw():
        notices.append("Without pictures: matplotlib isn't installed (pip install 'kl_plugins[plot]').")
    against = [
        ("reverse_kl", "Against the KL of whole completions"),
        ("local_reverse_kl", "Against the next-token KLs"),
    ]
    judged = [whole_page.whole_gradient(result)] if result["whole"] else []
    of_kl = [
        _summary(result),
        *(_against(result, of, title) for of, title in against),
        _tokens(rows, data),
        _targets(result),
    ]
    sections = [
        whole_page.recommended(result),
        *judged,
        *([] if data["policy_is_reference"] else of_kl),
        _origins(result),
        _meaning(result),
        Section(title="How this was made", tables=[_provenance(result)]),
    ]
    title = "KL gradient audit" + ("" if result["status"] == "complete" else " (partial)")
    return render(title=title, lead=lead, sections=sections, notices=notices)


def _summary(result: dict[str, Any]) -> Section:
    """What each name promises, and whether it is kept."""
    rows = []
    for row in result["rows"]:
        own, whole, local = row["own_name"], *(row["against"][of]["bias"] for of in ("reverse_kl", "local_reverse_kl"))
        kept = "–" if own is None else "can't be told" if own["seen"] is None else "no" if own["seen"] else "yes"
        apart = "" if own is None else distance(own["bias"])
        promise = row["gradient_of"] or "a KL"
        rows.append((row["label"], promise, kept, apart, size(whole), size(local), kind(row)))
    return Section(
        title="Does each term have the gradient that is declared for it?",
        text=[
            whole_page.NOT_THE_AIM,
            "“Yes” means that no difference was seen at this sample size: with 95% confidence it is below the "
            f"distance that is given; if that is above {RESOLVED}, nothing can be told. Distances are relative to the "
            "norm of the divergence's gradient: 1 is as far off as adding nothing at all.",
        ],
        tables=[
            Table(
                columns=(
                    "term",
                    "declared gradient",
                    "found",
                    "distance from it",
                    "off the whole KL by",
                    "off the next-token KLs by",
                    "whose",
                ),
                rows=rows,
                words=frozenset({0, 1, 2, 6}),
            )
        ],
    )


def _against(result: dict[str, Any], of: str, title: str) -> Section:
    rows, batch = result["rows"], result["data"]["mse_batch"]
    target = next(t for t in result["targets"] if t["name"] == of)
    text = [
        f"The target is the gradient of {DIVERGENCES[of]}: norm {with_interval(target['norm'])}, standard "
        f"error {compact(target['standard_error'])} (of the whole vector; it is subtracted from what follows).",
    ]
    if not target["told_from_zero"]:
        text.append(
            "It can't be told from 0 here, so nothing is related to it: draw more completions; or is the policy "
            "the reference?"
        )
    table = Table(
        columns=(
            "term",
            "bias / target",
            "cosine",
            "norm / target",
            "variance of one completion",
            f"squared error, {batch} completions",
        ),
        rows=[
            (
                row["label"] + (" *" if _heavy(row) else ""),
                distance(row["against"][of]["bias"]),
                with_interval(row["against"][of]["cosine"], fixed),
                with_interval(row["against"][of]["norm_ratio"], fixed),
                with_interval(row["against"][of]["variance"]),
                with_interval(row["against"][of]["mse"]),
            )
            for row in rows
        ],
        caption="[95% intervals]; variance and squared error relative to the target's squared norm"
        + ("; * see “Tokens and weights”: the tails were not drawn" if any(map(_heavy, rows)) else ""),
    )
    pictures: list[Picture] = []
    if can_draw() and target["told_from_zero"]:
        bias = [row["against"][of]["bias"] for row in rows]
        error = [row["against"][of]["mse"] for row in rows]
        pictures.append(
            _dots(
                rows,
                bias,
                name=f"bias-{of}",
                label="bias, relative to the target's norm",
                alt=f"Bias of each term's gradient against {DIVERGENCES[of]}; the numbers are in the table below",
                log=False,
            )
        )
        if all(error):
            pictures.append(
                _dots(
                    rows,
                    error,
                    name=f"error-{of}",
                    label=f"mean squared error with {batch} completions, relative (log scale)",
                    alt=f"Mean squared error of each term's gradient against {DIVERGENCES[of]}; numbers below",
                    log=True,
                )
            )
    return Section(title=title, text=text, legend=legend(rows) if pictures else (), pictures=pictures, tables=[table])


def _dots(
    rows: Sequence[Row], found: Sequence[dict[str, Any]], *, name: str, label: str, alt: str, log: bool
) -> Picture:
    caption = (
        label[0].upper()
        + label[1:]
        + ("." if log else "; bars are 95% intervals, the dashed line is a term that adds nothing.")
    )

    def draw(axis: Any) -> None:
        draw_dots(axis, rows, found, label=label, log=log)

    return picture(draw, name=name, alt=alt, caption=caption, size=(4.4, 0.75 + 0.18 * len(rows)))


def _tokens(rows: Sequence[Row], data: dict[str, Any]) -> Section:
    table = []
    for row in rows:
        weights = row["weights"] or {}
        table.append(
            (
                row["label"],
                format(row["dead"], ".2%"),
                "–" if row["unseen"] is None else format(row["unseen"], ".1%"),
                str(row["nonfinite"]),
                *(
                    "–" if name not in weights else format(weights[name], form)
                    for name, form in (("ess", ".1%"), ("max", ".3g"), ("top_percent", ".1%"), ("cut", ".2%"))
                ),
            )
        )
    return Section(
        title="Tokens and weights",
        text=[
            "A dead token's gradient is exactly 0 although the policy has left the reference there: a clamp, "
            "rounding or a log-ratio that was frozen at rollout has switched the penalty off. “Too rare to be drawn” "
            "is the share of the coefficient's expected size, beyond those tokens' share of the draws, that rests on "
            f"tokens less likely than one in the {data['tokens']:,} audited: where it is above {HEAVY:.0%}, marked * "
            "above, the variance is larger than measured, and off-policy the bias may lie outside of its interval."
        ],
        tables=[
            Table(
                columns=(
                    "term",
                    "dead tokens",
                    "too rare to be drawn",
                    "not finite",
                    "effective sample size",
                    "largest weight",
                    "weight of the top 1%",
                    "weights cut",
                ),
                rows=table,
            )
        ],
    )


def _targets(result: dict[str, Any]) -> Section:
    data = result["data"]
    return Section(
        title="The targets",
        text=[
            f"They come from {data['target_completions']} other completions of each prompt, drawn by the policy "
            "itself. Within a step nothing is sampled: the sum over the vocabulary is taken, and in the gradient of "
            "whole completions each token's score carries the exact next-token KLs after it.",
            f"Gradients are those of {data['parameters']}.",
        ],
        tables=[
            Table(
                columns=("gradient of", "norm [95% interval]", "standard error", "what"),
                rows=[
                    (
                        target["name"],
                        with_interval(target["norm"]),
                        compact(target["standard_error"]),
                        DIVERGENCES[target["name"]],
                    )
                    for target in result["targets"]
                ],
                words=frozenset({0, 3}),
            )
        ],
    )


def _origins(result: dict[str, Any]) -> Section:
    origins = dict.fromkeys((row["name"], row["origin"]) for row in result["rows"])
    return Section(
        title="Which code was run",
        items=result["left_out"],
        tables=[Table(columns=("term", "function"), rows=list(origins), words=frozenset({0, 1}))],
    )


def _meaning(result: dict[str, Any]) -> Section:
    off_policy = result["data"]["off_policy"]
    items = [
        "Bias: the distance between the term's mean gradient and the target, relative to the target's norm. It stays "
        "however large the batch is; 0 is right, 1 is as wrong as no KL term at all.",
        "Cosine and norm: whether the mean gradient points where the target does, and how long it is. A cosine below "
        "0 pushes the policy away from the reference; a dash is a mean gradient that can't be told from 0.",
        "Variance: the total variance of one completion's gradient, its prompt held fixed; a batch of n divides it "
        "by n. Squared error is bias squared plus that, which is what a training step has of it.",
        "Intervals: 95%, from a bootstrap over the completions of each prompt, so that one in twenty leaves the "
        "truth out. They are about these prompts: on others the gradients are others.",
        "The mean of a term is averaged over every possible next token at each visited prefix, by calling its "
        "function on the whole vocabulary; its variance is that of sampled tokens."
        + (" Off-policy that average serves as a control variate." if off_policy else ""),
    ]
    if off_policy:
        items.append(
            "Off-policy: completions come from the behavior policy of the rollouts, the targets from the policy of "
            "today. What a term leaves uncorrected of the difference counts as its bias."
        )
    return Section(title="What the numbers mean", items=items)


def _provenance(result: dict[str, Any]) -> Table:
    cost, data = result["cost"], result["data"]
    spent = (
        f"{cost['seconds']:.1f} s on {cost['device']}, {cost['dtype']}; {cost['tokens_through_both_models']:,} tokens "
        f"through both models, prompts included, without a backward pass; at most {cost['peak_memory_mib']:,} MiB"
    )
    return provenance(seed=str(data["seed"]), cost=spent)


def _heavy(row: Row) -> bool:
    return row["unseen"] is not None and row["unseen"] > HEAVY


def size(found: dict[str, float | None]) -> str:
    """A norm with two decimals; `<x` where it can't be told from 0, `0` where it is below 0.005."""
    value, low, high = found["value"], found["low"], found["high"]
    if value is None or low is None or high is None:
        return "–"
    if high < 0.005:
        return "0"
    return f"<{high:.2f}" if low <= 0 else f"{value:.2f}"


def distance(found: dict[str, float | None]) -> str:
    """A norm as `size` says it, with its interval where it can be told from 0."""
    said = size(found)
    return with_interval(found, fixed) if said[0].isdigit() and said != "0" else said


__all__ = ["audit_page", "kind", "size"]
