"""python -m tests.bench.reference RUN..: common/reference.json, against which a run says at its end whether its loss and
its figures are as usual. RUN: finished runs of presets, several seeds of each; an entry keeps the lowest and the highest
of each value, so that two processors, or two versions of torch, do not differ from it."""
import argparse
import hashlib
import json
from collections import defaultdict
from pathlib import Path

from common.evaluate import REFERENCE, named, recipe
from common.flags import config_of


def entries(runs):
    """{name of the recipe: entry} of run folders; an entry is described at evaluate.reference."""
    groups, found = defaultdict(list), {}
    for run in map(Path, runs):
        groups[recipe(config_of(run))].append(run)
    for text, same in groups.items():
        configs, (losses, figures) = [config_of(run) for run in same], zip(*map(named, same))
        about = configs[0]["about"]
        found[hashlib.sha256(text.encode()).hexdigest()] = dict(
            run=" ".join(filter(None, [about["script"], configs[0].get("mode", ""), Path(configs[0]["dataset"]).name])),
            seeds=", ".join(str(c["seed"]) for c in sorted(configs, key=lambda c: c["seed"])), device=about["device"],
            torch=about["torch"], loss=span(losses), figures={k: v for k, v in span(figures).items() if " f" in k})
    return found


def span(values):
    """[{name: value}] -> {name: [lowest, highest]}, of the names that all have."""
    names = [k for k in values[0] if all(k in v for v in values)]
    return {k: [f([float(f"{v[k]:.4g}") for v in values]) for f in (min, max)] for k in names}


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+")
    a = ap.parse_args(argv)
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(entries(a.runs).items(), key=lambda kv: kv[1]["run"])]
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")          # a line each


if __name__ == "__main__":
    main()
