"""Compiling for accelerators that are not there: programs by hand, schedules by hand, lowering, and libtpu's own."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax import export

from cnnlib import ops
from cnnlib.aot import hlo, schedule
from cnnlib.aot.hardware import parse_target
from cnnlib.config.overrides import override
from cnnlib.config.resolve import resolve
from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment
from cnnlib.errors import UserError
from cnnlib.ops.primitives import compiled_for, form_in_use
from cnnlib.runs.aot import compiled, epoch_of, examples_of, flops_per_step
from cnnlib.spec.notation import parse_model
from cnnlib.train.programs import preferred_at_a_time, spread_of

LOOP = """\
HloModule jit_f, is_scheduled=true

%body (arg: (s32[], f32[4,8], f32[100,8])) -> (s32[], f32[4,8], f32[100,8]) {
  %arg = (s32[], f32[4,8]{1,0}, f32[100,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%arg), index=1
  %all = f32[100,8]{1,0} get-tuple-element(%arg), index=2
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %sliced = f32[4,8]{1,0} fusion(%all, %i, %x), kind=kLoop, calls=%slice, metadata={op_name="jit(f)/add"}
  ROOT %out = (s32[], f32[4,8]{1,0}, f32[100,8]{1,0}) tuple(%next, %sliced, %all)
}

%slice (p0: f32[100,8], p1: s32[], p2: f32[4,8]) -> f32[4,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[4,8]{1,0} parameter(2)
  %zero = s32[] constant(0)
  %rows = f32[4,8]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={4,8}
  ROOT %sum = f32[4,8]{1,0} add(%rows, %p2)
}

%condition (arg: (s32[], f32[4,8], f32[100,8])) -> pred[] {
  %arg.1 = (s32[], f32[4,8]{1,0}, f32[100,8]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%arg.1), index=0
  %last = s32[] constant(7)
  ROOT %less = pred[] compare(%j, %last), direction=LT
}

ENTRY %main (x: f32[4,8], all: f32[100,8]) -> f32[4,8] {
  %x.1 = f32[4,8]{1,0} parameter(0)
  %all.1 = f32[100,8]{1,0} parameter(1)
  %start = s32[] constant(2)
  %copied = s32[] copy(%start)
  %first = (s32[], f32[4,8]{1,0}, f32[100,8]{1,0}) tuple(%copied, %x.1, %all.1)
  %loop = (s32[], f32[4,8]{1,0}, f32[100,8]{1,0}) while(%first), condition=%condition, body=%body
  %found = f32[4,8]{1,0} get-tuple-element(%loop), index=1
  %reduced = f32[4,8]{1,0:T(8,128)S(1)} all-reduce(%found), replica_groups={}, to_apply=%slice
  ROOT %result = f32[4,8]{1,0} copy(%reduced)
}
"""


def test_operations_of_a_loop_run_as_often_as_its_constants_say():
    costs = {cost.instruction.name: cost for cost in hlo.Program(LOOP).costs()}
    assert {name: cost.times for name, cost in costs.items()} == {
        "copied": 1, "next": 5, "sliced": 5, "reduced": 1, "result": 1,
    }  # fmt: skip
    assert costs["sliced"].instruction.source == "jit(f)/add"
    assert costs["reduced"].instruction.opcode in hlo.COLLECTIVES
    # A note of the compiler comes first.
    noted = LOOP.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"9"}}')
    assert {cost.times for cost in hlo.Program(noted).costs()} == {1, 9}
    with pytest.raises(ValueError, match="trip count of the loop loop is unknown"):
        list(hlo.Program(LOOP.replace("direction=LT", "direction=NE")).costs())


def test_bytes_are_those_of_the_main_memory_and_of_a_slice_its_own():
    program = hlo.Program(LOOP)
    moved = {cost.instruction.name: hlo.moved_bytes(program, cost) for cost in program.costs()}
    rows = 4 * 8 * 4
    assert moved["sliced"] == rows + 4 + rows + rows  # the slice, the index, x, and the result
    assert moved["reduced"] == rows  # its result lies in the chip's own memory
    assert moved["result"] == rows
    assert hlo.bytes_of("(bf16[3,5]{1,0}, pred[7])") == 37


def test_a_compiled_program_is_read():
    def f(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=6)[0]

    text = jax.jit(f).lower(jnp.ones((4, 8)), jnp.ones((8, 8))).compile().as_text()
    costs = list(hlo.Program(text).costs())
    assert max(cost.times for cost in costs) == 6
    assert all(hlo.moved_bytes(hlo.Program(text), cost) >= 0 for cost in costs)


SCHEDULE = """\
// header
     0x0   :  { %s1 = sld }
     0x1   :  { %s2 = sadd }
     0x2 LB :> { %v1 = vld ; (iteration index, stage = 0) }
     0x3   :> { %v2 = vadd ; iteration index, stage = 2 }
     0x4   :> {}
     0x5   :> { %p = scmp.ge.s32.totalorder %s9, 12 /* loop exit test */ }
     0x6   :  { sfence }
"""


def test_a_schedule_has_a_cycle_per_bundle_and_loops_run_their_trips(tmp_path):
    path = tmp_path / "12-fusion.3-44-final_bundles.txt"
    path.write_text(SCHEDULE)
    # Two stages of software pipelining are trips beyond those of the loop.
    assert schedule.cycles_of(path) == 3 + 4 * (12 - 2)
    (tmp_path / "13-deduplication-map.txt").write_text("key: fusion.3\n  fusion.7\n  fusion.9\n")
    found = schedule.schedules(tmp_path)
    assert found == dict.fromkeys(("fusion.3", "fusion.7", "fusion.9"), 43)
    schedule.forget(tmp_path)
    assert schedule.schedules(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "devices", "topology"),
    [("tpu:v5e:2x4", 8, "v5e:2x4"), ("tpu:v6e", 1, "v6e:1x1"), ("tpu:v4:2x2", 4, "v4:2x2x1"), ("cuda:h100", 1, "h100")],
)
def test_hardware_has_a_name(text, devices, topology):
    target = parse_target(text)
    assert (target.devices, target.topology) == (devices, topology)
    assert target.chip.peak_flops > 1e14 and target.chip.bandwidth > 5e11


@pytest.mark.parametrize("text", ["tpu", "tpu:v9", "tpu:v5e:2x", "tpu:v5e:0x1", "cuda:h100:2", "h100", ""])
def test_unknown_hardware_is_one_line_that_lists_what_is_known(text):
    with pytest.raises(UserError, match=r"is no hardware to compile for; expected for example tpu:v4:2x4, .*cuda:h100"):
        parse_target(text)


def arms_of(name, *overrides):
    return resolve(override(EXPERIMENTS.get(name), list(overrides)))


def test_operations_of_a_step_are_counted_by_layer():
    # Dense: forward and the gradient of the weights are products of one size; no gradient goes to the input.
    (arm,) = arms_of("fc_vs_conv", "arms=mlp_75_33")
    products = 784 * 75, 75 * 33, 33 * 10
    assert flops_per_step(arm) == 2 * 100 * (3 * sum(products) - products[0])


def test_a_set_of_unknown_size_is_planned_with_a_size_of_its_own(tmp_path):
    where = f"data.data_dir={tmp_path}"  # where nothing is prepared
    target = parse_target("tpu:v5e")
    (arm,) = arms_of("mnist_one_epoch", where)
    said = compiled(arm, jax.devices(), target)
    assert re.fullmatch(r"data set mnist\S* is not prepared, so its size is unknown: say data.train=N", str(said))
    (arm,) = arms_of("mnist_one_epoch", where, "data.train=5000")
    assert examples_of(arm).x.shape[0] == 5000


@pytest.mark.parametrize("asked", ["xla", "native"])
def test_the_form_of_a_cpu_is_refused_elsewhere(asked, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert form_in_use() == "gpu"
    monkeypatch.setenv("CNNLIB_KERNELS", "tpu")
    assert form_in_use() == "tpu"
    monkeypatch.setenv("CNNLIB_KERNELS", asked)
    with pytest.raises(UserError, match=f"CNNLIB_KERNELS={asked} is for CPUs, and JAX runs on a gpu here; expected"):
        form_in_use()


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_a_form_that_is_asked_for_runs_on_any_platform(platform):
    """A lane alone runs in blocks in a TPU's form only: its kernel grows from 5x5 to 8x8."""
    x, kernel = jnp.ones((1, 8, 8, 1)), jnp.ones((5, 5, 1, 6))
    texts = {}
    for form in ("gpu", "tpu"):
        with compiled_for(form):
            function = jax.jit(lambda x, kernel: ops.conv2d(x, kernel, padding="SAME"))
            texts[form] = function.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert "8x8x1x128xf32" in texts["tpu"] and "8x8x1x128xf32" not in texts["gpu"]


KINDS = {
    "conv": "conv:6@5:nobias norm relu max:2 conv:8@3/2 tanh avg:2 residual(norm relu conv:8@3) dense:classes",
    "local": "local:3@5 relu max:3/2 full:2@3 relu dense:classes",
}


@pytest.mark.parametrize("platform", ["tpu", "cuda", "rocm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_lowers_for_every_platform(kind, platform):
    one = override(EXPERIMENTS.get("fc_vs_conv"), ["arms=lenet5", "lanes.seed=0,1", "data.train=200", "epochs=2"])
    (arm,) = resolve(replace(one, arms=(Arm("net", parse_model(KINDS[kind])),)))
    spread = spread_of(arm, jax.devices()[:1])
    form = "tpu" if platform == "tpu" else "gpu"
    lanes = preferred_at_a_time(arm.model.connectivity, arm.input_shape, len(arm.lanes), form)
    with compiled_for(form):
        epoch, arguments = epoch_of(arm, spread, lanes)
        module = export.export(epoch, platforms=[platform])(*arguments).mlir_module()
    assert "custom_call @cnnlib_" not in module  # no kernel of the CPU is left in it


TRAINED = [name for name in EXPERIMENTS if isinstance(EXPERIMENTS.get(name), Experiment)]


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_every_program_of_an_experiment_lowers_for_every_accelerator(name):
    experiment = EXPERIMENTS.get(name)
    arms = resolve(experiment)
    if not arms[0].description.counts:  # the data set is not prepared here: its size is unknown
        arms = resolve(override(experiment, ["data.train=50000"]))
    # More examples of a model change sizes only, not what is lowered.
    programs = {(arm.model, arm.start, arm.experiment.optim, arm.experiment.augment): arm for arm in arms}
    for arm in programs.values():
        epoch, arguments = epoch_of(arm, spread_of(arm, jax.devices()[:1]), 1)
        lowered = epoch.trace(*arguments).lower(lowering_platforms=("tpu", "cuda", "rocm"))
        assert "@cnnlib_" not in lowered.as_text(), arm.name  # no kernel of the CPU is left in it


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None and "CNNLIB_TESTS_NEED_LIBTPU" not in os.environ,
    reason="libtpu is not installed (extra aot)",
)
CEILINGS = {
    # A quarter above what libtpu 0.0.42.1 gave in November 2026: 33,630, 187,937 and 2,418.
    "fc_vs_conv arms=lenet5": 42_000,
    "sharing_and_locality arms=local": 234_900,
    "mnist1d arms=cnn lanes.seed=0,1,2,3,4": 3_022,
}


def shown(*arguments):
    """What `show --on ... --json` prints in a process of its own: libtpu is loaded once a process."""
    command = [sys.executable, "-m", "cnnlib", "show", *arguments, "--json"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("command", CEILINGS)
def test_a_lane_step_on_a_tpu_takes_no_more_cycles_than_it_did(command, compiling_well):
    (arm,) = shown(*command.split(), "--on", "tpu:v5e")["arms"]
    assert arm["compiles"] and arm["memory_bytes"] < 16 * 2**30
    assert 0 < arm["scheduled_cycles_per_lane_step"] <= CEILINGS[command]


@pytest.mark.slow
@needs_libtpu
@pytest.mark.parametrize("topology", ["tpu:v5e:2x2", "tpu:v6e"])
def test_lanes_on_a_topology_exchange_nothing(topology, compiling_well):
    found = shown("fc_vs_conv", "arms=mlp_75_33", "lanes.seed=0,1,2,3", "--on", topology)
    (arm,) = found["arms"]
    assert arm["compiles"] and arm["collectives"] == {}
    assert arm["devices"] == (4 if topology == "tpu:v5e:2x2" else 1)


@pytest.mark.slow
@needs_libtpu
def test_a_batch_that_devices_share_is_added_up(compiling_well):
    (arm,) = shown("fc_vs_conv", "arms=mlp_75_33", "lanes.seed=0", "mesh=1,4", "--on", "tpu:v5e:2x2")["arms"]
    assert arm["devices"] == 4 and sum(arm["collectives"].values()) > 0


LATE = """
import jax, jax.numpy as jnp
jax.devices()  # JAX looks for a TPU, and loads libtpu
from cnnlib.aot.compiling import compile_for, devices, on
from cnnlib.aot.hardware import parse_target
from cnnlib.errors import UserError
target = parse_target("tpu:v5e")
try:
    compile_for(jax.jit(jnp.sin), (on(devices(target)[0], jax.ShapeDtypeStruct((8,), jnp.float32)),), target)
except UserError as error:
    print(error)
"""


@pytest.mark.slow
@needs_libtpu
def test_a_compiler_that_was_loaded_too_early_is_one_line_and_no_estimate():
    alone = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "LIBTPU_INIT_ARGS")}
    done = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, env=alone)
    reason = "libtpu wrote no schedule, because JAX had loaded it before; set JAX_PLATFORMS=cpu before JAX starts"
    assert done.stdout == f"tpu:v5e:1x1: {reason}\n", done.stderr
