"""Not part of the package. `python common/sample.py` puts common/ itself on Python's path, so that `import common`
finds this file where the package is meant. All that it does is to say how to start the file instead."""
import sys
from pathlib import Path

file = Path(sys.argv[0]).resolve()
print(f"error: {file.name} is part of a package; go to {file.parent.parent} and type: "
      + " ".join(["python -m", f"common.{file.stem}", *sys.argv[1:]]), file=sys.stderr)
raise SystemExit(2)
