import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from fake_service import FakeService, Fault

from brn_core import spool as module
from brn_core import wire
from brn_core.client import Client
from brn_core.drain import drain
from brn_core.packer import StepRows, tables
from brn_core.spool import Spool, main
from brn_core.wire import RunCreate, RunUpdate
from brn_core.worker.__main__ import main as train

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
    assert folder.put(RUN, 9, 5, b"x" * 251) == 5, "what can never fit costs nobody else"
    assert [p.seq for p in folder.parcels()] == [2, 3]


def test_a_half_written_file_is_not_seen(tmp_path):
    folder = _fill(tmp_path, seqs=(1,))
    (folder.path / f".{2:020d}-1.arrow.{os.getpid()}-1.partial").write_bytes(b"half")
    (folder.path / "notes.txt").write_text("the user's")
    assert [p.seq for p in folder.parcels()] == [1]


def test_a_write_that_fails_leaves_no_file(tmp_path, monkeypatch):
    folder = _fill(tmp_path, seqs=(1,))

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", full)
    with pytest.raises(OSError, match="No space left"):
        folder.put(RUN, 2, 1, _body())
    assert sorted(p.name for p in folder.path.iterdir()) == [f"{1:020d}-1.arrow", "lock", "run.json"]


def test_a_parcel_taken_by_another_process_is_no_error(tmp_path):
    (parcel,) = _fill(tmp_path, seqs=(1,)).parcels()
    parcel.remove()
    assert parcel.body() is None
    parcel.remove()


def test_tidying_leaves_what_was_refused_and_what_waits(tmp_path):
    folder = _fill(tmp_path, seqs=(1, 2))
    first, second = folder.parcels()
    folder.set_aside(first)
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


def test_a_last_word_that_comes_while_an_earlier_one_is_sent_is_sent_too(tmp_path):
    folder = Spool(tmp_path).folder("run-1", 0)
    folder.put_end(RUN, RunUpdate(dropped_by_process={0: {1: 2}}))
    words = iter([RunUpdate(status="finished", dropped_by_process={0: {5: 3}})])

    def fault(method, path):
        if method == "PATCH" and (word := next(words, None)) is not None:
            folder.put_end(RUN, word)

    with FakeService(fault) as service, Client(service.url) as client:
        service.runs["run-1"] = {}
        assert drain(client, folder).left == 0
        assert (service.statuses, service.dropped) == ({"run-1": "finished"}, {"run-1": 5})
    assert folder.end() is None


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


# --- what a disk and other processes do meanwhile -------------------------------------------------------------------


def test_a_batch_is_synced_to_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    real = os.fsync

    def fsync(descriptor):
        synced.append((os.path.realpath(f"/proc/self/fd/{descriptor}"), len(list(tmp_path.rglob("*.arrow")))))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    folder = _fill(tmp_path, seqs=(1,))
    batch, parent = synced[-2:]
    assert batch[0].endswith(".partial")
    assert batch[1] == 0
    assert parent == (str(folder.path), 1)


def test_a_spool_stays_where_it_is_when_the_working_directory_changes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spool = Spool("spool")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    spool.folder("run-1", 0).put(RUN, 1, 1, _body())
    assert [folder.run for folder in Spool(tmp_path / "spool").folders()] == ["run-1"]


def test_the_last_room_of_a_disk_is_left_to_checkpoints(tmp_path, monkeypatch):
    folder = _fill(tmp_path, seqs=(1,))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(total=10**12, free=module.RESERVE_BYTES + 99))
    with pytest.raises(OSError, match="nearly full"):
        folder.put(RUN, 2, 1, b"x" * 100)
    folder.put(RUN, 3, 1, b"x" * 99)
    assert [p.seq for p in folder.parcels()] == [1, 3]


def test_refused_batches_are_kept_up_to_a_limit_and_the_first_ones_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "REFUSED_LIMIT_BYTES", 250)
    folder = Spool(tmp_path).folder("run-1", 0)
    for seq in range(4):
        folder.put_aside(RUN, seq, 1, b"x" * 100)
    folder.put(RUN, 9, 1, b"x" * 100)
    folder.set_aside(folder.parcels()[0])
    assert folder.parcels() == []
    assert len(list((folder.path / "refused").iterdir())) == 2


def test_batches_that_others_have_sent_are_not_counted_as_dropped(tmp_path, monkeypatch):
    folder = Spool(tmp_path, limit_bytes=250).folder("run-1", 0)
    for seq in (1, 2):
        folder.put(RUN, seq, 10, b"x" * 100)
    real = module._size

    def size(path):
        found = real(path)
        path.unlink(missing_ok=True)  # the other process is quicker
        return found

    monkeypatch.setattr(module, "_size", size)
    assert folder.put(RUN, 3, 10, b"x" * 100) == 0


