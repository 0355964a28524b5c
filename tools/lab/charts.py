"""Small charts as inline SVG: nothing is fetched, nothing runs.  Each function returns a string."""

import html
import math

WIDTH, HEIGHT = 880, 280
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 16, 40
COLORS = ("#0b6e4f", "#c8553d", "#4a6fa5", "#e0a030", "#7d5ba6", "#5c8001", "#8a8a8a", "#b0306a")


def _text(x, y, words, anchor="middle", extra=""):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {extra}>{html.escape(str(words))}</text>'


def _svg(parts, width=WIDTH, height=HEIGHT):
    return f'<svg viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def _ticks(top):
    """Round numbers from 0 to above `top`."""
    if top <= 0:
        return [0, 1]
    step = 10 ** math.floor(math.log10(top))
    for part in (0.1, 0.2, 0.5, 1):
        if top / (step * part) <= 6:
            step *= part
            break
    return [i * step for i in range(math.ceil(top / step) + 1)]


def _y_axis(ticks, place, label):
    parts = []
    for tick in ticks:
        y = place(tick)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        parts.append(_text(LEFT - 6, y + 4, f"{tick:g}", "end"))
    parts.append(_text(14, TOP + (HEIGHT - TOP - BOTTOM) / 2, label,
                       extra=f'transform="rotate(-90 14 {TOP + (HEIGHT - TOP - BOTTOM) / 2})"'))
    return parts


def legend(names, colors=COLORS):
    """The names beside their colors."""
    return "<p class=legend>" + "".join(
        f'<span><i style="background:{color}"></i>{html.escape(name)}</span>' for name, color in zip(names, colors)) + "</p>"


def bars(groups, series, value, label, points=None, log=False, line=None):
    """Grouped bars and their legend, for a page.  `value(group, name)` is a number or None (then "none" is written);
    `points(group, name)` gives the single measurements, drawn as dots; `line` is (number, text) across; `log`: a
    logarithmic axis from 1."""
    return _svg(_bars(groups, series, value, label, points, log, line)) + legend(series)


def picture(groups, series, value, label, style, **more):
    """`bars` as a file of its own: an SVG image with `style` and the legend in it."""
    parts = [f"<style>{style}</style><rect width='100%' height='100%' fill='#fff'/>", *_bars(groups, series, value, label, **more)]
    step = (WIDTH - LEFT - RIGHT) / len(series)
    for i, name in enumerate(series):
        x = LEFT + i * step
        parts.append(f'<rect x="{x:.1f}" y="{HEIGHT + 2}" width="10" height="10" fill="{COLORS[i % len(COLORS)]}"/>')
        parts.append(_text(x + 14, HEIGHT + 11, name, "start"))
    return _svg(parts, height=HEIGHT + 20).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1) + "\n"


def _bars(groups, series, value, label, points=None, log=False, line=None):
    cells = {(g, s): value(g, s) for g in groups for s in series}
    every = [v for v in cells.values() if v is not None]
    if points:
        every += [p for g in groups for s in series for p in points(g, s)]
    top = max(every, default=1)
    if log:
        decades = math.ceil(math.log10(max(top, 10)))
        ticks = [10 ** i for i in range(decades + 1)]
        share = lambda v: math.log10(max(v, 1)) / decades  # noqa: E731
    else:
        ticks = _ticks(top)
        share = lambda v: v / ticks[-1]  # noqa: E731
    place = lambda v: HEIGHT - BOTTOM - share(v) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts = _y_axis(ticks, place, label)
    group_width = (WIDTH - LEFT - RIGHT) / max(1, len(groups))
    bar = group_width * 0.84 / max(1, len(series))
    for i, group in enumerate(groups):
        parts.append(_text(LEFT + (i + 0.5) * group_width, HEIGHT - BOTTOM + 18, group))
        for j, name in enumerate(series):
            x = LEFT + i * group_width + group_width * 0.08 + j * bar
            v = cells[group, name]
            if v is None:
                parts.append(_text(x + bar / 2, HEIGHT - BOTTOM - 4, "none", "start",
                                   f'transform="rotate(-90 {x + bar / 2:.1f} {HEIGHT - BOTTOM - 4})" class="none"'))
                continue
            y = place(v)
            parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{bar * 0.9:.1f}" height="{HEIGHT - BOTTOM - y:.1f}" '
                         f'fill="{COLORS[j % len(COLORS)]}"><title>{html.escape(f"{group}, {name}: {v:.4g}")}</title></rect>')
            if bar > 20:
                parts.append(_text(x + bar * 0.45, y - 4, f"{v:.0f}" if v >= 10 else f"{v:.2f}", extra='class="value"'))
            for p in points(group, name) if points else ():
                parts.append(f'<circle cx="{x + bar * 0.45:.1f}" cy="{place(p):.1f}" r="2.5" class="dot"/>')
    if line:
        y = place(line[0])
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="goal"/>')
        parts.append(_text(WIDTH - RIGHT, y - 4, line[1], "end", 'class="goal"'))
    return parts


def curves(lines, label, x_label="s", marks=()):
    """Lines over time.  `lines`: {name: [(x, y), ...]}; `marks`: [(x, text)], drawn as vertical lines."""
    xs = [x for points in lines.values() for x, _ in points]
    ys = [y for points in lines.values() for _, y in points]
    if not xs:
        return "<p>No measurements.</p>"
    end, ticks = max(xs) or 1, _ticks(max(ys))
    across = lambda x: LEFT + x / end * (WIDTH - LEFT - RIGHT)  # noqa: E731
    place = lambda y: HEIGHT - BOTTOM - y / ticks[-1] * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    parts = _y_axis(ticks, place, label)
    parts += [_text(across(t), HEIGHT - BOTTOM + 18, f"{t:g}") for t in _ticks(end) if t <= end]
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 6, x_label, "end"))
    for x, words in marks:
        parts.append(f'<line x1="{across(x):.1f}" x2="{across(x):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" class="mark"/>')
        parts.append(_text(across(x) + 4, TOP + 10, words, "start", 'class="mark"'))
    for color, points in zip(COLORS, lines.values()):
        path = " ".join(f"{across(x):.1f},{place(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"/>')
    return _svg(parts) + legend(lines)
