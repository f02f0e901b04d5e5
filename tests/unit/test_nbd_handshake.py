"""Handshake: framing, strings, options. Rows of docs/nbd.md name these tests; most run whole and byte by byte."""

import errno
import struct

import pytest

from nbd.constants import InfoType, Option, OptionReply, TransmissionFlag
from nbd.events import Send
from nbd.handshake import Phase, ServerHandshake
from nbd.limits import Limits
from nbd.options import encode_export_query
from nbd.wire import CLIENT_FLAGS, GREETING
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory
from tests.fakes.nbd_streams import Dialogue, dialogue, option, replies

UNSUP, INVALID, UNKNOWN = OptionReply.ERR_UNSUP, OptionReply.ERR_INVALID, OptionReply.ERR_UNKNOWN


@pytest.fixture(params=["whole", "bytewise"])
def bytewise(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "bytewise")


@pytest.fixture
def disk() -> MemoryDevice:
    return MemoryDevice("disk", 1 << 20, description="a disk")


@pytest.fixture
def talk(disk: MemoryDevice, bytewise: bool) -> Dialogue:
    return dialogue(MemoryDirectory([disk]), bytewise=bytewise)


def query(name: str, *types: int) -> bytes:
    return encode_export_query(name, types)


def infos(answers: list[tuple[int, bytes]]) -> dict[int, bytes]:
    assert answers[-1] == (OptionReply.ACK, b"")
    assert all(kind == OptionReply.INFO for kind, _ in answers[:-1])
    return {struct.unpack_from(">H", payload)[0]: payload[2:] for _, payload in answers[:-1]}


# --- 2.1 connection start and framing
# ------------------------------------------------------------------------------


def test_greeting_is_fixed_newstyle_with_no_other_flag(disk: MemoryDevice) -> None:
    greeting = ServerHandshake(MemoryDirectory([disk])).greeting()
    assert GREETING.unpack(greeting) == (0x4E42444D41474943, 0x49484156454F5054, 3)


@pytest.mark.parametrize("flags", [4, 1 << 31, 0xFFFFFFFF, 7])
def test_unknown_client_flags_end_the_connection(disk: MemoryDevice, flags: int) -> None:
    talk = dialogue(MemoryDirectory([disk]), flags=flags)
    assert talk.closed
    assert "flags" in str(talk.reason)


@pytest.mark.parametrize("flags", [0, 2])
def test_a_client_that_is_not_fixed_newstyle_is_served_without_tls(disk: MemoryDevice, flags: int) -> None:
    talk = dialogue(MemoryDirectory([disk]), flags=flags)
    assert talk.final(Option.STARTTLS) == OptionReply.ERR_POLICY
    assert talk.final(Option.LIST) == OptionReply.ACK
    talk.say(option(Option.EXPORT_NAME, b"disk"))
    assert talk.terms is not None


@pytest.mark.parametrize(("flags", "size"), [(1, 134), (3, 10)])
def test_export_name_is_padded_unless_the_client_said_no_zeroes(
    disk: MemoryDevice, flags: int, size: int
) -> None:
    talk = dialogue(MemoryDirectory([disk]), flags=flags)
    answer = talk.raw(option(Option.EXPORT_NAME, b"disk"))
    assert len(answer) == size
    assert answer[10:] == bytes(size - 10)


@pytest.mark.parametrize("flags", [1, 3])
def test_go_is_never_padded(disk: MemoryDevice, flags: int) -> None:
    talk = dialogue(MemoryDirectory([disk]), flags=flags)
    assert talk.ask(Option.GO, query("disk"))[-1] == (OptionReply.ACK, b"")


def test_a_bad_option_magic_ends_the_connection(talk: Dialogue) -> None:
    talk.say(b"JUNKJUNK" + bytes(8))
    assert talk.closed


def test_options_may_come_in_any_pieces(talk: Dialogue) -> None:
    stream = option(Option.LIST) + option(77, b"xyz") + option(Option.INFO, query("disk"))
    everything = talk.raw(stream)
    kinds = []
    at = 0
    while at < len(everything):
        _, echoed, kind, length = struct.unpack_from(">QIII", everything, at)
        kinds.append((echoed, kind))
        at += 20 + length
    assert [kind for kind in kinds if kind[1] != OptionReply.INFO] == [
        (Option.LIST, OptionReply.SERVER),
        (Option.LIST, OptionReply.ACK),
        (77, UNSUP),
        (Option.INFO, OptionReply.ACK),
    ]


