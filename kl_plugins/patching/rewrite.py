"""A host's function with a few of its statements changed, and nothing of the host touched.

For a KL that sits in the middle of one long method. The source is read from the installed host at run time, its
statements are known by digest, and the changed function is compiled anew: no line of the host's source lies here.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

from kl_plugins.errors import PatchError
from kl_plugins.patching.targets import refuse_all

HOST = "HOST"
CO_FUTURE_ANNOTATIONS = 0x1000000  # `__future__.annotations.compiler_flag`: that a module has that import
Tree = TypeVar("Tree", bound=ast.AST)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One assignment of a function, and what is to become of it; without `value` and `before` it must be there."""

    name: str
    """The one name that the statement assigns."""
    digest: str
    """`statement_digest` of the statement in the tested versions. It occurs exactly once."""
    value: str = ""
    """An expression to assign instead. `HOST` in it is the host's own expression."""
    before: str = ""
    """A statement to run before it."""


def edited(function: Callable[..., Any], edits: Sequence[Edit]) -> FunctionType:
    """`function` with the `edits` applied: a new function in the same module's globals; the old one stays as it is.

    Line numbers stay the host's, so that a traceback shows the host's own file.

    Raises one `PatchError` that names every statement that isn't there as it was tested, or is there more than once,
    and every name that an edit reads and the function doesn't have.
    """
    tree, own = _parsed(function)
    found = {edit: list(_assignments(tree, edit)) for edit in edits}
    problems = [_problem(tree, edit, statements) for edit, statements in found.items() if len(statements) != 1]
    problems += _unknown_names(own, edits)
    refuse_all(
        f"{own.__module__}:{own.__qualname__} is not the function that was tested; install a tested version", problems
    )
    tree = _Rewriter({id(statements[0]): edit for edit, statements in found.items()}).visit(tree)
    flags = own.__code__.co_flags & CO_FUTURE_ANNOTATIONS
    code = compile(tree, own.__code__.co_filename, "exec", flags=flags, dont_inherit=True)
    namespace: dict[str, Any] = {}
    exec(code, own.__globals__, namespace)
    made: FunctionType = namespace[own.__name__]
    functools.update_wrapper(made, own)
    return made


def statement_digest(statement: ast.stmt) -> str:
    """The first 16 hex digits of the SHA-256 of a statement, whatever its layout and comments."""
    return hashlib.sha256(ast.unparse(statement).encode()).hexdigest()[:16]


def _parsed(function: Callable[..., Any]) -> tuple[ast.Module, FunctionType]:
    """The syntax tree of a plain function, which is all of the module, with the line numbers of its file."""
    if not isinstance(function, FunctionType) or function.__code__.co_freevars or hasattr(function, "__wrapped__"):
        raise PatchError(f"{function!r} is not a plain function without closure: undo what wraps it")
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError) as error:
        raise PatchError(f"{function!r}: its source can't be read ({error}): install the host from a wheel") from error
    # A method is parsed with its indentation: taking it away would change the strings over several lines.
    block = "if True:\n" if source[:1].isspace() else ""
    tree = ast.parse(block + source)
    if block:
        tree.body = tree.body[0].body  # type: ignore[attr-defined]
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.FunctionDef) or tree.body[0].decorator_list:
        raise PatchError(f"{function!r} is not one plain, undecorated function: install a tested version")
    ast.increment_lineno(tree, function.__code__.co_firstlineno - tree.body[0].lineno)
    return tree, function


def _assignments(tree: ast.Module, edit: Edit) -> Iterator[ast.Assign]:
    return (each for each in _assigning(tree, edit.name) if statement_digest(each) == edit.digest)


def _assigning(tree: ast.Module, name: str) -> Iterator[ast.Assign]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and [getattr(target, "id", None) for target in node.targets] == [name]:
            yield node


def _problem(tree: ast.Module, edit: Edit, found: list[ast.Assign]) -> str:
    if found:
        lines = ", ".join(str(each.lineno) for each in found)
        return f"the assignment to {edit.name!r} (digest {edit.digest}) was found {len(found)} times, in lines {lines}"
    others = "; ".join(f"line {each.lineno}: {ast.unparse(each)}" for each in _assigning(tree, edit.name))
    return f"the assignment to {edit.name!r} (digest {edit.digest}) was not found, only: {others or 'none at all'}"


def _unknown_names(function: FunctionType, edits: Sequence[Edit]) -> list[str]:
    code = function.__code__
    known = {HOST, *code.co_varnames, *code.co_cellvars, *function.__globals__}
    return [
        f"what replaces the assignment to {edit.name!r} reads {node.id!r}, which the function does not have"
        for edit in edits
        for node in ast.walk(ast.parse(f"{edit.before}\n{edit.value}"))
        if isinstance(node, ast.Name) and node.id not in known
    ]


class _Rewriter(ast.NodeTransformer):
    def __init__(self, edits: dict[int, Edit]) -> None:
        self.edits = edits

    def visit_Assign(self, node: ast.Assign) -> ast.Assign | list[ast.stmt]:
        edit = self.edits.get(id(node))
        if edit is None:
            return node
        if edit.value:
            value = _located(ast.parse(edit.value, mode="eval"), node).body
            node.value = _Insert(node.value).visit(value)
        return [*_located(ast.parse(edit.before), node).body, node] if edit.before else node


class _Insert(ast.NodeTransformer):
    def __init__(self, host: ast.expr) -> None:
        self.host = host

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return copy.deepcopy(self.host) if node.id == HOST else node


def _located(tree: Tree, at: ast.stmt) -> Tree:
    """All of `tree` at the lines of the host's statement that it is put beside."""
    for node in ast.walk(tree):
        ast.copy_location(node, at)
    return tree
