"""What an import brings in: the exact modules, since a time would be another on each machine."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.launch.commands import ROOT

HEAVY = {
    "accelerate", "datasets", "deepspeed", "IPython", "matplotlib", "nibabel", "pandas", "pyarrow", "ray", "scipy", "sklearn",
    "tensorboard", "transformers", "tyro",
}  # fmt: skip

PROGRAM = """
import gc, json, sys
def new(work):
    before = set(sys.modules)
    work()
    return sorted(name for name in set(sys.modules) - before)
def package():
    import bigvision
    dir(bigvision), bigvision.UserError, bigvision.__version__
def submit():
    from bigvision.launchers.submit import read_job
    read_job(["--to", "slurm", "recipes/digits.yaml"])
def peers():
    import torch, timm
def train():
    import bigvision
    bigvision.train, bigvision.Engine, bigvision.load_config, bigvision.Result
print(json.dumps([new(package), new(submit), new(peers), new(train), gc.get_freeze_count(), gc.isenabled()]))
"""


def test_the_package_imports_nothing_until_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, cwd=ROOT)
    package, submit, _, train, frozen, collects = json.loads(done.stdout)
    ours = [name for name in package if name.partition(".")[0] not in sys.stdlib_module_names]
    assert ours == ["bigvision", "bigvision.errors"]
    assert not {"torch", "timm"} & {*submit}, "a job script is written without them"
    assert frozen > 100_000 and collects, "the garbage collector leaves alone what they have created"
    roots = {name.partition(".")[0] for name in train}
    assert not roots & HEAVY
    # Beside what torch and timm have imported: progress bars, checksums and JPEGs. No more than that, and no other.
    assert roots - set(sys.stdlib_module_names) <= {"bigvision", "rich", "simplejpeg", "torch", "torchvision", "xxhash", "yaml"}
