"""Compare runs with the published tables: mean and spread, published number, difference and verdict."""

import textwrap
from collections.abc import Iterable, Sequence
from statistics import fmean

import published
from inputs import UserError, printable
from options.flags import own_options
from report import detector_rows
from report.runs import USUAL_KD, Group, Run, by_data, group_labels, group_runs, one_a_seed
from report.statistics import mean_and_spread, prediction_halfwidth, same_noise_pool, significance_margin, values
from report.tables import Table, in_markdown

KD_WEIGHTS = (USUAL_KD["gamma"], USUAL_KD["alpha"])
TEACHER_TOLERANCE = 0.5  # points of accuracy; a teacher that differs by more makes it another experiment
REPORTS = {
    "last": "the last epoch",
    "best": "the best epoch",
    "mean": "a mean of trials, last or best epoch not stated",
    "unstated": "last or best epoch, not stated which",
}
RECIPE = (  # what two configurations must share, besides the data, for their difference to count as a gain
    "epochs", "batch_size", "learning_rate", "lr_decay_epochs", "lr_decay_rate", "momentum", "weight_decay",
    "train_subset", "image_size",
    # of detectors
    "iterations", "lr_steps", "warmup_iters", "clip_grad", "min_sizes", "max_size", "test_size", "keep_empty", "rois",
    "norm", "backbone", "trainable_layers",
)  # fmt: skip
# The values in every published protocol that does not list another one. DTKD's second KD weight, fixed_alpha, is not
# here, since it is part of the method. Published code uses PyTorch's default precision, which depends on its version
# and the GPU.
USUAL = {"precision": ("fp32", "tf32"), "kd_warmup": (0,), "sync_bn": (False,), "processes": (1,),
         "label_smoothing": (0.0,), "mixup": (0.0,), "cutmix": (0.0,)}  # fmt: skip
HEADING = [
    "pair", "method", "last", "best (on test)", "n", "published", "Δ last", "Δ best", "verdict", "teacher", "epochs",
]  # fmt: skip
GAIN_HEADING = ["pair", "method", "over", "gain last", "gain best (on test)", "n"]
EXPLANATION = (
    "Top-1 accuracy in percent, mean ± sample standard deviation over n seeds. last: after the last epoch. best: the"
    " best epoch of each run, selected on the test set, hence optimistic. Δ: mean minus published, where the protocol"
    " is the published one. Verdict: whether the published number lies outside the 95 % prediction interval of one more"
    " run, widened by the published standard deviation where there is one; `within noise (±1.00)` neither confirms nor"
    " excludes a smaller difference; one run tells nothing: `noise unknown (n = 1)`. Where it is not stated whether the"
    " last or the best epoch is published, the verdict may be `between last and best`. teacher: the teacher's own"
    " accuracy, measured before distilling."
)
GAIN_EXPLANATION = (
    "Gains: differences of means in the same recipe, over the student alone, over KD, and over the same distiller at"
    " the same weights, KD and distiller with a fixed temperature. `other weights`: the loss gives cross entropy and"
    " KD other weights, so the gain is not due to the method alone. ±: how large a difference may be by chance (95 %),"
    " if all configurations with the same student and epochs have the same standard deviation over seeds (Student's t"
    " with their pooled standard deviation). Gains over one baseline share its runs, and thus its luck; and of many"
    " differences that are only chance, one in twenty exceeds its ±. `noise unknown`: no configuration with the same"
    " student and epochs has seeds that differ."
)
LEGEND = "Top-1 in %: mean ± standard deviation of n seeds. Δ: mean - published. ± of gains: noise. More: --explain"
UNKNOWN = "noise unknown"


