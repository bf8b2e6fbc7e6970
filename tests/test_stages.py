import errno
import multiprocessing
import os
import signal
import time

import pytest
import torch

from steerheal import stages
from steerheal.errors import UserError
from steerheal.stages import Result, Store


def compute(value=1.0):
    return Result(dict(value=value), dict(x=torch.tensor([value, 2.0])))


def test_computed_once_then_replayed(tmp_path):
    events = []
    store = Store(tmp_path, events.append)
    first = store.stage("vector", dict(a=1), compute)
    second = store.stage("vector", dict(a=1), lambda: pytest.fail("computed again"))
    assert second.record == first.record and torch.equal(second.tensors["x"], first.tensors["x"])
    assert second.digest == first.digest
    assert [e.kind for e in events] == ["start", "computed", "replayed"]


def test_any_input_name_or_version_makes_another_digest(monkeypatch):
    digests = {stages.digest_of("vector", dict(a=1)), stages.digest_of("vector", dict(a=2)),
               stages.digest_of("heal", dict(a=1))}
    monkeypatch.setitem(stages.VERSIONS, "vector", 99)
    digests.add(stages.digest_of("vector", dict(a=1)))
    assert len(digests) == 4
    assert stages.digest_of("heal", dict(a=1, b=2)) == stages.digest_of("heal", dict(b=2, a=1))


def test_non_finite_inputs_are_refused():
    with pytest.raises(ValueError):
        stages.digest_of("heal", dict(tau=float("nan")))


@pytest.mark.parametrize("damage", ["empty", "truncated", "flipped body", "flipped head", "foreign"])
def test_damaged_files_are_set_aside_and_recomputed(tmp_path, damage):
    events = []
    store = Store(tmp_path, events.append)
    digest = store.stage("vector", dict(a=1), compute).digest
    path = store.path(digest)
    data = bytearray(path.read_bytes())
    if damage == "empty":
        data = bytearray()
    elif damage == "truncated":
        data = data[: len(data) // 2]
    elif damage == "flipped body":
        data[-1] ^= 1
    elif damage == "flipped head":
        data[len(stages.MAGIC) + 5] ^= 1
    else:
        data = bytearray(b"not a stage at all\n")
    path.write_bytes(bytes(data))
    again = store.stage("vector", dict(a=1), lambda: compute(1.0))
    assert again.record == dict(value=1.0)
    assert "set aside" in [e.kind for e in events] and path.with_suffix(".damaged").exists()
    assert store.stage("vector", dict(a=1), lambda: pytest.fail("not stored")).record == dict(value=1.0)


def test_any_flipped_bit_in_the_head_is_noticed(tmp_path):
    store = Store(tmp_path)
    digest = store.stage("vector", dict(a=1), compute).digest
    data = store.path(digest).read_bytes()
    for bit in range(8 * (data.index(b"\n") + 1)):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        store.path(digest).write_bytes(flipped)
        assert store.load(digest) is None, bit


def test_the_head_of_a_damaged_file_is_none(tmp_path):
    store = Store(tmp_path)
    done = store.stage("heal", {"x": 1}, lambda: Result({}))
    assert store.head(done.digest)["stage"] == "heal" and store.head("0" * 64) is None
    whole = store.path(done.digest).read_bytes()
    for damaged in (b"", b"torn\n", whole[:80], whole.split(b"\n")[0] + b"\n{"):
        store.path(done.digest).write_bytes(damaged)
        assert store.head(done.digest) is None


def test_what_a_killed_writer_left_goes_when_its_stage_is_computed(tmp_path):
    store = Store(tmp_path)
    path = store.path(stages.digest_of("vector", dict(a=1)))
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.4711.tmp").write_bytes(b"half")
    store.stage("vector", dict(a=1), compute)
    assert [p for p in path.parent.iterdir()] == [path]


def test_a_reader_of_a_damaged_file_leaves_the_mended_one_alone(tmp_path):
    store = Store(tmp_path)
    digest = store.stage("vector", dict(a=1), compute).digest
    store.path(digest).write_bytes(b"torn")
    assert store.load(digest) is None  # read before it is mended,
    Store(tmp_path).stage("vector", dict(a=1), compute)
    assert store.stage("vector", dict(a=1), lambda: pytest.fail("computed again")).record == dict(value=1.0)  # used after
    assert len(list(tmp_path.rglob("*.damaged"))) == 1


def test_a_failed_computation_leaves_nothing(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(RuntimeError):
        store.stage("vector", dict(a=1), lambda: (_ for _ in ()).throw(RuntimeError("no")))
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_seeds_depend_on_every_part_and_fit_a_generator():
    seeds = {stages.seed_of(0, "completions", r, purpose, i) for r in range(3) for purpose in ("a", "b") for i in range(3)}
    assert len(seeds) == 18 and all(0 <= s < 2**63 for s in seeds)
    torch.Generator().manual_seed(max(seeds))


def _slow_worker(root, marker):
    def slow():
        with open(marker, "a") as f:
            f.write("x")
        time.sleep(0.5)
        return compute()

    Store(root).stage("vector", dict(a=1), slow)


def test_two_workers_compute_one_stage_once(tmp_path):
    marker = tmp_path / "count"
    workers = [multiprocessing.get_context("fork").Process(target=_slow_worker, args=(tmp_path / "s", marker))
               for _ in range(3)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert marker.read_text() == "x"
    assert not list((tmp_path / "s").rglob("*.lock"))


def test_a_dead_worker_does_not_keep_the_lease(tmp_path):
    marker = tmp_path / "count"
    worker = multiprocessing.get_context("fork").Process(target=_slow_worker, args=(tmp_path / "s", marker))
    worker.start()
    while not marker.exists():
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    assert Store(tmp_path / "s").stage("vector", dict(a=1), compute).record == dict(value=1.0)


def test_a_held_lock_is_refused_without_waiting(tmp_path):
    with stages.locked(tmp_path / "l"), pytest.raises(BlockingIOError), stages.locked(tmp_path / "l", wait=False):
        pass
    with stages.locked(tmp_path / "l", wait=False):
        pass


def test_a_full_disk_is_a_sentence(tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        stages.atomic_write(tmp_path / "x", b"data")
    assert list(tmp_path.iterdir()) == []
