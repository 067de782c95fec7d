"""`cnnlib show` and `cnnlib count`: print what an experiment declares, without training it."""

from __future__ import annotations

import argparse
import inspect
import json
import textwrap
from dataclasses import replace
from typing import TYPE_CHECKING

from cnnlib.config.fields import to_dict
from cnnlib.config.overrides import assignments, override
from cnnlib.config.schema import EXPERIMENTS, Arm, Experiment, Growth
from cnnlib.errors import UserError
from cnnlib.spec.architectures import ARCHITECTURES
from cnnlib.spec.counts import BYTES
from cnnlib.spec.layers import FILTERS
from cnnlib.spec.window import Shape, shape_text

if TYPE_CHECKING:
    from cnnlib.report.growth import GrowthResults


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments that choose an experiment and override its fields."""
    parser.add_argument("name", metavar="NAME", help=f"name of an experiment: {', '.join(EXPERIMENTS)}")
    parser.add_argument(
        "overrides",
        metavar="FIELD=VALUE",
        nargs="*",
        help="override of a field, such as epochs=3; `cnnlib show NAME` prints all fields",
    )


def experiment_of(options: argparse.Namespace) -> Experiment | Growth:
    """Return the requested experiment with its overrides. Raise UserError if the name or an override is invalid."""
    return override(EXPERIMENTS.get(options.name), options.overrides)


def lab_note(name: str) -> str:
    """Return the docstring of the file that declares an experiment. The docstring's first line is the question."""
    module = inspect.getmodule(EXPERIMENTS.declaration(name))
    return inspect.cleandoc((module and module.__doc__) or "")


