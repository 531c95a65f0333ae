"""Devices and links: what datasheets promise, what was measured, and how one's own hardware is described.

Nothing here imports torch at the top: a list of what fits starts fast, and a laptop needs no GPU.
"""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bigvision.config.values import parse, parse_size
from bigvision.errors import UserError, nearest

if TYPE_CHECKING:
    from bigvision.runtime import Runtime

GIB = 1 << 30
PER_HOST = 8
"""Devices of a host where a number of devices is all that is given."""
Curve = tuple[tuple[float, float], ...]
"""A rate as a function of an operation's size: (size, rate), by size; between two of them it is interpolated. The size is in
FLOPs for each byte moved where the rate is in FLOP/s, and in bytes moved where it is in bytes/s."""


KEPT = 64 << 20
"""Bytes of a step's memory that cost no more than its operations measured by themselves: twice the largest array that glibc
does not map by itself."""


@dataclass(frozen=True)
class Rates:
    """What a device was measured to reach, by the name of the rate (`operations.rate_name`)."""

    curves: Mapping[str, Curve]
    """"product bf16": FLOPs of one operation, FLOP/s. "add": bytes that one operation reads and writes, bytes/s."""
    overhead: float
    """Seconds that an operation takes beside its work; where the device runs behind the host, of the host."""
    gaps: float = 1.0
    """What a pass takes over the sum of its operations, each measured by itself."""
    fresh: float = 0.0
    """Seconds for each byte beyond `KEPT` that a step needs at once, as a small network took them (`calibrate.py`)."""


@dataclass(frozen=True)
class Device:
    name: str
    memory: int
    """Bytes, as torch reports them: less than the number on the box."""
    flops: Mapping[str, float]
    """Dense peak, without sparsity, by number format: fp32, tf32, bf16, fp16, fp8. Products are summed in fp32."""
    bandwidth: float
    """Bytes/s between the device and its memory."""
    source: str
    measured: str | None = None
    """What was measured on such a device with bigvision; None where nobody has."""
    kind: str = "cuda"
    """torch's type of device."""
    rates: Rates | None = None
    """What `bigvision plan --calibrate` found; None takes `timing.SHARES` of the peaks."""


@dataclass(frozen=True)
class Link:
    name: str
    bandwidth: float
    """Bytes/s in one direction, of each device while all use it at once."""
    latency: float
    """Seconds of one step from one device to the next, within a collective."""
    source: str
    measured: str | None = None


