"""`kl-plugins curves`: what each KL term multiplies the score with, against the log-ratio.

The first figure of Liu et al., arXiv 2510.01555, computed by autograd from the functions themselves: ours, and those
of the hosts that can be imported. `matplotlib` is imported where it is used: it comes with the extra `plot`.
"""

from __future__ import annotations

import csv
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from kl_plugins.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    Term = Callable[[Tensor], Tensor]
    """A KL term per token, as a function of (1, N) log-ratios that are the log-probs of a live policy, too."""

# Where the curves are computed: first and last log-ratio (nats), number of points.
AROUND_0, FAR_BELOW = (-8.0, 13.0, 2101), (-96.0, 0.0, 1921)
OURS = (("k1_as_loss", "token"), ("k2_as_loss", "token"), ("k1_in_reward", "token"), ("k3_as_loss", "token"))


@dataclass(frozen=True, kw_only=True)
class Curve:
    """The coefficient of one term: d term / d log policy, at each log-ratio."""

    panel: str
    """`ours`, `hosts` or `float32`."""
    name: str
    how: str
    """The function that was run, or the formula that stands for it."""
    dtype: str
    """Of the inputs; OpenRLHF's function casts them to float32."""
    u: list[float]
    """Log-ratios log policy - log reference, in nats."""
    coefficient: list[float]
    zeros: list[tuple[float, float]]
    """Where it is exactly 0 although the policy has left the reference; ends at the last log-ratio computed."""


def curves(
    out: Annotated[Path, typer.Option(help="The picture: png, svg or pdf.")] = Path("curves.png"),
    data: Annotated[Path | None, typer.Option(help="The numbers, too: json or csv.")] = None,
    dark: Annotated[bool, typer.Option("--dark", help="For a dark page.")] = False,
) -> None:
    """Draw what each KL term multiplies the score grad log policy with, against the log-ratio.

    Ours and the hosts' own: where their gradient dies (value clamps), and where float32 loses it.
    """
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


def all_curves() -> tuple[list[Curve], list[str]]:
    """Every curve that can be computed here, and what was left out, with the reason."""
    import torch

    around, far = (torch.linspace(*where, dtype=torch.float64) for where in (AROUND_0, FAR_BELOW))
    found = [
        _curve("ours", name, f"kl_plugins.kl_terms, credit {credit}", our_term(name, credit), around)
        for name, credit in OURS
    ]
    trl, how = trl_term()
    plain, plain_how = trl_term(use_bias_correction_kl=False)
    found.append(_curve("hosts", "TRL GRPO", how, trl, around))
    found.append(_curve("hosts", "TRL GRPO, use_bias_correction_kl=False", plain_how, plain, around))
    estimators, left_out = openrlhf_terms()
    for name, term in estimators.items():
        found.append(_curve("hosts", f"OpenRLHF {name}", "openrlhf.models.utils.compute_approx_kl", term, around))
    ours = our_term("k2_as_loss", "token")
    found.append(_curve("float32", "TRL GRPO", how, trl, far.float()))
    found.append(_curve("float32", "k2_as_loss", "kl_plugins.kl_terms, credit token", ours, far.float()))
    return found, left_out


def our_term(name: str, credit: str) -> Term:
    """The term of `kl_terms`, every log-ratio a sequence of its own."""
    from kl_plugins.core.spec import KLSpec
    from kl_plugins.core.terms import kl_terms

    spec = KLSpec(name=name, credit=credit, allow_biased=True)

    def term(log_ratio: Tensor) -> Tensor:
        logp = log_ratio.T
        return kl_terms(spec, logp=logp, ref_logp=logp.new_zeros(logp.shape), mask=logp.new_ones(logp.shape)).loss

    return term


def trl_term(*, use_bias_correction_kl: bool = True) -> tuple[Term, str]:
    """TRL's, on-policy, and which: `GRPOTrainer._compute_loss` itself, run on a stub of a trainer, or its formula."""
    formula = "exp(-u) + u - 1" + (", times exp(logp - old logp)" if use_bias_correction_kl else "")

    def stated(log_ratio: Tensor) -> Tensor:
        k3 = (-log_ratio).exp() + log_ratio - 1
        return k3 * (log_ratio - log_ratio.detach()).exp() if use_bias_correction_kl else k3

    try:
        import torch
        import trl

        def term(log_ratio: Tensor) -> Tensor:
            return host_loss(trl.GRPOTrainer, log_ratio, use_bias_correction_kl=use_bias_correction_kl)

        term(torch.zeros(1, 1, requires_grad=True))
    except (ImportError, RuntimeError) as error:
        return stated, f"formula of TRL 1.16, not run: {formula} ({_first_line(error)})"
    except (AttributeError, KeyError, TypeError) as error:  # another TRL than the stub is a trainer of
        return stated, f"formula of TRL 1.16, not that of the installed {trl.__version__}: {formula} ({error!r})"
    return term, f"trl {trl.__version__}, GRPOTrainer._compute_loss, run"


