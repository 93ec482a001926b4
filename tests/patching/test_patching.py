"""The patching engine, on a host made here: what it replaces, what it refuses, and that it leaves no trace."""

import ast
import asyncio
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import logging
import os
import sys
import textwrap
from dataclasses import asdict, replace
from importlib.machinery import ModuleSpec, PathFinder
from types import SimpleNamespace

import pytest

from kl_plugins import PatchError, patching
from kl_plugins.patching import Patching, bare_signature, changes, check, load_patches, source_digest, targets

UTILS = """
def approx(a, b=1):
    return a - b
"""
TRAINER = """
import functools
from stubhost.utils import approx

def logged(function):
    @functools.wraps(function)
    def inner(*args, **kwargs):
        return function(*args, **kwargs)
    return inner

def loss(x: int, *, scale: float = 2.0) -> float:
    return x * scale + approx(x)

class Base:
    def inherited(self):
        return "inherited"

class Trainer(Base):
    kind = "stub"

    def step(self, x):
        return x + 1

    @staticmethod
    def static(x):
        return x + 2

    @classmethod
    def made(cls, x):
        return x + len(cls.__name__)

    @logged
    def decorated(self, x):
        # a comment is source too
        return x + 4

    async def later(self, x):
        return x + 5

    class Inner:
        def nested(self, x):
            return x + 6
"""
WRAPPERS = """
def hundred(original):
    def replacement(*args, **kwargs):
        return 100 + original(*args, **kwargs)
    return replacement

def hundred_later(original):
    async def replacement(*args, **kwargs):
        return 100 + await original(*args, **kwargs)
    return replacement

def broken(original):
    raise ValueError("a broken wrapper")

def nothing(original):
    return None

constant = 3
"""
SIGNATURES = {
    "utils:approx": "(a, b=1)",
    "trainer:approx": "(a, b=1)",
    "trainer:loss": "(x, *, scale=2.0)",
    "trainer:Base.inherited": "(self)",
    "trainer:Trainer.step": "(self, x)",
    "trainer:Trainer.static": "(x)",
    "trainer:Trainer.made": "(cls, x)",
    "trainer:Trainer.decorated": "(self, x)",
    "trainer:Trainer.later": "(self, x)",
    "trainer:Trainer.Inner.nested": "(self, x)",
}
STEP, LOSS, APPROX, APPROX_BY_NAME = "trainer:Trainer.step", "trainer:loss", "utils:approx", "trainer:approx"
SEVERAL = (LOSS, STEP, "trainer:Trainer.static", APPROX)


def digest_of(source, qualname):
    """Of a function in a module's text; without importing it, and without the engine."""
    node = ast.parse(source)
    for part in qualname.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    text = textwrap.dedent("\n".join(source.splitlines()[first - 1 : node.end_lineno]))
    return hashlib.sha256(text.encode()).hexdigest()


def as_toml(names, wrapper="stubwrap:hundred", tested="1.0"):
    text = [f'host = "stubhost"\ntested = ["{tested}"]\n']
    for name in names:
        source = UTILS if "approx" in name else TRAINER
        used = wrapper if isinstance(wrapper, str) else wrapper[names.index(name)]
        text.append(f"""
[[target]]
name = "stubhost.{name}"
role = "loss"
wrapper = "{used}"
signature = "{SIGNATURES[name]}"
reason = "A test needs it."
[target.digests]
"{tested}" = "{digest_of(source, name.partition(":")[2])}"
""")
    return "".join(text)


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host of two modules, installed in version 1.0; `edit` changes its source, `patches` makes the data."""

    def write(**modules):
        for name, source in modules.items():
            (tmp_path / "stubhost" / f"{name}.py").write_text(source)
        importlib.invalidate_caches()

    def edit(module, old, new):
        path = tmp_path / "stubhost" / f"{module}.py"
        assert old in path.read_text()
        write(**{module: path.read_text().replace(old, new)})

    def release(version):
        (tmp_path / "stubhost-1.dist-info").mkdir(exist_ok=True)
        (tmp_path / "stubhost-1.dist-info" / "METADATA").write_text(f"Name: stubhost\nVersion: {version}\n")

    def patches(*names, **options):
        (tmp_path / "stubhost.toml").write_text(as_toml(names, **options))
        return load_patches("stubhost", folder=tmp_path)

    (tmp_path / "stubhost").mkdir()
    (tmp_path / "stubwrap.py").write_text(WRAPPERS)
    write(__init__="", utils=UTILS, trainer=TRAINER)
    release("1.0")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits may fall into one second
    finders = list(sys.meta_path)
    yield SimpleNamespace(edit=edit, release=release, patches=patches, folder=tmp_path, write=write)
    left, sys.meta_path[:] = list(sys.meta_path), finders
    for name in [name for name in sys.modules if name.startswith("stub")]:
        del sys.modules[name]
    assert left == finders


def module(name="trainer"):
    return importlib.import_module(f"stubhost.{name}")


def holder_and_name(target):
    home, _, qualname = target.partition(":")
    holder = module(home)
    *path, name = qualname.split(".")
    for part in path:
        holder = vars(holder)[part]
    return holder, name


def call(target, *args):
    holder, name = holder_and_name(target)
    function = getattr(holder if inspect.ismodule(holder) else holder(), name)
    result = function(*args)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


class Snapshot:
    """Every attribute of the host's modules and classes: the identical objects, in the same order."""

    def __init__(self):
        trainer = module()
        self.holders = [module("utils"), trainer, trainer.Base, trainer.Trainer, trainer.Trainer.Inner]
        self.before = [list(vars(holder).items()) for holder in self.holders]

    def changed(self):
        return [
            name
            for holder, before in zip(self.holders, self.before, strict=True)
            for (name, value), (_, old) in zip(vars(holder).items(), before, strict=True)
            if value is not old
        ]


