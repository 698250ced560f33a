"""Grammars with a known distribution: sampling, charts, labels and masked conditionals."""

import hashlib
import os
import re
import sys
from pathlib import Path

# Whether the kernels use numpy arrays in place of vector registers: PCFG_LANES=plain (`pcfg.engine.plain_lanes`).
PLAIN_LANES = os.environ.get("PCFG_LANES") == "plain"


def kernel_cache(folder: Path) -> Path:
    """The cache folder of the kernels below `folder`, named by a hash of the files that have some."""
    contents = (path.read_bytes() for path in sorted(folder.rglob("*.py")))
    kernels = hashlib.sha256(b"".join(content for content in contents if re.search(rb"^(from|import) numba", content, re.M)))
    return folder / "__pycache__" / f"kernels-{kernels.hexdigest()[:16]}"


def _keep_kernels_with_their_sources(folder: Path) -> None:
    """Give numba a cache folder for this state of the files that have kernels, and another one for plain lanes.

    Numba compiles a cached kernel again when its own file changes, but not when a kernel that it calls, in another file, does;
    the old machine code would run with the new sources. A user's own NUMBA_CACHE_DIR stays, but for the plain lanes' suffix.
    """
    place = os.environ.get("NUMBA_CACHE_DIR")
    if not place and os.access(folder, os.W_OK):  # else numba looks for another place by itself
        place = str(kernel_cache(folder))
    if place:
        os.environ["NUMBA_CACHE_DIR"] = place.removesuffix("-plain") + ("-plain" if PLAIN_LANES else "")
    if "numba" in sys.modules:  # which has read its environment
        sys.modules["numba"].config.reload_config()


_keep_kernels_with_their_sources(Path(__file__).parent)
