"""Programs are compiled once, fit in the memory, and are kept for the next run."""

from __future__ import annotations

import os
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from tiny_run import EXPERIMENT, Silent

from cnnlib.config.resolve import resolve
from cnnlib.config.schema import Arm, Lanes, Optim
from cnnlib.data.declaration import Data
from cnnlib.data.sets import load
from cnnlib.errors import UserError
from cnnlib.runs.runner import run
from cnnlib.spec.notation import parse_model
from cnnlib.train import programs
from cnnlib.train.feeds import Resident
from cnnlib.train.multihost import Hosts
from cnnlib.train.programs import compile_programs


@pytest.mark.slow
def test_a_second_run_finds_its_programs_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if "cache_hits" in event else None)
    monkeypatch.setattr(programs, "KEPT_FROM", 0.0)
    kept = lambda: {path.name for path in (tmp_path / "cache").rglob("jit_*") if path.suffix != ".atime"}  # noqa: E731

    def trained(**change):
        jax.clear_caches()
        hits.clear()
        experiment = replace(EXPERIMENT, epochs=1, arms=EXPERIMENT.arms[:1], **change)
        return run(experiment, "tiny", tmp_path / "out", Silent()).arms[0].lanes

    without = trained()
    assert not kept() and not hits
    first = trained(compile_cache=True)
    compiled = kept()
    assert compiled and not hits
    second = trained(compile_cache=True)
    assert len(hits) == len(compiled) and kept() == compiled
    assert without == first == second
    assert trained() == second and not hits  # the setting lasts as long as the run


def in_the_memory(experiment, monkeypatch, free):
    """The programs of an experiment's first arm with as many bytes free, beside its data."""
    description = load(experiment.data)
    arm = resolve(experiment)[0]
    monkeypatch.setattr(programs, "free_memory", lambda device: free)
    return compile_programs(arm, Resident(description, jax.devices()[:1]), jax.devices()[:1])


@pytest.mark.slow
def test_batches_in_pieces_take_a_fraction_of_the_memory(monkeypatch):
    model = parse_model("conv:4@3 relu max:2 conv:8@3 relu conv:8@3 relu max:2 conv:8@3 relu max:4 dense:classes")
    large = replace(
        EXPERIMENT,
        arms=(Arm("conv", model),),
        data=Data("lines_128x64", stream=False),
        lanes=Lanes(seed=(0,)),
        optim=Optim(),
        batch_size=16,
    )
    whole = in_the_memory(large, monkeypatch, 2**40).memory_bytes
    pieces = in_the_memory(replace(large, accumulate=8), monkeypatch, 2**40).memory_bytes
    assert pieces < whole / 3


@pytest.mark.slow
def test_as_many_lanes_run_at_a_time_as_fit_in_the_memory(monkeypatch):
    all_four = in_the_memory(EXPERIMENT, monkeypatch, 2**40)
    assert all_four.at_a_time == 4
    fewer = in_the_memory(EXPERIMENT, monkeypatch, all_four.memory_bytes - 1)
    assert fewer.at_a_time in (1, 2) and fewer.memory_bytes < all_four.memory_bytes
    assert in_the_memory(EXPERIMENT, monkeypatch, all_four.memory_bytes).at_a_time == 4
    with pytest.raises(UserError, match=r"full: 4 lanes, 4 at a time, need .* nor does one at a time: fewer"):
        in_the_memory(EXPERIMENT, monkeypatch, 1000)
    asked = replace(EXPERIMENT, lanes=Lanes(seed=(3, 4), at_a_time=4))
    with pytest.raises(UserError, match="4 lanes, 4 at a time, need"):  # what was asked for is not changed in silence
        in_the_memory(asked, monkeypatch, all_four.memory_bytes - 1)


@pytest.mark.slow
def test_hosts_have_as_many_lanes_at_a_time_as_fit_on_the_smallest(monkeypatch):
    need = in_the_memory(EXPERIMENT, monkeypatch, 2**40).memory_bytes
    fewer = in_the_memory(EXPERIMENT, monkeypatch, need - 1).at_a_time
    monkeypatch.setattr(Hosts, "lowest", lambda hosts, number: min(number, need - 1))  # another one has told this
    assert in_the_memory(EXPERIMENT, monkeypatch, 2**40).at_a_time == fewer < 4


