"""The environments of Slurm, MPI, Kubernetes and SageMaker, as they were seen there."""

from __future__ import annotations

import os
from itertools import islice

import pytest

from bigvision.errors import UserError
from bigvision.runtime import Identity, identify
from bigvision.runtime.rendezvous import announced, first_host, is_host, tasks_per_node

SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "gpu[08-10,12]",
    "SLURM_JOB_NODELIST": "gpu[01-20]",
    "SLURM_NTASKS": "32",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "1734541313",
}
POD = {
    "KUBERNETES_SERVICE_HOST": "10.96.0.1",
    "RANK": "2",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "run-master-0",
    "MASTER_PORT": "23456",
}


def without(environ: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in environ.items() if name not in names}


def test_a_task_of_srun() -> None:
    assert identify(SRUN) == Identity(5, 7, 1, 2, "slurm", "gpu08", 15000 + 4711 + 2 * 997)
    assert identify(SRUN | {"SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3"}).local_world_size == 1
    assert identify(SRUN | {"MASTER_ADDR": "ib-gpu08", "MASTER_PORT": "29500"}).address == "ib-gpu08"
    one_host = SRUN | {"SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0"}
    assert identify(one_host).address == "127.0.0.1"


def test_what_runs_in_a_job_but_not_under_srun_is_the_only_rank() -> None:
    """The variables of a batch script, and of the shell that salloc opens, of Slurm 22.05."""
    batch = {"SLURM_JOB_ID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}
    shell = batch | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    for environ in (batch, shell, {"SLURM_JOB_ID": "6", "SLURM_NTASKS": "2"}):
        assert identify(environ) == Identity(0, 1, 0, 1, "python")
    pty = shell | {"SLURM_STEP_ID": "0"}
    assert identify(pty).world_size == 1, "srun --pty bash is one task, whatever the job has"


def test_the_innermost_launcher_counts() -> None:
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    assert identify(SRUN | torchrun | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    assert identify(MPIRUN | torchrun | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    assert identify(SRUN | MPIRUN | {"MASTER_ADDR": "a"}).launcher == "open mpi", "mpirun starts its daemons by srun"
    assert identify(SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}).launcher == "slurm", "srun --mpi=pmi2 sets these"


def test_mpi() -> None:
    here = MPIRUN | {"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}
    found = identify(here)
    assert found == Identity(3, 4, 1, 4, "open mpi", "127.0.0.1", found.port) and 15000 <= found.port < 30000
    assert identify(here | {"PMIX_NAMESPACE": "1734541314"}).port != found.port, "two runs on a host do not meet"
    assert identify(MPIRUN | {"MASTER_ADDR": "node1"}).address == "node1"
    with pytest.raises(UserError, match=r"4 ranks on several hosts \(2 here\) without MASTER_ADDR: .*mpirun -x MASTER_ADDR"):
        identify(MPIRUN)
    hydra = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert (identify(hydra).rank, identify(hydra).address, identify(hydra).launcher) == (1, "127.0.0.1", "mpich")


def test_a_pod_is_a_rank() -> None:
    assert identify(POD) == Identity(2, 3, 0, 1, "pytorchjob", "run-master-0", 23456)
    with pytest.raises(UserError, match="PET_NPROC_PER_NODE=8 asks for several ranks in a pod: start them with `torchrun"):
        identify(POD | {"PET_NPROC_PER_NODE": "8"})
    with pytest.raises(UserError, match="without LOCAL_RANK"):
        identify(without(POD, "KUBERNETES_SERVICE_HOST"))


def test_sagemaker_without_ranks() -> None:
    assert identify({"SM_HOSTS": '["algo-1"]'}).launcher == "python"
    with pytest.raises(UserError, match=r"SM_HOSTS names 2 hosts.*Torchrun\(\)"):
        identify({"SM_HOSTS": '["algo-1","algo-2"]'})
    with pytest.raises(UserError, match="SM_HOSTS='algo-1' is not a list"):
        identify({"SM_HOSTS": "algo-1"})


@pytest.mark.parametrize(
    ("environ", "words"),
    [
        (without(SRUN, "SLURM_PROCID"), "SLURM_STEP_ID=2 without SLURM_PROCID: start the ranks with srun"),
        (without(SRUN, "SLURM_JOB_ID", "SLURM_NODEID"), "without SLURM_JOB_ID, SLURM_NODEID"),
        (without(SRUN, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"), "set MASTER_ADDR"),
        (SRUN | {"SLURM_PROCID": "7"}, "SLURM_PROCID=7 must be from 0 to SLURM_STEP_NUM_TASKS-1"),
        (SRUN | {"SLURM_LOCALID": "2"}, "SLURM_LOCALID=2"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4 is not among the 4 hosts"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x3"}, r"not of the form 2\(x3\),1"),
        (SRUN | {"SLURM_STEP_ID": "batch"}, "SLURM_STEP_ID='batch' is not a whole number"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[1-"}, "not a list of hosts"),
        (SRUN | {"SLURM_STEP_NODELIST": "gpu[x-y]"}, r"\[x-y\] is not a range"),
        (SRUN | {"SLURM_STEP_NODELIST": "$(id)"}, "does not begin with a host"),
        (SRUN | {"SLURM_STEP_NODELIST": "-x"}, "does not begin with a host"),
        (without(MPIRUN, "OMPI_COMM_WORLD_SIZE"), "without OMPI_COMM_WORLD_SIZE: start the ranks with mpirun"),
        (MPIRUN | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 must be from 0 to OMPI_COMM_WORLD_SIZE-1"),
        (MPIRUN | {"MASTER_ADDR": "a b"}, "MASTER_ADDR='a b' is not the name"),
        (MPIRUN | {"MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        (POD | {"RANK": "3"}, "RANK=3 must be from 0 to WORLD_SIZE-1"),
    ],
)
def test_half_set_and_wrong(environ: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        identify(environ)


def test_lists_of_hosts() -> None:
    assert first_host("n[1-3,7],m2") == "n1" and first_host("m2,n[1-3]") == "m2"
    assert first_host("rack[2,1]-n[09-11]b") == "rack2-n09b"
    assert first_host("login.example.org") == "login.example.org"
    assert first_host("127.0.0.[1-2]") == "127.0.0.1"
    assert first_host("n[1-999999999]") == "n1", "is not written out"
    assert list(tasks_per_node("2(x3),1")) == [2, 2, 2, 1] and list(tasks_per_node("8")) == [8]
    assert list(islice(tasks_per_node("1(x999999)"), 2)) == [1, 1]


def test_names_of_hosts() -> None:
    assert all(is_host(name) for name in ("a", "node-1", "n1.example.org", "10.0.0.1", "::1", "fd00::2", "my_pod-0"))
    assert not any(
        is_host(name) for name in ("", "-a", "a-", "a b", "a\n", "a/b", "$HOME", "a:b", "é", "fe80::1%eth0", "x" * 300)
    )


def test_libraries_see_torch_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    with announced(identify(SRUN)):
        assert [os.environ[name] for name in names] == ["5", "7", "1", "2", "gpu08", "21705"]
    assert not any(name in os.environ for name in names)
