"""rCM with a teacher, network, data and a loop of your own: python tests/copy/rcm.py, in the checkout."""
import sys

sys.path.insert(0, ".")

from copy import deepcopy
from types import SimpleNamespace

import torch
from torch import nn

from common.precond import TrigFlow
from rcm import fake_loss_fn, is_students, loss_fn, sample


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


def velocity(x, t, y):      # F of TrigFlow, from a denoiser
    return (t.cos() * x - denoise(x / t.cos(), sd * t.tan(), y)) / (t.sin() * sd)


sd = 1.0
args = SimpleNamespace(jvp="exact", guidance=0.0, c=0.1, H=200, loss_scale=100.0, lambda_dmd=10.0,
                       student_every=2, N_max=1, rollout="random", P_mean=-1.0, P_std=1.4,
                       D_mean=0.0, D_std=1.6, sigma_max=80.0, t_mid=1.1, sd=sd)
net, teacher = TrigFlow(Net(), sd), SimpleNamespace(F=velocity)
fake = deepcopy(net)
opt_net, opt_fake = (torch.optim.Adam(m.parameters(), 5e-4) for m in (net, fake))
for it in range(400):
    i = torch.randint(14, (64,))
    if is_students(it, args):
        opt = opt_net
        loss, _ = loss_fn(net, fake, teacher, data[i], label[i], it, args, lambda: torch.manual_seed(it))
    else:
        opt = opt_fake
        loss, _ = fake_loss_fn(net, fake, data[i], label[i], it, args)
    opt.zero_grad()
    loss.backward()
    opt.step()
    if it % 100 == 0:
        print(it, f"{loss.item():.3f}")
images = sample(net, torch.randn(2, 14, 1, 8, 8), label, args).clamp(-1, 1)     # in two steps
print("pixels off", (images[:, None] - data).abs().flatten(2).mean(2).min(1).values.mean())
