"""Format average precisions as table rows: those of the runs, and those published for COCO."""

from collections.abc import Sequence

import published
from report.runs import Run
from report.statistics import mean_and_spread, values

AP_NAMES = {  # key in the logs: name
    "ap": "AP", "ap50": "AP50", "ap75": "AP75", "ap_small": "APs", "ap_medium": "APm", "ap_large": "APl",
}  # fmt: skip
FURTHER = {key: name for key, name in AP_NAMES.items() if key != "ap"}
HEADING = ["pair", "method", "AP last", "AP best (on test)", *FURTHER.values(), "n", "teacher", "steps"]
PUBLISHED_HEADING = ["pair", "method", *AP_NAMES.values(), "mark", "published by"]
PROTOCOL = (  # text of a run's protocol, filled in with its options
    "{dataset}, {iterations} steps of {batch_size} images, learning rate {learning_rate:g}, rising over {warmup_iters}"
    " steps, times {lr_decay_rate:g} after steps {lr_steps}, momentum {momentum:g}, weight decay {weight_decay:g},"
    " gradient {clip_grad}; short sides {min_sizes}, long side at most {max_size}, tested at {test_size}; {rois}"
    " proposals an image"
)
EXPLANATION = (
    "Detectors: average precision (AP) as COCO defines it, in percent, mean ± sample standard deviation over n seeds,"
    " after the last step; AP50 and AP75 at one IoU threshold; APs, APm and APl for small, medium and large objects."
    " best: the best evaluation of each run, selected on the test set, hence optimistic. teacher: the teacher's own AP,"
    " measured before distilling."
)
PUBLISHED_EXPLANATION = (
    "Published AP on COCO's val2017 is shown beside the runs and never compared with them: `mem` is from memory, `code`"
    " (a README or code) and `author` (an author's message) are of other protocols."
)
LEGEND = "AP in %, after the last step: mean ± standard deviation of n seeds. ± of gains: noise. More: --explain"


def detector_row(runs: Sequence[Run], label: str) -> list[str]:
    """Return the cells of one configuration, in the order of HEADING."""
    run, teacher = runs[0], runs[0].option("teacher_ap")
    cells = [run.pair, label, mean_and_spread(values(runs, "last")), mean_and_spread(values(runs, "best"))]
    for key in FURTHER:
        cells.append(mean_and_spread([each.history[-1][key] for each in runs if key in each.history[-1]]))
    return [*cells, str(len(runs)), "–" if teacher is None else f"{teacher:.2f}", str(run.length)]


def published_rows(models: Sequence[str]) -> list[list[str]]:
    """Return the published numbers of some detectors on COCO, alone and distilled, as rows for PUBLISHED_HEADING."""
    rows = []
    known = [record for record in published.coco()["rows"] if record["student"] in models]
    for record in sorted(known, key=lambda record: (models.index(record["student"]), "teacher" in record)):
        pair = f"{record['teacher']} → {record['student']}" if "teacher" in record else record["student"]
        digits = 2 if record["mark"] == "mem" else 1  # as published
        numbers = [f"{record[key]:.{digits}f}" if key in record else "–" for key in AP_NAMES]
        source = published.coco()["sources"][record["source"]]
        rows.append([pair, record["method"], *numbers, record["mark"], source])
    return rows
