"""The README against the files it speaks of."""
import re
import shlex

from conftest import METHODS, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_its_length():
    """A README that nobody reads."""
    assert len(README.split()) <= 1500


def test_pictures_and_files_exist():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README) + re.findall(r"`((?:common|tests)/[\w/]+(?:\.py|\.md|/))`", README):
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
