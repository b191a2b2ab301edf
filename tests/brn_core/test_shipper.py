import logging
import random
import socket
import threading
import time
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import pairwise

import httpx
import pytest
from fake_service import FakeService, Fault, eventually

from brn_core import shipper as module
from brn_core import wire
from brn_core.client import Answer, Client, _retry_after_seconds
from brn_core.complaints import Complaints
from brn_core.drain import drain, sync
from brn_core.packer import StepRows, tables
from brn_core.shipper import Shipper
from brn_core.spool import Spool
from brn_core.wire import RunCreate, RunUpdate

RUN = RunCreate(id="run-1", name="a run")


def _encode(rows):
    return wire.encode_batch(tables(rows))


def _step(step):
    return StepRows(step, scalars={"loss": float(step)})


@pytest.fixture
def ship(tmp_path):
    """Makes shippers with short delays and closes them; the spool is `tmp_path`."""
    made = []

    def make(url, *, rank=0, spool=True, **settings):
        shipper = Shipper(
            Client(url, timeout_seconds=settings.pop("timeout_seconds", 2.0)),
            settings.pop("registration", RUN),
            rank,
            settings.pop("encode", _encode),
            spool=Spool(tmp_path) if spool else None,
            sends_leftovers=rank == 0,
            flush_seconds=settings.pop("flush_seconds", 0.02),
            **settings,
        )
        made.append(shipper)
        return shipper

    yield make
    for shipper in made:
        assert shipper.close(timeout_seconds=0)
    assert not [t for t in threading.enumerate() if t.name == "brn-shipper"]


@pytest.fixture(autouse=True)
def _short_delays(monkeypatch):
    monkeypatch.setattr(module, "_FIRST_DELAY_SECONDS", 0.01)
    monkeypatch.setattr(module, "_LONGEST_DELAY_SECONDS", 0.05)


def _free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_everything_offered_arrives_once_and_in_order(ship):
    with FakeService() as service:
        shipper = ship(service.url)
        assert all(shipper.offer(_step(i)) for i in range(1000))
        eventually(lambda: service.steps() == list(range(1000)))
        assert shipper.close(end=RunUpdate(status="finished"))
        assert service.statuses == {"run-1": "finished"}
        assert service.duplicates == 0
        assert shipper.dropped == 0


def test_steps_of_one_flush_travel_together_over_one_connection(ship):
    with FakeService() as service:
        shipper = ship(service.url, flush_seconds=30)
        for i in range(20):
            shipper.offer(_step(i))
        shipper.close()
        assert len(service.batches) == 1
        assert service.connections == 1


def test_a_full_batch_does_not_wait_for_the_flush(ship):
    with FakeService() as service:
        shipper = ship(service.url, flush_seconds=3600)
        for i in range(module.MAX_STEPS):
            shipper.offer(_step(i))
        eventually(lambda: len(service.steps()) == module.MAX_STEPS)


def test_a_body_beyond_the_limit_is_parted(ship, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 1500)
    with FakeService() as service:
        shipper = ship(service.url, flush_seconds=30)
        for i in range(64):
            shipper.offer(StepRows(i, scalars={f"{random.random()}": 1.0 for _ in range(8)}))
        shipper.close()
        assert service.steps() == list(range(64))
        assert len(service.batches) > 4


def test_a_shipper_without_steps_still_registers_the_run_and_ends_it(ship):
    with FakeService() as service:
        ship(service.url).close(end=RunUpdate(status="failed"))
        assert service.statuses == {"run-1": "failed"}


def test_other_ranks_do_not_register_unless_the_service_does_not_know_the_run(ship):
    with FakeService() as service:
        shipper = ship(service.url, rank=3)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])
        assert [(method, path) for method, path, _ in service.requests] == [
            ("POST", "/v1/runs/run-1/batches"),
            ("POST", "/v1/runs"),
            ("POST", "/v1/runs/run-1/batches"),
        ]
        assert next(iter(service.batches))[1] == 3


