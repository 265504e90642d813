"""How tests run commands: main() in this process, with flags, in a folder of its own."""

import functools
import importlib
import signal
import sys
import warnings

import pytest

import public_weights
import sample


def contents(folder):
    """{path: bytes} of all files below a folder, and None for folders."""
    files = {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}
    return {str(path): data for path, data in files.items()}


LOAD = public_weights.load


@functools.cache
def shipped(dtype):
    """The shipped model, loaded once for all tests."""
    return LOAD(sample.TINY, dtype, trained_dtype=dtype)


def load(name, dtype, trained_dtype=None, **parts):
    if str(name) == sample.TINY and not any(parts.values()):
        return shipped(dtype)
    return LOAD(name, dtype, trained_dtype=trained_dtype or dtype, **parts)


@pytest.fixture
def call(monkeypatch, capfd, tmp_path):
    """call("sample", *flags) runs a module's main(): (exit code, stdout, stderr's lines)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(public_weights, "load", load)
    handler, show = signal.getsignal(signal.SIGINT), warnings.showwarning

    def run(name, *flags):
        monkeypatch.setattr(sys, "argv", [name, *map(str, flags)])
        code = 0
        try:
            importlib.import_module(name).main()
        except SystemExit as stopped:
            code = stopped.code
        out, error = capfd.readouterr()
        return code, out, error.strip().splitlines()

    yield run
    signal.signal(signal.SIGINT, handler)
    warnings.showwarning = show


def check_refused(done, words):
    """Assert that what `call` returned is exit code 2 and one line, "error: ... words ..."."""
    code, _, lines = done
    assert code == 2 and len(lines) == 1, lines
    assert lines[0].startswith("error: ") and words in lines[0] and "Traceback" not in lines[0]