@pytest.mark.slow
def test_the_program_that_takes_most_decides(monkeypatch):
    # With 8 images a step it is not the epoch but the evaluation, 500 images at a time, whose maps of 6,400 values
    # each take 12.8 MB, and 1 MB at most is data.
    conv = (Arm("conv", parse_model("conv:8@3 relu dense:classes")),)
    experiment = replace(EXPERIMENT, arms=conv, batch_size=8)
    need = in_the_memory(experiment, monkeypatch, 2**40).memory_bytes
    assert need > 500 * 28 * 28 * 8 * 4
    with pytest.raises(UserError, match="arm conv: 4 lanes, 1 at a time, need"):
        in_the_memory(experiment, monkeypatch, need - 1)


@pytest.mark.slow
def test_programs_that_are_damaged_are_thrown_away_and_told(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    experiment = replace(EXPERIMENT, epochs=1, arms=EXPERIMENT.arms[:1], compile_cache=True)

    def told():
        jax.clear_caches()
        watcher = Silent()
        run(experiment, "tiny", tmp_path / "out", watcher)
        return [what[1] for what in watcher.told if what[0] == "says" and "thrown away" in what[1]]

    assert told() == []
    kept = list((tmp_path / "cache").rglob("jit_*-cache"))
    for path in kept:
        path.write_bytes(path.read_bytes()[:100])
    (other,) = {path.parent / "jit_other-1-cache" for path in kept}
    other.write_text("what another process is writing")
    (text,) = told()
    assert "were damaged" in text
    assert told() == [] and told() == []  # made again, and whole
    assert other.exists()


@pytest.mark.slow
def test_programs_are_not_kept_where_nothing_can_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    watcher = Silent()
    run(replace(EXPERIMENT, epochs=1, arms=EXPERIMENT.arms[:1], compile_cache=True), "tiny", tmp_path / "out", watcher)
    assert any("cannot be written: compiled programs are not kept" in str(what) for what in watcher.told)


def test_a_user_who_turned_the_cache_of_jax_off_has_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        with programs.compile_cache(True, print):
            assert jax.config.jax_enable_compilation_cache is False and jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_enable_compilation_cache", True)
    assert not list(tmp_path.iterdir())


def test_the_compiler_counts_the_memory_that_a_program_takes():
    def work(x):  # one argument and one result of 4 MB; the square is a temporary buffer of as much
        return jnp.sort(jnp.sort(x)[::-1] ** 2)

    x = jnp.zeros(1_000_000)
    need = programs.memory_of(jax.jit(work).lower(x).compile())
    assert 8_000_000 <= need <= 24_000_000
    assert programs.memory_of(jax.jit(work, donate_argnums=0).lower(x).compile()) <= need


def test_free_memory_is_less_than_there_is():
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < programs.free_memory(jax.devices()[0]) < 0.9 * total


def test_lanes_at_a_time_follow_platform_connectivity_and_input():
    preferred = programs.preferred_at_a_time
    image, signal = (28, 28, 1), (40, 1)
    assert [preferred("conv", image, lanes, "cpu") for lanes in (1, 4, 64)] == [1, 1, 1]
    # Groups of up to eight, as equal as may be: 9 are 5 and 4, and not 8 and 1.
    assert [preferred("full", image, lanes, "cpu") for lanes in (1, 4, 8, 9, 16, 20, 64)] == [1, 4, 8, 5, 8, 7, 8]
    assert [preferred(kind, image, 64, "gpu") for kind in ("full", "conv")] == [64, 64]
    assert [preferred(kind, image, 64, "tpu") for kind in ("full", "local", "conv")] == [16, 1, 1]
    assert [preferred(kind, signal, 64, "tpu") for kind in ("full", "local", "conv")] == [16, 8, 8]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "lanes"), [(3, 3), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((9, 4), (None, 1)))]
)
def test_lanes_at_a_time_can_be_asked_for(asked, lanes, monkeypatch):
    experiment = replace(EXPERIMENT, lanes=Lanes(seed=(3, 4), at_a_time=asked), arms=EXPERIMENT.arms[1:])
    assert in_the_memory(experiment, monkeypatch, 2**40).at_a_time == lanes