def host_loss(
    trainer: type,
    logp: Tensor,
    *,
    ref_logp: Tensor | None = None,
    old_logp: Tensor | None = None,
    mask: Tensor | None = None,
    use_bias_correction_kl: bool = True,
    importance_sampling_level: str = "token",
    loss_type: str = "luspo",
    sampling_ratio: Tensor | None = None,
) -> Tensor:
    """The loss that `_compute_loss` of TRL's `GRPOTrainer` makes of (B, T) log-probs, with beta 1 and no advantages.

    With `loss_type="luspo"` it is the KL term summed over tokens and averaged over sequences. `ref_logp` defaults to
    0, `old_logp` to on-policy; `sampling_ratio` is that of the old policy to the vLLM engine. Everything around the
    loss (model, accelerator, logs) is a stub.
    """
    import torch

    ids = torch.zeros(logp.shape, dtype=torch.long)
    mask = torch.ones_like(ids) if mask is None else mask.long()
    same = {"gather": lambda x: x, "gather_for_metrics": lambda x: x, "reduce": lambda x, reduction: x}
    stub = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logp, torch.zeros_like(logp.detach()), None),
        accelerator=SimpleNamespace(num_processes=1, **same),
        args=SimpleNamespace(use_bias_correction_kl=use_bias_correction_kl, delta=None, steps_per_generation=1),
        beta=1.0,
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level,
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=sampling_ratio is not None,
        vllm_importance_sampling_correction=sampling_ratio is not None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        entropy_coef=0.0,
        use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=1,
        model=SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": ids,
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": logp.new_zeros(len(logp)),
        "ref_per_token_logps": torch.zeros_like(logp.detach()) if ref_logp is None else ref_logp,
    }
    if old_logp is not None:
        inputs["old_per_token_logps"] = old_logp
    if sampling_ratio is not None:
        inputs["importance_sampling_ratio"] = sampling_ratio
    loss: Tensor = trainer._compute_loss(stub, None, inputs)  # type: ignore[attr-defined]
    return loss


def openrlhf_terms() -> tuple[dict[str, Term], list[str]]:
    """OpenRLHF's own function, by what it is asked for; or none, and why."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from openrlhf.models.utils import compute_approx_kl
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        where = " (without a GPU put recipes/openrlhf_cpu on PYTHONPATH)" if "flash_attn" in str(error) else ""
        return {}, [f"OpenRLHF's curves are left out: it can't be imported, {_first_line(error)}{where}"]

    def asked(estimator: str, unbiased: bool) -> Term:
        return lambda logp: compute_approx_kl(
            logp, logp.new_zeros(logp.shape), logp.detach(), kl_estimator=estimator, unbiased_gradient=unbiased
        )

    return {"k2": asked("k2", False), "k3": asked("k3", False), "unbiased_gradient": asked("k3", True)}, []


def coefficients(term: Term, u: Tensor) -> Tensor:
    """(N,) d term / d log policy at each of the (N,) log-ratios `u`, by autograd in their dtype."""
    import torch

    live = u.detach().clone()[None].requires_grad_()
    return torch.autograd.grad(term(live).sum(), live)[0][0]


def exact_zeros(term: Term, u: Tensor) -> list[tuple[float, float]]:
    """Intervals of the log-ratio in which the coefficient is exactly 0; their ends are bisected, or those of `u`."""
    dead = ((coefficients(term, u) == 0) & (u.abs() > 1e-6)).tolist()  # next to 0, float32 rounds to 0 as well
    edges = [i for i in range(1, len(dead)) if dead[i] != dead[i - 1]]
    ends = [_bisected(term, float(u[i - 1]), float(u[i]), u.dtype) for i in edges]
    ends = ([float(u[0])] if dead[0] else []) + ends + ([float(u[-1])] if dead[-1] else [])
    return list(zip(ends[::2], ends[1::2], strict=True))


def _bisected(term: Term, low: float, high: float, dtype: Any) -> float:
    import torch

    def is_dead(u: float) -> bool:
        return bool(coefficients(term, torch.tensor([u], dtype=dtype)) == 0)

    starts_dead = is_dead(low)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if is_dead(middle) == starts_dead else (low, middle)
    return low if starts_dead else high


def _curve(panel: str, name: str, how: str, term: Term, u: Tensor) -> Curve:
    return Curve(
        panel=panel,
        name=name,
        how=how,
        dtype=str(u.dtype).removeprefix("torch."),
        u=u.tolist(),
        coefficient=coefficients(term, u).tolist(),
        zeros=exact_zeros(term, u),
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def write(found: Sequence[Curve], path: Path) -> None:
    """The numbers, as JSON (one object a curve; a number that isn't finite is null) or CSV (one row a point)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        rows = [asdict(curve) for curve in found]
        for row in rows:
            row["coefficient"] = [value if math.isfinite(value) else None for value in row["coefficient"]]
        path.write_text(json.dumps(rows) + "\n")
        return
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("panel", "curve", "how", "dtype", "u", "coefficient"))
        for curve in found:
            for u, value in zip(curve.u, curve.coefficient, strict=True):
                table.writerow((curve.panel, curve.name, curve.how, curve.dtype, u, value))