# Applying and undoing


@pytest.mark.parametrize("target", [name for name in SIGNATURES if name != "trainer:Base.inherited"])
def test_applied_counted_and_undone_bit_for_bit(target, host):
    wrapper = "stubwrap:hundred_later" if "later" in target else "stubwrap:hundred"
    patches, snapshot = host.patches(target, wrapper=wrapper), Snapshot()
    expected, (holder, name) = call(target, 3), holder_and_name(target)
    original = vars(holder)[name]
    patching_ = Patching(patches)
    with patching_:
        assert snapshot.changed() == [name]
        assert call(target, 3) == call(target, 3) == 100 + expected
        replaced = vars(holder)[name]
        assert type(replaced) is type(original)
        bare, old = (getattr(each, "__func__", each) for each in (replaced, original))
        assert (bare.__qualname__, bare.__module__) == (old.__qualname__, old.__module__)
        assert inspect.signature(bare) == inspect.signature(old)
        assert inspect.iscoroutinefunction(bare) == inspect.iscoroutinefunction(old)
    assert snapshot.changed() == []
    assert call(target, 3) == expected
    assert [binding.calls for binding in patching_.bindings()] == [2]


def test_a_function_imported_by_name_is_rebound_there_only(host):
    with Patching(host.patches(APPROX_BY_NAME)):
        assert call(APPROX_BY_NAME, 3) == 102
        assert call(APPROX, 3) == 2
        assert call(LOSS, 3) == 3 * 2 + 102


def test_bindings(host):
    patching_ = Patching(host.patches(LOSS, STEP))
    unbound = {"version": "", "digest": "", "calls": 0, "bound": False}
    fixed = {"role": "loss", "host": "stubhost", "pid": os.getpid()}
    assert [asdict(each) for each in patching_.bindings()] == [
        {"target": f"stubhost.{name}", **fixed, **unbound} for name in (LOSS, STEP)
    ]
    patching_.apply()
    call(STEP, 1)
    bound = {**fixed, "version": "1.0", "bound": True}
    assert json.loads(json.dumps([asdict(each) for each in patching_.bindings()])) == [
        {**bound, "target": f"stubhost.{LOSS}", "calls": 0, "digest": digest_of(TRAINER, "loss")},
        {**bound, "target": f"stubhost.{STEP}", "calls": 1, "digest": digest_of(TRAINER, "Trainer.step")},
    ]
    ours, module().loss = module().loss, None
    assert [each.bound for each in patching_.bindings()] == [False, True]
    module().loss = ours
    patching_.undo()
    assert [(each.calls, each.bound) for each in patching_.bindings()] == [(0, False), (1, False)]


def test_undone_when_the_block_raises(host):
    patches, snapshot = host.patches(*SEVERAL), Snapshot()
    during = []

    def block():
        with Patching(patches):
            during.extend(snapshot.changed())
            raise KeyError("of the block")

    with pytest.raises(KeyError, match="of the block"):
        block()
    assert len(during) == len(SEVERAL)
    assert snapshot.changed() == []