@pytest.mark.parametrize("length", [0xFFFFFFFF, 0x7FFFFFFF, 256 * 1024 + 1])
def test_an_unreasonable_option_length_ends_the_connection_without_memory(
    talk: Dialogue, length: int
) -> None:
    talk.say(option(Option.LIST, length=length))
    assert talk.closed
    assert talk.handshake.pending <= 16


@pytest.mark.parametrize("number", [Option.LIST, Option.GO, Option.SET_META_CONTEXT, 1234])
def test_a_long_option_is_discarded_and_answered(disk: MemoryDevice, number: int) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    data = bytes(200 * 1024)
    talk.say(option(number, data)[:100_000])
    assert talk.handshake.phase is Phase.DISCARDING
    assert talk.handshake.pending == 0
    answer = replies(talk.raw(option(number, data)[100_000:]), number)
    assert answer[-1][0] == (UNSUP if number == 1234 else OptionReply.ERR_TOO_BIG)
    assert talk.usable()


@pytest.mark.parametrize("number", [0, 4, 12, 255, 0xFFFFFFFF])
@pytest.mark.parametrize("size", [0, 1, 4096, 65536])
def test_unknown_options_are_consumed_and_unsupported(disk: MemoryDevice, number: int, size: int) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    assert talk.final(number, bytes(size)) == UNSUP
    assert talk.usable()


def test_peek_export_is_unsupported(talk: Dialogue) -> None:
    assert talk.final(4) == UNSUP


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0",
        struct.pack(">I", 5),
        struct.pack(">IH", 1, 0),
        struct.pack(">I", 4) + b"disk" + struct.pack(">H", 1),
        struct.pack(">I", 4) + b"disk" + struct.pack(">HH", 0, 3),
        struct.pack(">I", 0xFFFFFFFF) + b"disk\0\0",
        struct.pack(">I", 4) + b"disk" + struct.pack(">HHB", 1, 3, 0),
    ],
)
@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_malformed_info_and_go_are_invalid_and_harmless(disk: MemoryDevice, number: int, data: bytes) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    assert talk.final(number, data) == INVALID
    assert talk.usable()
    assert talk.final(Option.GO, query("disk")) == OptionReply.ACK


def test_options_are_answered_in_order(talk: Dialogue) -> None:
    answer = talk.raw(option(90) + option(91) + option(92))
    assert [struct.unpack_from(">QI", answer, at)[1] for at in _starts(answer)] == [90, 91, 92]


def _starts(answer: bytes) -> list[int]:
    at, out = 0, []
    while at < len(answer):
        out.append(at)
        at += 20 + struct.unpack_from(">I", answer, at + 16)[0]
    return out


def test_the_number_of_options_is_bounded(disk: MemoryDevice) -> None:
    talk = dialogue(MemoryDirectory([disk]), limits=Limits(options_max=32))
    for _ in range(32):
        assert talk.final(99) == UNSUP
    talk.say(option(99))
    assert talk.closed


def test_error_replies_carry_a_text(talk: Dialogue) -> None:
    (kind, text), *_ = talk.ask(Option.GO, query("nobody"))
    assert kind == UNKNOWN
    assert "nobody" in text.decode()


# --- 2.2 strings
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 255, 256, 257, 4095, 4096])
def test_names_up_to_4096_bytes_are_looked_up(length: int) -> None:
    name = "n" * length
    talk = dialogue(MemoryDirectory([MemoryDevice(name, 4096)]))
    assert talk.final(Option.INFO, query("x" * length)) == UNKNOWN
    assert talk.final(Option.GO, query(name)) == OptionReply.ACK


@pytest.mark.parametrize("number", [Option.INFO, Option.GO])
def test_longer_names_are_invalid_and_overrun_nothing(disk: MemoryDevice, number: int) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    for length in (4097, 5000, 65000):
        assert talk.final(number, query("x" * length)) == INVALID
    assert talk.usable()


def test_a_longer_name_ends_export_name(disk: MemoryDevice) -> None:
    for length in (4097, 70_000, 100_000):
        talk = dialogue(MemoryDirectory([disk]))
        talk.say(option(Option.EXPORT_NAME, b"x" * length))
        assert talk.closed
        assert not disk.sessions


@pytest.mark.parametrize("name", [b"di\0sk", b"\0", b"disk\0", b"\xff\xfe", b"caf\xe9", b"\xed\xa0\x80"])
def test_names_with_nul_or_not_utf8_are_invalid(disk: MemoryDevice, name: bytes) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
    assert talk.final(Option.GO, data) == INVALID
    assert talk.usable()


