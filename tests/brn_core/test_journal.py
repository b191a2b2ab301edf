"""A training that is killed and resumed repeats steps; their rows are stored once, and none is missing."""

import pytest
from fake_service import FakeService, Fault

from brn_core import shipper as module
from brn_core import wire
from brn_core.client import Client
from brn_core.journal import Begun, Journal
from brn_core.packer import StepRows, tables
from brn_core.shipper import Shipper
from brn_core.spool import Spool
from brn_core.wire import RunCreate

RUN = RunCreate(id="run-1", name="a run")


@pytest.fixture
def ship(tmp_path, monkeypatch):
    """Makes the shipper of a process that starts at a step; nothing is sent unless it must be."""
    monkeypatch.setattr(module, "_FIRST_DELAY_SECONDS", 0.01)
    made = []

    def make(url, start_step=0, run=RUN):
        shipper = Shipper(
            Client(url),
            run,
            0,
            lambda rows: wire.encode_batch(tables(rows)),
            spool=Spool(tmp_path / "spool"),
            journal=Journal(tmp_path / "journal.json", run.id, start_step),
            flush_seconds=3600.0,
        )
        made.append(shipper)
        return shipper

    yield make
    for shipper in made:
        assert shipper.close(timeout_seconds=0)


def offer(shipper, steps):
    for step in steps:
        shipper.offer(StepRows(step, scalars={"loss": float(step)}))


def stored(service):
    """Every stored step, with repeats."""
    return [row["step"] for row in service.rows("scalars")]


def test_a_flush_returns_when_what_was_offered_is_stored(ship):
    with FakeService() as service:
        shipper = ship(service.url)
        offer(shipper, range(5))
        assert shipper.flush(60)
        assert stored(service) == list(range(5))


def test_a_flush_returns_when_what_was_offered_is_in_the_spool(ship, tmp_path):
    with FakeService() as service:
        url = service.url
    shipper = ship(url)
    offer(shipper, range(5))
    assert shipper.flush(60)
    assert [parcel.steps for parcel in Spool(tmp_path / "spool").folder("run-1", 0).parcels()] == [5]


def test_steps_of_settled_batches_are_not_sent_again(ship):
    with FakeService() as service:
        first = ship(service.url)
        for steps in (range(10), range(10, 15), range(15, 20)):  # the checkpoint was taken at 10
            offer(first, steps)
            assert first.flush(60)
        second = ship(service.url, start_step=10)
        offer(second, range(10, 23))
        assert second.flush(60)
        assert stored(service) == list(range(23))
        assert service.duplicates == 1, "15 to 19 were sent again under their old number"
        assert second.dropped == 0


@pytest.mark.parametrize("taken", [True, False])
def test_the_batch_on_its_way_when_the_process_was_killed_is_stored_once(ship, tmp_path, taken):
    with FakeService() as service:
        first = ship(service.url)
        offer(first, range(10))
        assert first.flush(60)
        if taken:
            offer(first, range(10, 16))
            assert first.flush(60)
        else:  # it was noted, and that was the end
            Journal(tmp_path / "journal.json", "run-1", 0).begin(2**60, 10, 15)
        second = ship(service.url, start_step=10)
        offer(second, range(10, 13))
        assert not second.flush(60), "half of a batch under its number could take the whole one's place"
        assert stored(service) == [*range(10), *(range(10, 16) if taken else [])]
        offer(second, range(13, 20))
        assert second.flush(60)
        assert sorted(stored(service)) == list(range(20))
        assert service.duplicates == taken


def test_numbers_go_on_above_the_repeated_one_whatever_the_clock_says(ship, tmp_path):
    Journal(tmp_path / "journal.json", "run-1", 0).begin(2**60, 0, 1)
    with FakeService() as service:
        shipper = ship(service.url)
        offer(shipper, range(3))
        assert shipper.flush(60)
        assert sorted(seq for _, _, seq in service.batches) == [2**60, 2**60 + 1]


def test_batches_that_the_spool_holds_are_not_doubled_when_the_service_comes_back(ship, tmp_path):
    with FakeService() as service:
        port, url = service.port, service.url
    first = ship(url)
    for steps in (range(10), range(10, 15), range(15, 20)):
        offer(first, steps)
        assert first.flush(60)
    with FakeService(port=port) as service:
        second = ship(url, start_step=10)
        offer(second, range(10, 25))
        assert second.flush(60)
        assert second.close(timeout_seconds=30)
        assert sorted(stored(service)) == list(range(25))


def test_closing_amid_a_repeated_batch_leaves_it_to_the_next_process(ship):
    with FakeService() as service:
        first = ship(service.url)
        offer(first, range(8))
        assert first.flush(60)
        second = ship(service.url)
        offer(second, range(4))
        assert second.close(timeout_seconds=30)
        assert second.dropped == 0
        third = ship(service.url)
        offer(third, range(9))
        assert third.flush(60)
        assert stored(service) == list(range(9))


def test_a_shipper_says_until_when_it_repeats_so_that_no_checkpoint_parts_a_batch(ship):
    with FakeService() as service:
        first = ship(service.url)
        offer(first, range(8))
        assert first.flush(60)
        assert not first.repeating
        second = ship(service.url)
        offer(second, range(7))
        assert not second.flush(60)
        assert second.repeating
        offer(second, range(7, 8))
        assert second.flush(60)
        assert not second.repeating


def test_a_batch_that_was_parted_on_the_way_is_repeated_by_its_parts(ship):
    def small_proxy(method, path):
        return Fault(status=413) if path.endswith("/batches") and limited.pop() else None

    limited = [False, False, True]  # the first batch is too large for somebody, its halves are not
    with FakeService(small_proxy) as service:
        first = ship(service.url)
        offer(first, range(8))
        assert first.flush(60)
        service.fault = lambda method, path: None
        second = ship(service.url)
        offer(second, range(10))
        assert second.flush(60)
        assert stored(service) == list(range(10))


def test_another_runs_journal_and_one_before_the_checkpoint_mean_nothing(tmp_path):
    path = tmp_path / "journal.json"
    assert Journal(path, "run-1", 0).repeated is None
    Journal(path, "run-1", 0).begin(7, 3, 9)
    assert Journal(path, "run-1", 9).repeated == Begun(run="run-1", seq=7, first=3, last=9)
    assert Journal(path, "run-1", 10).repeated is None
    assert Journal(path, "run-2", 0).repeated is None


def test_a_journal_that_cannot_be_written_costs_no_row_and_is_said(ship, tmp_path, caplog):
    with FakeService() as service:
        shipper = ship(service.url)
        (tmp_path / "journal.json").mkdir()
        offer(shipper, range(3))
        assert shipper.flush(60)
        assert stored(service) == [0, 1, 2]
    assert "cannot be noted" in caplog.text
