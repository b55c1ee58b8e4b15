"""Bars as SVG, enough for a README: no library draws them."""

from xml.sax.saxutils import escape

WIDTH, LABEL, VALUE, BAR, GAP, TOP = 860, 190, 90, 14, 12, 34
COLOURS = ("#7a869a", "#c98b2b", "#2f6fb3", "#3f9a57", "#8d5bb0", "#b5473c", "#4aa3a3")


def _text(x, y, text, anchor="start", weight="normal"):
    return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'


def _rect(x, y, width, height, colour):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" fill="{colour}"/>'


def _page(title, height, parts):
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12">\n'
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>\n' + "\n".join([_text(10, 20, title, weight="bold"), *parts]) + "\n</svg>\n")


def _legend(names, y):
    at, parts = LABEL, []
    for number, name in enumerate(names):
        parts += [_rect(at, y - 10, 10, 10, COLOURS[number]), _text(at + 14, y, name)]
        at += 24 + 7.2 * len(name)
    return parts


def grouped(title, unit, rows):
    """For each row a bar a side: rows are (name, {side: (least, median, greatest)}); the line across a bar's end is the spread."""
    sides = list(dict.fromkeys(side for _, values in rows for side in values))
    scale = (WIDTH - LABEL - VALUE) / max(high for _, values in rows for _, _, high in values.values())
    parts, y = [], TOP
    for name, values in rows:
        parts.append(_text(LABEL - 8, y + BAR * len(values) / 2 + 4, name, "end"))
        for side, (low, middle, high) in values.items():
            parts.append(_rect(LABEL, y, middle * scale, BAR - 2, COLOURS[sides.index(side)]))
            parts.append(_rect(LABEL + low * scale, y + BAR / 2 - 2, (high - low) * scale, 2, "#222222"))
            parts.append(_text(LABEL + high * scale + 5, y + BAR - 3, f"{middle:.0f} {unit}"))
            y += BAR
        y += GAP
    return _page(title, y + 22, parts + _legend(sides, y + 10))


def stacked(title, unit, rows):
    """For each row one bar of several parts: rows are (name, {part: value})."""
    names = list(dict.fromkeys(part for _, values in rows for part in values))
    scale = (WIDTH - LABEL - VALUE) / max(sum(values.values()) for _, values in rows)
    parts, y = [], TOP
    for name, values in rows:
        parts.append(_text(LABEL - 8, y + 14, name, "end"))
        at = LABEL
        for part, value in values.items():
            parts.append(_rect(at, y, value * scale, 20, COLOURS[names.index(part)]))
            at += value * scale
        parts.append(_text(at + 5, y + 14, f"{sum(values.values()):.1f} {unit}"))
        y += 20 + GAP
    return _page(title, y + 22, parts + _legend(names, y + 10))
