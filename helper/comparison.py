"""Runs beside the published tables: mean and spread, the published number, difference and verdict."""

import math
import textwrap
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev

from scipy import stats

import published
from helper.errors import UserError
from helper.runs import OPTIONS_OF, Run, group_labels, group_runs, number, one_a_seed
from helper.tables import Table

CONFIDENCE = 0.95
KD_WEIGHTS = (0.1, 0.9)  # of cross entropy and KD, in the published tables of CIFAR-100
TEACHER_TOLERANCE = 0.5  # points of accuracy: further from the published teacher it is another experiment
REPORTS = {
    "last": "the last epoch",
    "best": "the best epoch",
    "mean": "a mean of trials, last or best epoch not stated",
    "unstated": "last or best epoch, not stated which",
}
RECIPE = (  # what two configurations must share for one to be a gain over the other
    "epochs", "batch_size", "learning_rate", "lr_decay_epochs", "lr_decay_rate", "momentum", "weight_decay",
    "train_subset", "image_size", "data_sha256", "teacher_sha256",
)  # fmt: skip
# What no published protocol has otherwise, but those that say so. (DTKD's second weight belongs to it.)
USUAL = {"precision": "fp32", "kd_warmup": 0, "sync_bn": False, "processes": 1}
HEADING = [
    "pair", "method", "teacher", "epochs", "n", "last", "best (on test)", "published", "Δ last", "Δ best", "verdict",
]  # fmt: skip
GAIN_HEADING = ["pair", "method", "epochs", "over", "n", "gain last", "p", "gain best (on test)", "p"]
EXPLANATION = (
    "Top-1 accuracy in percent, mean ± sample standard deviation over n seeds. teacher: the teacher's own, measured"
    " before distilling. last: after the last epoch."
    " best: the best epoch of each run, selected on the test set, hence optimistic. Δ: mean minus published."
    " Verdict: whether the published number lies outside the 95 % prediction interval of one more run."
)
GAIN_EXPLANATION = (
    "Gain over KD, and over the same distiller at the same weights, with a fixed temperature in the same recipe:"
    " difference of means; p of Welch's t-test."
)


class Notes:
    """Numbered footnotes; the same text gets the same number."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """The mark of a footnote: `[1]`."""
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


def values(runs: Sequence[Run], which: str) -> list[float]:
    """The `last` or `best` accuracies of runs, as far as they have them."""
    return [top1 for run in runs if (top1 := getattr(run, which)) is not None]


def deviation(accuracies: Sequence[float], top1: float, std: float = 0.0) -> int:
    """Where measured accuracies lie from a published one: 1 above it, -1 below it, 0 within the noise.

    The noise is the 95 % prediction interval of one more run, Student's t times s * sqrt(1 + 1/n), with the published
    standard deviation added in quadrature. Needs two accuracies or more.
    """
    n = len(accuracies)
    spread = math.hypot(stdev(accuracies) * math.sqrt(1 + 1 / n), std)
    difference = fmean(accuracies) - top1
    if abs(difference) <= stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * spread:
        return 0
    return 1 if difference > 0 else -1


def verdict(runs: Sequence[Run], record: published.Record) -> str:
    """`above`, `below` or `within noise` of a published number made by the same protocol; `one run` for one."""
    reports = published.source(record)["reports"]
    counted = [values(runs, which) for which in ("last", "best") if reports in (which, "mean", "unstated")]
    if min(map(len, counted)) < 2:
        return "one run"
    where = {deviation(accuracies, record["top1"], record.get("std", 0.0)) for accuracies in counted}
    return {1: "above", -1: "below"}.get(where.pop() if len(where) == 1 else 0, "within noise")


def differences(runs: Sequence[Run], record: published.Record) -> list[str]:
    """What runs of one configuration did otherwise than the published protocol, which must be known."""
    found = []
    for name, theirs in published.settings(record).items():
        ours = runs[0].option(name)
        if ours != theirs:
            found.append(f"{name} {'not recorded' if ours is None else ours} instead of {theirs}")
    for name, usual in USUAL.items():
        ours = runs[0].option(name)
        if name not in published.settings(record) and ours not in (None, usual):
            found.append(f"{name} {ours} instead of {usual}")
    if runs[0].option("train_subset"):
        found.append(f"{runs[0].option('train_subset')} training images instead of all")
    teachers = sorted({top1 for run in runs if (top1 := number(run.option("teacher_top1"))) is not None})
    theirs = record.get("teacher_acc")
    if theirs and not teachers:
        found.append(f"a teacher of unmeasured accuracy instead of {theirs:.2f}")
    elif theirs and any(abs(top1 - theirs) > TEACHER_TOLERANCE for top1 in teachers):
        found.append(f"teacher of {', '.join(f'{top1:.2f}' for top1 in teachers)} instead of {theirs:.2f}")
    return found


def find_published(run: Run) -> list[published.Record]:
    """The published numbers for a run's configuration, the preferred one first."""
    return published.lookup(
        run.dataset,
        run.option("teacher"),
        run.option("model"),
        run.option("distill"),
        str(run.option("temperature")) + published.ON_Z_SCORES * bool(run.option("logit_stand")),
        number(run.option("kd_T")),
        kd_term=bool(number(run.option("alpha"))),
    )