class Footnotes:
    """Numbered footnotes; the same text gets the same number."""

    def __init__(self, shown: bool = True) -> None:
        self.shown = shown
        self.numbers: dict[str, int] = {}  # by text

    def marked(self, cell: str, text: str) -> str:
        """Return a cell with the number of its footnote, such as `71.19 [1]`; unchanged if footnotes are not shown."""
        return f"{cell} [{self.numbers.setdefault(text, len(self.numbers) + 1)}]" if self.shown else cell

    def lines(self) -> list[str]:
        """Return the footnotes with their numbers."""
        return [f"[{number}] {text}" for text, number in self.numbers.items()]


def verdict(runs: Sequence[Run], record: published.Record) -> str:
    """Compare the accuracies of runs with a number published for the same protocol.

    Return `above`, `below`, `within noise (±1.00)`, or `noise unknown (n = 1)` for a single run. If the source
    does not state which epoch its number is from, last and best both count: `within noise` if either is, and `between
    last and best` if they lie on opposite sides.
    """
    reports = published.source(record)["reports"]
    counted = [values(runs, which) for which in ("last", "best") if reports in (which, "mean", "unstated")]
    if (n := min(map(len, counted))) < 2:
        return f"{UNKNOWN} (n = {n})"
    noise = [prediction_halfwidth(accuracies, record.get("std", 0.0)) for accuracies in counted]
    gaps = [fmean(accuracies) - record["top1"] for accuracies in counted]
    if any(abs(gap) <= halfwidth for gap, halfwidth in zip(gaps, noise, strict=True)):
        return f"within noise (±{max(noise):.2f})"
    if min(gaps) < 0 < max(gaps):
        return "between last and best"
    return "above" if gaps[0] > 0 else "below"


def differences(runs: Sequence[Run], record: published.Record) -> list[str]:
    """Return a phrase for each difference between runs and a published protocol, whose settings must be known."""
    found = []
    for name, theirs in published.settings(record).items():
        ours = runs[0].option(name)
        if ours != theirs:
            found.append(f"{name} {'not recorded' if ours is None else ours} instead of {theirs}")
    for name, usual in USUAL.items():
        ours = runs[0].option(name)
        if name not in published.settings(record) and ours not in (None, *usual):
            found.append(f"{name} {ours} instead of {usual[0]}")
    if runs[0].option("train_subset"):
        found.append(f"{runs[0].option('train_subset')} training images instead of all")
    if runs[0].option("init_sha256"):
        found.append("initial weights from a file instead of random ones")
    teachers = sorted({top1 for run in runs if (top1 := run.option("teacher_top1")) is not None})
    theirs = record.get("teacher_acc")
    if theirs and not teachers:
        found.append(f"a teacher of unmeasured accuracy instead of {theirs:.2f}")
    elif theirs and any(abs(top1 - theirs) > TEACHER_TOLERANCE for top1 in teachers):
        found.append(f"teacher of {', '.join(f'{top1:.2f}' for top1 in teachers)} instead of {theirs:.2f}")
    return found


def follows(runs: Group, record: published.Record) -> bool:
    """Return whether runs follow the protocol of a published number in full."""
    return bool(published.settings(record)) and not differences(runs, record)


def find_published(run: Run) -> list[published.Record]:
    """Return the published numbers for a run's configuration, the preferred one first."""
    distill, factor = run.option("distill"), run.option("simkd_factor")
    if distill == "sdd":
        distill = f"sdd-{run.option('sdd_loss')}"
    elif distill == "simkd" and factor != 2:
        distill = f"simkd (f={factor})"
    return published.lookup(
        run.dataset,
        run.option("teacher"),
        run.option("model"),
        distill,
        str(run.option("temperature")) + published.ON_Z_SCORES * bool(run.option("logit_stand")) + run.control,
        run.option("kd_T"),
        kd_term=bool(run.option("alpha")),
    )


