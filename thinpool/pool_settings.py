"""The settings of a pool: what there is to set, how it is written, and what holds where nothing was set.

In: names, kinds, defaults, and the way between text (as typed and as kept in the catalogue) and values. Out: where they
are kept (`catalog.py`) and what they do (`full_pool.py`, `space_watch.py`, `admission.py`).

A setting that cannot be read, because a newer version wrote it, counts as not set.
"""

from __future__ import annotations

import logging
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from .errors import BadSetting, BadSize
from .full_pool import QUEUE_TIMEOUT_SECONDS, WhenFull
from .units import parse_size
from .wording import iec

SECONDS_MAX = 7 * 86400
OFF = "off"
LOW_WATER_PERCENT = 80
METADATA_BYTES_MAX = 255 * 16320 * 4096  # drivers/md/dm-thin-metadata.h, THIN_METADATA_MAX_SECTORS
Value = str | int | float

log = logging.getLogger("thinpool")


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """All settings of a pool. Sizes in bytes, times in seconds, shares in per cent; 0 stands for "off"."""

    when_full: WhenFull = "queue"
    queue_timeout: int = QUEUE_TIMEOUT_SECONDS
    data_low_water: int = LOW_WATER_PERCENT
    metadata_low_water: int = LOW_WATER_PERCENT
    event_command: str = ""
    event_timeout: int = 60
    autogrow_limit: int = 0
    metadata_autogrow_limit: int = METADATA_BYTES_MAX
    autogrow_step: str = "20%"
    min_free_data: int = 0
    min_free_metadata: int = 10
    overcommit: float = 0.0

    @classmethod
    def read(cls, texts: Mapping[str, str]) -> PoolSettings:
        """Settings as the catalogue keeps them; what is not there or not understood is as by default."""
        values: dict[str, Any] = {}
        for setting in SETTINGS:
            text = texts.get(setting.name)
            if text is None:
                continue
            try:
                values[setting.field] = setting.parse(text)
            except BadSetting as error:
                log.warning("%s; the default holds", error)
        return cls(**values)

    def to_json(self) -> dict[str, Value]:
        """Values by setting name; "off" as 0."""
        return {setting.name: cast("Value", getattr(self, setting.field)) for setting in SETTINGS}


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting. `read` makes a value of text; it raises BadSetting or BadSize for the reason."""

    name: str
    metavar: str
    help: str
    read: Callable[[str], Value]
    show: Callable[[Any], str] = str

    @property
    def field(self) -> str:
        """The attribute of PoolSettings."""
        return self.name.replace("-", "_")

    @property
    def default(self) -> Value:
        """What holds where nothing is set."""
        return cast("Value", getattr(PoolSettings(), self.field))

    def parse(self, text: str) -> Value:
        """Return the value. Raises BadSetting."""
        try:
            return self.read(text.strip())
        except (BadSetting, BadSize) as error:
            raise BadSetting(self.name, text, error.reason) from error


def _choice(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in words:
            raise BadSetting(name="", text=text, reason=f"it is one of {', '.join(words)}")
        return text

    return read


def _whole(text: str, unit: str, most: int) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) > most:
        raise BadSetting(name="", text=text, reason=f"it is a whole number of {unit} from 0 to {most}")
    return int(text)


def _seconds(text: str) -> int:
    return _whole(text.removesuffix("s"), "seconds", SECONDS_MAX)


def _percent_or_off(text: str) -> int:
    if text == OFF:
        return 0
    number = text.removesuffix("%").strip()
    # 100 is refused on purpose: it would look set and never act.
    if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= 99:
        raise BadSetting(name="", text=text, reason="it is 1% to 99%, or off")
    return int(number)


def _size_or_off(text: str) -> int:
    return 0 if text == OFF else parse_size(text)


def _metadata_limit(text: str) -> int:
    return min(_size_or_off(text), METADATA_BYTES_MAX)


def _ratio(text: str) -> float:
    if text == OFF:
        return 0.0
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,3})?", text) or not float(text):
        raise BadSetting(name="", text=text, reason="it is a number such as 1, 2.5 or 10, or off")
    return float(text)


def _step(text: str) -> str:
    if text.endswith("%"):
        number = text[:-1].strip()
        if not (number.isascii() and number.isdecimal()) or not 1 <= int(number) <= 1000:
            raise BadSetting(name="", text=text, reason="a share is 1% to 1000%")
        return f"{int(number)}%"
    parse_size(text)
    return text


def _command(text: str) -> str:
    if text == OFF:
        return ""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise BadSetting(name="", text=text, reason=f"it cannot be split into words: {error}") from error
    if not words or not words[0].startswith("/"):
        raise BadSetting(name="", text=text, reason="its first word is the absolute path of a program")
    return text


def _show_percent(value: int) -> str:
    return f"{value}%" if value else OFF


def _show_size(value: int) -> str:
    return iec(value) if value else OFF


def step_bytes(step: str, present_bytes: int) -> int:
    """How much a growth step adds to a present size."""
    return present_bytes * int(step[:-1]) // 100 if step.endswith("%") else parse_size(step)


SETTINGS = (
    Setting(
        "when-full",
        "queue|error",
        "What a write does that finds no space: wait, or fail with ENOSPC at once.",
        _choice("queue", "error"),
    ),
    Setting(
        "queue-timeout",
        "SECONDS",
        "How long writes wait before they fail; 0 lets them wait for ever.",
        _seconds,
        lambda value: f"{value} s" if value else "for ever",
    ),
    Setting(
        "data-low-water",
        "PERCENT|off",
        "Data use at which a served pool grows by itself, or tells (see --event-command).",
        _percent_or_off,
        _show_percent,
    ),
    Setting(
        "metadata-low-water",
        "PERCENT|off",
        "The same of the metadata.",
        _percent_or_off,
        _show_percent,
    ),
    Setting(
        "event-command",
        "COMMAND|off",
        "Run at events, with the event and the pool as arguments behind its own (docs/full-pools.md).",
        _command,
        lambda value: value or OFF,
    ),
    Setting(
        "event-timeout",
        "SECONDS",
        "After this time the event command is killed; 0 lets it run for ever.",
        _seconds,
        lambda value: f"{value} s" if value else "for ever",
    ),
    Setting(
        "autogrow-limit",
        "SIZE|off",
        "The data of a served pool grow by themselves up to this size.",
        _size_or_off,
        _show_size,
    ),
    Setting(
        "metadata-autogrow-limit",
        "SIZE|off",
        "The same of the metadata.",
        _metadata_limit,
        _show_size,
    ),
    Setting(
        "autogrow-step",
        "SIZE|PERCENT%",
        "By how much they grow at a time, at least; a share is of the present size.",
        _step,
    ),
    Setting(
        "min-free-data",
        "PERCENT|off",
        "With less free data than this, new devices and snapshots are refused (not with --force).",
        _percent_or_off,
        _show_percent,
    ),
    Setting(
        "min-free-metadata",
        "PERCENT|off",
        "The same of the metadata.",
        _percent_or_off,
        _show_percent,
    ),
    Setting(
        "overcommit",
        "RATIO|off",
        "How many times the pool's data all devices together may be promised (snapshots count).",
        _ratio,
        lambda value: f"{value:g}" if value else OFF,
    ),
)
BY_NAME: Mapping[str, Setting] = {setting.name: setting for setting in SETTINGS}
assert {setting.field for setting in SETTINGS} == {field.name for field in fields(PoolSettings)}
Source = Literal["set", "default"]


def checked(changes: Mapping[str, object]) -> dict[str, str | None]:
    """Changes as the catalogue keeps them, None to forget one. Raises BadSetting for what is no setting or no value."""
    result: dict[str, str | None] = {}
    for name, value in changes.items():
        setting = BY_NAME.get(name)
        if setting is None:
            raise BadSetting(name, "" if value is None else str(value), f"there are {', '.join(BY_NAME)}")
        if value is None:
            result[name] = None
        elif isinstance(value, str):
            setting.parse(value)
            result[name] = value.strip()
        else:
            raise BadSetting(name, str(value), "values are given as text, null for the default")
    return result
