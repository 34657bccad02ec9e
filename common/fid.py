"""Distances between two sets of images, uint8 [N, C, H, W]."""
import torch
import torch.nn.functional as F


def quantise(x):
    """Images in [-1, 1] -> uint8, truncated as EDM's generate.py does; figures are of what a file would hold."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def frechet(m1, c1, m2, c2):
    """Squared Frechet distance of N(m1, c1) and N(m2, c2), float64; the trace of the matrix root comes from the
    eigenvalues of c1^1/2 c2 c1^1/2, which are real (Dowson and Landau 1982, eq. 16)."""
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return float(((m1 - m2) ** 2).sum() + c1.trace() + c2.trace() - 2 * cross)


def fd_pixels(real, fake):
    """Frechet distance of the pixels in [-1, 1], averaged down to 8x8; unbiased covariance. Not an FID: for data
    too small for Inception and for runs without a GPU."""
    def moments(images):
        x = F.adaptive_avg_pool2d(images.cpu().double() / 127.5 - 1, 8).flatten(1)
        return x.mean(0), x.T.cov(correction=min(1, len(x) - 1))    # a single image has no spread
    return frechet(*moments(real), *moments(fake))
