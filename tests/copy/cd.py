"""CD with a teacher, network, data and a loop of your own: python tests/copy/cd.py, in the checkout."""
import sys

sys.path.insert(0, ".")

from types import SimpleNamespace

import torch
from torch import nn

from common.precond import EDM
from cd import loss_fn, sample


class Net(nn.Module):       # yours: x [B,C,H,W], c_noise [B], y [B] -> [B,C,H,W]
    def __init__(self, width=128):
        super().__init__()
        self.image, self.label = nn.Linear(64, width), nn.Embedding(2, width)
        self.noise, self.out = nn.Linear(16, width), nn.Linear(width, 64)
        self.blocks = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2))

    def forward(self, x, c_noise, y):
        a = c_noise[:, None] * torch.arange(1, 9)
        h = self.noise(torch.cat([a.cos(), a.sin()], 1)) + self.label(y)
        h = h + self.image(x.flatten(1))
        for block in self.blocks:
            h = h + block(h)
        return self.out(h).view_as(x)


edge = torch.where(torch.arange(8) > torch.arange(7)[:, None], 1.0, -1.0)   # [7, 8]
data = torch.stack([edge[:, None].repeat(1, 8, 1), edge[:, :, None].repeat(1, 1, 8)])
data, label = data.view(14, 1, 8, 8), torch.arange(14) // 7    # two-colour images, 2 classes


def denoise(x, sigma, y):   # yours: a diffusion model's denoiser; of 14 images the exact one
    d = -((x - data[:, 0]) ** 2).flatten(2).sum(2) / (2 * sigma.flatten()[:, None] ** 2)
    w = d.masked_fill(label != y[:, None], -torch.inf).softmax(1)
    return (w @ data.flatten(1).to(x)).view_as(x)


args = SimpleNamespace(N=18, solver="heun", distance="l2", guidance=0.0, boundaries=1, rho=7.0,
                       t_min=0.002, t_max=80.0, t_mid=0.8)
net = EDM(Net(), sd=1.0, t_min=args.t_min)
opt = torch.optim.Adam(net.parameters(), 1e-3)
for it in range(400):
    i = torch.randint(14, (64,))
    loss, stats = loss_fn(net, net, denoise, data[i], label[i], it, args, lambda: torch.manual_seed(it))
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 100 == 0:
        print(it, f"{loss.item():.3f}")
images = sample(net, torch.randn(2, 14, 1, 8, 8), label, args).clamp(-1, 1)     # in two steps
print("pixels off", (images[:, None] - data).abs().flatten(2).mean(2).min(1).values.mean())
