"""Size and shape gate of the source tree; run by tools/test, or alone: ``python tools/tidy.py [PATH...]``.

In: limits on the length of files and functions, names that say nothing, struct formats without a byte order, inline
struct calls outside the codec modules, missing module docstrings. Out: everything ruff, mypy and import-linter see.

Lines are *code lines*: blank lines, comments and docstrings are free, so that explaining costs nothing. Above the
soft limit a note is printed, above the hard one the gate fails.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("metadata", "nbd", "thinpool", "tools", "tests")
PACKAGES = ("metadata", "nbd", "thinpool")

FILE_LINES_SOFT_MAX, FILE_LINES_HARD_MAX = 400, 450
FUNCTION_LINES_SOFT_MAX, FUNCTION_LINES_HARD_MAX = 50, 60

EMPTY_NAMES = frozenset({"utils", "util", "helpers", "helper", "common", "base", "misc"})
# Modules whose job is the layout of bytes. Elsewhere an inline format would be a second, unchecked description.
CODEC_MODULES = frozenset(
    {
        "metadata/layout.py",
        "metadata/superblock.py",
        "metadata/node.py",
        "metadata/bitmap.py",
        "metadata/index.py",
        "metadata/checksum.py",
        "nbd/wire.py",
    }
)
STRUCT_CALLS = frozenset({"pack", "unpack", "pack_into", "unpack_from", "iter_unpack", "calcsize"})
BYTE_ORDERS = ("<", ">", "!")
HOST_ORDER = "="  # netlink and the like: the byte order of this machine, which only tests ever need
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to change: where it is, what it is, and whether it fails the gate."""

    path: str
    line: int
    text: str
    fatal: bool = True

    def sentence(self) -> str:
        """Return the finding as one line in the form compilers use."""
        return f"{self.path}:{self.line}: {'' if self.fatal else 'note: '}{self.text}"


def docstring_lines(tree: ast.Module) -> set[int]:
    """Return the numbers of all lines that belong to a docstring."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, Definition) and ast.get_docstring(node, clean=False) is not None:
            first = node.body[0]
            lines.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return lines


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """Return the numbers of all lines that hold code: no blank line, no comment, no docstring."""
    lines: set[int] = set()
    silent = (
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    )
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(tree)


def over(kind: str, count: int, soft: int, hard: int) -> tuple[str, bool] | None:
    """Return the sentence for a count above its limit and whether it is fatal, or None."""
    if count > hard:
        return f"{kind} has {count} code lines, more than {hard}", True
    if count > soft:
        return f"{kind} has {count} code lines; {soft} is the aim, {hard} the end", False
    return None


def size_findings(path: str, tree: ast.Module, lines: set[int]) -> Iterator[Finding]:
    """Check the length of the file and of every function in it."""
    if found := over("file", len(lines), FILE_LINES_SOFT_MAX, FILE_LINES_HARD_MAX):
        yield Finding(path, 1, *found)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            inside = range(node.lineno, (node.end_lineno or node.lineno) + 1)
            count = sum(line in lines for line in inside)
            if found := over(
                f"function {node.name}", count, FUNCTION_LINES_SOFT_MAX, FUNCTION_LINES_HARD_MAX
            ):
                yield Finding(path, node.lineno, *found)


def format_text(node: ast.expr) -> str | None:
    """Return the literal beginning of a format argument; None where it is computed and cannot be judged."""
    if isinstance(node, ast.JoinedStr):
        if not node.values:
            return ""
        node = node.values[0]
    if isinstance(node, ast.Constant):
        value = node.value
        return (
            value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else None
        )
    if isinstance(node, ast.BinOp):
        return format_text(node.left)
    return "" if isinstance(node, ast.FormattedValue) else None


def struct_findings(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Check struct formats for their byte order, and the product for inline struct calls outside codecs."""
    inline_is_refused = path.split("/", maxsplit=1)[0] in PACKAGES and path not in CODEC_MODULES
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or not node.args:
            continue
        function = node.func
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            owner, name = function.value.id, function.attr
        elif isinstance(function, ast.Name):
            owner, name = "struct", function.id
        else:
            continue
        if owner != "struct" or (name != "Struct" and name not in STRUCT_CALLS):
            continue
        if name != "Struct" and isinstance(function, ast.Name):
            continue  # a local function that happens to be called pack
        text = format_text(node.args[0])
        allowed = (*BYTE_ORDERS, HOST_ORDER) if path.startswith("tests/") else BYTE_ORDERS
        if text is not None and not text.startswith(allowed):
            yield Finding(path, node.lineno, f"struct format {text!r} has no explicit byte order (< or >)")
        if name != "Struct" and inline_is_refused:
            yield Finding(
                path, node.lineno, f"inline struct.{name}: declare a struct.Struct in a codec module"
            )


def shape_findings(path: str, tree: ast.Module) -> Iterator[Finding]:
    """Check the module's name and its docstring."""
    if Path(path).stem in EMPTY_NAMES:
        yield Finding(path, 1, f"a module called {Path(path).stem} says nothing; name it after what it holds")
    if tree.body and not ast.get_docstring(tree):
        yield Finding(path, 1, "no module docstring: say what is in it and what is out")


def examine(path: str, source: str) -> list[Finding]:
    """Return everything the gate has to say about one file; ``path`` is relative to the checkout."""
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        return [Finding(path, error.lineno or 1, f"does not parse: {error.msg}")]
    lines = code_lines(source, tree)
    return [*size_findings(path, tree, lines), *struct_findings(path, tree), *shape_findings(path, tree)]


def python_files(arguments: Sequence[str]) -> Iterator[Path]:
    """Yield the files to look at: those named, or all of the source tree."""
    for start in [Path(argument).resolve() for argument in arguments] or [
        ROOT / folder for folder in FOLDERS
    ]:
        yield from sorted(start.rglob("*.py")) if start.is_dir() else [start]


def main(arguments: Sequence[str]) -> int:
    """Print all findings; return 1 when one of them is fatal."""
    findings: list[Finding] = []
    for file in python_files(arguments):
        path = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
        findings += examine(path, file.read_text(encoding="utf-8"))
    for finding in findings:
        print(finding.sentence())
    return int(any(finding.fatal for finding in findings))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