class TestWhatIsOnlyReliedOn:
    """Targets of role "check": as tested, or nothing is patched; and left as they are."""

    def patches(self, host, *names):
        text = as_toml([LOSS, *names])
        at = text.index("[[target]]", text.index("[[target]]") + 1)
        rest = text[at:].replace('role = "loss"', 'role = "check"').replace('wrapper = "stubwrap:hundred"\n', "")
        (host.folder / "stubhost.toml").write_text(text[:at] + rest)
        return load_patches("stubhost", folder=host.folder)

    def test_it_is_left_as_it_is_and_listed(self, host):
        patches = self.patches(host, STEP)
        own = vars(module().Trainer)["step"]
        with Patching(patches) as patching:
            assert vars(module().Trainer)["step"] is own
            _, step = patching.bindings()
        assert (step.role, step.bound, step.calls) == ("check", False, 0)
        assert step.digest == digest_of(TRAINER, "Trainer.step")
        assert [change.state for change in changes(patches)] == ["same", "same"]

    @pytest.mark.parametrize("how", ["apply", "apply_on_import"])
    def test_a_change_of_it_keeps_everything_from_being_patched(self, host, how):
        host.edit("trainer", "def step(self, x)", "def step(self, x, y=0)")
        patches, snapshot = self.patches(host, STEP), Snapshot()
        with pytest.raises(PatchError, match=r"Trainer.step: its source has digest"):
            getattr(Patching(patches), how)()
        assert snapshot.changed() == []

    def test_a_wrapper_for_it_is_refused(self, host):
        text = as_toml([LOSS]).replace('role = "loss"', 'role = "check"')
        (host.folder / "stubhost.toml").write_text(text)
        with pytest.raises(PatchError, match="has an unknown 'wrapper'"):
            load_patches("stubhost", folder=host.folder)


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("stubwrap:broken", r"step: stubwrap:broken raised ValueError \(a broken wrapper\): fix it"),
        ("stubwrap:nothing", "step: stubwrap:nothing returned None: it must return a function"),
    ],
)
@pytest.mark.parametrize("how", ["apply", "apply_on_import"])
def test_nothing_stays_after_a_failure_half_way(how, wrapper, message, host):
    patches, snapshot = host.patches(LOSS, STEP, wrapper=["stubwrap:hundred", wrapper]), Snapshot()
    patching_ = Patching(patches)
    with pytest.raises(PatchError, match=message):
        getattr(patching_, how)()
    assert snapshot.changed() == []
    assert [each.bound for each in patching_.bindings()] == [False, False]


def test_an_interrupt_half_way_is_rolled_back_too(host, monkeypatch):
    patches, snapshot = host.patches(*SEVERAL, wrapper=["stubwrap:hundred"] * 3 + ["stubwrap:broken"]), Snapshot()

    def interrupted(original):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("stubwrap"), "broken", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Patching(patches).apply()
    assert snapshot.changed() == []


def test_a_class_that_swallows_assignments_is_noticed(host):
    host.edit("trainer", "class Base:", "class Stubborn(type):\n    def __setattr__(cls, *_): pass\n\nclass Base:")
    host.edit("trainer", "class Trainer(Base):", "class Trainer(Base, metaclass=Stubborn):")
    patches, snapshot = host.patches(LOSS, STEP), Snapshot()
    with pytest.raises(PatchError, match=r"step can't be replaced: it is Trainer.step of .*trainer.py"):
        Patching(patches).apply()
    assert snapshot.changed() == []


# Whose patch it is


@pytest.mark.parametrize("how", ["apply", "apply_on_import"])
def test_a_second_patch_of_a_target_is_refused_naming_the_owner(how, host):
    first, second = host.patches(STEP), host.patches(LOSS, STEP)
    with Patching(first, owner="somebody"):
        other = Patching(second, owner="other")
        snapshot = Snapshot()
        with pytest.raises(PatchError, match=r"Trainer.step is already patched by somebody: undo that first"):
            getattr(other, how)()
        assert snapshot.changed() == []
        check(second)  # the host itself is as it should be
    other.apply()
    other.undo()


@pytest.mark.parametrize("how", ["apply", "apply_on_import"])
def test_one_patching_is_applied_once(how, host):
    patching_ = Patching(host.patches(STEP), owner="somebody")
    getattr(patching_, how)()
    for again in (patching_.apply, patching_.apply_on_import):
        with pytest.raises(PatchError, match=r"stubhost is patched by somebody, by this very Patching: undo\(\)"):
            again()
    patching_.undo()
    with patching_:
        assert call(STEP, 1) == 102
        assert [(each.calls, each.bound) for each in patching_.bindings()] == [(1, True)]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("apply", "step was replaced meanwhile, by .*counted of .*: list it only once"),
        ("apply_on_import", "step is already patched by kl_plugins"),
    ],
)
def test_one_function_under_two_names_is_refused(how, message, host):
    host.write(api="from stubhost.trainer import Trainer\n")
    patches = host.patches(STEP)
    alias = replace(patches.targets[0], name="stubhost.api:Trainer.step")
    patching_ = Patching(replace(patches, targets=(*patches.targets, alias)))
    if how == "apply":
        snapshot = Snapshot()
        with pytest.raises(PatchError, match=message):
            patching_.apply()
        assert snapshot.changed() == []
    else:
        patching_.apply_on_import()
        with pytest.raises(PatchError, match=message):
            module("api")
        patching_.undo()


def test_what_was_patched_over_ours_is_left_and_named_and_all_else_undone(host):
    patches, snapshot = host.patches(*SEVERAL), Snapshot()
    patching_ = Patching(patches)
    patching_.apply()
    trainer = module()
    ours = trainer.Trainer.step

    @functools.wraps(ours)
    def foreign(self, x):
        return ours(self, x)

    trainer.Trainer.step = foreign
    for _ in range(2):
        with pytest.raises(
            PatchError, match=r"Trainer.step is now .*<locals>.foreign of .*test_patching.py:\d+: undo"
        ):
            patching_.undo()
        assert snapshot.changed() == ["step"]
        assert trainer.Trainer.step is foreign
    trainer.Trainer.step = ours
    patching_.undo()
    assert snapshot.changed() == []


