"""Single-fault edits that are possible in a Python source.

Edits are made on executable lines of functions, at exact byte positions, so that the rest of a file stays as
it is. Left out is what no test should have to notice: messages, logging, asserts, hints to the allocator or
the operating system, sizes of buffers, and what only a GPU runs.
"""

import ast
import functools
import re
from dataclasses import dataclass

COMPARISONS = {
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="),
    ast.NotEq: ("!=", "=="),
    ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"),
    ast.NotIn: ("not in", "in"),
}
ARITHMETIC = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "//"),
    ast.FloorDiv: ("//", "*"),
    ast.Div: ("/", "*"),
    ast.Mod: ("%", "+"),
}
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}
LARGEST_NUMBER = 255
"""Larger numbers are sizes of buffers and limits that a test cannot reach."""

MESSAGE_CALLS = re.compile(
    r"say\w*|_say\w*|print|debug|info|warn|warning|error|exception|log|\w*Error|fail|_fail|add_argument"
    r"|filterwarnings|simplefilter|set_title|set_xlabel|set_ylabel|write_stacks|_write_stacks"
)
HINT_CALLS = re.compile(
    r"close|flush|f?sync|collect|join|shutdown|sleep|wait|poll|set_num_threads|move_to_end|popitem|pin_memory"
    r"|empty_cache|malloc_trim|record_stream|fadvise|posix_fadvise|cancel_dump_traceback_later|setsockopt"
    r"|suppress|give_back|trim|notify_all|set_blocking|cast|urlopen|getLogger|setLevel|disable_progress_bars"
)
HINT_ARGUMENTS = re.compile(
    r"indent|daemon|exist_ok|missing_ok|parents|ignore_errors|strict|non_blocking|pin_memory|flush|text|copy"
    r"|persistent_workers|prefetch\w*|ensure_ascii|sort_keys|progress|set_to_none|disable|leave|foreach|fused"
    r"|maxsize|buffering|timeout|\w*_seconds|\w*_bytes|stacklevel|width|help|metavar|name|errors|encoding"
    r"|num_workers|weights_only|local_files_only|figsize|fontsize|dpi|capture_output|check|async_op"
)
TEXT_NAMES = re.compile(r".*(message|text|line|why|reason|title|label|warning|said|remedy|advice|hint)s?")
UNTESTED_FUNCTIONS = {"__repr__", "__str__", "__del__"}
GPU = re.compile(r"cuda|nccl|\bgpu", re.IGNORECASE)
UNTESTED_LINES = re.compile(r"(?i:cuda|nccl|\bgpu)|pragma|\b_?[A-Z_]*(_BYTES|MAX_OPEN|NUM_CACHED)[A-Z_]*")
"""Lines that need a GPU, and sizes that only cost time or memory."""
PATHS = re.compile(r"(?i).*(folder|path|dir|root|home|cwd|parent|final|temporary|\bout\b)")


@dataclass(frozen=True)
class Edit:
    """One replacement in one file.

    Attributes:
        path: relative to the package.
        line, column: of the replaced text, both from 1.
        operator: kind of the edit.
        what: "OLD -> NEW", in short.
        start, end: bytes of the source that are replaced.
        new: what they are replaced by.
    """

    path: str
    line: int
    column: int
    operator: str
    what: str
    start: int
    end: int
    new: bytes

    @property
    def id(self) -> str:
        return f"{self.path}:{self.line}:{self.column} {self.what}"

    def applied(self, source: bytes) -> bytes:
        """Return the source with this edit."""
        return source[: self.start] + self.new + source[self.end :]

    def diff(self, source: bytes) -> str:
        """Return the edited lines before and after, marked with - and +."""
        first = source.rfind(b"\n", 0, self.start) + 1
        last = source.find(b"\n", self.end)
        last = len(source) if last < 0 else last
        old = source[first:last].decode().splitlines()
        new = (source[first : self.start] + self.new + source[self.end : last]).decode().splitlines()
        return "\n".join([*(f"- {line}" for line in old), *(f"+ {line}" for line in new)])


