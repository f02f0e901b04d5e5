"""Layouts, errors, URIs and the client's strict decoder."""

import errno
import pickle
import struct

import pytest

from nbd import errors, wire
from nbd.constants import Command, Errno, OptionReply
from nbd.errors import NbdError, RemoteProtocolError, RequestError, wire_errno
from nbd.options import decode_context_query, decode_export_query, encode_context_query, encode_export_query
from nbd.reply_stream import ReplyStream
from nbd.uri import Address, parse_uri, tcp_uri, unix_uri
from nbd.wire import error_payload, extended_chunk, limited_text, simple_reply, structured_chunk

COOKIE = 0x1122334455667788


# --- errors ------------------------------------------------------------------------------------------------------------

LEAVES = [
    errors.RemoteProtocolError("x"),
    errors.LocalProtocolError("x"),
    errors.RequestError(Errno.EIO, "bad sector"),
    errors.RequestError(Errno.EIO),
    errors.OptionRefused(7, OptionReply.ERR_UNKNOWN, "no such export"),
    errors.OptionRefused(7, 0x80001234, ""),
    errors.RemoteError(Command.READ, 5, "bad"),
    errors.RemoteError(99, 12345),
    errors.ConnectionEnded(),
    errors.EndOfRequests(),
    errors.SendFault(5),
    errors.DataLost(),
    errors.ReplyBacklog(),
    errors.OptionInvalid("x"),
    errors.CannotListen("/path", "in use"),
    errors.TlsUnavailable("no key"),
    errors.AddressInvalid("x:y", "bad"),
]


@pytest.mark.parametrize("error", LEAVES, ids=lambda error: type(error).__name__)
def test_errors_print_a_sentence_and_travel(error: NbdError) -> None:
    assert isinstance(error, NbdError)
    assert len(str(error)) > 2
    assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_every_error_class_is_tried_here() -> None:
    defined = {
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, NbdError)
    }
    assert defined - {NbdError} == {type(error) for error in LEAVES}


def test_only_errors_of_the_protocol_go_out() -> None:
    for number in [*errno.errorcode, 0, 9999]:
        for command in (*Command, 77):
            for fast_only in (False, True):
                assert wire_errno(OSError(number, "x"), command, fast_only=fast_only) in set(Errno) - {
                    Errno.OK
                }
    assert wire_errno(OSError(errno.ENOTSUP, "x"), Command.WRITE_ZEROES, fast_only=True) is Errno.ENOTSUP
    assert wire_errno(OSError("no number"), Command.READ) is Errno.EIO


def test_request_errors_name_their_number() -> None:
    assert str(RequestError(Errno.EINVAL, "why")) == "EINVAL: why"


# --- layouts -----------------------------------------------------------------------------------------------------------


def test_every_layout_is_big_endian() -> None:
    layouts = [value for value in vars(wire).values() if isinstance(value, struct.Struct)]
    assert len(layouts) > 20
    assert all(layout.format.startswith(">") for layout in layouts)


@pytest.mark.parametrize("text", ["", "short", "é" * 5000, "😀" * 2000, "a" * 4095 + "é", "\ud800"])
def test_texts_are_limited_and_stay_utf8(text: str) -> None:
    encoded = limited_text(text)
    assert len(encoded) <= 4096
    encoded.decode("utf-8")
    if len(text.encode(errors="replace")) <= 4096:
        assert encoded == text.encode(errors="replace")


def test_options_survive_a_round_trip() -> None:
    assert decode_export_query(encode_export_query("ü", [0, 3])).info_types == {0, 3}
    decoded = decode_context_query(encode_context_query("ü", ["a:b", "c:"]), 10)
    assert decoded is not None
    assert (decoded.export_name, decoded.queries) == ("ü", ("a:b", "c:"))


# --- URIs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (tcp_uri("host"), "nbd://host/"),
        (tcp_uri("host", 10809, "vol"), "nbd://host/vol"),
        (tcp_uri("::1", 1234, "a b", tls=True), "nbds://[::1]:1234/a%20b"),
        (tcp_uri("h", export_name="/disk"), "nbd://h//disk"),
        (tcp_uri("h", export_name="a@b+c"), "nbd://h/a@b+c"),
        (tcp_uri("h", export_name="100%?#&"), "nbd://h/100%25%3F%23%26"),
        (unix_uri("/run/s", "vol"), "nbd+unix:///vol?socket=/run/s"),
        (unix_uri("/run/a b&c", "ü", tls=True), "nbds+unix:///%C3%BC?socket=/run/a%20b%26c"),
        (unix_uri("\0abstract"), "nbd+unix:///?socket=%00abstract"),
    ],
)
def test_uris_are_quoted(uri: str, expected: str) -> None:
    assert uri == expected


@pytest.mark.parametrize("name", ["", "vol", "/disk", "a/b", "a b", "ü@x+y?&#%", "snap@1..2"])
def test_names_survive_their_uri(name: str) -> None:
    assert parse_uri(unix_uri("/s", name)).export_name == name
    assert parse_uri(tcp_uri("h", 1, name, tls=True)).export_name == name


