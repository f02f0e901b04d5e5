"""The three TLS modes and access by name, without any TLS: rows of sections 2.3 and 2.5 of docs/nbd.md."""

import struct

import pytest

from nbd.access import AllowList, PeerIdentity, TlsMode
from nbd.constants import Option, OptionReply
from nbd.events import StartTls
from nbd.options import encode_context_query, encode_export_query
from nbd.wire import CLIENT_FLAGS
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory
from tests.fakes.nbd_streams import Dialogue, dialogue, option

ACK, INVALID, POLICY, TLS_REQD, UNKNOWN = (
    OptionReply.ACK,
    OptionReply.ERR_INVALID,
    OptionReply.ERR_POLICY,
    OptionReply.ERR_TLS_REQD,
    OptionReply.ERR_UNKNOWN,
)


def go(name: str) -> bytes:
    return encode_export_query(name, ())


@pytest.fixture
def directory() -> MemoryDirectory:
    return MemoryDirectory([MemoryDevice("open", 4096), MemoryDevice("secret", 4096)])


def secure(talk: Dialogue, *names: str) -> Dialogue:
    assert talk.ask(Option.STARTTLS) == [(ACK, b"")]
    assert talk.tls_started
    assert talk.handshake.pending == 0
    talk.handshake.tls_established(PeerIdentity(tls=True, names=frozenset(names)))
    return talk


def test_without_tls_the_server_refuses_starttls_and_never_demands_it(directory: MemoryDirectory) -> None:
    talk = dialogue(directory)
    assert talk.final(Option.STARTTLS) == POLICY
    for number in range(20):
        if number not in (Option.EXPORT_NAME, Option.ABORT):
            assert talk.final(number) != TLS_REQD
    assert talk.final(Option.GO, go("open")) == ACK


def test_starttls_with_data_is_invalid(directory: MemoryDirectory) -> None:
    for mode in (TlsMode.OPTIONAL, TlsMode.REQUIRED):
        talk = dialogue(directory, tls=mode)
        for data in (b"x", bytes(100_000)):
            assert talk.final(Option.STARTTLS, data) in (INVALID, OptionReply.ERR_TOO_BIG)
            assert not talk.tls_started
        secure(talk)


def test_starttls_inside_tls_is_invalid(directory: MemoryDirectory) -> None:
    talk = secure(dialogue(directory, tls=TlsMode.REQUIRED))
    assert talk.final(Option.STARTTLS) == INVALID
    assert talk.final(Option.GO, go("open")) == ACK


def test_starttls_forgets_what_was_negotiated_before(directory: MemoryDirectory) -> None:
    talk = dialogue(directory, tls=TlsMode.OPTIONAL)
    talk.ask(Option.STRUCTURED_REPLY)
    talk.ask(Option.SET_META_CONTEXT, encode_context_query("open", ["base:allocation"]))
    talk.ask(Option.EXTENDED_HEADERS)
    secure(talk)
    assert talk.final(Option.SET_META_CONTEXT, encode_context_query("open", ["base:allocation"])) == INVALID
    talk.ask(Option.GO, go("open"))
    assert talk.terms is not None
    assert not talk.terms.structured
    assert not talk.terms.extended
    assert talk.terms.contexts == ()


def test_plaintext_behind_starttls_is_not_looked_at(directory: MemoryDirectory) -> None:
    """Commands injected behind STARTTLS: they stay unread, and the driver drops the connection because they are there."""
    talk = dialogue(directory, tls=TlsMode.REQUIRED)
    events = list(talk.handshake.feed(option(Option.STARTTLS) + option(Option.GO, go("secret"))))
    assert isinstance(events[-1], StartTls)
    assert talk.handshake.pending > 0
    assert not directory.devices["secret"].sessions
    assert list(talk.handshake.feed(b"more")) == []