def test_what_somebody_else_restored_is_no_problem(host):
    patching_ = Patching(host.patches(APPROX, APPROX_BY_NAME, STEP))
    patching_.apply_on_import()
    trainer, utils = module(), module("utils")
    step, approx = (inspect.unwrap(each) for each in (trainer.Trainer.step, trainer.approx))
    trainer.Trainer.step, trainer.approx = step, approx
    patching_.undo()
    assert trainer.Trainer.step is step
    assert utils.approx is trainer.approx is approx


def test_undone_in_reverse(host):
    setter = "def __setattr__(cls, *to): cls.log.append(to[0]), type.__setattr__(cls, *to)"
    host.edit("trainer", "class Base:", f"class Log(type):\n    log = []\n    {setter}\n\nclass Base:")
    host.edit("trainer", "class Trainer(Base):", "class Trainer(Base, metaclass=Log):")
    with Patching(host.patches(STEP, "trainer:Trainer.made", LOSS)):
        pass
    assert module().Trainer.log == ["step", "made", "made", "step"]


@pytest.mark.parametrize(
    ("wraps", "message"),
    [(True, r"loss is already wrapped, by .*foreign of .*test_patching.py:\d+"), (False, "loss is .*foreign of .*")],
)
def test_what_is_already_patched_by_others_is_refused(wraps, message, host):
    patches, original = host.patches(LOSS), module().loss

    def foreign(x, *, scale=2.0):
        return original(x, scale=scale)

    module().loss = functools.wraps(original)(foreign) if wraps else foreign
    with pytest.raises(PatchError, match=message):
        check(patches)


# What isn't as it was tested

DIFFERENT = {
    "body": ("x * scale", "x / scale", r"loss: its source has digest [0-9a-f]{12}, tested was [0-9a-f]{12}: {remedy}"),
    "comment": ("x * scale", "x * scale  # ?", "loss: its source has digest .* {remedy}"),
    "signature": (
        "scale: float = 2.0",
        "scale=3.0",
        r"loss is called \(x, \*, scale=3.0\), tested was .*2.0.*{remedy}",
    ),
    "renamed": (
        "def loss(",
        "def losses(",
        "loss is missing: stubhost.trainer has no 'loss', only 'losses': {remedy}",
    ),
    "class renamed": ("class Trainer(", "class PPO(", "Trainer.step is missing: .* has no 'Trainer'.*{remedy}"),
    "moved to a base": (
        "    def inherited(",
        "    def step(self, x):\n        return x\n\n    def inherited(",
        "Trainer.step is missing: Trainer inherits it from stubhost.trainer:Base, name that: {remedy}",
    ),
    "no class": ("class Trainer(Base)", "Trainer = 3\nclass PPO(Base)", "step is missing: 3, where 'step'.*{remedy}"),
    "no function": (
        "\nclass Base",
        "\nloss = functools.partial(loss)\nclass Base",
        "loss is a partial, not.*{remedy}",
    ),
    "generator": ("return x * scale + approx(x)", "yield x", "loss is a generator, which can't be patched: choose"),
    "hidden": ("@functools.wraps(function)", "", "decorated is logged.<locals>.inner of .*, which hides the source"),
    "wrapped": (
        "\nclass Base",
        "\nloss = logged(loss)\nclass Base",
        "loss is already wrapped, by logged.<loc.*.inner",
    ),
    "wrapped partial": (
        "\nclass Base",
        "\nloss = functools.wraps(functools.partial(loss))(lambda x, *, scale=2.0: 0)\nclass Base",
        r"loss: its source can't be read \(.*partial.*{remedy}",
    ),
    "no source": ("\nclass Base", "\nexec('def loss(x, *, scale=2.0): 1')\nclass Base", "loss: its source.*{remedy}"),
    "no import": (
        "def logged",
        "import no_such_module\n\ndef logged",
        r"loss: its import raised ModuleNotFoundError .*: make that import work",
    ),
}


@pytest.mark.parametrize("how", ["check", "apply", "apply_on_import"])
@pytest.mark.parametrize("different", DIFFERENT)
def test_a_different_host_is_refused_and_nothing_bound(different, how, host):
    old, new, message = DIFFERENT[different]
    if different == "moved to a base":
        host.edit("trainer", "    def step(self, x):\n        return x + 1\n", "")
    host.edit("trainer", old, new)
    patches = host.patches(APPROX, LOSS, STEP, "trainer:Trainer.decorated")
    message = message.replace("{remedy}", "reinstall stubhost==1.0")
    if how == "apply_on_import":
        patching_, error = Patching(patches), PatchError
        patching_.apply_on_import()
        if different == "no import":
            message, error = "No module named 'no_such_module'", ModuleNotFoundError  # the host's own, as ever
        with pytest.raises(error, match=message):
            module()
        assert "stubhost.trainer" not in sys.modules
        assert {each.target: each.bound for each in patching_.bindings()} == {
            target.name: target.module == "stubhost.utils" for target in patches.targets
        }
        patching_.undo()
    else:
        snapshot = Snapshot() if different not in ("class renamed", "no class", "no import") else None
        with pytest.raises(PatchError, match=message):
            check(patches) if how == "check" else Patching(patches).apply()
        assert snapshot is None or snapshot.changed() == []
        assert not hasattr(module("utils").approx, patching.OWNER_MARK)


