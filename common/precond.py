"""From a raw network F to the consistency function or denoiser f(x, t). t has shape [B, 1, 1, 1] everywhere;
only the raw network sees it flat."""
import torch
import torch.nn as nn

from common.dit import DiT
from common.run import BadInput
from common.unet import UNet

NETS = dict(ddpmpp=UNet, ncsnpp=UNet, adm=UNet, dit=DiT)


class EDM(nn.Module):
    """f(x, t) = c_skip x + c_out F(c_in x, ln(t)/4, y)   (EDM, arXiv:2206.00364, eq. 7 and Table 1).

    t is the standard deviation of the noise, > 0, [B,1,1,1]. With t_min > 0 the boundary condition is
    f(x, t_min) = x exactly (CM, arXiv:2303.01469, App. C); with t_min = 0 it holds in the limit t -> 0
    and f is also EDM's denoiser D(x; t). F computes in `dtype`, everything around it in float32
    (float64 if dtype is float64): coefficients in bfloat16 would lose small noise levels."""
    def __init__(self, model, sd=0.5, t_min=0.0, dtype=torch.float32):
        super().__init__()
        self.model, self.sd, self.t_min, self.dtype = model, sd, t_min, dtype

    @property
    def spec(self):
        """What `build` needs to make this network again, beside its weights."""
        return dict(flow="edm", net=self.model.kwargs["net"], kwargs=self.model.kwargs, sd=self.sd, t_min=self.t_min)

    def forward(self, x, t, y=None):
        wide = torch.promote_types(self.dtype, torch.float32)
        x, t, sd = x.to(wide), t.to(wide), self.sd
        c_in = 1 / (t**2 + sd**2).sqrt()
        c_skip = sd**2 / ((t - self.t_min) ** 2 + sd**2)
        c_out = (t - self.t_min) * sd / (t**2 + sd**2).sqrt()
        F = self.model((c_in * x).to(self.dtype), (t.log() / 4).flatten(), y)
        return c_skip * x + c_out * F.to(wide)


def build(spec, dtype=torch.float32):
    """The untrained network that `spec` (of a checkpoint) describes."""
    return EDM(NETS[spec["net"]](**spec["kwargs"]), spec["sd"], spec["t_min"], dtype)


def backbone(args, data, teacher=None, **more):
    """The raw network F that the flags describe, `more` being keywords without a flag, or a copy of the teacher's, in
    either case with the run's own dropout. Raises BadInput where the flags do not fit the images."""
    _, channels, size, _ = data.images.shape
    if teacher is not None:
        kwargs = dict(teacher.model.kwargs, dropout=args.dropout)
    else:
        kwargs = dict(size=size, channels=channels, ch=args.ch, mult=args.mult, blocks=args.blocks, attn=args.attn,
                      classes=data.classes if args.cond else 0, dropout=args.dropout, net=args.net, **more)
    if args.cond and not data.classes:
        raise BadInput(f"--cond: {data.name} has no labels")
    try:
        model = NETS[args.net](**kwargs)
    except ValueError as e:
        raise BadInput(f"--net {args.net}: {e}")
    if teacher is not None:
        model.load_state_dict(teacher.model.state_dict())
    return model