@dataclass(frozen=True)
class Hardware:
    """*ranks* devices of one kind, *per_host* on each host."""

    device: Device
    ranks: int
    per_host: int
    within: Link
    """Between devices of a host."""
    between: Link
    """Between devices of two hosts."""

    @property
    def hosts(self) -> int:
        return -(-self.ranks // self.per_host)

    @property
    def host(self) -> Link:
        """Between a device and its host."""
        return LINKS[TO_HOST.get(self.device.name, "PCIe4")]

    def __str__(self) -> str:
        name = self.device.name
        if self.hosts > 1:
            return f"{self.hosts}x{self.per_host}x{name}"
        return f"{self.ranks}x{name}" if self.ranks > 1 else name


def _flops(fp32: float, tf32: float, half: float, fp8: float | None = None) -> dict[str, float]:
    """The peaks of a table, given in TFLOP/s."""
    rates = {"fp32": fp32, "tf32": tf32, "bf16": half, "fp16": half} | ({"fp8": fp8} if fp8 else {})
    return {name: rate * 1e12 for name, rate in rates.items()}


# Peaks, bandwidths and most memories were entered from memory of these datasheets and have not been compared with them.
MEASURED = "step times and memory on one device (docs/measurements.md)"
DEVICES = {
    device.name: device
    for device in (
        Device("A100-40", int(39.4 * GIB), _flops(19.5, 156, 312), 1555e9, "NVIDIA A100 datasheet, SXM 40 GB"),
        Device("A100-80", int(79.1 * GIB), _flops(19.5, 156, 312), 2039e9, "NVIDIA A100 datasheet, SXM 80 GB"),
        Device("A100-80-PCIe", int(79.1 * GIB), _flops(19.5, 156, 312), 1935e9, "NVIDIA A100 datasheet, PCIe 80 GB"),
        Device("H100", int(79.1 * GIB), _flops(66.9, 494.7, 989.4, 1978.9), 3350e9, "NVIDIA H100 datasheet, SXM", MEASURED),
        Device("H100-PCIe", int(79.1 * GIB), _flops(51.2, 378, 756, 1513), 2000e9, "NVIDIA H100 datasheet of 2022, PCIe"),
        Device("H100-NVL", int(93.0 * GIB), _flops(60, 417.5, 835.5, 1670.5), 3900e9, "NVIDIA H100 datasheet, NVL"),
        Device("H200", int(139.7 * GIB), _flops(66.9, 494.7, 989.4, 1978.9), 4800e9, "NVIDIA H200 datasheet, SXM"),
        Device("B200", int(178.3 * GIB), _flops(75, 1125, 2250, 4500), 7700e9, "NVIDIA HGX B200 datasheet, an eighth of it"),
        Device("L40S", int(44.4 * GIB), _flops(91.6, 183, 362, 733), 864e9, "NVIDIA L40S datasheet"),
        Device("RTX4090", int(23.5 * GIB), _flops(82.6, 82.6, 165.2, 330.3), 1008e9, "NVIDIA Ada, appendix A"),
        Device("RTX5090", int(31.3 * GIB), _flops(104.8, 104.8, 209.5, 419), 1792e9, "NVIDIA RTX Blackwell, appendix A"),
        # One rank of a server of today with AVX2, two cores; `plan --calibrate` replaces it by this machine's numbers.
        Device("CPU", 16 * GIB, _flops(0.15, 0.15, 0.15), 15e9, "two cores at 2.5 GHz with two 256-bit FMAs each", None, "cpu"),
    )
}  # fmt: skip
"""Sparsity, with which datasheets double the peaks, is left out. Where a datasheet gives one number for fp16 with fp16 sums and
one with fp32 sums, it is the second."""

LATENCIES = "latency: the ring constants of NCCL's src/graph/tuning.cc"
LINKS = {
    link.name: link
    for link in (
        Link("NVLink3", 300e9, 3.4e-6, f"NVIDIA A100 datasheet, half of 600 GB/s; {LATENCIES}"),
        Link("NVLink4", 450e9, 3.4e-6, f"NVIDIA H100 datasheet, half of 900 GB/s; {LATENCIES}"),
        Link("NVLink5", 900e9, 3.4e-6, f"NVIDIA B200 datasheet, half of 1.8 TB/s; {LATENCIES}"),
        Link("NVLink-bridge", 300e9, 3.4e-6, f"NVIDIA H100 datasheet, NVL and PCIe: half of 600 GB/s; {LATENCIES}"),
        Link("PCIe4", 31.5e9, 5.7e-6, f"PCI Express 4.0, 16 lanes; {LATENCIES}"),
        Link("PCIe5", 63e9, 5.7e-6, f"PCI Express 5.0, 16 lanes; {LATENCIES}"),
        Link("InfiniBand-NDR", 50e9, 9.6e-6, f"400 Gb/s, a port for each device; {LATENCIES}"),
        Link("InfiniBand-HDR", 25e9, 9.6e-6, f"200 Gb/s, a port for each device; {LATENCIES}"),
        Link("Ethernet-100", 12.5e9, 3e-5, "100 Gb/s, shared by the devices of a host; latency of TCP assumed"),
        Link("Ethernet-25", 3.125e9, 3e-5, "25 Gb/s, shared by the devices of a host; latency of TCP assumed"),
        Link("Ethernet-10", 1.25e9, 3e-5, "10 Gb/s, shared by the devices of a host; latency of TCP assumed"),
        Link("memory", 2e9, 1e-4, "processes of a host that copy through its memory (gloo), assumed"),
    )
}  # fmt: skip
SHARED = "Ethernet"
"""Links of this kind are the host's, not the device's."""
LINKED = {
    "A100-40": ("NVLink3", "InfiniBand-HDR"), "A100-80": ("NVLink3", "InfiniBand-HDR"),
    "A100-80-PCIe": ("PCIe4", "Ethernet-100"), "H100": ("NVLink4", "InfiniBand-NDR"), "H100-PCIe": ("PCIe5", "InfiniBand-HDR"),
    "H100-NVL": ("PCIe5", "InfiniBand-HDR"), "H200": ("NVLink4", "InfiniBand-NDR"), "B200": ("NVLink5", "InfiniBand-NDR"),
    "L40S": ("PCIe4", "Ethernet-100"), "RTX4090": ("PCIe4", "Ethernet-10"), "RTX5090": ("PCIe5", "Ethernet-10"),
    "CPU": ("memory", "Ethernet-10"),
}  # fmt: skip
"""The links that hosts with a device are usually sold with: within a host, between hosts."""
TO_HOST: dict[str, str] = dict.fromkeys(("H100", "H100-PCIe", "H100-NVL", "H200", "B200", "RTX5090"), "PCIe5")
"""The link between a device and its host; PCIe 4 where a device is not in the table."""
OTHER_NAMES = {
    "a100": "A100-80", "a10040gb": "A100-40", "a10080gb": "A100-80", "h100sxm": "H100", "h10080gb": "H100", "h200sxm": "H200",
    "4090": "RTX4090", "5090": "RTX5090",
}  # fmt: skip
CUDA_NAMES = (
    (r"A100.*40GB", "A100-40"), (r"A100.*PCIE.*80GB|A100 80GB PCIe", "A100-80-PCIe"), (r"A100.*80GB", "A100-80"),
    (r"H100 PCIe", "H100-PCIe"), (r"H100 NVL", "H100-NVL"), (r"\bH100( 80GB HBM3|.*SXM.*)?$", "H100"),
    (r"\bH200( 141GB.*|.*SXM.*)?$", "H200"),
    (r"\bB200$", "B200"), (r"\bL40S$", "L40S"), (r"RTX 4090$", "RTX4090"), (r"RTX 5090$", "RTX5090"),
)  # fmt: skip
"""What torch.cuda.get_device_name gives, and the device in the table; the first that fits."""

DESCRIBE = (
    "describe your own in FILE.yaml: device: {name: X, memory: 48GB, flops: {bf16: 2.0e+14}, bandwidth: 9.0e+11}, ranks: 8, "
    "per_host: 8, within: PCIe4, between: Ethernet-100"
)


def parse_hardware(text: str) -> Hardware:
    """The hardware that *text* names.

    ``H200``, ``8xH200``, ``1024xH100`` (8 on each host), ``16x8xH100`` (hosts x devices), ``cpu``, ``here`` and ``2xhere``
    (what ``bigvision plan --calibrate`` measured on this machine), or a YAML file that describes one's own. Raises `UserError`.
    """
    if text.lower().endswith((".yaml", ".yml")):
        return _described(Path(text))
    *counts, name = re.split(r"(?<=\d)\s*[x*]\s*(?=[^\s])", text.strip(), flags=re.I)
    if len(counts) > 2 or not all(re.fullmatch(r"\d{1,7}", count) and int(count) for count in counts):
        raise UserError(f"--hardware: {text!r} is not DEVICE, COUNTxDEVICE or HOSTSxCOUNTxDEVICE, such as 8xH200 or 16x8xH100")
    per_host = int(counts[-1]) if counts else 1
    ranks = per_host * int(counts[0]) if len(counts) == 2 else per_host
    if len(counts) == 1 and per_host > PER_HOST and name.lower() not in ("cpu", "here"):
        if ranks % PER_HOST:
            most = max(count for count in range(1, PER_HOST) if ranks % count == 0)
            raise UserError(
                f"--hardware: {text}: {ranks} devices are not whole hosts of {PER_HOST}: write HOSTSxCOUNTxDEVICE, such as "
                f"{ranks // most}x{most}x{name}"
            )
        per_host = PER_HOST
    if name.lower() == "here":
        found = _measured("cpu", per_host) or _measured("cuda", per_host)
        if found is None:
            raise UserError("--hardware: nothing was measured here yet: run bigvision plan --calibrate, or name the devices")
        return _of(found.device, ranks, per_host, found.within, found.between)
    if name.lower() == "cpu":
        return _cpu(ranks, per_host, _measured("cpu", per_host))
    device = _device(name)
    within, between = (LINKS[link] for link in LINKED[device.name])
    return _of(device, ranks, per_host, within, between)


def _of(device: Device, ranks: int, per_host: int, within: Link, between: Link) -> Hardware:
    if between.name.startswith(SHARED):
        between = replace(between, bandwidth=between.bandwidth / per_host)
    return Hardware(device, ranks, per_host, within, between)


def _device(name: str) -> Device:
    short = _short(name)
    known = {_short(one): one for one in DEVICES} | OTHER_NAMES
    if short not in known:
        device = device_named(name)
        if device is not None:
            return device
        raise UserError(f"--hardware: {name!r} is no device of {', '.join(DEVICES)}{nearest(short, known)}; {DESCRIBE}")
    return DEVICES[known[short]]


def _short(name: str) -> str:
    return re.sub(r"nvidia|geforce|[\s_-]", "", name.lower())


def device_named(cuda_name: str) -> Device | None:
    """The datasheet of the device that torch calls *cuda_name*; None where it is not in the table, or a slice of one (MIG)."""
    if re.search(r"\bMIG\b", cuda_name):
        return None
    return next((DEVICES[name] for pattern, name in CUDA_NAMES if re.search(pattern, cuda_name, re.I)), None)


def hardware_here(runtime: Runtime) -> Hardware | None:
    """What this run is on: measured by ``bigvision plan --calibrate``, else from the table; None where the table lacks it."""
    per_host, ranks = runtime.identity.local_world_size, runtime.world_size
    try:
        found = _measured(runtime.device.type, per_host)
    except UserError as error:
        warnings.warn(str(error), stacklevel=2)
        found = None
    if runtime.device.type == "cpu":
        return _cpu(ranks, per_host, found)
    import torch

    properties = torch.cuda.get_device_properties(runtime.device)
    if found is not None and found.device.name == properties.name:
        device, within, between = found.device, found.within, found.between
    elif (listed := device_named(properties.name)) is not None:
        device, (within, between) = listed, (LINKS[link] for link in LINKED[listed.name])
    else:
        return None
    return _of(replace(device, memory=properties.total_memory), ranks, per_host, within, between)


def _cpu(ranks: int, per_host: int, found: Hardware | None) -> Hardware:
    """Ranks on CPUs, as they were measured (*found*), or assumed: those of a host share its memory."""
    if found is not None:
        return _of(found.device, ranks, per_host, found.within, found.between)
    device = DEVICES["CPU"]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else device.memory
    device = replace(device, memory=total // per_host)
    return _of(device, ranks, per_host, *(LINKS[link] for link in LINKED["CPU"]))


def peak_of(device: Device, precision: str) -> float | None:
    """FLOP/s to which ``parallel.precision`` is compared (MFU). For fp8 it is bf16's peak, as in torchtitan: attention and the
    gradients of weights stay in bf16."""
    return device.flops.get({"amp_bf16": "bf16", "fp8": "bf16"}.get(precision, precision))


# One's own hardware.


def _described(path: Path) -> Hardware:
    """The hardware that a YAML file describes."""
    where = f"--hardware {path}"
    try:
        tree = parse(path.expanduser().read_text(encoding="utf-8"), where)
    except OSError as error:
        raise UserError(f"{where}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text: save the file as UTF-8") from None
    known = ("device", "ranks", "per_host", "within", "between")
    tree = _mapping(tree, where, known)
    given = tree.get("device")
    device = _device(given) if isinstance(given, str) else _own_device(given, where)
    ranks = _number(tree.get("ranks", 1), f"{where}: ranks", whole=True)
    per_host = _number(tree.get("per_host", min(ranks, PER_HOST)), f"{where}: per_host", whole=True)
    if ranks % per_host and ranks > per_host:
        raise UserError(f"{where}: ranks: {ranks} are not whole hosts of per_host: {per_host}")
    links = LINKED.get(device.name, ("PCIe4", "Ethernet-10"))
    within, between = (_link(tree.get(key, usual), f"{where}: {key}") for key, usual in zip(("within", "between"), links))
    return _of(device, int(ranks), int(min(per_host, ranks)), within, between)


def _own_device(tree: Any, where: str) -> Device:
    tree = _mapping(tree, f"{where}: device", ("name", "memory", "flops", "bandwidth", "kind"))
    for key in ("memory", "flops", "bandwidth"):
        if key not in tree:
            raise UserError(f"{where}: device.{key} is missing; {DESCRIBE}")
    memory = tree["memory"]
    size = parse_size(memory, f"{where}: device.memory") if isinstance(memory, str) else memory
    flops = _mapping(tree["flops"], f"{where}: device.flops", ("fp32", "tf32", "bf16", "fp16", "fp8"))
    peaks = {name: _number(rate, f"{where}: device.flops.{name}") for name, rate in flops.items()}
    if not peaks:
        raise UserError(f"{where}: device.flops is empty: give FLOP/s by number format, such as {{bf16: 2.0e+14}}")
    kind = tree.get("kind", "cuda")
    if kind not in ("cuda", "cpu"):
        raise UserError(f"{where}: device.kind: {kind!r} is neither cuda nor cpu")
    return Device(
        str(tree.get("name", "own")), int(_number(size, f"{where}: device.memory")), peaks,
        _number(tree["bandwidth"], f"{where}: device.bandwidth"), str(where), None, kind,
    )  # fmt: skip


def _link(given: Any, where: str) -> Link:
    if isinstance(given, str):
        names = {_short(name): name for name in LINKS}
        if _short(given) not in names:
            raise UserError(
                f"{where}: {given!r} is no link of {', '.join(LINKS)}{nearest(given, LINKS)}; describe your own: "
                "{bandwidth: 2.5e+10, latency: 1.0e-5}"
            )
        return LINKS[names[_short(given)]]
    tree = _mapping(given, where, ("name", "bandwidth", "latency"))
    if "bandwidth" not in tree:
        raise UserError(f"{where}: bandwidth is missing: give bytes/s in one direction, of each device")
    bandwidth = _number(tree["bandwidth"], f"{where}: bandwidth")
    return Link(str(tree.get("name", "own")), bandwidth, _number(tree.get("latency", 1e-5), f"{where}: latency"), where)


def _mapping(tree: Any, where: str, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise UserError(f"{where}: must be a mapping with {', '.join(known)}; {DESCRIBE}")
    for key in tree:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}{nearest(str(key), known)}; known are {', '.join(known)}")
    return tree


def _number(value: Any, where: str, whole: bool = False) -> Any:
    """*value* as a finite number above 0; also 2e14, which YAML 1.1 reads as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (0 < number < math.inf and (not whole or number.is_integer())):
        raise UserError(f"{where}: {value!r} is not a {'whole ' if whole else ''}number above 0")
    return int(number) if whole else number


# What was measured here.


def measured_file(kind: str, per_host: int) -> Path:
    """Where ``bigvision plan --calibrate`` keeps what it measured on this machine, with so many ranks on devices of *kind*."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "bigvision" / f"hardware-{kind}-{per_host}.json"


def to_json(hardware: Hardware) -> str:
    return json.dumps(asdict(hardware), indent=1) + "\n"


def _measured(kind: str, per_host: int) -> Hardware | None:
    """What was measured on this machine with as many ranks; None where nothing was."""
    path = measured_file(kind, per_host)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return None
    try:
        tree = json.loads(text)
        rates = tree["device"].pop("rates")
        curves = {
            name: tuple((float(size), float(rate)) for size, rate in curve) for name, curve in rates.pop("curves").items()
        }
        device = _from_json(Device, tree.pop("device"), rates=Rates(curves, **rates))
        links = {key: _from_json(Link, tree.pop(key)) for key in ("within", "between")}
        return Hardware(device, int(tree["ranks"]), int(tree["per_host"]), **links)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path}: not what bigvision plan --calibrate writes ({error}): calibrate again, or remove it"
        ) from None


def _from_json(kind: Any, tree: Mapping[str, Any], **others: Any) -> Any:
    return kind(**{one.name: tree[one.name] for one in fields(kind) if one.name not in others}, **others)
