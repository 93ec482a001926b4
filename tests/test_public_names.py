"""The paths that users write: in scripts, configuration files, shell variables and entry points."""

from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import resolve_name

import pytest

import kl_plugins

PUBLIC = {
    "kl_plugins": "KLSpec kl_terms KLTerms KLLoss ExactKL exact_kl register get_loss all_losses surrogate "
    "leave_one_out_baseline apply_to_trl ConfigError PatchError UnknownLossError __version__",
    "kl_plugins.errors": "ConfigError PatchError UnknownLossError",
    "kl_plugins.trl": "GRPOConfig GRPOTrainer RLOOConfig RLOOTrainer GMPOConfig GMPOTrainer KLMonitorCallback",
    "kl_plugins.trl.callbacks": "",
    "kl_plugins.openrlhf": "OpenRLHFOptions plan_run",
    "kl_plugins.openrlhf.driver": "runtime_env_hook prepare",
    "kl_plugins.oracle": "check_loss structured_policies",
    "kl_plugins.conformance": "",
    "kl_plugins.report": "read_metrics summary_table plot_runs",
    "kl_plugins.cli": "main",
}


@pytest.mark.parametrize(("module", "names"), PUBLIC.items())
def test_public_paths(module, names):
    found = import_module(module)
    assert [name for name in names.split() if not hasattr(found, name)] == []


def test_the_package_lists_what_it_offers():
    assert {*kl_plugins.__all__, "__version__"} == set(PUBLIC["kl_plugins"].split())


def test_entry_points():
    (command,) = entry_points(group="console_scripts", name="kl-plugins")
    assert command.value == "kl_plugins.cli:main"
    (plugin,) = entry_points(group="pytest11", name="kl_plugins.pytest_plugin")
    assert plugin.value == "kl_plugins.pytest_plugin"
    for each in (command, plugin):
        assert each.load() is resolve_name(each.value)


def test_a_name_that_is_not_there_is_missed():
    with pytest.raises(AttributeError, match="no attribute 'kl_term'"):
        kl_plugins.kl_term  # noqa: B018
