"""Who am I."""

from __future__ import annotations

import pytest
import torch

from bigvision.errors import UserError
from bigvision.runtime import Identity, all_or_none, from_main, gather_json, identify, start
from bigvision.runtime.process import choose_device
from tests.distributed import RankError, run_ranks

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}


def test_environments() -> None:
    assert identify({}) == Identity(0, 1, 0, 1, "python")
    assert identify({"MASTER_ADDR": "left over", "MASTER_PORT": "1"}).launcher == "python"
    assert identify(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}) == Identity(3, 4, 1, 2, "torchrun", "a", 1)
    assert identify(TORCHRUN | {"TORCHELASTIC_RUN_ID": "x", "ACCELERATE_MIXED_PRECISION": "no"}).launcher == "accelerate"
    deepspeed = {k: v for k, v in TORCHRUN.items() if k != "LOCAL_WORLD_SIZE"} | {"LOCAL_SIZE": "2"}
    assert identify(deepspeed) == Identity(3, 4, 1, 2, "deepspeed", "a", 1)


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set(missing: str) -> None:
    with pytest.raises(UserError, match=f"without {missing}: start the ranks with torchrun"):
        identify({key: value for key, value in TORCHRUN.items() if key != missing})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"RANK": "4"}, "RANK=4"),
        ({"RANK": "x"}, "RANK='x'"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({"RANK": "-1"}, "RANK=-1"),
        ({"RANK": "1_0"}, "RANK='1_0'"),
        ({"WORLD_SIZE": "٤"}, "WORLD_SIZE='٤'"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536"),
        ({"MASTER_ADDR": "-oProxyCommand=x"}, "MASTER_ADDR='-oProxyCommand=x'"),
        ({"MASTER_ADDR": "a b"}, "MASTER_ADDR='a b'"),
        ({"MASTER_ADDR": "a;id"}, "MASTER_ADDR='a;id'"),
        ({"MASTER_ADDR": "fe80::1%x y"}, "MASTER_ADDR="),
    ],
)
def test_numbers_that_do_not_fit(change: dict[str, str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        identify(TORCHRUN | change)


def test_device() -> None:
    one = identify({})
    assert choose_device("cpu", one) == torch.device("cpu")
    if not torch.cuda.is_available():
        assert choose_device("auto", one) == torch.device("cpu")
        with pytest.raises(UserError, match=r"parallel\.device: cuda"):
            choose_device("cuda", one)


def exchange() -> tuple:
    with start("cpu", replicas=2) as runtime:
        mesh = (runtime.mesh.get_local_rank("replicate"), runtime.mesh.get_local_rank("shard"))
        texts = gather_json("ä" * runtime.rank)
        return mesh, texts, from_main({"rank": runtime.rank})


def test_exchange() -> None:
    results = run_ranks(exchange, 4)
    assert [result[0] for result in results] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(result[1] == ["", "ä", "ää", "äää"] and result[2] == {"rank": 0} for result in results)


def replicas_that_do_not_fit() -> None:
    with start("cpu", replicas=2):
        pass


def test_replicas_that_do_not_divide() -> None:
    with pytest.raises(RankError, match=r"parallel\.replicas: 2 does not divide the 3 ranks"):
        run_ranks(replicas_that_do_not_fit, 3)


def one_fails(user: bool) -> str:
    with start("cpu") as runtime:

        def work() -> int:
            if runtime.rank == 1:
                raise UserError("one line") if user else OSError("disk")
            return runtime.rank

        try:
            all_or_none(work)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def test_what_fails_on_one_rank_fails_on_all() -> None:
    assert run_ranks(one_fails, 3, False) == ["RankFailure: rank 1: OSError: disk"] * 3
    assert run_ranks(one_fails, 3, True) == ["UserError: one line"] * 3
