"""The ground floor of a training script: flags, presets, one-line errors, and the config.json of a run.

The flags of a script are the fields of its dataclass `Args`, one line a field. The comment at the end of a line is the
help text; bounds in parentheses at its end, such as (>= 1) or (> t_min, < t_max), are checked before anything runs.
The table `PRESETS` holds what differs from the defaults for a data set, a budget or a mode. Imports nothing of ours."""
import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import operator
import os
import re
import sys
from pathlib import Path
from typing import get_args

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
DATASETS = ("digits", "mnist", "fashion_mnist", "cifar10")
# What --resume may change: how a run is watched, stored and sampled, and where the data and the teacher are, whose
# SHA-256 is compared. All other flags define its result.
MAY_CHANGE = {"iters", "steps", "t_mid", "grid", "log_every", "save_every", "keep", "max_skips", "fid", "fid_every",
              "checkpoint_acts", "shard", "device", "dataset", "data_dir", "teacher", "out", "resume"}
ADDED = dict(tf32=True, checkpoint_acts=False, lora=0)    # flags that older runs of all scripts lack: what those did
LARGEST = 10**12                  # of all whole numbers: no count of steps or images is higher
# The cost that a preset states holds only while these flags keep the preset's values.
COSTLY = ("iters", "batch", "net", "ch", "mult", "blocks", "attn", "size", "teacher", "teacher_iters", "fid")
COMPARE = {">=": (operator.ge, "at least"), ">": (operator.gt, "above"), "<=": (operator.le, "at most"),
           "<": (operator.lt, "below")}


class BadInput(SystemExit):
    """The user's mistake: one line on stderr that says what to do, exit status 2."""
    def __init__(self, message):
        super().__init__(2)
        self.message = message
        if os.environ.get("LOCAL_RANK", "0") == "0":
            tqdm.write("error: " + printable(message, "\n"), file=sys.stderr)   # not on the line of a bar


class Unheard:
    """stdout or stderr, to which nobody has to listen: the Ctrl-C that is for a run also ends the `tee` after it."""
    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)
            self.stream.flush()

    def flush(self):
        self.write("")


def say(text):
    """Print a line on stdout, on the first rank only, without breaking a progress bar."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(printable(text, "\n"))


def brief(error):
    """One line of at most 300 characters; a file's own names may hold anything, even a terminal's commands."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split())[:300])


def printable(text, keep=""):
    """The text without what a terminal would obey, or could not print; `keep`: other characters that may stay."""
    return "".join(c if c.isprintable() or c in keep else "?" for c in str(text))


def flag(field):
    """The flag of a field: --log-every."""
    return f"--{field.replace('_', '-')}"


def meant(word, known):
    """'; did you mean X?' for the member of `known` that is closest to `word`, or nothing."""
    close = difflib.get_close_matches(word, known, 1)
    return f"; did you mean {close[0]}?" if close else ""


# ---- from the command line to Args ---------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are BadInput, and which suggests the flag that was meant."""
    def error(self, message):
        raise BadInput(f"{message} (-h lists the flags)")

    def parse_args(self, args=None, namespace=None):
        if hasattr(sys.stdout, "reconfigure"):            # a name that a terminal cannot show ends nothing
            sys.stdout.reconfigure(errors="backslashreplace")
        words = sys.argv[1:] if args is None else args                    # --log_every is understood as --log-every
        words = [re.sub("^--[^=]+", lambda name: name[0].replace("_", "-"), word) for word in words]
        found, extra = self.parse_known_args(words, namespace)
        if extra and not extra[0].startswith("-"):
            self.error(f"{extra[0]!r} belongs to no flag; a list is one word with commas, such as --mult 1,2,2")
        if extra:
            self.error(f"unrecognized argument {extra[0]}{meant(extra[0].split('=')[0], self._option_string_actions)}")
        return found


