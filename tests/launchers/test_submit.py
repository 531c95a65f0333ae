"""What `bigvision submit` hands over, and to whom."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from bigvision.cli import main
from bigvision.errors import UserError
from bigvision.launchers.submit import read_job, run
from tests.launch.commands import start
from tests.launchers.programs import forks
from tests.recipes import lines, losses, recipe

HOSTILE = 'it\'s "here"; $(touch pwned) `touch pwned` & | > x *'
IMAGE = ["--image", "registry.example:5000/team/bigvision:0.1"]


@pytest.fixture
def path(tmp_path: Path) -> str:
    """A recipe whose path a shell would take apart."""
    folder = tmp_path / HOSTILE.replace("/", "")
    folder.mkdir()
    (folder / "a recipe.yaml").write_text(yaml.safe_dump(recipe(tmp_path / "out", train={"steps": 3})))
    return str(folder / "a recipe.yaml")


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run([*arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_local(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = rendered(capsys, "--to", "local", path, "--ranks-per-node", "2", "--train.steps", "4")
    assert shlex.split(said) == [
        sys.executable, "-m", "bigvision.cli", "train", path, "--ranks", "2", "--restarts", "100", "--train.steps", "4",
    ]  # fmt: skip


def test_slurm(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes=2", "--ranks-per-node=4", "--time", "90", "--partition", "gpu,long", "--name", "my-run", "--restarts=7"]
    said = rendered(
        capsys, "--to", "slurm", path, *options, "--data.workers", "3", "--parallel.device", "cuda", "--out", HOSTILE
    )
    assert said.split("\n") == [
        "#!/bin/bash",
        "#SBATCH --job-name=my-run",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --cpus-per-task=4",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=0-01:30:00",
        "#SBATCH --output=my-run-%j.log",
        "#SBATCH --signal=USR1@120",
        "#SBATCH --partition=gpu,long",
        "#SBATCH --requeue",
        "#SBATCH --open-mode=append",
        "",
        f"srun --kill-on-bad-exit=0 --wait=60 --cpus-per-task=4 {sys.executable} -m bigvision.cli train {shlex.quote(path)} "
        f"--data.workers 3 --parallel.device cuda --out {shlex.quote(HOSTILE)}",
        "code=$?",
        "",
        "# A mistake stays one. All else, as a run that a signal stopped and saved (75), goes on from its newest checkpoint.",
        'if [ "$code" -ne 0 ] && [ "$code" -ne 2 ] && [ "${SLURM_RESTART_COUNT:-0}" -lt 7 ]; then',
        "    # Slurm ends this script while it puts the job back; an exit before that would be the job's end.",
        '    scontrol requeue "$SLURM_JOB_ID" && sleep 600',
        "fi",
        'exit "$code"',
        "",
    ]
    assert "gpus-per-node" not in rendered(capsys, "--to", "slurm", path)  # parallel.device: cpu


def test_what_else_slurm_is_asked_for(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--cpus-per-task=12", "--mem", "64G", "--account", "lab.a", "--qos=high", "--gres", "gpu:h100:4", "--constraint"]
    options += ["h100&ib", "--exclude", "node[1-3,7]", "--sbatch", "--exclusive", "--sbatch=--mail-user=me@host.org"]
    options += ["--sbatch", "--output=logs/%x-%j.log", "--parallel.device", "cuda"]
    said = rendered(capsys, "--to", "slurm", path, *options).splitlines()
    expected = {
        "cpus-per-task=12", "mem=64G", "account=lab.a", "qos=high", "gres=gpu:h100:4", "constraint=h100&ib",
        "exclude=node[1-3,7]", "exclusive", "mail-user=me@host.org", "output=logs/%x-%j.log",
    }  # fmt: skip
    assert {f"#SBATCH --{line}" for line in expected} <= set(said)
    names = [line.removeprefix("#SBATCH --").partition("=")[0] for line in said if line.startswith("#SBATCH")]
    assert len(names) == len(set(names)) and "gpus-per-node" not in names
    assert any(line.startswith("srun ") and " --cpus-per-task=12 " in line for line in said)


def programs(folder: Path, **bodies: str) -> dict[str, str]:
    """Programs in a folder that comes first on PATH."""
    folder.mkdir()
    for name, body in bodies.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 5400), ("90:30", 5430), ("1:30:00", 5400), ("2-12", 216000), ("1-06:30", 109800), ("1-02:03:04", 93784),
        ("200:00:00", 720000),
    ],
)  # fmt: skip
def test_times_as_slurm_spells_them(text: str, seconds: int, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("out: /runs/a\n")
    assert read_job(["--to", "slurm", str(tmp_path / "r.yaml"), "--time", text])[1].seconds == seconds


@pytest.mark.parametrize(
    ("code", "restarted", "requeued"),
    [(0, "0", False), (2, "0", False), (75, "99", True), (137, "0", True), (75, "100", False)],
)
def test_what_the_script_runs(code: int, restarted: str, requeued: bool, path: str, tmp_path: Path) -> None:
    """bash runs it, with an srun that records its arguments and ends as the ranks would."""
    script = tmp_path / "script"
    done = start([sys.executable, "-m", "bigvision.cli", "submit", "--to=slurm", path, "--dry-run", "--out", HOSTILE])
    script.write_text(done.stdout)
    subprocess.run(["bash", "-n", script], check=True)
    record = f'printf "%s\\0" "$@" > {shlex.quote(str(tmp_path / "srun"))}; exit {code}'
    environment = programs(
        tmp_path / "bin", srun=record, sleep="exit", scontrol=f"echo $* > {shlex.quote(str(tmp_path / 'scontrol'))}"
    )
    environment |= {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": restarted}
    ended = subprocess.run(["bash", script], env=os.environ | environment, cwd=tmp_path)
    assert ended.returncode == code and not list(tmp_path.glob("**/pwned"))
    given = (tmp_path / "srun").read_text().split("\0")[:-1]
    assert given == [
        "--kill-on-bad-exit=0",
        "--wait=60",
        "--cpus-per-task=1",
        sys.executable,
        "-m",
        "bigvision.cli",
        "train",
        path,
        "--out",
        HOSTILE,
    ]
    assert (tmp_path / "scontrol").exists() == requeued
    assert not requeued or (tmp_path / "scontrol").read_text() == "requeue 7\n"


def test_k8s(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--nodes=2", "--ranks-per-node=4", "--time", "1-02:03:04", "--claim", "runs:/runs", "--out", "/runs/$(HOME)"]
    said = rendered(capsys, "--to", "k8s", path, *IMAGE, *options, "--parallel.device=cuda")
    config_map, job = yaml.safe_load_all(said)
    assert config_map["data"] == {"recipe.yaml": Path(path).read_text()}
    assert job["metadata"] == {"name": "a-recipe"} and config_map["metadata"] == {"name": "a-recipe-recipe"}
    spec = job["spec"]
    assert spec["activeDeadlineSeconds"] == 26 * 3600 + 3 * 60 + 4
    assert spec["runtimeRef"] == {"apiGroup": "trainer.kubeflow.org", "kind": "TrainingRuntime", "name": "bigvision"}
    assert spec["trainer"] == {
        "image": IMAGE[1],
        "command": [
            "python", "-m", "bigvision.launchers.torchrun", "-m", "bigvision.cli", "train", "/etc/bigvision/recipe.yaml",
            "--out", "/runs/$$(HOME)", "--parallel.device=cuda",
        ],
        "numNodes": 2,
        "numProcPerNode": 4,
        "resourcesPerNode": {"limits": {"nvidia.com/gpu": "4"}},
    }  # fmt: skip
    replicated = spec["runtimePatches"][0]["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated[0]["template"]["spec"]["template"]["spec"]
    assert (replicated[0]["name"], pod["terminationGracePeriodSeconds"]) == ("node", 60)
    assert [volume["name"] for volume in pod["volumes"]] == [mount["name"] for mount in pod["containers"][0]["volumeMounts"]]
    assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "runs"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--to", "slurm", "--name", "x; rm -rf ~"], "--name: 'x; rm -rf ~' must be a-z"),
        (["--to", "slurm", "--name", "x\n#SBATCH --uid=0"], "--name: 'x\\n#SBATCH --uid=0' must be"),
        (["--to", "slurm", "--name", "x\n"], "--name: 'x\\n' must be"),
        (["--to", "k8s", *IMAGE, "--name", "-x"], "--name: '-x'"),
        (["--to", "k8s", *IMAGE, "--name", "a" * 51], "--name: 'aaa"),
        (["--to", "slurm", "--partition", "a b"], "--partition: 'a b'"),
        (["--to", "slurm", "--partition", "--uid=0"], "--partition: '--uid=0'"),
        (["--to", "slurm", "--account", "a\n#SBATCH --uid=0"], "--account: 'a\\n#SBATCH"),
        (["--to", "slurm", "--account", "$(id)"], "--account: '$(id)' must be"),
        (["--to", "slurm", "--qos", "-x"], "--qos: '-x' must be"),
        (["--to", "slurm", "--mem", "64 GB"], "--mem: '64 GB' must be a size"),
        (["--to", "slurm", "--mem", "1G", "--mem-per-cpu", "1G"], "--mem and --mem-per-cpu ask for the same"),
        (["--to", "slurm", "--gres", "gpu:4;ls"], "--gres: 'gpu:4;ls' must be"),
        (["--to", "slurm", "--gpus", "0"], "--gpus: '0' must be a number"),
        (["--to", "slurm", "--gres", "gpu:4", "--gpus", "4"], "--gres and --gpus ask for the same"),
        (["--to", "slurm", "--cpus-per-task", "0"], "--cpus-per-task: '0' must be a whole number"),
        (["--to", "local", "--account", "a"], "--account: a is for --to slurm, not local"),
        (["--to", "k8s", *IMAGE, "--sbatch", "--exclusive"], "--sbatch: --exclusive is for --to slurm, not k8s"),
        (["--to", "slurm", "--sbatch", "exclusive"], "--sbatch: 'exclusive' must be a long option"),
        (["--to", "slurm", "--sbatch", "--comment=a b"], "--sbatch: '--comment=a b' must be a long option"),
        (["--to", "slurm", "--sbatch", "--comment=`ls`"], "--sbatch: '--comment=`ls`' must be"),
        (["--to", "slurm", "--sbatch", "--x\n"], "--sbatch: '--x\\n' must be"),
        (["--to", "slurm", "--sbatch", "--ntasks=3"], "--sbatch: --ntasks=3: use --ranks-per-node"),
        (["--to", "slurm", "--sbatch", "--signal=TERM"], "--sbatch: --signal=TERM: a run could not save"),
        (["--to", "slurm", "--sbatch"], "--sbatch: a value is missing"),
        (["--to", "slurm", "--time", "1:00; ls"], "--time: '1:00; ls' must be minutes"),
        (["--to", "slurm", "--time", "0"], "--time: '0'"),
        (["--to", "slurm", "--time", "1-"], "--time: '1-'"),
        (["--to", "slurm", "--time", "UNLIMITED"], "--time: 'UNLIMITED'"),
        (["--to", "slurm", "--sbatch", "--cpus-per-gpu=4"], "--sbatch: --cpus-per-gpu=4: use --cpus-per-task"),
        (["--to", "slurm", "--time", "1:60:00"], "--time: '1:60:00'"),
        (["--to", "slurm", "--time", "٣"], "--time: '٣'"),
        (["--to", "slurm", "--nodes", "2x"], "--nodes: '2x' must be a whole number"),
        (["--to", "slurm", "--nodes", "0"], "--nodes: '0'"),
        (["--to", "slurm", "--nodes"], "--nodes: a value is missing"),
        (["--to", "slurm", "--image", "a"], "--image: a is for --to k8s, not slurm"),
        (["--to", "local", "--time", "1"], "--time: 1 is for --to slurm or k8s, not local"),
        (["--to", "local", "--nodes", "2"], "--nodes: 2 are more than this machine"),
        (["--to", "slurm", "--restarts", "-1"], "--restarts: '-1' must be a whole number from 0 on"),
        (["--to", "k8s", *IMAGE, "--restarts", "1"], "--restarts: 1 is for --to local or slurm, not k8s"),
        (["--to", "k8s"], "--image: missing"),
        (["--to", "k8s", "--image", "a b"], "--image: 'a b'"),
        (["--to", "k8s", "--image", "-v"], "--image: '-v'"),
        (["--to", "k8s", *IMAGE, "--claim", "runs"], "--claim: 'runs' must be CLAIM:/PATH"),
        (["--to", "k8s", *IMAGE, "--claim", "runs:/../etc"], "--claim: 'runs:/../etc'"),
        (["--to", "k8s", *IMAGE, "--claim", "runs:/runs"], "out: "),
        (["--to", "slum"], "--to: 'slum' must be local, slurm or k8s"),
        ([], "--to: '' must be local, slurm or k8s"),
        (["--to", "slurm", "--train.stepz", "3"], "unknown flag '--train.stepz'; did you mean '--train.steps'?"),
        (["--to", "slurm", "--train.steps", "many"], "train.steps: many (flag) is not a whole number"),
        (["--to", "slurm", "--out", "a\nb"], "submit: 'a\\nb' has characters that cannot be printed"),
    ],
)
def test_a_job_that_the_scheduler_would_refuse_is_refused_here_by_option(arguments: list[str], said: str, path: str) -> None:
    with pytest.raises(UserError) as caught:
        read_job([path, *arguments])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_recipe_is_needed_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "--to", "local"]) == 2
    assert "name a recipe" in capsys.readouterr().err
    assert main(["submit", "--to", "local", str(tmp_path / "none.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "wrong.yaml").write_text("model: {nam: vit}")
    assert main(["submit", "--to", "slurm", str(tmp_path / "wrong.yaml")]) == 2
    assert "unknown key 'model.nam'" in capsys.readouterr().err
    assert main(["submit", "--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: bigvision submit --to local|slurm|k8s RECIPE.yaml")


@pytest.mark.parametrize(
    ("to", "program", "arguments", "options"), [("slurm", "sbatch", [], []), ("k8s", "kubectl", ["apply", "-f", "-"], IMAGE)]
)
def test_the_scheduler_gets_it_on_its_standard_input(
    to: str, program: str, arguments: list[str], options: list[str], path: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    record = shlex.quote(str(tmp_path / "record"))
    both = f"cat > {record}; printf '%s\\n' \"$@\" > {record}.arguments; echo Submitted"
    for name, value in programs(tmp_path / "bin", **{program: both}).items():
        monkeypatch.setenv(name, value)
    assert main(["submit", "--to", to, path, *options]) == 0
    assert (tmp_path / "record").read_text() == rendered(capsys, "--to", to, path, *options)
    assert (tmp_path / "record.arguments").read_text().split() == arguments
    (tmp_path / "bin" / program).write_text("#!/bin/bash\nexit 3\n")
    assert main(["submit", "--to", to, path, *options]) == 2
    assert f"error: submit: {shlex.join([program, *arguments])} refused the job (exit code 3)" in capsys.readouterr().err
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "--to", to, path, *options]) == 2
    assert f"{program} is not on PATH" in capsys.readouterr().err


@pytest.mark.long
def test_local_runs_the_ranks(path: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigvision.cli", "submit", "--to", "local", path, "--ranks-per-node", "2"]
    done = start([*command, "--parallel.strategy", "fsdp"])
    assert done.returncode == 0, done.stderr
    assert len(losses(tmp_path / "out")) == 3
    assert json.loads((tmp_path / "out" / "step-00000003" / "progress.json").read_text())["step"] == 3
    assert not list(tmp_path.glob("**/pwned"))


@pytest.mark.long
def test_local_ends_with_the_exit_code_of_the_ranks(path: str) -> None:
    """What only the ranks can see: how many of them there are."""
    command = [sys.executable, "-m", "bigvision.cli", "submit", "--to", "local", path, "--ranks-per-node", "2"]
    done = start([*command, "--parallel.strategy", "fsdp", "--parallel.replicas", "3"])
    assert done.returncode == 2
    assert "error: parallel.replicas: 3 does not divide the 2 ranks" in done.stderr.splitlines()


@pytest.mark.long
def test_local_starts_ranks_again_that_failed_but_not_those_that_were_stopped(path: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bigvision.cli", "submit", "--to", "local", path, "--ranks-per-node", "2"]
    command += ["--train.steps", "100000", "--checkpoint.every", "10"]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True)
    out = tmp_path / "out"

    def until(done: Callable[[], bool]) -> None:
        while not done():
            assert process.poll() is None
            time.sleep(0.05)

    until((out / "latest").exists)
    os.kill(forks(process)[-1], signal.SIGKILL)
    until(lambda: len(starts(out)) == 2)
    before = losses(out)
    until(lambda: len(losses(out)) > len(before) + 3)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 75, said
    assert said.count("starting the ranks again (1 of at most 100)") == said.count("starting the ranks again") == 1
    assert starts(out)[1] >= 10
    steps = [line["step"] for line in lines(out)]
    assert steps == list(range(1, len(steps) + 1)) and (out / f"step-{steps[-1]:08}" / "manifest.json").exists()


def starts(out: Path) -> list[int]:
    """The steps from which the starts of a run went on."""
    noted = [json.loads(line) for line in (out / "starts.jsonl").read_text().splitlines()]
    return [line["step"] for line in noted if "start" in line]


@pytest.mark.long
def test_the_pods_command_trains_on_two_nodes(path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command of the manifest, under the variables that Kubeflow sets on two pods."""
    from tests.distributed import free_port

    _, job = yaml.safe_load_all(rendered(capsys, "--to", "k8s", path, *IMAGE, "--nodes=2"))
    command: list[Any] = [sys.executable, *job["spec"]["trainer"]["command"][1:]]
    command[command.index("/etc/bigvision/recipe.yaml")] = path
    pods = []
    for node in range(2):
        variables = {
            "PET_NNODES": "2", "PET_NPROC_PER_NODE": "1", "PET_NODE_RANK": str(node), "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": str(free_port()) if not pods else pods[0][0],
        }  # fmt: skip
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        pods.append(
            (variables["PET_MASTER_PORT"], subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
        )
    for _, pod in pods:
        assert pod.wait(timeout=300) == 0, pod.stderr.read()
    assert len(losses(tmp_path / "out")) == 3
