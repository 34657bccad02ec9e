"""python -m common.shapes --out shapes

Pictures of coloured shapes with captions, and a small text-to-image model of them, made without a download: what the
methods are shown on for text to image. Some captions are held out. The model is Stable Diffusion in small: a CLIP text
encoder and a U-Net, trained here, on latents for which a linear code of 4x4 patches, not a VAE, is good enough.

    shapes/pipeline/       the model, in the layout of Stable Diffusion's folders
    shapes/shapes.npz      the pictures as latents, with their captions
    shapes/held_out.txt    the captions that are not in the data, one a line"""
import argparse
import json
import math
import os
import tempfile
from copy import deepcopy
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import trange

from common import folder
from common.flags import LARGEST, BadInput, Parser, device_of, say
from common.pipeline import Patches, identity

COLOURS = dict(red=(1, .15, .15), green=(.15, .8, .2), blue=(.2, .35, 1), yellow=(1, .9, .1), purple=(.7, .2, .85),
               white=(1, 1, 1))
PLACES = {"in the middle": (16, 16), "at the left": (8, 16), "at the right": (24, 16), "at the top": (16, 8),
          "at the bottom": (16, 24)}                      # x, y of the centre
SHAPES = ("triangle", "circle", "square")
CAPTIONS = [f"a {c} {s} {p}" for c, p, s in product(COLOURS, PLACES, SHAPES)]
HELD_OUT = CAPTIONS[3::7]                                 # a stride that gets around to each word
PROMPTS = [c for c in CAPTIONS if c not in HELD_OUT]
PREDICTION = "v_prediction"                               # or "epsilon", as SD 1: at high noise far slower to learn
RGB, CENTRES, PIXEL = torch.tensor([*COLOURS.values()]), torch.tensor([*PLACES.values()]).float(), torch.arange(32) + .5


# ---- pictures ------------------------------------------------------------------------------------
def indices(captions):
    """N captions -> int64 [3,N]: colour, place and shape as indices into the lists above."""
    kinds = torch.tensor([CAPTIONS.index(c) for c in captions])
    return torch.stack(torch.unravel_index(kinds, (len(COLOURS), len(PLACES), len(SHAPES))))


def render(captions, seed):
    """N captions -> pictures uint8 [N,3,32,32]; exact place, size, brightness, background: of the seed."""
    colour, place, shape = indices(captions)
    u = torch.rand(5, len(captions), 1, 1, generator=torch.Generator().manual_seed(seed))
    x, y = CENTRES[place].T[..., None, None] + 3 * u[:2] - 1.5
    r, dx, dy = 4.5 + 1.5 * u[2], (PIXEL - x).abs(), PIXEL[:, None] - y
    triangle = torch.maximum(dy, .75**.5 * dx - dy / 2) - .55 * r         # signed distances, negative inside
    far = torch.stack([triangle, torch.hypot(dx, dy) - r, torch.maximum(dx, dy.abs()) - .85 * r])
    cover = (.5 - far[shape, torch.arange(len(shape))]).clamp(0, 1)[:, None]
    front, ground = RGB[colour, :, None, None] * (.75 + .25 * u[3][:, None]), .1 + .2 * u[4][:, None]
    return (255 * torch.lerp(ground, front, cover)).round().byte()


def judge(pictures):
    """uint8 [N,3,32,32] -> int64 [3,N]: colour, place, shape as in `indices`, by rules; -1: nothing is seen."""
    x = pictures.float() / 255
    border = torch.cat([x[..., 0], x[..., -1], x[..., 0, :], x[..., -1, :]], -1).median(-1).values
    far = (x - border[..., None, None]).norm(dim=1)       # of a pixel's colour from the background's
    peak = far.flatten(1).topk(16).values.mean(1)[:, None, None]
    colour = torch.einsum("nchw,nhw->nc", x, (far > .7 * peak).float())   # without those that the edge runs through
    colour = torch.cosine_similarity(colour[:, None], RGB, dim=2).argmax(1)
    w = (far / peak).clamp(max=1) * (far > .3 * peak)
    w = w / w.sum((1, 2), keepdim=True)
    centre = torch.stack([w.sum(1) @ PIXEL, w.sum(2) @ PIXEL])
    place = torch.cdist(centre.T, CENTRES).argmin(1)
    dx, dy = PIXEL - centre[..., None]

    def moment(i, j):
        return torch.einsum("nyx,nx,ny->n", w, dx**i, dy**j)
    points_up = (moment(0, 3) - moment(2, 1)) / moment(0, 2)**1.5 < -.4   # a triangle has -1.1, the others 0
    corners = moment(2, 2) / (moment(2, 0) * moment(0, 2)) > .87          # a square has 1, a circle 2/3
    return torch.where(peak.flatten() < .15, -1, torch.stack([colour, place, torch.where(points_up, 0, 1 + corners)]))


