"""LIST_META_CONTEXT and SET_META_CONTEXT: rows of section 2.4 of docs/nbd.md."""

import struct

import pytest

from nbd.constants import Option, OptionReply
from nbd.limits import Limits
from nbd.options import encode_context_query, encode_export_query
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory
from tests.fakes.nbd_streams import Dialogue, dialogue

ACK, INVALID, UNKNOWN, TOO_BIG = (
    OptionReply.ACK,
    OptionReply.ERR_INVALID,
    OptionReply.ERR_UNKNOWN,
    OptionReply.ERR_TOO_BIG,
)
LIST, SET = Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT
BASE, DEPTH, SNAP1, SNAP2 = (
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:snap1",
    "qemu:dirty-bitmap:a:b/c",
)
EVERYTHING = [BASE, DEPTH, SNAP1, SNAP2]


@pytest.fixture
def disk() -> MemoryDevice:
    return MemoryDevice("disk", 1 << 20, dirty={"snap1": [], "a:b/c": []})


@pytest.fixture(params=["structured", "extended", "extended bytewise"])
def talk(request: pytest.FixtureRequest, disk: MemoryDevice) -> Dialogue:
    directory = MemoryDirectory([disk, MemoryDevice("other", 4096)], default="disk")
    talk = dialogue(directory, bytewise="bytewise" in request.param)
    style = Option.STRUCTURED_REPLY if request.param == "structured" else Option.EXTENDED_HEADERS
    assert talk.final(style) == ACK
    return talk


def contexts(talk: Dialogue, number: int, *queries: str, export: str = "disk") -> list[tuple[int, str]]:
    answers = talk.ask(number, encode_context_query(export, queries))
    assert answers[-1] == (ACK, b"")
    assert all(kind == OptionReply.META_CONTEXT for kind, _ in answers[:-1])
    return [(struct.unpack_from(">I", payload)[0], payload[4:].decode()) for _, payload in answers[:-1]]


def names(talk: Dialogue, number: int, *queries: str, export: str = "disk") -> list[str]:
    return [name for _, name in contexts(talk, number, *queries, export=export)]


def selection(talk: Dialogue, export: str = "disk") -> list[str]:
    assert talk.final(Option.GO, encode_export_query(export, ())) == ACK
    assert talk.terms is not None
    return [context.name for context in talk.terms.contexts]


@pytest.mark.parametrize("number", [LIST, SET])
def test_contexts_need_structured_or_extended_replies(disk: MemoryDevice, number: int) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    assert talk.final(number, encode_context_query("disk", [BASE])) == INVALID
    assert talk.usable()


@pytest.mark.parametrize("number", [LIST, SET])
def test_contexts_of_an_unknown_export_are_unknown(talk: Dialogue, number: int) -> None:
    assert talk.final(number, encode_context_query("nobody", [BASE])) == UNKNOWN


@pytest.mark.parametrize("number", [LIST, SET])
@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(7),
        struct.pack(">I", 4) + b"disk",
        struct.pack(">I", 100) + b"disk" + bytes(4),
        struct.pack(">I4sI", 4, b"disk", 1),
        struct.pack(">I4sII", 4, b"disk", 1, 16) + b"base:allocatio",
        struct.pack(">I4sII", 4, b"disk", 1, 0xFFFFFFFF) + b"base:allocation",
        struct.pack(">I4sI", 4, b"disk", 0) + b"x",
        struct.pack(">I4sI", 4, b"disk", 0xFFFFFFFF) + bytes(64),
        struct.pack(">I4sII", 4, b"disk", 2, 2) + b"a:" + bytes(2),
        struct.pack(">I4sII", 4, b"disk", 1, 2) + b"a:" + b"garbage",
        struct.pack(">I4sII", 4, b"disk", 1, 2) + b"\xff:",
        struct.pack(">I4sII", 4, b"disk", 1, 2) + b"\0:",
        struct.pack(">I4sII", 4, b"disk", 1, 4097) + b"q" * 4097,
    ],
)
def test_malformed_queries_are_invalid_and_harmless(talk: Dialogue, number: int, data: bytes) -> None:
    assert talk.final(number, data) == INVALID
    assert talk.usable()


@pytest.mark.parametrize("number", [LIST, SET])
@pytest.mark.parametrize(
    "query", ["nocolon", "", "x", "foo:bar", "base:unknown", "qemu:dirty-bitmap:gone", "base"]
)
def test_unknown_queries_are_ignored(talk: Dialogue, number: int, query: str) -> None:
    assert names(talk, number, query) == []
    assert names(talk, number, query, BASE) == [BASE]


