"""Networks of diffusers: their coordinates, captions, adapters; latents as a data set. Needs diffusers, but for a test."""
import json
import math
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pipelines
import pytest
import torch
from conftest import ROOT, equal, lines, weights

import cd
from common import export, latent, sample
from common.data import load
from common.flags import parse
from common.precond import EDM
from common.released import load as load_net

needs = pytest.mark.skipif(not all(map(pytest.importorskip, ())) or not __import__("importlib").util.find_spec("diffusers"),
                           reason="needs diffusers and transformers")
CAPTIONS = ["a red circle", "a blue bus at the left", "a square"]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    return tmp_path_factory.mktemp("pipelines")


@pytest.fixture(scope="session")
def pipe(folder):
    return pipelines.text_to_image(folder / "sd")


@pytest.fixture(scope="session")
def ddpm(folder):
    return pipelines.pixels(folder / "ddpm")


@pytest.fixture(scope="session")
def npz(folder, pipe):
    """Twelve random latents with three captions."""
    z = torch.randn(12, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    latent.write(folder / "tiny.npz", z, CAPTIONS * 4, pipe, 32)
    return folder / "tiny.npz"


def network(pipe, prompts=CAPTIONS, size=16, channels=4, sd=1.0, dtype=torch.float64):
    net = EDM(latent.SD(pipe, latent.identity(pipe), prompts, size, channels, sd), sd, 0.0, dtype)
    return net.to(dtype).requires_grad_(False)


def adapted(net, rank=4, seed=0, **flags):
    """A student with adapters that do something."""
    torch.manual_seed(seed)
    flags = dict(lora=rank, checkpoint_acts=False, bf16=False) | flags
    model = net.model.student(SimpleNamespace(**flags)).to(net.dtype)
    g = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if rank and name.endswith("up"):
            p.data = 0.1 * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
    return EDM(model, net.sd, net.t_min, net.dtype)


def draw(net, n=2, t=2.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    c, size = net.model.kwargs["channels"], net.model.kwargs["size"]
    z = torch.randn(n, c, size, size, generator=g, dtype=torch.float64).to(net.dtype)
    return z * math.sqrt(t**2 + net.sd**2), torch.full((n, 1, 1, 1), t, dtype=net.dtype)


# ---- coordinates ---------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_step_of_ddim_is_eulers_step(folder, kind):
    """F's sign or scale, c_in, the time of a noise level, v taken for eps."""
    from diffusers import DDIMScheduler
    pipe = pipelines.text_to_image(folder / kind, prediction_type=kind)
    net, y = network(pipe), torch.tensor([1, 0])
    ddim = DDIMScheduler.from_pretrained(pipe / "scheduler")
    ddim.set_timesteps(50)
    a = ddim.alphas_cumprod.double()
    sigma = ((1 - a) / a).sqrt()
    for step in (981, 781, 381, 21):
        x, t = draw(net, t=float(sigma[step]))
        said = net.model.text(net.model.tokens[y])[0]
        out = net.model.unet(x * a[step].sqrt(), torch.tensor(step), encoder_hidden_states=said).sample
        theirs = ddim.step(out, step, x * a[step].sqrt()).prev_sample / a[step - 20].sqrt()
        ours = cd.line(x, net(x, t, y), t, 0, sigma[step - 20])           # straight on to the denoised image
        assert (ours - theirs).abs().max() < 2e-5 * x.abs().max()
        assert abs(net.model.timestep(t.flatten()) - step).max() < 1e-3


@pytest.mark.parametrize("sd", [1.0, 0.5])
def test_a_ddpm_of_pixels(ddpm, sd):
    """D = x - t eps at any sd: a formula that holds for 1 alone."""
    from diffusers import DDPMScheduler
    net = network(ddpm, (), 16, 3, sd)
    a = DDPMScheduler.from_pretrained(ddpm / "scheduler").alphas_cumprod.double()
    for step in (0, 300, 999):
        x, t = draw(net, t=float(((1 - a[step]) / a[step]).sqrt()))
        eps = net.model.unet(x * a[step].sqrt(), torch.tensor(step)).sample
        assert (net(x, t) - (x - t * eps)).abs().max() < 1e-5 * x.abs().max()


def test_the_captions_a_network_hears(pipe):
    """Label i is caption i; -1 and None are the empty one; `say` changes them."""
    net = network(pipe)
    x, t = draw(net, 4)
    hear = lambda text: net.model.text(torch.tensor(net.model.tokenizer([text], padding="max_length", max_length=12).input_ids))[0]
    step = net.model.timestep(t.flatten())
    texts = [CAPTIONS[2], CAPTIONS[0], "", CAPTIONS[1]]
    eps = net.model.unet(x / (1 + t**2).sqrt(), step, encoder_hidden_states=torch.cat([hear(s) for s in texts])).sample
    assert torch.allclose(net(x, t, torch.tensor([2, 0, -1, 1])), x - t * eps, atol=1e-9)
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), -1)))
    net.model.say(["a bus"])
    assert not torch.allclose(net(x, t, torch.zeros(4, dtype=torch.int64)), net(x, t))
    assert net.model.kwargs["classes"] == 1 and net.model.kwargs["prompts"] == ["a bus"]


