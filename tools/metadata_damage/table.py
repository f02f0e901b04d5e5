"""The verdicts of many cases as a page of Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmark.report import table

from .damages import KINDS
from .histories import Choice
from .judgement import Verdict

Chosen = Callable[[Verdict], bool]


def document(verdicts: Sequence[Verdict], found: Sequence[Choice], command: str) -> str:
    """The page: the promise, by kind of damage, what fell short with its seeds."""
    changed = [each for each in verdicts if each.meaning == "changed"]
    consistent = [each for each in verdicts if each.meaning == "consistent"]
    lines = [
        "# Random damage",
        "",
        f"Made by `{command}`. Each seed damages the metadata of a pool of three devices and two snapshots (one to",
        "three damages at once, checksums as they fall or computed anew), then check and repair are judged by a reader",
        "that shares no code with them. `tools/damage --first SEED --image FILE` writes the image of a seed.",
        "",
        *_promise(verdicts, changed, consistent),
        "",
        "## By kind of damage",
        "",
        "A case with several kinds counts in each. *Undamaged devices* are those none of whose own nodes changed,",
        "whatever happened to the lists of devices, the space maps or the superblock.",
        "",
        *_by_kind(verdicts),
        "",
        "## Undamaged devices that did not come back under their number",
        "",
        *_short(verdicts),
        "",
        "## The last commit without a superblock",
        "",
        "Pools of random histories, the superblock zeroed after each commit: devices that come back as they were at",
        "the last commit, where storage holds most of the one before as well. *Proven*: repair says that the format",
        "itself tells which is the last. *Upwards*: data is handed out as engine and kernel do, otherwise at random.",
        "",
        *_choices(found),
    ]
    return "\n".join(lines) + "\n"


def _promise(
    verdicts: Sequence[Verdict], changed: Sequence[Verdict], consistent: Sequence[Verdict]
) -> list[str]:
    asked = [each for each in verdicts if each.debian_found is not None]
    undamaged = sum(len(each.undamaged) for each in verdicts)
    returned = sum(len(each.returned) for each in verdicts)
    kept = sum(each.source_kept for each in verdicts)
    honest = sum(each.honest for each in verdicts)
    their_found = sum(bool(each.debian_found) for each in asked if each.meaning == "changed")
    their_returned = sum(len(each.debian_returned or ()) for each in asked)
    their_kept = sum(bool(each.debian_kept) for each in asked)

    def theirs(number: int, of: int) -> str:
        return f"{number:,} of {of:,}" if asked else "not asked"

    rows = [
        [
            "damages that change what the pool means, found by check",
            f"{sum(e.found for e in changed):,} of {len(changed):,}",
        ],
        ["undamaged devices that repair gives back complete", f"{returned:,} of {undamaged:,}"],
        ["source unchanged (by hash), result sound", f"{kept:,} of {len(verdicts):,}"],
        ["nothing said to be complete that is not", f"{honest:,} of {len(verdicts):,}"],
    ]
    debian = [
        theirs(their_found, len(changed)),
        theirs(their_returned, undamaged),
        theirs(their_kept, len(verdicts)),
        "-",
    ]
    for row, text in zip(rows, debian, strict=True):
        row.append(text)
    return [
        *table(["", "thinpool", "thin_check, thin_repair 0.9"], rows),
        "",
        f"{len(consistent)} further cases made another pool in which nothing contradicts anything (checksums were",
        "computed anew): no checker can tell. Check objected to "
        f"{sum(each.found for each in consistent)} of them all the same. "
        f"{sum(each.meaning == 'same' for each in verdicts)} cases changed nothing that means anything.",
    ]


def _by_kind(verdicts: Sequence[Verdict]) -> list[str]:
    rows = []
    for kind in KINDS:
        mine = [each for each in verdicts if kind in each.kinds]
        changed = [each for each in mine if each.meaning == "changed"]
        rows.append(
            [
                kind,
                str(len(mine)),
                f"{sum(each.found for each in changed)} of {len(changed)}",
                f"{sum(bool(each.debian_found) for each in changed)}",
                f"{sum(len(e.returned) for e in mine)} of {sum(len(e.undamaged) for e in mine)}",
                f"{sum(len(e.debian_returned or ()) for e in mine)}",
            ]
        )
    return table(
        ["", "cases", "found", "by thin_check", "undamaged devices returned", "by thin_repair"], rows
    )


def _choices(found: Sequence[Choice]) -> list[str]:
    rows = []
    for snapshots in (True, False):
        for upwards in (True, False):
            mine = [each for each in found if (each.snapshots, each.upwards) == (snapshots, upwards)]
            proven = [each for each in mine if each.proven]
            rows.append(
                [
                    ("snapshots" if snapshots else "none") + (", upwards" if upwards else ", random"),
                    str(len(mine)),
                    f"{sum(each.returned for each in mine)} of {sum(each.devices for each in mine)}",
                    f"{sum(each.returned == each.devices for each in mine)}",
                    f"{sum(each.returned == each.devices for each in proven)} of {len(proven)}",
                ]
            )
    heads = ["snapshots, data", "commits", "devices returned", "commits returned whole", "of those proven"]
    return table(heads, rows)


def _short(verdicts: Sequence[Verdict]) -> list[str]:
    short = [each for each in verdicts if each.returned != each.undamaged]
    without = [each for each in short if each.superblock_hit]
    both = [each for each in short if not each.superblock_hit and each.lists_hit]
    others = [each for each in short if not each.superblock_hit and not each.lists_hit]
    cut = [each for each in others if "truncated file" in each.kinds]
    rest = [each for each in others if "truncated file" not in each.kinds]
    if not short:
        return ["None: every one came back."]
    rows: list[tuple[str, list[Verdict]]] = [
        ("the superblock was damaged, and another commit was taken for the last", without),
        ("both lists of devices were damaged, and other commits did not tell which root is whose", both),
        ("the list of roots was damaged, and the space maps cut off", cut),
        ("other", rest),
    ]
    shown = [[why, str(len(cases)), ", ".join(str(each.seed) for each in cases[:12])] for why, cases in rows]
    return table(["why", "cases", "seeds, the first of them"], shown)
