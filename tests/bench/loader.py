"""python -m tests.bench.loader: batches of 32x32 images, ours against torchvision transforms in a DataLoader.

Both shuffle, flip and scale to [-1, 1]. The DataLoader side does what torchvision's CIFAR10 does with an image."""
import argparse
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from common.data import Data


class Folder(torch.utils.data.Dataset):
    def __init__(self, images, labels):
        self.images, self.labels = images, labels
        self.transform = transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                                             transforms.Normalize((0.5,) * 3, (0.5,) * 3)])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.images[i])), int(self.labels[i])


def rate(batches, n, count):
    """Images per second over `count` batches, the first (workers starting) left out."""
    it, seconds = iter(batches), []
    for _ in range(count + 1):
        began = time.perf_counter()
        x, y = next(it)
        if x.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return n / statistics.fmean(seconds[1:])


def main():
    ap = argparse.ArgumentParser(description=__doc__)
    ap.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    ap.add_argument("--batch", type=int, default=128)
    ap.add_argument("--count", type=int, default=100)
    a = ap.parse_args()
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (50_000, 32, 32, 3), dtype=np.uint8)
    labels = rng.integers(0, 10, 50_000)
    data = Data("random", torch.from_numpy(images).permute(0, 3, 1, 2).to(a.device), torch.from_numpy(labels).to(a.device), 10)
    ours = rate((data.batch(it, a.batch, flip=True) for it in range(10**9)), a.batch, a.count)
    print(f"ours on {a.device}, batch {a.batch}: {ours:,.0f} images/s, {1e3 * a.batch / ours:.2f} ms a batch")
    for workers in (0, 2):
        loader = torch.utils.data.DataLoader(Folder(images, labels), a.batch, shuffle=True, num_workers=workers)
        theirs = rate(((x.to(a.device), y) for x, y in loader), a.batch, min(a.count, 50))
        print(f"torchvision + DataLoader, {workers} workers: {theirs:,.0f} images/s, ratio {ours / theirs:.1f}")


if __name__ == "__main__":
    main()
