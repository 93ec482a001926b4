"""The registry: frozen records, and third parties' entry points."""

import importlib
from dataclasses import FrozenInstanceError, replace
from importlib.metadata import EntryPoint, EntryPoints

import pytest

import kl_plugins
from kl_plugins import ConfigError, KLLoss, KLSpec, UnknownLossError, all_losses, get_loss
from kl_plugins.core import estimators, registry

HERE = "third_party_of_this_test"


def made(name="mine", **fields):
    return KLLoss(
        **{
            "name": name,
            "summary": "A third party's.",
            "value": estimators.k1,
            "coefficient": estimators.k1,
            "gradient_of": {"token": "local_reverse_kl"},
        }
        | fields
    )


class AsClass(KLLoss):
    def __init__(self):
        super().__init__(**vars(made()))


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages are installed whose entry points name attributes of a module made here."""
    found = []

    def entry_points(**params):
        return EntryPoints(found).select(**params)

    def install(name, thing, group=registry.ENTRY_POINT_GROUP):
        module = type(registry)(f"{HERE}_{len(found)}")
        module.thing = thing
        monkeypatch.setitem(__import__("sys").modules, module.__name__, module)
        found.append(EntryPoint(name=name, value=f"{module.__name__}:thing", group=group))
        registry._third_party.cache_clear()
        return thing

    monkeypatch.setattr(registry, "entry_points", entry_points)
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))
    yield install
    registry._third_party.cache_clear()


@pytest.mark.parametrize(
    "thing", [made(), made, AsClass, lambda: made()], ids=["record", "function", "class", "lambda"]
)
def test_entry_points_name_a_record_or_what_makes_one(thing, installed):
    installed("mine", thing)
    assert "mine" not in registry.LOSSES  # nothing is imported before it is asked for
    loss = get_loss("mine")
    assert loss.name == "mine"
    assert get_loss("mine") is loss  # made once
    assert KLSpec.from_name("mine").gradient_of == "local_reverse_kl"
    assert all_losses()["mine"] is loss


def test_nothing_is_loaded_for_a_built_in(installed):
    installed("broken", None)
    assert get_loss("k2_as_loss").name == "k2_as_loss"


def test_a_package_that_is_put_on_the_path_is_found(tmp_path, monkeypatch):
    with pytest.raises(UnknownLossError):
        get_loss("on_the_path")
    package = tmp_path / "found_on_the_path-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: found_on_the_path\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\non_the_path = found_on_the_path:loss\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'on_the_path' \(found_on_the_path:loss\) can't be imported"):
        get_loss("on_the_path")


def test_a_package_that_is_installed_later_is_found(tmp_path, monkeypatch):
    """Into a folder that was on the path all the time, as pip does from a notebook."""
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownLossError):
        get_loss("installed_later")
    package = tmp_path / "installed_later-1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Name: installed_later\nVersion: 1\n")
    (package / "entry_points.txt").write_text(
        f"[{registry.ENTRY_POINT_GROUP}]\ninstalled_later = installed_later:loss\n"
    )
    importlib.invalidate_caches()
    with pytest.raises(ConfigError, match=r"'installed_later' \(installed_later:loss\) can't be imported"):
        get_loss("installed_later")


def test_entry_points_of_another_group_are_not_ours(installed):
    installed("mine", made(), group="someone_elses.losses")
    with pytest.raises(UnknownLossError):
        get_loss("mine")


@pytest.mark.parametrize("thing", ["k2_as_loss", 3, None, {"name": "mine"}, dict, lambda: 3])
def test_entry_points_of_a_wrong_type_are_refused(thing, installed):
    installed("mine", thing)
    for ask in (lambda: get_loss("mine"), all_losses):
        with pytest.raises(ConfigError, match=rf"entry point 'mine' \({HERE}_0:thing\) gave a \w+: it must name a"):
            ask()
    assert "mine" not in registry.LOSSES


def test_entry_point_and_record_must_have_one_name(installed):
    installed("mine", made("yours"))
    with pytest.raises(ConfigError, match=r"entry point 'mine' .* gave the KL loss 'yours': make them equal"):
        get_loss("mine")
    assert not {"mine", "yours"} & set(registry.LOSSES)


def test_unknown_names_list_third_parties_without_loading_them(installed):
    installed("mine_as_loss", "not a record")
    with pytest.raises(UnknownLossError, match=r"did you mean 'mine_as_loss'.*known are.*k1_in_reward.*mine_as_loss"):
        get_loss("mine_as_los")


def test_entry_point_that_clashes_with_a_built_in_is_refused(installed):
    installed("k2_as_loss", made("k2_as_loss"))
    for ask in (all_losses, lambda: get_loss("k2_as_loss"), lambda: KLSpec.from_name("k2_as_loss")):
        with pytest.raises(ConfigError, match=rf"'k2_as_loss' is .* by kl_plugins itself, {HERE}_0:thing: rename"):
            ask()


def test_two_entry_points_of_one_name_are_refused_however_often_one_asks(installed):
    installed("mine", made())
    installed("mine", made())
    for _ in range(2):
        with pytest.raises(
            ConfigError, match=rf"'mine' is registered more than once, by {HERE}_0:thing, {HERE}_1:thing"
        ):
            get_loss("mine")


def test_register(monkeypatch):
    monkeypatch.setattr(registry, "LOSSES", dict(registry.LOSSES))
    loss = made()
    assert kl_plugins.register(loss) is loss
    assert kl_plugins.register(loss) is loss  # the same one again changes nothing
    for clash in (made(summary="Another."), made("k2_as_loss")):
        with pytest.raises(ConfigError, match=f"'{clash.name}' is already registered: choose another name"):
            kl_plugins.register(clash)
    assert get_loss("k2_as_loss").source.startswith("Liu")


def test_records_are_frozen():
    loss = get_loss("k2_as_loss")
    with pytest.raises(FrozenInstanceError):
        loss.name = "k1_as_loss"
    with pytest.raises(TypeError):
        loss.gradient_of["token"] = "zero"
    declared = {"token": "zero"}
    frozen = made(gradient_of=declared)
    declared["token"] = "biased"
    assert frozen.gradient_of["token"] == "zero"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_of": {"token": "reverse"}}, "credit 'token' declares gradient_of='reverse'.*local_reverse_kl"),
        ({"gradient_of": {"all": "zero"}, "default_credit": "all"}, "credit 'all'.*token, to_go, sequence"),
        ({"gradient_of": {"to_go": "reverse_kl"}}, "default_credit='token' has no gradient_of"),
        ({"gradient_of": {}}, "default_credit='token' has no gradient_of"),
        ({"default_credit": "sequence"}, "default_credit='sequence' has no gradient_of"),
        ({"exact": "backward"}, "exact='backward'; choose from '', 'reverse_kl', 'forward_kl'"),
        (
            {"exact": "reverse_kl", "gradient_of": {"token": "local_reverse_kl", "sequence": "reverse_kl"}},
            "what is exact has credit token or to_go, not sequence",
        ),
    ],
)
def test_records_that_contradict_themselves_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        made(**fields)


def test_every_refused_record_says_what_it_is_and_names_a_principled_one():
    for loss in registry.LOSSES.values():
        for gradient in loss.gradient_of.values():
            if gradient in ("zero", "biased"):
                assert loss.expected
                assert KLSpec.from_name(loss.instead).gradient_of not in ("zero", "biased")
        assert loss.summary.endswith(".")
        assert "arXiv" in loss.source


def test_replace_checks_again():
    with pytest.raises(ConfigError, match="default_credit"):
        replace(get_loss("k2_as_loss"), default_credit="to_go")


def test_public_names():
    for name in kl_plugins.__all__:
        assert getattr(kl_plugins, name).__name__ == name
        assert name in dir(kl_plugins)
    with pytest.raises(AttributeError, match="no attribute 'KLSpecs'"):
        kl_plugins.KLSpecs  # noqa: B018
