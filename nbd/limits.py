"""Bounds that keep one client, or a thousand of them, from exhausting the server. All are parameters."""

from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server grants. Sizes in bytes, times in seconds."""

    connections_max: int = 1024
    """Open connections of all kinds; newcomers beyond are closed at once."""
    descriptors_kept: int = 16
    """File descriptors of the process that connections leave alone, but at most a quarter of all; newcomers beyond are
    closed at once. What the devices are made of may have to open files."""
    unfinished_handshakes_max: int = 256
    """Connections still negotiating; beyond it the oldest one gives way."""
    handshake_seconds: float = 30.0
    """From accept to GO, TLS included."""
    options_max: int = 1024
    """Options per connection."""
    queries_max: int = 10_000
    """Meta-context queries per connection."""
    contexts_max: int = 64
    """Contexts selected at one time."""
    option_bytes_max: int = 72 * KIB
    """Largest option payload that is looked at; longer ones are answered without."""
    option_discard_bytes_max: int = 256 * KIB
    """Largest option payload that is read and thrown away; longer ones end the connection."""
    payload_bytes_max: int = 64 * MIB
    """Largest request payload that is accepted; longer ones end the connection."""
    advertised_payload_bytes: int = 32 * MIB
    """What clients are told (2^25, which reference clients assume anyway)."""
    receive_buffer_bytes: int = 256 * KIB
    """Largest write that is taken in together with others."""
    whole_payload_bytes: int = 2 * MIB
    """Writes up to this size are received completely before any byte is applied."""
    payload_memory_bytes: int = 64 * MIB
    """Memory of the whole server for such writes; when it is all in use, they are applied in pieces as they arrive."""
    batch_bytes: int = 1 * MIB
    """Reply bytes after which a batch is sent before more requests are looked at."""
    spin_seconds: float = 50e-6
    """How long a connection polls for its next request before it sleeps; 0 turns it off."""
    send_stall_seconds: float = 5.0
    """How long a reply may wait for the client before the server stops holding data blocks for it."""
    stalled_bytes_max: int = 256 * MIB
    """Reply bytes of all such clients together that are kept aside; beyond it they are disconnected."""
    queued_bytes_max: int = 64 * MIB
    """Payloads of all writes together that wait for space while their connections go on; more wait one a connection."""