def test_guidance_is_that_of_the_pipeline(pipe):
    """Six guided steps of diffusers' own pipeline at guidance_scale w + 1."""
    from diffusers import StableDiffusionPipeline
    w, net = 6.5, network(pipe, dtype=torch.float32)
    theirs = StableDiffusionPipeline.from_pretrained(pipe, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    z = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    seen = theirs(CAPTIONS[1], latents=z, num_inference_steps=6, guidance_scale=w + 1, height=32, width=32,
                  output_type="latent").images
    sigma = net.model.ln_sigma.exp()
    steps = [*theirs.scheduler.timesteps.tolist(), 0]
    args = SimpleNamespace(guidance=w, solver="euler")
    x = z * (1 + sigma[steps[0]] ** 2).sqrt()
    for i, r in zip(steps, steps[1:]):
        t, r = sigma[i].float().view(1, 1, 1, 1), sigma[r].float()
        x = cd.solve(net, x, t, r, torch.tensor([1]), args)
    assert (x / (1 + sigma[0] ** 2).sqrt() - seen).abs().max() < 1e-4 * seen.abs().max()


def test_the_grid_is_even_in_stable_diffusions_time(pipe):
    args = SimpleNamespace(rho=0, t_min=0.02917, t_max=14.6146)
    edges = network(pipe).model.timestep(cd.karras(5, args))
    assert (edges - torch.tensor([0, 250, 500, 750, 999])).abs().max() < 1.0
    table = network(pipe).model.ln_sigma.exp()
    assert (cd.karras(1000, args) / table - 1).abs().max() < 2e-3


# ---- adapters ------------------------------------------------------------------------------------
def test_a_new_student_is_its_teacher(pipe):
    net = network(pipe, dtype=torch.float32)
    x, t = draw(net)
    y = torch.tensor([0, 2])
    for rank in (4, 0):
        flags = SimpleNamespace(lora=rank, checkpoint_acts=False, bf16=False)
        assert torch.equal(EDM(net.model.student(flags), 1.0)(x, t, y), net(x, t, y))


def test_what_copies_share(pipe):
    """One frozen base; adapters of their own; a step of one leaves the others, and its state_dict, as they were."""
    teacher = network(pipe, dtype=torch.float32)
    net = adapted(teacher)
    ema = deepcopy(net).eval().requires_grad_(False)
    x, t = draw(net)
    y = torch.tensor([0, 2])
    before = teacher(x, t, y), ema(x, t, y)
    frozen = [{v.data_ptr() for v in n.model.frozen()} & {v.data_ptr() for v in teacher.model.frozen()}
              for n in (net, ema)]
    assert frozen[0] == frozen[1] and len(frozen[0]) >= len(list(teacher.model.unet.parameters()))
    own = {p.data_ptr() for p in net.parameters()}
    assert not own & {p.data_ptr() for p in ema.parameters()} and not own & frozen[0]
    assert {n.rpartition(".")[2] for n in net.state_dict()} == {"down", "up"}
    opt = torch.optim.SGD(net.parameters(), 0.1)
    net(x, t, y).square().sum().backward()
    opt.step()
    assert torch.equal(teacher(x, t, y), before[0]) and torch.equal(ema(x, t, y), before[1])
    assert not torch.allclose(net(x, t, y), before[1])
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1.0)
    assert torch.equal(ema(x, t, y), net(x, t, y))


