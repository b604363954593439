"""List the packages in a requirements file that this Python lacks; run it before scripts that need them.

    python benchmarks/packages.py requirements.txt

The exit status is 2 if one is missing. This script needs only the standard library.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def missing(requirements: Path) -> list[str]:
    """Return the names in a file of requirements that are not installed here; versions are not compared."""
    names = [re.split(r"[<>=!~\[; ]", line, maxsplit=1)[0] for line in requirements.read_text().split("\n") if line]
    return [name for name in names if not _is_installed(name)]


def _is_installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def main() -> None:
    """Print the missing packages on stderr and exit with status 2, if there are any."""
    if names := missing(Path(sys.argv[1])):
        told = ", ".join(names)
        print(f"error: {sys.executable} has no {told}: install them, or put them on PYTHONPATH", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
