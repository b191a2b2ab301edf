import os

import pytest
from fake_service import FakeService, Fault

from brn_core import wire
from brn_core.packer import StepRows, tables
from brn_core.spool import Spool, main
from brn_core.wire import RunCreate, RunUpdate

RUN = RunCreate(id="run-1", name="a run")


def _body(step=0):
    return wire.encode_batch(tables([StepRows(step, scalars={"loss": float(step)})]))


def _fill(directory, run=RUN, rank=0, seqs=(3, 1, 2)):
    folder = Spool(directory).folder(run.id, rank)
    for seq in seqs:
        folder.put(run, seq, 1, _body(seq))
    return folder


def test_parcels_come_back_oldest_first_and_whole(tmp_path):
    folder = _fill(tmp_path)
    assert [p.seq for p in folder.parcels()] == [1, 2, 3]
    assert folder.parcels()[0].body() == _body(1)
    assert folder.registration() == RUN


def test_nothing_is_made_before_the_first_batch(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.folder("run-1", 0)
    assert spool.folders() == []
    assert not (tmp_path / "spool").exists()


def test_beyond_the_limit_the_oldest_go_and_their_steps_are_counted(tmp_path):
    folder = Spool(tmp_path, limit_bytes=250).folder("run-1", 0)
    assert [folder.put(RUN, seq, 10 + seq, b"x" * 100) for seq in range(4)] == [0, 0, 10, 11]
    assert [p.seq for p in folder.parcels()] == [2, 3]
    assert folder.put(RUN, 9, 5, b"x" * 251) == 12 + 13 + 5
    assert folder.parcels() == []


def test_a_half_written_file_is_not_seen(tmp_path):
    folder = _fill(tmp_path, seqs=(1,))
    (folder.path / f".{2:020d}-1.arrow.{os.getpid()}").write_bytes(b"half")
    (folder.path / "notes.txt").write_text("the user's")
    assert [p.seq for p in folder.parcels()] == [1]


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    folder = _fill(tmp_path, seqs=(1,))

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        folder.put(RUN, 2, 1, _body())
    assert sorted(p.name for p in folder.path.iterdir()) == [f"{1:020d}-1.arrow", "run.json"]


def test_a_parcel_taken_by_another_process_is_no_error(tmp_path):
    (parcel,) = _fill(tmp_path, seqs=(1,)).parcels()
    parcel.remove()
    assert parcel.body() is None
    parcel.remove()


def test_tidying_leaves_what_was_refused_and_what_waits(tmp_path):
    folder = _fill(tmp_path, seqs=(1, 2))
    first, second = folder.parcels()
    first.set_aside()
    folder.tidy()
    assert [p.seq for p in folder.parcels()] == [2]
    second.remove()
    folder.tidy()
    assert (folder.path / "refused" / first.path.name).exists()
    other = _fill(tmp_path, rank=1, seqs=(1,))
    other.parcels()[0].remove()
    other.tidy()
    assert not other.path.exists()
    assert folder.path.exists()


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_without_room_is_refused(tmp_path, limit):
    with pytest.raises(ValueError, match="limit_bytes must be >= 1"):
        Spool(tmp_path, limit_bytes=limit)


def test_the_command_sends_everything_and_says_so(tmp_path, capsys):
    _fill(tmp_path)
    _fill(tmp_path, rank=1, seqs=(7,))
    folder = _fill(tmp_path, RunCreate(id="other", name="other"), seqs=(5,))
    folder.put_end(RunCreate(id="other", name="other"), RunUpdate(status="failed"))
    with FakeService() as service:
        assert main([str(tmp_path), "--url", service.url]) == 0
        assert sorted(service.batches) == [
            ("other", 0, 5),
            ("run-1", 0, 1),
            ("run-1", 0, 2),
            ("run-1", 0, 3),
            ("run-1", 1, 7),
        ]
        assert service.statuses == {"run-1": "running", "other": "failed"}
        out = capsys.readouterr().out
        assert "run-1 rank 0: sent 3 batches (3 steps), refused 0, left 0" in out
        assert main([str(tmp_path), "--url", service.url]) == 0
    assert "nothing to send" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_the_command_keeps_what_the_service_cannot_take_and_sets_aside_what_it_refuses(tmp_path, capsys):
    folder = _fill(tmp_path, seqs=(1, 2))
    with FakeService(lambda method, path: Fault(503)) as service:
        assert main([str(tmp_path), "--url", service.url]) == 1
    captured = capsys.readouterr()
    assert "left 2" in captured.out
    assert "answered 503" in captured.err
    folder.put(RUN, 3, 1, b"not arrow")
    with FakeService() as service:
        assert main([str(tmp_path), "--url", service.url]) == 0
    captured = capsys.readouterr()
    assert "sent 2 batches (2 steps), refused 1, left 0" in captured.out
    assert "422" in captured.err
    assert [p.name for p in (folder.path / "refused").iterdir()] == [f"{3:020d}-1.arrow"]


def test_the_command_sends_the_token(tmp_path, monkeypatch):
    _fill(tmp_path)
    monkeypatch.setenv("BRN_TOKEN", "secret-1")
    with FakeService() as service:
        assert main([str(tmp_path), "--url", service.url]) == 0
        assert {headers["Authorization"] for _, _, headers in service.requests} == {"Bearer secret-1"}


def test_a_folder_without_its_registration_is_kept_and_reported(tmp_path, capsys):
    folder = _fill(tmp_path, seqs=(1,))
    (folder.path / "run.json").write_text("{")
    with FakeService() as service:
        assert main([str(tmp_path), "--url", service.url]) == 1
    assert "run.json is missing or damaged" in capsys.readouterr().err
    assert len(folder.parcels()) == 1


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["{tmp}/absent", "--url", "http://127.0.0.1:1"], "is no directory; name the recorder's spool directory"),
        (["{tmp}", "--url", "nonsense"], "url must look like http://127.0.0.1:8321, got 'nonsense'"),
        (["{tmp}", "--url", "http://127.0.0.1:1", "--token", "é"], "token must be printable ASCII"),
    ],
)
def test_bad_arguments_get_one_line(tmp_path, capsys, arguments, text):
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.count("\n") == 1
