"""From a raw network F(x, c_noise, y) to the consistency function, or denoiser, f(x, t, y).

t has shape [B, 1, 1, 1] everywhere outside the raw network, which gets c_noise [B], a function of t."""
import torch
import torch.nn as nn

from common import jvp
from common.unet import Linear, cast


def check_shape(x, t, y=None):
    """ValueError unless t is [B, 1, 1, 1] and y [B] for x [B,C,H,W]: t [B] would be broadcast along the width of the
    images, y [B, 1] over the batch."""
    for name, v, shape in (("t", t, (len(x), 1, 1, 1)), ("y", y, (len(x),))):
        if v is not None and v.shape != shape:
            raise ValueError(f"{name} has shape {list(v.shape)} for x {list(x.shape)}; make it {list(shape)}")


class EDM(nn.Module):
    """f(x, t) = c_skip x + c_out F(c_in x, ln(t)/4, y)   (EDM, arXiv:2206.00364, eq. 7 and Table 1).

    t is the standard deviation of the noise, >= 0, [B,1,1,1]. With t_min > 0 the coefficients are those with which
    f(x, t_min) = x holds exactly (CM, arXiv:2303.01469, App. C). With t_min = 0, f has the form of EDM's denoiser
    D(x; t), and f(x, 0) = x. F computes in `dtype`, all around it in float32 (float64 if dtype is float64):
    coefficients in bfloat16 would lose small noise levels. forward: x [B,C,H,W] -> the same shape; other keywords go to
    the model."""
    def __init__(self, model, sd=0.5, t_min=0.0, dtype=torch.float32):
        super().__init__()
        self.model, self.sd, self.t_min, self.dtype = model, sd, t_min, dtype

    @property
    def spec(self):
        """What networks.build needs to make this network again, beside its weights."""
        return dict(flow="edm", net=self.model.kwargs["net"], kwargs=self.model.kwargs, sd=self.sd, t_min=self.t_min)

    def forward(self, x, t, y=None, **more):
        check_shape(x, t, y)
        wide = torch.promote_types(self.dtype, torch.float32)
        x, t, sd = x.to(wide), t.to(wide), self.sd
        c_in = 1 / (t**2 + sd**2).sqrt()
        c_skip = sd**2 / ((t - self.t_min) ** 2 + sd**2)
        c_out = (t - self.t_min) * sd / (t**2 + sd**2).sqrt()
        c_noise = torch.where(t == 0, 1, t).log() / 4             # at 0, c_out is 0, and f(x, 0) = x as F is finite
        if getattr(self.model, "mixed", False):                   # it wants x in full, and computes in `dtype` inside
            F = self.model(c_in * x, c_noise.flatten(), y, self.dtype)
        else:
            F = self.model(cast(c_in * x, self.dtype), c_noise.flatten(), y, **more)
        return c_skip * x + c_out * cast(F, wide)


class TrigFlow(nn.Module):
    """f(x, t) = cos(t) x - sin(t) sd F(x, t)   (TrigFlow, sCM, arXiv:2410.11081), with f(x, 0) = x for any F.

    x = cos(t) x0 + sin(t) z with z ~ N(0, sd^2); the time t in [0, pi/2), [B,1,1,1], is arctan(sigma/sd) for EDM's
    noise level sigma. sd F is the velocity dx/dt of a diffusion model. `raw` names the flow for which the raw network
    was made: "trig", F(x, t) = model(x/sd, t), or "edm", F(x, t) = -model(x/sd, ln(sd tan t)/4), which is exactly EDM's
    diffusion model. `weigh` is the adaptive weight w(t) in losses e^w d - w: it learns w = -ln E[d].
    The raw network computes in `dtype`, all around it in float32 (float64 if dtype is float64); while a derivative is
    taken, all of it does."""
    t_min = 0.0                                           # the boundary condition f(x, 0) = x holds for any F

    def __init__(self, model, sd=0.5, raw="trig", dtype=torch.float32):
        super().__init__()
        self.model, self.sd, self.raw, self.dtype = model, sd, raw, dtype
        self.head = Linear(32, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    @property
    def spec(self):
        """As that of EDM."""
        return dict(flow="trig", net=self.model.kwargs["net"], kwargs=self.model.kwargs, sd=self.sd, raw=self.raw)

    def F(self, x, t, y=None, **more):
        """The network itself: x [B,C,H,W], t [B,1,1,1], y [B] or None -> [B,C,H,W]; other keywords go to the model."""
        check_shape(x, t, y)
        wide = torch.promote_types(self.dtype, torch.float32)
        x, t = x.to(wide), t.to(wide)
        c_noise = t if self.raw == "trig" else (self.sd * torch.where(t == 0, 1, t).tan()).log() / 4     # see EDM
        F = self.model(cast(x / self.sd, wide if jvp.precise else self.dtype), c_noise.flatten(), y, **more)
        F = cast(F, wide)
        return F if self.raw == "trig" else -F

    def weigh(self, t):
        """The adaptive weight w(t) [B]: a linear function of the waves cos(k t) and sin(k t), k = 0 .. 15."""
        a = t.flatten()[:, None] * torch.arange(16, device=t.device, dtype=t.dtype)
        return self.head(torch.cat([a.cos(), a.sin()], 1)).sum(1)         # sum: FSDP2 minds a view of what it returns

    def forward(self, x, t, y=None):
        check_shape(x, t, y)
        wide = torch.promote_types(self.dtype, torch.float32)
        x, t = x.to(wide), t.to(wide)
        return t.cos() * x - t.sin() * self.sd * self.F(x, t, y)

    def denoise(self, x, sigma, y=None):
        """f as a function of x = x0 + sigma eps and sigma; of a diffusion model EDM's D(x; sigma)."""
        t = torch.atan(sigma / self.sd)
        return self(t.cos() * x, t, y)


def trig(net):
    """A frozen diffusion model of either flow as a TrigFlow, sharing its weights."""
    return net if isinstance(net, TrigFlow) else TrigFlow(net.model, net.sd, "edm", net.dtype).requires_grad_(False)


def trig_from_rf(s, x, v, sd):
    """Rectified flow, x = (1-s) x0 + s eps with the velocity v = E[eps - x0 | x], in TrigFlow's variables: t, x and F.
    Nothing is divided by sin(t), which is 0 at s = 0."""
    n = ((1 - s) ** 2 * sd**2 + s**2).sqrt()
    return torch.atan2(s, (1 - s) * sd), x * sd / n, n / sd * v + ((1 - s) * sd**2 - s) / (n * sd) * x


def rf_from_trig(t, x, F, sd):
    """The inverse of trig_from_rf: s, x and v of rectified flow."""
    s = sd * t.sin() / (sd * t.sin() + t.cos())
    n = ((1 - s) ** 2 * sd**2 + s**2).sqrt()
    x = x * n / sd
    return s, x, (F - ((1 - s) * sd**2 - s) / (n * sd) * x) * sd / n
