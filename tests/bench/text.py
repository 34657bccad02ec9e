"""Text to image on `common.shapes`: what a run's few network calls give, beside DDIM's.

python -m tests.bench.text OUT.png shapes/shapes.npz RUN..    prints a table, draws a picture

Of each caption of the data (seen) and of shapes.HELD_OUT, one picture from the same noise. The reference is what 48
guided steps of DDIM make of it; "distance" is the mean square of latents from that, FD that of latents from the data's
(captions that are seen), "right" how often the judge of shapes sees the colour and the place, and the shape."""
import argparse
from types import SimpleNamespace

import torch
from PIL import Image

import cd
from common import fid, pipeline, sample, shapes
from common.data import load
from common.latent import SD
from common.precond import EDM
from tests.bench.pictures import sheet

GUIDANCE, BATCH = 1.0, 256
RANGE = dict(rho=0, t_min=0.02917, t_max=14.6146)         # of Stable Diffusion's noise


@torch.no_grad()
def ddim(net, noise, y, n, w):
    """n steps of DDIM, which are Euler's, from the same noise as a run's; latents [B,C,H,W]."""
    args = SimpleNamespace(guidance=w, solver="euler", **RANGE)
    ts, x = cd.karras(n + 1, args).flip(0).to(noise), RANGE["t_max"] * noise[0]
    for t, r in zip(ts, ts[1:]):
        x = cd.solve(net, x, t.expand(len(x), 1, 1, 1), r, y, args)
    return x


def makers(teacher, runs):
    """{name: (network calls, function(noise [K,B,..], y, captions) -> latents)}; the first is the reference."""
    def by_ddim(n, w):
        return lambda noise, y, captions: ddim(teacher, noise, y, n, w)
    found = {"DDIM, 48 guided steps": (96, by_ddim(48, GUIDANCE))}
    found |= {f"DDIM, {n} guided step{'s' * (n > 1)}": (2 * n, by_ddim(n, GUIDANCE)) for n in (1, 2, 4)}
    found |= {f"DDIM, {n} step{'s' * (n > 1)}": (n, by_ddim(n, 0.0)) for n in (1, 2, 4)}
    for path in runs:
        method, args, net = sample.load_run(path)
        own = f"{method.__name__}, {args.boundaries} boundaries" if getattr(args, "boundaries", 1) > 1 else method.__name__
        for k in [args.steps] if args.t_mid is None else sorted({1, args.steps}):
            def make(noise, y, captions, k=k, method=method, args=args, net=net):
                net.model.say(captions)
                return method.sample(net, noise[:k], y, args)
            found[f"{own}, {k} step{'s' * (k > 1)}"] = k, make
    return found


def measure(data, teacher, runs, n):
    """Rows of the table, and {name: latents of the seen captions}."""
    rows, made, reference = [], {}, {}
    sets = dict(seen=data.names, held=shapes.HELD_OUT)
    for name, (calls, make) in makers(teacher, runs).items():
        row = [name, calls]
        for kind, captions in sets.items():
            teacher.model.say(captions)
            ids = torch.arange(n)
            z = torch.cat([make(fid.noise_of(i, 4, data.images.shape[1:], "cpu").float(), i % len(captions), captions)
                           for i in ids.split(BATCH)]).float()
            reference.setdefault(kind, z)
            said = [captions[i % len(captions)] for i in ids]
            right = shapes.judge(fid.quantise(pipeline.decode(data.latent["pipeline"], z, "cpu"))) == shapes.indices(said)
            row += [float((z - reference[kind]).square().mean())]
            row += [fid.fd_pixels(data.images[fid.chosen(data, n)], z)] if kind == "seen" else []
            row += [float(right[:2].all(0).double().mean()), float(right[2].double().mean())]
            made.setdefault(name, z)
        rows.append(row)
    return rows, made


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("data")
    ap.add_argument("runs", nargs="*")
    ap.add_argument("--n", type=int, default=512)
    a = ap.parse_args(argv)
    data = load(a.data)
    about, (_, channels, size, _) = data.latent, data.images.shape
    teacher = EDM(SD(about["pipeline"], about["sha256"], data.names, size, channels), 1.0).eval().requires_grad_(False)
    rows, made = measure(data, teacher, a.runs, a.n)
    print("| | calls | distance | FD | colour and place right | shape | held out: distance | colour and place | shape |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, calls, d, fd, right, shape, d2, right2, shape2 in rows:
        print(f"| {name} | {calls} | {d:.3f} | {fd:.2f} | {right:.0%} | {shape:.0%} | {d2:.3f} | {right2:.0%} | {shape2:.0%} |")
    strips = []
    for name, z in made.items():
        x = fid.quantise(pipeline.decode(about["pipeline"], z[:16], "cpu")).permute(2, 0, 3, 1).flatten(1, 2)
        strips.append((name.removeprefix("DDIM, 48 ").replace(" boundaries", " jumps"), Image.fromarray(x.numpy())))
    sheet(strips).save(a.out)


if __name__ == "__main__":
    main()
