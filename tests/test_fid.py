"""Frechet distances against eigenvalues of the plain product, closed forms and sums by hand."""
import numpy as np
import pytest
import torch

from common.fid import fd_pixels, frechet, quantise


def moments(seed, d=12, rank=None):
    """A random mean and covariance, of less than full rank if asked."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(d, rank or d, generator=g, dtype=torch.float64)
    return torch.randn(d, generator=g, dtype=torch.float64), a @ a.T


def images(seed, n=100, size=16, channels=3, top=256):
    return torch.randint(top, (n, channels, size, size), generator=torch.Generator().manual_seed(seed)).byte()


def trace_of_root(C, D):
    """tr sqrt(C D) from the eigenvalues of the product, which is not symmetric: another way than frechet's."""
    return np.sqrt(np.linalg.eigvals(C @ D).real.clip(0)).sum()


@pytest.mark.parametrize("rank", [12, 5])
def test_frechet_equals_the_matrix_square_root(rank):
    """The root of a product is not the product of roots; a pixel that is always black makes it singular."""
    (m, C), (n, D) = moments(0), moments(1, rank=rank)
    root = trace_of_root(C.numpy(), D.numpy())
    expect = ((m - n) ** 2).sum() + C.trace() + D.trace() - 2 * root
    assert frechet(m, C, n, D) == pytest.approx(float(expect), rel=1e-6)
    assert frechet(n, D, m, C) == pytest.approx(float(expect), rel=1e-6), "not symmetric"


def test_frechet_of_commuting_covariances():
    """|m - n|^2 + sum (sqrt a - sqrt b)^2 over the common eigenvectors; a lost factor 2 or square fails."""
    q = torch.linalg.qr(moments(2)[1])[0]
    a, b = torch.arange(12).double(), torch.linspace(9, 0, 12).double()         # with a zero in each
    m, n = torch.zeros(12).double(), torch.full((12,), 0.5).double()
    expect = 12 * 0.25 + ((a.sqrt() - b.sqrt()) ** 2).sum()
    assert frechet(m, q * a @ q.T, n, q * b @ q.T) == pytest.approx(float(expect))


def test_frechet_of_equal_moments_is_zero():
    for rank in (12, 5):
        assert abs(frechet(*moments(3, rank=rank), *moments(3, rank=rank))) < 1e-5


@pytest.mark.parametrize("shift", [1, 20])
def test_a_shift_of_all_pixels(shift):
    """Equal covariances: only the means differ, by shift / 127.5 in each of the 8 x 8 x 3 averages."""
    real = images(0, top=230)
    assert fd_pixels(real, real + shift) == pytest.approx(8 * 8 * 3 * (shift / 127.5) ** 2, abs=1e-5)


def test_pixels_against_sums_by_hand():
    """Averages of 2x2 blocks in [-1, 1], unbiased covariance: no other pooling, scale or divisor."""
    real, fake = images(1, 300), images(2, 300) // 2
    average = lambda x: x.numpy().reshape(300, 3, 8, 2, 8, 2).mean((3, 5)).reshape(300, -1) / 127.5 - 1
    m, n = average(real), average(fake)
    C, D = np.cov(m, rowvar=False), np.cov(n, rowvar=False)
    expect = ((m.mean(0) - n.mean(0)) ** 2).sum() + np.trace(C + D) - 2 * trace_of_root(C, D)
    assert fd_pixels(real, fake) == pytest.approx(expect, rel=1e-5)


def test_enlarged_images_have_the_same_distance():
    """Beyond 8 x 8 a copy of every pixel changes nothing: figures of 8 and 16 pixels mean the same."""
    real, fake = images(3, size=8), images(4, size=8) // 3
    double = lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert fd_pixels(double(real), double(fake)) == pytest.approx(fd_pixels(real, fake), rel=1e-9)
    assert fd_pixels(real, fake) == pytest.approx(fd_pixels(fake, real), rel=1e-6)
    assert abs(fd_pixels(real, real)) < 1e-5


def test_a_single_image_has_no_spread():
    """NaN out of 0 / 0, of which eigh finds no eigenvalues; training on one image is a common check."""
    one, other = images(5, n=1, size=8), images(6, n=1, size=8)
    expect = ((one.double() - other.double()) / 127.5).square().sum()
    assert fd_pixels(one, other) == pytest.approx(float(expect))


def test_quantise_truncates_and_clips():
    """Rounding or a wrap-around past 255 moves every figure; bytes have to survive the way there and back."""
    x = torch.tensor([-5.0, -1, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0, 1, 1.01, 5])
    assert quantise(x).tolist() == [0, 0, 0, 1, 128, 255, 255, 255]
    every = torch.arange(256).byte()
    assert torch.equal(quantise(every.float() / 127.5 - 1), every)