def test_the_empty_name_is_the_only_export_or_the_chosen_one() -> None:
    one = MemoryDevice("one", 4096)
    two = MemoryDevice("two", 8192)
    assert dialogue(MemoryDirectory([one])).final(Option.GO, query("")) == OptionReply.ACK
    assert dialogue(MemoryDirectory([one, two])).final(Option.GO, query("")) == UNKNOWN
    talk = dialogue(MemoryDirectory([one, two], default="two"))
    assert infos(talk.ask(Option.INFO, query("", InfoType.NAME)))[InfoType.NAME] == b"two"


def test_our_texts_are_cut_on_a_character_border() -> None:
    disk = MemoryDevice("disk", 4096, description="é" * 3000)
    talk = dialogue(MemoryDirectory([disk]))
    text = infos(talk.ask(Option.INFO, query("disk", InfoType.DESCRIPTION)))[InfoType.DESCRIPTION]
    assert text.decode() == "é" * 2048
    (_, entry), _ = talk.ask(Option.LIST)
    assert entry[8:].decode() == "é" * 2048


# --- 2.3 options
# -------------------------------------------------------------------------------------------------------


def test_export_name_answers_without_a_reply_header(talk: Dialogue, disk: MemoryDevice) -> None:
    size, flags = struct.unpack(">QH", talk.raw(option(Option.EXPORT_NAME, b"disk")))
    assert size == disk.size_bytes
    assert flags & TransmissionFlag.HAS_FLAGS
    assert talk.terms is not None
    assert talk.handshake.phase is Phase.FINISHED


def test_export_name_of_an_unknown_export_ends_the_connection(talk: Dialogue) -> None:
    assert talk.raw(option(Option.EXPORT_NAME, b"nobody")) == b""
    assert talk.closed


def test_export_name_after_structured_reply_keeps_it(talk: Dialogue) -> None:
    talk.ask(Option.STRUCTURED_REPLY)
    _, flags = struct.unpack(">QH", talk.raw(option(Option.EXPORT_NAME, b"disk")))
    assert flags & TransmissionFlag.SEND_DF
    assert talk.terms is not None
    assert talk.terms.structured


def test_export_name_after_extended_headers_ends_the_connection(talk: Dialogue, disk: MemoryDevice) -> None:
    talk.ask(Option.EXTENDED_HEADERS)
    talk.say(option(Option.EXPORT_NAME, b"disk"))
    assert talk.closed
    assert not disk.sessions


@pytest.mark.parametrize("data", [b"", b"bye", bytes(70_000)])
def test_abort_is_acknowledged_whatever_its_data(disk: MemoryDevice, data: bytes) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    assert talk.ask(Option.ABORT, data) == [(OptionReply.ACK, b"")]
    assert talk.closed
    assert talk.reason is None


def test_list_names_and_describes_every_export() -> None:
    directory = MemoryDirectory([MemoryDevice("a", 4096, description="first"), MemoryDevice("ü/b", 4096)])
    answers = dialogue(directory).ask(Option.LIST)
    assert answers == [
        (OptionReply.SERVER, struct.pack(">I", 1) + b"afirst"),
        (OptionReply.SERVER, struct.pack(">I", 4) + "ü/b".encode()),
        (OptionReply.ACK, b""),
    ]


def test_list_can_be_disabled(disk: MemoryDevice) -> None:
    talk = dialogue(MemoryDirectory([disk]), listing=False)
    assert talk.final(Option.LIST) == OptionReply.ERR_POLICY
    assert talk.final(Option.GO, query("disk")) == OptionReply.ACK


def test_list_with_data_is_invalid(talk: Dialogue) -> None:
    assert talk.final(Option.LIST, b"x") == INVALID
    assert talk.usable()


def test_a_long_listing_is_sent_in_pieces() -> None:
    class Many(MemoryDirectory):
        def listing(self):
            for number in range(5000):
                yield f"export-{number}", "one of many " * 10

    handshake = ServerHandshake(Many([]))
    list(handshake.feed(CLIENT_FLAGS.pack(3)))
    sends = [event.data for event in handshake.feed(option(Option.LIST)) if isinstance(event, Send)]
    assert len(sends) > 10
    assert max(map(len, sends)) < 64 * 1024
    assert len(replies(b"".join(sends), Option.LIST)) == 5001


