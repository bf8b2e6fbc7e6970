"""Views follow a running search, and take no more than their share of its time."""

from types import SimpleNamespace

import pytest

from steerheal import follower


@pytest.fixture
def search(monkeypatch, tmp_path):
    """A follower on a clock of its own. `rounds` is the study's length, and what a rebuild costs in seconds, a tenth of it;
    `shown` are the lengths that were rebuilt."""
    state = SimpleNamespace(now=100.0, rounds=0, spent=0.0, shown=[])

    def rebuild(study, folder):
        state.now += state.rounds / 10
        state.spent += state.rounds / 10
        return state.rounds

    monkeypatch.setattr(follower.time, "monotonic", lambda: state.now)
    monkeypatch.setattr(follower.study_file, "back_up", lambda folder: None)
    state.pages = []
    monkeypatch.setattr(follower.report, "refresh", state.pages.append)
    monkeypatch.setattr(follower.ledger, "write", rebuild)
    state.views = follower.Follower(tmp_path, None, state.shown.append)
    return state


def test_rebuilding_takes_its_share_of_a_search_however_long_the_study(search):
    started = search.now
    for _ in range(2000):
        search.rounds += 1
        search.views.change()
        for _ in range(10):  # a round of a second
            search.now += 0.1
            search.views.catch_up()
    last = search.rounds / 10  # the rebuild that has just begun to pay may be over the share
    assert search.spent <= follower.SHARE * (search.now - started) + last
    assert search.spent >= 0.8 * follower.SHARE * (search.now - started)  # and it is used
    assert search.shown == sorted(set(search.shown))  # nothing is rebuilt that did not change


def test_a_change_is_followed_at_once_where_there_is_time_and_later_where_there_is_not(search):
    search.rounds = 10
    search.views.change()
    assert search.shown == [10]
    search.rounds = 11
    search.views.change()
    search.views.catch_up()
    assert search.shown == [10]
    search.now += 1 / follower.SHARE
    search.views.catch_up()
    search.views.catch_up()
    assert search.shown == [10, 11]


def test_the_end_of_a_run_does_not_wait(search):
    search.rounds = 10
    search.views.change()
    search.rounds = 11
    search.views.change()
    search.views.catch_up(now=True)
    assert search.shown == [10, 11]
    search.views.catch_up(now=True)
    assert search.shown == [10, 11]


def test_there_is_a_page_where_there_is_a_search(search, tmp_path):
    search.views.change()
    assert search.pages == []  # the runs that confirm a front are no search of their own
    (tmp_path / "search.json").write_text("{}")
    search.views.change()
    search.views.catch_up(now=True)
    assert search.pages == [tmp_path]
