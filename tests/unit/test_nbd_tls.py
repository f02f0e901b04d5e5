"""TLS on real connections: certificates, names, injection, pre-shared keys where Python can. Needs openssl once."""

import contextlib
import errno
import itertools
import shutil
import socket
import ssl
import sys
from pathlib import Path
from time import sleep

import pytest

from nbd import AllowList, CertificateTls, Limits, PskTls, TlsUnavailable
from nbd.client import Client, client_context
from nbd.constants import Command, Option, OptionReply
from nbd.errors import ConnectionEnded, OptionRefused, RemoteError
from nbd.options import encode_export_query
from nbd.tls import read_psk_file
from tests.fakes.memory_device import MemoryDevice
from tests.fakes.nbd_server import Served, eventually, make_certificates, serving
from tests.fakes.nbd_streams import option

MIB = 1 << 20

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def disk() -> MemoryDevice:
    device = MemoryDevice("disk", 8 * MIB)
    device.data[: 4 * MIB] = bytes(range(256)) * (4 * MIB // 256)
    device.kinds[:64] = b"\1" * 64
    return device


def connected(served: Served) -> Client:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(str(served.socket_path))
    return Client(sock)


def secured(served: Served, certificates: Path | None, export: str = "disk", **style: bool) -> Client:
    client = connected(served)
    client.start_tls(client_context(certificates), "localhost")
    if style.get("extended"):
        client.negotiate_extended()
    elif style.get("structured", True):
        client.negotiate_structured()
    client.go(export)
    return client


@pytest.mark.parametrize("style", [{"structured": False}, {"structured": True}, {"extended": True}])
def test_everything_works_inside_tls(disk: MemoryDevice, certificates: Path, style: dict[str, bool]) -> None:
    with (
        serving([disk], tls=CertificateTls(certificates)) as served,
        secured(served, certificates, **style) as client,
    ):
        assert client.read(0, 512) == bytes(range(256)) * 2
        assert client.read(100, 3 * MIB) == bytes(disk.data[100 : 100 + 3 * MIB])
        assert client.read(5 * MIB, 4096) == bytes(4096)
        assert client.read(3 * MIB, 3 * MIB) == bytes(disk.data[3 * MIB : 6 * MIB])
        client.write(7, b"encrypted" * 100_000)
        assert client.read(7, 9) == b"encrypted"
        client.trim(0, 65536)
        client.flush()
        with pytest.raises(RemoteError):
            client.read(8 * MIB, 1)
        assert served.server.connections()[0].tls
        client.disconnect()


def test_tls_never_touches_the_data_files_mapping(
    disk: MemoryDevice, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python would be ended by SIGBUS where the kernel only reports EFAULT, so copies are what is encrypted."""
    with serving([disk], tls=CertificateTls(certificates)) as served, secured(served, certificates) as client:
        client.read(0, 4096)
        client.read(0, MIB)
        copied = sum(entry[2] for entry in disk.log or [] if entry[0] == "read_copy")  # type: ignore[misc]
        assert copied == 4096 + MIB


@pytest.mark.parametrize("style", [{"structured": True}, {"extended": True}])
def test_an_error_in_a_long_read_is_told_where_it_is(
    disk: MemoryDevice, certificates: Path, monkeypatch: pytest.MonkeyPatch, style: dict[str, bool]
) -> None:
    with (
        serving([disk], tls=CertificateTls(certificates)) as served,
        secured(served, certificates, **style) as client,
    ):
        session = type(disk.sessions[0])
        original = session.read_copy

        def failing(self: object, offset: int, length: int) -> bytearray:
            if offset + length > MIB:
                raise OSError(5, "bad sector")
            return original(self, offset, length)  # type: ignore[arg-type]

        monkeypatch.setattr(session, "read_copy", failing)
        reply = client.request(0, 0, 2 * MIB)
        assert (reply.error, reply.error_offset) == (5, MIB)
        assert client.read(0, 512) == bytes(range(256)) * 2


def test_memory_does_not_follow_the_length_of_a_read(certificates: Path) -> None:
    big = MemoryDevice("disk", 64 * MIB)
    big.kinds[:] = b"\1" * len(big.kinds)
    with serving([big], tls=CertificateTls(certificates)) as served, secured(served, certificates) as client:
        assert len(client.read(0, 32 * MIB)) == 32 * MIB
        largest = max(entry[2] for entry in big.log or [] if entry[0] == "read_copy")  # type: ignore[type-var]
        assert largest == 256 * 1024


def test_where_tls_is_required_plaintext_is_refused(disk: MemoryDevice, certificates: Path) -> None:
    with serving([disk], tls=CertificateTls(certificates)) as served:
        client = connected(served)
        with pytest.raises(OptionRefused, match="TLS_REQD"):
            client.go("disk")
        client.start_tls(client_context(certificates), "localhost")
        client.go("disk")
        assert client.read(0, 1) == b"\0"
        client.close()


def test_where_tls_is_optional_both_work(disk: MemoryDevice, certificates: Path) -> None:
    with (
        serving([disk], tls=CertificateTls(certificates, required=False)) as served,
        served.client("disk") as plain,
        secured(served, certificates) as secure,
    ):
        plain.write(0, b"both")
        assert secure.read(0, 4) == b"both"


def test_commands_injected_in_plaintext_end_the_connection(disk: MemoryDevice, certificates: Path) -> None:
    """The fault of another server: what an attacker put behind STARTTLS was executed inside the victim's TLS."""
    with serving([disk], tls=CertificateTls(certificates)) as served:
        client = connected(served)
        injected = option(Option.STARTTLS) + option(Option.GO, encode_export_query("disk", ()))
        client.socket.sendall(injected)
        assert client.option_answer(Option.STARTTLS)[0] == OptionReply.ACK
        with pytest.raises((ssl.SSLError, OSError, ConnectionEnded)):
            client.socket = client_context(certificates).wrap_socket(
                client.socket, server_hostname="localhost"
            )
            client.go("disk")
        client.close()
        eventually(lambda: served.log)
        assert "plaintext" in served.log[0]
        assert not disk.sessions


def test_a_failed_tls_handshake_ends_the_connection(disk: MemoryDevice, certificates: Path) -> None:
    with serving([disk], tls=CertificateTls(certificates)) as served:
        client = connected(served)
        client.option(Option.STARTTLS)
        client.socket.sendall(b"GET / HTTP/1.0\r\n\r\n" + bytes(100))
        with contextlib.suppress(ConnectionResetError):
            while client.socket.recv(100):
                pass
        client.close()
        eventually(lambda: served.log)
        assert "TLS" in served.log[0]
        with secured(served, certificates) as good:
            assert good.read(0, 1) == b"\0"


def test_a_stalled_tls_handshake_times_out(disk: MemoryDevice, certificates: Path) -> None:
    with serving([disk], tls=CertificateTls(certificates), limits=Limits(handshake_seconds=0.4)) as served:
        client = connected(served)
        client.option(Option.STARTTLS)
        assert client.socket.recv(100) == b""
        client.close()
        eventually(lambda: not served.server.connections())


def test_old_tls_versions_are_refused(disk: MemoryDevice, certificates: Path) -> None:
    context = client_context(certificates)
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with serving([disk], tls=CertificateTls(certificates)) as served:
        client = connected(served)
        with pytest.raises((ssl.SSLError, OSError)):
            client.start_tls(context, "localhost")
        client.close()
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            good = client_context(certificates)
            good.minimum_version = good.maximum_version = version
            client = connected(served)
            client.start_tls(good, "localhost")
            client.go("disk")
            assert client.read(0, 1) == b"\0"
            client.close()


def test_client_certificates_are_verified_where_asked_for(
    disk: MemoryDevice, certificates: Path, tmp_path: Path
) -> None:
    with serving([disk], tls=CertificateTls(certificates, verify_peer=True)) as served:
        with secured(served, certificates) as alice:
            assert alice.read(0, 1) == b"\0"
        anonymous = tmp_path / "anonymous"
        anonymous.mkdir()
        shutil.copy(certificates / "ca-cert.pem", anonymous)
        for other in (anonymous, certificates / "mallory"):
            with pytest.raises((ssl.SSLError, OSError, ConnectionEnded)):
                secured(served, other)


def test_an_allow_list_compares_certificate_names(disk: MemoryDevice, certificates: Path) -> None:
    private, secret = MemoryDevice("private", MIB), MemoryDevice("secret", MIB)
    access = AllowList({"private": ["alice"], "secret": ["bob"]})
    tls = CertificateTls(certificates, required=False, verify_peer=True)
    with serving([disk, private, secret], tls=tls, access=access) as served:
        with secured(served, certificates, "private") as client:
            assert client.read(0, 1) == b"\0"
        with pytest.raises(OptionRefused, match="POLICY"):
            secured(served, certificates, "secret")
        assert not secret.sessions


def test_certificates_are_reloaded_for_later_connections(
    disk: MemoryDevice, certificates: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "own"
    shutil.copytree(certificates, folder)
    tls = CertificateTls(folder)
    with serving([disk], tls=tls) as served, secured(served, certificates) as old:
        (folder / "server-cert.pem").write_text("rubbish")
        with pytest.raises(TlsUnavailable):
            tls.reload()
        with secured(served, certificates):
            pass
        other = make_certificates(tmp_path / "other")
        for name in ("server-cert.pem", "server-key.pem"):
            shutil.copy(other / name, folder / name)
        tls.reload()
        with secured(served, other) as new:
            assert new.read(0, 1) == old.read(0, 1)


@pytest.mark.parametrize("missing", ["server-cert.pem", "server-key.pem"])
def test_missing_files_are_named(certificates: Path, tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "own"
    shutil.copytree(certificates, folder)
    (folder / missing).unlink()
    with pytest.raises(TlsUnavailable, match=missing):
        CertificateTls(folder)


def test_shutdown_and_vanishing_clients_inside_tls(disk: MemoryDevice, certificates: Path) -> None:
    with serving([disk], tls=CertificateTls(certificates)) as served:
        idle = secured(served, certificates)
        for _ in range(5):
            gone = secured(served, certificates)
            gone.send_request(0, 0, MIB)
            gone.socket.close()
        eventually(lambda: len(served.server.connections()) == 1)
        served.server.shutdown(1.0)
        with pytest.raises((ssl.SSLError, OSError, ConnectionEnded)):
            idle.read(0, 1)
        idle.close()
        assert served.log == []


def test_half_a_record_does_not_keep_writes_waiting_for_space(disk: MemoryDevice, certificates: Path) -> None:
    """Nor one without data, such as a change of keys: the socket is readable and there is nothing to receive."""
    disk.waits = True
    with serving([disk], tls=CertificateTls(certificates)) as served, secured(served, certificates) as client:
        disk.fail["write"] = OSError(errno.ENOSPC, "full")
        cookie = client.send_request(Command.WRITE, 0, 4, payload=b"late")
        eventually(lambda: sum(entry[0] == "write" for entry in disk.log or []) >= 2)
        socket.socket.send(client.socket, b"\x17\x03\x03")  # past TLS: the begin of a record
        sleep(0.1)
        del disk.fail["write"]
        client.socket.settimeout(5)
        assert client.reply_to(cookie).error == 0
        assert disk.data[:4] == b"late"


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_the_end_of_the_client_right_behind_a_request_is_not_lost(
    disk: MemoryDevice, certificates: Path, version: ssl.TLSVersion
) -> None:
    """A client that closes its TLS direction and waits for the server's end of it, with its socket still open."""
    context = client_context(certificates)
    context.minimum_version = context.maximum_version = version
    with serving([disk], tls=CertificateTls(certificates)) as served, connected(served) as client:
        client.start_tls(context, "localhost")
        client.go("disk")
        disk.slow["read"] = 0.3
        client.send_request(0, 0, 512)
        eventually(lambda: disk.log)
        client.send_request(0, 512, 512)  # these two are there together when the server looks again
        client.socket.setblocking(False)
        assert isinstance(client.socket, ssl.SSLSocket)
        with contextlib.suppress(ssl.SSLWantReadError):
            client.socket.unwrap()
        eventually(lambda: not served.server.connections(), 5.0)
        assert [entry[:2] for entry in disk.log or [] if entry[0] == "read_copy"] == [
            ("read_copy", 0),
            ("read_copy", 512),
        ]


# --- pre-shared keys ---------------------------------------------------------------------------------------------------


def test_key_files_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "keys.psk"
    path.write_text("# comment\nalice:0123abcd\n\nbob:with:colon:ff00\n")
    assert read_psk_file(path) == {"alice": b"\x01\x23\xab\xcd", "bob:with:colon": b"\xff\x00"}
    for bad in ("alice", "alice:xyz", ":00ff", "alice:", "", "\xff"):
        path.write_bytes(bad.encode("latin-1"))
        with pytest.raises(TlsUnavailable):
            read_psk_file(path)
    with pytest.raises(TlsUnavailable):
        read_psk_file(tmp_path / "nothing")


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="machine: this Python can do it")
def test_keys_need_a_newer_python_and_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:0123abcd\n")
    with pytest.raises(TlsUnavailable, match=r"3\.13"):
        PskTls(tmp_path)


@pytest.mark.skipif(sys.version_info < (3, 13), reason="machine: pre-shared keys need Python 3.13")
def test_a_client_with_a_key_comes_in_and_one_without_does_not(disk: MemoryDevice, tmp_path: Path) -> None:
    (tmp_path / "keys.psk").write_text("alice:0123abcd0123abcd\n")
    with serving([disk], tls=PskTls(tmp_path)) as served:
        right, wrong = bytes.fromhex("0123abcd0123abcd"), b"wrong key"
        tls_1_2, tls_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
        for key, version, name in itertools.product((right, wrong), (tls_1_2, tls_1_3), ("alice", "bob")):
            good = key == right and name == "alice"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
            context.minimum_version = context.maximum_version = version
            context.set_ciphers("PSK")
            context.set_psk_client_callback(lambda _, name=name, key=key: (name, key))  # type: ignore[attr-defined]
            client = connected(served)
            if good:
                client.start_tls(context, "localhost")
                client.go("disk")
                assert client.read(0, 1) == b"\0"
            else:
                with pytest.raises((ssl.SSLError, OSError)):
                    client.start_tls(context, "localhost")
                    client.go("disk")
            client.close()
