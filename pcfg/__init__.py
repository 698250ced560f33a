"""Grammars with a known distribution: sampling, charts, labels and masked conditionals."""

import functools
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


@functools.cache  # once
def say_when_compiling() -> None:
    """Have the first compilation of a kernel on this machine print why nothing moves; modules with kernels call this."""
    from llvmlite import binding
    from numba.core import event

    class Notice(event.Listener):
        is_silent = False

        def on_start(self, event: event.Event) -> None:  # noqa: ARG002 (numba's protocol)
            if self.is_silent:
                return
            self.is_silent = True
            place = os.environ.get("NUMBA_CACHE_DIR", f"{os.devnull}/nowhere")
            mark = Path(place, f"announced-{binding.get_host_cpu_name()}")
            try:
                mark.parent.mkdir(parents=True, exist_ok=True)
                mark.touch(exist_ok=False)
            except FileExistsError:
                return
            except OSError:  # nothing can be kept there: each process compiles, and says it
                pass
            print("compiling kernels for this machine, once: up to a minute", file=sys.stderr, flush=True)

        def on_end(self, event: event.Event) -> None:
            pass

    event.register("numba:compile", Notice())