def source_note(record: published.Record) -> str:
    """The footnote of a published number: its source and protocol."""
    source = published.source(record)
    text = f"{source['name']}: {REPORTS[source['reports']]}. KD term: {source['kd_term']}."
    text += f" Protocol: {source['protocol']}."
    if record["certainty"] != "certain":
        text += f" The number is {record['certainty']}."
    return text + (f" Note: {record['note']}." if "note" in record else "")


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """`71.19 ± 0.12`; a dash for what there is not."""
    if not accuracies:
        return "–"
    return f"{fmean(accuracies):.2f} ± {f'{stdev(accuracies):.2f}' if len(accuracies) > 1 else '–'}"


def row(runs: Sequence[Run], label: str, notes: Notes) -> list[str]:
    """The cells of one configuration."""
    run, last, best = runs[0], values(runs, "last"), values(runs, "best")
    teacher = number(run.option("teacher_top1"))
    cells = [run.pair, label, "–" if teacher is None else f"{teacher:.2f}", str(run.option("epochs")), str(len(runs))]
    cells += [mean_and_spread(last), mean_and_spread(best)]
    records = find_published(run)
    if not records:
        return [*cells, "–", "–", "–", "none published"]
    same = (record for record in records if published.settings(record) and not differences(runs, record))
    record = next(same, records[0])
    spread = f" ± {record['std']:.2f}" if "std" in record else ""
    about = "≈" if record["certainty"].startswith("approximate") else ""
    cells.append(f"{about}{record['top1']:.2f}{spread} {notes.mark(source_note(record))}")
    cells += [f"{fmean(ours) - record['top1']:+.2f}" if ours else "–" for ours in (last, best)]
    if not published.settings(record):
        return [*cells, "protocol unknown"]
    if otherwise := differences(runs, record):
        return [*cells, f"other protocol {notes.mark('Own protocol: ' + '; '.join(otherwise) + '.')}"]
    return [*cells, verdict(runs, record)]


def welch(ours: Sequence[float], base: Sequence[float]) -> str:
    """The p-value of Welch's t-test; a dash where it is not defined."""
    if min(len(ours), len(base)) < 2 or not stdev(ours) + stdev(base):
        return "–"
    moments = (fmean(ours), stdev(ours), len(ours), fmean(base), stdev(base), len(base))
    return f"{stats.ttest_ind_from_stats(*moments, equal_var=False).pvalue:.2g}"


def is_fixed(run: Run) -> bool:
    """Whether a run has one temperature for all samples and epochs."""
    return run.option("temperature") == "fixed" and not run.option("logit_stand")


def is_baseline(run: Run) -> bool:
    """Whether a run is plain KD with a fixed temperature."""
    return run.option("distill") == "kd" and is_fixed(run)


def order(run: Run) -> tuple[object, ...]:
    """The place of a run's row: by data set, pair and length; KD first, and a fixed temperature before another; then by
    the weight of the KD term."""
    method = not is_baseline(run), str(run.option("distill")), not is_fixed(run), run.method
    weight = number(run.option("alpha")) or 0.0
    return str(run.dataset), run.pair, run.epochs, *method, weight


