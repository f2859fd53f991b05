#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Runs the benchmarks on a tiny layer, and on tiny attention, and looks at what they write: tests/benchmarks/check.py PROGRAM

How fast anything was is not looked at.
"""
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree

LIMITS = {"case", "threads", "dram_read_bytes_per_s", "fma_f32_flops_per_s", "avx512_bf16_flops_per_s",
          "amx_bf16_flops_per_s", "vnni_int8_ops_per_s", "amx_int8_ops_per_s"}
ROW = {"case", "d", "f", "E", "k", "T", "type", "threads", "skew", "backward", "tokens_per_s", "flops_per_s",
       "weight_bytes_per_s", "roof_tokens_per_s", "roof", "share", "peers"}
ATTENTION = {"case", "h", "hkv", "d", "m", "n", "type", "threads", "decode", "backward", "gate", "B", "k", "tokens_per_s",
             "useful_flops_per_s", "cache_bytes_per_s", "visited_share", "roof_tokens_per_s", "roof", "share", "peers"}
# Bytes of a weight with its scales, and the peaks of the units that multiply it, the best first.
TYPES = {"f32": (4, ()), "bf16": (2, ("amx_bf16_flops_per_s", "avx512_bf16_flops_per_s")), "f16": (2, ()),
         "int8": (1, ("amx_int8_ops_per_s", "vnni_int8_ops_per_s")),
         "int4": (0.5625, ("amx_int8_ops_per_s", "vnni_int8_ops_per_s")),
         "ternary": (0.25, ("amx_int8_ops_per_s", "vnni_int8_ops_per_s"))}
SHAPE = {"d": 48, "f": 40, "E": 8, "k": 3}
HEADS = {"h": 4, "hkv": 2, "d": 24, "m": 30, "n": 50}
HERE = pathlib.Path(__file__).resolve().parent
PLOT = HERE.parents[1] / "benchmarks" / "plot.py"
SMALL = ["--shape", ",".join(f"{name}={n}" for name, n in SHAPE.items()), "--rotate", "1", "--rounds", "1"]


def expect(holds, what):
    if not holds:
        sys.exit(f"benchmarks: {what}")


def run(program, *flags):
    return subprocess.run([program, *SMALL, *flags], capture_output=True, text=True, check=False)


def rows_of(program, *flags, plots=False):
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "rows.json"
        ran = run(program, *flags, "--json", str(path))
        expect(ran.returncode == 0, f"{' '.join(flags)} failed: {ran.stderr}")
        limits, *rows = json.loads(path.read_text(encoding="utf-8"))
        if plots:
            drawn = subprocess.run([sys.executable, str(PLOT), str(path), folder], capture_output=True, text=True, check=False)
            expect(drawn.returncode == 0, f"plot.py failed: {drawn.stderr}")
            for chart in ["roofline.svg"] + ["ratios.svg"] * any(row["peers"] for row in rows):
                expect(xml.etree.ElementTree.parse(pathlib.Path(folder) / chart).getroot().tag.endswith("svg"), f"{chart} is none")
    expect(LIMITS <= limits.keys() and limits["case"] == "limits", f"limits are {limits}")
    expect(limits["dram_read_bytes_per_s"] > 0 and limits["fma_f32_flops_per_s"] > 0, f"limits are {limits}")
    for row in rows:
        if row["case"] in CHECKS:
            same = [x for x in (limits, *limits["with_fewer_threads"]) if x["threads"] == row["threads"]]
            expect(len(same) == 1, f"no limits of {row['threads']} threads")
            CHECKS[row["case"]](row, same[0])
    return rows, ran.stdout


def check_roof(row, limits):
    """The smaller of what memory and what the unit of the type allow, from the shape and the limits alone."""
    d, f, E, k, T = (row[name] for name in ("d", "f", "E", "k", "T"))
    size, units = TYPES[row["type"]]
    passes = 2 if row["backward"] else 1
    moved = row["weight_bytes_per_s"] / row["tokens_per_s"] * T / passes  # weights of the experts in use, and the router
    active = (moved - 4 * E * d) / (3 * d * f * size)
    low, high = (E - 0.01, E + 0.01) if T >= 150 and row["skew"] == 0 else (k - 0.01, min(E, T * k) + 0.01)
    expect(low <= active <= high, f"{active} experts are in use in {row}")
    rows = 4 * T * d
    if row["backward"]:
        moved = 2 * moved + E * 3 * d * f * 4 + 4 * E * d + 4 * rows  # gradients of all experts are written once
    else:
        moved += 2 * rows
    peak = next((limits[unit] for unit in units if limits[unit] > 0), limits["fma_f32_flops_per_s"])
    expect_roof(row, T, moved, 6 * d * f * k * T * (3 if row["backward"] else 1), limits, peak)


def expect_roof(row, tokens, moved, work, limits, peak):
    memory, compute = moved / limits["dram_read_bytes_per_s"], work / peak
    expect(math.isclose(row["roof_tokens_per_s"], tokens / max(memory, compute), rel_tol=1e-4),
           f"roof of {memory}, {compute} s in {row}")
    expect(math.isclose(memory, compute, rel_tol=1e-4) or row["roof"] == ("memory" if memory > compute else "compute"),
           f"{memory} and {compute} s in {row}")


def check_attention_roof(row, limits):
    """Keys and values, with a scale for each row of bytes, are read once, or by each head those of its blocks; so are queries,
    logits and, backward, gradients."""
    h, hkv, d, m, n = (row[name] for name in ("h", "hkv", "d", "m", "n"))
    size, units = TYPES[row["type"]]
    cache = 2 * n * hkv * (d * size + (4 if row["type"] == "int8" else 0))
    readers = h / hkv if row["decode"] else 1
    visited = cache * min(1, readers * row["visited_share"]) if row["B"] else cache
    expect(math.isclose(row["cache_bytes_per_s"], visited * row["tokens_per_s"] / m, rel_tol=1e-3), f"cache_bytes_per_s in {row}")
    logits = m * {"none": 0, "headwise": h, "elementwise": h * d}[row["gate"]]
    moved = (visited if row["decode"] else cache) + m * h * d * (size + 4) + logits * size
    if row["backward"]:
        moved += cache / size * 4 + m * h * d * 8 + logits * 4
    units = () if row["decode"] else units  # a step reads
    peak = next((limits[unit] for unit in units if limits[unit] > 0), limits["fma_f32_flops_per_s"])
    expect_roof(row, m, moved, row["useful_flops_per_s"] / row["tokens_per_s"] * m, limits, peak)
    for name in ("ratio_to_dense", "share_of_ideal_ratio", "rate_to_forward", "routing_share", "gate_overhead"):
        expect(name not in row or math.isfinite(row[name]), f"{name} in {row}")
        expect(name not in row or row[name] > (0 if name in ("ratio_to_dense", "share_of_ideal_ratio", "rate_to_forward") else -1),
               f"{name} in {row}")
    expect(row.get("routing_share", 0) < 1, f"routing_share in {row}")
    if "ratio_to_dense" in row:
        expect(math.isclose(row["share_of_ideal_ratio"], row["ratio_to_dense"] * row["visited_share"], rel_tol=1e-2),
               f"share_of_ideal_ratio in {row}")


CHECKS = {"layer": check_roof, "attention": check_attention_roof}


def check_row(row):
    expect(ROW <= row.keys(), f"a row lacks {ROW - row.keys()}")
    expect(all(row[name] == n for name, n in SHAPE.items()), f"the shape is not {SHAPE} in {row}")
    expect(row["type"] in TYPES and row["roof"] in ("memory", "compute"), f"type or roof in {row}")
    rates = [row[name] for name in ("tokens_per_s", "flops_per_s", "weight_bytes_per_s", "roof_tokens_per_s", "share")]
    rates += row["peers"].values()
    expect(all(math.isfinite(rate) and rate > 0 for rate in rates), f"a rate is not one in {row}")
    expect(math.isclose(row["share"], row["tokens_per_s"] / row["roof_tokens_per_s"], rel_tol=1e-3), f"share in {row}")
    work = 2 * 3 * row["d"] * row["f"] * row["k"] * (3 if row["backward"] else 1)
    expect(math.isclose(row["flops_per_s"], work * row["tokens_per_s"], rel_tol=1e-3), f"flops_per_s in {row}")


def attention_rows(program, *flags):
    with tempfile.TemporaryDirectory() as folder:
        listed = pathlib.Path(folder) / "peers.txt"
        lines = [["run", case, how, sys.executable, str(HERE / "fake_peer.py"), how]
                 for case, how in (("attention", "right"), ("attention", "wrong"), ("layer", "other"))]
        listed.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
        return rows_of(program, *flags, "--peer-list", str(listed))


def check_attention(program):
    """Every form, beside what it is compared with, and a peer."""
    shape = ["--attention", ",".join(f"{name}={n}" for name, n in HEADS.items()), "--threads", "1"]
    forms = {(): set(), ("--backward",): {"rate_to_forward"}, ("--gate", "headwise"): {"gate_overhead"},
             ("--decode",): set(),
             ("--moba", "B=8,k=2"): {"ratio_to_dense", "share_of_ideal_ratio", "routing_share"},
             ("--moba", "B=8,k=2", "--decode"): {"ratio_to_dense", "share_of_ideal_ratio", "routing_share"},
             ("--moba", "B=8,k=2", "--backward"): {"ratio_to_dense", "share_of_ideal_ratio", "rate_to_forward"},
             ("--gate", "elementwise", "--moba", "B=8,k=2"): {"gate_overhead", "ratio_to_dense", "routing_share"},
             ("--gate", "elementwise", "--backward"): {"gate_overhead", "rate_to_forward"},
             ("--gate", "headwise", "--decode"): {"gate_overhead"}}
    for form, compared in forms.items():
        rows, table = attention_rows(program, *shape, *form)
        types = ["f32", "bf16", "f16"] + ["int8"] * ("--decode" in form)
        expect([row["type"] for row in rows] == types, f"{form} gave {rows}")
        expect(len([line for line in table.splitlines() if " 4/2 " in line]) == len(rows), f"the table is\n{table}")
        if form == ():
            expect("right: 1.0 of attention" in table and "left out: wrong: disagrees" in table, f"the table is\n{table}")
        for row in rows:
            expect(row["gate"] == (form[1] if "--gate" in form else "none"), f"{form} gave {row}")
            m = 1 if row["decode"] else HEADS["m"]
            has_peers = form in ((), ("--decode",))
            expect(row["peers"].keys() == ({"right"} if has_peers else set()), f"{form} has the peers {row['peers']}")
            expect(ATTENTION | compared <= row.keys() and all(row[x] == n for x, n in {**HEADS, "m": m}.items()), f"{form} gave {row}")
            own = range(HEADS["n"] - m, HEADS["n"])  # where the queries stand
            dense = sum(at + 1 for at in own)
            pairs = sum(at % 8 + 1 + 8 * min(at // 8, 1) for at in own) if row["B"] else dense
            work = 4 * HEADS["h"] * HEADS["d"] * pairs * (2.5 if row["backward"] else 1) / m
            expect(math.isclose(row["visited_share"], pairs / dense, rel_tol=1e-3), f"visited_share in {row}")
            expect(math.isclose(row["useful_flops_per_s"], work * row["tokens_per_s"], rel_tol=1e-3), f"useful_flops_per_s in {row}")
            expect(math.isclose(row["share"], row["tokens_per_s"] / row["roof_tokens_per_s"], rel_tol=1e-3), f"share in {row}")
    for flags in (["--attention", "h=3,hkv=2,d=8,m=1,n=1"], ["--attention", "h=2"], ["--decode"], [*shape, "--moba", "B=8"],
                  [*shape, "--gate", "open"], [*shape, "--decode", "--backward"], [*shape, "--type", "int8"]):
        ran = run(program, *flags)
        refused = [flag for flag in flags if flag.startswith("--")][-1]
        expect(ran.returncode == 2 and "usage:" in ran.stderr, f"{flags} gave {ran}")
        expect(refused in ran.stderr.splitlines()[0], f"{flags} gave {ran}")


def check_peers(program):
    """Peers in processes of their own: one competes, and the line below the table says why each of the others does not."""
    with tempfile.TemporaryDirectory() as folder:
        listed = pathlib.Path(folder) / "peers.txt"
        lines = [["run", "layer", how, sys.executable, str(HERE / "fake_peer.py"), how]
                 for how in ("right", "wrong", "refuses", "dies")]
        lines += [["run", "layer", "missing", str(HERE / "nobody")], ["lack", "layer", "lacking", "not installed: no room"],
                  ["run", "attention", "other", "false"]]
        listed.write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
        (row,), table = rows_of(program, "--tokens", "2", "--threads", "1", "--type", "f32", "--peer-list", str(listed))
        check_row(row)
        fakes = {"right", "wrong", "refuses", "dies", "missing", "lacking", "other"}
        expect(fakes & row["peers"].keys() == {"right"}, f"peers are {row['peers']}")
        expect("right: 1.0 of layer" in table, f"no version in\n{table}")
        left_out = [line.split(": ", 2) for line in table.splitlines() if line.startswith("left out: ")]
        reasons = {name: reason for _, name, reason in left_out}
        expect(reasons.keys() == fakes - {"right", "other"} and "disagrees" in reasons["wrong"], f"left out are {reasons}")
        expect((reasons["refuses"], reasons["dies"], reasons["lacking"]) ==
               ("has no f32", "it fell over", "not installed: no room"), f"left out are {reasons}")
        (row,), table = rows_of(program, "--tokens", "40", "--threads", "1", "--type", "f32", "--backward", "--peer-list", str(listed))
        expect(not fakes & row["peers"].keys() and "left out: right: does not train" in table, f"training gave\n{table}")
        listed.write_text("walk\tlayer\tx\ty\n", encoding="utf-8")
        ran = run(program, "--tokens", "2", "--peer-list", str(listed))
        expect(ran.returncode == 1 and "walk" in ran.stderr, f"a wrong list gave {ran}")


def main():
    program = sys.argv[1]
    rows, table = rows_of(program, "--tokens", "3,150", "--threads", "1", "--skew", "0,1.2", plots=True)
    for row in rows:
        check_row(row)
    got = sorted((row["type"], row["skew"], row["T"]) for row in rows)
    types = ["bf16", "f16", "f32", "int4", "int8", "ternary"]
    expect(got == list(itertools.product(types, (0, 1.2), (3, 150))), f"rows are {got}")
    expect(len([line for line in table.splitlines() if line.startswith("layer")]) == len(rows), f"the table is\n{table}")

    cores = "1,2" if (os.cpu_count() or 1) >= 2 else "1"
    rows, _ = rows_of(program, "--tokens", "4096", "--threads", cores, "--type", "f32")
    expect([(row["threads"], row["roof"]) for row in rows] == [(int(n), "compute") for n in cores.split(",")], f"rows are {rows}")

    rows, _ = rows_of(program, "--tokens", "5", "--threads", "1", "--type", "f32,bf16", "--backward")
    expect([(row["type"], row["backward"]) for row in rows] == [("f32", True), ("bf16", True)], f"rows are {rows}")
    for row in rows:
        check_row(row)
        expect(set(row["peers"]) <= {"eigen"}, f"peers are {row['peers']}")

    static, table = rows_of(program, "--threads", "1", "--static")
    expect([row["case"] for row in static] == ["static"] and ROW <= static[0].keys(), f"rows are {static}")
    expect(" ns a call" in table, f"the table is\n{table}")

    check_peers(program)
    check_attention(program)

    for k, E in ((0, 8), (9, 8), (33, 64)):
        ran = run(program, "--shape", f"d=8,f=8,E={E},k={k}")
        expect(ran.returncode == 2 and ran.stderr.startswith(f'--shape: "k={k}", expected'), f"k={k} of {E} gave {ran}")
    for flags in (["--shape", "d=8,f=8,E=2"], ["--type", "f33"], ["--tokens", "0"], ["--skew", "x"], ["--threads"], ["--fast"]):
        ran = run(program, *flags)
        expect(ran.returncode == 2 and flags[0] in ran.stderr and "usage:" in ran.stderr, f"{flags} gave {ran}")


if __name__ == "__main__":
    main()
