"""The README's pictures.

python -m tests.bench.pictures OUT.png RUN..          the same noise: a row for the teacher, and one for each run and step
python -m tests.bench.pictures OUT.png RUN --edits    what a run does without training: python -m common.sample --edit"""
import argparse
import io
import tempfile

from PIL import Image, ImageDraw, ImageFont

from common import compare, sample

NAMES = dict(cd="CD", ct="CT", ict="iCT", ect="ECT", rcm="rCM", teacher="teacher") | {"scm sct": "sCT", "scm scd": "sCD"}


def sheet(rows):
    """[(text, picture)] -> one picture, the text left of each row."""
    font, left = ImageFont.load_default(14), 104
    out = Image.new("RGB", (left + max(p.width for _, p in rows), sum(p.height + 4 for _, p in rows) - 4), "white")
    y = 0
    for text, picture in rows:
        ImageDraw.Draw(out).text((0, y + picture.height / 2), text, "black", font, "lm")
        out.paste(picture, (left, y))
        y += picture.height + 4
    return out


def methods(runs):
    """The first images of the newest grids, enlarged."""
    rows = {}
    for run in map(compare.read, runs):
        for steps, strip in run.strips.items():
            picture = Image.open(io.BytesIO(strip))
            zoom = max(2, 48 // picture.height)
            name = f"{NAMES.get(run.method, run.method)}, {compare.in_steps(steps)}" if steps else "teacher"
            rows.setdefault(name, picture.resize((picture.width * zoom, picture.height * zoom), Image.NEAREST))
    return list(rows.items())


def edits(run):
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        for edit in ("inpaint", "superres", "stroke", "denoise", "interpolate"):
            sample.main([run, "--edit", edit, "--n", "24" if edit == "interpolate" else "16", "--out", f"{tmp}/x.png"])
            rows.append((edit, Image.open(f"{tmp}/x.png").convert("RGB")))
    return rows


def main(argv=None):
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("out")
    ap.add_argument("runs", nargs="+")
    ap.add_argument("--edits", action="store_true")
    a = ap.parse_args(argv)
    sheet(edits(a.runs[0]) if a.edits else methods(a.runs)).quantize(64).save(a.out, optimize=True)


if __name__ == "__main__":
    main()
