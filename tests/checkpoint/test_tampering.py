"""Manifests, documents and headers that somebody wrote: whatever they say, a start ends well and stays in its folder."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from bigvision.runtime import start
from tests.checkpoint.damaging import Victim
from tests.checkpoint.states import Save, find_version, save_version
from tests.checkpoint.test_damage import header_of

NUMBERS: list[Any] = [-1, 0, 1, 2**31, 2**63, 2**64, 2**200, 0.5, math.nan, math.inf, -math.inf, True]
STRANGE: list[Any] = [*NUMBERS, None, "", "11436", "../x", [], [[]], {}, {"size": 1}, [None], ["a", "b", "c"]]
NAMES = [
    "../step-00000001/model.safetensors",
    "/etc/passwd",
    "a/b",
    "./model.safetensors",
    "..",
    ".",
    "",
    "\0",
    "model\0",
    "a\n",
]
NAMES += [
    "\x1b[31m.safetensors",
    "\ud800.safetensors",
    "x" * 5000,
    "manifest.json",
    "\\..\\x",
    "-rf",
    "model.safetensors/",
    "ü",
]
NESTED = "[" * 100_000
HUGE = 1 << 26
"""Bytes of a file that no checkpoint needs."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    with start("cpu"):
        yield Victim(tmp_path_factory.mktemp("tampering") / "out")


@pytest.fixture
def victim(base: Victim) -> Iterator[Victim]:
    yield base
    base.repair()
    base.wrong, base.tried = [], 0