def source_note(record: published.Record) -> str:
    """Return the footnote of a published number: its source and protocol."""
    source = published.source(record)
    text = f"{source['name']}: {REPORTS[source['reports']]}. KD term: {source['kd_term']}."
    text += f" Protocol: {source['protocol']}."
    if record["certainty"] != "certain":
        text += f" The number is {record['certainty']}."
    if "last" in record:
        text += f" The last epoch's is {record['last']:.2f}."
    return text + (f" Note: {record['note']}." if "note" in record else "")


def row(runs: Group, label: str, notes: Footnotes) -> list[str]:
    """Return the cells of one configuration, in the order of HEADING."""
    run, teacher = runs[0], runs[0].option("teacher_top1")
    accuracies = [mean_and_spread(values(runs, which)) for which in ("last", "best")]
    taught_by = "–" if teacher is None else f"{teacher:.2f}"
    compared = _compared(runs, notes)
    return [run.pair, label, *accuracies, str(len(runs)), *compared, taught_by, str(run.option("epochs"))]


def _compared(runs: Group, notes: Footnotes) -> list[str]:
    """Return the cells from `published` to `verdict`."""
    records = find_published(runs[0])
    if not records:
        return ["–", "–", "–", "none published"]
    record = next((record for record in records if follows(runs, record)), records[0])
    spread = f" ± {record['std']:.2f}" if "std" in record else ""
    about = "≈" if record["certainty"].startswith("approximate") else ""
    number = notes.marked(f"{about}{record['top1']:.2f}{spread}", source_note(record))
    if not published.settings(record):
        return [number, "–", "–", "protocol unknown"]
    if otherwise := differences(runs, record):
        return [number, "–", "–", notes.marked("other protocol", f"Own protocol: {'; '.join(otherwise)}.")]
    ours = [values(runs, which) for which in ("last", "best")]
    gaps = [f"{fmean(accuracies) - record['top1']:+.2f}" if accuracies else "–" for accuracies in ours]
    return [number, *gaps, verdict(runs, record)]


def is_fixed(run: Run) -> bool:
    """Return whether a run has one temperature for all samples and epochs."""
    return run.option("temperature") == "fixed" and not run.option("logit_stand") and not run.control


def is_baseline(run: Run) -> bool:
    """Return whether a run is plain KD with a fixed temperature."""
    return run.option("distill") == "kd" and is_fixed(run)


def order(run: Run) -> tuple[object, ...]:
    """Return the sort key of rows: data set, vanilla first, pair, epochs, KD first, fixed tau first, KD's weight."""
    method = not is_baseline(run), str(run.option("distill")), not is_fixed(run), run.method
    weight = run.option("alpha") or 0.0
    return str(run.dataset), run.option("distill") is not None, run.pair, run.epochs, *method, weight


def weights(run: Run) -> tuple[object, object]:
    """Return the weights of cross entropy and of KD at tau."""
    return run.option("gamma"), run.option("alpha")


def has_usual_weights(run: Run) -> bool:
    """Return whether a run has the weights of plain KD: 0.1 and 0.9, or for a detector 1 next to its own losses."""
    return run.option("alpha") == 1 if run.is_detector else weights(run) == KD_WEIGHTS


def kd_weight(run: Run) -> float:
    """Return the total weight of KD, at tau and at a fixed temperature."""
    return round((run.option("alpha") or 0.0) + (run.option("fixed_alpha") or 0.0), 9)


def recipe(run: Run) -> list[object]:
    """Return the settings, besides the data, that runs of a network must share to be comparable."""
    targets = [run.option(name) or 0.0 for name in ("label_smoothing", "mixup", "cutmix")]
    others = map(run.option, ("model", "init_sha256", *RECIPE))
    return [run.dataset, run.option("precision") or "fp32", *targets, *others]


def setting(run: Run) -> list[object]:
    """Return the settings that runs must share for a comparison of methods: the recipe and the teacher."""
    return [*recipe(run), *map(run.option, ("teacher", "teacher_sha256"))]


