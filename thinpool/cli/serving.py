"""Commands about the server: serve, stop."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from thinpool.daemon import ensure_standard_descriptors, run_detached
from thinpool.pool_location import PoolLocation
from thinpool.serve_settings import GRACE_SECONDS, ServeSettings
from thinpool.wording import shown_path

from .arguments import ENDPOINT, OCTAL, json_option, pool_command
from .report import emit_json, warn

if TYPE_CHECKING:
    from thinpool.daemon import Announce

LOG_NAME = "serve.log"


@click.command(
    "serve",
    epilog="\b\nExamples:\n  thinpool serve /srv/pool\n  thinpool serve /srv/pool --detach --listen localhost:10809\n"
    "  thinpool serve --metadata pool_tmeta --data pool_tdata --socket /run/pool.sock",
)
@click.option(
    "--socket", "socket_path", type=click.Path(path_type=Path), help="Unix socket [default: POOL/nbd.sock]."
)
@click.option(
    "--socket-mode",
    type=OCTAL,
    default="0600",
    show_default=True,
    metavar="MODE",
    help="Permissions of that socket.",
)
@click.option("--socket-owner", metavar="USER[:GROUP]", help="Owner of that socket.")
@click.option(
    "--listen", type=ENDPOINT, multiple=True, help="Also listen on TCP. May be given several times."
)
@click.option("--default-export", metavar="NAME", help="The device that clients get who name none.")
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="SETTING=VALUE",
    help="A setting of `thinpool set` for this server only. May be given several times.",
)
@click.option("--read-only", is_flag=True, help="Serve every device read-only.")
@click.option("--detach", is_flag=True, help="Run in the background; returns when the server is ready.")
@click.option("--pid-file", type=click.Path(path_type=Path), help="Write the process id there.")
@click.option(
    "--log-file", type=click.Path(path_type=Path), help=f"Log of --detach [default: POOL/{LOG_NAME}]."
)
@click.option(
    "--grace",
    type=click.FloatRange(0, 3600),
    default=GRACE_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Time for requests in flight when the server stops.",
)
@click.option(
    "--tls-certificates",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Do TLS: DIR holds server-cert.pem, server-key.pem, ca-cert.pem.",
)
@click.option(
    "--tls-psk",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Do TLS with the keys of a psktool file.",
)
@click.option(
    "--allow",
    multiple=True,
    metavar="EXPORT=CLIENT[,CLIENT]",
    help="Only these TLS clients (certificate or key names) may use the export. May be given several times.",
)
@click.option("--no-list", is_flag=True, help="Do not tell clients which exports there are.")
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    metavar="N",
    help="Refuse more connections [default: 1024].",
)
@click.option("--exit-with-parent", is_flag=True, help="Stop when the process that started the server ends.")
@click.option("--tls-optional", is_flag=True, help="Let clients do without TLS.")
@click.option("--tls-verify-peer", is_flag=True, help="Demand a certificate of that authority from clients.")
@json_option
@pool_command()
def serve_command(
    location: PoolLocation, *, detach: bool, log_file: Path | None, as_json: bool, **options: Any
) -> None:
    """Serve a pool over NBD: every device is an export under its name.

    Runs until SIGTERM, SIGINT or `thinpool stop`; a second signal does not wait for requests in flight any longer,
    and nothing that was answered is lost by it. SIGHUP reads the certificates of --tls-certificates again; a server
    whose terminal is gone stops, unless nohup started it. Prints one NBD URI for each device and address; devices
    made later are exported at once.
    """
    location.require()
    settings = _settings(location.absolute(), options)
    if detach and settings.exit_with_parent:
        raise click.UsageError(message="--exit-with-parent and --detach exclude each other")

    def serve(announce: Announce) -> None:
        from thinpool.service import Service

        _log_to_stderr()
        Service(settings).run(announce)

    if not detach:
        ensure_standard_descriptors()
        serve(lambda described: _print_served(described, as_json=as_json))
        return
    if log_file is None and settings.location.root is not None:
        log_file = settings.location.root / LOG_NAME
    described = run_detached(serve, None if log_file is None else log_file.absolute())
    _print_served(described, as_json=as_json)


def _settings(location: PoolLocation, options: dict[str, Any]) -> ServeSettings:
    def absolute(path: Path | None) -> Path | None:
        return None if path is None else path.absolute()

    certificates = options["tls_certificates"]
    keys = options["tls_psk"]
    if certificates is not None and keys is not None:
        raise click.UsageError(message="--tls-certificates and --tls-psk exclude each other")
    if certificates is None and keys is None and (options["tls_optional"] or options["allow"]):
        raise click.UsageError(message="--tls-optional and --allow need --tls-certificates or --tls-psk")
    if certificates is None and options["tls_verify_peer"]:
        raise click.UsageError(message="--tls-verify-peer needs --tls-certificates")
    return ServeSettings(
        location=location,
        socket_path=absolute(options["socket_path"]),
        listen=options["listen"],
        default_export=options["default_export"],
        pid_file=absolute(options["pid_file"]),
        grace_seconds=options["grace"],
        tls_certificates=absolute(certificates),
        tls_required=not options["tls_optional"],
        tls_verify_peer=options["tls_verify_peer"],
        tls_psk=absolute(keys),
        allowed=_allowed(options["allow"]),
        exit_with_parent=options["exit_with_parent"],
        connections_max=options["max_connections"],
        listing=not options["no_list"],
        socket_mode=options["socket_mode"],
        socket_owner=_owner(options["socket_owner"]),
        read_only=options["read_only"],
        overrides=_overrides(options["overrides"]),
    )


def _overrides(given: Sequence[str]) -> dict[str, str]:
    """Settings NAME=VALUE as a table. Raises BadSetting, click.UsageError."""
    from thinpool.pool_settings import checked

    table = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(message=f"--set {text!r} is not SETTING=VALUE")
        table[name] = value
    checked(table)
    return table


def _allowed(rules: Sequence[str]) -> dict[str, list[str]]:
    """Rules EXPORT=CLIENT,CLIENT as a table; the last equals sign counts, names may hold others."""
    table: dict[str, list[str]] = {}
    for rule in rules:
        export, equals, clients = rule.rpartition("=")
        if not equals or not export or not clients:
            raise click.UsageError(message=f"--allow {rule!r} is not EXPORT=CLIENT[,CLIENT]")
        table.setdefault(export, []).extend(clients.split(","))
    return table


def _owner(text: str | None) -> tuple[int, int]:
    """User and group ids of USER[:GROUP], by name or number."""
    import grp
    import pwd

    if not text:
        return -1, -1
    user, _, group = text.partition(":")
    try:
        user_id = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid if user else -1
        group_id = int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid if group else -1
    except KeyError as error:
        raise click.UsageError(message=f"--socket-owner {text!r}: {error.args[0]}") from None
    return user_id, group_id


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s thinpool: %(message)s", force=True)


def _print_served(described: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit_json({"server": described})
        return
    uris = [uri for of_device in described["uris"].values() for uri in of_device]
    for uri in uris:
        click.echo(uri)
    if not uris:
        where = [shown_path(path) for path in described["sockets"]]
        where += [f"{host}:{port}" for host, port in described["tcp"]]
        warn(f"serving on {', '.join(where)}; the pool has no devices yet")


@click.command("stop", epilog="\b\nExample:\n  thinpool stop /srv/pool")
@click.option(
    "--grace", type=click.FloatRange(0, 3600), metavar="SECONDS", help="Time for requests in flight."
)
@json_option
@pool_command(bare=False)
def stop_command(location: PoolLocation, *, grace: float | None, as_json: bool) -> None:
    """Stop the server of a pool and wait until the pool is closed.

    Requests in flight are finished, clients are disconnected, everything is committed.
    """
    from thinpool.pool_access import PoolAccess

    location.require()
    pid = PoolAccess(location).client().stop(grace)
    if as_json:
        emit_json({"stopped": pid})
    else:
        click.echo(f"the server of {shown_path(location)} (process {pid}) has stopped")
