from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from processes import children, is_living

from cnnlib.data import stream
from cnnlib.data.declaration import Data
from cnnlib.data.image_folder import from_arrays
from cnnlib.data.sets import load, open_splits
from cnnlib.data.sources import Arrays, SizedLines, Split
from cnnlib.data.stream import Plan, chunks, in_order, order, steps_a_chunk
from cnnlib.errors import UserError

LINES = SizedLines(side=16, count=101, seed=0, split=0)


def some(source, number, **changed):
    """The first chunks of a stream, which is closed then."""
    arguments = {"batch_size": 4, "steps": 3, "seed": 0, "reshuffle": True, "workers": 0, **changed}
    found = chunks(source, **arguments)
    try:
        return [next(found) for _ in range(number)]
    finally:
        found.close()


def same(one, other):
    assert one._replace(x=0, y=0) == other._replace(x=0, y=0)
    np.testing.assert_array_equal(one.x, other.x)
    np.testing.assert_array_equal(one.y, other.y)


# The order.


@pytest.mark.parametrize("count", [1, 2, 40, 4097])
def test_an_order_has_every_example_once_and_is_the_same_again(count):
    found = order(count, 2**32 - 1, 10**6)
    np.testing.assert_array_equal(np.sort(found), np.arange(count))
    order.cache_clear()
    np.testing.assert_array_equal(order(count, 2**32 - 1, 10**6), found)


def test_passes_and_seeds_have_orders_of_their_own():
    orders = {tuple(order(50, seed, number)) for seed in range(10) for number in range(10)}
    assert len(orders) == 100 and tuple(range(50)) not in orders


# Chunks.


def test_a_pass_is_cut_evenly_and_has_each_batch_once():
    for count, batch_size, steps in ((101, 4, 3), (100, 4, 25), (7, 7, 1), (1000, 3, 100), (64, 8, 3)):
        plan = Plan(count, batch_size, steps, 0, True)
        places = [plan.place(number) for number in range(plan.chunks_a_pass)]
        assert [(pass_number, chunk) for pass_number, chunk, _, _ in places] == [(0, k) for k in range(len(places))]
        sizes = [size for *_, size in places]
        assert sum(sizes) == count // batch_size and max(sizes) <= steps and max(sizes) - min(sizes) <= 1
        assert [first for _, _, first, _ in places] == [sum(sizes[:k]) for k in range(len(sizes))]
        seen = np.concatenate([plan.indices(number) for number in range(plan.chunks_a_pass)])
        assert len(seen) == len(set(seen.tolist())) == count // batch_size * batch_size


def test_a_chunk_has_as_many_batches_as_its_bytes_hold(monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 256 * 10)
    assert steps_a_chunk(LINES, 4) == 2  # 13 chunks of 25 batches
    assert steps_a_chunk(LINES, 100) == 1  # a batch is more than there is room for
    monkeypatch.setattr(stream, "CHUNK_BYTES", 256 * 4 * 24)
    assert steps_a_chunk(LINES, 4) == 13  # 24 would leave one for the second chunk
    x, y = np.zeros((101, 16, 4), np.float32), np.zeros(101, np.int32)
    assert steps_a_chunk(Arrays(x, y), 4) == 13  # numbers of four bytes
    monkeypatch.undo()
    assert steps_a_chunk(LINES, 4) == 25  # all of them


def test_chunks_are_the_examples_of_the_order():
    for chunk, number in zip(some(LINES, 20), range(20), strict=True):
        plan = Plan(101, 4, 3, 0, True)
        expected = LINES.read(plan.indices(number))
        np.testing.assert_array_equal(chunk.x, expected.x)
        np.testing.assert_array_equal(chunk.y, expected.y)
        assert (chunk.pass_number, chunk.number, chunk.first_step, chunk.steps) == plan.place(number)
    in_place = some(LINES, 10, reshuffle=False)
    assert [chunk.pass_number for chunk in in_place] == [0] * 9 + [1]
    np.testing.assert_array_equal(np.concatenate([chunk.x for chunk in in_place[:9]]), LINES.read(np.arange(100)).x)
    same(in_place[9], in_place[0]._replace(pass_number=1, state=in_place[9].state))


def test_chunks_are_the_same_for_any_number_of_workers(monkeypatch):
    monkeypatch.setenv("PYTHONWARNINGS", "error")
    alone = some(LINES, 21)
    for workers in (1, 4):
        before = children(os.getpid())
        for one, other in zip(alone, some(LINES, 21, workers=workers), strict=True):
            same(one, other)
        assert children(os.getpid()) == before  # closed, they have ended


