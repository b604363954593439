"""Measure the structure of the code and list violations: layers, cycles, long functions, depth of the loop.

    python tests/house.py

Imports go one way: scripts (the files at the top, benchmarks/) -> report/ -> helper/ -> options/ -> the zoo (models/,
temperature/, distiller_zoo/, dataset/) and published/ -> inputs.py. Ends with status 1 if a number exceeds its limit in
LIMITS.
"""

import ast
import io
import sys
import tempfile
import traceback
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ZOO = ("models", "temperature", "distiller_zoo", "dataset")
FLOORS = {"report": 4, "helper": 3, "options": 2, "published": 1} | dict.fromkeys(
    ZOO, 1
)  # scripts are above all of them
BASE = "inputs"  # the module below all of them
SCRIPTS = 5  # above all of them
LONG = 60  # lines of a function
LIMITS = {  # today's numbers, rounded up; lower a limit when the code improves
    "share of helper/, %": 27,
    "imports against the direction": 0,
    "modules in circles": 0,
    "packages in circles": 0,
    "packages of the zoo in circles": 0,
    "lines of the longest function": 60,
    f"functions of more than {LONG} lines": 0,
    "frames from fit to backward": 5,
}


class Import(NamedTuple):
    """An import between modules of the project, by their dotted names."""

    importer: str
    imported: str
    line: int


class Function(NamedTuple):
    name: str
    lines: int


def code() -> dict[str, str]:
    """Return the text of each module except the tests, by the module's dotted name."""
    folders = [ROOT / name for name in (*FLOORS, "benchmarks")]
    paths = [*ROOT.glob("*.py"), *(path for folder in folders for path in folder.rglob("*.py"))]
    return {name_of(path): path.read_text() for path in sorted(paths)}


def name_of(path: str | Path) -> str:
    """Return the dotted name of a file's module."""
    parts = Path(path).relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_of(module: str) -> str:
    """Return the folder of a module, or "scripts" for one at the top."""
    first = module.partition(".")[0]
    return first if "." in module or first in (*FLOORS, BASE) else "scripts"


def line_counts(texts: dict[str, str]) -> dict[str, int]:
    """Return the lines of code of each package."""
    counts = {}
    for name, text in texts.items():
        counts[package_of(name)] = counts.get(package_of(name), 0) + len(text.splitlines())
    return counts


def floor_of(module: str) -> int:
    """Return a module's layer; it may import from its own layer and from lower ones."""
    return 0 if module == BASE else FLOORS.get(package_of(module), SCRIPTS)


def imports(trees: dict[str, ast.Module]) -> list[Import]:
    """Return every import between modules of the project, including those inside functions."""
    found = []
    for importer, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                whole = f"{node.module}."
                names = [whole + a.name if whole + a.name in trees else node.module for a in node.names]
            else:
                continue
            found += [Import(importer, name, node.lineno) for name in sorted(set(names)) if name in trees]
    return found


def upward(found: list[Import]) -> list[Import]:
    """Return the imports from a higher layer."""
    return [each for each in found if floor_of(each.importer) < floor_of(each.imported)]


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    """Return the largest groups of nodes that can all reach one another."""
    nodes = sorted({node for edge in edges for node in edge})
    reached = {node: {after for before, after in edges if before == node} for node in nodes}
    for middle in nodes:  # Warshall's algorithm
        for node in nodes:
            if middle in reached[node]:
                reached[node] |= reached[middle]
    groups = {tuple(other for other in nodes if other in reached[node] and node in reached[other]) for node in nodes}
    return sorted(list(group) for group in groups if len(group) > 1)


def functions(trees: dict[str, ast.Module]) -> list[Function]:
    """Return all functions and methods, the longest first."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    found = [
        Function(f"{module}.{node.name}", node.end_lineno - node.lineno + 1)
        for module, tree in trees.items() for node in ast.walk(tree) if isinstance(node, kinds)
    ]  # fmt: skip
    return sorted(found, key=lambda function: (-function.lines, function.name))


def frames_to_backward() -> list[str]:
    """Train until the first backward pass; return the project's functions on the stack, from `fit` to its caller."""
    import torch

    import train_teacher
    from options.parse import parse_teacher

    class Reached(BaseException):
        pass

    frames = []

    def reached(*_, **__):
        codes = [frame.f_code for frame, _ in traceback.walk_stack(sys._getframe(1))]
        ours = [code for code in reversed(codes) if code.co_filename.startswith(f"{ROOT}/")]
        frames.extend(f"{name_of(code.co_filename)}.{code.co_qualname}" for code in ours)
        raise Reached

    backward = torch.Tensor.backward
    with tempfile.TemporaryDirectory() as folder:
        line = f"--dataset digits --model resnet8 --train_subset 8 --epochs 1 --device cpu --run_dir {folder}/run"
        torch.Tensor.backward = reached
        try:
            with suppress(Reached), redirect_stdout(io.StringIO()):
                train_teacher.train(parse_teacher(line.split()))
        finally:
            torch.Tensor.backward = backward
    return frames[next(number for number, name in enumerate(frames) if name.endswith(".fit")) :]


def measure() -> tuple[dict[str, float], list[str]]:
    """Return the numbers of LIMITS, and lines that explain them."""
    texts = code()
    trees, lines = {name: ast.parse(text) for name, text in texts.items()}, line_counts(texts)
    found = imports(trees)
    wrong, rings = upward(found), circles({(each.importer, each.imported) for each in found})
    between = {(package_of(each.importer), package_of(each.imported)) for each in found}
    packages = circles({(one, other) for one, other in between if one != other})
    zoo = circles({(one, other) for one, other in between if one != other and {one, other} <= set(ZOO)})
    by_length, frames = functions(trees), frames_to_backward()
    long = [function for function in by_length if function.lines > LONG]
    numbers = [
        round(100 * lines["helper"] / sum(lines.values()), 1), len(wrong), sum(map(len, rings)),
        sum(map(len, packages)), sum(map(len, zoo)), by_length[0].lines, len(long), len(frames),
    ]  # fmt: skip
    total = f"{sum(lines.values()):,} lines of code: " + ", ".join(f"{name} {n:,}" for name, n in lines.items())
    told = [total, *(f"against the direction: {a} imports {b}, line {line}" for a, b, line in wrong)]
    told += [f"circle of modules: {', '.join(ring)}" for ring in rings]
    told += [f"circle of packages: {', '.join(ring)}" for ring in packages]
    told += [f"long: {name}, {count} lines" for name, count in long or by_length[:1]]
    return dict(zip(LIMITS, numbers, strict=True)), [*told, "from fit to backward: " + " > ".join(frames)]


def main() -> None:
    """Print the numbers next to their limits, and the violations."""
    numbers, told = measure()
    print(f"{'':36}{'now':>6}{'limit':>7}")
    for name, number in numbers.items():
        print(f"{name:36}{number:6g}{LIMITS[name]:7}{'  TOO MUCH' if number > LIMITS[name] else ''}")
    print("", *told, sep="\n")
    sys.exit(any(number > LIMITS[name] for name, number in numbers.items()))


if __name__ == "__main__":
    main()