def test_info_on_an_unknown_export_sends_no_info_and_goes_on(talk: Dialogue) -> None:
    for number in (Option.INFO, Option.GO):
        assert [kind for kind, _ in talk.ask(number, query("nobody", 0, 1, 2, 3))] == [UNKNOWN]
    assert talk.final(Option.GO, query("disk")) == OptionReply.ACK


def test_info_does_not_open_the_export(talk: Dialogue, disk: MemoryDevice) -> None:
    assert infos(talk.ask(Option.INFO, query("disk")))[InfoType.EXPORT]
    assert not disk.sessions
    assert talk.final(Option.GO, query("disk")) == OptionReply.ACK
    assert len(disk.sessions) == 1


def test_the_export_is_not_opened_before_negotiation_ends(disk: MemoryDevice) -> None:
    """The fault of another server: the backend opened although GO was refused or never came."""
    talk = dialogue(MemoryDirectory([disk]))
    for number in (Option.INFO, Option.GO):
        talk.final(number, query("disk") + b"x")
        talk.final(number, query("other"))
    talk.final(Option.LIST)
    talk.final(Option.STRUCTURED_REPLY)
    talk.final(Option.LIST_META_CONTEXT, struct.pack(">I", 4) + b"disk" + bytes(4))
    talk.final(Option.SET_META_CONTEXT, struct.pack(">I", 4) + b"disk" + bytes(4))
    talk.say(option(Option.GO, query("disk"))[:-1])
    assert not disk.sessions
    talk.say(option(Option.GO, query("disk"))[-1:])
    assert len(disk.sessions) == 1


def test_unknown_and_repeated_info_types_are_ignored(talk: Dialogue) -> None:
    answers = talk.ask(Option.INFO, query("disk", 1, 1, 1, 99, 0xFFFF, 3, 3))
    kinds = [struct.unpack_from(">H", payload)[0] for _, payload in answers[:-1]]
    assert sorted(kinds) == [InfoType.EXPORT, InfoType.NAME, InfoType.BLOCK_SIZE]


def test_name_and_description_are_sent_when_asked_for(talk: Dialogue) -> None:
    found = infos(talk.ask(Option.INFO, query("", InfoType.NAME, InfoType.DESCRIPTION)))
    assert found[InfoType.NAME] == b"disk"
    assert found[InfoType.DESCRIPTION] == b"a disk"
    assert InfoType.NAME not in infos(talk.ask(Option.INFO, query("disk")))


@pytest.mark.parametrize("types", [(), (InfoType.BLOCK_SIZE,)])
def test_block_sizes_are_always_sent(talk: Dialogue, types: tuple[int, ...]) -> None:
    sizes = struct.unpack(">III", infos(talk.ask(Option.INFO, query("disk", *types)))[InfoType.BLOCK_SIZE])
    assert sizes == (1, 65536, 1 << 25)


@pytest.mark.parametrize(
    ("block", "preferred"), [(1, 512), (65536, 65536), (196608, 131072), (1 << 30, 1 << 20), (1000, 512)]
)
def test_the_preferred_size_is_a_power_of_two(block: int, preferred: int) -> None:
    talk = dialogue(MemoryDirectory([MemoryDevice("disk", 4096, preferred_block_bytes=block)]))
    assert (
        struct.unpack(">III", infos(talk.ask(Option.INFO, query("disk")))[InfoType.BLOCK_SIZE])[1]
        == preferred
    )


def test_go_repeats_what_info_said_although_the_export_grew(talk: Dialogue, disk: MemoryDevice) -> None:
    told = infos(talk.ask(Option.INFO, query("disk")))[InfoType.EXPORT]
    disk.size_bytes *= 2
    assert infos(talk.ask(Option.GO, query("disk")))[InfoType.EXPORT] == told
    assert talk.terms is not None
    assert talk.terms.size_bytes == 1 << 20


def test_an_option_between_info_and_go_frees_the_server(talk: Dialogue, disk: MemoryDevice) -> None:
    talk.ask(Option.INFO, query("disk"))
    disk.size_bytes *= 2
    talk.ask(Option.LIST)
    assert struct.unpack(">QH", infos(talk.ask(Option.GO, query("disk")))[InfoType.EXPORT])[0] == 2 << 20


def test_go_is_refused_once_where_info_can_not_be_kept(talk: Dialogue, disk: MemoryDevice) -> None:
    talk.ask(Option.INFO, query("disk"))
    disk.size_bytes //= 2
    assert talk.final(Option.GO, query("disk")) == OptionReply.ERR_PLATFORM
    assert not disk.sessions
    assert talk.final(Option.GO, query("disk")) == OptionReply.ACK