def shares(pictures, captions):
    """How many of the pictures show what their captions say, as a line."""
    right = judge(pictures) == indices(captions)
    both, each = right[:2].all(0).float().mean(), right.float().mean(1)
    return f"colour and place {both:.1%} right (colour {each[0]:.1%}, place {each[1]:.1%}), shape {each[2]:.1%}"


def code(images):
    """Principal components of the 4x4 patches of images [N,3,H,W], scaled to variance 1 each."""
    p = torch.nn.functional.pixel_unshuffle(images, 4).transpose(0, 1).flatten(1).double()
    variance, rows = torch.linalg.eigh(p.cov())
    return Patches(p.mean(1).float(), (rows / variance.sqrt()).T.flip(0)[:12].float().contiguous())


# ---- the model -----------------------------------------------------------------------------------
def tokenizer(path):
    """A CLIP tokenizer, written to `path`, with a token for each word: joined from the left, letter by letter."""
    from transformers import CLIPTokenizer
    words = sorted({w for c in CAPTIONS for w in c.split()}, key=lambda w: (-len(w), w))  # green: gr before red's re
    merges = dict.fromkeys((w[:i], w[i] + "</w>" * (i == len(w) - 1)) for w in words for i in range(1, len(w)))
    letters = [chr(i) + end for end in ("", "</w>") for i in range(97, 123)]
    vocab = [*letters, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    path.mkdir()
    (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}))
    (path / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, merges)]) + "\n")
    return CLIPTokenizer.from_pretrained(path, model_max_length=8)


