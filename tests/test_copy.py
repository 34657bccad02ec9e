"""Each method trains a foreign network with no more than its script in tests/copy says, and reads no other flag."""
import ast
import importlib
import re
import types

import pytest
import torch
from conftest import METHODS, ROOT

STEPS = dict(ect=80, cd=30, ct=80, ict=80, scm=110, rcm=4)  # ect, ict: one stage, in which the loss means the same
each_method = pytest.mark.parametrize("method", METHODS)


def code(method, steps):
    """The script, with fewer steps and the loss of each kept."""
    text = (ROOT / f"tests/copy/{method}.py").read_text(encoding="utf-8")
    text, n = re.subn(r"in range\(400\):", f"in range({steps}):", text)
    text, k = re.subn(r"    loss\.backward\(\)\n", "    losses.append(loss.item())\n    loss.backward()\n", text)
    assert n == k == 1
    return text.replace("H=200", "H=2") if method == "rcm" else text       # both its losses in a few steps


def go(method, steps, lacks=None, monkeypatch=None):
    """Execute it -> its globals, the fields of args given, and those read."""
    read, given = set(), set()

    class Namespace(types.SimpleNamespace):
        def __init__(self, **fields):
            if "F" not in fields:                         # not the teacher
                given.update(fields)
                fields.pop(lacks, None)
            super().__init__(**fields)

        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(types, "SimpleNamespace", Namespace)
    monkeypatch.syspath_prepend(str(ROOT))
    torch.manual_seed(0)
    space = dict(__name__="copy_of_a_script", losses=[])
    try:
        exec(compile(code(method, steps), f"tests/copy/{method}.py", "exec"), space)
    finally:
        monkeypatch.undo()
    return space, given, {n for n in read if not n.startswith("__")} - {"F"}


def off(space):
    """The mean distance from a sampled image to the nearest of the data, and from one of these to the nearest sample:
    the second is large where all samples are alike."""
    d = (space["images"][:, None] - space["data"]).abs().flatten(2).mean(2)
    return float(d.min(1).values.mean()), float(d.min(0).values.mean())


@each_method
def test_it_trains_and_samples(method, monkeypatch):
    """A loss that does not reach a foreign network, or a sampler that wants more than a function."""
    space, given, read = go(method, STEPS[method], monkeypatch=monkeypatch)
    losses, images = torch.tensor(space["losses"]), space["images"]
    assert losses.isfinite().all() and images.shape == (14, 1, 8, 8)
    assert images.isfinite().all() and images.abs().max() <= 1
    fresh, _, _ = go(method, 0, monkeypatch=monkeypatch)  # the same seed: the same network before training
    assert any(not torch.equal(p, q) for p, q in zip(space["net"].parameters(), fresh["net"].parameters()))
    if method in ("ect", "ct", "ict"):
        assert losses[-10:].mean() < 0.95 * losses[:5].mean(), losses
    if method != "rcm":                                   # four steps change little
        assert all(a < 0.75 * b for a, b in zip(off(space), off(fresh))), (off(space), off(fresh))
    assert given == read, f"not read: {given - read}; not given: {read - given}"


@each_method
def test_every_field_is_needed(method, monkeypatch):
    """A field in the script that could be left out."""
    tree = ast.parse(code(method, 4))
    call = next(n.value for n in ast.walk(tree) if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "args")
    for field in [k.arg for k in call.keywords]:
        with pytest.raises(AttributeError, match=f"'{field}'"):
            go(method, 4, field, monkeypatch)


@each_method
def test_the_docstring_names_what_loss_fn_reads(method, monkeypatch):
    """A flag added to loss_fn and not to its docstring, or the other way round."""
    module = importlib.import_module(method)
    named = re.search(r"Reads args\.(\w+(?:,\s+\w+)*)", module.loss_fn.__doc__)[1]
    monkeypatch.setattr(module, "sample", lambda net, noise, y, args: noise[0])
    _, _, read = go(method, 4, monkeypatch=Keep(monkeypatch))
    others = {"mu0"} if method == "ct" else {"student_every"} if method == "rcm" else set()
    assert set(re.split(r",\s+", named)) == read - others


class Keep:
    """A monkeypatch whose changes stay until the test ends."""
    def __init__(self, m):
        self.setattr, self.syspath_prepend = m.setattr, m.syspath_prepend

    def undo(self):
        pass


def test_the_readme_shows_the_script():
    text = (ROOT / "tests/copy/ect.py").read_text(encoding="utf-8")
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert block == text[text.index("from types"):]
