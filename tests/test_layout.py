"""common/ has an order, and its files of mathematics stand alone."""
import ast
import re
import shutil
import subprocess
import sys

import pytest
from conftest import METHODS, ROOT

README = (ROOT / "common/README.md").read_text(encoding="utf-8")
ORDER = re.findall(r"^\| `(\w+)\.py` \|", README, re.M)
MATHEMATICS = re.findall(r"^\| `(\w+)\.py` \|", README[:README.index("## The rest")], re.M)
BUDGET = dict(mathematics=850, rest=4019, file=320)


def imports(code):
    """The files of common/ that the code imports, inside functions too, and other scripts of ours."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "common":
            yield from [node.module.split(".")[1]] if "." in node.module else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            yield from [a.name.split(".")[-1] for a in node.names if a.name.split(".")[0] in ("common", *METHODS)]
        elif isinstance(node, ast.ImportFrom) and (node.level or node.module in METHODS):
            yield node.module or "."


def upward(name, code, order=ORDER):
    """What `code`, the file `name`, imports although it does not stand above it."""
    return [other for other in imports(code) if other not in order[:order.index(name)]]


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_what_stands_above_it(name):
    """Two files that import each other, or a lower one from a higher: neither can be read, or copied, alone."""
    assert upward(name, (ROOT / f"common/{name}.py").read_text()) == []


def test_the_order_lists_every_file():
    files = {p.stem for p in (ROOT / "common").glob("*.py")} - {"__init__"}
    assert sorted(ORDER) == sorted(files)


@pytest.mark.parametrize("line", ["from common.run import Run", "from common import run", "import common.run",
                                  "def f():\n    from common.run import Run", "import ect", "from . import run"])
def test_a_circular_import_is_seen(line):
    """Planted in flags.py, the ground floor, which run.py imports."""
    code = (ROOT / "common/flags.py").read_text()
    assert upward("flags", code) == [] != upward("flags", f"{code}\n{line}\n")
    assert upward("run", (ROOT / "common/run.py").read_text()) == []


def test_the_files_of_mathematics_need_torch_and_each_other_alone(tmp_path):
    """A helper of ours, numpy or tqdm imported there: whoever copies them would have to copy more."""
    (tmp_path / "common").mkdir()
    for name in MATHEMATICS:
        shutil.copy(ROOT / f"common/{name}.py", tmp_path / "common")
        tops = {a.name.split(".")[0] for n in ast.walk(ast.parse((ROOT / f"common/{name}.py").read_text()))
                if isinstance(n, ast.Import) for a in n.names}
        assert tops <= {"torch", *sys.stdlib_module_names}, name
    code = "import torch\n" + "\n".join(f"import common.{name}" for name in MATHEMATICS) + """
from common import dit, precond, unet
try:
    unet.UNet(size=6, channels=1, mult=(1, 1, 1))
except ValueError as e:
    print(e, common.unet.__file__)
net = precond.EDM(unet.UNet(size=8, channels=1, ch=16, mult=(1,), blocks=1, attn=()))
print(net(torch.zeros(2, 1, 8, 8), torch.ones(2, 1, 1, 1)).shape)"""
    p = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert p.returncode == 0, p.stderr
    assert "--mult" in p.stdout and str(tmp_path) in p.stdout and "[2, 1, 8, 8]" in p.stdout


def test_budgets():
    """A common/ that nobody reads."""
    lines = {name: len((ROOT / f"common/{name}.py").read_text().splitlines()) for name in ORDER}
    assert sum(lines[name] for name in MATHEMATICS) <= BUDGET["mathematics"]
    assert sum(n for name, n in lines.items() if name not in MATHEMATICS) <= BUDGET["rest"]
    assert max(lines.values()) <= BUDGET["file"] and lines["run"] <= 300, max(lines, key=lines.get)
