"""The README against the files it speaks of."""
import re
import shlex

from conftest import METHODS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_line_counts_in_the_table():
    for file, lines in re.findall(r"\| `([\w/]+\.py)` \| (\d+) \|", README):
        assert len((ROOT / file).read_text().splitlines()) == int(lines), file


def test_pictures_and_files_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README) + re.findall(r"`((?:common|tests)/[\w/]+\.py)`", README):
        assert (ROOT / path).exists(), path


def test_commands_parse():
    """A flag renamed in the code and not here."""
    import importlib

    from common import sample
    from common.flags import parse
    seen = 0
    for line in re.findall(r"^    ((?:python|torchrun) .*)$", README, re.M) + re.findall(r"`(python .*?)`", README):
        argv = shlex.split(line, comments=True)
        argv = argv[argv.index("ect.py") - 1:] if "ect.py" in argv else argv
        script, flags = (argv[2], argv[3:]) if argv[1] == "-m" else (argv[1].removesuffix(".py"), argv[2:])
        if script == "common.sample":
            sample.flags(flags)
        elif (script == "common.teacher" or script in METHODS) and "--resume" not in flags and "-h" not in flags:
            module = importlib.import_module(script)
            parse(module.Args, module.PRESETS, flags)
        else:
            continue
        seen += 1
    assert seen >= 4
