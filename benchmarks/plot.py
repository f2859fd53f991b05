#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Draws what the benchmarks measured: benchmarks/plot.py JSON FOLDER

roofline.svg   operations per second over operations per byte of weights, inputs and outputs, under the limits of the machine
ratios.svg     tokens per second over those of each peer, by shape and batch
"""
import json
import math
import pathlib
import sys

INK, FAINT, GRID = "#1c2733", "#5b6773", "#dfe4e8"
COLOURS = {"f32": "#0072b2", "bf16": "#d55e00", "f16": "#cc79a7", "int8": "#009e73", "int4": "#e69f00", "ternary": "#56b4e9"}


class Drawing:
    def __init__(self, width, height):
        self.parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
                      'font-family="system-ui, \'DejaVu Sans\', sans-serif" font-size="13">',
                      f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>']

    def text(self, x, y, words, anchor="start", colour=INK, size=13, bold=False):
        weight = ' font-weight="600"' if bold else ""
        words = str(words).replace("&", "&amp;").replace("<", "&lt;")
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" font-size="{size}"{weight}>'
                          f'{words}</text>')

    def line(self, x0, y0, x1, y1, colour=GRID, width=1, dash=""):
        dashes = f' stroke-dasharray="{dash}"' if dash else ""
        self.parts.append(f'<line x1="{x0:.1f}" y1="{y0:.1f}" x2="{x1:.1f}" y2="{y1:.1f}" stroke="{colour}" '
                          f'stroke-width="{width}"{dashes}/>')

    def dot(self, x, y, colour):
        self.parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}" fill-opacity="0.8" stroke="#ffffff"/>')

    def path(self, points, colour):
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{joined}" fill="none" stroke="{colour}" stroke-width="2"/>')

    def save(self, path):
        path.write_text("\n".join(self.parts) + "\n</svg>\n", encoding="utf-8")


class Scale:
    """Logarithmic, from values to pixels."""

    def __init__(self, low, high, start, end):
        self.low, self.high, self.start, self.end = math.log10(low), math.log10(high), start, end

    def __call__(self, value):
        return self.start + (math.log10(value) - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, digits=(1,)):
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        return [d * 10.0 ** p for p in powers for d in digits if self.low - 1e-9 <= math.log10(d * 10.0 ** p) <= self.high + 1e-9]


def brief(value):
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def legend(picture, types, x, y):
    for name in types:
        picture.dot(x, y - 4, COLOURS[name])
        picture.text(x + 10, y, name)
        x += 30 + 8 * len(name)


def of_all_threads(limits, rows):
    return [row for row in rows if row["threads"] == limits["threads"] and row["skew"] == min(r["skew"] for r in rows)]


def intensity(row, limits):
    """Operations per byte that must move; memory-bound rows know their bytes, for others weights stand for all."""
    if row["roof"] == "memory":
        return row["flops_per_s"] / row["tokens_per_s"] * row["roof_tokens_per_s"] / limits["dram_read_bytes_per_s"]
    return row["flops_per_s"] / row["weight_bytes_per_s"]


def roofline(limits, rows, path):
    rows = of_all_threads(limits, rows)
    peaks = [(name, limits[key]) for name, key in (("float32 multiply-adds", "fma_f32_flops_per_s"), ("VNNI int8", "vnni_int8_ops_per_s"), ("AMX bf16", "amx_bf16_flops_per_s"),
                                                   ("AMX int8", "amx_int8_ops_per_s")) if limits[key] > 0]
    xs, ys = [intensity(row, limits) for row in rows], [row["flops_per_s"] for row in rows]
    picture = Drawing(820, 520)
    across = Scale(min(xs) / 1.5, max(xs + [peaks[-1][1] / limits["dram_read_bytes_per_s"]]) * 2, 80, 790)
    up = Scale(min(ys) / 2, peaks[-1][1] * 1.6, 450, 70)
    picture.text(24, 32, f"Roofline, {limits['threads']} threads", size=16, bold=True)
    legend(picture, [name for name in COLOURS if any(row["type"] == name for row in rows)], 80, 56)
    for tick in across.ticks((1, 3)):
        picture.line(across(tick), 70, across(tick), 450)
        picture.text(across(tick), 468, f"{tick:g}", "middle", FAINT)
    for tick in up.ticks((1, 3)):
        picture.line(80, up(tick), 790, up(tick))
        picture.text(74, up(tick) + 4, brief(tick), "end", FAINT)
    low, ridge = 10 ** across.low, peaks[-1][1] / limits["dram_read_bytes_per_s"]
    low = max(low, 10 ** up.low / limits["dram_read_bytes_per_s"])
    picture.line(across(low), up(low * limits["dram_read_bytes_per_s"]), across(ridge), up(peaks[-1][1]), INK, 2)
    for name, peak in peaks:
        start = across(peak / limits["dram_read_bytes_per_s"])
        picture.line(start, up(peak), 790, up(peak), INK, 2)
        picture.text(788, up(peak) - 6, f"{name}, {brief(float(f'{peak:.3g}'))}", "end")
    for x, y, row in zip(xs, ys, rows):
        picture.dot(across(x), up(y), COLOURS[row["type"]])
    picture.text(435, 495, f"operations per byte (memory: {limits['dram_read_bytes_per_s'] / 1e9:.1f} GB/s)", "middle")
    picture.text(24, 510, "operations per second; each dot is one shape and batch", colour=FAINT, size=12)
    picture.save(path)


def ratios(limits, rows, path):
    rows = [row for row in of_all_threads(limits, rows) if row["peers"]]
    peers = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    if not peers:
        return
    largest = max(row["tokens_per_s"] / rate for row in rows for rate in row["peers"].values())
    smallest = min(row["tokens_per_s"] / rate for row in rows for rate in row["peers"].values())
    wide, high = 200, 200
    picture = Drawing(max(560, 90 + wide * len(shapes)), 100 + (high + 40) * len(peers))
    picture.text(24, 32, f"Tokens per second over each peer's, {limits['threads']} threads", size=16, bold=True)
    legend(picture, [name for name in COLOURS if any(row["type"] == name for row in rows)], 80, 56)
    for p, peer in enumerate(peers):
        top = 90 + p * (high + 40)
        up = Scale(min(smallest, 1) / 1.1, max(largest, 2) * 1.1, top + high - 20, top + 6)
        for s, shape in enumerate(shapes):
            left = 70 + s * wide
            batches = sorted({row["T"] for row in rows if row["shape"] == shape})
            at = {T: left + (i + 0.5) * (wide - 20) / len(batches) for i, T in enumerate(batches)}
            picture.text(left, top, f"{shape} / {peer}", bold=True, size=12)
            for tick in up.ticks((1, 2, 5)):
                picture.line(left, up(tick), left + wide - 20, up(tick), FAINT if tick == 1 else GRID)
                if s == 0:
                    picture.text(64, up(tick) + 4, f"{tick:g}x", "end", FAINT)
            for T, x in at.items():
                picture.text(x, top + high - 4, T, "middle", FAINT, 11)
            for name, colour in COLOURS.items():
                points = [(at[row["T"]], up(row["tokens_per_s"] / row["peers"][peer])) for row in rows
                          if row["shape"] == shape and row["type"] == name and peer in row["peers"]]
                if points:
                    picture.path(points, colour)
                for x, y in points:
                    picture.dot(x, y, colour)
    picture.text(24, 92 + (high + 40) * len(peers), "by tokens of a call", colour=FAINT, size=12)
    picture.save(path)


def main():
    source, folder = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
    limits, *rows = json.loads(source.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    roofline(limits, rows, folder / "roofline.svg")
    ratios(limits, rows, folder / "ratios.svg")


if __name__ == "__main__":
    main()
