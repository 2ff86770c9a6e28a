"""The ablation behind the `default` recurrence's edge: one finetuning for each configuration and window, on validation
books, all of them without pointers.

    python scripts/ablate.py                                # runs what is not recorded yet, then prints the tables
    python scripts/ablate.py --windows 128 --only "last 32" "last 16"
    python scripts/ablate.py --table                        # prints the tables of docs/ablation.json

Every configuration reads the same training windows in the same order for the same steps. `none` is the disjoint
control; its overlapping reading is the goal. The measure is the part of the way from disjoint to overlap that the
recurrent reading covers, with a bootstrap interval over the books. What each run found is recorded in one small file,
so that the script can be stopped and started again, by somebody else too; to measure anew, give another --record.
"""

import argparse
from pathlib import Path

import numpy as np

from recur_gpt2.budget.runs import Record, finetuned
from recur_gpt2.evaluation.evaluate import share_covered_interval

# Flags of `recur-gpt2 finetune` beside the window. `default` is what the preset gives.
CONFIGURATIONS = {
    "none": "--recurrence none",
    "default": "",
    "yoshida2020": "--recurrence yoshida2020",
    "yoshida2020, 8 slots": "--recurrence yoshida2020 --pooled-slots 8",
    "last 1": "--last-slots 1",
    "last 4": "--last-slots 4",
    "last 8": "--last-slots 8",
    "last 16": "--last-slots 16",
    "last 32": "--last-slots 32",
    "last 64": "--last-slots 64",
    "last 128": "--last-slots 128",
    "last 32, no sink": "--last-slots 32 --sink-slots 0",
    "last 32, layer 3 only": "--last-slots 32 --insert-layers 3",
    "last 32, layers 2-5": "--last-slots 32 --insert-layers 2 3 4 5",
    "pooled 1": "--last-slots 0 --pooled-slots 1",
    "pooled 8": "--last-slots 0 --pooled-slots 8",
    "last 24, pooled 8": "--last-slots 24 --pooled-slots 8",
    "default, bptt 1": "--bptt 1",
    "default, bptt 2": "--bptt 2",
    "default, bptt 8": "--bptt 8",
    "default, lr 1e-5": "--lr 1e-5",
    "default, lr 1e-4": "--lr 1e-4",
    "default, recurrence lr 1e-3": "--recurrence-lr 1e-3",
    "default, recurrence lr 1e-2": "--recurrence-lr 1e-2",
    "none, 360 steps": "--recurrence none --steps 360",
    "default, 360 steps": "--steps 360",
}
TOKENS_PER_STEP = 8192
MOST_LANES = 16  # the sample has 21 training books
READINGS = ["recurrent_overlap", "recurrent_shuffled", "recurrent_zeroed"]
MORE_ROWS = {"none": READINGS[:1], "none, 360 steps": READINGS[:1], "default": READINGS, "yoshida2020": READINGS}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--record", type=Path, default=Path("docs/ablation.json"), help="what each run found")
    parser.add_argument("--windows", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), help="configurations (default: all)")
    parser.add_argument("--steps", type=int, default=120, help="of 8,192 tokens")
    parser.add_argument("--eval-tokens", type=int, default=147456, help="of the validation books")
    parser.add_argument("--table", action="store_true", help="print the tables of what is recorded, and run nothing")
    args = parser.parse_args()
    record = Record(args.record)
    for window in args.windows:
        found = record.at(str(window))
        for name in [] if args.table else args.only or CONFIGURATIONS:
            if last_slots(name) <= window:
                record.once(found, name, lambda name=name, window=window: findings(run(args, window, name)))
        print(table(window, found), flush=True)


def last_slots(name):
    flags = CONFIGURATIONS[name].split()
    return int(flags[flags.index("--last-slots") + 1]) if "--last-slots" in flags else 0


def run(args, window, name):
    """Finetune and evaluate -> the results."""
    folder = args.output / f"w{window}" / name.replace(" ", "-").replace(",", "")
    flags = CONFIGURATIONS[name].split()
    bptt = int(flags[flags.index("--bptt") + 1]) if "--bptt" in flags else 4
    segments = TOKENS_PER_STEP // window // bptt
    lanes = min(segments, MOST_LANES)
    command = ["--window", str(window), "--lanes", str(lanes), "--accumulate", str(segments // lanes)]
    command += ["--steps", str(args.steps), "--eval-split", "validation", "--eval-tokens", str(args.eval_tokens)]
    command += ["--pointer-slots", "0", "--no-control", "--rows", "recurrent", *MORE_ROWS.get(name, []), *flags]
    return finetuned(folder, command)


def findings(results):
    """What the tables need: nats, the summed loss of each book, and FLOPs."""
    rows = {
        row["name"]: {"nats": row["nats"], "mflops": row["flops_per_token"] / 1e6, "books": [round(x, 3) for x in sums]}
        for row in results["rows"]
        for sums in [results["loss_by_document"][row["name"]]]
    }
    return rows


def table(window, found):
    """A Markdown table of every configuration that is recorded at this window."""
    lines = [
        f"Window {window}",
        "",
        "| configuration | nats | of the way | 95% interval | MFLOPs | shuffled | zeroed |",
    ]
    lines.append("|---|---|---|---|---|---|---|")
    for name in filter(found.get, CONFIGURATIONS):
        control = "none, 360 steps" if "360 steps" in name else "none"
        lines.append(line(name, found[name], found.get(control), name == control))
    return "\n".join(lines) + "\n"


def line(name, rows, control, is_control):
    recurrent = rows["recurrent"]
    if is_control:
        name += f" (overlapping: {rows['recurrent_overlap']['nats']:.4f})"
    cells = [name, f"{recurrent['nats']:.4f}"]
    if control is None or is_control:
        cells += ["", ""]
    else:
        value, low, high = share_covered(recurrent["books"], control)
        cells += [f"{value:.0%}", f"{low:.0%} to {high:.0%}"]
    cells.append(f"{recurrent['mflops']:.2f}")
    cells += [f"{rows[row]['nats']:.4f}" if row in rows else "" for row in ("recurrent_shuffled", "recurrent_zeroed")]
    return "| " + " | ".join(cells) + " |"


def share_covered(recurrent, control):
    """(value, low, high) of (disjoint - recurrent) / (disjoint - overlap), resampling books."""
    disjoint, overlap = (np.array(control[row]["books"]) for row in ("recurrent", "recurrent_overlap"))
    recurrent = np.array(recurrent)
    value = (disjoint - recurrent).sum() / (disjoint - overlap).sum()
    return float(value), *share_covered_interval(disjoint, overlap, recurrent)


if __name__ == "__main__":
    main()