def add_show(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `show`."""
    add_experiment(parser)
    parser.add_argument(
        "--on", metavar="HARDWARE", help="compile for hardware that need not be here, such as tpu:v5e:2x4 or cuda:h100"
    )
    parser.add_argument("--json", action="store_true", help="print the result of --on as JSON")


def command_show(options: argparse.Namespace) -> int:
    """Print an experiment. With `--on`, print the time and memory that its programs need on other hardware."""
    experiment = experiment_of(options)
    if options.on is not None:
        print_estimates(options.name, experiment, options.on, options.json)
    elif options.json:
        raise UserError("--json has no meaning without --on")
    else:
        print_declaration(options.name, experiment)
    return 0


def print_declaration(name: str, experiment: Experiment | Growth) -> None:
    """Print the lab note, the configuration, the data and the expected cost of a run."""
    from cnnlib.config.resolve import resolve

    told = f"{name}\n\n{textwrap.indent(lab_note(name), '  ')}\n\nconfiguration, as overrides:\n\n"
    told += textwrap.indent("\n".join(assignments(experiment)), "  ")
    if isinstance(experiment, Growth):
        from cnnlib.report.growth import counted

        print(f"{told}\n")
        print_growth(counted(experiment, name))
        return
    from rich.console import Console

    from cnnlib.runs.plan import print_plan

    arms = resolve(experiment)
    print(told)
    print()
    for known in dict.fromkeys((arm.data, arm.description.name) for arm in arms):
        description = next(arm.description for arm in arms if (arm.data, arm.description.name) == known)
        available = ", ".join(f"{count:,} {split}" for split, count in description.counts.items()) or "not prepared yet"
        shape = shape_text(description.input_shape)
        print(f"data: {description.name}, {shape}, {description.num_classes} classes; {available}")
    print("\narms; counts are for one example, taps on padding counted:")
    print_plan(arms, len({arm.program for arm in arms}), Console(highlight=False))
    matches = [f"{a.name}: {a.match}\n  {a.model}" for a in arms if a.match]
    if matches:
        print("\nmatched budgets:\n\n" + textwrap.indent("\n".join(matches), "  "))


def print_estimates(name: str, experiment: Experiment | Growth, hardware: str, as_json: bool) -> None:
    """Compile one epoch of every arm for hardware that may be absent. Print the estimated time and memory."""
    from cnnlib.aot.hardware import parse_target, set_environment

    target = parse_target(hardware)
    if isinstance(experiment, Growth):
        raise UserError(f"{name} trains nothing: --on has no meaning for it")
    set_environment()
    from rich.console import Console

    from cnnlib.config.resolve import resolve
    from cnnlib.runs.aot import print_reports, reports

    console, found = Console(highlight=False), []
    for report in reports(resolve(experiment), target):
        found.append(report)
        if not as_json:
            console.print(f"{report.name} {'does not compile' if isinstance(report.found, str) else 'is compiled'}")
    if as_json:
        print(json.dumps({"topology": str(target), "arms": [report.plain() for report in found]}, indent=2))
    else:
        print_reports(found, target, console)


def add_count(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `count`."""
    parser.add_argument(
        "what", metavar="WHAT", nargs="+", help="an experiment, an architecture, or layers in short notation"
    )
    parser.add_argument(
        "--input", metavar="HxWxC", help="shape of an example (default: the shape of the experiment's data)"
    )
    parser.add_argument("--classes", metavar="N", type=int, help="number of classes, for `dense:classes` (default: 10)")
    parser.add_argument("--connectivity", choices=sorted(FILTERS), help="connectivity of the layers that have a window")
    parser.add_argument(
        "--match", metavar="MEASURE:REFERENCE", help="scale the widths to this budget, such as parameters:lenet5"
    )
    parser.add_argument(
        "--batch-size",
        metavar="N",
        type=int,
        default=128,
        help="examples per training step, for the bytes (default: 128)",
    )
    parser.add_argument(
        "--dtype",
        choices=sorted(BYTES),
        default="float32",
        help="type of the numbers, for the bytes (default: float32)",
    )
    parser.add_argument("--json", action="store_true", help="print layers and total as JSON")


def command_count(options: argparse.Namespace) -> int:
    """Print counts for an experiment's arms, an architecture, or layers in model notation. Do not import JAX."""
    from rich.console import Console

    from cnnlib.config.resolve import resolve_arms
    from cnnlib.report.counting import print_summary, summary
    from cnnlib.spec.notation import parse_model, parse_shape

    if not all(1 <= number <= 10**9 for number in (options.batch_size, options.classes or 1)) or options.classes == 0:
        raise UserError("--batch-size and --classes must be at least 1, and at most 1,000,000,000")
    what, *rest = options.what
    input_shape = None if options.input is None else parse_shape(options.input)
    num_classes = options.classes or 10
    is_experiment = what in EXPERIMENTS
    inputs: dict[str, tuple[Shape, int]] = {}
    if is_experiment:
        experiment = override(EXPERIMENTS.get(what), rest)
        arms = experiment.arms
        if isinstance(experiment, Experiment):
            from cnnlib.data.sets import describe

            for arm in arms:
                one = experiment.of_arm(arm)
                description = describe(one.data)
                shape = input_shape or one.augment.seen_shape(description.input_shape)
                inputs[arm.name] = (shape, options.classes or description.num_classes)
        else:
            num_classes = options.classes or experiment.num_classes
    elif what in ARCHITECTURES and not rest:
        arms = (Arm(what, ARCHITECTURES.get(what)),)
    else:
        try:
            arms = (Arm("layers", parse_model(" ".join(options.what))),)
        except UserError as error:
            names = ", ".join((*EXPERIMENTS, *ARCHITECTURES))
            raise UserError(f"{error}; or an experiment or architecture: {names}") from None
    if input_shape is not None:
        inputs = inputs or {arm.name: (input_shape, num_classes) for arm in arms}
    if not inputs:
        raise UserError(f"count {what} needs the shape of an example: --input HxWxC, such as --input 28x28x1")
    chosen = {"connectivity": options.connectivity, "match": options.match}
    arms = tuple(replace(arm, **{name: value for name, value in chosen.items() if value}) for arm in arms)
    told: list[dict[str, object]] = []
    for resolved in resolve_arms(arms, inputs):
        name = {"name": resolved.name} if is_experiment else {}
        match = {"match": resolved.match.plain()} if resolved.match else {}
        counted = summary(resolved.model, resolved.input_shape, options.batch_size, options.dtype)
        told.append({**name, **match, **to_dict(counted)})
        if not options.json:
            console = Console(highlight=False)
            console.print(f"{resolved.name} on {shape_text(resolved.input_shape)}: {resolved.model}", markup=False)
            if resolved.match:
                console.print(f"matched: {resolved.match}", markup=False)
            print_summary(counted, console)
            console.print()
    if options.json:
        print(json.dumps({"experiment": what, "arms": told} if is_experiment else told[0], indent=2))
    return 0


def print_growth(results: GrowthResults) -> None:
    """Print one table per count, with one row per side length of the input."""
    from rich.console import Console

    from cnnlib.report.growth import tables
    from cnnlib.system.tables import print_table

    console = Console(highlight=False)
    for title, columns, rows in tables(results):
        console.print(f"{title}:", markup=False)
        print_table(console, columns, rows, padding=2)
