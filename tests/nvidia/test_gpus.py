"""How nvidia-smi's output is read, with a stand-in on PATH that prints what real drivers print;
and what ASSUME_GPU may be."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from scripts import reports
from scripts.nvidia import gpus

V100 = "Tesla V100-SXM2-16GB, 16160, 7.0, 535.104.05\n"

# p3.8xlarge: four V100, every pair linked; the head line underlined as some drivers do, CPU columns after the GPUs'
TOPOLOGY = """\
\x1b[4m\tGPU0\tGPU1\tGPU2\tGPU3\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV1\tNV1\tNV2\t0-31\t0\t\tN/A
GPU1\tNV1\t X \tNV2\tNV1\t0-31\t0\t\tN/A
GPU2\tNV1\tNV2\t X \tNV2\t0-31\t0\t\tN/A
GPU3\tNV2\tNV1\tNV2\t X \t0-31\t0\t\tN/A

Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NV#  = Connection traversing a bonded set of # NVLinks
"""
P2P = """\
 \tGPU0\tGPU1\tGPU2\tGPU3\t
 GPU0\tX\tOK\tOK\tOK\t
 GPU1\tOK\tX\tOK\tOK\t
 GPU2\tOK\tOK\tX\tOK\t
 GPU3\tOK\tOK\tOK\tX\t

Legend:

  X    = Self
  OK   = Status Ok
  CNS  = Chipset not supported
  NS   = Not supported
"""


def stand_in(folder: Path, script: str) -> None:
    """A program named nvidia-smi in `folder`."""
    path = folder / "nvidia-smi"
    path.write_text("#!/bin/bash\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


@pytest.mark.parametrize(
    "text, count, name, capability",
    [
        ("4x V100-SXM2-16GB", 4, "V100-SXM2-16GB", "7.0"),
        ("2xA100-80GB", 2, "A100-80GB", "8.0"),
        ("2x H100", 2, "H100-80GB", "9.0"),
        ("8 x h200", 8, "H200-141GB", "9.0"),
        ("L4", 1, "L4", "8.9"),
        ("A10", 1, "A10", "8.6"),
        ("4x rtx-4090", 4, "RTX-4090", "8.9"),
        ("2x RTX-PRO", 2, "RTX-PRO-6000", "12.0"),
    ],
)
def test_assumed_gpus_are_those_named(text: str, count: int, name: str, capability: str) -> None:
    found = gpus.assumed(text)
    assert [gpu.name for gpu in found] == [name] * count
    assert found[0].compute_capability == capability
    assert found[0].memory_bytes % gpus.MIB == 0 and found[0].memory_bytes > 14 << 30


@pytest.mark.parametrize("text", ["", "4x", "A100", "4x Voodoo2", "0x L4", "two L4", "4x L4 L4"])
def test_what_is_no_gpu_or_more_than_one_ends_in_a_report(text: str) -> None:
    with pytest.raises(reports.Problem) as caught:
        gpus.assumed(text)
    assert repr(text) in caught.value.report() and caught.value.command.startswith("make plan")


def test_v100s_of_one_host_are_linked_and_t4s_may_not_be() -> None:
    assert gpus.assumed_links(gpus.assumed("4x V100-SXM2-16GB")) == gpus.Links(True, True)
    assert gpus.assumed_links(gpus.assumed("2x T4")) == gpus.Links(None, False)
    assert gpus.assumed_links(gpus.assumed("B200")) == gpus.Links(None, None)


def test_this_machines_gpus_are_what_nvidia_smi_says(on_path: Path) -> None:
    stand_in(on_path, f"echo 'WARNING: infoROM is corrupted at gpu 0000:00:04.0'; printf '{V100}{V100}'")
    assert gpus.here() == [gpus.Gpu("Tesla V100-SXM2-16GB", 16160 << 20, "7.0", "535.104.05")] * 2


def test_who_else_holds_memory_is_told_with_sizes_the_largest_first(on_path: Path) -> None:
    ours, other = os.getpid(), os.getppid()
    apps = f"GPU-b, {other}, /usr/bin/python3, 812\nGPU-a, {other}, tritonserver, 68000\nGPU-a, {ours}, python3, 9000\n"
    apps += "GPU-a, 12, [Not Found], [N/A]\nNo running processes found\n"
    stand_in(on_path, f"case $1 in *apps*) printf '{apps}';; *) printf 'GPU-a, 0\nGPU-b, 1\n';; esac")
    expected = [f"pid {other} (tritonserver) on GPU 0: 71.3 GB", f"pid {other} (/usr/bin/python3) on GPU 1: 0.9 GB"]
    mine = f"pid {ours} (python3) on GPU 0: 9.4 GB"
    assert gpus.holders(session=-1) == [expected[0], mine, expected[1]]
    assert mine not in gpus.holders(session=os.getsid(ours))


def test_no_nvidia_smi_means_no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.here() == []
    assert gpus.links_here(4) == gpus.Links(None, None)


@pytest.mark.parametrize(
    "script, seen",
    [
        ("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2", "compute_cap"),
        ("echo 'Failed to initialize NVML: Driver/library version mismatch' >&2; exit 18", "mismatch"),
        ("echo 'NVIDIA GB10, [N/A], 12.1, 580.65'", "N/A"),
    ],
)
def test_an_nvidia_smi_that_fails_is_quoted(on_path: Path, script: str, seen: str) -> None:
    stand_in(on_path, script)
    with pytest.raises(reports.Problem) as caught:
        gpus.here()
    assert seen in caught.value.report() and caught.value.command.startswith("nvidia-smi --query-gpu")


def test_links_come_from_the_matrices_of_the_gpus_asked_for(on_path: Path) -> None:
    (on_path / "p2p").write_text(P2P)
    (on_path / "topology").write_text(TOPOLOGY)
    stand_in(on_path, f'[ "$2" = -m ] && cat {on_path}/topology; [ "$2 $3" = "-p2p r" ] && cat {on_path}/p2p; exit 0')
    assert gpus.links_here(4) == gpus.Links(True, True)
    assert gpus.links_here(1) == gpus.Links(None, None)
    # eight were asked for, four are shown
    assert gpus.links_here(8) == gpus.Links(None, None)


def test_one_pair_without_peer_access_is_enough_to_lack_it() -> None:
    broken = P2P.replace(" GPU3\tOK\tOK\tOK\tX", " GPU3\tCNS\tOK\tOK\tX")
    pcie = TOPOLOGY.replace("GPU2\tNV1\tNV2\t X \tNV2", "GPU2\tNV1\tNV2\t X \tSYS")
    assert gpus.parse_links(broken, pcie, 4) == gpus.Links(False, False)
    # ... but not among the GPUs before it
    assert gpus.parse_links(broken, pcie, 2) == gpus.Links(True, True)


def test_network_cards_in_the_matrix_are_no_gpus() -> None:
    with_nic = (
        "\tGPU0\tGPU1\tNIC0\tNIC1\tCPU Affinity\n"
        "GPU0\t X \tPHB\tNODE\tSYS\t0-7\n"
        "GPU1\tPHB\t X \tNODE\tSYS\t0-7\n"
        "NIC0\tNODE\tNODE\t X \tSYS\n"
    )
    assert gpus.parse_links("", with_nic, 2) == gpus.Links(None, False)
