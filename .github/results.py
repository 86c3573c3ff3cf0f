# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib>=3.8", "pandas>=2.1"]
# ///
"""Print the figures of README.md from the rows of measure.sh; draw results.svg."""

import matplotlib.pyplot as plt
import pandas as pd

FOLDER = __file__.removesuffix("results.py")
SCRIPTS = ["numerical.py", "stateful.py", "expensive_init.py"]
STYLES = {"serial": "kD", "multiprocessing_naive": "C1o"}
STYLES |= {"multiprocessing_tuned": "C0o", "ray_naive": "C1^", "ray_tuned": "C0^"}


def read(name, lines_per_run):
    rows = pd.read_json(FOLDER + name, lines=True)
    rows["run"] = rows.index // lines_per_run
    rows["first"] = rows["seconds"].str[0]
    trials = zip(rows["seconds"], rows["num_warmups"])
    rows["pass"] = [pd.Series(each[warmups:]).median() for each, warmups in trials]
    return rows.fillna({"image_size": 0, "filter_size": 0})


def describe(ratios):  # median, smallest, largest, and how many are above 1
    above = f"{(ratios > 1).sum()}/{ratios.count()}"
    return f"{ratios.median():.2g} ({ratios.min():.2g}–{ratios.max():.2g}), {above}"


rows = pd.concat([read("benchmarks.jsonl", 8), read("sizes.jsonl", 5)])
limits = rows[rows["num_cpus"] == 1].groupby("run")["pass"]  # one alone, two at once
limit = 4 * limits.first() / (limits.sum() - limits.first())
print("Work of two independent processes, relative to one:", describe(limit))
medians, speeds, starts, pairs = [], [], [], []
figure, panels = plt.subplots(4, figsize=(5, 9), layout="constrained")
jobs = rows[rows["num_cpus"] == 2].groupby(["script", "filter_size", "image_size"])
for (script, filter_size, image_size), runs in jobs:
    size = image_size**2 * 8e-6
    job = {0: script, 4: script}.get(filter_size, f"{size:.2g} MB/{filter_size:g}")
    passes = runs.pivot(index="run", columns="implementation", values="pass")[[*STYLES]]
    first = runs.pivot(index="run", columns="implementation", values="first")[[*STYLES]]
    serial, pool, tuned_pool, ray, tuned_ray = [passes[name] for name in STYLES]
    speed = 1 / passes.div(serial, axis=0)
    medians.append([job, "{:.2g}→{:.2g}|{:.2g}→{:.2g}".format(*speed.median()[1:])])
    speeds.append([job, f"{1000 * serial.median():.4g}", *speed.apply(describe)[1:]])
    gain = (-passes).add(serial, axis=0).clip(lower=0)  # seconds a pass
    pays = -(first.rsub(first["serial"], axis=0) // gain).clip(upper=0) + 1  # passes
    starts.append([job])
    for name in STYLES:
        quartiles = pays[name].quantile([0.25, 0.5, 0.75], interpolation="nearest")
        when = "{1:.0f} ({0:.0f}–{2:.0f})".format(*quartiles).replace("inf", "never")
        cell = f"{first[name].median():.2g} s, {when}".removesuffix(" (never–never)")
        starts[-1].append(cell.removesuffix(", nan (nan–nan)"))
    ratios = [pool / tuned_ray, tuned_pool / tuned_ray, pool / ray, pool / tuned_pool]
    pairs.append([job, *map(describe, [*ratios, ray / tuned_ray])])
    for height, (name, style) in enumerate(STYLES.items()):
        if filter_size == 1:
            panels[3].loglog(size, passes[name].median(), style)
        elif filter_size != 30:
            panel = panels[SCRIPTS.index(script)]
            panel.semilogx(passes[name], [-height] * len(passes), style, alpha=0.5)
            panel.set(title=script, xlim=(0.1, 5), ylim=(-5, 1), yticks=[])
panels[3].set(title="numerical.py, filter of one pixel", xlabel="MB sent")
figure.suptitle("seconds a pass; in the upper panels, a point is a run")
for axis in [panels[3].yaxis, *[panel.xaxis for panel in panels]]:
    axis.set(major_locator=plt.LogLocator(subs=[1, 3]), major_formatter="{x:g}")
    axis.set_minor_formatter("")
figure.legend(panels[0].lines, STYLES, loc="outside lower center", ncols=2)
figure.savefig(FOLDER + "results.svg")
NAMES = "Pool, naive|Pool, tuned|Ray, naive|Ray, tuned"
PAIRS = "Ray tuned : Pool naive|Ray : Pool, tuned|Ray : Pool, naive|tuned : naive, Pool"
for header, table in {
    "speed|Pool, naive → tuned|Ray, naive → tuned": medians,
    f"speed|serial, ms a pass|{NAMES}": speeds,
    f"first pass, pays after|serial|{NAMES}": starts,
    f"speed|{PAIRS}|tuned : naive, Ray": pairs,
}.items():
    print(f"\n|{header}|\n|{'---|' * (header.count('|') + 1)}")
    for cells in table:
        print(f"|{'|'.join(cells)}|")
