"""What each KL term's training comes to where the best policy is known: the share of it that is reached.

What:      trains a table of logits with every KL configuration, through TRL's GRPO, RLOO and PPO, through OpenRLHF's
           experience maker and actor, and in a bare loop at any length and with other frameworks' own functions; says
           how much of the best E[R] - beta KL each has reached, exactly: 0 is the reference, 1 the optimum
Hardware:  2 CPU cores, no GPU, no network once TRL 1.12 is there (for PPO; `make evidence` puts it there)
How long:  30 min on two idle cores; 2.5 min with --quick
Launch:    python recipes/known_optimum.py --quick
           python recipes/known_optimum.py --parts trl --seeds 2
           python recipes/known_optimum.py --docs docs

Writes a .jsonl per part and the pictures to --out (runs/known_optimum). Ends with exit status 1 if one of the
orderings that the documents rest on doesn't hold, by paired 95% intervals over seeds.
"""

import argparse
import importlib
import sys
from pathlib import Path

from evidence.intervals import Claim, Interval, judge, of, paired, select
from evidence.runs import run_all
from evidence.tables import markdown, show, write_section
from rich.console import Console

# Through real trainers, and by computation: name -> module of recipes/evidence.
TRAINERS = {"trl": "trl_trainers", "ppo": "ppo_trainer", "openrlhf": "openrlhf_trainer"}
COMPUTED: dict[str, str] = {}
PARTS = TRAINERS | COMPUTED


def run(names, args, console):
    """The rows of each part: one per arm, regime and seed."""
    rows = {}
    for name in names:
        part = importlib.import_module(f"evidence.{PARTS[name]}")
        jobs = [job for job in part.jobs(args.quick) if args.seeds is None or job.get("seed", 0) < args.seeds]
        missing = [path for path in getattr(part, "PATHS", ()) if not path.is_dir()]
        if jobs and missing:
            sys.exit(f"The part {name} needs TRL 1.12: pip install --no-deps --target {missing[0]} trl==1.12.0")
        found = run_all(
            jobs,
            part.work,
            out=args.out / f"{name.replace(' ', '_')}.jsonl",
            title=name,
            console=console,
            workers=args.jobs,
            paths=getattr(part, "PATHS", ()),
            resume=args.resume,
        )
        rows[name] = part.by_seed(found) if hasattr(part, "by_seed") else found
    return rows


def claims(rows):
    """The orderings that the documents rest on, by TRL's own trainers."""
    terminal, hackable = {"regime": "terminal reward"}, {"regime": "hackable reward"}
    sequence = "k1_in_reward, sequence, group_mean"
    k1 = of(rows, "share", arm="k1_as_loss", **terminal)
    found = {
        "k2_as_loss reaches more than k1_as_loss": paired(rows, "share", "k2_as_loss", "k1_as_loss", **terminal),
        "k1_as_loss ends below the reference": Interval(-k1.mean, k1.half),
        "k1_as_loss ends with more KL than no KL term at all": paired(rows, "kl", "k1_as_loss", "no KL", **terminal),
        "k3_as_loss drifts further than k2_as_loss where a rare exploit pays": paired(
            rows, "kl", "k3_as_loss", "k2_as_loss", **hackable
        ),
        "sequence credit (k1_in_reward) reaches more than token credit (k2_as_loss)": paired(
            rows, "share", sequence, "k2_as_loss", **terminal
        ),
    }
    return [Claim(says, difference) for says, difference in found.items()]


def arms_of(rows):
    """The arms of some rows, in the order of the jobs."""
    return list(dict.fromkeys(row["arm"] for row in rows))


def leaders(rows):
    """The arm with the largest mean share, and those that are tied with it: their paired difference has 0 in it."""
    best = max(arms_of(rows), key=lambda arm: of(rows, "share", arm=arm).mean)
    others = [arm for arm in arms_of(rows) if arm != best]
    return best, [arm for arm in others if (d := paired(rows, "share", best, arm)).low <= 0 or d.half == float("inf")]


def marked(text, arm, best, ties):
    """The best in bold, and what is tied with it called so."""
    return f"**{text}**" if arm == best else f"{text} (tie)" if arm in ties else text


def first_regime(rows):
    """The rows of the regime in which all arms are compared, which is the first."""
    return select(rows, regime=rows[0]["regime"])


def arm_table(rows):
    """Columns and rows of a table of one regime: what each arm came to."""
    best, ties = leaders(rows)
    lines = []
    for arm in arms_of(rows):
        reward, kl, share = (f"{of(rows, metric, arm=arm):.3f}" for metric in ("reward", "kl", "share"))
        lines.append([arm, reward, kl, marked(share, arm, best, ties)])
    return ("KL", "reward", "KL in nats", "share of the attainable"), lines