def parse(cls, presets, argv=None):
    """The flags `argv` (default: the command line, in a notebook none) as an instance of the dataclass `cls`: explicit
    flags, then the config of a resumed run, or the preset, which is printed with its cost, then the defaults of `cls`.
    Raises BadInput; -h prints the help and exits."""
    if argv is None:
        argv = [] if "ipykernel" in sys.modules else sys.argv[1:]         # a notebook's own flags are not ours
    given = vars(parser(cls).parse_args(argv))
    wants_help = given.pop("help", False)
    if empty := [k for k, v in given.items() if v == ""]:                 # an unset variable of the shell's
        raise BadInput(f"{flag(empty[0])} is empty; give it a value, or leave it out")
    if wants_help:
        merged, name = merge(cls, presets, given)
        print(parser(cls, merged, presets, name).format_help(), end="")
        raise SystemExit(0)
    args = resumed(cls, given) if given.get("resume") else from_presets(cls, presets, given)
    args.given = frozenset(given)                         # no field: for `typed` alone
    return args


def typed(args, field):
    """Was this flag given, and not left to a preset?"""
    return field in getattr(args, "given", ())


def from_presets(cls, presets, given, quiet=False):
    """The flags `given` ({field: value}) as a `cls`, completed by presets; prints which, and its cost. BadInput."""
    merged, name = merge(cls, presets, given)
    usual, _ = merge(cls, presets, {k: v for k, v in given.items() if k not in COSTLY})
    cost = merged.pop("cost", "")
    if changed := [f"{flag(k)} {shown(merged[k])}" for k in COSTLY if merged.get(k) != usual.get(k)]:
        cost = f"its cost changes with {' '.join(changed)}; the end is estimated after 20 steps"
    if cost and not quiet:
        say(f"preset {name}: {cost}")
    return cls(**merged)


def merge(cls, presets, given):
    """({field: value}, name of the preset): defaults < preset < data < mode < flags. Raises BadInput."""
    asked = {f.name: f.default for f in dataclasses.fields(cls)} | given
    digits = asked["dataset"] == "digits"
    if digits and asked["preset"] != "auto":
        raise BadInput("the digits have one preset; leave --preset out")
    cuda = asked["device"] in ("auto", "cuda") and torch.cuda.is_available()
    best = "digits" if digits else "small" if not cuda else "fast" if "fast" in presets else "paper"
    name = best if asked["preset"] == "auto" else asked["preset"]
    if name not in presets:
        raise BadInput(f"there is no --preset {name} here; leave it out")
    asked |= presets[name] | ({} if digits else dict(preset=name))
    asked |= presets.get(asked["dataset"] if asked["dataset"] in DATASETS else "folder", {})
    return asked | presets.get(asked.get("mode"), {}) | given, name


def resumed(cls, given):
    """The Args of the run that --resume names, with those flags in `given` that may change. Raises BadInput."""
    folder = given["resume"]
    config = config_of(folder)
    if config["about"]["script"] != script(inspect.getfile(cls)):
        raise BadInput(f"{folder} was made by {config['about']['script']}; resume it with that")
    old = known(cls, config, folder)
    for k, v in given.items():
        if v != old[k] and k not in MAY_CHANGE - set(getattr(cls, "fixed", ())):
            raise BadInput(f"{flag(k)} defines the run, --resume cannot change it; start a new run")
    return cls(**old | given)


def known(cls, config, folder):
    """The fields of `cls` in `config`, that of a run folder, also where an older script called them otherwise; `added`
    holds what older runs did where they did not have a field. BadInput where one is missing or of another type."""
    renamed = getattr(cls, "renamed", {})
    config = ADDED | getattr(cls, "added", {}) | {renamed.get(k, k): v for k, v in config.items()}
    for f in dataclasses.fields(cls):
        if f.name not in config or not fits(config[f.name], f, cls):
            what = f"{f.name} = {str(config[f.name])[:50]!r}" if f.name in config else f"no {f.name}"
            raise BadInput(f"{folder}: its config.json has {printable(what)}, which this script cannot use; restore it")
    return {f.name: config[f.name] for f in dataclasses.fields(cls)}


def fits(value, field, cls):
    """Is this, from a file, a value for a field? The fields in cls.empty may have none."""
    if choices := get_args(field.type):                   # of a Literal
        return value in choices
    if field.type is tuple:
        return isinstance(value, tuple) and all(type(v) is int for v in value)
    if value is None:
        return field.name in getattr(cls, "empty", ())
    return type(value) in ((int, float) if field.type is float else (field.type,)) and "\0" not in str(value)


