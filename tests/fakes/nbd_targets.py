"""What the fuzzers call: bytes into the protocol, and the invariant that must hold whatever they are.

The invariant: bytes give replies or a protocol error, never another exception, never unbounded memory, and no
request that is refused touches the device. Hypothesis calls these from `tests/property/test_nbd_fuzz.py`,
atheris from `tools/fuzz_nbd.py`; both keep what they find in `tests/corpus/nbd`.
"""

from collections.abc import Callable

from nbd.access import AllowList, PeerIdentity, TlsMode
from nbd.activity import Activity
from nbd.constants import Command
from nbd.errors import ConnectionEnded, RemoteProtocolError
from nbd.events import Close, Send, StartTls, Transmit
from nbd.handshake import ServerHandshake
from nbd.limits import Limits
from nbd.reply_stream import ReplyStream
from tests.fakes.memory_device import MemoryDevice, MemoryDirectory
from tests.fakes.nbd_streams import ScriptedLink, pieces, run_transmission, terms_for

SIZE_BYTES = 3 * 65536 + 77
LIMITS = Limits(
    payload_bytes_max=1 << 20, receive_buffer_bytes=65536, batch_bytes=1 << 18, whole_payload_bytes=1 << 18
)
CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:snap"]
_ACTIVITY = Activity()


def _device(name: str = "disk", *, read_only: bool = False) -> MemoryDevice:
    device = MemoryDevice(name, SIZE_BYTES, read_only=read_only, dirty={"snap": [(1000, 1)]})
    device.kinds[0] = device.kinds[2] = 1
    return device


def handshake(data: bytes) -> None:
    """The first byte chooses the server's TLS mode and the size of the pieces, the rest is what the client sends."""
    if not data:
        return
    mode = list(TlsMode)[data[0] % 3]
    piece = max((1, 7, 1 << 20)[data[0] // 3 % 3], len(data) // 2000)
    devices = [_device(), _device("secret"), _device("ü/b", read_only=True)]
    negotiation = ServerHandshake(
        MemoryDirectory(devices, "disk"), tls=mode, access=AllowList({"secret": ["alice"]}), limits=LIMITS
    )
    sent = 0
    finished = False
    for part in pieces(data[1:], piece):
        for event in negotiation.feed(part):
            match event:
                case Send(data=reply):
                    sent += len(reply)
                case StartTls():
                    if negotiation.pending:
                        return
                    negotiation.tls_established(PeerIdentity(tls=True, names=frozenset({"alice"})))
                case Transmit(terms=terms):
                    finished = True
                    terms.session.close()
                case Close():
                    finished = True
        if finished:
            break  # what came behind is for the transmission; the driver feeds the handshake no more
        assert negotiation.pending <= LIMITS.option_bytes_max + 16
    negotiation.abandon()
    assert all(device.open_sessions == 0 for device in devices)
    assert sent <= 4096 * (len(data) // 16 + 1) + 65536
    touched = {entry[0] for device in devices for entry in device.log or []}
    assert not touched


def transmission(data: bytes) -> None:
    """The first byte chooses the form of replies, the second the size of the pieces, the rest is what the client sends."""
    if len(data) < 2:
        return
    style, read_only, fault = data[0] % 3, bool(data[0] & 0x10), bool(data[0] & 0x20)
    piece = max((1, 29, 4096, 1 << 20)[data[1] % 4], len(data) // 2000)
    device = _device(read_only=read_only)
    if fault:
        device.fail = {"write": OSError(28, "full"), "extents": OSError(5, "bad"), "read": OSError(5, "bad")}
    terms = terms_for(device, structured=style == 1, extended=style == 2, contexts=CONTEXTS if style else [])
    link = ScriptedLink(pieces(data[2:], piece))
    outcome = run_transmission(link, terms, limits=LIMITS, activity=_ACTIVITY)
    assert outcome is None or isinstance(outcome, ConnectionEnded | RemoteProtocolError), repr(outcome)
    # every request has 28 bytes at least, and none gives more than the whole device in chunks
    assert len(link.output) <= (len(data) // 28 + 1) * (2 * SIZE_BYTES + 4096)
    for name, *where in device.log or []:
        if name in ("read", "write", "trim", "zero", "cache", "extents", "read_copy"):
            assert where[0] + where[1] <= SIZE_BYTES, (name, where)  # type: ignore[operator]
        if read_only:
            assert name not in ("write", "trim", "zero")


def replies(data: bytes) -> None:
    """The first byte chooses the form; the rest is what a server sends to a client with a few requests waiting."""
    if not data:
        return
    style = data[0] % 3
    stream = ReplyStream(structured=style == 1, extended=style == 2)
    for cookie, command in enumerate(Command):
        stream.expect(cookie, command, 512 * cookie, 512)
    try:
        for reply in stream.feed(data[1:]):
            assert len(reply.data) <= 512
    except RemoteProtocolError:
        pass


TARGETS: dict[str, Callable[[bytes], None]] = {
    "handshake": handshake,
    "transmission": transmission,
    "replies": replies,
}