def test_a_service_that_forgets_the_run_is_told_again(ship):
    with FakeService() as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])
        service.runs.clear()
        shipper.offer(_step(1))
        eventually(lambda: service.steps() == [0, 1])


def test_a_service_that_starts_late_gets_everything(ship, tmp_path, caplog):
    port = _free_port()
    with caplog.at_level(logging.WARNING, "brn_core"):
        shipper = ship(f"http://127.0.0.1:{port}")
        for i in range(10):
            shipper.offer(_step(i))
        eventually(lambda: list(tmp_path.rglob("*.arrow")))
        with FakeService(port=port) as service:
            shipper.offer(_step(10))
            eventually(lambda: service.steps() == list(range(11)))
            shipper.close(end=RunUpdate(status="finished"))
            assert service.statuses == {"run-1": "finished"}
    assert shipper.dropped == 0
    assert list(tmp_path.iterdir()) == []
    complaints = [r.getMessage() for r in caplog.records if "no answer" in r.getMessage()]
    assert len(complaints) == 1
    assert str(tmp_path) in complaints[0]


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500),
        Fault(503),
        Fault(507),
        Fault(408),
        Fault(429),
        Fault(401),
        Fault(403),
        Fault(302, {"Location": "/elsewhere"}),
        Fault(200, body=b"<html>welcome to the hotel network</html>"),
        Fault(200, body=b"[1, 2]"),
        Fault(200, body=b'{"ok": true}'),
        Fault(200, {"Content-Type": "application/json; charset=utf-16"}, body=b"\xff\xfe\x00"),
        Fault(hang_up=True),
    ],
    ids=lambda fault: f"{fault.status}-{fault.body[:9]!r}" if not fault.hang_up else "hang-up",
)
def test_what_may_pass_is_tried_again_until_it_does(ship, tmp_path, fault):
    broken = threading.Event()
    broken.set()
    with FakeService(lambda method, path: fault if broken.is_set() and "batches" in path else None) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: len([p for _, p, _ in service.requests if "batches" in p]) >= 3)
        assert len(list(tmp_path.rglob("*.arrow"))) == 1
        broken.clear()
        shipper.offer(_step(1))
        eventually(lambda: service.steps() == [0, 1])
        assert shipper.dropped == 0


def test_a_slow_service_gets_the_batch_again_and_takes_it_once(ship):
    slow = iter([Fault(delay_seconds=1.0, hang_up=True)])
    with FakeService(lambda method, path: next(slow, None) if "batches" in path else None) as service:
        shipper = ship(service.url, timeout_seconds=0.2)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])


def test_a_lost_acknowledgement_repeats_the_sequence_number(ship, monkeypatch):
    lost = []
    with FakeService() as service:
        real = service.answer

        def answer(method, path, query, body):
            status, content = real(method, path, query, body)
            if "batches" in path and not lost:
                lost.append(query["seq"][0])
                return 500, {"detail": "stored, but you will never know"}
            return status, content

        monkeypatch.setattr(service, "answer", answer)
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: service.duplicates == 1)
        assert len(service.batches) == 1
        assert shipper.dropped == 0


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_what_is_refused_is_counted_logged_once_and_set_aside(ship, tmp_path, caplog, status):
    with FakeService(lambda method, path: Fault(status) if "batches" in path else None) as service:
        shipper = ship(service.url)
        for i in range(3):
            shipper.offer(_step(i))
            eventually(lambda expected=i + 1: shipper.dropped == expected)
        shipper.close()
        refused = list(tmp_path.glob("run-1/rank-0/refused/*.arrow"))
        assert len(refused) == 3
        assert wire.decode_batch(sorted(refused)[0].read_bytes())["scalars"].num_rows == 1
        assert len([r for r in caplog.records if f"answered {status}: broken on purpose" in r.getMessage()]) == 1
        assert len([p for _, p, _ in service.requests if "batches" in p]) == 3


