"""Metrics that are summed over an epoch without synchronising the device."""

import math
from typing import Any

import torch
from torch import Tensor

from helper.errors import Diverged
from helper.structure import Checked
from helper.task import StepOutput
from inputs import UserError

TAUS = ("tau", "tau_min", "tau_max")
_SUM, _EXTREME = torch.zeros((), dtype=torch.float64), torch.tensor(math.inf)
METRICS_PATTERN = {  # of `Metrics.state`, see helper/structure.py
    "tensors": Checked(
        {
            "samples": _SUM, "steps": torch.zeros(()), "correct": torch.zeros((), dtype=torch.int64),
            "sums": torch.empty(0, dtype=torch.float64), "first_bad": Any,
            "tau?": _SUM.repeat(2), "tau_min?": _EXTREME, "tau_max?": _EXTREME,
        },
        lambda tensors: tensors["samples"] > 0 and len({name in tensors for name in TAUS}) == 1,
        "are not all sums of an epoch",
    ),
    "names": [str],
    "two_taus": bool,
}  # fmt: skip


class Metrics:
    """Sums over the samples of an epoch, in tensors updated in place.

    Nothing synchronises until `result` or `check`, and a step replayed as a CUDA graph keeps updating them.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.is_loaded = False  # whether the sums come from last.pth

    def reset(self) -> None:
        """Reset the sums for a new epoch."""
        self.is_loaded = False
        for name, tensor in self.tensors.items():
            tensor.fill_({"first_bad": math.inf, "tau_min": math.inf, "tau_max": -math.inf}.get(name, 0))

    def update(self, step: StepOutput) -> None:
        """Add a step. Raises UserError if its losses are not those of the loaded state or of the steps before."""
        values = torch.stack([step.loss, *step.losses.values()]).detach()
        tau = [step.tau.student.detach(), step.tau.teacher.detach()] if step.tau else []
        self._compare(step, values)
        t, size = self.tensors, len(step.target)
        t["samples"] += size
        t["steps"] += 1
        t["sums"] += values * size
        torch.minimum(t["first_bad"], torch.where(values.isfinite(), math.inf, t["steps"]), out=t["first_bad"])
        if step.logits is not None:
            t["correct"] += (step.logits.detach().argmax(1) == step.target).sum()
        if tau:
            t["tau"] += torch.stack([each.mean() for each in tau]) * size
            torch.minimum(t["tau_min"], tau[0].min(), out=t["tau_min"])
            torch.maximum(t["tau_max"], tau[0].max(), out=t["tau_max"])

    def _compare(self, step: StepOutput, values: Tensor) -> None:
        """Create the tensors on the first step; otherwise check that they match the step's losses."""
        names = ["loss", *(f"loss_{name}" for name in step.losses)]
        if not self.tensors:
            self._prepare(step, values, names)
        elif names != self.names or bool(step.tau) != ("tau" in self.tensors):
            if self.is_loaded:
                raise UserError(
                    f"the mid-epoch sums in last.pth are not those of {', '.join(names)}: add --overwrite to start anew"
                )
            raise UserError(
                f"a step has the losses {', '.join(names)}, and the one before {', '.join(self.names)}: a distiller"
                " must return the same ones in each step, and a temperature is asked in all or in none"
            )

    def _prepare(self, step: StepOutput, values: Tensor, names: list[str]) -> None:
        self.names = names
        self.two_taus = step.tau is not None and step.tau.teacher is not step.tau.student
        scalars = {"samples": torch.float64, "steps": values.dtype, "correct": torch.int64}
        if step.tau:
            scalars |= {"tau_min": values.dtype, "tau_max": values.dtype}
            self.tensors["tau"] = values.new_zeros(2, dtype=torch.float64)  # student's, teacher's
        self.tensors |= {name: values.new_zeros((), dtype=dtype) for name, dtype in scalars.items()}
        self.tensors["sums"] = torch.zeros_like(values, dtype=torch.float64)
        self.tensors["first_bad"] = torch.zeros_like(values)  # the first step in which a term was not finite
        self.reset()

    def state(self) -> dict[str, Any]:
        """Return the mid-epoch state."""
        return {"tensors": self.tensors, "names": self.names, "two_taus": self.two_taus}

    def load_state(self, state: dict[str, Any], device: torch.device) -> None:
        """Restore a `state` on a device. All losses in its sums were finite."""
        self.is_loaded = True
        self.names, self.two_taus = state["names"], state["two_taus"]
        self.tensors = {name: tensor.to(device) for name, tensor in state["tensors"].items() if name != "first_bad"}
        self.tensors["first_bad"] = torch.full((len(self.names),), math.inf, device=device)

    def check(self) -> None:
        """Raise Diverged if a loss was not finite, naming the term that failed first."""
        first_bad = self.tensors["first_bad"].tolist()
        first = min(first_bad)
        if first < math.inf:
            bad = [name for name, step in zip(self.names, first_bad, strict=True) if step == first]
            bad = bad[1:] or bad  # name the sum only if all of its terms are finite
            raise Diverged(f"the loss is not finite: {' and '.join(bad)} failed first, in step {first:.0f}")

    def result(self) -> dict[str, float]:
        """Return means over the samples; for tau also minimum and maximum.

        Raises:
            Diverged: as `check`.
        """
        self.check()
        t = self.tensors
        samples = t["samples"].item()
        result = dict(zip(self.names, (t["sums"] / samples).tolist(), strict=True))
        result["train_top1"] = 100 * t["correct"].item() / samples
        if "tau" in t:
            student, teacher = (t["tau"] / samples).tolist()
            result |= {"tau_mean": student, "tau_min": t["tau_min"].item(), "tau_max": t["tau_max"].item()}
            if self.two_taus:
                result["tau_teacher_mean"] = teacher
        return result