def manifests(plain: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Manifests that are not what was written, with what was changed."""

    def changed(what: str, change: Callable[[dict[str, Any]], Any]) -> tuple[str, dict[str, Any]]:
        change(other := copy.deepcopy(plain))
        return what, other

    name = "model.safetensors"
    for key in plain:
        yield changed(f"no {key}", lambda m, key=key: m.pop(key))
        for value in STRANGE:
            if value != plain[key]:
                yield changed(f"{key} is {value!r}", lambda m, key=key, value=value: m.update({key: value}))
    for file in plain["files"]:
        yield changed(f"no {file}", lambda m, file=file: m["files"].pop(file))
        for key in plain["files"][file]:
            yield changed(f"{file} without {key}", lambda m, file=file, key=key: m["files"][file].pop(key))
    for value in STRANGE:
        yield changed(f"{name} is {value!r}", lambda m, value=value: m["files"].update({name: value}))
        for key in ("size", "runs"):
            yield changed(f"{key} is {value!r}", lambda m, key=key, value=value: m["files"][name].update({key: value}))
        for place in range(3):
            what = ("offset", "length", "checksum")[place]
            yield changed(f"{what} is {value!r}", lambda m, p=place, v=value: m["files"][name]["runs"][0].__setitem__(p, v))
        yield changed(f"a run is {value!r}", lambda m, value=value: m["files"][name]["runs"].__setitem__(0, value))
    yield changed("runs in another order", lambda m: m["files"][name]["runs"].reverse())
    yield changed("a run twice", lambda m: m["files"][name]["runs"].append(m["files"][name]["runs"][-1]))
    yield changed("a run missing", lambda m: m["files"][name]["runs"].pop())
    yield changed("an empty file", lambda m: m["files"].update({name: {"size": 0, "runs": []}}))
    for file in NAMES:
        yield changed(f"a file {file!r}", lambda m, file=file: m["files"].update({file: m["files"][name]}))
        yield changed(f"an empty file {file!r}", lambda m, file=file: m["files"].update({file: {"size": 0, "runs": []}}))
        yield changed(f"{name} is {file!r}", lambda m, file=file: m["files"].update({file: m["files"].pop(name)}))


def plain_manifest(victim: Victim) -> dict[str, Any]:
    return json.loads(victim.content["manifest.json"])


def test_a_manifest_that_was_changed(victim: Victim) -> None:
    plain = plain_manifest(victim)
    for what, manifest in manifests(plain):
        for text in (json.dumps(manifest), json.dumps(manifest, separators=(",", ":")) + "\n")[: 2 * (manifest != plain)]:
            victim.write("manifest.json", text.encode())
            victim.expect_passed_over(what, "manifest.json", "model.safetensors")
    victim.assert_nothing_wrong(500)


def test_a_manifest_that_was_changed_and_signed(victim: Victim) -> None:
    for what, manifest in manifests(plain_manifest(victim)):
        victim.write("manifest.json", victim.sign(manifest))
        for full in (True, False):
            victim.expect_no_harm(f"{what}, {full=}", full=full)
    victim.assert_nothing_wrong(500)


def test_a_name_outside_that_exists(victim: Victim) -> None:
    """Signed, right in size and checksum, and still not opened, for it is no name in the folder."""
    manifest = plain_manifest(victim)
    outside = victim.out.parent / "secret.safetensors"
    outside.write_bytes(victim.content["model.safetensors"])
    for name in (str(outside), "../../secret.safetensors", "../step-00000001/model.safetensors"):
        changed = copy.deepcopy(manifest)
        changed["files"][name] = changed["files"].pop("model.safetensors")
        victim.write("manifest.json", victim.sign(changed))
        victim.expect_passed_over(name, name)
    victim.assert_nothing_wrong(3)


def test_text_that_is_no_manifest(victim: Victim) -> None:
    text = victim.content["manifest.json"]
    spaced = json.dumps(json.loads(text), indent=1).encode()
    twice = text.replace(b'"version"', b'"format":"bigvision","version"', 1)
    others = [
        b"",
        b"{}",
        b"[]",
        b"null",
        b"0",
        b'"manifest"',
        b"{",
        text[:-2],
        text + text,
        b" " + text,
        text[:-1],
        spaced,
        twice,
    ]
    others += [NESTED.encode(), b'{"files":' + NESTED.encode(), b'{"a":' * 100_000, b"1" * 10_000, b"9" * 5000 + text]
    others += [b"\xef\xbb\xbf" + text, *(text.decode().encode(coding) for coding in ("utf-16", "utf-16-be", "utf-32-le"))]
    others += [b"\xff\xfe" + text, text.replace(b"bigvision", b"big\xffvision"), b"\0" * len(text), b" " * HUGE + text]
    for number, other in enumerate(others):
        victim.write("manifest.json", other)
        victim.expect_passed_over(f"text {number}: {other[:40]}", "manifest.json")
    victim.assert_nothing_wrong(25)


def test_documents_that_were_changed_and_signed(victim: Victim) -> None:
    for name in ("progress.json", "config.json"):
        for value in STRANGE:
            victim.replace_signed(name, json.dumps(value).encode())
            if name == "config.json":
                victim.expect_no_harm(f"{name} is {value!r}")
            elif not isinstance(value, dict):
                victim.expect_passed_over(f"{name} is {value!r}", name)
            victim.replace_signed(name, json.dumps({"version": 2, "scale": 1, "step": value, "metrics": value}).encode())
            victim.expect_no_harm(f"{name} is an object with {value!r}")
        for text in (b"", b"{", NESTED.encode(), b"\xff", b"\0" * 40, b"1" * 10_000, b" " * HUGE + b"["):
            victim.replace_signed(name, text)
            victim.expect_passed_over(f"{name} is {text[:20]}", name)
        victim.repair()
    victim.assert_nothing_wrong(80)


def headers(plain: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Headers that are not what was written."""
    for value in STRANGE:
        yield f"the header is {value!r}", value
        yield f"__metadata__ is {value!r}", plain | {"__metadata__": value}
        yield f"scale is {value!r}", plain | {"scale": value}
        for key in ("dtype", "shape", "data_offsets"):
            yield f"{key} is {value!r}", plain | {"scale": plain["scale"] | {key: value}}
        for place in (0, 1):
            offsets = list(plain["scale"]["data_offsets"])
            offsets[place] = value
            yield f"offsets are {offsets}", plain | {"scale": plain["scale"] | {"data_offsets": offsets}}
        yield f"a dimension is {value!r}", plain | {"blocks.0.weight": plain["blocks.0.weight"] | {"shape": [value, 40]}}
    for key in ("dtype", "shape", "data_offsets"):
        yield f"no {key}", plain | {"scale": {k: v for k, v in plain["scale"].items() if k != key}}
    yield "a tensor is missing", {k: v for k, v in plain.items() if k != "scale"}
    for name in NAMES:
        yield f"a tensor {name!r}", plain | {name: plain["scale"]}


@pytest.mark.parametrize("full", [True, False])
def test_headers_that_were_changed_and_signed(victim: Victim, full: bool) -> None:
    name = "model.safetensors"
    data = victim.content[name]
    end = header_of(data)
    plain = json.loads(data[8:end])
    texts = [(what, json.dumps(value).encode()) for what, value in headers(plain)]
    texts += [("nested", NESTED.encode()), ("empty", b""), ("no UTF-8", b"\xff" * 8), ("spaces", b" " * HUGE)]
    texts += [
        ("a name twice", data[8 : end - 1].rstrip()[:-1] + b',"scale":' + json.dumps(plain["head.weight"]).encode() + b"}")
    ]
    for what, text in texts:
        begin = len(text).to_bytes(8, "little") + text
        victim.replace_signed(name, begin + data[end:], len(begin))
        victim.expect_no_harm(what, full=full)
    for length in (0, 1, 7, end - 9, end - 7, len(data) - 8, len(data), 2**31, 2**63 - 1, 2**63, 2**64 - 8, 2**64 - 1):
        for header in (8, end, len(data)):
            victim.replace_signed(name, length.to_bytes(8, "little") + data[8:], header)
            victim.expect_passed_over(f"a header of {length} bytes, {header=}", name, full=full)
    for size in (0, 1, 7, 8, 9):
        victim.replace_signed(name, data[:size])
        victim.expect_no_harm(f"a file of {size} bytes", full=full)
    victim.assert_nothing_wrong(200)


@pytest.mark.long
def test_headers_that_are_damaged_and_not_verified(victim: Victim) -> None:
    """`checkpoint.verify: false` still compares the headers."""
    for name in victim.tensors:
        for position in range(0, header_of(victim.content[name]), 7):
            victim.flip(name, position, position % 8)
            victim.expect_passed_over(f"{name}, byte {position}", name, full=False)
        victim.repair()
    victim.assert_nothing_wrong(100)


def test_saving_goes_on_beside_a_strange_checkpoint(victim: Victim, tmp_path: Path) -> None:
    """Pruning reads the older ones; what it finds there is no reason for one rank to stop."""
    warnings.simplefilter("ignore")
    wrong = []
    for number, value in enumerate([*STRANGE, {"metrics": [1]}, {"metrics": "loss"}, {"metrics": {"loss": "low"}}]):
        for keep in (1, 2):
            shutil.copytree(victim.out, tmp_path / f"{number}-{keep}")
            other = Victim(tmp_path / f"{number}-{keep}", made=True)
            other.replace_signed("progress.json", json.dumps(value).encode())
            try:
                with mock.patch.object(os, "fsync", lambda descriptor: None):
                    save_version(other.out, Save(3, 3, keep))
                assert find_version(other.out, print) == 3
            except Exception as error:
                wrong.append(f"progress.json is {value!r}, {keep=}: {type(error).__name__}: {error}")
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
