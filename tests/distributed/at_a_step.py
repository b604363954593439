"""Run a training that gets a signal in the third of ten steps of its second epoch, unless it was restarted.

python at_a_step.py (self | parent) SIGNAL SCRIPT ARGUMENT...

Of several processes, the last one or its parent gets it. All of them wait in that step until they know."""

import functools
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
    from helper import distributed, signals, trainer

    whom, name, script, *arguments = sys.argv[1:]
    make_step, numbers = trainer.make_step, itertools.count(1)

    def signalled(step, *given):
        result = step(*given)
        if next(numbers) == STEP and not distributed.restarts():
            if distributed.rank() == distributed.world_size() - 1:
                os.kill(os.getpid() if whom == "self" else os.getppid(), signal.Signals[name])
            while not signals.asked():
                time.sleep(0.01)
        return result

    trainer.make_step = lambda *given: functools.partial(signalled, make_step(*given))
    sys.argv = [script, *arguments]
    runpy.run_path(str(ROOT / script), run_name="__main__")


if __name__ == "__main__":
    main()