@pytest.mark.parametrize("number", [2000, *set(Option) - {Option.EXPORT_NAME, Option.ABORT, Option.STARTTLS}])
@pytest.mark.parametrize("size", [0, 5, 100_000])
def test_where_tls_is_required_everything_else_is_told_so(
    directory: MemoryDirectory, number: int, size: int
) -> None:
    talk = dialogue(directory, tls=TlsMode.REQUIRED)
    assert talk.ask(number, bytes(size))[-1][0] == TLS_REQD
    secure(talk)
    assert talk.final(Option.GO, go("open")) == ACK


def test_where_tls_is_required_export_name_ends_the_connection(directory: MemoryDirectory) -> None:
    talk = dialogue(directory, tls=TlsMode.REQUIRED)
    talk.say(option(Option.EXPORT_NAME, b"open"))
    assert talk.closed
    assert not directory.devices["open"].sessions


def test_where_tls_is_required_abort_is_acknowledged(directory: MemoryDirectory) -> None:
    talk = dialogue(directory, tls=TlsMode.REQUIRED)
    assert talk.ask(Option.ABORT, b"x") == [(ACK, b"")]
    assert talk.closed


def test_where_tls_is_required_an_old_client_is_dropped(directory: MemoryDirectory) -> None:
    talk = dialogue(directory, tls=TlsMode.REQUIRED, flags=0)
    assert talk.closed


@pytest.fixture
def selective(directory: MemoryDirectory) -> Dialogue:
    return dialogue(directory, tls=TlsMode.OPTIONAL, access=AllowList({"secret": ["alice"]}))


def test_a_tls_only_export_is_refused_in_plaintext(selective: Dialogue) -> None:
    for number in (Option.INFO, Option.GO):
        assert selective.final(number, go("secret")) == TLS_REQD
        assert selective.final(number, go("nobody")) == UNKNOWN
    assert selective.final(Option.GO, go("open")) == ACK


def test_export_name_of_a_tls_only_export_ends_the_connection(selective: Dialogue) -> None:
    selective.say(option(Option.EXPORT_NAME, b"secret"))
    assert selective.closed


def test_tls_only_exports_are_not_listed_in_plaintext(selective: Dialogue) -> None:
    assert selective.ask(Option.LIST) == [
        (OptionReply.SERVER, struct.pack(">I", 4) + b"open"),
        (ACK, b""),
    ]


def test_other_options_never_demand_tls_where_it_is_optional(selective: Dialogue) -> None:
    selective.ask(Option.STRUCTURED_REPLY)
    for number in (Option.LIST_META_CONTEXT, Option.SET_META_CONTEXT):
        assert selective.final(number, encode_context_query("secret", [])) == UNKNOWN
    assert selective.final(Option.LIST) == ACK
    assert selective.final(77) == OptionReply.ERR_UNSUP


def test_inside_tls_nothing_demands_tls(selective: Dialogue) -> None:
    secure(selective, "alice")
    for number in range(20):
        if number not in (Option.EXPORT_NAME, Option.ABORT):
            assert selective.final(number) != TLS_REQD
    assert len(selective.ask(Option.LIST)) == 3
    assert selective.final(Option.GO, go("secret")) == ACK


def test_a_client_of_another_name_is_kept_out(selective: Dialogue) -> None:
    secure(selective, "bob")
    assert selective.final(Option.GO, go("secret")) == POLICY
    assert len(selective.ask(Option.LIST)) == 2
    assert selective.final(Option.GO, go("open")) == ACK


def test_the_mode_is_constant_during_a_connection(directory: MemoryDirectory) -> None:
    talk = dialogue(directory, tls=TlsMode.REQUIRED)
    assert talk.final(Option.LIST) == TLS_REQD
    assert talk.final(Option.STARTTLS, b"x") == INVALID
    assert talk.final(Option.LIST) == TLS_REQD


def test_client_flags_then_starttls_in_one_segment(directory: MemoryDirectory) -> None:
    talk = dialogue(directory, tls=TlsMode.REQUIRED, flags=None)
    talk.say(CLIENT_FLAGS.pack(3) + option(Option.STARTTLS))
    assert talk.tls_started
