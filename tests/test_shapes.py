"""Captions, their pictures, the judge of pictures, the linear code, and the command that makes them into a data set."""
import builtins
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import snapshot

from common import shapes
from common.flags import BadInput
from common.pipeline import Patches
from common.shapes import CAPTIONS, COLOURS, HELD_OUT, PLACES, PROMPTS, SHAPES, indices, judge, render


@pytest.fixture(scope="module")
def captions():
    return [CAPTIONS[i % len(CAPTIONS)] for i in range(2000)]


@pytest.fixture(scope="module")
def pictures(captions):
    return render(captions, 0)


@pytest.fixture(scope="module")
def images(pictures):
    return pictures[::2] / 127.5 - 1


@pytest.fixture(scope="module")
def vae(images):
    return shapes.code(images)


# ---- pictures and their judge --------------------------------------------------------------------
def test_the_judge_reads_real_pictures(pictures, captions):
    """Rules that take a triangle for a circle, or a small yellow shape for a white one."""
    assert (judge(pictures) == indices(captions)).float().mean(1).min() > .99


def test_the_judge_notices_wrong_captions(pictures, captions):
    """A judge that agrees with whatever it is told; each of the three alone has to be noticed."""
    sizes = torch.tensor([len(COLOURS), len(PLACES), len(SHAPES)])[:, None]
    wrong = (indices(captions) + 1) % sizes
    assert (judge(pictures) == wrong).float().mean(1).max() < .01
    turned = pictures.flip(2)                             # upside down: the top becomes the bottom
    right = (judge(turned) == indices(captions)).float().mean(1)
    assert right[0] > .99 and .55 < right[1] < .65        # places on the middle line stay what they are


def test_the_judge_says_where_nothing_is():
    """Of an empty picture one judgement in 5 x 6 would be right by chance."""
    assert (judge(torch.full((2, 3, 32, 32), 40, dtype=torch.uint8)) == -1).all()


def test_a_caption_says_what_is_drawn():
    """Indices in another order than the captions': x for y, or colours of the wrong names."""
    red, left = render(["a red square at the left", "a white circle at the left"], 3)
    assert red[0].max() > 180 and red[1:].max() < 80
    assert left.float()[:, :, :16].std() > 10 * left.float()[:, :, 16:].std()


def test_the_seed_decides(captions):
    some = captions[:50]
    assert torch.equal(render(some, 1), render(some, 1)) and not torch.equal(render(some, 1), render(some, 2))


def test_held_out_captions_have_all_words():
    """A word that is never held out would not be tried in a new combination; one that only is could not be learnt."""
    assert set(HELD_OUT) | set(PROMPTS) == set(CAPTIONS) and not set(HELD_OUT) & set(PROMPTS)
    assert len(CAPTIONS) == len(set(CAPTIONS)) == 90 and len(HELD_OUT) == 13
    for some in HELD_OUT, PROMPTS:
        assert {w for c in some for w in c.split()} == {w for c in CAPTIONS for w in c.split()}


# ---- the linear code -----------------------------------------------------------------------------
def test_the_code_keeps_the_pictures(vae, images, captions):
    """Too few components, or those with the least variance."""
    z = vae.encode(images)
    assert z.shape == (1000, 12, 8, 8)
    again = vae.decode(z)
    assert (again - images).square().mean() < .004
    bytes_ = again.add(1).mul(127.5).round().clamp(0, 255).byte()
    assert (judge(bytes_) == indices(captions[::2])).float().mean(1).min() > .97


def test_latents_have_variance_1(vae, images):
    """Scales forgotten, or put in the place of their inverses."""
    z = vae.encode(images).transpose(0, 1).flatten(1)
    assert torch.allclose(z.std(1), torch.ones(12), atol=1e-3) and z.mean(1).abs().max() < 1e-3


def test_the_code_of_the_decoded(vae):
    """decode with the transpose of the basis, whose rows do not have norm 1."""
    z = torch.randn(3, 12, 4, 6)
    assert torch.allclose(vae.encode(vae.decode(z)), z, atol=1e-4)
    assert vae.decode(z).shape == (3, 3, 16, 24)


def test_the_code_comes_back_from_its_folder(vae, tmp_path):
    pytest.importorskip("safetensors")
    vae.save_pretrained(tmp_path / "vae")
    got = Patches.from_pretrained(tmp_path / "vae")
    assert json.loads((tmp_path / "vae/config.json").read_text())["_class_name"] == "Patches"
    assert torch.equal(got.basis, vae.basis) and torch.equal(got.mean, vae.mean) and got.patch == 4


