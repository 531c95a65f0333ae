"""What an import brings in: the exact modules, since a time would be another on each machine."""

from __future__ import annotations

import json
import subprocess
import sys

HEAVY = {
    "accelerate", "datasets", "deepspeed", "IPython", "matplotlib", "nibabel", "pandas", "pyarrow", "ray", "scipy", "sklearn",
    "tensorboard", "transformers", "tyro",
}  # fmt: skip

PROGRAM = """
import json, sys
def new(work):
    before = set(sys.modules)
    work()
    return sorted(name for name in set(sys.modules) - before)
def package():
    import bigvision
    dir(bigvision), bigvision.UserError, bigvision.__version__
def peers():
    import torch, timm
def train():
    import bigvision
    bigvision.train, bigvision.Engine, bigvision.load_config, bigvision.Result
print(json.dumps([new(package), new(peers), new(train)]))
"""


def test_the_package_imports_nothing_until_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    package, _, train = json.loads(done.stdout)
    ours = [name for name in package if name.partition(".")[0] not in sys.stdlib_module_names]
    assert ours == ["bigvision", "bigvision.errors"]
    roots = {name.partition(".")[0] for name in train}
    assert not roots & HEAVY
    # Beside what torch and timm have imported: progress bars, checksums and JPEGs. No more than that, and no other.
    assert roots - set(sys.stdlib_module_names) <= {"bigvision", "rich", "simplejpeg", "torch", "torchvision", "xxhash", "yaml"}
