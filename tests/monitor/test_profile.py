"""`monitor.profile`: every nanosecond of a step belongs to one category, whatever interrupts the steps that are recorded."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from bigvision import UserError, load_config
from bigvision.monitor.trace import CATEGORIES, kernel_category, memory_peak, summarise
from tests.distributed import run_ranks
from tests.recipes import recipe, run

MAIN, AUTOGRAD, COMPUTE, NCCL, COPY = 1, 2, 7, 20, 24


class Trace:
    """Events as torch's profiler writes them on CUDA, in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "ts": 0, "args": {}}]

    def on_thread(self, name: str, begin: float, end: float, thread: int = MAIN, kind: str = "cpu_op") -> None:
        self._add(kind, name, 1, thread, begin, end, {"External id": 1})

    def marked(self, name: str, begin: float, end: float) -> None:
        self.on_thread(name, begin, end, kind="user_annotation")

    def kernel(
        self, name: str, begin: float, end: float, stream: int = COMPUTE, launched: tuple[int, float] | None = None,
        kind: str = "kernel",
    ) -> None:  # fmt: skip
        correlation = len(self.events)
        if launched is not None:
            thread, at = launched
            self._add("cuda_runtime", "cudaLaunchKernel", 1, thread, at, at + 1, {"correlation": correlation})
        self._add(kind, name, 0, stream, begin, end, {"correlation": correlation, "stream": stream, "device": 0})
        self._add("gpu_user_annotation", "forward", 0, stream, begin, end, {})

    def memory(self, at: float, size: int, address: int, total: int, thread: int = MAIN, device: int = 1) -> None:
        args = {"Total Allocated": total, "Bytes": size, "Addr": address, "Device Type": device, "Device Id": 0}
        self.events.append({"ph": "i", "name": "[memory]", "pid": 1, "tid": thread, "ts": at, "args": args})

    def _add(self, kind: str, name: str, pid: int, tid: int, begin: float, end: float, args: dict[str, Any]) -> None:
        event = {"ph": "X", "cat": kind, "name": name, "pid": pid, "tid": tid, "ts": begin, "dur": end - begin, "args": args}
        self.events.append(event)

    def read(self) -> dict[str, Any]:
        return {"traceEvents": self.events}


def test_each_moment_of_a_cuda_step_belongs_to_one_category() -> None:
    trace = Trace()
    trace.marked("step 10", 0, 1000)
    trace.marked("wait for data", 0, 100)
    trace.marked("forward", 100, 200)
    trace.on_thread("aten::linear", 110, 130)
    trace.on_thread("aten::addmm", 111, 129)
    trace.on_thread("aten::scaled_dot_product_attention", 140, 160)
    trace.on_thread("aten::bmm", 141, 150)
    trace.marked("backward", 200, 300)
    trace.on_thread("autograd::engine::evaluate_function: ScaledDotProductFlashAttentionBackward0", 200, 290, AUTOGRAD)
    trace.on_thread("aten::gelu", 210, 220, AUTOGRAD)  # recomputed inside that node
    trace.marked("optimizer", 300, 350)
    trace.kernel("Memcpy HtoD (Pinned -> Device)", 50, 150, COPY, (MAIN, 50), "gpu_memcpy")  # 50 of it while data is awaited
    trace.kernel("nvjet_tst_128x64", 150, 250, launched=(MAIN, 115))
    trace.kernel("ampere_bf16_gemm", 250, 300, launched=(MAIN, 145))  # attention's
    trace.kernel("vectorized_elementwise_kernel<GeluFunctor>", 300, 400, launched=(AUTOGRAD, 212))
    trace.kernel("ncclDevKernel_ReduceScatter_Sum_f32", 350, 600, NCCL, (AUTOGRAD, 250))  # 50 are hidden
    trace.kernel("Memcpy DtoD", 550, 620, COPY, kind="gpu_memcpy")  # 20 are not behind communication
    trace.kernel("multi_tensor_apply_kernel<FusedAdamMathFunctor>", 700, 800, launched=(MAIN, 310))
    trace.kernel("layer_norm_kernel", 750, 850, COPY)  # at the same time on another stream
    trace.kernel("nvjet_tst_128x64", 1500, 1600)  # an evaluation's, between the steps
    trace.marked("step 11", 2000, 2001)
    found = summarise(trace.read())
    assert found is not None and found["steps"] == [10, 11] and found["device"] == "cuda"
    exact = {name: round(ms * 2e3, 6) for name, ms in found["categories"].items() if ms}
    assert exact == {
        "data": 50, "copies": 100 + 20, "matrix products": 100, "attention": 50, "elementwise": 100, "communication": 200,
        "optimizer": 75, "normalisation": 75, "idle": 80 + 150 + 1,
    }  # fmt: skip
    assert found["hidden"] * 2e3 == pytest.approx(50)
    assert sum(exact.values()) == round(found["step"] * 2e3) == 1001