# ---- the command ---------------------------------------------------------------------------------
SHORT = ["--iters", "2", "--batch", "4", "--n", "90", "--device", "cpu"]
DRAW, SHARES = shapes.draw, shapes.shares


def draw_few(monkeypatch):
    """The reports of a run cost far more than two steps."""
    monkeypatch.setattr(shapes, "draw", lambda pipe, captions, seed: DRAW(pipe, captions[:4], seed, steps=2))
    monkeypatch.setattr(shapes, "shares", lambda pictures, captions: SHARES(pictures, captions[:len(pictures)]))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What two steps of training leave."""
    pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    with pytest.MonkeyPatch.context() as m:
        draw_few(m)
        return shapes.main(["--out", str(tmp_path_factory.mktemp("shapes") / "made"), *SHORT])


def test_each_word_is_one_token(made):
    """Merges in an order that splits "green" where "red" has joined r and e; captions that are cut off."""
    from transformers import CLIPTokenizer
    words = CLIPTokenizer.from_pretrained(made / "pipeline/tokenizer")
    for c in CAPTIONS:
        ids = words(c).input_ids
        assert len(ids) == len(c.split()) + 2 <= words.model_max_length <= 12
        assert words.decode(ids, skip_special_tokens=True).strip() == c
        assert words.unk_token_id not in ids[:-1] and ids[0] == words.bos_token_id != ids[-1] == words.eos_token_id
    assert len(words("a crimson dot").input_ids) > 5      # other words are spelled, not lost


def test_the_parts_load(made):
    """A part forgotten or saved under another name; the schedule of another model."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer
    home = made / "pipeline"
    index = json.loads((home / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline" and index["vae"][1] == "Patches"
    assert {"vocab.json", "merges.txt"} <= {p.name for p in (home / "tokenizer").iterdir()}
    unet = UNet2DConditionModel.from_pretrained(home / "unet")
    text = CLIPTextModel.from_pretrained(home / "text_encoder")
    words = CLIPTokenizer.from_pretrained(home / "tokenizer")
    hidden = text(words(PROMPTS[:2], padding="max_length", return_tensors="pt").input_ids)[0]
    assert unet(torch.randn(2, 12, 8, 8), 5, hidden).sample.shape == (2, 12, 8, 8)
    assert 2.5e6 < sum(p.numel() for p in unet.parameters()) < 3.1e6
    config = DDIMScheduler.from_pretrained(home / "scheduler").config
    assert (config.beta_schedule, config.beta_start, config.beta_end) == ("scaled_linear", .00085, .012)
    assert (config.prediction_type, config.clip_sample, config.set_alpha_to_one) == (shapes.PREDICTION, False, False)
    assert Patches.from_pretrained(home / "vae").basis.shape == (12, 48)
    pipe = StableDiffusionPipeline.from_pretrained(home, vae=None, safety_checker=None)
    assert DRAW(pipe, PROMPTS[:3], 0, steps=2).shape == (3, 12, 8, 8)


def test_the_data(made):
    """Latents in another layout or of other pictures, labels that count all captions, a place that is left behind."""
    z = np.load(made / "shapes.npz")                      # no pickle
    assert z["images"].shape == (90, 8, 8, 12) and z["images"].dtype == np.float16
    assert z["labels"].dtype == np.int64 and z["prompts"].dtype.kind == "U" and z["prompts"].tolist() == PROMPTS
    assert str(z["pipeline"]) == str(made / "pipeline") and str(z["sha256"]) == shapes.identity(made / "pipeline")
    assert (made / "held_out.txt").read_text().splitlines() == HELD_OUT
    vae = Patches.from_pretrained(made / "pipeline/vae")
    images = vae.decode(torch.from_numpy(z["images"]).float().permute(0, 3, 1, 2))
    shown = judge(images.add(1).mul(127.5).round().clamp(0, 255).byte())
    assert (shown == indices(z["prompts"][z["labels"]].tolist())).float().mean() > .97


def test_training_moves_the_average(made):
    """An average that stays at its start: an untrained pipeline would be saved."""
    from safetensors.torch import load_file
    from transformers import CLIPTokenizer
    torch.manual_seed(0)
    start = shapes.pipeline(CLIPTokenizer.from_pretrained(made / "pipeline/tokenizer"))
    for part, file in (start.unet, "unet/diffusion_pytorch_model"), (start.text_encoder, "text_encoder/model"):
        weights = load_file(made / f"pipeline/{file}.safetensors")
        now = {k: v for k, v in part.state_dict().items() if k in weights}
        same = [torch.equal(weights[k], v) for k, v in now.items()]
        assert len(same) > 20 and sum(same) < .1 * len(same), file


class Text(torch.nn.Module):
    """token ids [B,1] -> ([B,1],), the ids as numbers; notes what it is asked."""
    asked = []

    def forward(self, tokens):
        Text.asked += tokens.flatten().tolist()
        return (tokens.float(),)


class Exact(torch.nn.Module):
    """What there is to learn where all latents of the caption with id k are k / 20: v, or eps, without an error."""
    def __init__(self, schedule):
        super().__init__()
        self.one, self.levels = torch.nn.Parameter(torch.ones(())), schedule.alphas_cumprod

    def forward(self, x, t, hidden):
        a, s = self.levels[t].sqrt()[:, None, None, None], (1 - self.levels[t]).sqrt()[:, None, None, None]
        z = hidden[..., None, None] / 20
        eps = (x - a * z) / s
        out = eps if shapes.PREDICTION == "epsilon" else a * eps - s * z
        return SimpleNamespace(sample=self.one * out)


@pytest.mark.parametrize("prediction", ["v_prediction", "epsilon"])
def test_the_loss_is_zero_where_the_network_is_exact(prediction, monkeypatch, capsys):
    """A sign, eps for v, another caption's tokens, captions dropped where none should be, or not at all."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(shapes, "PREDICTION", prediction)
    schedule = diffusers.DDIMScheduler(beta_start=.00085, beta_end=.012, beta_schedule="scaled_linear")
    ids = torch.arange(len(PROMPTS) + 1)[:, None]         # the last is the empty prompt's
    pipe = SimpleNamespace(unet=Exact(schedule), text_encoder=Text(), scheduler=schedule,
                           tokenizer=lambda captions, **_: SimpleNamespace(input_ids=ids[:len(captions)]))
    labels = torch.arange(200) % len(PROMPTS)
    latents = (labels / 20.)[:, None, None, None].expand(-1, 12, 8, 8)
    args = SimpleNamespace(iters=20, batch=75, lr=1e-6)
    Text.asked.clear()
    shapes.train(pipe, latents, labels, args, lambda n: None)
    assert "loss 0.0000" not in capsys.readouterr().out   # of the empty prompts nothing can be exact
    assert .06 < Text.asked.count(len(PROMPTS)) / 1500 < .14
    monkeypatch.setattr(torch, "rand", lambda shape, device: torch.ones(shape))
    shapes.train(pipe, latents, labels, args, lambda n: None)
    assert capsys.readouterr().out.count("loss 0.0000") == 4


def test_an_exception_leaves_nothing(tmp_path, monkeypatch, made):
    """Half a pipeline that the next command would take for a whole one."""
    def fails(*_):
        raise KeyError("in the middle")
    monkeypatch.setattr(shapes, "train", fails)
    with pytest.raises(KeyError):
        shapes.main(["--out", str(tmp_path / "new"), *SHORT])
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path, monkeypatch, capsys, made):
    draw_few(monkeypatch)
    with pytest.raises(SystemExit) as e:                  # at a rate that no weight survives
        shapes.main(["--out", str(tmp_path / "new"), *SHORT, "--lr", "1e30", "--iters", "4"])
    assert e.value.code == 1 and "--lr" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", [["--iters", "0"], ["--batch", "0"], ["--n", "5"], ["--seed", "-1"], ["--lr", "nan"],
                                   ["--lr", "0"], ["--size", "64"], ["--out", "no/such/folder"], ["--out", "full"],
                                   ["--out", "file"]], ids=" ".join)
def test_bad_input_is_one_line(flags, tmp_path, monkeypatch, capsys):
    """A traceback; a folder of somebody's overwritten."""
    for name in ("diffusers", "transformers"):            # it takes long to import what these checks do not need
        monkeypatch.setitem(sys.modules, name, sys)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for file in ("full/a", "file"):
        (tmp_path / file).write_text("mine")
    before = snapshot(tmp_path)
    with pytest.raises(BadInput) as e:
        shapes.main(flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert flags[0] in err and snapshot(tmp_path) == before


def test_without_diffusers_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    real = builtins.__import__

    def missing(name, *more):
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *more)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(BadInput):
        shapes.main(["--out", str(tmp_path / "new")])
    assert "pip install diffusers transformers" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_help_names_each_flag(capsys):
    with pytest.raises(SystemExit):
        shapes.main(["-h"])
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in ("out", "iters", "batch", "lr", "seed", "n", "device"))
    assert "shapes/pipeline/" in text
