"""The dtype of the arithmetic, names of new files, and bounds of numbers."""

import argparse
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from cli import bounded, choose_dtype, device_of, free_name

CPU = torch.device("cpu")


@pytest.fixture
def cpu(monkeypatch):
    """cpu(...) pretends to be another processor."""

    def pretend(supported, capability="AVX512", bf16=True, amx=False, machine="x86_64"):
        mkldnn = SimpleNamespace(_is_mkldnn_bf16_supported=lambda: supported)
        monkeypatch.setattr("torch.ops.mkldnn", mkldnn)
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
        monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: bf16)
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
        monkeypatch.setattr("platform.machine", lambda: machine)

    return pretend


@pytest.mark.parametrize(
    "processor, expected",
    [
        ({"supported": True}, torch.bfloat16),
        ({"supported": True, "bf16": False, "amx": True}, torch.bfloat16),
        # AVX-512 alone: torch says that it is supported, and it is slower than float32.
        ({"supported": True, "bf16": False}, torch.float32),
        ({"supported": False, "capability": "AVX2", "bf16": False}, torch.float32),
        ({"supported": True, "machine": "aarch64", "capability": "DEFAULT"}, torch.bfloat16),
        ({"supported": False, "machine": "aarch64", "capability": "DEFAULT"}, torch.float32),
    ],
)
def test_a_cpu_computes_in_what_it_is_fast_at(cpu, processor, expected):
    cpu(**processor)
    dtype, reason = choose_dtype(CPU)
    assert dtype == expected
    assert ("has no bfloat16" in reason) == (expected == torch.float32)


def test_a_given_dtype_overrides(cpu):
    cpu(supported=False)
    assert choose_dtype(CPU, "bfloat16") == (torch.bfloat16, "as --dtype says")


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_gpu_without_bfloat16_computes_in_float16(monkeypatch, has_bfloat16):
    asked = []

    def is_supported(including_emulation=True):
        asked.append(including_emulation)
        return has_bfloat16

    monkeypatch.setattr("torch.cuda.is_bf16_supported", is_supported)
    monkeypatch.setattr("torch.ones", lambda *size, **options: torch.zeros(2, 2))
    dtype, _ = choose_dtype(SimpleNamespace(type="cuda"))
    assert dtype == (torch.bfloat16 if has_bfloat16 else torch.float16)
    assert asked == [False], "emulated bfloat16 is slow"


def test_a_device_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit) as stopped:
        device_of("nope")
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: --device nope is not available")


def test_names_are_taken_when_they_are_chosen(tmp_path):
    """Twenty at once get twenty names."""
    with ThreadPoolExecutor(20) as pool:
        names = list(pool.map(lambda _: free_name(tmp_path / "sample.png"), range(20)))
    assert len(set(names)) == 20 and tmp_path / "sample.png" in names


@pytest.mark.parametrize("text", ["0", "nan", "inf", "1001", "x", "1.5"])
def test_a_number_out_of_its_bounds_is_refused(text):
    parser = argparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--steps", type=bounded(int, 1, 1000))
    with pytest.raises(argparse.ArgumentError, match="int from 1 to 1000"):
        parser.parse_args(["--steps", text])