def test_every_problem_is_listed(host):
    host.edit("trainer", "x * scale", "x / scale")
    host.edit("trainer", "def step(self, x)", "def step(self, x, y=0)")
    host.release("1.1")
    patches = host.patches(LOSS, STEP, APPROX, wrapper=["stubwrap:hundred", "stubwrap:hundred", "stubwrap:none"])
    with pytest.raises(PatchError) as error:
        check(patches)
    remedy = "install a tested version (stubhost==1.0)"
    known, found = digest_of(TRAINER, "loss"), source_digest(module().loss)
    lines = str(error.value).splitlines()
    assert lines[:3] == [
        "stubhost 1.1 can't be hooked:",
        f"- 1.1 was not tested, 1.0 was: {remedy} or, if no function changed, allow_untested "
        "(KL_PLUGINS_ALLOW_UNTESTED=1)",
        f"- stubhost.trainer:loss: its source has digest {found[:12]}, tested was {known[:12]}: {remedy}",
    ]
    assert lines[3].startswith("- stubhost.trainer:Trainer.step: its source has digest")
    assert lines[4] == f"- stubhost.{STEP} is called (self, x, y=0), tested was (self, x): {remedy}"
    assert lines[5].startswith("- stubhost.utils:approx: its wrapper stubwrap:none can't be found")
    assert len(lines) == 6


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        ("no_such_module:f", r"step: its wrapper no_such_module:f can't be found \(No module named"),
        ("stubwrap:missing", r"step: its wrapper stubwrap:missing can't be found \(module 'stubwrap' has no"),
        ("stubwrap:constant", "step: its wrapper stubwrap:constant is 3, not a function: name another"),
    ],
)
def test_wrappers_must_exist(wrapper, message, host):
    with pytest.raises(PatchError, match=message):
        check(host.patches(STEP, wrapper=wrapper))


def test_a_host_that_is_not_installed_is_refused(host):
    (host.folder / "stubhost-1.dist-info" / "METADATA").unlink()
    (host.folder / "stubhost-1.dist-info").rmdir()
    importlib.invalidate_caches()
    patches = host.patches(STEP)
    for ask in (lambda: check(patches), Patching(patches).apply, lambda: changes(patches)):
        with pytest.raises(PatchError, match=r"stubhost is not installed: install stubhost==1.0"):
            ask()


def test_an_untested_version_is_refused_unless_opted_in_and_unchanged(host, caplog):
    patches, snapshot = host.patches(LOSS, STEP), Snapshot()
    check(patches)
    assert not caplog.records
    host.release("1.1")
    with pytest.raises(PatchError, match=r"1.1 was not tested, 1.0 was: install a tested version .* allow_untested"):
        Patching(patches).apply()
    assert snapshot.changed() == []
    with caplog.at_level(logging.WARNING), Patching(patches, allow_untested=True):
        assert call(STEP, 1) == 102
    (record,) = caplog.records
    assert record.name == "kl_plugins.patching.inspection"
    assert "stubhost 1.1 was not tested, 1.0 was" in record.getMessage()


@pytest.mark.parametrize("different", ["body", "signature", "renamed"])
def test_opting_in_does_not_accept_a_changed_function(different, host, caplog):
    old, new, message = DIFFERENT[different]
    host.edit("trainer", old, new)
    host.release("1.1")
    patches, snapshot = host.patches(LOSS, STEP), Snapshot()
    message = message.replace("{remedy}", r"install a tested version \(stubhost==1.0\)")
    with pytest.raises(PatchError, match=message):
        Patching(patches, allow_untested=True).apply()
    with pytest.raises(PatchError, match=message):
        check(patches, allow_untested=True)
    assert snapshot.changed() == []
    assert not caplog.records


@pytest.mark.parametrize(("version", "accepted"), [("1.0", False), ("2.0", True), ("3.0", True)])
def test_a_tested_version_needs_its_own_digest_and_an_untested_one_any(version, accepted, host):
    (target,) = host.patches(STEP).targets
    target = replace(target, digests={"1.0": 64 * "0", "2.0": target.digests["1.0"]})
    patches = replace(host.patches(STEP), tested=("1.0", "2.0"), targets=(target,))
    host.release(version)
    if accepted:
        check(patches, allow_untested=True)
    else:
        with pytest.raises(PatchError, match=r"tested was 000000000000: reinstall stubhost==1.0"):
            check(patches, allow_untested=True)