def test_an_address_that_is_no_such_service_is_waited_for(ship, tmp_path, caplog):
    with FakeService(lambda method, path: Fault(404)) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: list(tmp_path.rglob("*.arrow")))
        assert shipper.dropped == 0
        assert "/v1/runs answered 404" in caplog.text


def test_retry_after_is_honoured(ship):
    asked = []

    def fault(method, path):
        if "batches" not in path:
            return None
        asked.append(time.monotonic())
        return Fault(429, {"Retry-After": "0.6"}) if len(asked) == 1 else None

    with FakeService(fault) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])
        assert asked[1] - asked[0] >= 0.6


def test_retry_after_is_read_in_both_forms_and_bounded():
    def seconds(value):
        return _retry_after_seconds(httpx.Response(503, headers={"Retry-After": value}))

    later = datetime.now(UTC) + timedelta(seconds=100)
    assert 90 < seconds(format_datetime(later, usegmt=True)) <= 100
    assert seconds("7") == 7
    assert seconds("-5") == 0
    assert seconds("1e9") == 300
    assert [seconds(v) for v in ("soon", "", "nan")] == [None] * 3
    assert _retry_after_seconds(httpx.Response(503)) is None


def test_delays_grow_and_are_spread(ship, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_DELAY_SECONDS", 0.05)
    monkeypatch.setattr(module, "_LONGEST_DELAY_SECONDS", 10.0)
    times = []
    with FakeService(lambda method, path: times.append(time.monotonic()) or Fault(500)) as service:
        ship(service.url).offer(_step(0))
        eventually(lambda: len(times) >= 5)
    waits = [b - a for a, b in pairwise(times)]
    assert all(wait >= 0.05 * 2**i * 0.5 for i, wait in enumerate(waits[:4]))


def test_offering_never_waits_and_a_full_queue_drops_the_newest(ship, monkeypatch):
    monkeypatch.setattr(module, "CAPACITY", 5)
    with FakeService(lambda method, path: Fault(delay_seconds=0.5)) as service:
        shipper = ship(service.url)
        eventually(lambda: service.requests)  # the thread hangs in its registration
        start = time.perf_counter()
        taken = [shipper.offer(_step(i)) for i in range(10)]
        assert time.perf_counter() - start < 0.2
        assert taken == [True] * 5 + [False] * 5
        assert shipper.dropped == 5


def test_without_a_spool_what_cannot_be_sent_is_dropped_and_counted(ship):
    shipper = ship(f"http://127.0.0.1:{_free_port()}", spool=False)
    for i in range(4):
        shipper.offer(_step(i))
    eventually(lambda: shipper.dropped == 4)


def test_a_spool_that_cannot_be_written_costs_the_steps_not_the_thread(ship, tmp_path, caplog):
    (tmp_path / "run-1").write_text("a file where a folder should be")
    down = threading.Event()
    down.set()
    with FakeService(lambda method, path: Fault(503) if down.is_set() else None) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: shipper.dropped == 1)
        assert "the spool cannot be written" in caplog.text
        down.clear()
        eventually(lambda: service.runs)
        shipper.offer(_step(1))
        eventually(lambda: service.steps() == [1])


def test_an_item_that_cannot_be_encoded_is_counted_and_the_next_one_is_sent(ship):
    def encode(rows):
        if rows[0].step == 0:
            raise ValueError("broken on purpose")
        return _encode(rows)

    with FakeService() as service:
        shipper = ship(service.url, encode=encode)
        shipper.offer(_step(0))
        eventually(lambda: shipper.dropped == 1)
        shipper.offer(_step(1))
        eventually(lambda: service.steps() == [1])


def test_a_callback_that_fails_loses_nothing(ship):
    def fails(acknowledgement):
        raise KeyError("broken on purpose")

    with FakeService() as service:
        shipper = ship(service.url, on_acknowledged=fails)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])
        shipper.close()
        assert shipper.dropped == 0
        assert not list(service.batches)[1:]