def test_a_refused_open_keeps_the_negotiation_alive(talk: Dialogue, disk: MemoryDevice) -> None:
    talk.ask(Option.STRUCTURED_REPLY)
    disk.open_error = OSError(errno.ESHUTDOWN, "leaving")
    assert talk.final(Option.GO, query("disk")) == OptionReply.ERR_SHUTDOWN
    disk.open_error = OSError(errno.EBUSY, "busy")
    assert talk.final(Option.GO, query("disk")) == OptionReply.ERR_PLATFORM
    disk.open_error = None
    assert talk.final(Option.GO, query("disk")) == OptionReply.ACK
    assert talk.terms is not None
    assert talk.terms.structured


def test_nothing_follows_the_ack_of_go(talk: Dialogue) -> None:
    request = b"\x25\x60\x95\x13 is the first request"
    answer = talk.raw(option(Option.GO, query("disk")) + request)
    assert replies(answer, Option.GO)[-1] == (OptionReply.ACK, b"")
    if not talk.bytewise:
        assert talk.handshake.take_pending() == request


def test_structured_reply_takes_no_data_and_may_be_repeated(talk: Dialogue) -> None:
    assert talk.final(Option.STRUCTURED_REPLY, b"x") == INVALID
    assert talk.final(Option.STRUCTURED_REPLY) == OptionReply.ACK
    assert talk.final(Option.STRUCTURED_REPLY) == OptionReply.ACK


def test_structured_reply_after_extended_headers_is_refused(talk: Dialogue) -> None:
    talk.ask(Option.EXTENDED_HEADERS)
    assert talk.final(Option.STRUCTURED_REPLY) == OptionReply.ERR_EXT_HEADER_REQD
    talk.ask(Option.GO, query("disk"))
    assert talk.terms is not None
    assert talk.terms.extended


def test_extended_headers_once_and_without_data(talk: Dialogue) -> None:
    assert talk.final(Option.EXTENDED_HEADERS, b"x") == INVALID
    assert talk.final(Option.EXTENDED_HEADERS) == OptionReply.ACK
    assert talk.final(Option.EXTENDED_HEADERS) == INVALID


def test_extended_headers_after_structured_reply_take_precedence(talk: Dialogue) -> None:
    talk.ask(Option.STRUCTURED_REPLY)
    assert talk.final(Option.EXTENDED_HEADERS) == OptionReply.ACK
    talk.ask(Option.GO, query("disk"))
    assert talk.terms is not None
    assert talk.terms.extended
    assert not talk.terms.structured


def test_go_works_after_extended_headers_alone(talk: Dialogue) -> None:
    talk.ask(Option.EXTENDED_HEADERS)
    flags = struct.unpack(">QH", infos(talk.ask(Option.GO, query("disk")))[InfoType.EXPORT])[1]
    assert flags & TransmissionFlag.SEND_DF
    assert not flags & TransmissionFlag.BLOCK_STATUS_PAYLOAD  # no context was selected


@pytest.mark.parametrize("structured", [False, True])
def test_flags_of_a_writable_export(disk: MemoryDevice, structured: bool) -> None:
    talk = dialogue(MemoryDirectory([disk]))
    if structured:
        talk.ask(Option.STRUCTURED_REPLY)
    flags = struct.unpack(">QH", infos(talk.ask(Option.GO, query("disk")))[InfoType.EXPORT])[1]
    expected = 0b1101_0110_1101 | (TransmissionFlag.SEND_DF if structured else 0)
    assert flags == expected


def test_flags_of_a_read_only_export() -> None:
    talk = dialogue(MemoryDirectory([MemoryDevice("disk", 4096, read_only=True)]))
    flags = struct.unpack(">QH", infos(talk.ask(Option.GO, query("disk")))[InfoType.EXPORT])[1]
    assert flags & TransmissionFlag.READ_ONLY
    assert flags & TransmissionFlag.CAN_MULTI_CONN
    assert not flags & (TransmissionFlag.SEND_TRIM | TransmissionFlag.SEND_WRITE_ZEROES)


def test_a_session_that_is_never_handed_over_is_closed(disk: MemoryDevice) -> None:
    handshake = ServerHandshake(MemoryDirectory([disk]))
    events = handshake.feed(CLIENT_FLAGS.pack(3) + option(Option.GO, query("disk")))
    assert isinstance(next(events), Send)  # sending fails here: the driver gives up
    handshake.abandon()
    assert disk.open_sessions == 0