def test_changes_tell_a_maintainer_what_a_version_takes(host):
    host.edit("trainer", "x * scale", "x / scale")
    host.edit("trainer", "def step(self, x)", "def step(self, x, y=0)")
    host.edit("trainer", "class Inner", "class Outer")
    host.release("1.1")
    nested = "trainer:Trainer.Inner.nested"
    found = changes(host.patches(LOSS, STEP, nested, APPROX))
    assert [(each.target, each.state) for each in found] == [
        (f"stubhost.{LOSS}", "changed"),
        (f"stubhost.{STEP}", "signature"),
        (f"stubhost.{nested}", "missing"),
        (f"stubhost.{APPROX}", "same"),
    ]
    source = (host.folder / "stubhost" / "trainer.py").read_text()
    assert [each.digest for each in found] == [
        digest_of(source, "loss"),
        digest_of(source, "Trainer.step"),
        "",
        digest_of(UTILS, "approx"),
    ]
    assert [each.signature for each in found] == ["(x, *, scale=2.0)", "(self, x, y=0)", "", "(a, b=1)"]
    assert "Trainer has no 'Inner'" in found[2].detail


# On import


def test_modules_are_patched_before_their_importer_sees_them(host):
    patches = host.patches(APPROX, APPROX_BY_NAME, LOSS)
    host.write(consumer="from stubhost.trainer import loss\nfound = loss(3)\n")
    patching_ = Patching(patches)
    patching_.apply_on_import()
    assert not [name for name in sys.modules if name.startswith("stub")]
    assert module("consumer").found == 100 + 3 * 2 + 102  # `approx` by its own name only, not twice
    assert [(each.calls, each.bound) for each in patching_.bindings()] == [(0, True), (1, True), (1, True)]
    trainer, utils, finder = module(), module("utils"), sys.meta_path[0]
    assert isinstance(trainer.__loader__, importlib.machinery.SourceFileLoader)
    assert trainer.__spec__.loader is trainer.__loader__
    patching_.undo()
    assert trainer.approx is utils.approx
    assert trainer.loss(3) == 3 * 2 + 2
    assert not [f for f in (trainer.loss, trainer.approx, utils.approx) if hasattr(f, patching.OWNER_MARK)]
    del sys.modules["stubhost.trainer"]
    assert module().loss(3) == 3 * 2 + 2  # nobody watches any more
    assert finder.find_spec("stubhost.trainer", None) is None


def test_modules_already_imported_are_patched_at_once(host):
    patching_ = Patching(host.patches(APPROX, STEP))
    module("utils")
    patching_.apply_on_import()
    assert [each.bound for each in patching_.bindings()] == [True, False]
    assert call(STEP, 1) == 102
    patching_.undo()
    assert call(STEP, 1) == 2


def test_a_failing_module_leaves_the_others_patched_and_can_be_imported_after_undo(host):
    host.edit("trainer", "x * scale", "x / scale")
    patching_ = Patching(host.patches(APPROX, STEP, LOSS))
    patching_.apply_on_import()
    for _ in range(2):  # trying again doesn't help
        with pytest.raises(PatchError, match="trainer:loss: its source has digest"):
            module()
    assert [each.bound for each in patching_.bindings()] == [True, False, False]
    patching_.undo()
    assert call(STEP, 1) == 2
    assert call(APPROX, 3) == 2


def test_an_import_after_which_the_patching_was_undone_is_not_patched(host):
    patching_ = Patching(host.patches(STEP))
    patching_.apply_on_import()
    spec = importlib.util.find_spec("stubhost.trainer")
    assert "stubhost.trainer" not in sys.modules
    patching_.undo()
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    assert trainer.Trainer().step(1) == 2


def test_what_was_patched_on_the_way_to_a_failure_is_undone_too(host):
    (host.folder / "stublate.py").write_text("import stubhost.trainer\nfrom stubwrap import broken\n")
    patching_ = Patching(host.patches(APPROX, STEP, wrapper=["stublate:broken", "stubwrap:hundred"]))
    module("utils")
    with pytest.raises(PatchError, match="a broken wrapper"):
        patching_.apply_on_import()
    assert [each.version for each in patching_.bindings()] == [
        "",
        "1.0",
    ]  # the latter's module was imported on the way
    assert [each.bound for each in patching_.bindings()] == [False, False]
    assert call(STEP, 1) == 2


def test_a_spec_found_by_hand_is_patched_and_others_left_alone(host):
    expected = importlib.util.find_spec("stubhost.utils")
    with_patch = Patching(host.patches(STEP))
    with_patch.apply_on_import()
    found = importlib.util.find_spec("stubhost.utils")
    assert (found, type(found.loader)) == (expected, type(expected.loader))
    assert importlib.util.find_spec("stubhost.no_such_module") is None
    spec = importlib.util.find_spec("stubhost.trainer")
    assert spec.loader.get_source("stubhost.trainer") == TRAINER
    trainer = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(trainer)
    assert trainer.Trainer().step(1) == 102
    with_patch.undo()
    assert trainer.Trainer().step(1) == 2


def test_a_reloaded_module_is_patched_again_and_undone(host):
    patching_ = Patching(host.patches(APPROX, LOSS, STEP))
    patching_.apply_on_import()
    old = module().Trainer
    for _ in range(2):
        trainer = importlib.reload(module())
        assert trainer.loss(3) == 100 + 3 * 2 + 102
        assert trainer.Trainer().step(1) == old().step(1) == 102
    patching_.undo()
    assert trainer.loss(3) == 3 * 2 + 102  # its copy of `approx` is no target
    assert trainer.Trainer().step(1) == old().step(1) == 2
    assert importlib.reload(trainer).loss(3) == 3 * 2 + 2


