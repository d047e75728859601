"""Files and functions stay small enough to be read in one sitting."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


def _sources() -> list[Path]:
    return sorted([*ROOT.glob("rlalign/**/*.py"), *ROOT.glob("scripts/*.py")])


def _functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


def test_no_file_is_too_long() -> None:
    pages = [*ROOT.glob("rlalign/**/*.html"), *ROOT.glob("rlalign/**/*.js")]
    files = [*_sources(), *pages]
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert lines, f"no sources under {ROOT}"
    long = [f"{path.relative_to(ROOT)}: {n}" for path, n in lines.items() if n > MAX_FILE_LINES]
    assert not long, f"files over {MAX_FILE_LINES} lines: {long}"


def test_no_function_is_too_long() -> None:
    long = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}: {_length(node)}"
        for path in _sources()
        for node in _functions(path)
        if _length(node) > MAX_FUNCTION_LINES
    ]
    assert not long, f"functions over {MAX_FUNCTION_LINES} lines: {long}"
