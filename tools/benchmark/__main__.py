"""Command line of tools/bench."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import machine, report
from .matrix import Matrix
from .workloads import ALL_SERVERS, WORKLOADS, select

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def parser() -> argparse.ArgumentParser:
    """Return the option parser; the quick mode is for trying the tool, not for figures."""
    made = argparse.ArgumentParser(prog="tools/bench", description="Measure thinpool beside its peers.")
    made.add_argument(
        "what",
        nargs="?",
        default="matrix",
        choices=["matrix", "list", *REPORTS],
        help="matrix: data path beside peers (default); list: its cells; "
        + "; ".join(f"{name}: {kind.about}" for name, kind in REPORTS.items()),
    )
    made.add_argument(
        "--cells",
        help="comma-separated names or patterns; step1 is the group of first figures; metadata: check, dump, restore",
    )
    made.add_argument("--servers", help="comma-separated servers (default: all that a cell names)")
    made.add_argument("--rounds", type=int, help="rounds of every cell (default 5)")
    made.add_argument("--seconds", type=float, help="seconds of a timed cell (default 5)")
    made.add_argument("--size", type=int, metavar="MIB", help="length of the export in MiB (default 1024)")
    made.add_argument("--quick", action="store_true", help="one round of a second on 128 MiB")
    made.add_argument("--count", type=int, help="snapshots: how many are taken (default 1000)")
    made.add_argument("--mapped", help="snapshots, open: mapped blocks, comma-separated")
    made.add_argument("--work", type=Path, help="directory for the servers' files (default: a temporary one)")
    made.add_argument(
        "--output", type=Path, default=ROOT / "docs" / "benchmarks", help="directory of the report"
    )
    made.add_argument("--name", help="name of the report")
    return made


def run_matrix(options: argparse.Namespace, work: Path, command: str) -> Path:
    """Run cells and write the report."""
    quick = options.quick
    rounds = options.rounds or (1 if quick else 5)
    seconds = options.seconds or (1.0 if quick else 5.0)
    size_bytes = (options.size or (128 if quick else 1024)) * MIB
    workloads = select(options.cells)
    servers = options.servers.split(",") if options.servers else None
    rows = Matrix(work, size_bytes=size_bytes, seconds=seconds, rounds=rounds).run(workloads, servers)
    facts = machine.description(work)
    facts.append(
        f"{rounds} rounds, {seconds:g} s each where timed, exports of {size_bytes // MIB} MiB, Unix socket"
    )
    return report.write(
        options.output, options.name or ("quick" if quick else "data-path"), rows, facts, command
    )


def write_text(options: argparse.Namespace, work: Path, command: str, title: str, lines: list[str]) -> Path:
    """Write a report that is not about the matrix."""
    options.output.mkdir(parents=True, exist_ok=True)
    path: Path = options.output / f"{options.name or options.what}.md"
    facts = [f"- {fact}" for fact in machine.description(work)[:2]]
    path.write_text(
        "\n".join([f"# {title}", "", f"Made by `{command}`.", "", *facts, "", *lines]).rstrip() + "\n"
    )
    return path


def counts(options: argparse.Namespace, default: str) -> list[int]:
    """Return the numbers of mapped blocks asked for."""
    return [int(count) for count in str(options.mapped or default).split(",")]


def snapshot_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import snapshots

    mapped = counts(options, "20000" if options.quick else "1000000")[0]
    return snapshots.run(work, mapped_blocks=mapped, count=options.count or (50 if options.quick else 1000))


def open_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import mappings

    return mappings.run(work, counts(options, "20000" if options.quick else "1000000,10000000"))


def crowd_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import crowd

    rounds = options.rounds or (1 if options.quick else 5)
    return crowd.run(work, rounds=rounds, seconds=options.seconds or (1.0 if options.quick else 2.0))


def call_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import calls

    size_bytes = (options.size or (128 if options.quick else 1024)) * MIB
    servers = options.servers.split(",") if options.servers else None
    return calls.run(work, size_bytes=size_bytes, seconds=options.seconds or 2.0, servers=servers)


def spike_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import spikes

    size_bytes = (options.size or (128 if options.quick else 1024)) * MIB
    rounds = options.rounds or (1 if options.quick else 5)
    return spikes.run(work, size_bytes=size_bytes, rounds=rounds, seconds=options.seconds or 1.0)


def store_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import storing

    return storing.run(work, data_bytes=(options.size or (64 if options.quick else 1024)) * MIB)


def diff_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import differences

    mapped = counts(options, "20000" if options.quick else "10000000")[0]
    return differences.run(work, mapped_blocks=mapped)


def send_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import transfers

    size_bytes = (options.size or (64 if options.quick else 1024)) * MIB
    return transfers.run(work, size_bytes=size_bytes, rounds=options.rounds or (1 if options.quick else 3))


def metadata_lines(options: argparse.Namespace, work: Path) -> list[str]:
    from . import metadata

    mapped = counts(options, "200000" if options.quick else "10000000")[0]
    chosen = options.cells.split(",") if options.cells else []
    rounds = options.rounds or (1 if options.quick else 3)
    return metadata.run(work, mappings=mapped, rounds=rounds, chosen=chosen)


@dataclass(frozen=True, slots=True)
class Report:
    """A report that is not about the matrix: what `--help` says, its title, and what measures and writes it."""

    about: str
    title: str
    lines: Callable[[argparse.Namespace, Path], list[str]]


REPORTS = {
    "snapshots": Report("cost of a snapshot", "What a snapshot costs", snapshot_lines),
    "open": Report("large pools", "Large pools", open_lines),
    "metadata": Report(
        "check, dump, restore beside Debian's tools", "Check, dump and restore", metadata_lines
    ),
    "crowd": Report("many clients, bad clients", "Many clients, bad clients", crowd_lines),
    "calls": Report("system calls a request", "System calls a request", call_lines),
    "store": Report("push and pull beside copying alone", "Object storage", store_lines),
    "diff": Report("what changed, beside thin_delta", "What changed", diff_lines),
    "send": Report("streams beside nbdcopy, qemu-img, zstd", "Snapshots that travel", send_lines),
    "spikes": Report("threads, event loop, processes", "Shapes of a server", spike_lines),
}


def main() -> int:
    options = parser().parse_args()
    if options.what == "list":
        for workload in WORKLOADS:
            print(f"{workload.name:22} {workload.title}")
        return 0
    if options.servers and (unknown := set(options.servers.split(",")) - set(ALL_SERVERS)):
        print(
            f"no such server: {', '.join(sorted(unknown))}; there are: {', '.join(ALL_SERVERS)}",
            file=sys.stderr,
        )
        return 2
    command = shlex.join(["tools/bench", *sys.argv[1:]])
    work = Path(tempfile.mkdtemp(prefix="tpb-", dir=options.work))
    try:
        if options.what == "matrix":
            path = run_matrix(options, work, command)
        else:
            kind = REPORTS[options.what]
            path = write_text(options, work, command, kind.title, kind.lines(options, work))
    except ValueError as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 2
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print(path.read_text())
    print(f"written to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
