"""What exceptions of torch's own classes mean, with the texts of NCCL, gloo and the store."""

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError, DistStoreError

from megatron_nexus.parallel.collective_failure import TRACE_PREFIX, describe_collective_failure

NCCL = "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, {}, NCCL version 2.27.5\n{}"
GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/{}] {}"


def nccl(what: str, last: str) -> DistBackendError:
    return DistBackendError(NCCL.format(what, f"A call failed.\nLast error:\n{last}"))


@pytest.fixture(autouse=True)
def no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TRACE_PREFIX:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("error", "expected", "reason"),
    [
        (
            nccl("invalid usage", "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
            "as many ranks on a machine as it has devices",
            "rank 1 and rank 0 both on CUDA device 1000",
        ),
        (
            nccl("remote process exited or there was a network error", "NET/IB : peer 10.0.0.3<4> status=12"),
            "lost its connection to a rank that exited",
            "NET/IB : peer 10.0.0.3<4> status=12",
        ),
        (
            nccl("unhandled system error", "socketStartConnect: Connect to 10.0.0.2<43231> failed"),
            "NCCL_SOCKET_IFNAME",
            "Connect to 10.0.0.2<43231> failed",
        ),
        (
            nccl("unhandled cuda error", "Cuda failure 2 'out of memory'"),
            "--micro-batch-size",
            "Cuda failure 2",
        ),
        (nccl("unhandled cuda error", "Cuda failure 999 'unknown error'"), "Xid", "Cuda failure 999"),
        (nccl("internal error", "Net plugin v11 failed"), "NCCL_DEBUG=INFO", "Net plugin v11 failed"),
        (DistBackendError("NCCL communicator was aborted on rank 1."), "lost its connection", "on rank 1"),
        (
            DistBackendError(
                "[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=12, OpType=ALL) "
                "ran for 300001 milliseconds before timing out."
            ),
            "--distributed-timeout-seconds-after-init",
            "SeqNum=12",
        ),
        (
            RuntimeError(GLOO.format("pair.cc:538", "Connection closed by peer [127.0.0.1]:12345")),
            "lost its connection to a rank that exited",
            "(Connection closed by peer [127.0.0.1]:12345)",
        ),
        (
            RuntimeError(
                GLOO.format("unbound_buffer.cc:78", "Timed out waiting 1800000ms for recv operation")
            ),
            "--distributed-timeout-minutes",
            "(Timed out waiting 1800000ms",
        ),
        (
            RuntimeError(
                "[enforce fail at gloo/device.cc:84] ifa != nullptr. Unable to find address for: eth9"
            ),
            "GLOO_SOCKET_IFNAME",
            "eth9",
        ),
        (
            DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed."),
            "lost its connection to a rank",
            "got 0 bytes",
        ),
        (DistStoreError("wait timeout after 600000ms, keys: /0//cuda//0"), "waited in vain", "600000ms"),
    ],
)
def test_a_failed_collective_is_one_line_with_reason_and_remedy(
    error: RuntimeError, expected: str, reason: str
) -> None:
    line = describe_collective_failure(error, 3)
    assert line.startswith("rank 3 on ")
    assert expected in line
    assert reason in line
    assert "\n" not in line
    assert ".cpp" not in line


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape '[2]' is invalid"), torch.OutOfMemoryError("CUDA out of memory"), OSError("gloo")],
)
def test_other_errors_keep_their_traceback(error: BaseException) -> None:
    assert describe_collective_failure(error, 0) == ""


def test_after_a_time_out_of_nccl_the_recorded_collectives_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TRACE_PREFIX[1], "/run/nccl_trace_rank_")
    error = DistBackendError("[Rank 0] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1)")
    assert "/run/nccl_trace_rank_*" in describe_collective_failure(error, 0)
