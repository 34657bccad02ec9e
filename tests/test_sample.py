"""python -m common.sample: every docstring says which mistake the test catches."""
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, pixels, snapshot
from PIL import Image

import ect
from common import sample
from common.data import load


@pytest.fixture
def draw(tmp_path):
    """Call main(); return its images [N, C, H, W] as int, their labels, and the file or folder."""
    def go(run, *argv, out="grid.png"):
        images, labels = sample.main([str(run), "--out", str(tmp_path / out), "--n", "6", *map(str, argv)])
        return images.int(), labels, tmp_path / out
    return go


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """The one line with which main() refuses its flags, having left everything as it was."""
    def go(*argv):
        monkeypatch.chdir(tmp_path)                                               # for the default --out
        before = snapshot(tmp_path)
        capsys.readouterr()
        with pytest.raises(SystemExit) as info:
            sample.main(list(map(str, argv)))
        err = capsys.readouterr().err
        assert info.value.code == 2 and snapshot(tmp_path) == before
        assert err.startswith("error: ") and err.count("\n") == 1
        return err
    return go


def close(a, b):
    """Equal up to the last bit of a byte: sums over another batch may end on the other side of it."""
    return a.shape == b.shape and (a - b).abs().max() <= 1


def test_image_i_depends_on_the_seed_and_i_alone(train, draw):
    """Images that change with --batch or --n could not be drawn in shares; a seed that changes nothing."""
    _, run = train("ect", "--lr", "1e-3")
    whole, labels, _ = draw(run)
    assert whole.shape == (6, 1, 8, 8) and labels is None
    assert all((a - b).abs().max() > 9 for i, a in enumerate(whole) for b in whole[:i]), "an image twice"
    assert close(draw(run, "--batch", 4)[0], whole) and close(draw(run, "--n", 3)[0], whole[:3])
    assert torch.equal(draw(run, "--seed", 0)[0], whole) and not close(draw(run, "--seed", 1)[0], whole)


def test_steps_and_t_mid_are_the_runs_unless_given(train, draw, capsys):
    """Flags that do not reach the sampler, or defaults of the script instead of the run's."""
    _, run = train("ect", "--lr", "1e-3", "--steps", "3", "--t-mid", "0.5")
    own = draw(run)[0]
    assert "6 images in 3 steps" in capsys.readouterr().out
    assert torch.equal(own, draw(run, "--steps", 3, "--t-mid", 0.5)[0])
    assert not close(own, draw(run, "--steps", 1)[0]) and not close(own, draw(run, "--t_mid", 3)[0])
    assert torch.equal(draw(run, "--steps", 1)[0], draw(run, "--steps", 1, "--t-mid", 3)[0])


def test_a_checkpoint_in_the_folder(train, draw):
    """The newest weights drawn whichever file was named; raw instead of averaged weights."""
    _, run = train("ect", "--lr", "1e-3", "--keep")
    last = draw(run)[0]
    assert torch.equal(draw(run / "ckpt.pt")[0], last)
    assert not close(draw(run / "ckpt-0000002.pt")[0], last)
    saved = torch.load(run / "ckpt.pt")
    torch.save(saved | dict(net=saved["ema"]), run / "ckpt.pt")
    assert torch.equal(draw(run)[0], last)


