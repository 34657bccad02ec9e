"""Networks of diffusers: their coordinates, captions, adapters; latents as a data set. Needs diffusers, but for a test."""
import json
import math
import subprocess
import sys
from copy import deepcopy
from types import SimpleNamespace

import numpy as np
import pipelines
import pytest
import torch
from conftest import ROOT, equal, weights

import cd
from common import export, latent, pipeline, sample
from common.data import load
from common.precond import EDM
from common.released import load as load_net

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
    net = EDM(latent.SD(pipe, pipeline.identity(pipe), prompts, size, channels, sd), sd, 0.0, dtype)
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
    """A loss that is a mean over many numbers, against float32 where nothing is scaled. float16, as it is on CUDA."""
    auto = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: auto(device, torch.float16, enabled=enabled))
    teacher = network(pipe, dtype=torch.float32)
    x, t = draw(teacher)
    y, grads = torch.tensor([0, 2]), []
    for dtype in (torch.bfloat16, torch.float32):
        net = adapted(teacher)
        net.dtype = dtype
        if dtype == torch.float32:
            monkeypatch.setattr(latent, "Scaled", SimpleNamespace(apply=lambda x, *_: x))
        (scale * net(x, t, y).square().sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in net.parameters()]) / scale)
    half, full = grads
    assert (half - full).norm() < 0.02 * full.norm() and ((half == 0) & (full != 0)).float().mean() < 0.02


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


