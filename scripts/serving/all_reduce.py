"""One rank of the preflight's test: all ranks add up one number, over MPI and over NCCL, which their engines use.

scripts/serving/checks.py starts one process per rank under mpirun. Without GPUs (a rehearsal) gloo takes NCCL's place.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path


def main(folder: Path, seconds: float) -> None:
    """folder: an empty folder of this host, where the ranks find each other."""
    from mpi4py import MPI

    rank, world_size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    expected = world_size * (world_size + 1) // 2
    over_mpi = MPI.COMM_WORLD.allreduce(rank + 1)
    assert over_mpi == expected, f"MPI: rank {rank} of {world_size} has {over_mpi}, not {expected}"
    print(f"rank {rank}: MPI adds up over {world_size} ranks", flush=True)

    import torch
    import torch.distributed

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.set_device(rank)
    else:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    backend = "nccl" if gpu else "gloo"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size, timeout=timedelta(seconds=seconds)
    )  # fmt: skip
    # 1 MB: too large for a control message, so that it takes the way of the data
    numbers = torch.full((1 << 18,), float(rank + 1), device="cuda" if gpu else "cpu")
    torch.distributed.all_reduce(numbers)
    low, high = float(numbers.min()), float(numbers.max())
    assert low == high == expected, f"{backend}: rank {rank} of {world_size} has {low} to {high}, not {expected}"
    print(f"rank {rank}: {backend} adds up over {world_size} ranks", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
