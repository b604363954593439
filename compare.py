"""Compare runs with the published tables: mean and spread of each configuration, published number and difference.

python compare.py save/student_model
python compare.py save/student_model --explain
python compare.py save --markdown --output table.md
python compare.py --pages results
python compare.py save/student_model/resnet56_resnet20 --plot curves.png
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import argparse
from pathlib import Path

from helper.errors import run_main
from helper.files import write_atomically
from options.parser import Parser
from report.comparison import plotted, report
from report.runs import find_runs


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    group = parser.add_argument_group("input")
    group.add_argument("runs", nargs="*", default=["save"], help="folders, searched recursively (default: save)")
    group = parser.add_argument_group("output")
    group.add_argument("--explain", action="store_true", help="add what the columns mean, footnotes with sources and"
                       " protocols, and the list of unfinished runs")  # fmt: skip
    group.add_argument("--markdown", action="store_true", help="tables in Markdown instead of aligned columns, with"
                       " all that --explain adds")  # fmt: skip
    group.add_argument("--output", type=Path, metavar="FILE", help="write the tables to a file, not the screen")
    group.add_argument("--plot", type=Path, metavar="FILE", help="draw the curves of the runs of one pair;"
                       " the name ends in .png, .svg or .pdf")  # fmt: skip
    group.add_argument("--pages", type=Path, metavar="DIR", help="write README.md, index.html and figures/ of the runs"
                       " below DIR into DIR")  # fmt: skip
    args = parser.parse_args()
    if args.pages and (args.runs != ["save"] or args.explain or args.markdown or args.output or args.plot):
        parser.error("--pages DIR shows the runs below DIR, and goes with no other flag or folder")
    if args.plot and args.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"--plot writes PNG, SVG or PDF: give a name that ends in .png, .svg or .pdf, not {args.plot}")
    return args


def main() -> None:
    """Read, compare and show the runs; plotting code is imported only if needed, which keeps --help fast."""
    args = parse_args()
    if args.pages:
        from report.page import write_pages

        write_pages(args.pages)
        print(f"pages: {args.pages / 'README.md'}, {args.pages / 'index.html'}")
        return
    runs = find_runs(args.runs)
    text = report(runs, args.markdown, args.explain)
    if not args.output:
        print(text, end="", flush=True)
    shown = plotted(runs) if args.plot else []  # raises errors before anything is written
    if args.output:
        write_atomically(args.output, text.encode())
    if args.plot:
        from report.plot import plot_compare

        plot_compare(shown, args.plot)
        print(f"picture: {args.plot}")


if __name__ == "__main__":
    run_main(main)
