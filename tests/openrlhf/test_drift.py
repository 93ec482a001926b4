"""Any single function that is replaced or relied on, renamed, with another signature or body: nothing starts."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap
from types import FunctionType

import pytest
from tiny_openrlhf import import_openrlhf

from kl_plugins import PatchError
from kl_plugins.patchfile import load_patches
from kl_plugins.patching import Patching, check

PATCHES = load_patches("openrlhf")


def holder_of(target):
    holder = importlib.import_module(target.module)
    *parts, name = target.qualname.split(".")
    for part in parts:
        holder = getattr(holder, part)
    return holder, name


def edited(function, edit, folder):
    """The function as it would be in a copy of the host with that edit, with a source file of its own."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    definition = tree.body[0]
    if edit == "signature":
        definition.args.kwonlyargs.append(ast.arg("added"))
        definition.args.kw_defaults.append(ast.Constant(None))
    else:
        definition.body.insert(0, ast.parse("added = None").body[0])
    path = folder / "edited.py"
    path.write_text(ast.unparse(tree))
    found = dict(inspect.unwrap(function).__globals__)
    exec(compile(path.read_text(), str(path), "exec"), found)
    return found[definition.name]


@pytest.mark.parametrize("edit", ["renamed", "signature", "body"])
@pytest.mark.parametrize("target", PATCHES.targets, ids=lambda target: target.name.partition(":")[2])
def test_a_changed_function_keeps_everything_from_starting(target, edit, tmp_path, monkeypatch):
    import_openrlhf()
    holder, name = holder_of(target)
    function = vars(holder)[name]
    if edit == "renamed":
        monkeypatch.delattr(holder, name)
        monkeypatch.setattr(holder, f"{name}_v2", function, raising=False)
    else:
        own = function.__func__ if isinstance(function, staticmethod) else function
        assert isinstance(own, FunctionType)
        monkeypatch.setattr(holder, name, edited(own, edit, tmp_path))
    replaced = [each for each in PATCHES.targets if each.wrapper and each is not target]
    before = [vars(holder_of(each)[0])[holder_of(each)[1]] for each in replaced]
    patching = Patching(PATCHES)
    for start in (lambda: check(PATCHES), patching.apply, patching.apply_on_import):
        with pytest.raises(PatchError) as refused:
            start()
        _, *problems = str(refused.value).splitlines()
        assert problems
        for problem in problems:  # of its source, its signature or both, and of nothing else
            assert problem.startswith(f"- {target.name}")
            assert "reinstall openrlhf==0.11.2" in problem
    assert [vars(holder_of(each)[0])[holder_of(each)[1]] for each in replaced] == before


def test_another_version_is_refused_by_name(monkeypatch):
    import_openrlhf()
    monkeypatch.setattr("kl_plugins.patching.installed_version", lambda host: "0.12.0")
    with pytest.raises(PatchError, match=r"0.12.0 was not tested, 0.11.2 was: install .*openrlhf==0.11.2"):
        check(PATCHES)
    check(PATCHES, allow_untested=True)  # no function changed
