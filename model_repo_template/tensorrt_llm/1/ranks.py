"""What joins the ranks of one engine: sums inside a step (MPI or NCCL), plans between steps (sockets), and a pulse."""

from __future__ import annotations

import logging
import os
import selectors
import shutil
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

log = logging.getLogger("torch engine")

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 4.0  # four missed beats: a rank that is stopped must be noticed well within ten seconds
JOIN_SECONDS = 60.0  # all ranks have left MPI_Init when the joining starts
BEAT, END = b".", b"e"


class RankLost(Exception):
    """Another rank of this engine died or stopped answering."""


class Ranks(Protocol):
    """The collectives of a forward step. Every rank calls them in the same order with tensors of the same shape."""

    rank: int
    size: int
    device: torch.device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums `tensor` over all ranks, in place, and returns it."""

    def gather(self, tensor: Tensor) -> Tensor | None:
        """On rank 0 the (rows, columns) tensors of all ranks side by side, (rows, size * columns); None elsewhere."""

    def share(self, text: str) -> str:
        """Rank 0's text on every rank; for the start only."""

    def close(self) -> None:
        """Parts from the other ranks. All ranks must call it, or it hangs."""


class GpuRanks(Ranks, Protocol):
    """What ranks on GPUs can do besides."""

    def broadcast(self, tensor: Tensor) -> None:
        """Makes `tensor` rank 0's, in place."""

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers; for the start only."""

    def shared_memory(self, n_bytes: int) -> tuple[Tensor, list[int]]:
        """Zeroed GPU memory, uint8, that the kernels of all ranks can reach, and its address on each rank as this rank
        sees it.

        Raises RuntimeError if the GPUs cannot read each other's memory.
        """


class Alone:
    """A single rank: nothing to exchange."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.device = torch.device("cuda", 0) if on_gpu() else torch.device("cpu")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def gather(self, tensor: Tensor) -> Tensor | None:
        return tensor

    def broadcast(self, tensor: Tensor) -> None:
        pass

    def least(self, number: int) -> int:
        return number

    def shared_memory(self, n_bytes: int) -> tuple[Tensor, list[int]]:
        whole = torch.zeros(n_bytes, dtype=torch.uint8, device=self.device)
        return whole, [whole.data_ptr()]

    def share(self, text: str) -> str:
        return text

    def close(self) -> None:
        pass


class MpiRanks:
    """Ranks on CPUs: MPI through shared memory (an all-reduce takes 4 to 40 us where gloo takes 800 to 2300)."""

    def __init__(self) -> None:
        import mpi4py

        # MPI_Finalize waits for every rank, so it would hang at the exit of a process whose peer died: see close().
        mpi4py.rc.finalize = False
        from mpi4py import MPI

        self._mpi, self._world = MPI, MPI.COMM_WORLD
        self.rank, self.size = self._world.Get_rank(), self._world.Get_size()
        self.device = torch.device("cpu")

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._world.Allreduce(self._mpi.IN_PLACE, tensor.numpy())
        return tensor

    def gather(self, tensor: Tensor) -> Tensor | None:
        parts = torch.empty(self.size, *tensor.shape) if self.rank == 0 else None
        self._world.Gather(tensor.numpy(), None if parts is None else parts.numpy(), root=0)
        return None if parts is None else parts.transpose(0, 1).flatten(1)

    def share(self, text: str) -> str:
        return str(self._world.bcast(text, root=0))

    def close(self) -> None:
        self._mpi.Finalize()