def regime_table(rows):
    """Columns and rows of a table of the other regimes: the share of each arm, best marked, ties called ties."""
    rows = [row for row in rows if row["regime"] != rows[0]["regime"]]
    arms, lines = arms_of(rows), []
    for regime in dict.fromkeys(row["regime"] for row in rows):
        here = select(rows, regime=regime)
        best, ties = leaders(here)
        shares = {arm: marked(f"{of(here, 'share', arm=arm):.3f}", arm, best, ties) for arm in arms_of(here)}
        lines.append([regime, *(shares.get(arm, "") for arm in arms)])
    return ("regime", *arms), lines


def sections(rows):
    """name of a section in docs/evidence.md -> its tables, each with a title, columns, rows and a sentence."""
    found = {"trainers": [], "regimes": []}
    for name in TRAINERS:
        here = rows.get(name)
        if here:
            found["trainers"].append((here[0]["regime"] + f" ({name})", *arm_table(first_regime(here)), ""))
            if len({row["regime"] for row in here}) > 1:
                found["regimes"].append((f"share of the attainable ({name})", *regime_table(here), ""))
    for name, module in COMPUTED.items():
        if rows.get(name):
            found[name] = importlib.import_module(f"evidence.{module}").sections(rows[name])
    return found


def draw(rows, path):
    """Shares of every arm in the first regime of each trainer, with 95% intervals; and share against length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    from kl_plugins.report.plots import COLOURS

    hosts = {name: first_regime(rows[name]) for name in TRAINERS if rows.get(name)}
    heights = [len(arms_of(here)) for here in hosts.values()]
    style = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999"}
    with plt.rc_context(style):
        figure, axes = plt.subplots(
            len(hosts), 1, figsize=(8.0, 1.2 + 0.3 * sum(heights) + 0.5 * len(hosts)), sharex=True, squeeze=False,
            layout="constrained", gridspec_kw={"height_ratios": heights},
        )  # fmt: skip
        for axis, (name, here) in zip(axes[:, 0], hosts.items(), strict=True):
            for place, arm in enumerate(arms_of(here)):
                value, own = of(here, "share", arm=arm), arm.startswith(("TRL's", "OpenRLHF's"))
                colour = COLOURS[6] if arm == "no KL" else COLOURS[1] if own else COLOURS[0]
                # An axis down to what ends far below the reference would hide all else.
                axis.barh(place, max(value.mean, LOWEST), color=colour, height=0.66)
                if value.mean > LOWEST:
                    axis.errorbar(value.mean, place, xerr=value.half, color="#111111", capsize=2.5, linewidth=1.2)
                axis.text(1.08, place, f"{value.mean:.3f}", va="center", fontsize=9, color="#222222")
            axis.set_yticks(range(len(arms_of(here))), arms_of(here))
            axis.invert_yaxis()
            axis.axvline(0.0, color="#999999", linewidth=0.8)
            axis.axvline(1.0, color="#999999", linewidth=0.8, linestyle=(0, (3, 2)))
            axis.set_title(f"{HOSTS[name]}, {here[0]['regime']}", loc="left", fontsize=10.5)
        axes[-1, 0].set_xlim(LOWEST, 1.28)
        axes[-1, 0].set_xlabel(
            "share of the attainable E[R] - beta KL: 0 the reference, 1 the optimum; mean, 95% interval"
        )
        kinds = {"the host's own": COLOURS[1], "kl_plugins": COLOURS[0], "no KL": COLOURS[6]}
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in kinds.values()]
        figure.legend(handles, kinds, loc="outside upper right", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
        plt.close(figure)
    return path


LOWEST = -0.5
HOSTS = {"trl": "TRL's GRPOTrainer and RLOOTrainer", "ppo": "TRL's PPOTrainer", "openrlhf": "OpenRLHF"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only what the orderings that are judged need")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--seeds", type=int, help="only so many of the seeds")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--resume", action="store_true", help="keep the runs that --out has, and do the others")
    parser.add_argument("--out", type=Path, default=Path("runs/known_optimum"))
    parser.add_argument("--docs", type=Path, help="folder of the documents: write tables and pictures there, too")
    args = parser.parse_args()
    console = Console()
    rows = run(args.parts, args, console)
    for name, tables in sections(rows).items():
        for title, columns, lines, sentence in tables:
            show(console, title, columns, lines)
            console.print(sentence)
        if args.docs and tables:
            text = [f"**{title}**\n\n{markdown(columns, lines)}\n\n{said}" for title, columns, lines, said in tables]
            write_section(args.docs / "evidence.md", f"known optimum: {name}", "\n\n".join(text))
    if any(rows.get(name) for name in TRAINERS):
        for folder in (args.out, *([args.docs / "images"] if args.docs else [])):
            console.print(f"picture  {draw(rows, folder / 'known_optimum.png')}", highlight=False)
    if rows.get("trl"):
        failed = judge(claims(rows["trl"]), console)
        if failed:
            sys.exit("These orderings don't hold: " + "; ".join(claim.says for claim in failed))


if __name__ == "__main__":
    main()
