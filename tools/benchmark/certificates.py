"""An authority and a server certificate for the rows over TLS, in the files nbdkit, QEMU and ours all look for."""

from __future__ import annotations

import subprocess
from pathlib import Path

SUBJECT = "/CN=localhost"


class Certificates:
    """Made by openssl when they are first asked for. ``home``: a home directory, in which libnbd finds them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self._directory = home / ".pki" / "libnbd"

    def directory(self) -> Path:
        """Return the directory with ca-cert.pem, server-cert.pem and server-key.pem."""
        if not (self._directory / "server-cert.pem").exists():
            self._directory.mkdir(parents=True)
            self._make()
        return self._directory

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(
            ["openssl", *arguments],
            check=True,
            capture_output=True,
            text=True,
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
        )

    def _make(self) -> None:
        new = ("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
        self._openssl(
            *new, "-x509", "-days", "30", "-subj", "/CN=bench", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"
        )
        self._openssl(*new, "-subj", SUBJECT, "-keyout", "server-key.pem", "-out", "server.csr")
        (self._directory / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n")
        self._openssl(
            *(
                "x509",
                "-req",
                "-days",
                "30",
                "-in",
                "server.csr",
                "-CA",
                "ca-cert.pem",
                "-CAkey",
                "ca-key.pem",
            ),
            *("-CAcreateserial", "-extfile", "names", "-out", "server-cert.pem"),
        )
