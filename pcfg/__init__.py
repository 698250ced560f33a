"""Grammars with a known distribution: sampling, charts, labels and masked conditionals."""

import hashlib
import os
import re
import sys
from pathlib import Path


def kernel_cache(folder: Path) -> Path:
    """The cache folder of the kernels in `folder` and the folders in it, named by a hash of the files that have some."""
    contents = (path.read_bytes() for path in sorted(folder.rglob("*.py")))
    kernels = hashlib.sha256(b"".join(content for content in contents if re.search(rb"^(from|import) numba", content, re.M)))
    return folder / "__pycache__" / f"kernels-{kernels.hexdigest()[:16]}"


def _keep_kernels_with_their_sources(folder: Path) -> None:
    """Give numba a cache folder of its own for this state of the files that have kernels.

    Numba compiles a cached kernel again when its own file changes, but not when a kernel that it calls, in another file, does;
    old machine code would then be run with the new sources. A user's own NUMBA_CACHE_DIR is left alone.
    """
    if os.access(folder, os.W_OK):  # else numba looks for another place by itself
        os.environ.setdefault("NUMBA_CACHE_DIR", str(kernel_cache(folder)))
    if "numba" in sys.modules:  # which has read its environment
        sys.modules["numba"].config.reload_config()


_keep_kernels_with_their_sources(Path(__file__).parent)