def test_a_stream_goes_on_where_it_was_stopped():
    plan = Plan(101, 4, 3, 0, True)
    whole = some(LINES, 2 * plan.chunks_a_pass + 2)
    for position in range(len(whole) - 1):
        state = json.loads(json.dumps(whole[position].state))
        for one, other in zip(whole[position + 1 :][:2], some(LINES, 2, state=state), strict=False):
            same(one, other)
    state = whole[12].state
    same(some(LINES, 1, workers=2, state=state)[0], whole[13])


def test_a_stream_goes_on_with_other_chunks_only_between_passes():
    whole = some(LINES, 9)
    assert some(LINES, 1, steps=5, state=whole[8].state)[0][2:6] == (1, 0, 0, 5)
    with pytest.raises(UserError, match="stopped at chunk 5 of 9 in a pass cannot go on with passes of 5 chunks"):
        some(LINES, 1, steps=5, state=whole[4].state)


def test_too_large_a_batch_is_said():
    with pytest.raises(UserError, match="a batch of 102 is more than there is to train on: 101"):
        some(LINES, 1, batch_size=102)


@pytest.mark.parametrize("workers", [0, 2])
def test_examples_in_order_are_those_that_are_stored(workers):
    parts = list(in_order(LINES, 40, workers))
    assert [len(part.y) for part in parts] == [40, 40, 21]
    whole = LINES.read(np.arange(101))
    np.testing.assert_array_equal(np.concatenate([part.x for part in parts]), whole.x)
    np.testing.assert_array_equal(np.concatenate([part.y for part in parts]), whole.y)
    assert list(in_order(Arrays(whole.x[:0], whole.y[:0]), 40)) == []


def test_reading_goes_on_ahead_and_stays_near():
    class Told(SizedLines):
        asked: list[int] = []  # noqa: RUF012

        def read(self, indices):
            self.asked.append(len(indices))
            return super().read(indices)

    found = chunks(Told(side=16, count=101, seed=0, split=0), batch_size=1, steps=2, seed=0, reshuffle=True, workers=0)
    next(found)
    deadline = time.monotonic() + 10
    while len(Told.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(Told.asked) == 1 + stream.THREADS + 1
    found.close()


# Processes.


def test_what_is_in_memory_needs_no_processes():
    whole = LINES.read(np.arange(101))
    before = children(os.getpid())
    found = chunks(Arrays(*whole), batch_size=4, steps=3, seed=0, reshuffle=True, workers=3)
    same(next(found), some(LINES, 1)[0])
    assert children(os.getpid()) == before
    found.close()


def test_a_worker_that_dies_is_said_in_one_line():
    before = set(children(os.getpid()))
    found = chunks(LINES, batch_size=4, steps=3, seed=0, reshuffle=True, workers=2)
    next(found)
    for child in set(children(os.getpid())) - before:
        os.kill(child, signal.SIGKILL)
    with pytest.raises(UserError) as error:
        for _ in range(20):
            next(found)
    assert str(error.value) == "a process that reads examples has died (exit status -9)"
    assert set(children(os.getpid())) == before


class Broken(SizedLines):
    """Cannot be read, for a reason that does not survive pickling."""

    def read(self, indices):
        class Own(Exception):
            pass

        raise Own("a bug")


class Missing(SizedLines):
    """Cannot be read, for a reason that the user can change."""

    def read(self, indices):
        raise UserError("the disk is gone")


class Printing(SizedLines):
    """Says what it does, as some libraries do."""

    def read(self, indices):
        print("reading", flush=True)  # noqa: T201
        return super().read(indices)


@pytest.fixture
def known_to_workers(monkeypatch):
    """Lets workers import what is defined here."""
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(here), str(here.parent), os.environ.get("PYTHONPATH", ""))))


@pytest.mark.slow
def test_what_is_printed_while_reading_does_not_get_among_the_examples(known_to_workers):
    same(some(Printing(16, 101, 0, 0), 1, workers=1)[0], some(LINES, 1)[0])


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_what_goes_wrong_while_reading_is_raised_where_chunks_are_taken(workers, known_to_workers):
    with pytest.raises(UserError) as error:
        some(Missing(16, 101, 0, 0), 1, workers=workers)
    assert str(error.value) == "the disk is gone"
    with pytest.raises(Exception, match="a bug") as other:
        some(Broken(16, 101, 0, 0), 1, workers=workers)
    assert not isinstance(other.value, UserError)