def test_a_spool_looks_through_its_files_when_it_reaches_its_limit_not_for_every_batch(tmp_path, monkeypatch):
    folder = Spool(tmp_path, limit_bytes=20_000).folder("run-1", 0)
    looks = []
    real = module._parcels_in
    monkeypatch.setattr(module, "_parcels_in", lambda path: looks.append(path) or real(path))
    dropped = [folder.put(RUN, seq, 1, b"x" * 100) for seq in range(400)]
    assert len(looks) <= 1 + 400 * 100 // (20_000 // 16)
    assert sum(dropped) + len(folder.parcels()) == 400


def test_a_folder_tidied_away_under_a_writer_is_made_again(tmp_path, monkeypatch):
    folder = _fill(tmp_path, seqs=())
    real, times = module._leave_reserve, []

    def tidied_by_another(path, needed):
        real(path, needed)
        if not times:
            times.append(Spool(tmp_path).folder("run-1", 0).tidy())
            assert not folder.path.exists()

    monkeypatch.setattr(module, "_leave_reserve", tidied_by_another)
    folder.put(RUN, 1, 1, _body())
    assert (folder.registration(), len(folder.parcels())) == (RUN, 1)


def test_tidying_that_meets_a_new_batch_puts_the_registration_back(tmp_path, monkeypatch):
    folder = _fill(tmp_path, seqs=(1,))
    folder.parcels()[0].remove()
    real = Path.rmdir

    def rmdir(path):
        (folder.path / f"{2:020d}-1.arrow").write_bytes(_body(2))
        real(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    Spool(tmp_path).folder("run-1", 0).tidy()
    assert (folder.registration(), [p.seq for p in folder.parcels()]) == (RUN, [2])


def test_what_a_killed_writer_left_half_written_goes_with_the_folder(tmp_path):
    folder = _fill(tmp_path, seqs=(1,))
    (folder.path / f".{2:020d}-1.arrow.1-1.partial").write_bytes(b"half")
    with FakeService() as service:
        assert main([str(tmp_path), "--url", service.url]) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_goes_on_with_a_run_says_anew_what_the_run_is(tmp_path):
    _fill(tmp_path, RunCreate(id="run-1", name="old", world_size=8), seqs=(1,))
    assert _fill(tmp_path, RUN, seqs=(2,)).registration() == RUN


def test_the_command_sends_the_others_beside_a_folder_that_is_damaged(tmp_path, capsys):
    damaged = _fill(tmp_path, RunCreate(id="a", name="a"), seqs=(1,))
    (damaged.path / "run.json").write_text("{")
    unreadable = _fill(tmp_path, RunCreate(id="b", name="b"), seqs=())
    (unreadable.path / f"{1:020d}-1.arrow").mkdir(parents=True)
    unreadable.put(RunCreate(id="b", name="b"), 2, 1, _body())
    _fill(tmp_path, seqs=(5,))
    with FakeService() as service:
        assert main([str(tmp_path), "--url", service.url]) == 1
        assert sorted(service.batches) == [("run-1", 0, 5)]
    captured = capsys.readouterr()
    assert "run-1 rank 0: sent 1 batches (1 steps), refused 0, left 0" in captured.out
    assert "b/rank-0 cannot be emptied" in captured.err


def test_brn_train_sends_what_a_spool_holds_and_trains_nothing(tmp_path, capsys):
    _fill(tmp_path / "spool")
    with FakeService() as service:
        arguments = ["--sync", str(tmp_path / "spool"), "--url", service.url]
        assert train([*arguments, "--token", "secret-1"]) == 0
        assert len(service.batches) == 3
        assert {headers["Authorization"] for _, _, headers in service.requests} == {"Bearer secret-1"}
        assert set(service.runs) == {"run-1"}
        assert train(["--sync", str(tmp_path / "absent"), "--url", service.url]) == 2
    said = capsys.readouterr()
    assert "sent 3 batches (3 steps)" in said.out
    assert "is no directory" in said.err


def test_a_folder_is_in_use_until_its_process_ends_however_it_ends(tmp_path):
    program = (
        "import sys; from brn_core.spool import Spool; from brn_core.wire import RunCreate\n"
        "Spool(sys.argv[1]).folder('run', 0).put(RunCreate(id='run', name='r'), 1, 1, b'x')\n"
        "print('written', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with process:
        assert process.stdout.readline() == b"written\n"
        (folder,) = Spool(tmp_path).folders()
        assert folder.in_use()
        assert folder.in_use(), "asking does not take it"
        process.kill()
    assert not folder.in_use()


def test_a_forked_process_does_not_keep_a_folder_in_use(tmp_path):
    folder = _fill(tmp_path, seqs=(1,))
    end, hold = os.pipe()
    if (child := os.fork()) == 0:
        os.close(hold)
        os.read(end, 1)
        os._exit(0)
    try:
        assert folder.in_use()
        folder.release()
        assert not folder.in_use()
    finally:
        os.close(hold)
        os.waitpid(child, 0)
        os.close(end)
