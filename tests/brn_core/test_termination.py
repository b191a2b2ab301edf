"""Signals and what they end, in processes of their own."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

_PRELUDE = """
import os, signal, sys, threading, time

# As in a terminal: tests that run in the background, or under nohup, hand down that some signals are ignored.
for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    signal.signal(number, handler)

from brn_core.termination import on_termination

def close(seconds):
    say(f"closed in {threading.current_thread().name}")
    undo()

def say(text):
    os.write(1, f"{text}\\n".encode())

def wait():
    for _ in range(500):
        time.sleep(0.02)
    say("nobody ended this process")

"""


def _run(script, *signals):
    """Runs a script, sends it the signals once it has said "ready"; gives its exit code and what else it said."""
    process = subprocess.Popen(
        [sys.executable, "-c", _PRELUDE + textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        for number in signals:
            assert process.stdout.readline() == "ready\n"
            process.send_signal(number)
        said = process.communicate(timeout=60)[0]
    return process.returncode, said.splitlines()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_nobody_handles_closes_and_then_ends_the_process_as_it_would_have(number):
    script = "undo = on_termination(close); say('ready'); wait()"
    assert _run(script, number) == (-number, ["closed in brn-signals"])


def test_a_main_thread_stuck_in_a_call_does_not_keep_the_process():
    script = """
        import ctypes
        undo = on_termination(close)
        libc = ctypes.CDLL(None)
        lock = ctypes.create_string_buffer(128)
        libc.pthread_mutex_lock(lock)
        threading.Timer(1.0, say, ["ready"]).start()  # when this thread is in the call for long
        libc.pthread_mutex_lock(lock)
    """
    assert _run(script, signal.SIGTERM) == (128 + signal.SIGTERM, ["closed in brn-signals"])


def test_a_second_signal_does_not_wait_for_what_hangs():
    script = """
        from brn_core.termination import _termination
        def close(seconds):
            while not _termination._signalled:  # two signals in one instant are one
                time.sleep(0.01)
            say("ready")
            time.sleep(30)
        on_termination(close); say("ready"); wait()
    """
    assert _run(script, signal.SIGTERM, signal.SIGTERM) == (-signal.SIGTERM, [])


def test_a_close_that_fails_or_never_reports_keeps_the_process_no_longer_than_the_deadline():
    script = """
        import brn_core.termination
        brn_core.termination.DEADLINE_SECONDS = 0.1
        def fails(seconds):
            raise RuntimeError("broken on purpose")
        on_termination(fails)
        undo = on_termination(close)
        say("ready"); wait()
    """
    assert _run(script, signal.SIGTERM) == (-signal.SIGTERM, ["closed in brn-signals"])


def test_a_process_that_is_closing_already_may_finish():
    script = """
        undo = on_termination(lambda seconds: say("asked"))
        say("ready")
        time.sleep(0.3)
        say("closed by the program")
        undo(); wait()
    """
    code, said = _run(script, signal.SIGTERM)
    assert code == -signal.SIGTERM
    assert said == ["asked", "closed by the program"]


@pytest.mark.parametrize("when", ["before", "after", "after, calling the one it replaced"])
def test_a_handler_of_the_users_stays_in_charge(when):
    script = f"""
        when = {when!r}
        asked = []
        def handler(number, frame):
            asked.append(number)
            if "calling" in when:
                replaced(number, frame)
        if when == "before":
            signal.signal(signal.SIGTERM, handler)
        undo = on_termination(close)
        if when != "before":
            replaced = signal.signal(signal.SIGTERM, handler)
        say("ready")
        while not asked:
            time.sleep(0.01)
        time.sleep(0.1)
        say("the program goes on")
        undo()
        assert signal.getsignal(signal.SIGTERM) is handler
    """
    assert _run(script, signal.SIGTERM) == (0, ["the program goes on"])


def test_ctrl_c_is_pythons_own():
    script = """
        undo = on_termination(close)
        try:
            say("ready"); wait()
        except KeyboardInterrupt:
            say("interrupted")
            undo()
    """
    assert _run(script, signal.SIGINT) == (0, ["interrupted"])


def test_undone_nothing_is_left():
    script = """
        undo = on_termination(close)
        on_termination(close)()
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
        undo(); undo()
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
        assert signal.set_wakeup_fd(-1) == -1
        assert threading.active_count() == 1
        undo = on_termination(close); say("ready"); wait()
    """
    assert _run(script, signal.SIGTERM) == (-signal.SIGTERM, ["closed in brn-signals"])


def test_ignored_signals_stay_ignored_and_another_thread_takes_none():
    script = """
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        other = threading.Thread(target=on_termination, args=[close])
        other.start(); other.join()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        on_termination(close)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        say("fine")
        os._exit(0)
    """
    assert _run(script) == (0, ["fine"])


def test_where_asyncio_has_the_wakeup_it_keeps_it():
    script = """
        import asyncio
        async def run():
            global undo
            heard = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set)
            undo = on_termination(close)
            os.kill(os.getpid(), signal.SIGUSR1)
            await heard.wait()
            say("ready")
            await asyncio.sleep(10)
        asyncio.run(run())
    """
    assert _run(script, signal.SIGTERM) == (-signal.SIGTERM, ["closed in brn-signals"])


def test_a_forked_process_ends_by_the_signal_and_its_parent_does_not_notice():
    script = """
        undo = on_termination(close)
        for _ in range(20):
            child = os.fork()
            if child == 0:
                time.sleep(30)
                os._exit(0)
            os.kill(child, signal.SIGTERM)  # at once: the child may not have come to itself yet
            assert os.waitpid(child, 0)[1] == signal.SIGTERM
        time.sleep(0.1)
        say("ready"); wait()
    """
    assert _run(script, signal.SIGTERM) == (-signal.SIGTERM, ["closed in brn-signals"])