def _check_paths(out: Path, data: Path | None) -> None:
    if out.suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"--out {out}: a picture ends in .png, .svg or .pdf")
    if data is not None and data.suffix not in (".json", ".csv"):
        raise ConfigError(f"--data {data}: the numbers end in .json or .csv")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ConfigError("drawing needs matplotlib, which isn't installed: pip install 'kl_plugins[plot]'") from error


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """How a curve is drawn, and where its label stands (in data coordinates)."""

    colour: str
    line: Any = "-"
    width: float = 2.2
    ink: str = ""
    """Colour of the label, if it isn't the line's."""
    says: str
    at: tuple[float, float]


# Colour-blind safe (Okabe and Ito), and far enough from the page to be read as text; `sky` is for dashes on `blue`.
_LIGHT = {"blue": "#0072B2", "orange": "#C24E00", "green": "#00795A", "purple": "#A14A80", "sky": "#A5DAF8"}
_DARK = {"blue": "#3D9BE0", "orange": "#F0914A", "green": "#2FC79A", "purple": "#E39AC4", "sky": "#D6EEFF"}
_LIGHT |= {"page": "#FFFFFF", "text": "#222222", "soft": "#555555", "grid": "#E8E8E8", "frame": "#999999"}
_DARK |= {"page": "#0D1117", "text": "#E6EDF3", "soft": "#A9B4BF", "grid": "#232A33", "frame": "#6B7580"}

_DASHES, _DOTS = (0, (3, 3)), (0, (1, 1.2))
_DRAWN = {
    ("ours", "k1_as_loss"): _Drawn(
        colour="orange", says="k1 as loss: always 1,\nan expected gradient of 0", at=(-7.7, 1.5)
    ),
    ("ours", "k2_as_loss"): _Drawn(colour="blue", width=3, says="k2 as loss: u", at=(4.8, 3.7)),
    ("ours", "k1_in_reward"): _Drawn(
        colour="sky", line=_DASHES, ink="blue", says="k1 in reward (dashes): u", at=(4.8, 2.5)
    ),
    ("ours", "k3_as_loss"): _Drawn(colour="green", says="k3 as loss: 1 - exp(-u)", at=(-2.0, -9.0)),
    ("hosts", "TRL GRPO"): _Drawn(colour="blue", width=3, says="TRL GRPO: u", at=(5.0, 4.1)),
    ("hosts", "OpenRLHF unbiased_gradient"): _Drawn(
        colour="sky", line=_DASHES, ink="blue", says="OpenRLHF with unbiased\ngradient (dashes): u", at=(4.8, 1.6)
    ),
    ("hosts", "TRL GRPO, use_bias_correction_kl=False"): _Drawn(
        colour="green", says="TRL GRPO without its\nbias correction: 1 - exp(-u)", at=(-1.6, -10.4)
    ),
    ("hosts", "OpenRLHF k2"): _Drawn(
        colour="orange", width=3.6, says="OpenRLHF k2: exactly 0\nbelow {0:.2f}, above {1:.2f}", at=(4.8, -2.9)
    ),
    ("hosts", "OpenRLHF k3"): _Drawn(
        colour="purple",
        line=_DOTS,
        width=3.6,
        says="OpenRLHF k3:\nexactly 0 below {0:.2f},\nabove {1:.2f}",
        at=(-7.7, 1.0),
    ),
    ("float32", "TRL GRPO"): _Drawn(colour="orange", says="TRL GRPO: exp(-u) has rounded u away", at=(-85.5, 6)),
    ("float32", "k2_as_loss"): _Drawn(colour="blue", width=3, says="k2_as_loss of kl_plugins: u", at=(-58, -74)),
}
_PANELS = {
    "ours": ("What the names mean", (-8, 13), (-14, 9), 4),
    "hosts": ("What hosts ship, on-policy", (-8, 13), (-14, 9), 4),
    "float32": ("What float32 leaves of it, far below the reference", (-96, 2), (-104, 22), 20),
}


