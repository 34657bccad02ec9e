"""python -m tests.bench.diversity RUN..: do the images of runs cover the data? FD weighs blur and missing modes together;
these figures tell them apart. As many images as the data set has, at most 2,048 each, as pixels averaged down to 8x8.

precision   share of generated images within the k-NN ball of a real one    (Kynkaanniemi et al., arXiv:1904.06991)
recall      share of real images within the k-NN ball of a generated one    (same)
coverage    share of real images whose own k-NN ball holds a generated one  (Naeem et al., arXiv:2002.09797)

A k-NN ball reaches from an image of a set to the k-th nearest of the same set. The first line compares two halves of the
real images, with each other, what a perfect model of the data would score at half the number."""
import argparse
import tempfile

import torch

from common import sample
from common.data import load
from common.fid import fd_pixels
from common.evaluate import FD_IMAGES, chosen
from common.flags import config_of


def points(images):
    """uint8 [N,C,H,W] -> float64 [N,D], 8x8 pixels in [-1, 1]."""
    x = torch.nn.functional.adaptive_avg_pool2d(images.double() / 127.5 - 1, 8)
    return x.flatten(1)


def figures(real, fake, k=5):
    """(precision, recall, coverage) of two sets of points [N,D] and [M,D]."""
    radius = lambda x: torch.cdist(x, x).kthvalue(k + 1).values           # the nearest is the point itself
    d = torch.cdist(real, fake)
    near_real, near_fake = d <= radius(real)[:, None], d <= radius(fake)
    return tuple(float(m.any(dim).double().mean()) for m, dim in ((near_real, 0), (near_fake, 1), (near_real, 1)))


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("runs", nargs="+", help="run folders of the same data")
    ap.add_argument("--steps", type=int, nargs="+", default=[1, 2], help="sampling steps [1 2]")
    ap.add_argument("--data-dir", default="data")
    ap.add_argument("-k", type=int, default=5)
    a = ap.parse_args(argv)
    config = config_of(a.runs[0])
    data = load(config["dataset"], a.data_dir, config["size"], "cpu")
    real = data.images[chosen(data, FD_IMAGES)]
    print(f"{'':50}{'FD':>8}{'precision':>11}{'recall':>8}{'coverage':>10}")

    def show(name, real, fake):
        print(f"{name:50}{fd_pixels(real, fake):8.3f}{'{:11.3f}{:8.3f}{:10.3f}'.format(*figures(points(real), points(fake), a.k))}")
    show("half of the real images", *real.chunk(2))
    for run in a.runs:
        for steps in a.steps:
            with tempfile.TemporaryDirectory() as tmp:
                sample.main([run, "--steps", str(steps), "--n", str(len(real)), "--out", f"{tmp}/x.npz"])
                show(f"{run[-40:]}, {steps} step{'s' * (steps > 1)}", real, load(f"{tmp}/x.npz", a.data_dir, 0, "cpu").images)


if __name__ == "__main__":
    main()