def test_uris_are_taken_apart() -> None:
    assert parse_uri("nbds://alice@host:99/vol?tls-psk-file=/k&x-private=1").user == "alice"
    address = parse_uri("nbds+unix:///v?socket=/s&tls-certificates=/pki&tls-hostname=me")
    assert (address.tls, address.socket_path, str(address.certificates), address.tls_hostname) == (
        *(True, "/s"),
        *("/pki", "me"),
    )
    assert parse_uri("nbd://host") == Address("", tls=False, host="host")


@pytest.mark.parametrize(
    "uri",
    [
        "http://host/",
        "nbd",
        "",
        "nbd://host/?unknown=1",
        "nbd+unix:///vol",
        "nbd://host/?socket=/s",
        "nbd://host:port/",
        "nbd://host:99999/",
        "nbd://h/?=;;",
    ],
)
def test_unusable_uris_are_refused(uri: str) -> None:
    with pytest.raises(errors.AddressInvalid):
        parse_uri(uri)


# --- the client's decoder -----------------------------------------------------------------------------------------------


def stream(form: str, command: int = Command.READ, offset: int = 1000, length: int = 100) -> ReplyStream:
    decoder = ReplyStream(structured=form == "structured", extended=form == "extended")
    decoder.expect(COOKIE, command, offset, length)
    return decoder


def chunk(form: str, kind: int, payload: bytes, *, done: bool = True, offset: int = 1000) -> bytes:
    if form == "extended":
        return extended_chunk(COOKIE, offset, kind, len(payload), done=done) + payload  # type: ignore[arg-type]
    return structured_chunk(COOKIE, kind, len(payload), done=done) + payload  # type: ignore[arg-type]


def data(offset: int, content: bytes) -> bytes:
    return struct.pack(">Q", offset) + content


@pytest.mark.parametrize("piece", [1, 3, 1000])
@pytest.mark.parametrize("form", ["structured", "extended"])
def test_chunks_in_any_pieces_become_one_reply(form: str, piece: int) -> None:
    decoder = stream(form)
    output = (
        chunk(form, 1, data(1060, b"b" * 40), done=False)
        + chunk(form, 2, struct.pack(">QI", 1000, 60), done=False)
        + chunk(form, 0, b"")
    )
    found = [reply for at in range(0, len(output), piece) for reply in decoder.feed(output[at : at + piece])]
    assert [reply.data for reply in found] == [bytes(60) + b"b" * 40]
    assert decoder.waiting == 0


@pytest.mark.parametrize("form", ["structured", "extended"])
@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (1, data(1000, b"")),
        (1, data(999, b"x")),
        (1, data(1050, b"x" * 51)),
        (1, b"short"),
        (2, struct.pack(">QI", 1000, 0)),
        (2, struct.pack(">QI", 1000, 101)),
        (2, struct.pack(">QI", 0, 0xFFFFFFFF)),
        (0, b"x"),
        (3, b""),
        (5, struct.pack(">III", 1, 100, 0)),
        (0x8001, b""),
        (0x8001, struct.pack(">IH", 0, 0)),
        (0x8001, struct.pack(">IH", 5, 10)),
        (0x8002, error_payload(Errno.EIO, "no offset")),
        (0, b""),
    ],
)
def test_what_a_server_may_not_send_is_noticed(form: str, kind: int, payload: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        list(stream(form).feed(chunk(form, kind, payload)))


@pytest.mark.parametrize(
    ("form", "output"),
    [
        ("simple", b"\0\0\0\0" + bytes(20)),
        ("simple", structured_chunk(COOKIE, 0, 0, done=True)),  # type: ignore[arg-type]
        ("structured", simple_reply(COOKIE) + bytes(100)),
        ("structured", extended_chunk(COOKIE, 1000, 0, 0, done=True)),  # type: ignore[arg-type]
        ("extended", extended_chunk(COOKIE, 1001, 0x8001, 0, done=True)),  # type: ignore[arg-type]
        ("extended", extended_chunk(COOKIE, 1000, 1, 1 << 40, done=True)),  # type: ignore[arg-type]
        ("extended", simple_reply(COOKIE, Errno.EIO)),
        ("simple", simple_reply(COOKIE + 1) + bytes(100)),
        ("structured", struct.pack(">IHHQI", 0x668E33EF, 2, 0, COOKIE, 0)),
    ],
)
def test_replies_of_the_wrong_form_are_noticed(form: str, output: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        list(stream(form).feed(output))


def test_block_status_is_checked() -> None:
    def decoder() -> ReplyStream:
        return stream("extended", Command.BLOCK_STATUS)

    good = struct.pack(">IIQQ", 1, 1, 100, 3)
    (reply,) = decoder().feed(chunk("extended", 6, good))
    assert reply.statuses == {1: [(100, 3)]}
    for bad in (b"", struct.pack(">IIQQ", 1, 2, 100, 3), struct.pack(">IIQQ", 1, 1, 0, 3), good + b"x"):
        with pytest.raises(RemoteProtocolError):
            list(decoder().feed(chunk("extended", 6, bad)))
    with pytest.raises(RemoteProtocolError):
        list(decoder().feed(chunk("extended", 5, struct.pack(">III", 1, 100, 3))))
    twice = chunk("extended", 6, good, done=False) + chunk("extended", 6, good)
    with pytest.raises(RemoteProtocolError):
        list(decoder().feed(twice))