def plot(found: Sequence[Curve], path: Path, *, dark: bool = False) -> Path:
    """Draw the three panels; returns `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    theme = _DARK if dark else _LIGHT
    style: Any = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme["frame"],
        "axes.facecolor": theme["page"],
        "figure.facecolor": theme["page"],
        "text.color": theme["text"],
        "svg.fonttype": "none",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic(
            [["ours", "hosts"], ["float32", "float32"]],
            figsize=(10, 7.4),
            height_ratios=(3, 2),
            layout="constrained",
        )
        for panel, axis in axes.items():
            _draw(axis, panel, [curve for curve in found if curve.panel == panel], theme)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


def _draw(axis: Any, panel: str, found: Sequence[Curve], theme: dict[str, str]) -> None:
    from matplotlib.ticker import MultipleLocator

    title, xlim, ylim, ticks = _PANELS[panel]
    axis.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=theme["text"])
    axis.set_xlabel("u = log policy - log reference, of a token (nats)", color=theme["soft"])
    if panel != "hosts":
        axis.set_ylabel("coefficient of grad log policy", color=theme["soft"])
    axis.set_xlim(*xlim)
    axis.set_ylim(*ylim)
    axis.xaxis.set_major_locator(MultipleLocator(ticks))
    axis.yaxis.set_major_locator(MultipleLocator(2 * ticks if panel == "float32" else ticks))
    axis.grid(color=theme["grid"], linewidth=0.8)
    axis.axhline(0, color=theme["frame"], linewidth=0.8)
    axis.set_axisbelow(True)
    axis.tick_params(colors=theme["soft"], length=3)
    for curve in found:
        drawn = _DRAWN[panel, curve.name]
        colour = theme[drawn.colour]
        style = {"color": colour, "linestyle": drawn.line, "linewidth": drawn.width}
        for u, values in _pieces(curve):
            axis.plot(u, values, **style, solid_capstyle="butt", dash_capstyle="butt")
        ink = theme[drawn.ink or drawn.colour]
        says = drawn.says.format(curve.zeros[0][1], curve.zeros[-1][0]) if "{" in drawn.says else drawn.says
        says += "\n(its formula, not run)" if curve.how.startswith("formula") else ""
        axis.text(*drawn.at, says, color=ink, fontsize=9.5, linespacing=1.2)
        for low, high in curve.zeros:
            axis.axvspan(low, high, color=colour, alpha=0.09, linewidth=0)
        if panel == "float32":
            _annotate_float32(axis, curve, ink)


def _annotate_float32(axis: Any, curve: Curve, ink: str) -> None:
    """Where it is NaN, exactly 0 and furthest off."""
    lost = [u for u, value in zip(curve.u, curve.coefficient, strict=True) if not math.isfinite(value)]
    if lost:
        axis.axvspan(min(lost), max(lost), color=ink, alpha=0.3, linewidth=0)
        axis.text(sum(lost) / len(lost), -52, "NaN", color=ink, ha="center", fontsize=9.5, fontweight="bold")
    for low, high in curve.zeros:
        axis.text(
            (low + high) / 2, -16, f"exactly 0 from {high:.1f} to {low:.1f}", color=ink, ha="center", fontsize=9.5
        )
    off = max(
        ((u, value) for u, value in zip(curve.u, curve.coefficient, strict=True) if math.isfinite(value) and value),
        key=lambda point: abs(point[1] - point[0]),
    )
    if abs(off[1] - off[0]) > 1:
        axis.text(off[0] + 1, off[1] - 9, f"{off[1]:.0f} at u = {off[0]:.1f}", color=ink, fontsize=9.5)


def _pieces(curve: Curve) -> Iterator[tuple[list[float], list[float]]]:
    """The curve, broken where it jumps to 0 and where it isn't finite."""
    u: list[float] = []
    values: list[float] = []
    for x, y in zip(curve.u, curve.coefficient, strict=True):
        jumps = bool(values) and (y == 0) != (values[-1] == 0) and abs(y - values[-1]) > 0.5
        if (jumps or not math.isfinite(y)) and u:
            yield u, values
            u, values = [], []
        if math.isfinite(y):
            u.append(x)
            values.append(y)
    if u:
        yield u, values


__all__ = ["Curve", "all_curves", "coefficients", "curves", "exact_zeros", "host_loss", "plot", "write"]