class OtherFinder:
    """Somebody else's finder, which wraps loaders too."""

    def __init__(self, ask):
        self.ask, self.asking, self.executed = ask, False, []

    def find_spec(self, name, path=None, target=None):
        if self.asking or not name.startswith("stubhost."):
            return None
        self.asking = True
        try:
            if self.ask == "all":
                spec = importlib.util.find_spec(name)
            else:
                others = sys.meta_path[sys.meta_path.index(self) + 1 :]
                spec = next(found for finder in others if (found := finder.find_spec(name, path, target)))
        finally:
            self.asking = False
        inner = spec.loader
        self.execute = inner.exec_module
        spec.loader = SimpleNamespace(create_module=inner.create_module, exec_module=self.exec_module)
        return spec

    def exec_module(self, module):
        execute = self.execute
        execute(module)
        self.executed.append(module.__name__)


@pytest.mark.parametrize("ask", ["all", "those behind"])
@pytest.mark.parametrize("where", ["before", "behind"])
def test_other_finders_that_wrap_loaders_do_so_too(where, ask, host):
    importlib.import_module("stubhost.utils")
    patching_, other = Patching(host.patches(STEP)), OtherFinder(ask)
    if where == "behind":
        sys.meta_path.insert(0, other)
    patching_.apply_on_import()
    if where == "before":
        sys.meta_path.insert(0, other)
    assert call(STEP, 1) == 102
    assert other.executed == ["stubhost.trainer"]
    sys.meta_path.remove(other)
    patching_.undo()
    assert call(STEP, 1) == 2


def test_two_patchings_watch_one_module(host):
    one, two = Patching(host.patches(STEP)), Patching(host.patches(LOSS))
    one.apply_on_import()
    two.apply_on_import()
    assert (call(STEP, 1), call(LOSS, 3)) == (102, 100 + 3 * 2 + 2)
    one.undo()
    assert (call(STEP, 1), call(LOSS, 3)) == (2, 100 + 3 * 2 + 2)
    two.undo()
    assert call(LOSS, 3) == 3 * 2 + 2


def test_a_loader_that_cannot_be_wrapped_is_refused(host, monkeypatch):
    patching_ = Patching(host.patches(STEP))
    patching_.apply_on_import()
    without = SimpleNamespace(find_spec=lambda name, *_: ModuleSpec(name, object()) if name.endswith("er") else None)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path[:1], without, PathFinder])
    with pytest.raises(PatchError, match=r"stubhost.trainer can't be patched while .* loads it: import it before"):
        module()
    monkeypatch.undo()
    patching_.undo()


# Digests, signatures and data


def test_digests_ignore_indentation_and_trailing_whitespace_only(host):
    text = "def f(self, x):\n    # why\n    return x\n"
    host.write(
        plain=text,
        trailing=text.replace("\n", "  \n") + "\n\n",
        method="class C:\n\n" + textwrap.indent(text, "    ") + "\nf = C.f\n",
        comment=text.replace("why", "what"),
        default=text.replace("x)", "x=1)"),
    )
    found = {name: source_digest(module(name).f) for name in ("plain", "trailing", "method", "comment", "default")}
    assert found["plain"] == hashlib.sha256(text.strip().encode()).hexdigest()
    assert found["plain"] == found["trailing"] == found["method"]
    assert len(set(found.values())) == 3


def test_signatures_have_neither_annotations_nor_addresses():
    async def function(self, /, a: int, *rest: str, key: "list[int] | None" = None, default=object(), **more) -> None:  # noqa: B008
        pass

    assert bare_signature(function) == "(self, /, a, *rest, key=None, default=<object object>, **more)"