def test_without_adapters_all_weights_are_the_students_own(pipe):
    teacher = network(pipe, dtype=torch.float32)
    net = adapted(teacher, rank=0)
    count = sum(p.numel() for p in teacher.model.unet.parameters())
    assert sum(p.numel() for p in net.parameters()) == count
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in teacher.model.unet.parameters()}


def test_checkpoint_acts(pipe):
    """The same gradients, with a call of another network between forward and backward; less is kept."""
    teacher = network(pipe, dtype=torch.float32)
    x, t = draw(teacher)
    y, seen = torch.tensor([0, 2]), []
    for on in (False, True):
        net, kept = adapted(teacher, checkpoint_acts=on), []
        with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
            loss = net(x, t, y).square().sum()
        with torch.no_grad():
            teacher(x, t, y)
        loss.backward()
        seen.append(([p.grad for p in net.parameters()], sum(kept)))
    assert all(map(torch.equal, seen[0][0], seen[1][0])) and seen[1][1] < seen[0][1] / 2


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_gradients_do_not_vanish_in_half_precision(pipe, monkeypatch, scale):
    """A loss that is a mean over many numbers. float16, as it is on CUDA."""
    auto = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: auto(device, torch.float16, enabled=enabled))
    teacher = network(pipe, dtype=torch.float32)
    x, t = draw(teacher)
    y, grads = torch.tensor([0, 2]), []
    for dtype in (torch.float32, torch.bfloat16):
        net = adapted(teacher)
        net.dtype = dtype
        (scale * net(x, t, y).square().sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]) / scale)
    assert (grads[1] - grads[0]).norm() < 0.02 * grads[0].norm()
    assert ((grads[1] == 0) & (grads[0] != 0)).float().mean() < 0.02


# ---- runs ----------------------------------------------------------------------------------------
FAST = ["--device", "cpu", "--iters", "2", "--batch", "2", "--grid", "4", "--save-every", "1", "--log-every", "1", "--lora", "2",
        "--no-checkpoint-acts"]


@pytest.mark.parametrize("method", ["cd", "ct", "ict", "ect"])
def test_a_run_on_latents(train, npz, pipe, method):
    """It starts from the pipeline of the latents, and is resumed to the same weights."""
    flags = ["--guidance", "2", "--boundaries", "2"] if method == "cd" else ["--steps", "2"]
    metrics, run = train(method, "--dataset", str(npz), "--teacher", "auto", *flags, tiny=FAST)
    assert metrics["fd_latents_2step"] > 0 and "lora" in " ".join(weights(run))
    config = json.loads((run / "config.json").read_text())
    assert config["about"]["network"] == "of sd, LoRA 2" and config["about"]["classes"] == sorted(CAPTIONS)
    from PIL import Image
    assert Image.open(next(run.glob("samples/*2step.png"))).size == (65, 65)     # 2 x 2 pictures of 32 x 32
    half, place = run.parent / "half", run / "ckpt.prev.pt"
    run.rename(half)
    (half / "ckpt.pt").unlink()
    place = half / "ckpt.prev.pt"
    place.rename(half / "ckpt.pt")
    assert torch.load(half / "ckpt.pt")["it"] == 1
    train(method, "--resume", str(half))
    again, _ = train(method, "--dataset", str(npz), "--teacher", "auto", *flags, tiny=FAST)
    assert equal(weights(half), weights(run.parent / run.name))
