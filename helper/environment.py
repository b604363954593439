"""Settings that must precede the import of PyTorch. Every script imports this module first."""

import os
import signal
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# How often an idle OpenMP thread checks for work before it sleeps. With libgomp's default, 300000, it spins so long
# that two runs on the same cores can train at a tenth of their speed; with a small number a run alone loses time to
# waking threads. This value costs little in both cases. Measured by benchmarks/sharing.py.
SPIN_COUNT = "3000"


def limit_spinning() -> None:
    """Set GOMP_SPINCOUNT, which libgomp reads when it is loaded, unless the user has set how threads wait."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def end_quietly_on_ctrl_c() -> None:
    """Let Ctrl-C end one of this project's scripts without a traceback, until `run_main` takes over.

    This matters because importing PyTorch takes seconds. Programs that import this code as a library keep their own
    handler, and a script started with the signal ignored keeps ignoring it.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)
    is_usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_usual and script and Path(script).resolve().parent in (ROOT, ROOT / "benchmarks"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)


limit_spinning()
end_quietly_on_ctrl_c()
