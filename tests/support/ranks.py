"""Several gloo processes on one machine, as torchrun would start them, and never longer than they may take."""

import datetime
import os
import socket
import sys
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# imported once by a server that every rank is forked from; starting afresh would take each of them seconds
PRELOADED = ["torch", "torch._dynamo", "pytest", "grpo_kernels", "transformers.trainer", "accelerate"]


def join(rank, port, ranks, seconds):
    """First thing in each process: torchrun's environment and the process group. A collective that waits longer is an error."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), OMP_NUM_THREADS="1")  # fmt: skip
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=seconds / 2))


def leave():
    """Last thing in each process: all of them end together, and without gloo's destructors, which now and then abort in their threads."""
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


def launch(work, folder, ranks, seconds):
    """``work(rank, folder, port)`` in as many processes; one that still runs after ``seconds`` is killed, and the test fails."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("needs gloo")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    processes = mp.start_processes(work, (folder, port), nprocs=ranks, join=False, start_method="forkserver")
    deadline = time.monotonic() + seconds
    try:
        while not processes.join(timeout=1):
            assert time.monotonic() < deadline, "the ranks wait for each other"
    finally:
        for process in processes.processes:
            if process.is_alive():
                process.kill()
