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
        configs, values = [config_of(run) for run in same], [named(run) for run in same]
        about = configs[0]["about"]
        shared = [name for name in values[0] if all(name in v for v in values)]
        found[hashlib.sha256(text.encode()).hexdigest()] = dict(
            run=" ".join(filter(None, [about["script"], configs[0].get("mode", ""), Path(configs[0]["dataset"]).name])),
            seeds=", ".join(map(str, sorted(c["seed"] for c in configs))), device=about["device"], torch=about["torch"],
            values={name: [float(f"{f(v[name] for v in values):.4g}") for f in (min, max)] for name in shared})
    return found


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+")
    a = ap.parse_args(argv)
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(entries(a.runs).items(), key=lambda kv: kv[1]["run"])]
    REFERENCE.write_text("{\n" + ",\n".join(lines) + "\n}\n")          # a line each


if __name__ == "__main__":
    main()
