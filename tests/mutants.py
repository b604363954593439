"""Check that the tests notice faults: insert one at a time into a copy of the project and run the related tests.

    python tests/mutants.py
    python tests/mutants.py best reversal

A fault that no test notices is a gap in the tests. This is not part of the test suite: it takes minutes.
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutant(NamedTuple):
    """A fault that replaces `old` by `new`, and the files in tests/ that must fail because of it."""

    file: str
    old: str
    new: str
    tests: str


MUTANTS = {
    "reversal": Mutant("temperature/ctkd.py", "return -lambda_ * gradient", "return lambda_ * gradient",
                       "golden/test_losses.py unit/test_temperature.py"),
    "tau squared": Mutant("temperature/base.py", "return self.student * self.teacher if self.scale is None",
                          "return torch.ones_like(self.student) if self.scale is None", "golden/test_losses.py"),
    "lambda late": Mutant("temperature/ctkd.py", "curriculum_lambda(epoch, *self.schedule)",
                          "curriculum_lambda(epoch - 1, *self.schedule)", "unit/test_temperature.py"),
    "no decay of tau": Mutant("helper/trainer.py", "for parameter in module.parameters() if parameter.requires_grad]",
                              "for parameter in module.parameters() if parameter.requires_grad and parameter.dim()]",
                              "unit/test_step.py"),
    "mirrored crop": Mutant("dataset/memory.py", "[row + column, row + column.flip(0)]",
                            "[row + column.flip(0), row + column]", "unit/test_dataset.py"),
    "mean and std": Mutant("dataset/base.py", ".sub_(self.mean).div_(self.std)", ".sub_(self.std).div_(self.mean)",
                           "unit/test_dataset.py"),
    "mean of CIFAR": Mutant("dataset/cifar.py", "mean=(0.5071, 0.4867, 0.4408)", "mean=(0.4914, 0.4822, 0.4465)",
                            "unit/test_dataset.py"),
    "mirrored boxes": Mutant("dataset/coco.py", "[width - right, top, width - left, bottom]",
                             "[width - left, top, width - right, bottom]", "unit/test_coco.py"),
    "crowds": Mutant("dataset/annotations.py", "kept = (~is_crowd & ~is_empty)", "kept = (~is_empty)",
                     "unit/test_coco.py"),
    "ddof": Mutant("report/statistics.py", "from statistics import fmean, stdev, variance",
                   "from statistics import fmean, pstdev as stdev, variance", "unit/test_compare.py"),
    "ddof of z-scores": Mutant("temperature/standardised.py", "logits.std(1, keepdim=True)",
                               "logits.std(1, correction=0, keepdim=True)", "unit/test_temperature.py"),
    "DTKD's x and y": Mutant("temperature/dtkd.py", "2 * tau * y / (x + y)", "2 * tau * x / (x + y)",
                             "unit/test_temperature.py"),
    "SimKD's target": Mutant("distiller_zoo/simkd.py", "teacher.last_map)}", "teacher.features[-2])}",
                             "unit/test_distillers.py unit/test_composite.py"),
    "complementary regions": Mutant("distiller_zoo/sdd.py", "is_right != is_right[:1]", "is_right == is_right[:1]",
                                    "golden/test_composite_losses.py unit/test_composite.py"),
    "last batch": Mutant("helper/loops.py", "for batch in tqdm(loader, description,",
                         "for batch in tqdm(list(loader)[:-1], description,", "unit/test_step.py"),
    "random state": Mutant("helper/run_folder.py", "torch.set_rng_state(state[\"rng_cpu\"])", "pass",
                           "unit/test_resume.py"),
    "border": Mutant("helper/first_stage.py", "self.main_optimizer if is_last else self.optimizer", "self.optimizer",
                     "unit/test_two_stage.py"),
    "best": Mutant("helper/run_folder.py", "record[self.score] > max(", "record[self.score] < max(",
                   "unit/test_resume.py"),
    "best always": Mutant("helper/run_folder.py", "record[self.score] > max(", "record[self.score] or max(",
                          "unit/test_resume.py"),
}  # fmt: skip


def is_noticed(mutant: Mutant) -> bool:
    """Return whether the tests fail with the fault. Raises SystemExit if its place no longer exists."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "project"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "save", "data", "results"))
        (copy / "results").symlink_to(ROOT / "results")
        (copy.parent / "shared").symlink_to(ROOT.parent / "shared")  # where CIFAR-100 may be
        text = (copy / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            sys.exit(f"error: {mutant.file} has {text.count(mutant.old)} places with {mutant.old!r}: mend this list")
        (copy / mutant.file).write_text(text.replace(mutant.old, mutant.new))
        files = [f"tests/{name}" for name in mutant.tests.split()]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
        return subprocess.run(command, cwd=copy, capture_output=True).returncode == 1


def main() -> None:
    """Insert the faults named on the command line, or all of them; exit with status 1 if one goes unnoticed."""
    names = sys.argv[1:] or list(MUTANTS)
    if unknown := [name for name in names if name not in MUTANTS]:
        sys.exit(f"error: no mutant {unknown[0]!r}; the known ones are: {', '.join(MUTANTS)}")
    missed = 0
    for name in names:
        noticed = is_noticed(MUTANTS[name])
        missed += not noticed
        print(f"{name:20}{'noticed' if noticed else 'NOT NOTICED'}", flush=True)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()
