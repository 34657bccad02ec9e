"""sCD with a teacher, network, data and a loop of your own: python tests/copy/scm.py, in the checkout."""
import sys

sys.path.insert(0, ".")

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from common.precond import TrigFlow
from scm import loss_fn, sample


class Net(nn.Module):       # attention over the rows; fused, it has no forward-mode derivative
    def __init__(self, width=128):
        super().__init__()
        self.row, self.place = nn.Linear(8, width), nn.Parameter(torch.randn(8, width))
        self.label, self.noise = nn.Embedding(2, width), nn.Linear(16, width)
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.mlp = nn.ModuleList(nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
            for _ in range(2))
        self.out = nn.Linear(width, 8)

    def forward(self, x, c_noise, y):
        a = c_noise[:, None] * torch.arange(1, 9)
        e = self.noise(torch.cat([a.cos(), a.sin()], 1)) + self.label(y)
        h = self.row(x[:, 0]) + self.place + e[:, None]
        for qkv, mlp in zip(self.qkv, self.mlp):
            q, k, v = (u.unflatten(2, (4, -1)).transpose(1, 2) for u in qkv(h).chunk(3, 2))
            h = h + scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            h = h + mlp(h)
        return self.out(h).view_as(x)


edge = torch.where(torch.arange(8) > torch.arange(7)[:, None], 1.0, -1.0)   # [7, 8]
data = torch.stack([edge[:, None].repeat(1, 8, 1), edge[:, :, None].repeat(1, 1, 8)])
data, label = data.view(14, 1, 8, 8), torch.arange(14) // 7    # two-colour images, 2 classes


def denoise(x, sigma, y):   # yours: a diffusion model's denoiser; of 14 images the exact one
    d = -((x - data[:, 0]) ** 2).flatten(2).sum(2) / (2 * sigma.flatten()[:, None] ** 2)
    w = d.masked_fill(label != y[:, None], -torch.inf).softmax(1)
    return (w @ data.flatten(1).to(x)).view_as(x)


def velocity(x, t, y):      # F of TrigFlow, from a denoiser
    return (t.cos() * x - denoise(x / t.cos(), sd * t.tan(), y)) / (t.sin() * sd)


sd = 1.0
args = SimpleNamespace(mode="scd", jvp="fd", norm="l2", c=0.1, H=100, P_mean=-1.0, P_std=1.4,
                       sigma_max=80.0, t_mid=1.1, sd=sd)    # jvp="exact" for most networks
net, teacher = TrigFlow(Net(), sd), SimpleNamespace(F=velocity)
opt = torch.optim.Adam(net.parameters(), 5e-4)
for it in range(400):
    i = torch.randint(14, (64,))
    loss, stats = loss_fn(net, teacher, data[i], label[i], it, args, lambda: torch.manual_seed(it))
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 100 == 0:
        print(it, f"{loss.item():.3f}")
images = sample(net, torch.randn(2, 14, 1, 8, 8), label, args).clamp(-1, 1)     # in two steps
print("pixels off", (images[:, None] - data).abs().flatten(2).mean(2).min(1).values.mean())
