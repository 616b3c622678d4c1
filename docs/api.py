"""Write the API reference, from docstrings: `python docs/api.py FOLDER` (extra `docs`)."""

import sys
from pathlib import Path

import pdoc

import mmpack

# Beside the public names, what the pages of docs/ use.
MODULES = [
    "mmpack",
    "mmpack.hf",
    "mmpack.ops",
    "mmpack.packing.cost",
    "mmpack.store.build",
    "mmpack.packing.pack_stats",
]

if __name__ == "__main__":
    for name in mmpack.__all__:  # some come lazily, and pdoc looks into the module alone
        setattr(mmpack, name, getattr(mmpack, name))
    pdoc.render.configure(docformat="google")
    pdoc.pdoc(
        *MODULES, "!mmpack.packing.assemble", "!mmpack.ops.", output_directory=Path(sys.argv[1])
    )
