"""The ratios as SVG, written by hand: one bar a peer and workload on a logarithmic scale, targets marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

from .matrix import Row
from .workloads import ALL_SERVERS, OURS

COLOURS = dict(
    zip(ALL_SERVERS[1:], ("#3b6ea5", "#7fa8d1", "#c8553d", "#e3a857", "#6a9a58", "#999999"), strict=True)
)
LABEL_WIDTH, PLOT_WIDTH, BAR_HEIGHT, GAP = 330, 520, 13, 10
LEAST, MOST = 0.25, 32.0


def _x(ratio: float) -> float:
    share = math.log(min(max(ratio, LEAST), MOST) / LEAST) / math.log(MOST / LEAST)
    return LABEL_WIDTH + share * PLOT_WIDTH


def _text(x: float, y: float, words: str, *, anchor: str = "start", weight: str = "normal") -> str:
    style = f'font-family="sans-serif" font-size="11" text-anchor="{anchor}" font-weight="{weight}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(words)}</text>'


def _bar(y: float, peer: str, ratio: float, target: float | None) -> list[str]:
    left, right = sorted((_x(1.0), _x(ratio)))
    parts = [
        f'<rect x="{left:.1f}" y="{y:.1f}" width="{max(right - left, 1):.1f}" height="{BAR_HEIGHT - 2}" '
        f'fill="{COLOURS[peer]}"/>',
        _text(max(right, _x(1.0)) + 5, y + BAR_HEIGHT - 4, f"{ratio:.2f}"),
    ]
    if target is not None:
        at = _x(target)
        parts.append(f'<path d="M{at:.1f} {y - 1:.1f}v{BAR_HEIGHT}" stroke="#000" stroke-width="2"/>')
    return parts


def ratio_plot(rows: Sequence[Row]) -> str | None:
    """Return the drawing, or None where there is nothing to compare."""
    parts: list[str] = []
    y = 46.0
    seen: list[str] = []
    for row in rows:
        bars = [
            (peer, ratio) for peer in ALL_SERVERS if peer != OURS and (ratio := row.ratio(peer)) is not None
        ]
        if not bars:
            continue
        middle = y + len(bars) * BAR_HEIGHT / 2 + 3
        parts.append(_text(LABEL_WIDTH - 8, middle, row.workload.title, anchor="end"))
        for peer, ratio in bars:
            parts += _bar(y, peer, ratio, row.workload.targets.get(peer))
            seen += [] if peer in seen else [peer]
            y += BAR_HEIGHT
        y += GAP
    if not seen:
        return None
    lines = [
        f'<path d="M{_x(tick):.1f} 36V{y:.1f}" stroke="{"#000" if tick == 1 else "#ddd"}"/>'
        + _text(_x(tick), 32, f"{tick:g}x", anchor="middle")
        for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32)
    ]
    legend = [_text(8, 14, "thinpool over:", weight="bold")]
    for number, peer in enumerate(seen):
        x = 110 + number * 135
        legend.append(
            f'<rect x="{x}" y="5" width="11" height="11" fill="{COLOURS[peer]}"/>' + _text(x + 15, 14, peer)
        )
    legend.append(_text(110 + len(seen) * 135, 14, "black mark: target"))
    width, height = LABEL_WIDTH + PLOT_WIDTH + 60, y + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" width="{width}">'
    background = f'<rect width="{width}" height="{height:.0f}" fill="#fff"/>'
    return "\n".join([head, background, *lines, *legend, *parts, "</svg>", ""])
