"""The exact test bed, tests/bench/exact.py: its map against an ODE solver, its orders, and that all of it runs."""
import math

import numpy as np
import pytest
import torch
from bench import exact
from bench.exact import BIG, DATA, GAUSS, SD, T_MAX, T_MIN, Z, fixed_point, full, rms

import cd
import ct
import ect
import ict
import rcm
import scm

POINTS = torch.tensor([-1.9, -0.8, -0.3, 0.0, 0.4, 1.1, 2.2]).double().view(-1, 1, 1, 1).expand(-1, 2, 1, 1)


@pytest.mark.parametrize("t", [0.05, 0.3, 1.0, 5.0, T_MAX])
def test_the_exact_map_ends_the_paths_of_the_ode(t):
    """dx/dt = (x - D(x, t)) / t by a solver of order 8. A tail without digits, a CDF at another level, a wrong D."""
    from scipy.integrate import solve_ivp
    x = POINTS * math.sqrt(SD**2 + t**2)

    def slope(log_t, x):                                  # dx / d ln t = x - D(x, t)
        x = torch.as_tensor(x).view(-1, 2, 1, 1)
        return (x - DATA.denoise(x, full(x, math.exp(log_t)))).flatten().numpy()
    path = solve_ivp(slope, np.log([t, T_MIN]), x.flatten().numpy(), method="DOP853", rtol=1e-12, atol=1e-13)
    assert np.abs(DATA.f(x, full(x, t)).flatten().numpy() - path.y[:, -1]).max() < 1e-9


def test_the_derivatives_of_the_exact_map():
    """Forward mode, which scm and rcm use, against differences and df/dx = p_t(x) / p_tmin(f); df/dt + v df/dx = 0."""
    from common.jvp import jvp
    x, t, one = 0.8 * POINTS, full(POINTS, 0.7), torch.ones_like(POINTS)
    f, d = jvp(DATA.f, (x, t), (one, 0 * t))
    h = 1e-5
    assert torch.allclose(d, (DATA.f(x + h, t) - DATA.f(x - h, t)) / (2 * h), rtol=1e-7, atol=1e-9)
    assert torch.allclose(d, DATA.tails(x, t)[2] / DATA.tails(f, full(f, T_MIN))[2], rtol=1e-9)
    _, dt = jvp(DATA.f, (x, t), (0 * x, torch.ones_like(t)))
    assert torch.allclose(dt, (DATA.f(x, t + h) - DATA.f(x, t - h)) / (2 * h), rtol=1e-7, atol=1e-9)
    assert torch.allclose(dt, -(x - DATA.denoise(x, t)) / t * d, rtol=1e-9, atol=1e-12)


def test_images_behind_a_point_have_its_posterior():
    """Mean E[x0 | x_t], and the score's Jacobian for the variance: t^2 dD/dx."""
    x, t, h = POINTS, full(POINTS, 0.6), 1e-5
    x0, p = exact.behind(DATA, x, t)
    mean = (p * x0).sum(1)
    assert torch.allclose(mean, DATA.denoise(x, t), atol=1e-12) and torch.allclose(p.sum(1), torch.ones_like(x))
    spread = 0.6**2 * (DATA.denoise(x + h, t) - DATA.denoise(x - h, t)) / (2 * h)
    assert torch.allclose((p * (x0 - mean[:, None]) ** 2).sum(1), spread, atol=1e-8)


@pytest.mark.parametrize("module, solver", [(cd, "euler"), (cd, "heun"), (ct, ""), (ict, "")])
def test_the_fixed_point_for_gaussian_data_is_the_closed_form(module, solver):
    """A pair, a solver's step or a target at another level; gradient in the target, for which no step is left."""
    args = module.Args(**dict(solver=solver) if solver else dict(c=BIG) if module is ict else {})
    for n in (9, 12):
        ts = module.karras(n, args)
        ratio = 1 + (fixed_point(module, GAUSS, ts, args) / (SD * Z))[[30, 70]]
        assert torch.allclose(ratio, torch.full_like(ratio, exact.spread(ts, SD, solver)), rtol=5e-4)


@pytest.mark.parametrize("module, flags, expected, within", [
    (cd, dict(solver="euler"), 1, 0.1), (cd, {}, 2, 0.15), (ct, {}, 1, 0.2), (ict, dict(c=BIG), 1, 0.2),
    (ect, dict(c=BIG), 1, 0.1)])
def test_orders_on_the_mixture(module, flags, expected, within):
    args = module.Args(**flags)
    grids = [exact.levels(module, n, args) for n in ((6, 10) if module is ect else (18, 35))]
    errors = [rms(exact.ROOT_MASS * fixed_point(module, DATA, ts, args)) for ts in grids]
    assert abs(exact.order([len(ts) for ts in grids], errors) - expected) < within, errors


@pytest.mark.parametrize("module, flags", [
    (scm, dict(mode="sct")), (scm, dict(mode="scd")), (rcm, dict(loss_scale=1.0, lambda_dmd=0.0))])
def test_no_mean_tangent_at_the_exact_map(module, flags):
    """A term of g with another factor or sign. Modes exchanged are not seen: they have the same mean."""
    assert exact.tangent(module, DATA, module.Args(c=BIG, **flags)) < 1e-6


def test_the_bench_runs(tmp_path, capsys):
    """A row without figures, training that blows up, a picture that is not drawn. What is learned is for the bench."""
    pytest.importorskip("matplotlib")
    rows = exact.main(["--iters", "20", "--levels", "3", "5", "--q", "4", "5", "--out", str(tmp_path / "x.png")])
    assert [row[0] for row in rows] == list(exact.METHODS) and all(len(row) == 5 for row in rows)
    assert all(float(row[1]) < 0.6 for row in rows), rows              # all points in one place: 0.56
    assert capsys.readouterr().out.count("\n| ") == len(rows) and (tmp_path / "x.png").stat().st_size > 50_000