def comments(cls):
    """[(heading, field, help text, [(sign, limit)])] of a dataclass, from its source; a heading is a '# --- ..'."""
    found, heading = [], "the run"
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for line in inspect.getsource(cls).splitlines():
        if ruler := re.match(r" +# --- (.*)", line):
            heading = ruler[1]
        if note := re.match(r"    (\w+):.*?  # *(.*)$", line):
            bounds = re.search(r"\(([<>][^()]*)\)$", note[2])
            bounds = re.findall(r"([<>]=?) *([^ ,]+)", bounds[1]) if bounds else []
            found.append((heading, fields[note[1]], note[2], bounds))
    return found


def check_bounds(args):
    """Compare every number with the bounds in its field's comment; a bound may name another field. BadInput."""
    for _, field, _, bounds in comments(type(args)):
        name, value = flag(field.name), getattr(args, field.name)
        values = value if isinstance(value, tuple) else (value,)
        if value is None:                                 # settled by the method: this run has none
            continue
        if field.type is float and not abs(value) < 1e300:
            raise BadInput(f"{name} must be a finite number, not {value}")
        if field.type in (int, tuple) and any(abs(v) > LARGEST for v in values):
            raise BadInput(f"{name} must be at most {LARGEST:,}")
        for sign, limit in bounds:
            compare, words = COMPARE[sign]
            number = getattr(args, limit) if hasattr(args, limit) else float(limit)
            if not all(compare(v, number) for v in values):
                other = f"{flag(limit)} = " if hasattr(args, limit) else ""
                raise BadInput(f"{name} must be {words} {other}{number:g}")


def integers(text):
    """'1,2,2' -> (1, 2, 2)."""
    return tuple(int(s) for s in text.replace(",", " ").split())


def parser(cls, values=None, presets=(), preset=""):
    """The parser of a dataclass. With `values`, what this command would run with: each help text ends in its value
    and, where that is another one, the default, which is the paper's."""
    module = sys.modules[cls.__module__]
    name = script(inspect.getfile(cls))
    start = f"python -m {name}" if "." in name else f"python {name}.py"
    costs = [f"  {k:8}{presets[k]['cost']}{' (this command)' * (k == preset)}" for k in presets if "cost" in presets[k]]
    ap = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, usage=f"{start} [--flag value ..]",
                formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False, description=module.__doc__,
                epilog="\n".join([f"examples:\n  {start}\n  {start} --dataset cifar10 --steps 2\n\npresets:", *costs]))
    groups = {}
    for heading, field, text, _ in comments(cls):
        group = groups[heading] = groups.get(heading) or ap.add_argument_group(heading)
        now, paper = (values or {}).get(field.name, field.default), field.default
        text = f"{text} [{shown(now)}{f'; paper {shown(paper)}' if now != paper else ''}]".replace("%", "%%")
        kind = dict(type=integers if field.type is tuple else field.type, metavar=field.type.__name__)
        if field.type is bool:
            kind = dict(action=argparse.BooleanOptionalAction)            # --bf16 / --no-bf16
        elif choices := get_args(field.type):                             # of a Literal
            kind = dict(choices=choices)
        group.add_argument(flag(field.name), dest=field.name, help=text, **kind)
    ap.add_argument("-h", "--help", action="store_true", help="print this for the other flags given, and exit")
    return ap


def shown(value):
    """A value as it would be typed."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else "none" if value == "" else str(value)


def script(file):
    """Path of a script -> the name to import it by: ect, common.teacher."""
    return ".".join(Path(file).resolve().relative_to(ROOT).with_suffix("").parts)


# ---- config.json and --device --------------------------------------------------------------------
def config_of(folder):
    """The flags of a run folder as written by folder.write_config, with `about`. Raises BadInput."""
    try:
        file = Path(folder) / "config.json"
        config = json.loads(file.read_text()) if os.path.isfile(file) else {}    # a FIFO would be waited for
        if {str} != {type(config["about"][k]) for k in ("script", "data_sha256")}:
            raise TypeError
    except Exception:                                     # of json, also of its depth, and of a text that is none
        raise BadInput(f"{printable(str(folder)[-100:])} is no run folder: its config.json is missing or damaged")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in config.items()}


def device_of(name):
    """--device -> cuda, cpu or mps. Raises BadInput if it is not there."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name != "cpu" and not (torch.cuda if name == "cuda" else torch.backends.mps).is_available():
        raise BadInput(f"--device {name}: there is no such device here; leave --device out")
    return name


def memory(device):
    """Peak memory of this process in GB: of the GPU if there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":                                 # it has no such module
        return 0.0
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
