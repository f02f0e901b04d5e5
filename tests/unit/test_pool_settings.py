"""Settings of a pool: kept with it, checked, obeyed at once, harmless when a newer version wrote them."""

from __future__ import annotations

from pathlib import Path

import pytest

from thinpool.errors import BadSetting
from thinpool.opening import create_pool, open_pool
from thinpool.pool_location import PoolLocation
from thinpool.pool_settings import BY_NAME, SETTINGS, PoolSettings, checked


@pytest.fixture
def location(tmp_path: Path) -> PoolLocation:
    create_pool(tmp_path / "pool", size_bytes=1 << 20)
    return PoolLocation.directory(tmp_path / "pool")


def test_settings_stay_with_the_pool(location: PoolLocation) -> None:
    pool = open_pool(location)
    assert pool.settings == PoolSettings()
    pool.change_settings({"when-full": "error", "queue-timeout": "90s"})
    assert pool.engine.full.when_full == "error"
    pool.close()
    pool = open_pool(location)
    assert (pool.settings.when_full, pool.settings.queue_timeout) == ("error", 90)
    pool.override_settings({"when-full": "queue"})
    assert pool.engine.full.when_full == "queue"
    pool.change_settings({"when-full": None, "queue-timeout": None})
    pool.close()
    pool = open_pool(location)
    assert pool.settings == PoolSettings()
    pool.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("when-full", "maybe"),
        ("queue-timeout", "-1"),
        ("queue-timeout", "1e9"),
        ("none", "1"),
        ("when-full", 3),
    ],
)
def test_what_makes_no_sense_changes_nothing(location: PoolLocation, name: str, value: object) -> None:
    pool = open_pool(location)
    with pytest.raises(BadSetting) as caught:
        pool.change_settings({"queue-timeout": "5", name: value})
    assert name in str(caught.value)
    assert pool.settings == PoolSettings()
    assert pool.catalog.settings() == {}
    pool.close()


def test_values_of_a_newer_version_count_as_not_set(location: PoolLocation) -> None:
    pool = open_pool(location)
    pool.catalog.set_settings({"when-full": "ask-the-operator", "of-tomorrow": "1"})
    pool.close()
    pool = open_pool(location)
    assert pool.settings == PoolSettings()
    pool.close()


def test_a_pool_without_a_directory_keeps_none(location: PoolLocation) -> None:
    pool = open_pool(PoolLocation.bare(location.metadata_path, location.data_path))
    with pytest.raises(BadSetting, match="serve --set"):
        pool.change_settings({"when-full": "error"})
    pool.override_settings({"when-full": "error"})
    assert pool.settings.when_full == "error"
    pool.close()


@pytest.mark.parametrize("name", BY_NAME)
def test_defaults_can_be_typed(name: str) -> None:
    setting = BY_NAME[name]
    shown = setting.show(setting.default)
    if isinstance(setting.default, int) and "iB" in shown:
        shown = str(setting.default)  # rounded for people
    typed = {"for ever": "0"}.get(shown, shown.removesuffix(" s"))
    assert setting.parse(typed) == setting.default
    assert checked({name: typed}) == {name: typed}


def test_every_setting_is_in_the_json_form() -> None:
    assert list(PoolSettings().to_json()) == [setting.name for setting in SETTINGS]
