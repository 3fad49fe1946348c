"""A small picture of ratios: a bar each, by group, with a line where both are equally fast."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from bench_figures import Bar

WIDTH, LABELS, VALUES = 760, 330, 60
LINE, GAP, TOP = 18, 8, 44
COLOURS = ("#2a6f97", "#8a5a9e", "#3f8f5f", "#b0752c")


def picture(title: str, bars: Sequence[Bar]) -> str:
    """Return an SVG document. Raises ValueError for no bars, and for one below zero."""
    if not bars or min(bar.value for bar in bars) < 0:
        raise ValueError("bars are ratios, and at least one")
    scale = (WIDTH - LABELS - VALUES) / max(1.0, *(bar.value for bar in bars))
    labels = list(dict.fromkeys(bar.label for bar in bars))
    drawn, at, group = [], TOP, ""
    for bar in bars:
        if bar.group != group:
            at += GAP
            group = bar.group
        drawn += _bar(bar, at, scale, COLOURS[labels.index(bar.label) % len(COLOURS)])
        at += LINE
    line = LABELS + scale
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{at + 12}" '
            f'viewBox="0 0 {WIDTH} {at + 12}" font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{at + 12}" fill="#ffffff"/>',
            f'<text x="8" y="20" font-size="15" fill="#222222">{escape(title)}</text>',
            *drawn,
            f'<line x1="{line:.1f}" y1="{TOP - 8}" x2="{line:.1f}" y2="{at}" stroke="#222222" stroke-dasharray="3 3"/>',
            f'<text x="{line + 4:.1f}" y="{TOP - 2}" fill="#222222">equally fast</text>',
            "</svg>",
            "",
        ]
    )


def _bar(bar: Bar, at: int, scale: float, colour: str) -> list[str]:
    length = bar.value * scale
    name = escape(f"{bar.group}: {bar.label}")
    return [
        f'<text x="{LABELS - 6}" y="{at + 13}" text-anchor="end" fill="#222222">{name}</text>',
        f'<rect x="{LABELS}" y="{at + 2}" width="{length:.1f}" height="{LINE - 4}" fill="{colour}"/>',
        f'<text x="{LABELS + length + 5:.1f}" y="{at + 13}" fill="#222222">{bar.value:.1f}</text>',
    ]
