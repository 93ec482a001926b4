"""A pytest plugin: OpenRLHF's own tests meet OpenRLHF as it is with kl_plugins loaded and idle."""

from tiny_openrlhf import import_openrlhf

from kl_plugins.patching import Patching, load_patches


def pytest_collection_modifyitems(items):
    import_openrlhf()
    Patching(load_patches("openrlhf")).apply()
    import openrlhf.trainer.ray.ppo_actor as hooked

    assert hooked.compute_approx_kl.__patched_by__ == "kl_plugins"
    for item in items:
        item.module.compute_approx_kl = hooked.compute_approx_kl