@pytest.mark.parametrize("where", ["wheel", "clone"])
def test_data_is_found_in_a_wheel_and_in_a_clone(where, tmp_path, monkeypatch):
    package = tmp_path / "kl_plugins"
    folder = package / "_patches" if where == "wheel" else tmp_path / "patches"
    for each in (package, folder):
        each.mkdir()
    (folder / "stubhost.toml").write_text(as_toml([STEP, LOSS]).replace('1.0"]', '1.0"]\n# Comments are welcome'))
    monkeypatch.setattr(targets, "__file__", str(package / "patching" / "targets.py"))
    patches = load_patches("stubhost")
    assert (patches.host, patches.tested) == ("stubhost", ("1.0",))
    step, _ = patches.targets
    assert (step.module, step.qualname) == ("stubhost.trainer", "Trainer.step")
    assert (step.role, step.wrapper, step.signatures) == ("loss", "stubwrap:hundred", ("(self, x)",))
    assert (step.digests, step.links) == ({"1.0": digest_of(TRAINER, "Trainer.step")}, ())
    with pytest.raises(PatchError, match=f"'nohost' were asked for, which {folder} lacks: known are stubhost"):
        load_patches("nohost")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("host =", "host", r"stubhost.toml is not TOML: .*line 1"),
        ('host = "stubhost"', 'host = "trl"', "it needs host = 'stubhost'"),
        ('host = "stubhost"', "", "the file lacks 'host'"),
        ("tested =", "versions =", "the file lacks 'tested'\n- the file has an unknown 'versions'"),
        ('["1.0"]', "[]", "it needs .* tested = "),
        ('["1.0"]', "[1.0]", "it needs .* tested = "),
        ('["1.0"]', '["1.0", "1.1"]', "target 'stubhost.trainer:loss': digests lacks '1.1'"),
        ('["1.0"]', '["1.1"]', "digests lacks '1.1'\n.*digests has an unknown '1.0'"),
        ("[[target]]", "[target]", "(?s)not TOML|at least one"),
        ("reason =", "reasons =", "loss' lacks 'reason'\n- target 'stubhost.trainer:loss' has an unknown 'reasons'"),
        (
            'role = "loss"',
            'role = "losses"',
            r"loss': role must match loss\|reward\|sampling\|log\|start\|check, not be 'losses'",
        ),
        ('"stubhost.trainer:loss"', '"stubhost.trainer.loss"', "name must match"),
        ('"stubwrap:hundred"', "3", "wrapper must match .*, not be 3"),
        ('"(x, *, scale=2.0)"', '"x, scale"', "signature must match"),
        ('reason = "A', 'links = "https://"\nreason = "A', "links must be a list of addresses"),
        ('"1.0" = "', '"1.0" = "x', "digests must be a table, version = SHA-256 in hex"),
        ('[target.digests]\n"1.0" =', "digests =", "digests must be a table"),
        ("stubhost.trainer:Trainer.step", "stubhost.trainer:loss", "loss' is listed more than once"),
    ],
)
def test_wrong_data_is_refused(old, new, message, tmp_path):
    text = as_toml([LOSS, STEP])
    assert old in text
    path = tmp_path / "stubhost.toml"
    path.write_text(text)
    load_patches("stubhost", folder=tmp_path)
    path.write_text(text.replace(old, new))
    with pytest.raises(PatchError, match=message):
        load_patches("stubhost", folder=tmp_path)


def test_links_are_read(tmp_path):
    text = as_toml([STEP]).replace("reason =", 'links = ["https://a", "https://b"]\nreason =')
    (tmp_path / "stubhost.toml").write_text(text)
    assert load_patches("stubhost", folder=tmp_path).targets[0].links == ("https://a", "https://b")


class TestParts:
    """A host of which some parts come and go between its versions."""

    def write(self, tmp_path, change=lambda text: text):
        text = as_toml([STEP, LOSS, APPROX]).replace('tested = ["1.0"]', 'tested = ["0.9", "1.0"]')
        heads = text.split("[[target]]")
        names = zip(heads[1:], "aab", strict=True)
        parts = [head.replace("role =", f'part = "{name}"\nrole =') for head, name in names]
        parts[2] = parts[2].replace("[target.digests]", f'[target.digests]\n"0.9" = "{"0" * 64}"')
        (tmp_path / "stubhost.toml").write_text(change("[[target]]".join([heads[0], *parts])))

    def test_each_has_the_versions_in_which_it_was_tested(self, tmp_path):
        self.write(tmp_path)
        loaded = {parts: load_patches("stubhost", *parts, folder=tmp_path) for parts in ("a", "b", "ab")}
        assert {parts: patches.tested for parts, patches in loaded.items()} == {
            "a": ("1.0",),
            "b": ("0.9", "1.0"),
            "ab": ("1.0",),
        }
        assert [target.qualname for target in loaded["a"].targets] == ["Trainer.step", "loss"]
        assert load_patches("stubhost", folder=tmp_path).tested == ("0.9", "1.0")
        with pytest.raises(PatchError, match="has no part c: it has a, b"):
            load_patches("stubhost", "a", "c", folder=tmp_path)

    def test_the_targets_of_one_part_have_the_same_versions(self, tmp_path):
        self.write(tmp_path, lambda text: text.replace('part = "b"', 'part = "a"'))
        with pytest.raises(PatchError, match=r"Trainer.step': digests lacks '0.9'"):
            load_patches("stubhost", folder=tmp_path)

    def test_what_a_tested_version_does_not_have_is_no_change(self, host, tmp_path):
        self.write(tmp_path)
        assert {each.state for each in changes(load_patches("stubhost", folder=tmp_path))} == {"same"}
        self.write(tmp_path, lambda text: text.replace('"1.0" =', '"0.9" =', 2))
        (one,) = changes(load_patches("stubhost", folder=tmp_path))
        assert (one.target, one.state) == ("stubhost.utils:approx", "same")

    def test_a_target_may_be_called_in_several_ways(self, tmp_path):
        self.write(tmp_path, lambda text: text.replace('"(self, x)"', '["(self)", "(self, x)"]'))
        assert load_patches("stubhost", folder=tmp_path).targets[0].signatures == ("(self)", "(self, x)")