def on_its_data(runs: Sequence[Run], groups: Sequence[Group]) -> list[Group]:
    """Return the groups on the same data as `runs`; see `by_data`."""
    here = next(part for part in by_data([runs, *groups]) if runs in part)
    return [group for group in groups if group in here]


def rank(runs: Sequence[Run]) -> tuple[bool, bool, bool, int]:
    """Return the sort key of baselines, preferring the usual weights, no warm-up, and tau 4 (1 for detectors)."""
    run = runs[0]
    return has_usual_weights(run), not run.kd_warmup, run.option("kd_T") == (1 if run.is_detector else 4), len(runs)


def baselines(runs: Group, groups: Sequence[Group]) -> list[Group]:
    """Return a group's baselines in the same recipe.

    These are the student trained alone, and two losses at a fixed tau: KD with the usual weights or else the group's
    weights, and the group's distiller with the group's weights (the sum of the weights of KD at tau and at a fixed
    temperature must be equal). If there are several fixed temperatures, 4 is preferred (1 for detectors).
    """

    def method(run: Run) -> list[object]:
        own = own_options(run.option("distill"), None)
        return [*map(run.option, ("distill", "gamma", "beta", *own)), kd_weight(run), run.kd_warmup or 0]

    def comparable(other: Run) -> bool:
        usual = has_usual_weights(other) and not other.kd_warmup
        return usual or (weights(other) == weights(run) and other.kd_warmup == run.kd_warmup)

    run, chosen = runs[0], []
    alone = [group for group in groups if group[0].option("distill") is None and recipe(group[0]) == recipe(run)]
    fixed = [group for group in groups if is_fixed(group[0]) and setting(group[0]) == setting(run)]
    here = on_its_data(runs, fixed)
    for bases in (
        on_its_data(runs, alone),
        [group for group in here if is_baseline(group[0]) and comparable(group[0])],
        [group for group in here if not is_fixed(run) and method(group[0]) == method(run)],
    ):
        base = max(bases, key=rank, default=runs)
        if base not in (runs, *chosen):
            chosen.append(base)
    return chosen


def gain_rows(groups: Sequence[Group], labels: Sequence[str]) -> list[list[str]]:
    """Return the rows with the gains of every method over its baselines."""
    rows = []
    for runs, label in zip(groups, labels, strict=True):
        if runs[0].option("distill") is None:
            continue
        here = same_noise_pool(runs[0], groups)
        for base in baselines(runs, groups):
            other = (base[0].option("gamma"), kd_weight(base[0])) != (runs[0].option("gamma"), kd_weight(runs[0]))
            mark = " (other weights)" if other and base[0].option("distill") is not None else ""
            gains = [_gain(values(runs, which), values(base, which), here, which) for which in ("last", "best")]
            names = [runs[0].pair, label, labels[groups.index(base)] + mark]
            rows.append([*names, *gains, f"{len(runs)}, {len(base)}", str(runs[0].length)])
    return rows


def _gain(ours: Sequence[float], theirs: Sequence[float], pool: Sequence[Group], which: str) -> str:
    """Return the difference of two means, with its noise estimated from the seeds of `pool`."""
    if not ours or not theirs:
        return "–"
    noise = significance_margin(pool, which, len(ours), len(theirs))
    return f"{fmean(ours) - fmean(theirs):+.2f} " + (f"({UNKNOWN})" if noise is None else f"± {noise:.2f}")


def finished_groups(runs: Iterable[Run]) -> list[list[Run]]:
    """Return the configurations with finished runs, one run per seed, in the order of their rows."""
    groups = [one_a_seed(group) for group in group_runs(run for run in runs if run.finished)]
    return sorted(groups, key=lambda group: order(group[0]))