def test_the_self_time_of_operators_counts_on_the_cpu() -> None:
    trace = Trace()
    trace.marked("step 1", 0, 100)
    trace.marked("wait for data", 0, 10)
    trace.on_thread("gloo:broadcast", 2, 8, 9, "user_annotation")  # of a pipeline's targets
    trace.on_thread("aten::linear", 10, 40)
    trace.on_thread("aten::addmm", 15, 35)
    trace.on_thread("aten::native_layer_norm", 40, 50)
    trace.on_thread("aten::mul", 42, 46)
    trace.on_thread("autograd::engine::evaluate_function: MulBackward0", 50, 60)
    trace.on_thread("aten::mul", 52, 58.0004)
    trace.on_thread("gloo:all_reduce", 55, 75, 9, "user_annotation")
    trace.marked("optimizer", 80, 90)
    trace.on_thread("aten::mul", 81, 84)
    trace.on_thread("c10d::allreduce_", 84, 86)
    trace.on_thread("gloo:all_reduce", 85, 88, 9, "user_annotation")  # Python waits for it
    found = summarise(trace.read())
    assert found is not None and found["device"] == "cpu"
    exact = {name: round(ms * 1e3, 6) for name, ms in found["categories"].items() if ms}
    assert exact == {
        "data": 10, "matrix products": 30, "normalisation": 10, "elementwise": 6, "communication": 17 + 2 + 2, "optimizer": 6,
        "idle": 2 + 5 + 10,
    }  # fmt: skip
    assert round(found["hidden"] * 1e3, 6) == 3


