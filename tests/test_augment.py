"""EDM's augmentation: every docstring says which mistake the test catches."""
import dataclasses
import json
import math

import pytest
import torch

from common import teacher
from common.augment import LABELS, augment, change, draw, labels
from common.data import load
from common.flags import parse
from common.networks import backbone, build
from common.precond import EDM, TrigFlow

NONE = dict.fromkeys(("flip_x", "flip_y", "scale", "turn", "stretch", "axis", "shift_x", "shift_y"), 0.0)


def changed(x, **how):
    """x after the changes `how`, the same for all images."""
    return change(x, {k: torch.full((len(x),), v) for k, v in (NONE | how).items()})


@pytest.fixture
def noise():
    return torch.randn(3, 2, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("how, same", [
    (dict(), lambda x: x), (dict(axis=1.0), lambda x: x), (dict(flip_x=1.0), lambda x: x.flip(3)),
    (dict(flip_y=1.0), lambda x: x.flip(2)), (dict(flip_x=1.0, flip_y=1.0), lambda x: x.flip(2, 3))])
def test_what_moves_no_pixel_off_the_grid_changes_no_value(how, same, noise):
    """A blur, half a pixel of shift, the wrong axis. White noise: any interpolation would show."""
    assert torch.allclose(changed(noise, **how), same(noise), atol=5e-5)


@pytest.mark.parametrize("quarters, flip_y", [(1, 0.0), (2, 0.0), (-1, 1.0)])
def test_quarter_turns(quarters, flip_y, noise):
    """The wrong sense or centre, a flip after the turn. Not exact: the filter is not symmetric; so of smooth images."""
    x = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    want = (x.flip(2) if flip_y else x).rot90(quarters, (2, 3))
    got = changed(x, turn=quarters * math.pi / 2, flip_y=flip_y)
    assert (got - want)[:, :, 2:-2, 2:-2].std() < 0.1 * x.std()


@pytest.mark.parametrize("dx, dy", [(3, 0), (0, -2), (-5, 4)])
def test_a_shift_by_whole_pixels(dx, dy, noise):
    """Shifts swapped or of the wrong sign or unit; edges that are black, or repeated, instead of mirrored."""
    x = torch.nn.functional.pad(noise, (15, 15, 15, 15), mode="reflect").roll((dy, dx), (2, 3))[:, :, 15:-15, 15:-15]
    assert torch.allclose(changed(noise, shift_x=dx / 2.0, shift_y=dy / 2.0), x, atol=1e-4)     # eighths of 16 pixels


@pytest.mark.parametrize("how", [dict(scale=1.7), dict(scale=-2.0), dict(stretch=1.5), dict(stretch=1.5, axis=0.9),
                                 dict(scale=1.0, turn=0.4, stretch=-1.2, axis=-2.0, shift_x=0.5, shift_y=-0.3)])
def test_a_smooth_image_is_seen_at_the_right_points(how):
    """Closed form: cos(k . p) after a change is cos(k . A(p - shift)), A from the angles and factors named."""
    p = torch.stack(torch.meshgrid(torch.arange(32) - 15.5, torch.arange(32) - 15.5, indexing="xy")).flatten(1).double()
    k = torch.tensor([0.21, 0.13]).double()

    def turned(a):
        return torch.tensor([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]]).double()
    a = NONE | how
    q = 2 ** (0.2 * a["stretch"])
    A = turned(a["turn"]) @ turned(-a["axis"]) @ torch.diag(torch.tensor([1 / q, q]).double()) @ turned(a["axis"])
    A = A / 2 ** (0.2 * a["scale"])
    shift = torch.tensor([[a["shift_x"] * 4], [a["shift_y"] * 4]]).double()
    want = (k @ (A @ (p - shift))).cos().view(32, 32)
    got = changed((k @ p).cos().view(1, 1, 32, 32).float(), **how)[0, 0]
    assert (got - want)[10:-10, 10:-10].abs().max() < 0.02


def test_labels_say_what_was_done():
    """Numbers in another order than that of EDM's checkpoints, or not zero where nothing was done."""
    a = {k: torch.tensor([0.0, v]) for k, v in dict(flip_x=1.0, flip_y=1.0, scale=0.3, turn=2.0, stretch=0.7, axis=0.5,
                                                   shift_x=0.1, shift_y=-0.2).items()}
    want = [1, 1, 0.3, math.cos(2) - 1, math.sin(2), 0.7 * math.cos(0.5), 0.7 * math.sin(0.5), 0.1, -0.2]
    assert labels(a)[0].tolist() == [0.0] * LABELS and torch.allclose(labels(a)[1], torch.tensor(want))


