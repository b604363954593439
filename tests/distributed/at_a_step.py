"""A training that gets a signal in the third of ten steps of its second epoch, unless it was started again:

python at_a_step.py (self | parent) SIGNAL SCRIPT ARGUMENT...

Of several processes it is the last one, or who started that. All of them wait in that step until they know."""

import itertools
import os
import runpy
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEP = 10 + 3


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from helper import distributed, signals
    from helper.loops import Stepper

    whom, name, script, *arguments = sys.argv[1:]
    step, numbers = Stepper.__call__, itertools.count(1)

    def signalled(*given):
        result = step(*given)
        if next(numbers) == STEP and not distributed.restarts():
            if distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid() if whom == "self" else os.getppid(), signal.Signals[name])
            while not signals.asked():
                time.sleep(0.01)
        return result

    Stepper.__call__ = signalled
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
