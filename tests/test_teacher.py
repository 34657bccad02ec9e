"""--teacher: what is found, taken over or refused. The files themselves: tests/test_released.py."""
import pytest
import torch
from test_released import network, write  # noqa: F401  (write is a fixture)

from common import released, teacher
from common.flags import config_of


def test_without_a_released_file_fast_and_paper_say_what_to_do(monkeypatch, tmp_path, capsys):
    """One line with the address and the way out; no folder is left."""
    import ect
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a: (_ for _ in ()).throw(OSError("no network")))
    args = ect.Args(dataset="cifar10", preset="paper", data_dir=str(tmp_path / "data"), out=str(tmp_path / "runs"))
    with pytest.raises(SystemExit) as e:
        released.download(released.address(args, teacher.Args), args.data_dir)
    err = capsys.readouterr().err
    assert e.value.code == 2 and "edm-cifar10-32x32-uncond-vp.pkl" in err and "--teacher train" in err
    assert "CC BY-NC-SA" in err and not list(tmp_path.iterdir())
    args.ch = 64
    with pytest.raises(SystemExit):
        released.address(args, teacher.Args)


@pytest.mark.parametrize("net, cond, name", [("ddpmpp", False, "uncond-vp"), ("ncsnpp", False, "uncond-ve"),
                                             ("ncsnpp", True, "cond-ve"), ("adm", False, None), ("dit", False, None)])
def test_the_released_file_is_that_of_the_family(capsys, net, cond, name):
    args = teacher.Args(dataset="cifar10", net=net, cond=cond)
    if name:
        assert released.address(args, teacher.Args).endswith(f"/edm-cifar10-32x32-{name}.pkl")
    else:                                                 # the one for ImageNet is none for CIFAR-10
        with pytest.raises(SystemExit):
            released.address(args, teacher.Args)
        assert "--teacher train" in capsys.readouterr().err


@pytest.mark.parametrize("kw", [dict(net="ncsnpp"), dict(net="adm", ch=32, mult=(1, 4))])
def test_a_student_takes_the_family_of_its_teacher(train, write, monkeypatch, kw):  # noqa: F811
    """--net says ddpmpp by default, the file is another network: flags, checkpoint and what `load` rebuilds follow."""
    monkeypatch.setattr(teacher, "show", lambda *_: None)  # its figure costs more than the test
    net = network(size=8, channels=1, blocks=1, attn=(4,), classes=0, **kw)
    net.sd = 0.75
    metrics, run = train("ect", "--teacher", str(write(net)), "--iters", "2")
    config = config_of(run)
    assert config["net"] == kw["net"] and tuple(config["mult"]) == net.model.kwargs["mult"]
    again = teacher.load(run)
    assert again.spec["net"] == kw["net"]
    if kw["net"] == "ncsnpp":
        assert torch.equal(again.model.map_noise.freqs, net.model.map_noise.freqs)


@pytest.mark.parametrize("flags", [("--net", "ncsnpp"), ("--net", "adm", "--ch", "64", "--mult", "1,1")])
def test_the_other_families_train_and_resume(train, flags):
    _, run = train("ect", *flags, "--iters", "2")
    before = teacher.load(run)
    train("ect", "--resume", str(run), "--iters", "3")
    after = teacher.load(run)
    assert after.spec == before.spec and after.spec["net"] == flags[1]
    assert all(torch.equal(a, b) for a, b in zip(before.buffers(), after.buffers()))


@pytest.mark.parametrize("flags, words", [(["--net", "adm", "--ch", "16"], "heads of 64"),
                                          (["--net", "adm", "--ch", "224", "--mult", "1,1"], "heads of 64"),
                                          (["--net", "ncsnpp", "--ch", "132"], "divisible by 32"),
                                          (["--net", "ddpmpp", "--ch", "132"], "divisible by 32"),
                                          (["--net", "unet"], "invalid choice")])
def test_widths_that_do_not_fit_a_family_are_one_line(train, capsys, tmp_path, flags, words):
    with pytest.raises(SystemExit) as e:
        train("ect", *flags)
    err = capsys.readouterr().err
    assert e.value.code == 2 and words in err and err.count("\n") == 1 and not (tmp_path / "runs").exists()


def test_a_teacher_that_is_no_checkpoint_is_one_line(train, capsys, tmp_path):
    """A file, a folder or a name of nothing: talk of a checkpoint before it, or no word of what a teacher may be."""
    (tmp_path / "hosts").write_text("127.0.0.1 localhost\n")
    torch.save(dict(weight=torch.zeros(1)), tmp_path / "other.pt")
    torch.save(torch.zeros(1), tmp_path / "tensor.pt")
    for name, why in (("hosts", "damaged"), ("other.pt", "not one of these"), ("tensor.pt", "not one of these"),
                      ("gone.pt", "there is none"), ("", "there is none")):
        with pytest.raises(SystemExit) as e:
            train("ect", "--teacher", str(tmp_path / name))
        out, err = capsys.readouterr()
        assert e.value.code == 2 and err.count("\n") == 1 and "before" not in out + err and "cannot be read" not in out
        assert why in err and all(s in err for s in (str(tmp_path / name), "run folder", ".pkl", "address"))
        assert not (tmp_path / "runs").exists()
