"""The examples in the docstrings of the core and of the oracle are run."""

import doctest
import pkgutil
from importlib import import_module

import pytest
import torch

import kl_plugins
from kl_plugins import core, oracle

MODULES = [*(f"{core.__name__}.{module.name}" for module in pkgutil.iter_modules(core.__path__)), oracle.__name__]
# Whose functions are told apart better by their formulas and by the tests.
WITHOUT_EXAMPLES = {"kl_plugins.core.checks", "kl_plugins.core.metrics"}


def run_examples(module):
    """(failed, attempted). What users import is there already, as in a notebook; `...` stands for anything."""
    given = {"torch": torch, **{name: getattr(kl_plugins, name) for name in kl_plugins.__all__}}
    return doctest.testmod(module, extraglobs=given, optionflags=doctest.ELLIPSIS)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    failed, attempted = run_examples(import_module(name))
    assert failed == 0
    assert (attempted == 0) == (name in WITHOUT_EXAMPLES)


def test_a_wrong_example_is_noticed(monkeypatch):
    right = oracle.check_loss.__doc__
    monkeypatch.setattr(oracle.check_loss, "__doc__", right.replace('check_loss("k2_as_loss")', 'check_loss("k9")'))
    assert run_examples(oracle).failed == 1
