"""Available memory: the kernel's word, and the limits of control groups as containers and batch systems set them."""

import os

import pytest

from segvit.data.memory import available_memory


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.fixture
def root(tmp_path):
    return write(tmp_path, {"proc/meminfo": "MemTotal: 4000 kB\nMemFree: 100 kB\nMemAvailable:    2000 kB\n"})


def group(folder, limit, used, cached):
    return {
        f"{folder}/memory.max": f"{limit}\n",
        f"{folder}/memory.current": f"{used}\n",
        f"{folder}/memory.stat": f"anon 5\ninactive_file {cached}\nactive_file 3\n",
    }


def test_the_kernels_estimate(root):
    assert available_memory(root) == 2000 * 1024


def test_without_it_what_sysconf_says(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sysconf", {"SC_AVPHYS_PAGES": 300, "SC_PAGE_SIZE": 4096}.__getitem__)
    assert available_memory(tmp_path) == 300 * 4096
    monkeypatch.setattr(os, "sysconf", lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert available_memory(tmp_path) is None


def test_a_container_sees_its_own_limit_at_the_top(root):
    write(root, {"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", 1_000_000, 400_000, 100_000))
    assert available_memory(root) == 700_000


@pytest.mark.parametrize("job", [500_000, "max"])
def test_the_tightest_group_above_the_process_counts(root, job):
    write(root, {"proc/self/cgroup": "0::/job/step\n"})
    write(root, group("sys/fs/cgroup/job", 900_000, 200_000, 0) | group("sys/fs/cgroup/job/step", job, 200_000, 0))
    assert available_memory(root) == (300_000 if job != "max" else 700_000)


def test_control_groups_of_version_1(root):
    base = "sys/fs/cgroup/memory"
    write(root, {
        "proc/self/cgroup": "9:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
        f"{base}/memory.limit_in_bytes": "600000", f"{base}/memory.usage_in_bytes": "500000",
        f"{base}/memory.stat": "total_inactive_file 50000\n",
    })  # fmt: skip
    assert available_memory(root) == 150_000


def test_an_overdrawn_group_leaves_nothing(root):
    write(root, {"proc/self/cgroup": "0::/\n"} | group("sys/fs/cgroup", 1000, 4000, 0))
    assert available_memory(root) == 0


def test_this_machine():
    assert available_memory() > 1_000_000