def test_a_grid_of_evaluation_can_be_drawn_again(train, draw):
    """Other noise, levels or quantisation here than in training."""
    _, run = train("ect", "--lr", "1e-3", "--grid", "6")
    for k in (1, 2):
        again = np.asarray(Image.open(draw(run, "--steps", k)[2])).astype(int)
        first = np.asarray(Image.open(run / f"samples/0000004_{k}step.png"))
        assert again.shape == first.shape and abs(again - first).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_written_can_be_read_again(channels, train, draw, tmp_path):
    """Channels last or first, labels lost, bytes changed on the way to .npz and PNG files and back."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8, channels), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(20) % 4)
    _, run = train("ect", "--dataset", str(tmp_path / "mine.npz"), "--cond", "--iters", "1", "--mult", "1")
    made, labels, file = draw(run, out="deep/er/some.npz")
    again = load(str(file))
    assert torch.equal(again.images.int(), made) and torch.equal(again.labels, labels)
    assert labels.tolist() == [0, 1, 2, 3, 0, 1] and made.shape == (6, channels, 8, 8)
    made, _, folder = draw(run, out="folder")
    assert [p.name for p in sorted(folder.iterdir())] == [f"{i:06d}.png" for i in range(6)]
    assert torch.equal(load(str(folder), size=8).images.int(), made)
    made, _, file = draw(run, out="some.png")
    assert Image.open(file).size == pixels(4, 2), "a column for each of 4 classes"
    sheet = np.asarray(Image.open(file))[::4, ::4]                                # 8 pixels are shown as 32
    assert np.array_equal(sheet[:8, 9:17], made[1].permute(1, 2, 0).expand(-1, -1, 3))


def test_labels_of_arrays_are_as_frequent_as_in_the_data(train, draw, tmp_path):
    """An .npz in equal shares of classes 17:3, whose FID would be of another mixture; labels that depend on --n."""
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(20) // 17)
    _, run = train("ect", "--dataset", str(tmp_path / "mine.npz"), "--cond", "--iters", "1")
    many = draw(run, "--n", 40, out="many.npz")[1]
    assert many.bincount().tolist() == [34, 6] and many[:20].bincount().tolist() == [17, 3]
    assert torch.equal(draw(run, "--n", 7, out="few.npz")[1], many[:7])
    assert draw(run, "--n", 4)[1].tolist() == [0, 1, 0, 1], "a grid shows each class"
    assert draw(run, "--n", 4, "--classes", "1", out="ones.npz")[1].tolist() == [1] * 4
    config = json.loads((run / "config.json").read_text())
    del config["about"]["images_per_class"]                                       # an older run's
    (run / "config.json").write_text(json.dumps(config))
    assert draw(run, "--n", 4, out="old.npz")[1].tolist() == [0, 1, 0, 1]


def test_classes_reach_the_network(train, draw, monkeypatch):
    """Labels that are written but not drawn."""
    import ect
    _, run = train("ect", "--cond", "--iters", "1")
    seen = []
    monkeypatch.setattr(ect, "sample", lambda net, noise, y, args: seen.append(y) or noise[0] * 0)
    _, labels, file = draw(run, "--classes", "7,3", "--batch", 4)
    assert labels.tolist() == [7, 3, 7, 3, 7, 3] and [y.tolist() for y in seen] == [[7, 3, 7, 3], [7, 3]]
    assert Image.open(file).size == pixels(2, 3)


def test_teachers_are_sampled_by_their_own_method(train, draw, refused, capsys):
    """One step or the consistency sampler for a diffusion model; a --t-mid that does nothing."""
    _, run = train("common.teacher", "--iters", "2", "--grid", "6", "--warmup", "1")
    made, _, file = draw(run)
    assert "in 18 steps" in capsys.readouterr().out
    first = np.asarray(Image.open(run / "samples/0000002_teacher.png"))
    assert abs(np.asarray(Image.open(file)).astype(int) - first).max() <= 1
    assert not close(draw(run, "--steps", 3)[0], made)
    assert "--t-mid" in refused(run, "--t-mid", 1)


@pytest.mark.parametrize("argv, hint", [
    (["--steps", "0"], "--steps"), (["--n", "0"], "--n"), (["--batch", "0"], "--batch"),
    (["--step", "2"], "--step"), (["--classes", "1"], "--cond"), (["--n", "many"], "invalid int"),
    (["--device", "tpu"], "tpu"),
    (["--t-mid", "0"], "--t-mid"), (["--t-mid", "99"], "--t-mid"), (["--device", "cuda"], "cuda"),
    (["--out", "{run}"], "exists"), (["--out", "{run}/config.json"], "exists")])
def test_bad_input_is_refused(argv, hint, train, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _, run = train("ect", "--iters", "1", "--mult", "1")
    assert hint in refused(run, *(word.format(run=run) for word in argv))


def test_what_cannot_be_sampled_is_refused(train, refused, tmp_path):
    """No run, no checkpoint, a damaged one, labels out of range."""
    _, run = train("ect", "--iters", "1", "--mult", "1", "--cond")
    assert "absent" in refused(tmp_path / "absent" / "run")
    assert "no run folder" in refused(tmp_path)
    assert "ckpt-7.pt" in refused(run / "ckpt-7.pt")
    assert "0 .. 9" in refused(run, "--classes", "3,10") and "0 .. 9" in refused(run, "--classes", "-1")
    (run / "ckpt.pt").write_bytes(b"")
    assert "no readable checkpoint" in refused(run)


def test_the_command_itself(train, shell, tmp_path):
    """A module that imports but does not start, or does not find the method beside common/."""
    _, run = train("ect", "--iters", "1", "--mult", "1")
    p = shell("-m", "common.sample", run, "--n", "2", "--out", tmp_path / "x.png")
    assert p.returncode == 0 and p.stdout == f"2 images in 2 steps: {tmp_path / 'x.png'}\n", p.stderr
    assert Image.open(tmp_path / "x.png").size == pixels(2, 1)


@pytest.mark.parametrize("name", ["sample", "teacher"])
def test_a_file_started_by_its_path_says_how_to_start_it(name, shell):
    """A traceback about a package that cannot be found, from wherever it is started."""
    p = shell(f"common/{name}.py", "runs/x", "--steps", "2", PYTHONPATH="")
    assert p.returncode == 2 and p.stdout == "" and p.stderr.count("\n") == 1
    assert p.stderr.startswith("error: ") and p.stderr.endswith(f"python -m common.{name} runs/x --steps 2\n")


@pytest.mark.parametrize("name", ["x", "os", "common.flags", "tests.bench.gpu", "tests.conftest", "../x", "", None, ["ect"]])
def test_a_run_folder_does_not_choose_what_runs(name, train, tmp_path):
    """A folder from elsewhere, and a module of its own beside it: read, never imported."""
    _, run = train("ect", "--iters", "1")
    (tmp_path / "x.py").write_text("open('ran', 'w')\nclass Args: pass\ndef sample(): pass\n")
    config = json.loads((run / "config.json").read_text())
    config["about"]["script"] = name
    (run / "config.json").write_text(json.dumps(config))
    with pytest.MonkeyPatch.context() as mp, pytest.raises(SystemExit) as e:
        mp.syspath_prepend(tmp_path)
        mp.chdir(tmp_path)
        sample.main([str(run), "--out", "grid.png"])
    assert e.value.code == 2 and not (tmp_path / "ran").exists() and not (tmp_path / "grid.png").exists()
    words = "is not one of this checkout" if isinstance(name, str) else "is no run folder"
    assert words in e.value.message, e.value.message


def test_a_script_of_the_working_directory_does_not_take_the_place_of_ours(train, tmp_path):
    """`ect` found where the user happens to be: a folder from elsewhere with an ect.py."""
    _, run = train("ect", "--iters", "1")
    (tmp_path / "ect.py").write_text("open('ran', 'w')\nclass Args: pass\ndef sample(): pass\n")
    code = (f"import sys; sys.path.insert(1, {str(ROOT)!r}); from common import sample;"
            f"sample.main([{str(run)!r}, '--n', '1', '--device', 'cpu'])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and (tmp_path / "grid.png").exists() and not (tmp_path / "ran").exists(), done.stderr


def test_out_is_tried_before_the_work(train, refused, tmp_path, monkeypatch):
    """Refused after an hour of sampling; a folder named grid.jpg; a file overwritten by half of another."""
    _, run = train("ect", "--iters", "1")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    with monkeypatch.context() as m:
        m.setattr(sample, "load_run", lambda *a: pytest.fail("it begins"))
        for name in ("grid.jpg", "grid.JPEG", "grid.gif", "x.zip", "file", "folder.png", "file/x.png", "file/deep/x", "x" * 300):
            assert Path(name).name[:100] in refused(run, "--out", tmp_path / name) and snapshot(tmp_path)["file"] == b"mine"
    for name, kind in (("a.PNG", "PNG"), ("b.png", "PNG")):
        sample.main([str(run), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "new" / name)])
        assert Image.open(tmp_path / "new" / name).format == kind
    sample.main([str(run), "--n", "2", "--device", "cpu", "--out", str(tmp_path / "new/c.NPZ")])
    assert len(load(str(tmp_path / "new/c.NPZ")).images) == 2
    before = snapshot(tmp_path)
    for name in ("new/b.png", "new/c.NPZ", "new/d"):
        with monkeypatch.context() as m, pytest.raises(SystemExit):
            m.setattr(os, "replace", full)
            sample.main([str(run), "--n", "2", "--device", "cpu", "--out", str(tmp_path / name)])
        assert snapshot(tmp_path) == before


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device", args[-1])


def test_the_noise_of_many_steps_fits_the_memory(train, monkeypatch, tmp_path):
    """256 images x 1,000 steps of float64 at once."""
    seen = []
    _, run = train("ect", "--iters", "1")
    monkeypatch.setattr(ect, "sample", lambda net, noise, y, args: seen.append(noise.shape) or noise[0].clamp(-1, 1))
    monkeypatch.setattr(sample.fid, "NOISE", 3000)
    sample.main([str(run), "--n", "8", "--steps", "20", "--device", "cpu", "--out", str(tmp_path / "x.png")])
    assert [s[1] for s in seen] == [2, 2, 2, 2]
