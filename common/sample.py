"""python -m common.sample RUN --steps 2 --n 64 --out grid.png

Images from any run: a run folder, or one of its checkpoints. --out ends in .png: one grid; in .npz: arrays
`images` [N, H, W, C] uint8 and `labels`, which --dataset reads again; otherwise: a folder of PNG files."""
import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import teacher
from common.fid import quantise
from common.run import BadInput, Parser, config_of, device_of, integers, noise_of, picture


def flags(argv=None):
    ap = Parser(prog="python -m common.sample", allow_abbrev=False, description=__doc__.split("\n\n")[1])
    ap.add_argument("run", help="run folder, or a checkpoint in one")
    ap.add_argument("--steps", type=int, help="sampling steps [those of the run]")
    ap.add_argument("--t-mid", "--t_mid", type=float, help="middle noise level [that of the run]")
    ap.add_argument("--n", type=int, default=64, help="how many images [%(default)s]")
    ap.add_argument("--classes", type=integers, help="labels to draw, such as 3,5; repeated up to --n [all]")
    ap.add_argument("--seed", type=int, default=0, help="image i depends on (seed, i) alone [%(default)s]")
    ap.add_argument("--batch", type=int, default=256, help="images at a time [%(default)s]")
    ap.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto", help="[%(default)s]")
    ap.add_argument("--out", default="grid.png", help="a .png, a .npz or a folder [%(default)s]")
    return ap.parse_args(argv)


def main(argv=None):
    """Generate and write the images; return them, uint8 [N, C, H, W], and their labels [N] or None."""
    a = flags(argv)
    path, out = Path(a.run), Path(a.out)
    config = config_of(path if path.is_dir() else path.parent)
    name = config["about"]["script"]
    if not importlib.util.find_spec(name):
        raise BadInput(f"{path} was made by {name}.py, which is not here; put it back")
    method = importlib.import_module(name)
    args = method.Args(**{k: v for k, v in config.items() if k in method.Args.__dataclass_fields__})
    args.steps = args.steps if a.steps is None else a.steps
    if a.t_mid is not None:
        if not hasattr(args, "t_mid") or not 0 < a.t_mid < getattr(args, "t_max", math.pi / 2):
            raise BadInput("--t-mid must lie between 0 and the run's --t-max; diffusion models have none")
        args.t_mid = a.t_mid
    if args.steps < 1 or a.n < 1 or a.batch < 1:
        raise BadInput("--steps, --n and --batch must be at least 1")
    if out.suffix not in (".png", ".npz") and out.exists() and (out.is_file() or any(out.iterdir())):
        raise BadInput(f"--out {out} exists already; name a new folder, a .png or a .npz")
    device = device_of(a.device)
    net = teacher.load(path, device)
    kwargs = net.model.kwargs
    labels = None
    if kwargs["classes"]:
        which = torch.tensor(a.classes or range(kwargs["classes"]))
        if which.min() < 0 or which.max() >= kwargs["classes"]:
            raise BadInput(f"--classes must lie in 0 .. {kwargs['classes'] - 1}")
        labels = which[torch.arange(a.n) % len(which)]
    elif a.classes:
        raise BadInput("--classes: this run was not trained with --cond")

    k = 1 if name == "common.teacher" else args.steps           # the diffusion sampler draws noise once
    shape, images = (kwargs["channels"], kwargs["size"], kwargs["size"]), []
    for i in tqdm(torch.arange(a.n).split(a.batch), disable=a.n <= a.batch):
        y = None if labels is None else labels[i].to(device)
        images.append(quantise(method.sample(net, noise_of(i, k, shape, device, a.seed), y, args)).cpu())
    images = torch.cat(images)
    write(images, labels, out, len(which) if labels is not None else 0)
    print(f"{a.n} images in {args.steps} step{'s' * (args.steps > 1)}: {out}")
    return images, labels


def write(images, labels, out, cols=0):
    rows = images.permute(0, 2, 3, 1).numpy()
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".png":
        picture(images, cols).save(out)
    elif out.suffix == ".npz":
        np.savez_compressed(out, images=rows, **({} if labels is None else dict(labels=labels.numpy())))
    else:
        out.mkdir(exist_ok=True)
        for i, row in enumerate(rows):
            Image.fromarray(row.squeeze()).save(out / f"{i:06d}.png")


if __name__ == "__main__":
    main(sys.argv[1:])