class NcclRanks(MpiRanks):
    """Ranks on the GPUs of one host: MPI only to meet, NCCL inside a step."""

    def __init__(self) -> None:
        super().__init__()
        from torch import distributed

        local, gpus = int(os.environ["OMPI_COMM_WORLD_LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise ValueError(f"rank {self.rank} needs its own GPU; this host has {gpus}")
        self.device = torch.device("cuda", local)
        torch.cuda.set_device(self.device)
        port = 0
        if self.rank == 0:
            with socket.create_server(("127.0.0.1", 0)) as probe:
                port = probe.getsockname()[1]
        self._nccl: Any = distributed
        self._nccl.init_process_group(
            "nccl",
            init_method=f"tcp://127.0.0.1:{self.share(str(port))}",
            rank=self.rank,
            world_size=self.size,
            device_id=self.device,
        )

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._nccl.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor | None:
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == 0 else None
        self._nccl.gather(tensor, parts, dst=0)
        return None if parts is None else torch.cat(parts, dim=1)

    def broadcast(self, tensor: Tensor) -> None:
        self._nccl.broadcast(tensor, src=0)

    def least(self, number: int) -> int:
        return int(self._world.allreduce(number, op=self._mpi.MIN))

    def shared_memory(self, n_bytes: int) -> tuple[Tensor, list[int]]:
        # Plain reads and writes of peers' memory are all that the kernels do; PyTorch would also join the GPUs to a
        # multicast group.
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        from torch.distributed import _symmetric_memory as symmetric

        whole = symmetric.empty(n_bytes, dtype=torch.uint8, device=self.device)
        whole.zero_()
        torch.cuda.synchronize(self.device)
        handle = symmetric.rendezvous(whole, self._nccl.group.WORLD)
        self._world.barrier()
        return whole, list(handle.buffer_ptrs)

    def close(self) -> None:
        self._nccl.destroy_process_group()
        super().close()


def world_size() -> int:
    """How many ranks mpirun started, as its environment says; known before MPI starts."""
    return int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def this_rank() -> Ranks:
    """This process among the ranks that mpirun started; without mpirun, a single rank."""
    if world_size() == 1:
        return Alone()
    return NcclRanks() if on_gpu() else MpiRanks()


def on_gpu() -> bool:
    """Whether this process computes on a GPU. Raises ValueError if PyTorch has no code for the GPU that it sees."""
    if not torch.cuda.is_available():
        return False
    capability, built_for = torch.cuda.get_device_capability(), torch.cuda.get_arch_list()
    if not has_code_for(capability, built_for):
        raise ValueError(
            f"PyTorch {torch.__version__} has no code for {torch.cuda.get_device_name()} (compute capability"
            f" {capability[0]}.{capability[1]}; it was built for {' '.join(built_for)}): hide the GPU with "
            "CUDA_VISIBLE_DEVICES= to"
            " compute on the CPU, or use ENGINE=tensorrt"
        )
    return True


def has_code_for(capability: tuple[int, int], built_for: list[str]) -> bool:
    """Whether PyTorch's code runs on a GPU. Machine code runs on GPUs of its generation with the same or a higher minor
    number, PTX (compute_) on every later GPU (CUDA programming guide).

    built_for: torch.cuda.get_arch_list(), for instance ["sm_75", "sm_80", "sm_90", "compute_120"].
    """
    for name in built_for:
        kind, _, number = name.rstrip("af").partition("_")
        built = (int(number[:-1]), int(number[-1]))
        if capability >= built and (kind == "compute" or capability[0] == built[0]):
            return True
    return False


def use_own_cores() -> None:
    """Shares this host's cores among its ranks, so that their threads do not chase each other."""
    ranks = int(os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE", "1"))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))


class Pulse(threading.Thread):
    """Tells each peer once a second that this process lives, and reports when a peer's beat stops.

    A rank that waits inside MPI would wait for a dead peer for ever, so this is a separate thread with its own
    sockets. A peer's silence counts from its first beat on: it may still be loading.
    """

    def __init__(self, peers: dict[int, socket.socket], on_lost: Callable[[int, str], None]) -> None:
        super().__init__(name="pulse", daemon=True)
        self._peers, self._on_lost = dict(peers), on_lost
        self._heard: dict[int, float] = {}
        self._over = threading.Event()

    def run(self) -> None:
        with selectors.DefaultSelector() as readable:
            for rank, peer in self._peers.items():
                peer.setblocking(False)
                readable.register(peer, selectors.EVENT_READ, rank)
            next_beat = time.monotonic()
            while self._peers and not self._over.is_set():
                now = time.monotonic()
                if now >= next_beat:
                    self._send(BEAT)
                    next_beat = now + BEAT_SECONDS
                lost = {rank: "is silent" for rank, heard in self._heard.items() if now - heard > SILENCE_SECONDS}
                for key, _ in readable.select(max(0.0, next_beat - now)):
                    said = receive(self._peers[key.data])
                    self._heard[key.data] = time.monotonic()
                    lost.pop(key.data, None)
                    if not said:
                        lost[key.data] = "has ended"
                    elif END in said:
                        self._forget(key.data, readable)
                for rank, why in lost.items():
                    self._forget(rank, readable)
                    if not self._over.is_set():
                        self._on_lost(rank, why)

    def end(self) -> None:
        """Tells the peers that this process ends on purpose; the thread stops with its next beat."""
        self._over.set()
        self._send(END)

    def _send(self, what: bytes) -> None:
        for peer in list(self._peers.values()):
            with suppress(OSError):  # a full buffer or a closed socket: that peer will fall silent
                peer.send(what)

    def _forget(self, rank: int, readable: selectors.BaseSelector) -> None:
        readable.unregister(self._peers.pop(rank))
        self._heard.pop(rank, None)


def receive(peer: socket.socket) -> bytes:
    """What a non-blocking socket holds; nothing when its other end is closed."""
    try:
        return peer.recv(4096)
    except OSError:
        return b""


class LeaderLink:
    """Rank 0's end of the sockets: hands each step's plan to the other ranks."""

    def __init__(self, plans: dict[int, socket.socket], pulses: dict[int, socket.socket]) -> None:
        self._plans, self._pulses = plans, pulses
        self._pulse: Pulse | None = None

    def wait_until_loaded(self) -> None:
        """Returns when every other rank has loaded its weights. Raises RankLost."""
        for rank, link in self._plans.items():
            if not receive(link):
                raise RankLost(f"rank {rank} ended while it was loading")

    def watch(self, on_lost: Callable[[int, str], None]) -> None:
        self._pulse = Pulse(self._pulses, on_lost)
        self._pulse.start()

    def send(self, plan: list[int]) -> None:
        """One step's plan to every other rank. Raises OSError when a rank is gone or does not read."""
        message = struct.pack("<i", len(plan)) + np.array(plan, dtype="<i4").tobytes()
        for link in self._plans.values():
            link.sendall(message)

    def end(self) -> None:
        """There are no more steps: the other ranks leave `plans()`."""
        for link in self._plans.values():
            with suppress(OSError):  # a rank that is gone has ended already
                link.sendall(struct.pack("<i", 0))
        if self._pulse:
            self._pulse.end()

    def abandon(self) -> None:
        """Leaves the other ranks without a message: they end their processes, and the supervisor sees that."""
        for link in (*self._plans.values(), *self._pulses.values()):
            with suppress(OSError):
                link.shutdown(socket.SHUT_RDWR)


class FollowerLink:
    """The socket of a rank above 0: waits for plans without using CPU time."""

    def __init__(self, rank: int, plans: socket.socket, pulse: socket.socket) -> None:
        self.rank = rank
        self._plans = plans
        self._pulse = Pulse({0: pulse}, self._leader_lost)

    def loaded(self) -> None:
        """Tells rank 0 that this rank can follow."""
        self._pulse.start()
        self._plans.sendall(BEAT)

    def plans(self) -> Iterator[list[int]]:
        """Each step's plan, until rank 0 ends. A rank that loses rank 0 ends its process: it may be stuck in MPI."""
        with self._plans.makefile("rb") as stream:
            while header := stream.read(4):
                (length,) = struct.unpack("<i", header)
                if not length:
                    self._pulse.end()
                    return
                yield np.frombuffer(stream.read(4 * length), dtype="<i4").tolist()
        self._leader_lost(0, "has ended")

    def _leader_lost(self, rank: int, why: str) -> None:
        log.error("rank %d: rank %d %s; this rank ends", self.rank, rank, why)
        os._exit(1)


def meet(ranks: Ranks) -> LeaderLink | FollowerLink:
    """Connects the other ranks to rank 0 over a Unix socket that only this user can reach and that is gone afterwards.

    Two connections per rank: one for plans, one for the pulse, so that neither ever waits for the other.
    Raises RankLost when a rank does not come.
    """
    if ranks.size == 1:
        return LeaderLink({}, {})
    if ranks.rank > 0:
        path = ranks.share("")
        links = []
        for purpose in (b"plans", b"pulse"):
            link = socket.socket(socket.AF_UNIX)
            link.connect(path)
            link.sendall(struct.pack("<i5s", ranks.rank, purpose))
            links.append(link)
        return FollowerLink(ranks.rank, *links)
    folder = tempfile.mkdtemp(prefix="ranks-")  # mode 0700
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            path = os.path.join(folder, "rank0")
            listener.bind(path)
            listener.listen(2 * ranks.size)
            listener.settimeout(JOIN_SECONDS)
            ranks.share(path)
            found: dict[bytes, dict[int, socket.socket]] = {b"plans": {}, b"pulse": {}}
            for _ in range(2 * (ranks.size - 1)):
                try:
                    link, _ = listener.accept()
                except TimeoutError:
                    missing = set(range(1, ranks.size)) - set(found[b"pulse"])
                    raise RankLost(f"rank {min(missing)} did not join within {JOIN_SECONDS:.0f} s") from None
                link.settimeout(JOIN_SECONDS)
                rank, purpose = struct.unpack("<i5s", link.recv(9, socket.MSG_WAITALL))
                found[purpose][rank] = link
            for link in found[b"plans"].values():
                link.settimeout(None)
            return LeaderLink(found[b"plans"], found[b"pulse"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