def test_closing_keeps_its_deadline_with_a_dead_service_and_spools_the_rest(ship, tmp_path):
    shipper = ship(f"http://127.0.0.1:{_free_port()}", flush_seconds=30)
    for i in range(600):
        shipper.offer(_step(i))
    start = time.monotonic()
    assert shipper.close(timeout_seconds=0.5, end=RunUpdate(status="finished"))
    assert time.monotonic() - start < 3
    assert shipper.dropped == 0
    folder = Spool(tmp_path).folder("run-1", 0)
    assert sum(parcel.steps for parcel in folder.parcels()) == 600
    assert folder.end() == RunUpdate(status="finished")


def test_the_next_run_sends_what_an_earlier_one_left(ship, tmp_path):
    port = _free_port()
    first = ship(f"http://127.0.0.1:{port}", rank=0)
    first.offer(_step(0))
    first.close(timeout_seconds=0.3, end=RunUpdate(status="failed"))
    with FakeService(port=port) as service:
        second = ship(service.url, registration=RunCreate(id="run-2", name="next"))
        eventually(lambda: service.statuses.get("run-1") == "failed")
        assert service.steps() == [0]
        second.close(end=RunUpdate(status="finished"))
        assert service.statuses == {"run-1": "failed", "run-2": "finished"}
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_uses_no_sequence_number_again(ship):
    with FakeService() as service:
        for step in (0, 1):
            shipper = ship(service.url)
            shipper.offer(_step(step))
            shipper.close()
        assert service.steps() == [0, 1]
        assert service.duplicates == 0


def test_sending_draws_nothing_from_the_global_generator(ship):
    state = random.getstate()
    shipper = ship(f"http://127.0.0.1:{_free_port()}")
    shipper.offer(_step(0))
    eventually(lambda: shipper._failures >= 3)
    assert random.getstate() == state


def test_requests_are_not_logged_one_by_one(ship, caplog):
    with caplog.at_level(logging.INFO), FakeService() as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        shipper.close()
    assert not [r for r in caplog.records if r.name.startswith("httpx")]


@pytest.mark.parametrize("url", ["nonsense", "ftp://host", "http://", "127.0.0.1:8321", None, "http://a:b:c"])
def test_a_url_without_http_and_host_is_refused(url):
    with pytest.raises(ValueError, match=r"url must look like http://127\.0\.0\.1:8321, got"):
        Client(url)


def test_a_repeated_problem_is_logged_once_then_once_a_minute_with_its_count(caplog, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])
    complaints = Complaints()
    for _ in range(50):
        complaints.say("spool", "full")
    complaints.say("other", "news")
    clock[0] += 61
    complaints.say("spool", "full")
    complaints.forget("spool")
    complaints.say("spool", "full")
    assert [r.getMessage() for r in caplog.records] == ["full", "news", "full (51 times so far)", "full"]


def test_what_is_dropped_up_to_the_very_end_is_said_with_the_end(ship):
    with FakeService(lambda method, path: Fault(422) if path.endswith("/batches") else None) as service:
        shipper = ship(service.url, flush_seconds=3600)
        for step in range(3):
            shipper.offer(_step(step))
        shipper.close(end=RunUpdate(status="finished"), dropped_steps=2)  # two were lost before they came here
        assert service.dropped == {"run-1": 5}
        ship(service.url, registration=RunCreate(id="run-2", name="b")).close(end=RunUpdate(status="finished"))
        assert service.dropped == {"run-1": 5}, "a run without drops says nothing of them"


@pytest.mark.parametrize("away", [False, True])
def test_every_rank_says_what_it_dropped_and_only_rank_0_how_the_run_ended(ship, tmp_path, away):
    def fault(method, path):
        return Fault(503) if away and method == "PATCH" else Fault(422) if path.endswith("/batches") else None

    with FakeService(fault) as service:
        for rank, steps in enumerate((2, 3, 0)):
            shipper = ship(service.url, rank=rank, flush_seconds=3600)
            for step in range(steps):
                shipper.offer(_step(step))
            shipper.close(end=RunUpdate(status="finished" if rank == 0 else "failed"), dropped_steps=1 if steps else 0)
        if away:
            assert service.dropped == {}
            service.fault = lambda method, path: None
            assert sync(tmp_path, service.url, None) == 0
        assert service.dropped == {"run-1": 3 + 4}
        assert service.statuses == {"run-1": "finished"}