def baselines(runs: Sequence[Run], groups: Sequence[Sequence[Run]]) -> list[int]:
    """Which groups of the same pair and recipe a group is compared with: KD, and its own loss, at a fixed tau.

    KD has the weights 0.1 and 0.9, or else those of the group. Its own loss has the same distiller and the same
    weights; KD at tau and KD at a fixed temperature count together. Of several temperatures 4 is taken.
    """

    def setting(run: Run) -> list[object]:
        return [run.pair, *map(run.option, RECIPE)]

    def method(run: Run) -> list[object]:
        own = OPTIONS_OF.get(run.option("distill"), ())
        kd_weight = (number(run.option("alpha")) or 0) + (number(run.option("fixed_alpha")) or 0)
        told = [run.option(name) for name in ("distill", "gamma", "beta", *own)]
        return [*told, round(kd_weight, 9), run.option("kd_warmup") or 0]

    def weights(run: Run) -> tuple[object, object]:
        return run.option("gamma"), run.option("alpha")

    def rank(i: int) -> tuple[bool, bool, int]:
        return weights(groups[i][0]) == KD_WEIGHTS, groups[i][0].option("kd_T") == 4, len(groups[i])

    run, chosen = runs[0], []
    fixed = [i for i, (other, *_) in enumerate(groups) if is_fixed(other)]
    here = [i for i in fixed if setting(groups[i][0]) == setting(run)]
    for bases in (
        [i for i in here if is_baseline(groups[i][0]) and weights(groups[i][0]) in (KD_WEIGHTS, weights(run))],
        [i for i in here if not is_fixed(run) and method(groups[i][0]) == method(run)],
    ):
        if bases:
            chosen.append(max(bases, key=rank))
    return [i for i in dict.fromkeys(chosen) if groups[i] is not runs]


def gain_rows(groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> list[list[str]]:
    """What every method gains over its baselines."""
    rows = []
    for runs, label in zip(groups, labels, strict=True):
        for i in baselines(runs, groups):
            base = groups[i]
            cells = [runs[0].pair, label, str(runs[0].option("epochs")), labels[i], f"{len(runs)}, {len(base)}"]
            for which in ("last", "best"):
                ours, theirs = values(runs, which), values(base, which)
                cells += [f"{fmean(ours) - fmean(theirs):+.2f}" if ours and theirs else "–", welch(ours, theirs)]
            rows.append(cells)
    return rows


def finished_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """The configurations of which there are finished runs, one a seed, in the order of their rows."""
    groups = [one_a_seed(group) for group in group_runs(run for run in runs if run.finished)]
    return sorted(groups, key=lambda group: order(group[0]))


def tables_of(groups: Sequence[Sequence[Run]], labels: Sequence[str], notes: Notes) -> list[Table]:
    """The results of configurations of one data set, and where there is something to compare the gains."""
    results = Table(HEADING, [row(group, label, notes) for group, label in zip(groups, labels, strict=True)])
    gains = gain_rows(groups, labels)
    return [results] + ([Table(GAIN_HEADING, gains)] if gains else [])


def report(runs: Sequence[Run], markdown: bool = False) -> str:
    """All tables, footnotes and unfinished runs as a text."""
    notes, lines, gains = Notes(), [], False
    groups = finished_groups(runs)
    for dataset in dict.fromkeys(group[0].dataset for group in groups):
        here = [group for group in groups if group[0].dataset == dataset]
        tables = tables_of(here, group_labels(here), notes)
        gains = gains or len(tables) > 1
        lines += [f"## {dataset}" if markdown else str(dataset), ""]
        for table in tables:
            lines += [table.markdown() if markdown else table.text(), ""]
    texts = ([EXPLANATION] if groups else []) + ([GAIN_EXPLANATION] if gains else [])
    texts += [f"[{count}] {text}" for count, text in enumerate(notes.texts, 1)] + unfinished(runs)
    lines += [f"- {text}" if markdown else textwrap.fill(text, 110, subsequent_indent="    ") for text in texts]
    return "\n".join(lines) + "\n"


def unfinished(runs: Sequence[Run]) -> list[str]:
    """A line for each run that is not at its end."""
    return [
        f"unfinished ({run.epochs}/{run.option('epochs') or '?'} epochs): {run.label}, {run.folder}"
        for run in runs
        if not run.finished
    ]


def plotted(runs: Sequence[Run]) -> list[Run]:
    """The runs of one picture: those of one pair, and of its student alone.

    Raises:
        UserError: there are several pairs, or there is no epoch to draw.
    """
    runs = [run for run in runs if run.history]
    pairs = {(run.dataset, run.pair) for run in runs if run.option("distill") is not None}
    pairs = pairs or {(run.dataset, run.pair) for run in runs}
    if len(pairs) != 1:
        names = "; ".join(sorted(f"{pair} on {dataset}" for dataset, pair in pairs))
        raise UserError(f"--plot draws one pair, here are {len(pairs)} with an epoch ({names}): give folders of one")
    ((dataset, pair),) = pairs
    shown = (run for run in runs if run.dataset == dataset and run.pair in (pair, pair.split(" → ")[-1]))
    return sorted(shown, key=order)