def test_grain_is_an_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(UserError) as error:
        chunks(LINES, batch_size=4, steps=3, seed=0, reshuffle=True, workers=0)
    assert "pip install -e '.[stream]'" in str(error.value) and "\n" not in str(error.value)


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # which who runs in the background inherits as ignored
sys.modules["jax"] = None  # grain would import it, for seconds
from cnnlib.data.sources import SizedLines
from cnnlib.data.stream import chunks
found = chunks(SizedLines(16, 101, 0, 0), batch_size=4, steps=3, seed=0, reshuffle=True, workers=2)
print(next(found).y.sum(), flush=True)
time.sleep(float(sys.argv[1]))
"""


def start(script, seconds, *paths):
    """A process that runs a script, which finds modules in the folders first."""
    own = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*paths, Path.cwd(), *own)))}
    # As a command in a shell has it, so that an interrupt from the keyboard can be sent.
    pipes = {"process_group": 0, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, str(script), seconds], env=environment, text=True, **pipes)


def test_a_script_needs_no_guard_and_workers_do_not_import_jax(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "jax.py").write_text("raise RuntimeError('imported')")
    main = start(tmp_path / "script.py", "0", tmp_path)
    printed, said = main.communicate(timeout=60)
    assert (main.returncode, said) == (0, "")
    assert printed.strip() == str(some(LINES, 1)[0].y.sum())


def test_workers_end_with_the_process_that_reads(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    ends = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
    for main, how in [(start(tmp_path / "script.py", "60"), how) for how in ends]:
        assert main.stdout.readline()
        workers = children(main.pid)
        assert len(workers) == 2
        os.killpg(main.pid, how)
        said = main.communicate(timeout=30)[1]  # ends when nobody has the pipes any more
        deadline = time.monotonic() + 30
        while any(map(is_living, workers)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert said.count("Traceback") == (how == signal.SIGINT)


# Data sets.


@pytest.fixture
def prepared(tmp_path, monkeypatch):
    """Data of a prepared set of 50 + 20 random images, of which 10 are for validation, and its arrays."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    generator = np.random.RandomState(0)
    splits = [
        Split(generator.randint(0, 256, (count, 9, 7, 3)).astype(np.uint8), np.arange(count, dtype=np.int32) % 5)
        for count in (50, 20)
    ]
    from_arrays("noise", tmp_path / "tfds", *splits, list("abcde"))
    return Data("noise", data_dir=str(tmp_path / "tfds"), validation=10)


def test_a_prepared_set_is_streamed_as_it_is_loaded(prepared, capfd):
    opened, loaded = open_splits(prepared), load(prepared)
    # Each image once a pass, with its class.
    by_image = {x.tobytes(): int(y) for x, y in zip(*loaded.train, strict=True)}
    for chunk in some(opened.train, 3, workers=1):
        for x, y in zip(chunk.x, chunk.y, strict=True):
            assert by_image.pop(x.tobytes()) == y
    assert capfd.readouterr() == ("", "")  # of workers, too
    for name in ("train", "validation", "test"):
        x, y = zip(*in_order(getattr(opened, name), 8), strict=True)
        np.testing.assert_array_equal(np.concatenate(x), getattr(loaded, name).x)
        np.testing.assert_array_equal(np.concatenate(y), getattr(loaded, name).y)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_records_are_said_in_one_line(prepared, workers):
    opened = open_splits(prepared)
    (records,) = Path(prepared.data_dir).rglob("*test.array_record*")
    records.write_bytes(records.read_bytes()[:50])
    with pytest.raises(UserError, match="noise cannot be read") as error:
        list(in_order(opened.test, 5, workers))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_set_of_20_gb_needs_less_than_2_gb():
    workers = 4
    script = textwrap.dedent(
        f"""
        import resource, subprocess
        from pathlib import Path
        from cnnlib.data.declaration import Data
        from cnnlib.data.sets import open_splits, size_in_bytes
        from cnnlib.data.stream import chunks, steps_a_chunk

        data = Data("lines_256x300000", validation=10000)
        assert size_in_bytes(data) > 20e9
        train = open_splits(data).train
        found = chunks(
            train, batch_size=128, steps=steps_a_chunk(train, 128), seed=0, reshuffle=True, workers={workers}
        )
        seen = 0
        while seen < 2 * 2**30:
            seen += next(found).x.nbytes
        pids = Path("/proc/self/task").glob("*/children")
        workers = [int(pid) for place in pids for pid in place.read_text().split()]
        peaks = [
            int(line.split()[1]) // 1024
            for pid in ("self", *workers)
            for line in Path(f"/proc/{{pid}}/status").read_text().splitlines()
            if line.startswith("VmHWM")
        ]
        assert len(peaks) == 1 + {workers}
        print(*peaks)
        """
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    assert sum(map(int, done.stdout.split())) < 2048, done.stdout