class _Collector(ast.NodeVisitor):
    """Collects the edits of one source."""

    def __init__(self, path: str, source: bytes) -> None:
        self.edits: list[Edit] = []
        self._path = path
        self._source = source
        self._lines = source.split(b"\n")
        self._line_starts = [0]
        for line in self._lines:
            self._line_starts.append(self._line_starts[-1] + len(line) + 1)
        self._in_function = False

    def _span(self, node: ast.AST) -> tuple[int, int]:
        position: ast.expr = node  # type: ignore[assignment]
        assert position.end_lineno is not None
        assert position.end_col_offset is not None
        start = self._line_starts[position.lineno - 1] + position.col_offset
        return start, self._line_starts[position.end_lineno - 1] + position.end_col_offset

    def _add(self, operator: str, what: str, start: int, end: int, new: str) -> None:
        line = self._source.count(b"\n", 0, start) + 1
        text = self._lines[line - 1].decode()
        if self._in_function and not UNTESTED_LINES.search(text):
            column = len(self._source[self._line_starts[line - 1] : start].decode()) + 1
            self.edits.append(Edit(self._path, line, column, operator, what, start, end, new.encode()))

    def _add_between(self, operator: str, left: ast.AST, right: ast.AST, old: str, new: str) -> None:
        """Replace the operator that stands between two operands."""
        start, end = self._span(left)[1], self._span(right)[0]
        gap = self._source[start:end]
        if gap.count(old.encode()) == 1 and b"#" not in gap:
            place = start + gap.index(old.encode())
            self._add(operator, f"{old} -> {new}", place, place + len(old), new)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        decorators = " ".join(map(ast.unparse, node.decorator_list))
        if node.name in UNTESTED_FUNCTIONS or "abstract" in decorators or "overload" in decorators:
            return
        before, self._in_function = self._in_function, True
        for statement in node.body[ast.get_docstring(node, clean=False) is not None :]:
            self.visit(statement)
        self._in_function = before

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        before, self._in_function = self._in_function, False
        for statement in node.body:
            self.visit(statement)
        self._in_function = before

    def _skip(self, node: ast.AST) -> None:
        """Leave out text, assertions and imports."""

    visit_Raise = visit_Assert = visit_Import = visit_ImportFrom = visit_JoinedStr = visit_Global = _skip

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not TEXT_NAMES.fullmatch(ast.unparse(node.targets[0])):
            self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        if "TYPE_CHECKING" in test or GPU.search(test):
            branches = node.orelse
        elif all(_is_message(statement) for statement in [*node.body, *node.orelse]):
            return
        else:
            self._flip(node.test)
            self.visit(node.test)
            branches = [*node.body, *node.orelse]
        for statement in branches:
            self.visit(statement)

    def visit_While(self, node: ast.While) -> None:
        self._flip(node.test)
        self.generic_visit(node)

    visit_IfExp = visit_While  # type: ignore[assignment]

    def _flip(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.Constant):  # those have an edit of the same effect
            start, end = self._span(test)
            text = self._source[start:end].decode()
            self._add("condition", "c -> not (c)", start, end, f"not ({text})")

    def visit_Compare(self, node: ast.Compare) -> None:
        if len(node.ops) == 1:
            old, new = COMPARISONS[type(node.ops[0])]
            self._add_between("comparison", node.left, node.comparators[0], old, new)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        if len(node.values) == 2:
            self._add_between("and/or", node.values[0], node.values[1], old, new)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if isinstance(node.left, ast.Constant) and isinstance(node.right, ast.Constant):
            return  # a size, such as 2 * 2**20
        if type(node.op) in ARITHMETIC and not _is_joined(node):
            old, new = ARITHMETIC[type(node.op)]
            self._add_between("arithmetic", node.left, node.right, old, new)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        if type(node.op) in ARITHMETIC and not _is_sequence(node.value):
            old, new = ARITHMETIC[type(node.op)]
            self._add_between("arithmetic", node.target, node.value, f"{old}=", f"{new}=")
        self.visit(node.value)

    def visit_Constant(self, node: ast.Constant) -> None:
        start, end = self._span(node)
        if isinstance(node.value, bool):
            self._add("True/False", f"{node.value} -> {not node.value}", start, end, str(not node.value))
        elif isinstance(node.value, int | float) and abs(node.value) <= LARGEST_NUMBER:
            old = self._source[start:end].decode()
            self._add("number", f"{old} -> {node.value + 1}", start, end, str(node.value + 1))

    def visit_Call(self, node: ast.Call) -> None:
        name = _called(node)
        if MESSAGE_CALLS.fullmatch(name) or HINT_CALLS.fullmatch(name):
            return
        if name in EXTREMES:
            end = self._span(node.func)[1]
            self._add("min/max", f"{name} -> {EXTREMES[name]}", end - len(name), end, EXTREMES[name])
        self.visit(node.func)
        for argument in node.args[: 1 if name == "round" else None]:
            self.visit(argument)
        for keyword in node.keywords:
            if not HINT_ARGUMENTS.fullmatch(keyword.arg or ""):
                self.visit(keyword.value)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call) and not _is_message(node):
            if not HINT_CALLS.fullmatch(_called(node.value)):
                self._add("statement", "call -> pass", *self._span(node), "pass")
            self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is None or isinstance(node.value, ast.JoinedStr):
            return
        if not isinstance(node.value, ast.Constant | ast.Dict | ast.List) or getattr(
            node.value, "value", False
        ):
            start, end = self._span(node.value)
            self._add("return", "return x -> return None", start, end, "None")
        self.visit(node.value)


def _called(node: ast.Call) -> str:
    """Return the last part of a called name; "" for other callables."""
    return getattr(node.func, "attr", getattr(node.func, "id", ""))


def _is_message(node: ast.stmt) -> bool:
    """Return True for a statement that only prints or collects text for people."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    receiver, _, name = ast.unparse(node.value.func).rpartition(".")
    is_text = name == "append" and TEXT_NAMES.fullmatch(receiver) is not None
    return is_text or MESSAGE_CALLS.fullmatch(_called(node.value)) is not None


def _is_joined(node: ast.BinOp) -> bool:
    """Return True for an operation on paths, text or lists."""
    is_path = isinstance(node.op, ast.Div) and PATHS.match(ast.unparse(node.left)) is not None
    return is_path or _is_sequence(node.left) or _is_sequence(node.right)


def _is_sequence(node: ast.expr) -> bool:
    """Return True for text and lists, on which most operators are a TypeError."""
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    return is_text or isinstance(node, ast.JoinedStr | ast.List | ast.Tuple | ast.ListComp | ast.Dict)


@functools.cache
def edits_of(path: str, source: bytes) -> list[Edit]:
    """Return all edits of a file, in the order of their lines; some may not compile."""
    collector = _Collector(path, source)
    collector.visit(ast.parse(source))
    return sorted(collector.edits, key=lambda edit: (edit.start, edit.what))
