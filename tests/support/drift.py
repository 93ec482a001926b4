"""A host in which one function was renamed, re-signed or edited."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from types import FunctionType

import pytest

from kl_plugins import PatchError

EDITS = ("renamed", "signature", "body")


def holder_of(target):
    holder = importlib.import_module(target.module)
    *parts, name = target.qualname.split(".")
    for part in parts:
        holder = getattr(holder, part)
    return holder, name


def change(target, edit, folder, monkeypatch):
    """Do it to a target of patches/<host>.toml in the imported host; `folder` gets the source of what is edited."""
    holder, name = holder_of(target)
    function = vars(holder)[name]
    if edit == "renamed":
        monkeypatch.delattr(holder, name)
        monkeypatch.setattr(holder, f"{name}_v2", function, raising=False)
        return
    own = function.__func__ if isinstance(function, staticmethod) else function
    assert isinstance(own, FunctionType)
    monkeypatch.setattr(holder, name, _edited(own, edit, folder))


def nothing_starts(starts, target, reinstall):
    """Each of `starts` is refused because of the target's source, its signature or both, and of nothing else."""
    for start in starts:
        with pytest.raises(PatchError) as refused:
            start()
        _, *problems = str(refused.value).splitlines()
        assert problems
        for problem in problems:
            assert problem.startswith(f"- {target.name}")
            assert f"reinstall {reinstall}" in problem


def _edited(function, edit, folder):
    """The function as it would be in a copy of the host with that edit, with a source file of its own."""
    own = inspect.unwrap(function)
    tree = ast.parse(textwrap.dedent(inspect.getsource(own)))
    definition = tree.body[0]
    if edit == "signature":
        definition.args.kwonlyargs.append(ast.arg("added"))
        definition.args.kw_defaults.append(ast.Constant(None))
    else:
        definition.body.insert(0, ast.parse("added = None").body[0])
    *holders, name = own.__qualname__.split(".")
    for holder in reversed(holders):
        tree.body = [ast.ClassDef(holder, bases=[], keywords=[], body=tree.body, decorator_list=[])]
    path = folder / "edited.py"
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    found = dict(own.__globals__)
    exec(compile(path.read_text(), str(path), "exec"), found)
    made = found[(holders or [name])[0]]
    for part in [*holders[1:], *([name] if holders else [])]:
        made = vars(made)[part]
    return made.__func__ if isinstance(made, staticmethod) else made
