import errno
import os

import numpy as np
import pytest

from pcfg.common import direct
from pcfg.common.direct import BUFFER_BYTES, DirectWriter


def blocks_of(total, seed):
    """Random bytes in blocks of odd sizes, some larger than the buffer, some empty."""
    rng = np.random.default_rng(seed)
    content = rng.bytes(total)
    cuts = np.unique(rng.integers(0, total + 1, size=7)) if total else []
    return content, [part.tobytes() for part in np.split(np.frombuffer(content, np.uint8), cuts)]


@pytest.mark.parametrize(
    "total", [0, 1, 4095, 4096, 4097, BUFFER_BYTES - 1, BUFFER_BYTES, BUFFER_BYTES + 1, 3 * BUFFER_BYTES + 777]
)
def test_a_file_has_what_was_written(tmp_path, total):
    content, blocks = blocks_of(total, total)
    (tmp_path / "file").write_bytes(b"older and longer" * 1000)
    with DirectWriter(tmp_path / "file") as file:
        for block in blocks:
            file.write(memoryview(block))
    assert (tmp_path / "file").read_bytes() == content
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write(path, content, blocks):
    with DirectWriter(path) as file:
        for block in blocks:
            file.write(block)
    assert path.read_bytes() == content


def test_systems_and_file_systems_without_direct_writes(tmp_path, monkeypatch):
    content, blocks = blocks_of(BUFFER_BYTES + 5000, 1)
    real_write, real_fcntl, refused = os.write, direct.fcntl.fcntl, []

    def refuse_direct(descriptor, data):
        if real_fcntl(descriptor, direct.fcntl.F_GETFL) & direct.DIRECT:
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, data)

    with monkeypatch.context() as patched:  # refused when writing, as some network file systems do
        patched.setattr(os, "write", refuse_direct)
        write(tmp_path / "a", content, blocks)
    assert len(refused) == (1 if _has_direct(tmp_path) else 0)

    def refuse_flag(descriptor, command, *flags):
        if command == direct.fcntl.F_SETFL and flags[0] & direct.DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_fcntl(descriptor, command, *flags)

    with monkeypatch.context() as patched:  # refused when asked for, as tmpfs did
        patched.setattr(direct.fcntl, "fcntl", refuse_flag)
        write(tmp_path / "b", content, blocks)
    with monkeypatch.context() as patched:  # a system without them
        patched.setattr(direct, "DIRECT", 0)
        write(tmp_path / "c", content, blocks)


def _has_direct(folder):
    with DirectWriter(folder / "probe") as file:
        return file._is_direct


def test_a_full_disk_is_an_error_and_other_errors_are_no_excuse(tmp_path, monkeypatch):
    for code in (errno.ENOSPC, errno.EIO):

        def refuse(*_, code=code):
            raise OSError(code, os.strerror(code))

        with monkeypatch.context() as patched, pytest.raises(OSError, match=os.strerror(code)):
            patched.setattr(os, "write", refuse)
            with DirectWriter(tmp_path / "file") as file:
                file.write(bytes(BUFFER_BYTES + 1))


def test_short_writes_go_on(tmp_path, monkeypatch):
    content, blocks = blocks_of(2 * BUFFER_BYTES + 5000, 2)
    real_write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real_write(descriptor, data[:65536]))
    write(tmp_path / "file", content, blocks)