def test_how_often_and_how_far():
    """A change at the wrong rate or scale, gates that open together, shifts that do not."""
    torch.manual_seed(0)
    a = draw(40_000, 0.12, "cpu")
    often = {k: float((v != 0).float().mean()) for k, v in a.items()}
    want = dict(flip_x=0.5, flip_y=0.06, scale=0.12, turn=0.12, stretch=0.12, axis=0.5, shift_x=0.12, shift_y=0.12)
    assert often == pytest.approx(want, abs=0.01)
    far = {k: float(v[v != 0].std()) for k, v in a.items() if "flip" not in k}
    circle = math.pi / math.sqrt(3)
    assert far == pytest.approx(dict(scale=1, turn=circle, stretch=1, axis=circle, shift_x=1, shift_y=1), abs=0.05)
    assert torch.equal(a["shift_x"] != 0, a["shift_y"] != 0)
    both = float(((a["scale"] != 0) & (a["turn"] != 0)).float().mean())
    assert both == pytest.approx(0.12**2, abs=0.003)
    assert not any(v.any() for k, v in draw(100, 0.0, "cpu").items() if k not in ("flip_x", "axis"))


@pytest.mark.parametrize("flow", ["edm", "trig"])
@pytest.mark.parametrize("net", ["ddpmpp", "ncsnpp", "adm", "dit"])
def test_the_network_is_told(net, flow):
    """Labels that do not arrive: they would leak into the samples. None is not the same as zeros."""
    args = parse(teacher.Args, teacher.PRESETS, ["--net", net, "--flow", flow, "--ch", "64", "--augment", "0.5"])
    model = (TrigFlow if flow == "trig" else EDM)(backbone(args, load("digits")), args.sd)
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    x, t = torch.randn(2, 1, 8, 8), torch.ones(2, 1, 1, 1)
    F = getattr(model, "F", model)
    assert torch.equal(F(x, t), F(x, t, augment=torch.zeros(2, 9)))
    assert not torch.allclose(F(x, t), F(x, t, augment=torch.ones(2, 9)), atol=1e-3)
    seen = []
    hook = model.model.map_augment.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    loss, _ = teacher.loss_fn(model, torch.rand(64, 1, 8, 8), None, args)
    hook.remove()
    assert seen[0].shape == (64, 9) and seen[0].any(0).all() and loss.isfinite()


def test_only_the_teacher_has_such_a_layer(train):
    """A student that keeps the layer, or cannot start from a teacher that has it; a layer without --augment."""
    import ect
    _, run = train("common.teacher", "--augment", "0.3", "--iters", "2")
    net = teacher.load(run)
    assert net.model.map_augment.weight.shape == (16, 9)
    _, student = train("ect", "--teacher", str(run), "--iters", "1")
    saved = torch.load(student / "ckpt.pt", weights_only=True)
    assert saved["model"]["kwargs"]["augment_dim"] == 0 and not any("augment" in k for k in saved["net"])
    assert build(saved["model"]).load_state_dict(saved["ema"]) and not hasattr(ect.Args, "augment")
    _, plain = train("common.teacher", "--iters", "1")
    assert not hasattr(teacher.load(plain).model, "map_augment")


def test_it_is_on_in_the_papers_recipe_alone():
    """The paper's 0.12, of images of which a mirror image is one; not of digits, and not in the short presets."""
    def rate(*argv):
        return parse(teacher.Args, teacher.PRESETS, [*argv, "--device", "cpu"]).augment
    assert rate("--dataset", "cifar10", "--preset", "paper") == 0.12
    assert [rate(), rate("--dataset", "cifar10"), rate("--dataset", "mnist", "--preset", "paper")] == [0, 0, 0]


def test_an_older_run_goes_on_without(train):
    """A run whose config.json does not know of the flag, resumed with today's default."""
    _, run = train("common.teacher", "--iters", "2")
    config = json.loads((run / "config.json").read_text())
    assert config.pop("augment") == 0
    (run / "config.json").write_text(json.dumps(config | dict(iters=3)))
    _, again = train("common.teacher", "--resume", str(run))
    assert again == run and json.loads((run / "config.json").read_text())["augment"] == 0
    assert torch.load(run / "ckpt.pt", weights_only=True)["it"] == 3
    assert "added" not in {f.name for f in dataclasses.fields(teacher.Args)}


def test_augment_changes_and_tells(noise):
    """Labels of other changes than those made; another dtype or shape."""
    torch.manual_seed(0)
    x, told = augment(noise.double(), 1.0)
    torch.manual_seed(0)
    a = draw(3, 1.0, "cpu")
    assert x.dtype == torch.float64 and x.shape == noise.shape and torch.equal(told, labels(a))
    assert torch.allclose(x, change(noise.double(), a)) and not torch.allclose(x, noise.double(), atol=0.1)
