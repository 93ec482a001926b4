"""Reward hacking: which KL term keeps a policy from exploiting a reward, through TRL's own trainers.

What:      trains the tiny math model on a reward that pays 1 for the right answer and 2 for an exploit that the
           reference almost never writes, with each KL term and from several seeds; then measures, alike for all,
           right answers, hacks, KL and the objective J = E[reward] - beta KL, against the best J in closed form.
Hardware:  2 CPU cores, no GPU, no network; transformers and vLLM rollouts
How long:  28 min; --quick 2.5 min, which trains five arms without vLLM
Launch:    python recipes/reward_hacking.py [--quick] [--parts front sequence reuse] [--seeds 5] [--docs docs]

Prints tables, and claims judged by 95% intervals of differences that are paired by seed. Ends with exit status 1 if a
claim of --quick does not hold. Every result goes to runs.jsonl below --out, with a picture beside it; --docs FOLDER
puts the tables into evidence.md there and the picture into its images.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from evidence import hack_picture, hack_runs
from evidence.hack_task import optimum
from evidence.intervals import Claim, interval, judge, of, paired, select
from evidence.runs import run_all
from evidence.tables import markdown, show, write_section
from rich.console import Console

HERE = Path(__file__).parent
METRICS = {"right": ".3f", "hacks": ".3f", "kl": ".2f", "J": ".3f", "median_norm": ".2f", "largest_norm": ".1f"}
COLUMNS = ("right answers", "hacks", "KL, nats", "J", "gradient norm, median", "largest")


def make_models(parts):
    """The math models that the parts start from, each of them once."""
    for part in parts:
        folder = hack_runs.model_folder(part)
        if not (folder / "warmup.json").is_file():
            target = ["--target", str(hack_runs.PARTS[part].warmed_up_to)]
            subprocess.run([sys.executable, HERE / "make_math_model.py", "--out", folder, *target], check=True)


def lines(rows, best):
    """The table of a part: a line for each beta, host and arm, and for each beta the reference and the optimum."""
    found = []
    for beta in dict.fromkeys(row["beta"] for row in rows):
        here = select(rows, beta=beta)
        for name in ("reference", "optimum"):
            cells = [format(best[beta][name][m], form) if m in best[beta][name] else "" for m, form in METRICS.items()]
            found.append([f"{beta:g}", "", name, *cells])
        for host, arm in dict.fromkeys((row["host"], row["arm"]) for row in here):
            cells = [format(of(here, metric, host=host, arm=arm), form) for metric, form in METRICS.items()]
            found.append([f"{beta:g}", host, arm, *cells])
    return found


def differences(rows, pairs):
    """Paired by seed: what the first arm of a pair has more than the second; a tie is called one."""
    found = []
    for more, less in pairs:
        cells = []
        for metric in ("right", "hacks", "kl", "J"):
            found_more = paired(rows, metric, more, less)
            tie = " (tie)" if found_more.low <= 0 <= found_more.high else ""
            cells.append(f"{found_more.mean:+.3f} ± {found_more.half:.3f}{tie}")
        found.append([f"{more} less {less}", *cells])
    return found


def claims(rows):
    """What the front has to show, of rows of one host and beta."""

    def less_half(metric):  # of what a run without a KL comes to
        with_k1, without = ({r["seed"]: r[metric] for r in select(rows, arm=arm)} for arm in ("k1_as_loss", "no KL"))
        return interval(with_k1[seed] - without[seed] / 2 for seed in with_k1)

    return [
        Claim("k1 as loss doesn't regularize: more than half of the hacks of no KL", less_half("hacks")),
        Claim("k1 as loss doesn't regularize: more than half of the KL of no KL", less_half("kl")),
        Claim("k3 as loss drifts further than k2: more hacks", paired(rows, "hacks", "k3_as_loss", "k2_as_loss")),
        Claim("k3 as loss drifts further than k2: more KL", paired(rows, "kl", "k3_as_loss", "k2_as_loss")),
        Claim("token credit hacks more than the sequence's", paired(rows, "hacks", "k2_as_loss", "reverse_kl")),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="five arms of the first part; a failed claim is an error")
    parser.add_argument("--parts", nargs="+", default=list(hack_runs.PARTS), choices=list(hack_runs.PARTS))
    parser.add_argument("--seeds", type=int, help="runs of each arm (5; with --quick 3)")
    parser.add_argument("--steps", type=int, help="updates of each run (each part has its own)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--out", type=Path, default=Path("runs/reward_hacking"))
    parser.add_argument("--docs", type=Path, help="the folder of evidence.md: write tables and picture there")
    parser.add_argument("--resume", action="store_true", help="keep the results that --out has")
    args = parser.parse_args()
    console = Console()
    parts = ["front"] if args.quick else args.parts
    make_models(parts)
    rows = run_all(
        hack_runs.jobs(args.quick, parts, args.seeds, args.steps),
        hack_runs.work,
        out=args.out / "runs.jsonl",
        title="Reward hacking",
        console=console,
        workers=args.jobs,
        resume=args.resume,
    )
    best = {}
    for name in parts:
        part, here = hack_runs.PARTS[name], select(rows, part=name)
        best[name] = hack_runs.bounds(name, {row["beta"] for row in here})
        console.rule(part.title)
        cells = lines(here, best[name])
        show(console, None, ("beta", "trainer", "KL term", *COLUMNS), cells, left=3)
        main_rows = select(here, host="GRPO", beta=part.betas[0])
        compared = [pair for pair in part.pairs if set(pair) <= {row["arm"] for row in main_rows}]
        pairs = differences(main_rows, compared)
        show(console, f"Paired by seed, beta {part.betas[0]:g}, GRPO", ("", *COLUMNS[:4]), pairs)
        if args.docs:
            text = markdown(("beta", "trainer", "KL term", *COLUMNS), cells, left=3)
            text += f"\n\nPaired by seed, beta {part.betas[0]:g}, GRPO:\n\n" + markdown(("", *COLUMNS[:4]), pairs)
            write_section(args.docs / "evidence.md", f"reward hacking: {name}", text)
    if "front" not in parts:
        return
    picture = args.docs / "images" / "reward_hacking.png" if args.docs else args.out / "reward_hacking.png"
    front = select(rows, part="front")
    beta = hack_runs.PARTS["front"].betas[0]
    hack_picture.draw(front, lambda beta: optimum(hack_runs.load_task("front"), beta), beta, picture)
    console.print(f"picture  {picture}", highlight=False)
    failed = judge(claims(select(front, host="GRPO", beta=beta)), console)
    if failed and (args.quick or any(claim.verdict == "contradicted" for claim in failed)):
        sys.exit(f"{len(failed)} of the claims above did not hold: has a KL term changed?")


if __name__ == "__main__":
    main()