@pytest.mark.parametrize("back_for_the_last", [False, True])
def test_what_earlier_processes_dropped_and_could_not_say_is_said_when_the_service_is_there(
    ship, tmp_path, back_for_the_last
):
    away = True

    def fault(method, path):
        return Fault(503) if away and method == "PATCH" else None

    folder = Spool(tmp_path).folder("run-1", 0)
    with FakeService(fault) as service:
        for process in range(3):
            away = process < 2 or not back_for_the_last
            shipper = ship(service.url)
            eventually(lambda: folder.end() is None or folder.end().status is None)  # the run goes on
            shipper.close(end=RunUpdate(status="finished" if process == 2 else "failed"), dropped_steps=process + 1)
        away = False
        assert sync(tmp_path, service.url, None) == 0
        assert service.dropped == {"run-1": 1 + 2 + 3}
        assert service.statuses == {"run-1": "finished"}
        assert folder.end() is None


# --- a service that is worse than absent ---------------------------------------------------------------------------


@contextmanager
def _babbling(opening, pause_seconds=0.02):
    """A server that answers `opening`, then one byte after the other, without end. Gives its URL, and what stops it."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        connections = []

        def babble(connection):
            with suppress(OSError):
                connection.recv(65536)
                connection.sendall(opening)
                while not stopped.wait(pause_seconds):
                    connection.sendall(b"x" * (1 if pause_seconds else 65536))
            connection.close()

        def accept():
            while not stopped.is_set():
                with suppress(TimeoutError):
                    connections.append(threading.Thread(target=babble, args=[listener.accept()[0]]))
                    connections[-1].start()

        acceptor = threading.Thread(target=accept)
        acceptor.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}", stopped
        finally:
            stopped.set()
            for thread in [acceptor, *connections]:
                thread.join()


@pytest.mark.parametrize(
    ("pause_seconds", "said"), [(0.02, "the answer took more than 0.2 s"), (0, "an answer of more than 1048576 bytes")]
)
def test_an_answer_without_end_is_given_up(pause_seconds, said):
    opening = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"
    with _babbling(opening, pause_seconds) as (url, _), Client(url, timeout_seconds=0.2) as client:
        answer = client.register(RUN)
    assert answer.outcome == "unavailable"
    assert said in answer.detail


def test_closing_beside_a_request_that_hangs_spools_what_is_left(ship, tmp_path):
    with _babbling(b"HTTP/1.1 200 OK\r\nX-Endless: ") as (url, stop):
        shipper = ship(url, rank=1, timeout_seconds=0.2, flush_seconds=0.01)
        shipper.offer(_step(0))
        eventually(lambda: shipper._asked)
        for i in range(1, 300):
            shipper.offer(_step(i))
        assert not shipper.close(timeout_seconds=0.1, end=RunUpdate(), dropped_steps=2)
        folder = Spool(tmp_path).folder("run-1", 1)
        assert sum(parcel.steps for parcel in folder.parcels()) == 300
        assert folder.end() == RunUpdate(dropped_by_process={1: {shipper._process: 2}})
        stop.set()
        eventually(lambda: shipper.close(timeout_seconds=0.1))
    assert shipper.dropped == 0
    assert sum(parcel.steps for parcel in folder.parcels()) == 300
    with FakeService() as service, Client(service.url) as client:
        drain(client, folder)
        assert service.steps() == list(range(300))


def test_json_that_is_nested_without_end_is_no_answer(ship):
    nested = iter([Fault(200, body=b"[" * 100_000)])
    with FakeService(lambda method, path: next(nested, None) if "batches" in path else None) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])
        assert shipper.dropped == 0


def test_a_run_unknown_right_after_its_registration_is_tried_again(ship):
    """As by two copies of a service of which one lags."""
    lagging = iter([Fault(404), Fault(404)])
    with FakeService(lambda method, path: next(lagging, None) if "batches" in path else None) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])
        assert shipper.dropped == 0


def test_a_batch_too_large_for_a_proxy_is_sent_in_parts_from_then_on(ship, monkeypatch):
    refused = []
    with FakeService() as service:
        real = service.answer

        def answer(method, path, query, body):
            if "batches" in path and len(body) > 2000:
                refused.append(len(body))
                return 413, {"detail": "too large"}
            return real(method, path, query, body)

        monkeypatch.setattr(service, "answer", answer)
        shipper = ship(service.url, flush_seconds=30)
        for i in range(64):
            shipper.offer(StepRows(i, scalars={f"{random.random()}": 1.0 for _ in range(8)}))
        shipper.close()
        assert service.steps() == list(range(64))
        assert shipper.dropped == 0
        assert refused == sorted(set(refused), reverse=True), "what was too large once is not tried again"


def test_a_batch_the_service_fails_on_holds_up_no_other(ship, tmp_path, monkeypatch):
    with FakeService() as service:
        real = service.answer

        def answer(method, path, query, body):
            if "batches" in path and 0 in wire.decode_batch(body)["scalars"]["step"].to_pylist():
                return 500, {"detail": "this one breaks me"}
            return real(method, path, query, body)

        monkeypatch.setattr(service, "answer", answer)
        shipper = ship(service.url)
        for i in range(5):
            shipper.offer(_step(i))
            eventually(lambda: not shipper._items)
        eventually(lambda: service.steps()[-1:] == [4])
        shipper.close()
    assert sum(parcel.steps for parcel in Spool(tmp_path).folder("run-1", 0).parcels()) == 5 - len(service.steps())


# --- bounds, and who pays for what ----------------------------------------------------------------------------------


def test_a_step_that_cannot_be_encoded_costs_itself_only(ship):
    def encode(rows):
        if any(row.step == 5 for row in rows):
            raise ValueError("broken on purpose")
        return _encode(rows)

    with FakeService() as service:
        shipper = ship(service.url, encode=encode, flush_seconds=30)
        for i in range(20):
            shipper.offer(_step(i))
        shipper.close()
        assert service.steps() == [i for i in range(20) if i != 5]
        assert shipper.dropped == 1


def test_steps_that_wait_are_bounded_in_bytes_too(ship, monkeypatch):
    monkeypatch.setattr(module, "CAPACITY_BYTES", 5 * _step(0).size_bytes)
    with FakeService(lambda method, path: Fault(delay_seconds=0.5)) as service:
        shipper = ship(service.url)
        eventually(lambda: service.requests)  # the thread hangs in its registration
        assert [shipper.offer(_step(i)) for i in range(8)] == [True] * 5 + [False] * 3
        assert shipper.dropped == 3


def test_the_last_moment_is_one_more_chance_whatever_the_delay(ship, monkeypatch):
    monkeypatch.setattr(module, "_FIRST_DELAY_SECONDS", 3600.0)
    monkeypatch.setattr(module, "_LONGEST_DELAY_SECONDS", 3600.0)
    port = _free_port()
    shipper = ship(f"http://127.0.0.1:{port}")
    shipper.offer(_step(0))
    eventually(lambda: shipper._spooled)
    with FakeService(port=port) as service:
        shipper.close(end=RunUpdate(status="finished"))
        assert service.steps() == [0]
        assert service.statuses == {"run-1": "finished"}


def test_a_service_that_said_when_to_come_back_is_not_asked_before_even_at_the_end(ship, tmp_path):
    with FakeService(lambda method, path: Fault(503, {"Retry-After": "60"}) if "batches" in path else None) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: shipper._spooled)
        shipper.close(end=RunUpdate(status="finished"))
        assert len([path for _, path, _ in service.requests if "batches" in path]) == 1
    assert Spool(tmp_path).folder("run-1", 0).end() == RunUpdate(status="finished")


# --- what is in the spool already -----------------------------------------------------------------------------------


def _left(directory, run, url, body=b""):
    """A folder of one batch, as a process that still writes there has it."""
    folder = Spool(directory).folder(run, 0)
    folder.url = url
    folder.put(RunCreate(id=run, name=run), 1, 1, body)
    return folder


def test_leftovers_that_cannot_be_read_hold_up_neither_others_nor_this_run(ship, tmp_path, caplog):
    (Spool(tmp_path).folder("broken", 0).path / f"{1:020d}-1.arrow").mkdir(parents=True)  # a folder is no batch
    port = _free_port()
    (Spool(tmp_path).folder("broken", 0).path / "url").write_text(f"http://127.0.0.1:{port}")
    _left(tmp_path, "broken-too", f"http://127.0.0.1:{port}").release()
    (Spool(tmp_path).folder("broken-too", 0).path / f"{2:020d}-1.arrow").mkdir()
    first = ship(f"http://127.0.0.1:{port}", registration=RunCreate(id="good", name="good"))
    first.offer(_step(7))
    first.close(timeout_seconds=0.3)
    with FakeService(port=port) as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: set(service.steps()) == {0, 7})
        eventually(lambda: not shipper._leftovers)
    assert caplog.text.count("broken/rank-0: run.json is missing") == 1
    assert caplog.text.count("broken-too/rank-0 cannot be emptied") == 1


def test_a_spool_that_cannot_be_read_does_not_keep_steps_from_being_sent(ship, tmp_path):
    folder = Spool(tmp_path).folder("run-1", 0)
    folder.path.parent.mkdir()
    folder.path.symlink_to(folder.path)  # a loop
    with FakeService() as service:
        shipper = ship(service.url)
        shipper.offer(_step(0))
        eventually(lambda: service.steps() == [0])


def test_a_run_that_goes_on_is_not_ended_by_what_its_last_process_left(ship):
    first = ship(f"http://127.0.0.1:{_free_port()}")
    first.offer(_step(0))
    first.close(timeout_seconds=0.3, end=RunUpdate(status="failed"))
    with FakeService() as service:
        shipper = ship(service.url)
        shipper.offer(_step(1))
        eventually(lambda: service.steps() == [0, 1])
        eventually(lambda: not shipper._spooled)
        assert service.statuses == {"run-1": "running"}


def test_a_batch_sent_from_the_spool_brings_the_acknowledgement_too(ship):
    port, acknowledged = _free_port(), []
    shipper = ship(f"http://127.0.0.1:{port}", on_acknowledged=acknowledged.append)
    shipper.offer(_step(0))
    eventually(lambda: shipper._spooled)
    with FakeService(port=port) as service:
        eventually(lambda: acknowledged)
        assert acknowledged[0]["findings"] == service.findings == []


def test_a_password_in_the_services_address_is_sent_and_never_shown() -> None:
    with FakeService() as service:
        address = service.url.replace("://", "://me:hunter22@")
        with Client(address) as client:
            assert client.register(RunCreate(id="r", name="r")).outcome == "stored"
            assert client.url == service.url
        assert service.requests[0][2]["Authorization"].startswith("Basic ")
    with Client(address, timeout_seconds=0.2) as client:  # nobody listens there any more
        assert "hunter22" not in client.register(RunCreate(id="r", name="r")).detail
    for bad in ("ftp://me:hunter22@host", "http://me:hunter22@host:port"):
        with pytest.raises(ValueError, match="url must look like") as caught:
            Client(bad)
        assert "hunter22" not in str(caught.value)


def test_a_request_that_ends_while_the_closing_thread_takes_over_loses_nothing(ship, tmp_path, monkeypatch):
    ends = threading.Event()

    def send(self, *args, **settings):
        ends.wait(30)
        return Answer("unavailable", "no answer")

    monkeypatch.setattr(Client, "send", send)
    shipper = ship(f"http://127.0.0.1:{_free_port()}", rank=1, flush_seconds=0.01)
    shipper.offer(_step(0))
    eventually(lambda: shipper._asked)
    for i in range(1, 300):
        shipper.offer(_step(i))
    take = shipper._take

    def take_slowly():
        if not ends.is_set():
            ends.set()
            time.sleep(0.2)  # the sender has time to see the request's end, if it may
        return take()

    monkeypatch.setattr(shipper, "_take", take_slowly)
    shipper.close(timeout_seconds=0.1)
    shipper._thread.join(10)
    parcels = Spool(tmp_path).folder("run-1", 1).parcels()
    assert sum(parcel.steps for parcel in parcels) == 300
    assert shipper.dropped == 0


def test_a_spooled_batch_that_is_too_large_for_a_proxy_is_parted_too(ship, tmp_path, monkeypatch):
    port = _free_port()
    shipper = ship(f"http://127.0.0.1:{port}", flush_seconds=30)
    for i in range(64):
        shipper.offer(StepRows(i, scalars={f"{random.random()}": 1.0 for _ in range(8)}))
    assert shipper.flush(10)
    assert [parcel.steps for parcel in Spool(tmp_path).folder("run-1", 0).parcels()] == [64]
    service = FakeService(port=port)
    real = service.answer

    def answer(method, path, query, body):
        return (413, {}) if "batches" in path and len(body) > 2500 else real(method, path, query, body)

    monkeypatch.setattr(service, "answer", answer)
    with service:
        eventually(lambda: not shipper._spooled)
        shipper.close()
        assert service.steps() == list(range(64))
        assert len(service.rows("scalars")) == 64 * 8, "none twice"
    assert shipper.dropped == 0
    assert list(tmp_path.iterdir()) == []


def test_what_was_meant_for_another_service_stays_where_it_is_and_the_log_says_so(ship, tmp_path, caplog):
    caplog.set_level(logging.INFO, "brn_core")
    first = ship(f"http://user:word@127.0.0.1:{_free_port()}")
    first.offer(_step(0))
    first.close(timeout_seconds=0.3)
    with FakeService() as other:
        second = ship(other.url, registration=RunCreate(id="run-2", name="next"))
        eventually(lambda: not second._leftovers)
        second.close()
        assert list(other.runs) == ["run-2"]
    folder = Spool(tmp_path).folder("run-1", 0)
    assert [parcel.steps for parcel in folder.parcels()] == [1]
    assert "word" not in folder.meant_for()
    assert f"holds rows of run-1 (for {folder.meant_for()}); send them with brn-train --sync" in caplog.text


def test_a_folder_that_a_living_process_writes_to_is_left_to_it(ship, tmp_path):
    with FakeService() as service:
        live = _left(tmp_path, "live", service.url, _encode([_step(5)]))
        assert live.in_use()
        second = ship(service.url, registration=RunCreate(id="run-2", name="next"))
        eventually(lambda: second._leftovers is None)
        assert service.steps() == []
        live.release()
        ship(service.url, registration=RunCreate(id="run-3", name="next"))
        eventually(lambda: service.steps() == [5])


def test_what_is_refused_of_an_earlier_run_is_counted_in_the_log_and_not_to_this_run(ship, tmp_path, caplog):
    caplog.set_level(logging.INFO, "brn_core")
    with FakeService(lambda method, path: Fault(422) if "left" in path else None) as service:
        _left(tmp_path, "left", service.url, _encode([_step(5)])).release()
        shipper = ship(service.url)
        eventually(lambda: shipper._leftovers is None)
        assert shipper.dropped == 0
    assert "set aside in" in caplog.text
    assert "sent what run left had left in the spool: 0 steps, 1 more were refused" in caplog.text
