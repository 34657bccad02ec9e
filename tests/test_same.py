"""A diff of two method files shows the algorithm and no more; sections 1-3 can be copied as they stand."""
import ast
import builtins
import dataclasses
import importlib
import re
import symtable
from itertools import pairwise

import pytest
from conftest import METHODS, ROOT

BUDGET = dict(cd=290, ct=260, ict=260, ect=260, scm=290, rcm=370)
HEADS = ["1. Schedules", "2. Loss", "3. Sampling", "4. Arguments", "5. Training"]
START = 90                                                # loss_fn begins by this line, but in rcm
NAMES = {"paper", "fast", "small", "digits", "mnist", "fashion_mnist", "cifar10", "folder", "latents"}  # of presets
MODES = {"scd"}                                           # .. and of modes with one
text = lambda name: (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
each_method = pytest.mark.parametrize("method", METHODS)


def section(t, first, last=None):
    """The text from one ruler to another."""
    return t[t.index(f"# ==== {first}."):t.index(f"# ==== {last}.") if last else None]


def without_arguments(t):
    """All the code that may read a flag."""
    return section(t, 1, 4) + t[t.index("\n\n\nPRESETS"):]


def flags(t, own=False):
    """(name, type, help) of the run's flags, or of the method's own: all but the defaults."""
    run, method = t[t.index("    # --- the run"):t.index("\n\n\nPRESETS")].split("    # --- the method")
    lines = [line for line in (method if own else run).splitlines()[1:] if "# ---" not in line]
    return [re.fullmatch(r"    (\w+): (.+?) = .+?  # *(.+)", line).groups() for line in lines]


def shared(t):
    """What is the same in all files: the run's flags, and section 5 without the lines marked  # *"""
    return flags(t), [line for line in section(t, 5).splitlines() if not line.endswith("# *")]


# ---- the same in all files -----------------------------------------------------------------------
@pytest.mark.parametrize("a, b", list(pairwise(METHODS)))
def test_shared_parts_are_identical(a, b):
    """A line of the loop or a flag changed in one file only."""
    (flags_a, main_a), (flags_b, main_b) = shared(text(a)), shared(text(b))
    assert flags_a == flags_b and main_a == main_b


@each_method
def test_the_comparison_sees_what_it_should(method):
    """A comparison that is blind to drift, or that forbids what a star or a default allows."""
    t = text(method)
    for old, new in (("set_to_none=True", "set_to_none=False"), ("lr: float", "rate: float"),
                     ("# sampling steps", "# steps"), ("run.save(it, state)", "run.save(it)")):
        assert t.count(old) >= 1 and shared(t.replace(old, new)) != shared(t), old
    starred = next(line for line in section(t, 5).splitlines()[1:] if line.endswith("# *"))
    assert shared(t.replace(starred, "    pass  # *")) == shared(t)
    assert shared(re.sub(r"(batch: int =) \d+", r"\1 7", t)) == shared(t)


# ---- form ----------------------------------------------------------------------------------------
@each_method
def test_form(method):
    """A file beyond its budget, a line beyond its width; rulers or docstring parts lost or out of order."""
    t, lines = text(method), text(method).splitlines()
    rulers = [line for line in lines if line.startswith("# ====")]
    assert [r.split("(")[0].strip("# =") for r in rulers] == HEADS and {len(r) for r in rulers} == {100}
    assert len(lines) <= BUDGET[method] and max(map(len, lines)) <= 100 and t.isascii()
    assert not any(line != line.rstrip() for line in lines) and t.endswith("\n")
    assert method == "rcm" or t[:t.index("def loss_fn")].count("\n") < START, "mathematics first"
    doc = ast.get_docstring(ast.parse(t))
    parts = re.findall(r"^(Idea|One training step|Deviations from the paper|Read next)\b", doc, re.M)
    assert parts == ["Idea", "One training step", "Deviations from the paper", "Read next"]
    assert doc.startswith(f"{method}.py: ") and re.search(r"arXiv:\d{4}\.\d{5}", doc.splitlines()[0])


@each_method
def test_args_is_the_only_class_and_stands_alone(method):
    """Inheritance, registries and hooks: the reader would have to look elsewhere."""
    classes = [n for n in ast.walk(ast.parse(text(method))) if isinstance(n, ast.ClassDef)]
    assert [c.name for c in classes] == ["Args"] and not classes[0].bases


def free_names(code):
    """Names that the code takes from outside itself, by the scopes of its syntax tree; imports count."""
    top = symtable.symtable(code, "sections 1-3", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() and not s.is_imported()}

    def walk(table):
        for s in table.get_symbols():
            outside = s.is_global() if table is not top else not s.is_assigned()
            if s.is_imported() or s.is_referenced() and outside and s.get_name() not in defined:
                yield s.get_name()
        for child in table.get_children():
            yield from walk(child)
    return set(walk(top)) - set(dir(builtins))


@each_method
def test_sections_1_to_3_need_only_torch_math_and_jvp(method):
    """A name of main(), a helper of common/ or an import inside would break the copy in another codebase."""
    assert free_names(section(text(method), 1, 4)) <= {"torch", "math", "jvp"}


def test_free_names_sees_every_way_out():
    code = """import os
def f(a):
    b = [c for c in a]
    return g(b) + run.x + f(c)
def g(x=args): import re"""
    assert free_names(code) == {"os", "run", "c", "args", "re"}


# ---- flags and presets ---------------------------------------------------------------------------
@each_method
def test_every_flag_is_used(method):
    """A flag that does nothing. The method's own are read in its file; the run's may be read in common/."""
    t = text(method)
    common = "".join(p.read_text() for p in (ROOT / "common").glob("*.py"))
    read = lambda name, where: re.search(rf"\b(a|args)\.{name}\b|getattr\((self\.)?args, \"{name}\"", where)
    given = re.compile(r"given\.get\(\"(\w+)\"")                          # parse() reads what was typed
    unused = [name for name, *_ in flags(t) if not read(name, without_arguments(t) + common)
              and name not in given.findall(common)]
    assert unused == []
    assert [name for name, *_ in flags(t, own=True) if not read(name, without_arguments(t))] == []


@pytest.mark.parametrize("name", METHODS + ["common.teacher"])
def test_flags_and_presets_fit_the_arguments(name):
    """A misspelt key or preset is silently ignored or fails only on the machine that needs it."""
    module = importlib.import_module(name)
    fields = {f.name: f.default for f in dataclasses.fields(module.Args)}
    assert {"paper", "small", "digits"} <= set(module.PRESETS) <= NAMES | MODES
    for preset, values in module.PRESETS.items():
        values = dict(values)
        assert isinstance(values.pop("cost", ""), str)
        for key, value in values.items():
            assert type(value) is type(fields[key]), f"{preset}: {key}={value!r}"
    for line in re.findall(r"^    (\w+: .+ = .+)$", text(name).split("\n\n\nPRESETS")[0], re.M):
        assert re.search(r"  # \S", line), f"no help: {line}"


# ---- common/ -------------------------------------------------------------------------------------
def code_words(tree):
    """Every word of identifiers and strings; docstrings, which are prose, left out."""
    prose = {id(n.body[0].value) for n in ast.walk(tree)
             if isinstance(n, (ast.Module, ast.ClassDef, ast.FunctionDef)) and n.body
             and isinstance(n.body[0], ast.Expr)}
    for n in ast.walk(tree):
        for value in ("" if id(n) in prose else v for _, v in ast.iter_fields(n)):
            if isinstance(value, str):
                yield from re.findall(r"[a-z]+", value.lower())


MAY_READ = {"sd", "t_min", "t_mid", "t_max", "sigma_max", "mode", "flow"}          # where a method has them


def reads(code):
    """The names that the code reads of args or a: as attributes, or by getattr and hasattr."""
    return set(re.findall(r"\b(?:args|a|asked)\.([A-Za-z_]\w*)", code)
               + re.findall(r"(?:getattr|hasattr)\((?:self\.)?\w+, \"(\w+)\"", code))


@pytest.mark.parametrize("file", sorted(p.name for p in (ROOT / "common").glob("*.py")))
def test_common_reads_no_flag_of_a_method(file):
    """`boundaries` or `lambda_dmd` in common/: the next method's flags would have to be known there, too."""
    own = {name for m in METHODS for name, *_ in flags(text(m), own=True)}
    teachers = {f.name for f in dataclasses.fields(importlib.import_module("common.teacher").Args)}
    known = MAY_READ | (teachers if file == "teacher.py" else set())
    assert not reads((ROOT / "common" / file).read_text()) & (own - known)
    assert reads('x = args.N + a.q * getattr(self.args, "H", 0)') == {"N", "q", "H"} <= own


@pytest.mark.parametrize("file", [p.name for p in (ROOT / "common").glob("*.py")])
def test_common_knows_no_method(file):
    """`if method == ..` in common/: the next method would have to be written there, too."""
    assert not set(code_words(ast.parse((ROOT / "common" / file).read_text()))) & set(BUDGET)


def test_code_words_reads_names_and_strings_but_no_prose():
    code = 'def f(a_b):\n    "ect in prose"\n    return x.scm(k="run-ict", rcm=f"ct {cd}")'
    words = set(code_words(ast.parse(code)))
    assert words >= {"a", "b", "scm", "ict", "rcm", "ct", "cd"} and "ect" not in words