def test_sampling_and_export(train, npz, pipe, tmp_path):
    """Prompts that are new, from a file; both forms of export against f itself, in one step and from edge to edge."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel
    for steps, flags in ((1, []), (2, ["--boundaries", "2"])):
        _, run = train("cd", "--dataset", str(npz), "--teacher", "auto", "--t-min", "0.0292", *flags,
                       "--lr", "0.01", "--warmup", "0", tiny=FAST)
        (tmp_path / "said.txt").write_text("a red bus\n\na circle\n")
        images, labels = sample.main([str(run), "--prompts", str(tmp_path / "said.txt"), "--n", "4", "--steps", str(steps),
                                      "--out", str(tmp_path / f"{steps}.npz")])
        assert images.shape == (4, 3, 32, 32) and labels.tolist() == [0, 1, 0, 1]
        one, _ = sample.main([str(run), "--prompts", "a circle", "--n", "2", "--steps", str(steps),
                              "--out", str(tmp_path / f"{steps}one.npz")])
        assert (one[1].int() - images[1].int()).abs().max() <= 1 and not torch.equal(one[0], images[0])
        out = export.main([str(run), str(tmp_path / f"out{steps}")])
        theirs = StableDiffusionPipeline.from_pretrained(out, safety_checker=None)
        theirs.set_progress_bar_config(disable=True)
        method, args, net = sample.load_run(run)
        z = torch.randn(steps, 1, 4, 16, 16, generator=torch.Generator().manual_seed(3))
        label = net.model.kwargs["prompts"].index(CAPTIONS[1])
        ours = method.sample(net, z, torch.tensor([label]), args)
        start = z[0] * math.sqrt(1 / (1 + args.t_max**-2))
        made = theirs(CAPTIONS[1], latents=start / theirs.scheduler.init_noise_sigma, num_inference_steps=steps,
                      guidance_scale=1.0, height=32, width=32, output_type="latent").images
        assert (made - ours).abs().max() < 0.03 * ours.abs().max()            # t_min, and the last alpha_bar
        plain = UNet2DConditionModel.from_pretrained(pipe / "unet")
        change = (plain.conv_in.weight - theirs.unet.conv_in.weight).abs().max()
        assert change == 0 and not torch.equal(plain.mid_block.resnets[0].conv1.weight,
                                               theirs.unet.mid_block.resnets[0].conv1.weight)


def test_adapters_for_load_lora_weights(train, npz, pipe, tmp_path):
    pytest.importorskip("peft")
    from diffusers import StableDiffusionPipeline
    _, run = train("cd", "--dataset", str(npz), "--teacher", "auto", "--lr", "0.01", "--warmup", "0", tiny=FAST)
    out = export.main([str(run), str(tmp_path / "out")])
    merged, plain = (StableDiffusionPipeline.from_pretrained(p, safety_checker=None).unet for p in (out, pipe))
    theirs = StableDiffusionPipeline.from_pretrained(pipe, safety_checker=None)
    theirs.load_lora_weights(out)
    x, h = torch.randn(1, 4, 16, 16), torch.randn(1, 12, 32)
    a, b, c = (net(x, 500, encoder_hidden_states=h).sample for net in (merged, theirs.unet, plain))
    assert (a - b).abs().max() < 1e-4 < (a - c).abs().max()


def test_a_pipeline_that_moved(train, npz, pipe, tmp_path, capsys):
    """It is named anew, and must be the same."""
    import shutil
    home, data = tmp_path / "home", tmp_path / "moved.npz"
    shutil.copytree(pipe, home)
    latent.write(data, torch.randn(4, 4, 16, 16), CAPTIONS + CAPTIONS[:1], home, 32)
    _, run = train("ect", "--dataset", str(data), "--teacher", "auto", "--iters", "2", tiny=FAST)
    home.rename(tmp_path / "away")
    out = str(tmp_path / "x.png")
    for go in (lambda *more: sample.main([str(run), "--n", "2", "--out", out, *more]),
               lambda *more: train("ect", "--resume", str(run), "--grid", "2", *more)):
        with pytest.raises(SystemExit) as e:
            go()
        assert e.value.code == 2 and "--pipeline" in capsys.readouterr().err
    sample.main([str(run), "--n", "2", "--out", out, "--pipeline", str(tmp_path / "away")])
    train("ect", "--resume", str(run), "--teacher", str(tmp_path / "away"), "--grid", "2")
    file = tmp_path / "away/scheduler/scheduler_config.json"
    file.write_text(file.read_text().replace("0.012", "0.013"))
    with pytest.raises(SystemExit):
        sample.main([str(run), "--n", "2", "--out", str(tmp_path / "y.png"), "--pipeline", str(tmp_path / "away")])
    assert "not the pipeline" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["cd", "ect"])
def test_a_ddpm_as_teacher(train, ddpm, tmp_path, method):
    np.savez(tmp_path / "p.npz", images=np.random.default_rng(0).integers(0, 255, (20, 16, 16, 3), np.uint8))
    metrics, run = train(method, "--dataset", str(tmp_path / "p.npz"), "--teacher", str(ddpm), "--iters", "2", "--batch", "2",
                         "--grid", "4", "--save-every", "1", "--steps", "2", tiny=["--device", "cpu"])
    assert metrics["fd_pixels_2step"] > 0 and metrics["fd_pixels_teacher"] > 0
    net = load_net(run)
    assert isinstance(net.model, latent.SD) and sum(p.numel() for p in net.parameters()) > 1e5
    sample.main([str(run), "--n", "2", "--out", str(tmp_path / "x.png")])
    train(method, "--resume", str(run), "--iters", "3")


# ---- pictures with captions ----------------------------------------------------------------------
def picture(path, colour=(255, 0, 0), size=(40, 36)):
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_a_folder_is_encoded(pipe, tmp_path):
    """The mean of the posterior, scaled; labels that follow the captions, of which a list gives its first."""
    from diffusers import AutoencoderKL
    top = tmp_path / "pictures"
    for i, name in enumerate(("b.png", "a/c.jpg", "d.webp")):
        picture(top / name, (80 * i, 0, 250))
    rows = [dict(file_name="d.webp", text="a bus"), dict(file_name="b.png", caption=["a circle", "no"]),
            dict(file_name="a/c.jpg", prompt=" a bus ")]
    (top / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = latent.main([str(top), "--pipeline", str(pipe), "--size", "32", "--out", str(tmp_path / "o.npz")])
    data = load(str(out))
    assert data.names == ["a bus", "a circle"] and data.labels.tolist() == [0, 1, 0] and data.classes == 2
    assert data.images.shape == (3, 4, 16, 16) and data.images.dtype == torch.float16
    vae = AutoencoderKL.from_pretrained(pipe / "vae")
    x = torch.tensor([0, 0, 250]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 127.5 - 1       # b.png, of label 1
    z = vae.encode(x.contiguous()).latent_dist.mean * vae.config.scaling_factor
    assert (data.images[1].float() - z[0]).abs().max() < 2e-3
    back = pipeline.decode(str(pipe), data.images[:1], torch.device("cpu"))
    assert torch.allclose(back, vae.decode(data.images[:1].float() / vae.config.scaling_factor).sample, atol=1e-5)
    x, y = data.batch(0, 3)
    assert torch.equal(x.half().sort(0).values, data.images.sort(0).values)      # no pixels to be scaled


def test_captions_beside_pictures(tmp_path):
    for name in ("a.png", "b.png"):
        picture(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"  {name[0]} red circle\n")
    assert latent.captions(tmp_path, ["a.png", "b.png"]) == ["a red circle", "b red circle"]


BAD = {
    "missing": (dict(), "without a caption"), "extra": ({"a.png": "x", "b.png": "y", "z.png": "z"}, "but no picture"),
    "empty": ({"a.png": "x", "b.png": " "}, "b.png"), "form": ("{}\n", "expected"), "number": ("7\n", "expected")}


@pytest.mark.parametrize("kind", BAD)
def test_captions_that_do_not_fit(tmp_path, pipe, kind, capsys):
    top, (rows, words) = tmp_path / "pictures", BAD[kind]
    for name in ("a.png", "b.png"):
        picture(top / name)
    text = rows if isinstance(rows, str) else "".join(json.dumps(dict(file_name=k, text=v)) + "\n" for k, v in rows.items())
    if text:
        (top / "metadata.jsonl").write_text(text)
    with pytest.raises(SystemExit) as e:
        latent.main([str(top), "--pipeline", str(pipe), "--size", "32", "--out", str(tmp_path / "o.npz")])
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and len(err.splitlines()) == 1 and not list(tmp_path.glob("o.*"))


# ---- refusals ------------------------------------------------------------------------------------
def edited(pipe, to, file, **changes):
    import shutil
    shutil.copytree(pipe, to)
    path = to / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return to


CHANGES = {
    "xl": ("model_index.json", dict(_class_name="StableDiffusionXLPipeline"), "StableDiffusionXLPipeline"),
    "zero snr": ("scheduler/scheduler_config.json", dict(rescale_betas_zero_terminal_snr=True), "rescale_betas"),
    "cosine": ("scheduler/scheduler_config.json", dict(beta_schedule="squaredcos_cap_v2"), "squaredcos"),
    "sample": ("scheduler/scheduler_config.json", dict(prediction_type="sample"), "sample"),
    "other unet": ("unet/config.json", dict(_class_name="UNet3DConditionModel"), "UNet3D"),
    "inputs": ("unet/config.json", dict(addition_embed_type="text_time", addition_time_embed_dim=8,
                                        projection_class_embeddings_input_dim=80), "inputs")}


@pytest.mark.parametrize("kind", CHANGES)
def test_other_pipelines_are_refused(pipe, npz, tmp_path, kind, capsys):
    file, changes, words = CHANGES[kind]
    new = edited(pipe, tmp_path / "p", file, **changes)
    with pytest.raises(SystemExit) as e:
        latent.SD(new, pipeline.identity(new), CAPTIONS, 16, 4)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_missing(pipe, npz, tmp_path, name, capsys):
    import shutil
    new = tmp_path / "p"
    shutil.copytree(pipe, new)
    shutil.rmtree(new / name)
    with pytest.raises(SystemExit) as e:
        latent.SD(new, pipeline.identity(new), CAPTIONS, 16, 4)
        pipeline.code.cache_clear()
        pipeline.decode(str(new), torch.zeros(1, 4, 16, 16), torch.device("cpu"))
    err = capsys.readouterr().err
    assert e.value.code == 2 and name in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [
    ("cd", "--flip"), ("cd", "--distance", "lpips"), ("cd", "--fid", "100"), ("cd", "--compile"), ("cd", "--no-cond"),
    ("cd", "--teacher", "train"), ("ect", "--teacher", "none"), ("scm",), ("rcm",), ("cd", "--teacher", "/etc")])
def test_what_is_not_for_latents(train, npz, tmp_path, monkeypatch, words, capsys):
    from common import assets
    monkeypatch.setattr(assets, "inception", lambda data_dir: torch.nn.Linear(1, 1))
    method, *flags = words
    teacher = () if "--teacher" in flags else ("--teacher", "auto")
    with pytest.raises(SystemExit) as e:
        train(method, "--dataset", str(npz), *teacher, *flags, tiny=FAST)
    err = capsys.readouterr().err
    assert e.value.code == 2 and len(err.splitlines()) == 1, err
    assert not (tmp_path / "runs").exists()


def test_text_flags_need_text(train, npz, tmp_path, capsys):
    _, run = train("ect", "--iters", "1")
    _, text = train("ect", "--dataset", str(npz), "--teacher", "auto", "--steps", "2", tiny=FAST)
    out = ["--out", str(tmp_path / "x.png")]
    capsys.readouterr()
    for flags in ([str(run), "--prompts", "a bus"], [str(text), "--edit", "inpaint"], [str(text), "--find-ts"],
                  [str(text), "--prompts", " "]):
        with pytest.raises(SystemExit) as e:
            sample.main([*flags, *(out if "--find-ts" not in flags else [])])
        assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "x.png").exists()


def test_without_diffusers(tmp_path):
    """One line, whatever is installed; nothing of it is imported by other runs."""
    top = tmp_path / "pictures"
    picture(top / "a.png")
    (top / "a.txt").write_text("a circle")
    (tmp_path / "p/unet").mkdir(parents=True)
    (tmp_path / "p/model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    code = ("import sys; sys.modules['diffusers'] = None; sys.modules['transformers'] = None\n"
            "from common import latent\nlatent.main(sys.argv[1:])")
    p = subprocess.run([sys.executable, "-c", code, str(top), "--pipeline", str(tmp_path / "p"), "--out", str(tmp_path / "o.npz"),
                        "--size", "32"], cwd=ROOT, capture_output=True, text=True)
    assert p.returncode == 2 and p.stderr.strip().splitlines()[-1].startswith("error:") and "pip install" in p.stderr
    assert not list(tmp_path.glob("o.*"))
    p = subprocess.run([sys.executable, "-c", "import ect, common.sample, sys; sys.exit('diffusers' in sys.modules)"], cwd=ROOT)
    assert p.returncode == 0


@pytest.mark.parametrize("change", [dict(images=np.zeros((12, 16, 16, 4), np.float32)), dict(labels=np.full(12, 3)),
                                    dict(images=np.full((12, 16, 16, 4), np.nan, np.float16)), dict(prompts=None)])
def test_a_file_of_latents_that_is_damaged(npz, tmp_path, change, capsys):
    whole = {k: v for k, v in (dict(np.load(npz)) | change).items() if v is not None}
    np.savez(tmp_path / "bad.npz", **whole)
    with pytest.raises(SystemExit) as e:
        load(str(tmp_path / "bad.npz"))
    assert e.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_latents_are_no_pictures(npz, capsys):
    from common import edit, fid
    for call in (lambda: fid.main([str(npz), str(npz)]), lambda: edit.read_images(str(npz), 16, 4)):
        with pytest.raises(SystemExit) as e:
            call()
        assert e.value.code == 2 and "latents" in capsys.readouterr().err


def test_captions_are_part_of_the_data(npz, tmp_path):
    """Other captions, or another place of the pipeline: the SHA-256 follows the former alone."""
    data = load(str(npz))
    for change, same in ((dict(prompts=np.array(["a", "b", "c"])), False), (dict(pipeline="/elsewhere"), True)):
        np.savez(tmp_path / "x.npz", **dict(np.load(npz)) | change)
        assert (load(str(tmp_path / "x.npz")).sha256 == data.sha256) == same


def test_the_page_of_a_run_on_latents(train, npz, tmp_path):
    from common import compare
    _, run = train("ect", "--dataset", str(npz), "--teacher", "auto", "--steps", "2", tiny=FAST)
    compare.main([str(run), "--out", str(tmp_path / "report.html")])
    text = (tmp_path / "report.md").read_text()
    assert "FD (latents) of 12 images" in text and "12 images 3 x 32 x 32" in text and "damaged" not in text
