#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws what the benchmarks measured: benchmarks/plot.py JSON FOLDER

roofline.svg   operations per second over operations per byte of weights, inputs and outputs, under the limits of the machine
ratios.svg     tokens per second over those of each peer, by peer and size of the batch; not drawn where there was no peer

Only whole layers, of the most threads and the most even routing. Rows that others disturbed are hollow.
"""
import json
import math
import pathlib
import statistics
import sys

INK, FAINT, GRID, PAPER = "#1c2733", "#5b6773", "#dfe4e8", "#ffffff"
COLOURS = {"f32": "#0072b2", "bf16": "#d55e00", "f16": "#cc79a7", "int8": "#009e73", "int4": "#e69f00", "ternary": "#56b4e9"}
PEAKS = {"fma_f32_flops_per_s": "float32 multiply-adds", "vnni_int8_ops_per_s": "VNNI int8", "avx512_bf16_flops_per_s": "AVX-512 bf16",
         "amx_bf16_flops_per_s": "AMX bf16", "amx_int8_ops_per_s": "AMX int8"}
REGIMES = (("1 to 4 tokens", 1, 4), ("5 to 128", 5, 128), ("129 and more", 129, math.inf))


class Drawing:
    def __init__(self, width, height, title, subtitle):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
                      f'height="{height}" font-family="system-ui, \'DejaVu Sans\', sans-serif" font-size="13">',
                      f'<rect width="{width}" height="{height}" rx="8" fill="{PAPER}"/>']
        self.text(24, 32, title, size=17, bold=True)
        self.text(24, 53, subtitle, colour=FAINT)

    def text(self, x, y, words, anchor="start", colour=INK, size=13, bold=False, turned=0, above=False):
        """`above`: legible over what is drawn below it."""
        more = ' font-weight="600"' if bold else ""
        if turned:
            more += f' transform="rotate({turned:.1f} {x:.1f} {y:.1f})"'
        if above:
            more += f' paint-order="stroke" stroke="{PAPER}" stroke-width="4" stroke-linejoin="round"'
        words = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"{more}>'
                          f'{words}</text>')

    def line(self, x0, y0, x1, y1, colour=GRID, width=1):
        self.parts.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" '
                          f'stroke-width="{width}"/>')

    def dot(self, x, y, colour, hollow=False):
        fill, edge = (PAPER, colour) if hollow else (colour, PAPER)
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{fill}" fill-opacity="0.85" stroke="{edge}"/>')

    def legend(self, types, x, y):
        for name in types:
            self.dot(x, y - 4, COLOURS[name])
            self.text(x + 10, y, name)
            x += 34 + 8 * len(name)

    def save(self, path):
        path.write_text("\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


class Scale:
    """Logarithmic, from values to pixels."""

    def __init__(self, low, high, start, end):
        self.low, self.high, self.start, self.end = math.log10(low), math.log10(high), start, end

    def __call__(self, value):
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, digits):
        every = [d * 10.0 ** p for p in range(math.floor(self.low), math.ceil(self.high) + 1) for d in digits]
        return [tick for tick in every if self.low - 1e-9 <= math.log10(tick) <= self.high + 1e-9]


def brief(value):
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:g}"


def short(ratio):
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2g}"


def types_of(rows):
    return [name for name in COLOURS if any(row["type"] == name for row in rows)]


def intensity(row, limits):
    """Operations per byte that must move; memory-bound rows know their bytes, for others weights stand for all."""
    if row["roof"] == "memory":
        return row["flops_per_s"] / row["tokens_per_s"] * row["roof_tokens_per_s"] / limits["dram_read_bytes_per_s"]
    return row["flops_per_s"] / row["weight_bytes_per_s"]


def draw_roofs(picture, across, up, limits, peaks):
    """The slope of memory up to the highest peak, and a level line for each."""
    memory = limits["dram_read_bytes_per_s"]
    ridge, low = peaks[-1][1] / memory, max(10 ** across.low, 10 ** up.low / memory)
    picture.line(across(low), up(low * memory), across(ridge), up(peaks[-1][1]), INK, 2)
    middle = math.sqrt(low * ridge)
    angle = math.degrees(math.atan2(up(ridge * memory) - up(low * memory), across(ridge) - across(low)))
    picture.text(across(middle) - 6, up(middle * memory) - 10, f"memory, {memory / 1e9:.3g} GB/s", "middle", turned=angle,
                 above=True)
    for name, peak in peaks:
        picture.line(across(peak / memory), up(peak), across.end, up(peak), INK, 2)
        picture.text(across.end - 4, up(peak) - 7, f"{name}, {brief(peak)}op/s", "end", above=True)


def roofline(limits, rows, path):
    peaks = sorted(((name, limits[key]) for key, name in PEAKS.items() if limits.get(key, 0) > 0), key=lambda peak: peak[1])
    xs, ys = [intensity(row, limits) for row in rows], [row["flops_per_s"] for row in rows]
    picture = Drawing(840, 540, f"What the machine allows, and what layers reach ({limits['threads']} threads)",
                      "Each dot is one shape and batch. Dots on a line could not be faster on this machine.")
    across = Scale(min(xs) / 1.5, max(xs + [peaks[-1][1] / limits["dram_read_bytes_per_s"]]) * 2, 84, 810)
    up = Scale(min(ys) / 2, peaks[-1][1] * 1.7, 470, 92)
    picture.legend(types_of(rows), 88, 80)
    for tick in across.ticks((1, 3)):
        picture.line(across(tick), 92, across(tick), 470)
        picture.text(across(tick), 489, f"{tick:g}", "middle", FAINT)
    for tick in up.ticks((1, 3)):
        picture.line(84, up(tick), 810, up(tick))
        picture.text(78, up(tick) + 4, brief(tick), "end", FAINT)
    for x, y, row in zip(xs, ys, rows):
        picture.dot(across(x), up(y), COLOURS[row["type"]], not row.get("quiet", True))
    draw_roofs(picture, across, up, limits, peaks)
    picture.text(447, 515, "operations of the experts for each byte that must move", "middle")
    picture.text(24, 281, "operations per second", "middle", turned=-90)
    picture.save(path)


def ratio_groups(rows):
    """[(peer, [(regime, [(type, quiet, ratio)])])], without empty ones."""
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    groups = []
    for peer in peers:
        mine = [(row["T"], row["type"], row.get("quiet", True), row["tokens_per_s"] / row["peers"][peer])
                for row in rows if peer in row["peers"]]
        regimes = [(name, [entry[1:] for entry in mine if low <= entry[0] <= high]) for name, low, high in REGIMES]
        groups.append((peer, [regime for regime in regimes if regime[1]]))
    return groups


def ratios(limits, rows, path):
    groups = ratio_groups(rows)
    if not groups:
        return
    every = [ratio for _, regimes in groups for _, entries in regimes for _, _, ratio in entries]
    lines = sum(len(regimes) for _, regimes in groups)
    left, right, top, step, gap = 230, 740, 100, 22, 12
    bottom = top + step * lines + gap * len(groups)
    picture = Drawing(840, bottom + 74, f"How many times as fast as each peer ({limits['threads']} threads)",
                      "Each dot is one shape and batch, by tokens of a call. Right of 1x this library is faster. Bold: median")
    across = Scale(min(every + [0.9]) / 1.15, max(every + [2]) * 1.15, left, right)
    picture.legend(types_of(rows), left, 82)
    wide = across.high - across.low > 2.5
    for tick in across.ticks((1,) if wide else (1, 2, 5)):
        picture.line(across(tick), top - 6, across(tick), bottom, INK if tick == 1 else GRID, 1.5 if tick == 1 else 1)
        picture.text(across(tick), bottom + 18, f"{tick:g}x", "middle", FAINT)
    y = top
    for peer, regimes in groups:
        picture.text(24, y + 14, peer, bold=True)
        for name, entries in regimes:
            picture.text(left - 12, y + 14, name, "end", FAINT)
            for kind, quiet, ratio in entries:
                picture.dot(across(ratio), y + 9, COLOURS[kind], not quiet)
            picture.text(816, y + 14, f"{short(statistics.median(ratio for _, _, ratio in entries))}x", "end", bold=True)
            y += step
        y += gap
    picture.text((left + right) / 2, bottom + 38, "tokens per second over the peer's, same run, same weights", "middle")
    versions = ", ".join(f"{name} {version}" for name, version in limits.get("versions", {}).items())
    picture.text(24, bottom + 60, versions, colour=FAINT, size=11)
    picture.save(path)


def main():
    source, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    limits, *rows = json.loads(source.read_text(encoding="utf-8"))
    rows = [row for row in rows if row["case"] == "layer" and not row["backward"] and row["threads"] == limits["threads"]]
    if not rows:
        sys.exit(f"{source}: no layer of {limits['threads']} threads")
    rows = [row for row in rows if row["skew"] == min(r["skew"] for r in rows)]
    folder.mkdir(parents=True, exist_ok=True)
    roofline(limits, rows, folder / "roofline.svg")
    ratios(limits, rows, folder / "ratios.svg")


if __name__ == "__main__":
    main()