def pipeline(words):
    """An untrained pipeline of diffusers for the tokenizer `words`, but for the VAE, which diffusers does not know."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(words), hidden_size=64, intermediate_size=256, projection_dim=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=8, bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id, pad_token_id=words.pad_token_id))
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=12, out_channels=12, block_out_channels=(64, 96), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        cross_attention_dim=64, attention_head_dim=4, norm_num_groups=16)
    schedule = DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear", clip_sample=False,
                             prediction_type=PREDICTION, set_alpha_to_one=False, steps_offset=1,
                             timestep_spacing="trailing")
    return StableDiffusionPipeline(None, text, words, unet, schedule, None, None, requires_safety_checker=False)


def train(pipe, latents, labels, a, report):
    """Minimise |v - v(x_t, t, caption)|^2, v = a eps - s x0 (arXiv:2202.00512, App. D), or the same of eps. The
    average of the weights is left in the pipeline, which report() judges after each quarter.
    latents [N,12,8,8]; labels int64 [N] into PROMPTS."""
    tokens = pipe.tokenizer([*PROMPTS, ""], padding="max_length", return_tensors="pt").input_ids.to(latents.device)
    ema = torch.nn.ModuleList([pipe.unet, pipe.text_encoder])
    unet, text = net = deepcopy(ema).train().requires_grad_()
    ema.eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), lr=a.lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(
        opt, lambda it: min(1, (it + 1) / 100) * (1 + math.cos(math.pi * it / a.iters)) / 2)
    bar, mean = trange(1, a.iters + 1, desc="shapes", mininterval=2), 1.0
    for it in bar:
        i, t = torch.randint(len(labels), (a.batch,)), torch.randint(1000, (a.batch,), device=labels.device)
        x0, y = latents[i], torch.where(torch.rand(t.shape, device=t.device) < .1, -1, labels[i])     # -1: no caption
        eps = torch.randn_like(x0)
        F = unet(pipe.scheduler.add_noise(x0, eps, t), t, text(tokens[y])[0]).sample
        target = eps if PREDICTION == "epsilon" else pipe.scheduler.get_velocity(x0, eps, t)
        loss = (F - target).square().mean()
        loss.backward()
        opt.step()
        opt.zero_grad()
        rate.step()
        with torch.no_grad():
            torch._foreach_lerp_([*ema.parameters()], [*net.parameters()], max(.002, 1 / it))
        mean += (loss.item() - mean) * max(.01, 1 / it)
        if not math.isfinite(mean):
            raise FloatingPointError(f"the loss of step {it:,} is not finite; try a lower --lr")
        bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
        if it % -(-a.iters // 4) == 0 or it == a.iters:
            say(f"step {it:,}: loss {mean:.4f}")
            report(260 if it == a.iters else 52)


def draw(pipe, captions, seed, w=1.0, steps=25):
    """N captions -> latents [N,12,8,8]: DDIM, guided by D + w (D - D_empty), which diffusers calls w + 1."""
    g = torch.Generator().manual_seed(seed)
    pipe.set_progress_bar_config(disable=True)
    return torch.cat([pipe(captions[i:i + 64], num_inference_steps=steps, guidance_scale=w + 1, generator=g,
                           output_type="latent").images for i in range(0, len(captions), 64)])


# ---- the command ---------------------------------------------------------------------------------
def make(path, out, a, device):
    """Write into the empty folder `path` what will be `out`."""
    torch.manual_seed(a.seed)
    captions, labels = [PROMPTS[i % len(PROMPTS)] for i in range(a.n)], torch.arange(a.n) % len(PROMPTS)
    pictures = render(captions, a.seed)
    vae = code(pictures / 127.5 - 1)
    latents = vae.encode(pictures / 127.5 - 1)
    (home := path / "pipeline").mkdir()
    pipe = pipeline(tokenizer(home / "tokenizer")).to(device)

    def pixels(latents):
        return vae.decode(latents.cpu()).add(1).mul(127.5).round().clamp(0, 255).byte()

    def report(n):
        for name, some in ("seen", PROMPTS), ("held out", HELD_OUT):
            some = [some[i * len(some) // n] for i in range(n)]
            say(f"  {n} of captions {name}: {shares(pixels(draw(pipe, some, a.seed)), some)}")
    say(f"real pictures: {shares(pictures, captions)}\n  as latents: {shares(pixels(latents), captions)}")
    train(pipe, latents.to(device), labels.to(device), a, report)

    pipe.save_pretrained(home)                            # the tokenizer's files stay, which versions differ about
    vae.save_pretrained(home / "vae")
    index = json.loads((home / "model_index.json").read_text()) | dict(vae=["common.pipeline", "Patches"])
    (home / "model_index.json").write_text(json.dumps(index, indent=2))
    np.savez(path / "shapes.npz", images=latents.permute(0, 2, 3, 1).half(), labels=labels, prompts=np.array(PROMPTS),
             pipeline=np.array(str(out / "pipeline")), sha256=np.array(identity(home)), size=32)
    (path / "held_out.txt").write_text("\n".join(HELD_OUT) + "\n")


@folder.guarded
def main(argv=None):
    ap = Parser(prog="python -m common.shapes", allow_abbrev=False, description=__doc__.split("\n\n", 1)[1],
                formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--out", default="shapes", help="the folder to make [%(default)s]")
    ap.add_argument("--device", choices=["auto", "cuda", "cpu", "mps"], default="auto", help="[%(default)s]")
    ap.add_argument("--lr", type=float, default=2e-3, help="highest learning rate [%(default)s]")
    counts = dict(iters=(3000, "training steps"), batch=(64, "pictures a step"), n=(8000, "pictures in the data set"),
                  seed=(0, "everything random follows from it"))
    for name, (usual, about) in counts.items():
        ap.add_argument(f"--{name}", type=int, default=usual, help=f"{about} [{usual}]")
    a = ap.parse_args(argv)
    for name, least in dict(iters=1, batch=1, n=len(PROMPTS), seed=0).items():
        if not least <= getattr(a, name) <= LARGEST:
            raise BadInput(f"--{name} must be at least {least} and at most {LARGEST:,}")
    if not 0 < a.lr < math.inf:
        raise BadInput("--lr must be a number above 0")
    out, device = Path(a.out).resolve(), device_of(a.device)
    if os.path.lexists(out):
        raise BadInput(f"--out {a.out} exists; name another folder, or remove it")
    try:
        import diffusers, transformers                    # noqa: E401, F401
    except ImportError:
        raise BadInput("this needs two more packages: pip install diffusers transformers")
    try:
        tmp = tempfile.TemporaryDirectory(dir=out.parent, prefix=".making-")
    except OSError as e:
        raise BadInput(f"--out {a.out}: {e.strerror}; name a folder in one that can be written to")
    with tmp:                                             # so that there is the whole of it, or nothing
        (made := Path(tmp.name) / "made").mkdir()
        make(made, out, a, device)
        os.rename(made, out)
    say(f"made: {out}")
    return out


if __name__ == "__main__":
    main()
