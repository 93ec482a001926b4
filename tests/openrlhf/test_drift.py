"""Any single function that is replaced or relied on, renamed, with another signature or body: nothing starts."""

from __future__ import annotations

import pytest
from drift import EDITS, change, holder_of, nothing_starts
from tiny_openrlhf import import_openrlhf

from kl_plugins import PatchError
from kl_plugins.patching import Patching, check, load_patches

PATCHES = load_patches("openrlhf")


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("target", PATCHES.targets, ids=lambda target: target.name.partition(":")[2])
def test_a_changed_function_keeps_everything_from_starting(target, edit, tmp_path, monkeypatch):
    import_openrlhf()
    change(target, edit, tmp_path, monkeypatch)
    replaced = [each for each in PATCHES.targets if each.wrapper and each is not target]
    before = [vars(holder_of(each)[0])[holder_of(each)[1]] for each in replaced]
    patching = Patching(PATCHES)
    nothing_starts((lambda: check(PATCHES), patching.apply, patching.apply_on_import), target, "openrlhf==0.11.2")
    assert [vars(holder_of(each)[0])[holder_of(each)[1]] for each in replaced] == before


def test_another_version_is_refused_by_name(monkeypatch):
    import_openrlhf()
    monkeypatch.setattr("kl_plugins.patching.inspection.installed_version", lambda host: "0.12.0")
    with pytest.raises(PatchError, match=r"0.12.0 was not tested, 0.11.2 was: install .*openrlhf==0.11.2"):
        check(PATCHES)
    check(PATCHES, allow_untested=True)  # no function changed
