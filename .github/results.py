# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib>=3.8", "pandas>=2.1"]
# ///
"""Print README.md's tables from a file of JSON lines; draw results.svg beside the file."""

import sys

import matplotlib.pyplot as plt
import pandas as pd

BENCHMARKS = ["numerical", "stateful", "expensive_init"]
# Colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {"serial": "black", "multiprocessing": "#d55e00"}
COLOURS |= {"multiprocessing-tuned": "#009e73", "ray": "#0072b2"}


def print_table(rows, key, value):
    """Print the medians of the runs, with the smallest and the largest, as Markdown."""
    print(f"\n|{value}|{key}|{'|'.join(COLOURS)}|\n{'|---' * 6}|")
    for (benchmark, number), group in rows.groupby(["benchmark", key], observed=True):
        print(f"|{benchmark}|{number}|", end="")
        for name in COLOURS:
            runs = group.loc[group["implementation"] == name, value]
            print(f"{runs.median():.3g} ({runs.min():.3g}–{runs.max():.3g})", end="|")
        print()


rows = pd.read_json(sys.argv[1], lines=True)
rows["benchmark"] = pd.Categorical(rows["benchmark"], BENCHMARKS)
rows["first"] = rows["seconds"].str[0]
rows["milliseconds"] = rows["median_seconds"] * 1000
rows["megabytes"] = rows["image_size"] ** 2 * 8 / 1e6
defaults = rows[rows["filter_size"] != 1]
sizes = rows[(rows["filter_size"] == 1) & (rows["num_cpus"] == 2)]
print_table(defaults, "num_cpus", "median_seconds")
print_table(defaults, "num_cpus", "first")
print_table(sizes, "megabytes", "milliseconds")
print_table(rows[rows["num_cpus"] > 2], "num_cpus", "median_seconds")

figure, panels = plt.subplots(4, figsize=(5, 9), height_ratios=[1, 1, 1, 2])
figure.set_layout_engine("constrained")
for (benchmark, name), table in defaults.groupby(["benchmark", "implementation"]):
    panel = panels[BENCHMARKS.index(benchmark)]
    for workers, runs in table.groupby("num_cpus")["median_seconds"]:
        height = 5 * workers + list(COLOURS).index(name)
        panel.hlines(height, runs.min(), runs.max(), COLOURS[name], alpha=0.4, lw=6)
        panel.plot(runs.median(), height, "o", color=COLOURS[name])
    panel.set(title=f"{benchmark}.py, seconds a pass", xscale="log", ylim=(14, 4))
    panel.set_yticks([6.5, 11.5], ["1 worker", "2 workers"])
    panel.xaxis.set_major_locator(plt.LogLocator(subs=[1, 2, 5]))
for name, colour in COLOURS.items():
    runs = sizes[sizes["implementation"] == name].groupby("megabytes")["milliseconds"]
    panels[3].loglog(runs.median(), "o-", color=colour, label=name)
panels[3].set(title="numerical.py, one-pixel filters, milliseconds a pass", xlabel="MB")
for axis in [panels[3].yaxis, *[panel.xaxis for panel in panels]]:
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")
figure.legend(loc="outside lower center", ncols=2)
figure.savefig(sys.argv[1].removesuffix("jsonl") + "svg")
