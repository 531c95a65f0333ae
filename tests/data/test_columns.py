import multiprocessing
import pickle

import pytest
import torch

from bigvision.data.sources.base import Column, Texts

NAMES = [b"a", b"", b"\xff\x00c", b"d" * 70_000]


def answer(connection, numbers, texts) -> None:
    connection.send(([numbers[index] for index in range(len(numbers))], [texts[index] for index in range(len(texts))]))


@pytest.mark.long
def test_what_is_sent_to_a_process_is_still_here():
    """Sending moves a tensor's numbers."""
    numbers, texts = Column(torch.arange(5) ** 9), Texts.of(NAMES)
    ours, theirs = multiprocessing.Pipe()
    for _ in range(2):
        process = multiprocessing.get_context("spawn").Process(target=answer, args=(theirs, numbers, texts))
        process.start()
        # Memory that was freed gets other numbers.
        noise = [torch.full((n,), 77) for n in (5, 5, 40, 70_004) for _ in range(20)]
        assert [numbers[index] for index in range(5)] == [0, 1, 512, 19683, 262144]
        assert [texts[index] for index in range(4)] == NAMES and numbers[-1] == 262144
        assert ours.recv() == ([0, 1, 512, 19683, 262144], NAMES)
        process.join()
    assert noise
    copy, same = pickle.loads(pickle.dumps((numbers, texts)))  # noqa: S301
    assert copy[3] == numbers[3] and same[2] == NAMES[2] and len(same) == 4