def test_listing_without_queries_shows_everything_with_id_0(talk: Dialogue) -> None:
    assert contexts(talk, LIST) == [(0, name) for name in EVERYTHING]
    assert names(talk, LIST, export="other") == [BASE, DEPTH]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("base:", [BASE]),
        ("qemu:", [DEPTH, SNAP1, SNAP2]),
        ("qemu:dirty-bitmap:", [SNAP1, SNAP2]),
        (SNAP2, [SNAP2]),
        (DEPTH, [DEPTH]),
        ("x-nobody:", []),
    ],
)
def test_listing_knows_wildcards(talk: Dialogue, query: str, expected: list[str]) -> None:
    assert names(talk, LIST, query) == expected


def test_listing_overlapping_queries_shows_each_once(talk: Dialogue) -> None:
    assert names(talk, LIST, "qemu:", SNAP1, "base:", BASE) == EVERYTHING


def test_selecting_nothing_is_fine(talk: Dialogue) -> None:
    assert names(talk, SET) == []
    assert selection(talk) == []


@pytest.mark.parametrize("query", ["base:", "qemu:", "qemu:dirty-bitmap:"])
def test_wildcards_select_nothing(talk: Dialogue, query: str) -> None:
    assert names(talk, SET, query) == []


def test_selected_contexts_have_distinct_ids_and_come_once(talk: Dialogue) -> None:
    found = contexts(talk, SET, BASE, SNAP1, BASE, DEPTH, SNAP1)
    assert [name for _, name in found] == [BASE, SNAP1, DEPTH]
    assert len({number for number, _ in found}) == 3
    assert all(number > 0 for number, _ in found)


def test_ids_are_not_reused_within_a_connection(talk: Dialogue) -> None:
    first = {number for number, _ in contexts(talk, SET, BASE, DEPTH)}
    second = {number for number, _ in contexts(talk, SET, DEPTH, BASE)}
    assert not first & second


def test_a_second_selection_replaces_the_first(talk: Dialogue) -> None:
    names(talk, SET, BASE, DEPTH)
    names(talk, SET, SNAP1)
    assert selection(talk) == [SNAP1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        struct.pack(">I4sI", 4, b"disk", 1),
        encode_context_query("nobody", [BASE]),
        bytes(100_000),
    ],
)
def test_a_failed_selection_clears_the_old_one(talk: Dialogue, data: bytes) -> None:
    assert names(talk, SET, BASE) == [BASE]
    assert talk.final(SET, data) & 0x80000000
    assert selection(talk) == []


def test_listing_and_a_failed_go_keep_the_selection(talk: Dialogue) -> None:
    names(talk, SET, BASE)
    names(talk, LIST)
    assert talk.final(Option.GO, encode_export_query("nobody", ())) == UNKNOWN
    assert selection(talk) == [BASE]


def test_a_selection_is_void_for_another_export(talk: Dialogue) -> None:
    names(talk, SET, BASE, export="other")
    assert selection(talk, "disk") == []


def test_a_selection_counts_under_the_canonical_name(talk: Dialogue) -> None:
    assert names(talk, SET, BASE, export="") == [BASE]
    assert selection(talk, "disk") == [BASE]


def test_too_many_queries_are_too_big(disk: MemoryDevice) -> None:
    for number in (LIST, SET):
        talk = dialogue(MemoryDirectory([disk]), limits=Limits(queries_max=10))
        talk.ask(Option.STRUCTURED_REPLY)
        assert talk.final(number, encode_context_query("disk", ["a:b"] * 11)) == TOO_BIG
        assert talk.final(number, encode_context_query("disk", ["a:b"] * 10)) == ACK
        assert talk.final(number, encode_context_query("disk", ["a:b"])) == TOO_BIG
        assert talk.final(LIST, encode_context_query("disk", [])) == ACK


def test_too_many_contexts_are_too_big_and_select_nothing() -> None:
    disk = MemoryDevice("disk", 4096, dirty={f"s{number}": [] for number in range(10)})
    talk = dialogue(MemoryDirectory([disk]), limits=Limits(contexts_max=8))
    talk.ask(Option.STRUCTURED_REPLY)
    wanted = [f"qemu:dirty-bitmap:s{number}" for number in range(9)]
    assert talk.final(SET, encode_context_query("disk", wanted)) == TOO_BIG
    assert selection(talk) == []


def test_contexts_with_long_names_and_colons_are_compared_bytewise() -> None:
    name = "ü:/" * 100
    talk = dialogue(MemoryDirectory([MemoryDevice("disk", 4096, dirty={name: []})]))
    talk.ask(Option.STRUCTURED_REPLY)
    assert names(talk, SET, f"qemu:dirty-bitmap:{name}") == [f"qemu:dirty-bitmap:{name}"]
    assert names(talk, SET, f"qemu:dirty-bitmap:{name}x") == []
