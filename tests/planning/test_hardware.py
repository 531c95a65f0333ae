"""The table of hardware, and how one's own is described."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bigvision.errors import UserError
from bigvision.planning.hardware import DEVICES, LINKED, LINKS, device_named, measured_file, parse_hardware


@pytest.mark.parametrize(
    ("text", "device", "ranks", "per_host", "spelled"),
    [
        ("8xH200", "H200", 8, 8, "8xH200"),
        ("16x8xH100", "H100", 128, 8, "16x8xH100"),
        ("1024xH100", "H100", 1024, 8, "128x8xH100"),
        ("h100", "H100", 1, 1, "H100"),
        ("4 x RTX 4090", "RTX4090", 4, 4, "4xRTX4090"),
        ("2x4090", "RTX4090", 2, 2, "2xRTX4090"),
        ("8xA100", "A100-80", 8, 8, "8xA100-80"),
        ("8xNVIDIA H100 80GB HBM3", "H100", 8, 8, "8xH100"),
    ],
)
def test_names(text: str, device: str, ranks: int, per_host: int, spelled: str) -> None:
    found = parse_hardware(text)
    assert (found.device.name, found.ranks, found.per_host, str(found)) == (device, ranks, per_host, spelled)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8xH20O", ["did you mean 'h200'", "FILE.yaml", "bandwidth"]),
        ("0xH100", ["8xH200"]),
        ("2x2x2xH100", ["8xH200"]),
        ("12xH100", ["2x6xH100"]),
        ("", ["FILE.yaml"]),
        ("missing.yaml", ["missing.yaml", "No such file"]),
    ],
)
def test_unknown_names_are_one_clear_line(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as raised:
        parse_hardware(text)
    assert "\n" not in str(raised.value)
    assert all(word in str(raised.value) for word in words), raised.value


def test_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(
        "device: {name: Mine, memory: 48GB, flops: {bf16: 2e14}, bandwidth: 9e11}\n"
        "ranks: 16\nper_host: 4\nwithin: {bandwidth: 1.0e+11}\nbetween: ethernet-100\n"
    )
    found = parse_hardware(str(file))
    assert (found.device.name, found.device.memory, found.device.flops) == ("Mine", 48 * 10**9, {"bf16": 2e14})
    assert (found.ranks, found.per_host, found.within.bandwidth) == (16, 4, 1e11)
    assert found.between.bandwidth == 12.5e9 / 4  # the port is the host's
    file.write_text("device: H100\nranks: 2\n")
    assert parse_hardware(str(file)).within == LINKS["NVLink4"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("device: {name: X, memory: 48GB, flops: {bf16: 2e14}}", "device.bandwidth is missing"),
        ("device: {memory: 48GB, flops: {bf17: 2e14}, bandwidth: 1e9}", "did you mean 'bf16'"),
        ("device: {memory: 48GB, flops: {bf16: fast}, bandwidth: 1e9}", "'fast' is not a number above 0"),
        ("device: {memory: 48XB, flops: {bf16: 1e14}, bandwidth: 1e9}", "is not a size"),
        ("device: H100\nranks: 1.5", "is not a whole number above 0"),
        ("device: H100\nranks: 12\nper_host: 8", "not whole hosts"),
        ("device: H100\nbetwen: PCIe4", "did you mean 'between'"),
        ("device: H100\nbetween: PCIe44", "did you mean 'PCIe4'"),
        ("- H100", "must be a mapping"),
        ("device: [", "not valid YAML"),
    ],
)
def test_mistakes_in_ones_own(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"mine\.yaml") as raised:
        parse_hardware(str(file))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_the_table_is_whole() -> None:
    assert LINKED.keys() == DEVICES.keys() and {link for pair in LINKED.values() for link in pair} <= LINKS.keys()
    for device in DEVICES.values():
        assert device.source and device.flops["fp32"] <= device.flops["tf32"] <= device.flops["bf16"] <= 3e15
    known = {
        "NVIDIA A100-SXM4-40GB": "A100-40", "NVIDIA A100-SXM4-80GB": "A100-80", "NVIDIA A100 80GB PCIe": "A100-80-PCIe",
        "NVIDIA H100 80GB HBM3": "H100", "NVIDIA H100 PCIe": "H100-PCIe", "NVIDIA H100 NVL": "H100-NVL", "NVIDIA H200": "H200",
        "NVIDIA B200": "B200", "NVIDIA L40S": "L40S", "NVIDIA GeForce RTX 4090": "RTX4090",
        "NVIDIA GeForce RTX 5090": "RTX5090",
        "NVIDIA GeForce RTX 4090 D": None, "NVIDIA GeForce RTX 4090 Laptop GPU": None, "NVIDIA H20": None, "Tesla T4": None,
        "NVIDIA H200 NVL": None, "NVIDIA GH200 480GB": None, "NVIDIA GB200": None, "NVIDIA H100 80GB HBM3 MIG 1g.10gb": None,
    }  # fmt: skip
    for name, device in known.items():
        assert getattr(device_named(name), "name", None) == device, name


def test_what_was_measured_here_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UserError, match="plan --calibrate"):
        parse_hardware("here")
    assert parse_hardware("2xcpu").device.rates is None
    file = measured_file("cpu", 1)
    file.parent.mkdir()
    file.write_text(json.dumps({"device": {}}))
    with pytest.raises(UserError, match="calibrate again"):
        parse_hardware("here")


def test_no_torch() -> None:
    program = "import sys, bigvision.planning.hardware as h; h.parse_hardware('8xH200'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