@pytest.mark.parametrize(("kernel", "operators", "category"), [
    ("sm80_xmma_gemm_bf16bf16_bf16f32_tn_n_tilesize128x128x32", (), "matrix products"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", ("aten::addmm",), "matrix products"),
    ("cutlass_80_tensorop_s16816gemm", ("aten::convolution_backward",), "convolution"),
    ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", (), "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", (), "attention"),
    ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", ("aten::cudnn_batch_norm",), "normalisation"),
    ("void cudnn::bn_bw_1C11_kernel_new<float>", (), "normalisation"),
    ("void cudnn::ops::nchwToNhwcKernel<float>", (), "convolution"),
    ("triton_poi_fused_addmm_gelu_3", (), "elementwise"),  # the bias
    ("triton_per_fused_add_native_layer_norm_5", (), "normalisation"),
    ("triton_poi_fused__to_copy_t_0", (), "copies"),
    ("triton_tem_fused_addmm_2", (), "matrix products"),
    ("triton_red_fused_convolution_backward_sum_1", (), "elementwise"),
    ("unrolled_elementwise_kernel<direct_copy_kernel_cuda>", ("aten::linear", "aten::copy_"), "copies"),
    ("void split_with_sizes_copy_out_contiguous_no_cast_kernel", ("fsdp::split_with_sizes_copy",), "copies"),
    ("multi_tensor_apply_kernel<LpNormFunctor>", ("aten::_foreach_norm",), "elementwise"),
    ("max_pool_forward_nhwc", ("aten::max_pool2d_with_indices",), "elementwise"),
    ("vectorized_elementwise_kernel", ("autograd::engine::evaluate_function: ConvBackward0", "aten::gelu"), "elementwise"),
    ("ncclDevKernel_AllGather_RING_LL", ("c10d::_allgather_base_",), "communication"),
])  # fmt: skip
def test_kernels_are_known_by_their_name_and_by_what_launched_them(kernel: str, operators: Any, category: str) -> None:
    assert kernel_category(kernel, operators, updates=False) == category
    assert kernel_category(kernel, operators, updates=True) == (category if category == "communication" else "optimizer")


def test_the_peak_of_memory_is_what_was_held_before_and_what_each_operator_allocated() -> None:
    trace = Trace()
    trace.marked("step 4", 0, 100)
    trace.marked("forward", 0, 50)
    trace.on_thread("aten::linear", 10, 20)
    trace.on_thread("aten::empty", 11, 12)
    trace.marked("backward", 50, 100)
    trace.on_thread("autograd::engine::evaluate_function: AddmmBackward0", 50, 90, AUTOGRAD)
    trace.on_thread("aten::mm", 55, 80, AUTOGRAD)
    trace.memory(5, 4, 9, 4, device=0)  # on the host
    trace.memory(11, 100, 1, 1100)
    trace.memory(30, -200, 7, 900)  # of what was there before
    trace.memory(40, 10, 2, 910)
    trace.memory(60, 300, 3, 1210, AUTOGRAD)
    trace.memory(65, -10, 2, 1200, AUTOGRAD)
    trace.memory(70, -300, 3, 900, AUTOGRAD)
    assert memory_peak(trace.read()) == {
        "peak": 1210, "step": 4, "range": "backward", "before": 800, "groups": [
            {"range": "backward", "operation": "AddmmBackward0", "bytes": 300, "tensors": 1},
            {"range": "forward", "operation": "aten::linear", "bytes": 100, "tensors": 1},
            {"range": "forward", "operation": "Python", "bytes": 10, "tensors": 1},
        ],
    }  # fmt: skip
    assert memory_peak(Trace().read()) is None


@pytest.mark.parametrize(("monitor", "train", "error"), [
    ({"profile": [0, 3]}, {}, "monitor.profile: .*0, 3.* must be the first step, from 1 on"),
    ({"profile": [5, 4]}, {}, "monitor.profile: .*5, 4.* must be"),
    ({"profile": [5, 25]}, {}, "monitor.profile: .*5, 25.* at most 20 steps"),
    ({"profile": [21, 22]}, {"steps": 20}, "monitor.profile: .*begins after the last step, train.steps: 20"),
    ({"profile": 5}, {}, "monitor.profile: 5"),
    ({"memory_snapshot": True}, {}, "monitor.memory_snapshot: true needs monitor.profile"),
])  # fmt: skip
def test_steps_that_cannot_be_recorded_are_refused(monitor: Any, train: Any, error: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=error):
        load_config(recipe(tmp_path, monitor=monitor, train=train))


def profiled(out: Path, rank: int = 0) -> Counter[str]:
    """How often each range stands in the trace of a rank."""
    trace = json.loads(gzip.decompress((out / "profile" / f"rank-{rank}.json.gz").read_bytes()))
    return Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")


STRATEGIES: dict[str, tuple[int, dict[str, Any]]] = {
    "fsdp": (2, {}),
    "ddp": (2, {}),
    "compiled": (1, {"strategy": "ddp", "compile": True}),
    "zero1": (2, {}),
    "zero2": (2, {}),
    "zero3": (2, {}),
    "pipeline": (2, {}),
    "interleaved": (2, {"strategy": "pipeline", "schedule": "interleaved", "stages_per_rank": 2}),
}


@pytest.mark.parametrize(
    "name", ["fsdp", *(pytest.param(name, marks=pytest.mark.long) for name in list(STRATEGIES)[1:])]
)  # fmt: skip
def test_a_profile_of_all_ranks_across_an_evaluation_and_a_checkpoint(name: str, tmp_path: Path) -> None:
    ranks, parallel = STRATEGIES[name]
    plain = recipe(
        tmp_path, parallel={"strategy": name} | parallel, train={"steps": 5, "micro_batch": 6, "eval_every": 3},
        checkpoint={"every": 3}, ema={"decay": 0.9}, monitor={"profile": [2, 4], "memory_snapshot": True},
    )  # fmt: skip
    run_ranks(run, ranks, plain)
    summary = json.loads((tmp_path / "profile" / "summary.json").read_text())
    assert summary["steps"] == [2, 3, 4] and list(summary["ranks"]) == [str(rank) for rank in range(ranks)]
    for rank, found in summary["ranks"].items():
        assert list(found["categories"]) == list(CATEGORIES)
        assert sum(found["categories"].values()) == pytest.approx(found["step"], rel=1e-9)
        assert found["categories"]["optimizer"] > 0 and (ranks == 1 or found["categories"]["communication"] > 0)
        marks = profiled(tmp_path, int(rank))
        assert [marks[f"step {step}"] for step in range(1, 6)] == [0, 1, 1, 1, 0]
        micro_batches = 24 // 6 // (1 if "pipeline" in (name, parallel.get("strategy")) else ranks)
        passes = 3 * micro_batches * (2 if name == "interleaved" else 1)
        assert marks["forward"] >= passes and marks["backward"] == passes  # an evaluation's forward passes too, in a pipeline
        assert marks["optimizer"] == marks["reduce"] == marks["ema"] == 3 and marks["wait for data"] >= 3
        peak = json.loads((tmp_path / "profile" / f"memory-rank-{rank}.json").read_text())
        assert peak["peak"] == sum(group["bytes"] for group in peak["groups"]) > 0 and peak["step"] in (2, 3, 4)
    assert sum(summary["categories"].values()) == pytest.approx(summary["step"], rel=1e-9)


class Fault(Exception):
    pass


def test_a_run_that_ends_or_fails_or_resumes_within_the_steps_leaves_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    def failing(event: Any) -> None:
        if event.kind == "step" and event.step == 2:
            raise Fault

    plain = recipe(tmp_path, model="small", train={"steps": 4}, checkpoint={"every": 3}, monitor={"profile": [3, 6]})
    run(plain)  # ends at the fourth
    assert [profiled(tmp_path)[f"step {step}"] for step in (2, 3, 4)] == [0, 1, 1]
    assert json.loads((tmp_path / "profile" / "summary.json").read_text())["steps"] == [3, 4]
    assert "steps 3 to 4: each" in capsys.readouterr().out
    plain["train"]["steps"] = 8
    run(plain)  # goes on in the middle
    assert json.loads((tmp_path / "profile" / "summary.json").read_text())["steps"] == [5, 6]
    other = recipe(tmp_path / "other", model="small", train={"steps": 6}, monitor={"profile": [1, 4]})
    with pytest.raises(Fault):
        run(other, callbacks=[failing])
    assert profiled(tmp_path / "other")["step 1"] == 1
    assert not torch.autograd.profiler._is_profiler_enabled  # the next run of this process marks nothing
    # A recorder that cannot start, since another one runs.
    other["out"] = str(tmp_path / "third")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        run(other)
    assert "monitor.profile: nothing is known of rank 0: " in capsys.readouterr().out
