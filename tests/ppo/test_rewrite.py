"""The statements of TRL's `train` that are replaced or relied on: any change to one of them is refused, by name."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import textwrap

import pytest
import torch
from transformers import set_seed
from trl.experimental import ppo as stock

from kl_plugins import PatchError
from kl_plugins.patching.rewrite import Edit, edited, statement_digest
from kl_plugins.trl.ppo import EDITS, edited_train

REPLACED = [edit for edit in EDITS if edit.value or edit.before]


def names(edits):
    return [edit.name for edit in edits]


@pytest.fixture
def changed_train(tmp_path):
    """`changed_train(change)`: TRL's `train` as a function of another file, each statement replaced by `change`'s."""

    def make(change):
        class Changer(ast.NodeTransformer):
            def visit_Assign(self, node):
                return change(node)

        tree = ast.parse(textwrap.dedent(inspect.getsource(stock.PPOTrainer.train)))
        path = tmp_path / "changed.py"
        path.write_text(ast.unparse(ast.fix_missing_locations(Changer().visit(tree))) + "\n")
        spec = importlib.util.spec_from_file_location("changed", path)
        module = importlib.util.module_from_spec(spec)
        vars(module).update({k: v for k, v in vars(stock.ppo_trainer).items() if not k.startswith("__")})
        spec.loader.exec_module(module)
        return module.train

    return make


def is_of(node, edit):
    return statement_digest(node) == edit.digest


def test_a_mere_change_of_layout_is_none(changed_train):
    train = edited_train(changed_train(lambda node: node))
    assert {"_kl_reward", "_kl_whitened", "_kl_advantages", "_kl_term"} <= set(train.__code__.co_names)


@pytest.mark.parametrize("edit", EDITS, ids=names(EDITS))
def test_renamed(changed_train, edit):
    def rename(node):
        if is_of(node, edit):
            node.targets[0].id += "_new"
        return node

    with pytest.raises(PatchError, match=rf"assignment to '{edit.name}' \(digest {edit.digest}\) was not found"):
        edited_train(changed_train(rename))


@pytest.mark.parametrize("edit", EDITS, ids=names(EDITS))
def test_altered(changed_train, edit):
    def alter(node):
        if is_of(node, edit):
            node.value = ast.BinOp(node.value, ast.Mult(), ast.Constant(2))
        return node

    with pytest.raises(PatchError, match=rf"'{edit.name}' \(digest {edit.digest}\) was not found, only: line \d+"):
        edited_train(changed_train(alter))


@pytest.mark.parametrize("edit", EDITS, ids=names(EDITS))
def test_twice(changed_train, edit):
    with pytest.raises(PatchError, match=rf"'{edit.name}' \(digest {edit.digest}\) was found 2 times, in lines"):
        edited_train(changed_train(lambda node: [node, node] if is_of(node, edit) else node))


def test_every_problem_is_named_at_once(changed_train):
    def rename(node):
        if any(is_of(node, edit) for edit in REPLACED):
            node.targets[0].id += "_new"
        return node

    with pytest.raises(PatchError) as found:
        edited_train(changed_train(rename))
    assert all(edit.name in str(found.value) for edit in REPLACED)


def test_names_that_the_function_lacks_are_refused():
    (edit,) = (edit for edit in EDITS if edit.name == "loss")
    with pytest.raises(PatchError, match="reads 'nowhere', which the function does not have"):
        edited(stock.PPOTrainer.train, [Edit(name="loss", digest=edit.digest, value="HOST + nowhere")])


def test_what_is_no_plain_function_is_refused():
    class Child(stock.PPOTrainer):
        def train(self):
            super().train()

    for wrong in (Child.train, print, stock.PPOTrainer):
        with pytest.raises(PatchError, match="plain function"):
            edited(wrong, [])


def test_without_edits_it_does_the_same(make_trainer, parameters):
    theirs, ours, other = (make_trainer(stock.PPOTrainer, config=stock.PPOConfig, updates=2) for _ in range(3))
    made = edited(stock.PPOTrainer.train, [])
    assert made.__code__ is not stock.PPOTrainer.train.__code__
    assert made.__globals__ is stock.PPOTrainer.train.__globals__
    assert _lines(made) == _lines(stock.PPOTrainer.train)
    edit = next(edit for edit in EDITS if edit.name == "loss")
    doubled = edited(stock.PPOTrainer.train, [Edit(name="loss", digest=edit.digest, value="HOST + HOST")])
    assert _lines(doubled) == _lines(stock.PPOTrainer.train)

    for trainer, train in ((theirs, stock.PPOTrainer.train), (ours, made), (other, doubled)):
        set_seed(0)
        train(trainer)
    assert torch.equal(parameters(ours), parameters(theirs))
    assert not torch.equal(parameters(other), parameters(theirs))  # the twin


def _lines(function):
    return {line for *_, line in function.__code__.co_lines() if line}
