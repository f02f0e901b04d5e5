"""Fuzz the NBD codecs with atheris, coverage-guided, keeping a corpus: ``python tools/fuzz_nbd.py TARGET [MINUTES]``.

In: handshake, transmission and the client's reply decoder; what must hold is in `tests/fakes/nbd_targets.py`.
Out: sockets. Needs ``pip install atheris`` (not among the project's dependencies: it has no wheel for every
Python). A finding is written to ``tests/corpus/nbd/TARGET`` and fails `tests/property/test_nbd_fuzz.py` until
it is fixed. ``--seed`` writes the first corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CORPUS = ROOT / "tests" / "corpus" / "nbd"
sys.path.insert(0, str(ROOT))


def seeds() -> dict[str, list[bytes]]:
    """Return well-formed conversations to begin from, one of each kind."""
    from nbd.constants import Command, Option
    from nbd.options import encode_context_query, encode_export_query
    from tests.fakes.nbd_streams import Request, option, write

    base, query = "base:allocation", encode_export_query("disk", (0, 1, 2, 3))
    contexts = encode_context_query("disk", [base, "qemu:dirty-bitmap:snap"])
    conversations = [
        option(Option.EXPORT_NAME, b"disk"),
        option(Option.LIST) + option(Option.ABORT, b"bye"),
        option(Option.STRUCTURED_REPLY)
        + option(Option.SET_META_CONTEXT, contexts)
        + option(Option.INFO, query)
        + option(Option.GO, query),
        option(Option.EXTENDED_HEADERS)
        + option(Option.LIST_META_CONTEXT, contexts)
        + option(Option.GO, query),
        option(Option.STARTTLS),
        option(77, b"unknown") + option(Option.GO, query[:-1]),
    ]
    handshakes = [bytes([mode]) + struct.pack(">I", 3) + talk for mode in range(3) for talk in conversations]
    transmissions = []
    for style in range(3):
        extended = style == 2
        asked = [
            Request(command, 4096, 512) for command in Command if command not in (Command.WRITE, Command.DISC)
        ]
        asked += [
            write(100, b"data" * 50, extended=extended),
            Request(Command.DISC),
            Request(Command.READ, 0, 0),
        ]
        asked += [Request(Command.READ, 0, 196_608), Request(Command.READ, 1 << 63, 1)]
        for index, request in enumerate(asked):
            request.cookie = index
        transmissions.append(
            bytes([style, 3]) + b"".join(request.encode(extended=extended) for request in asked)
        )
        transmissions += [bytes([style, 0]) + request.encode(extended=extended) for request in asked]
    payload = struct.pack(">QI", 512, 1)
    filtered = Request(Command.BLOCK_STATUS, 0, len(payload), 0x20, payload, cookie=5)
    transmissions.append(bytes([2, 3]) + filtered.encode(extended=True))
    return {"handshake": handshakes, "transmission": transmissions, "replies": reply_seeds()}


def reply_seeds() -> list[bytes]:
    """Return replies of each form and kind."""
    from nbd.constants import ChunkType, Errno
    from nbd.wire import error_payload, extended_chunk, simple_reply, structured_chunk

    data, hole = struct.pack(">Q", 0) + bytes(512), struct.pack(">QI", 0, 512)
    out = [b"\0" + simple_reply(0) + bytes(512), b"\0" + simple_reply(1, Errno.EIO)]
    bodies = [
        (0, ChunkType.OFFSET_DATA, data),
        (0, ChunkType.OFFSET_HOLE, hole),
        (3, ChunkType.NONE, b""),
        (0, ChunkType.ERROR, error_payload(Errno.EIO, "bad")),
        (0, ChunkType.ERROR_OFFSET, error_payload(Errno.EIO, "bad") + bytes(8)),
        (7, ChunkType.BLOCK_STATUS, struct.pack(">III", 1, 512, 0)),
        (7, ChunkType.BLOCK_STATUS_EXT, struct.pack(">IIQQ", 1, 1, 512, 0)),
    ]
    for cookie, kind, body in bodies:
        out.append(b"\1" + structured_chunk(cookie, kind, len(body), done=True) + body)
        out.append(b"\2" + extended_chunk(cookie, 512 * cookie, kind, len(body), done=True) + body)
    return out


def write_seeds() -> None:
    """Write the first corpus; files that are there already stay."""
    for target, found in seeds().items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for data in found:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def main() -> int:
    """Run one target for some minutes; 0 where nothing was found."""
    parser = argparse.ArgumentParser(description="Fuzz the NBD codecs, coverage-guided.")
    parser.add_argument("target", nargs="?", choices=["handshake", "transmission", "replies"])
    parser.add_argument("minutes", nargs="?", type=float, default=5.0)
    parser.add_argument("--seed", action="store_true", help="write the first corpus and stop")
    arguments = parser.parse_args()
    if arguments.seed:
        write_seeds()
        return 0
    if arguments.target is None:
        parser.error("a target is needed: handshake, transmission or replies")
    try:
        import atheris
    except ImportError:
        print("atheris is not installed: pip install atheris", file=sys.stderr)
        return 1
    with atheris.instrument_imports(include=["nbd"]):
        from tests.fakes.nbd_targets import TARGETS
    folder = CORPUS / arguments.target
    folder.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_total_time={int(arguments.minutes * 60)}",
        "-max_len=4096",
        f"-artifact_prefix={folder}/",
    ]
    atheris.Setup([sys.argv[0], *options, str(folder)], TARGETS[arguments.target])
    atheris.Fuzz()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
