"""python -m tests.bench.weights [--out FOLDER]

The SHA-256 of all weights and optimiser states after ten steps of each method and of the diffusion model, with dropout
and --accum 2, on one thread: for the digits, and for random RGB images of 8x8 with every network family, since one
channel cannot show a change of memory layout. Two commits that print the same lines train the same weights; run it
before and after code is moved. With --out the run folders are kept, to be resumed by a later commit."""
import argparse
import contextlib
import hashlib
import importlib
import io
import tempfile
from pathlib import Path

import numpy as np
import torch

COMMON = ["--device", "cpu", "--iters", "10", "--batch", "32", "--accum", "2", "--dropout", "0.1", "--steps", "2",
          "--grid", "4", "--log-every", "5", "--save-every", "5", "--keep"]
SMALL = ["--preset", "small", "--ch", "16", "--mult", "1,2", "--blocks", "1", "--attn", "4"]
RUNS = [("cd", []), ("ct", []), ("ict", []), ("ect", []), ("scm", ["--mode", "sct"]), ("scm", ["--mode", "scd"]),
        ("rcm", ["--H", "2"])]
NETS = [("ncsnpp", []), ("adm", ["--ch", "64"]), ("dit", ["--ch", "16"])]


def digest(tree):
    """SHA-256 of all tensors and numbers of a checkpoint, in a fixed order."""
    total = hashlib.sha256()

    def walk(v):
        if torch.is_tensor(v):
            total.update(v.contiguous().numpy().tobytes())
        elif isinstance(v, dict):
            for k in sorted(v, key=str):
                total.update(str(k).encode())
                walk(v[k])
        elif isinstance(v, (list, tuple)):
            for x in v:
                walk(x)
        else:
            total.update(repr(v).encode())
    walk(tree)
    return total.hexdigest()[:16]


def train(script, out, *flags):
    """Ten steps; the folder of the run."""
    module = importlib.import_module(script)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return Path(module.main(module.parse(module.Args, module.PRESETS, [*COMMON, "--out", str(out), *flags]))["run"])


def state(folder):
    """What a run has learned: every part of its checkpoint but the flags and the description of the network."""
    ckpt = torch.load(Path(folder) / "ckpt.pt")
    return {k: v for k, v in ckpt.items() if k not in ("config", "model")}


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", help="keep the run folders here")
    a = ap.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as tmp:
        out = Path(a.out or tmp)
        out.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), np.uint8)
        np.savez(out / "rgb.npz", images=random)
        for data in (["--dataset", "digits"], ["--dataset", str(out / "rgb.npz"), *SMALL]):
            teachers = {flow: train("common.teacher", out, *data, "--flow", flow) for flow in ("edm", "trig")}
            runs = {f"teacher {flow}": folder for flow, folder in teachers.items()}
            for script, flags in RUNS:
                start = teachers["trig" if script in ("scm", "rcm") else "edm"]
                name = " ".join([script, *flags[1::2]])
                runs[name] = train(script, out, *data, *flags, "--teacher", str(start))
            for name, folder in runs.items():
                print(f"{Path(data[1]).stem:7}{name:14}{digest(state(folder))}  {folder.name}", flush=True)
        for net, flags in NETS:
            folder = train("ect", out, *data, "--net", net, *flags, "--teacher", "none")
            print(f"{'rgb':7}{'ect ' + net:14}{digest(state(folder))}  {folder.name}", flush=True)


if __name__ == "__main__":
    main()
