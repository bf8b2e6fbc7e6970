import os
import signal
import tempfile
import time
from pathlib import Path

import pytest

from steerheal import driver, plan, weights
from steerheal.driver import Machine
from steerheal.errors import UserError


def test_a_spent_wall_budget_asks_to_stop_and_names_itself(tmp_path, capfd):
    with driver._stop_requests(tmp_path, 1e-9) as why:
        while not (tmp_path / ".stop").exists() or not why:
            time.sleep(0.01)
    assert why == ["hours"] and "wall budget" in capfd.readouterr().err
    (tmp_path / ".stop").unlink()
    with driver._stop_requests(tmp_path, 100) as why:
        assert not why
    assert not (tmp_path / ".stop").exists()


def test_a_signal_asks_to_stop_and_a_second_one_ends(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), driver._stop_requests(tmp_path, None) as why:
        os.kill(os.getpid(), signal.SIGTERM)
        assert why == ["signal"] and (tmp_path / ".stop").exists()
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def nodes(*resources):
    return [dict(Alive=True, Resources=r) for r in resources] + [dict(Alive=False, Resources=dict(CPU=99, GPU=9))]


@pytest.mark.parametrize("found,machine,expected", [
    (nodes(dict(CPU=8)), Machine(), dict(cpu=8, gpu=0)),
    (nodes(dict(CPU=8, GPU=1)), Machine(concurrent=2), dict(cpu=4, gpu=0.5)),
    (nodes(dict(CPU=8, GPU=4)), Machine(concurrent=2), dict(cpu=4, gpu=1)),
    (nodes(dict(CPU=2, GPU=1), dict(CPU=2, GPU=1)), Machine(), dict(cpu=2, gpu=1)),  # never more than one node has
    (nodes(dict(CPU=2), dict(CPU=2)), Machine(concurrent=8), dict(cpu=1, gpu=0)),
    (nodes(dict(CPU=8, GPU=2)), Machine(concurrent=4, gpus_per_trial=0.25), dict(cpu=2, gpu=0.25)),
    (nodes(dict(CPU=8, GPU=2)), Machine(gpus_per_trial=0), dict(cpu=8, gpu=0)),
])
def test_each_trial_gets_its_share_of_one_node(found, machine, expected, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: found)
    assert driver._resources(machine, "auto") == expected
    assert driver._resources(machine, "cpu") == expected | dict(gpu=0)  # a card beside it is none of its business


@pytest.mark.parametrize("found,concurrent,expected", [
    (nodes(dict(CPU=64), dict(CPU=16, GPU=1)), 1, dict(cpu=16, gpu=1)),  # the largest node has no card
    (nodes(dict(CPU=16, GPU=1), dict(CPU=8, GPU=1)), 2, dict(cpu=8, gpu=1)),
    (nodes(*[dict(CPU=4)] * 3), 4, dict(cpu=2, gpu=0)),
    (nodes(*[dict(CPU=8, GPU=1)] * 2), 3, dict(cpu=4, gpu=0.5)),
    (nodes(*[dict(CPU=8, GPU=1)] * 2), 6, dict(cpu=2, gpu=pytest.approx(1 / 3))),
])
def test_as_many_trials_as_are_asked_for_find_room_on_uneven_nodes(found, concurrent, expected, monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: found)
    assert driver._resources(Machine(concurrent=concurrent), "auto") == expected and not capsys.readouterr().out


def test_where_not_all_find_room_it_is_said_and_where_none_does_refused(monkeypatch, capsys):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: nodes(dict(CPU=2), dict(CPU=2)))
    assert driver._resources(Machine(concurrent=8), "auto") == dict(cpu=1, gpu=0)
    assert "--concurrent 8: 4 find room" in capsys.readouterr().out
    monkeypatch.setattr(ray, "nodes", lambda: nodes(dict(CPU=2), dict(CPU=0, GPU=1)))
    with pytest.raises(UserError, match="no node has both"):
        driver._resources(Machine(), "auto")


@pytest.mark.parametrize("machine,cards,expected", [
    (Machine(concurrent=3), 2, 4),  # two on each card
    (Machine(), 1, 1), (Machine(concurrent=2), 1, 2), (Machine(concurrent=2), 0, 2),
    (Machine(gpus_per_trial=0.25), 1, 4),  # a trial has its quarter, whether others run beside it or not
    (Machine(concurrent=4, gpus_per_trial=1), 1, 1), (Machine(gpus_per_trial=0.4), 1, 3),
    (Machine(concurrent=2, gpus_per_trial=0.5), 2, 4),
    (Machine(concurrent=8, gpus_per_trial=0.5, address="auto"), 1, 1),
])
def test_a_model_must_fit_into_the_share_of_a_card_that_its_trial_gets(machine, cards, expected, monkeypatch):
    monkeypatch.setattr(weights, "cards", lambda: [("card", 24.0, 24.0)] * cards)
    assert machine.at_a_time() == expected


def test_more_cards_than_a_node_has_would_wait_for_ever(monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: nodes(dict(CPU=2)))
    with pytest.raises(UserError, match="--gpus-per-trial 1: no node has that many"):
        driver._resources(Machine(gpus_per_trial=1), "auto")


def test_rays_files_are_local_here_and_shared_on_a_cluster(tmp_path, monkeypatch):
    made = plan.make("quickstart", name=None, out=tmp_path, model="m", overrides={}, trials=None, rounds=None, sampler=None,
                     seed=None)
    made.folder.mkdir()
    here = driver._scratch(made, Machine())
    assert made.folder not in here.parents and len(str(here)) < 60  # sockets allow 107 bytes
    assert not driver._hold(here)  # a living driver's: another container's may have a pid that this one's /proc lacks
    here.rmdir()
    dead, locked = (Path(tempfile.mkdtemp(prefix="steerheal-4194305-")) for _ in range(2))  # no process has such a pid
    assert driver._hold(locked)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a folder whose name is too long"))
    again = driver._scratch(made, Machine())
    assert len(str(again)) < 60 and locked.exists() and not dead.exists()
    again.rmdir()
    locked.rmdir()
    assert driver._scratch(made, Machine(address="auto")).parent == made.folder  # where every node can write


@pytest.mark.parametrize("machine,words", [
    (Machine(), ["Ray did not start: timed out", "the same command again"]),
    (Machine(address="1.2.3.4:6379"), ["--address 1.2.3.4:6379: timed out", "cluster.md"]),
])
def test_a_ray_that_does_not_start_is_a_sentence(machine, words, monkeypatch, tmp_path):
    import ray

    def fail(**kw):
        raise Exception("timed out\nand more")

    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(UserError) as caught:
        driver._connect(machine, tmp_path)
    assert all(word in str(caught.value) for word in words)


def test_what_starts_with_ray_never_sees_sigterm():
    with driver._sigterm_masked():
        assert signal.SIGTERM in signal.pthread_sigmask(signal.SIG_BLOCK, ())  # inherited by whatever is started
    assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())