def tables_of(groups: Sequence[Group], labels: Sequence[str], notes: Footnotes) -> list[Table]:
    """Return the tables of one data set: results, gains if there are baselines, and published numbers for COCO."""
    run, labelled = groups[0][0], zip(groups, labels, strict=True)
    if run.is_detector:
        tables = [Table(detector_rows.HEADING, [detector_rows.detector_row(*each) for each in labelled])]
    else:
        tables = [Table(HEADING, [row(*each, notes) for each in labelled])]
    if gains := gain_rows(groups, labels):
        tables.append(Table([*GAIN_HEADING, run.unit], gains))
    models = list(dict.fromkeys(str(group[0].option("model")) for group in groups))
    if run.dataset == "coco" and (known := detector_rows.published_rows(models)):
        tables.append(Table(detector_rows.PUBLISHED_HEADING, known))
    return tables


def explanations(groups: Iterable[Group]) -> list[str]:
    """Return explanations of the tables' columns, except those of the gains."""
    kinds = sorted({group[0].is_detector for group in groups})
    texts = [detector_rows.EXPLANATION if is_detector else EXPLANATION for is_detector in kinds]
    return texts + [detector_rows.PUBLISHED_EXPLANATION] * any(group[0].dataset == "coco" for group in groups)


def report(runs: Sequence[Run], markdown: bool = False, explain: bool = False) -> str:
    """Return all tables as text; in Markdown or with `explain`, add explanations, footnotes and remarks on runs."""
    notes, lines, gains = Footnotes(shown=markdown or explain), [], False
    groups = finished_groups(runs)
    for dataset in dict.fromkeys(group[0].dataset for group in groups):
        here = [group for group in groups if group[0].dataset == dataset]
        tables = tables_of(here, group_labels(here), notes)
        gains = gains or any("over" in table.heading for table in tables)
        lines += [f"## {in_markdown(str(dataset))}" if markdown else str(dataset), ""]
        for table in tables:
            lines += [table.markdown() if markdown else table.text(), ""]
    texts = explanations(groups) + ([GAIN_EXPLANATION] if gains else [])
    remarked = notes.lines() + remarks(runs)
    if markdown:
        lines += [f"- {text}" for text in (*texts, *map(in_markdown, remarked))]
    elif explain or not groups:
        lines += [textwrap.fill(text, 110, subsequent_indent="    ") for text in (*texts, *remarked)]
    else:
        kinds = sorted({group[0].is_detector for group in groups})
        lines += [detector_rows.LEGEND if is_detector else LEGEND for is_detector in kinds]
        if unfinished := sum(not run.finished for run in runs):
            lines.append(f"Unfinished runs, not counted: {unfinished} (--explain lists them)")
    return "\n".join(lines) + "\n"


def remarks(runs: Sequence[Run]) -> list[str]:
    """Return a line for each unfinished run, and for each run with a damaged log."""
    unfinished = [
        f"unfinished ({run.epochs}/{run.option('epochs') or '?'} {'parts' if run.is_detector else 'epochs'}):"
        f" {run.label}, {printable(str(run.folder))}"
        for run in runs
        if not run.finished
    ]
    logs = [(printable(str(run.folder / "log.jsonl")), run.damaged) for run in runs if run.damaged]
    return unfinished + [f"left out of {log}: lines without a record, {count}" for log, count in logs]


def plotted(runs: Sequence[Run]) -> list[Run]:
    """Return the runs of one figure: those of one pair, and of its student alone.

    Raises:
        UserError: there are several pairs, or there is no epoch to draw.
    """
    runs = [run for run in runs if run.history]
    pairs = {(run.dataset, run.pair) for run in runs if run.option("distill") is not None}
    pairs = pairs or {(run.dataset, run.pair) for run in runs}
    if len(pairs) != 1:
        names = "; ".join(sorted(f"{pair} on {dataset}" for dataset, pair in pairs))
        raise UserError(f"--plot draws one pair, here are {len(pairs)} pairs ({names}): give folders of one")
    ((dataset, pair),) = pairs
    shown = (run for run in runs if run.dataset == dataset and run.pair in (pair, pair.split(" → ")[-1]))
    return sorted(shown, key=order)
