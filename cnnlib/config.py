"""What an experiment is made of: frozen dataclasses, and overrides of their fields by `field=value`.

Static or traced is decided in the type. A plain field belongs to the arm's program: changing it compiles another
program. A field of type `Traced` is a tuple of numbers that enter the program as arguments: each combination of them
with each seed is one lane.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from cnnlib.budget import MEASURES
from cnnlib.errors import UserError
from cnnlib.fields import path_and_text, replace_field, require, value_text
from cnnlib.registry import Registry
from cnnlib.spec import LARGEST, Connectivity, Model, Shape, shape_text

Traced = tuple[float, ...]
T = TypeVar("T")


@dataclass(frozen=True)
class Data:
    """Which images, and which of the training images are kept aside for validation."""

    name: str = "mnist5k"
    data_dir: str | None = None
    """Folder of prepared TFDS data sets; None: `TFDS_DATA_DIR`, else TFDS's own default."""
    validation: int = 0
    """Training examples set aside, in equal shares of the classes; every choice is made on them."""
    train: int | None = None
    """How many of the other training examples each lane trains on, drawn by its order seed; None: all of them."""
    shuffle_pixels: int | None = None
    """Seed of one fixed permutation of the places of every example, all channels alike; None: each stays in place."""
    seed: int | None = None
    """Seed of a generated data set; None: the one that the data set is known by."""
    stream: bool | None = None
    """Read the examples while training goes on, a chunk at a time, instead of keeping all of them on the device: all
    lanes see the same chunks, each in its own order. None: where they would take too much of the memory."""
    workers: int = 0
    """Processes that read ahead for a stream, with the same outcome for any number; 0: threads of this process."""

    def __post_init__(self) -> None:
        require(self.train is None or self.train >= 1, f"data.train must be at least 1, not {self.train}")
        within = self.shuffle_pixels is None or 0 <= self.shuffle_pixels < 2**32
        require(within, f"data.shuffle_pixels must be in 0..2**32-1, not {self.shuffle_pixels}")
        require(self.validation >= 0, f"data.validation must not be negative, not {self.validation}")
        require(0 <= self.workers <= 256, f"data.workers must be in 0..256, not {self.workers}")
        require(self.seed is None or 0 <= self.seed < 2**32, f"data.seed must be in 0..2**32-1, not {self.seed}")


@dataclass(frozen=True)
class Augment:
    """Random changes of training examples, drawn anew at every step, inside the compiled program."""

    shift: int = 0
    """Largest shift along each spatial axis, in pixels either way; what moves in is zero."""
    crop: int | None = None
    """Side of a random window that the net sees; evaluation takes the central one. None: the whole example."""
    flip: bool = False
    """Mirror half of the examples along the last spatial axis (left and right of an image)."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, f"augment.shift must not be negative, not {self.shift}")
        require(self.crop is None or self.crop >= 1, f"augment.crop must be at least 1, not {self.crop}")

    def seen_shape(self, input_shape: Shape) -> Shape:
        """The shape of an example as the net sees it; raises UserError for a crop or shift larger than the example."""
        *spatial, channels = input_shape
        if self.crop is not None:
            fits = self.crop <= min(spatial)
            require(fits, f"augment.crop={self.crop} is larger than the examples, {shape_text(input_shape)}")
            spatial = [self.crop] * len(spatial)
        moves_within = self.shift < min(spatial)
        require(moves_within, f"augment.shift={self.shift} can move all of {shape_text(input_shape)} out of sight")
        return (*spatial, channels)


@dataclass(frozen=True)
class Optim:
    """The training rule. Fields that are tuples are traced: several values make several lanes."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """Course of the learning rate over all steps of the run, relative to `learning_rate`, its peak."""
    learning_rate: Traced = (0.1,)
    momentum: Traced = (0.9,)
    """Decay of the running mean of gradients: SGD's momentum, Adam's beta 1."""
    weight_decay: Traced = (0.0,)
    """Times the parameter: added to the gradient (sgd, adam), or to the update before the learning rate (adamw)."""
    label_smoothing: Traced = (0.0,)
    """Share of the target spread evenly over the classes, in the training loss only."""
    l1: Traced = (0.0,)
    """Lambda of beta-LASSO (Neyshabur 2020): times the sign of a kernel's weight, added to its gradient. Biases and
    norms are left alone."""
    l1_threshold: Traced = (0.0,)
    """Its beta: after each step a kernel's weights of less than this times `l1` are set to zero."""

    def __post_init__(self) -> None:
        bounds = {"learning_rate": 1e9, "momentum": 1.0, "weight_decay": 1e9, "label_smoothing": 1.0}
        bounds |= {"l1": 1e9, "l1_threshold": 1e9}
        for name, upper in bounds.items():
            values = getattr(self, name)
            require(isinstance(values, tuple), f"optim.{name} must be a tuple, one value a lane, not {values!r}")
            require(len(values) > 0, f"optim.{name} needs at least one value")
            require(len(set(values)) == len(values), f"optim.{name} repeats a value: {value_text(values)}")
            for value in values:
                require(0.0 <= value < upper, f"optim.{name} must be in [0, {upper:g}), not {value:g}")


@dataclass(frozen=True)
class Lanes:
    """The population of each arm."""

    seed: tuple[int, ...] = (0, 1, 2, 3, 4)
    """One lane a seed (initial weights, order of the data, augmentation) for every combination of traced numbers."""
    order_seed: tuple[int, ...] | None = None
    """Seeds of what is drawn from the data (order, subset, augmentation), each with each of `seed`, which is left with
    the initial weights. None: a lane's seed is both."""
    combine: Literal["product", "zip"] = "product"
    """How traced fields with several values make lanes: each value with each of the others, or the first of all fields,
    the second, and so on."""
    at_a_time: int | None = None
    """Lanes that a device vectorises together; 1: one after another. None: as many as are fast on it and fit in its
    memory, which are one where a CPU convolves, up to eight of a full net there, and all on an accelerator."""

    def __post_init__(self) -> None:
        require(len(self.seed) > 0, "lanes.seed is empty: an arm needs at least one lane")
        require(len(set(self.seed)) == len(self.seed), f"lanes.seed repeats a seed: {value_text(self.seed)}")
        require(all(0 <= s < 2**32 for s in self.seed), "lanes.seed must lie in 0..2**32-1")
        if self.order_seed is not None:
            orders = self.order_seed
            require(len(orders) > 0, "lanes.order_seed is empty: an arm needs at least one lane; none: as the seed")
            require(len(set(orders)) == len(orders), f"lanes.order_seed repeats a seed: {value_text(orders)}")
            require(all(0 <= s < 2**32 for s in orders), "lanes.order_seed must lie in 0..2**32-1")
        require(self.at_a_time is None or self.at_a_time >= 1, "lanes.at_a_time must be at least 1")


@dataclass(frozen=True)
class Checkpoint:
    """What is kept of a run while it goes, for `--resume` to go on from."""

    every: int = 1
    """Epochs from one checkpoint of an arm to the next; the last epoch always has one. 0: none at all, and an arm that
    is interrupted starts anew."""
    share: float = 0.01
    """Share of the processor's time that writing may take: an epoch that ends too soon after the last checkpoint for
    that, as epochs of less than a second do, has none. 1: every one is written, and training waits for it."""
    keep: int = 2
    """Latest checkpoints that are kept of each arm; the one of highest mean validation accuracy is kept as well."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every must not be negative, not {self.every}")
        require(0.0 < self.share <= 1.0, f"checkpoint.share must be in (0, 1], not {self.share:g}")
        require(self.keep >= 1, f"checkpoint.keep must be at least 1, not {self.keep}")


@dataclass(frozen=True)
class Wandb:
    """How a run is copied to Weights & Biases, where `--wandb` says that it is."""

    per: Literal["lane", "group"] = "lane"
    """A W&B run per lane beside that of the group, or the group's alone, with means and standard deviations."""
    entity: str | None = None
    """The user or team that has the project; None is the user's default one."""
    project: str = "cnnlib"
    tags: tuple[str, ...] = ()
    """Beside the names of the data and the platform."""
    notes: str = ""

    def __post_init__(self) -> None:
        require(all(1 <= len(tag) <= 64 for tag in self.tags), "wandb.tags have 1 to 64 characters each")
        require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}", self.project) is not None,
            f"wandb.project is made of letters, digits, '_', '-' and '.', 128 at most, not {self.project!r}",
        )


OWN_FIELDS = (
    "data",
    "augment",
    "optim",
    "lanes",
    "epochs",
    "passes",
    "batch_size",
    "reshuffle",
    "accumulate",
    "remat",
    "compute_dtype",
    "precision",
)
"""Fields of an experiment that each of its arms may have of its own."""


@dataclass(frozen=True)
class Arm:
    """One architecture with its static settings: one compiled program."""

    name: str
    model: Model
    connectivity: Connectivity | None = None
    """How layers with a window are read: the model's `full`, `local` or `conv` reading. None: as it has them."""
    match: str | None = None
    """A budget that the widths are scaled to, MEASURE:REFERENCE. The reference is a number, `parameters:61706`, or what
    has that many: another arm, an architecture, `macs:lenet5`, or layers in short notation. None: as they are."""
    start: Connectivity | None = None
    """The reading that draws the initial weights, such as `conv` for a full net that starts as the convolution that the
    same seed draws. None: the arm's own."""
    own: tuple[str, ...] = ()
    """Fields of the experiment that are others for this arm, as overrides: `augment.shift=2`, `data.train=500`. On the
    command line `arms.NAME.augment.shift=2`."""

    def __post_init__(self) -> None:
        for assignment in self.own:
            path = assignment.partition("=")[0]
            require(
                path.split(".")[0] in OWN_FIELDS,
                f"arm {self.name}: no field {path!r} that an arm has of its own; there are: {', '.join(OWN_FIELDS)}",
            )
        require(
            re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", self.name) is not None,
            f"an arm's name is made of letters, digits, '_' and '-', 100 at most, not {self.name!r}",
        )
        if self.match is not None:
            measure, colon, reference = self.match.partition(":")
            require(
                measure in MEASURES and bool(colon) and bool(reference.strip()),
                f"arm {self.name}: match={self.match} is no MEASURE:REFERENCE, such as parameters:lenet5; "
                f"measures are: {', '.join(MEASURES)}",
            )

    @property
    def reading(self) -> Model:
        """The model in the connectivity that is asked for, before its widths are matched."""
        return self.model if self.connectivity is None else self.model.with_connectivity(self.connectivity)


@dataclass(frozen=True)
class Experiment:
    """A question as data: what is trained, on what, how long."""

    arms: tuple[Arm, ...]
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    lanes: Lanes = Lanes()
    epochs: int = 10
    passes: int = 1
    """Times that an epoch goes through the examples: more than one where they are few, so that epochs are not."""
    batch_size: int = 128
    """Examples a step; a pass drops the last, incomplete batch of its order."""
    reshuffle: bool = True
    """Draw the order of the examples anew for each pass; false: the order in which they are stored, each time."""
    accumulate: int = 1
    """Equal pieces that each batch is cut into, looked at one after another, with their gradients added up: as large a
    batch in a fraction of the memory. Not with norms, whose statistics are those of a whole batch."""
    remat: bool = False
    """Keep, from forward to backward, only the maps after each pooling and residual, and compute the others again:
    deeper nets and larger images in the same memory, for up to a third more time."""
    devices: int | None = None
    """Devices that lanes are spread over, of each host. None: all that JAX has; of a CPU each core is one."""
    mesh: tuple[int, ...] | None = None
    """LANES,SHARDS: groups of devices that lanes are spread over, and devices in a group, which share each batch. None:
    as many groups as share the lanes, and of the devices left as many a group as divide the batch; on a CPU one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products; parameters, optimiser state and losses stay float32."""
    precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 products. `default` is one pass of bfloat16 on a TPU and TF32 on a GPU, `high` three passes
    of bfloat16 on a TPU, `highest` float32. On a CPU all three are float32."""
    comparisons: tuple[str, ...] = ()
    """Pairs of arms, FIRST:SECOND, whose difference is the question: the fewer, the narrower their intervals can be.
    None: each with each of few arms, each with the first of many."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, where the next run of the same program finds them."""
    checkpoint: Checkpoint = Checkpoint()
    wandb: Wandb = Wandb()

    def __post_init__(self) -> None:
        _check_arms(self.arms)
        names = [arm.name for arm in self.arms]
        for pair in self.comparisons:
            first, _, second = pair.partition(":")
            known = first in names and second in names and first != second
            require(known, f"comparisons: {pair} is no pair FIRST:SECOND of arms; there are: {', '.join(names)}")
        require(self.epochs >= 1, f"epochs must be at least 1, not {self.epochs}")
        require(1 <= self.passes <= 10**6, f"passes must be in 1..1,000,000, not {self.passes}")
        require(self.devices is None or self.devices >= 1, f"devices must be at least 1, not {self.devices}")
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")
        require(
            self.accumulate >= 1 and self.batch_size % self.accumulate == 0,
            f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}",
        )
        if self.mesh is not None:
            is_pair = len(self.mesh) == 2 and min(self.mesh) >= 1
            require(is_pair, f"mesh must be two numbers of at least 1, LANES,SHARDS, not {value_text(self.mesh)}")
            pieces = self.mesh[1] * self.accumulate
            require(
                self.batch_size % pieces == 0,
                f"batch_size={self.batch_size} cannot be shared by {self.mesh[1]} devices of mesh="
                f"{value_text(self.mesh)}" + (f" in {self.accumulate} pieces" if self.accumulate > 1 else ""),
            )
        if self.lanes.combine == "zip":
            lengths = {len(values) for values in traced(self.optim) if len(values) > 1}
            require(
                len(lengths) <= 1,
                "lanes.combine=zip needs fields of one value or of equally many, not of "
                f"{' and '.join(map(str, sorted(lengths)))}",
            )
        for arm in self.arms:
            if arm.own:
                self.of_arm(arm)

    def of_arm(self, arm: Arm) -> Experiment:
        """The experiment that an arm runs: with its own fields in place; raises UserError where they do not fit."""
        one = dataclasses.replace(self, arms=(dataclasses.replace(arm, own=()),), comparisons=())
        try:
            for path, text in map(path_and_text, arm.own):
                one = replace_field(one, path.split("."), text, path)
            return one
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None


@dataclass(frozen=True)
class Growth:
    """A question about counts as the input grows: nothing is trained."""

    arms: tuple[Arm, ...]
    sides: tuple[int, ...]
    """Sides of the square input, in nodes."""
    channels: int = 3
    num_classes: int = 10
    """For arms that end in as many units as there are classes."""

    def __post_init__(self) -> None:
        _check_arms(self.arms)
        started = [arm.name for arm in self.arms if arm.start is not None]
        require(not started, f"arm {', '.join(started)}: start has no meaning where nothing is trained")
        owning = [arm.name for arm in self.arms if arm.own]
        require(not owning, f"arm {', '.join(owning)}: fields of its own have no meaning where nothing is trained")
        require(len(self.sides) > 0, "sides is empty: there is nothing to count on")
        require(list(self.sides) == sorted(set(self.sides)), f"sides must grow, not {value_text(self.sides)}")
        require(self.sides[0] >= 1 and self.sides[-1] <= LARGEST, f"sides must lie in 1..{LARGEST:,}")
        require(1 <= self.channels <= LARGEST, f"channels must lie in 1..{LARGEST:,}, not {self.channels}")
        require(1 <= self.num_classes <= LARGEST, f"num_classes must lie in 1..{LARGEST:,}")


def kept_like(experiment: Experiment, other: Experiment) -> Experiment:
    """The experiment, kept, followed and compared as `other` is: nothing of that is in a run's numbers.

    Its own comparisons stay, where it has any or lacks arms of those of `other`.
    """
    names = {arm.name for arm in experiment.arms}
    is_comparable = all(set(pair.split(":")) <= names for pair in other.comparisons)
    return dataclasses.replace(
        experiment,
        comparisons=other.comparisons if is_comparable and not experiment.comparisons else experiment.comparisons,
        compile_cache=other.compile_cache,
        checkpoint=other.checkpoint,
        wandb=other.wandb,
    )


def _check_arms(arms: tuple[Arm, ...]) -> None:
    require(len(arms) > 0, "an experiment needs at least one arm")
    names = [arm.name for arm in arms]
    require(len(set(names)) == len(names), f"two arms share a name: {', '.join(names)}")


EXPERIMENTS: Registry[Experiment | Growth] = Registry("experiment")


class LaneNumbers(NamedTuple):
    """The traced numbers of one lane, or of all lanes of an arm as arrays."""

    seed: int
    order_seed: int
    learning_rate: float
    momentum: float
    weight_decay: float
    label_smoothing: float
    l1: float
    l1_threshold: float

    @property
    def setting(self) -> tuple[float, ...]:
        """The numbers without the seeds: lanes of one setting differ by chance only."""
        return self[2:]


SETTING_FIELDS = LaneNumbers._fields[2:]
"""Of a lane, without its seeds."""


def traced(optim: Optim) -> tuple[Traced, ...]:
    """The values of each traced field, in the order of `SETTING_FIELDS`."""
    numbers = (optim.learning_rate, optim.momentum, optim.weight_decay, optim.label_smoothing)
    return (*numbers, optim.l1, optim.l1_threshold)


def lane_numbers(experiment: Experiment) -> tuple[LaneNumbers, ...]:
    """Every lane of an arm: the traced fields, combined as `lanes.combine` says, times the seeds, which run fastest.

    For the experiment of one arm: `experiment.of_arm(arm)`, where arms have fields of their own.
    """
    lanes, fields = experiment.lanes, traced(experiment.optim)
    if lanes.combine == "zip":
        longest = max(map(len, fields))
        settings = list(zip(*(values * longest if len(values) == 1 else values for values in fields), strict=True))
    else:
        settings = list(itertools.product(*fields))
    seeds = [(seed, order) for seed in lanes.seed for order in (lanes.order_seed or (seed,))]
    return tuple(LaneNumbers(*pair, *setting) for setting in settings for pair in seeds)


ARM_FIELDS = [field.name for field in dataclasses.fields(Arm) if field.name not in ("name", "own")]
"""What an override may change of an arm. Its name is its identity, and its own fields are set one by one."""


# Overrides: one `path=value` each, read by the type of the field that the path names.


def override(experiment: T, assignments: Iterable[str]) -> T:
    """The experiment with fields replaced: `epochs=3`, `optim.learning_rate=0.1,0.3`, `lanes.seed=0..9`.

    `arms=NAME,NAME` keeps those arms; `arms.NAME.model=MODEL` gives an arm another architecture, registered or in short
    notation, `arms.NAME.connectivity=local` another reading. Raises UserError, with what exists, for an unknown path, a
    wrong type or a value out of range.
    """
    for is_of_arm, group in itertools.groupby(assignments, lambda assignment: assignment.startswith("arms.")):
        if is_of_arm and isinstance(experiment, Experiment | Growth):
            # Fields of arms one after another, and only then the experiment, which looks at all of its arms.
            arms = experiment.arms
            for path, text in map(path_and_text, group):
                arms = _replaced_arms(arms, path.split(".")[1:], text, path)
            experiment = dataclasses.replace(experiment, arms=arms)
            continue
        for path, text in map(path_and_text, group):
            experiment = _replaced(experiment, path.split("."), text, path)
    return experiment


def _replaced(experiment: T, keys: list[str], text: str, path: str) -> T:
    if keys[0] != "arms" or not isinstance(experiment, Experiment | Growth):
        return replace_field(experiment, keys, text, path)
    arms = _replaced_arms(experiment.arms, keys[1:], text, path)
    if isinstance(experiment, Experiment):
        return _with_arms(experiment, arms)  # type: ignore[return-value]  # T is Experiment here, mypy does not see it
    return dataclasses.replace(experiment, arms=arms)


def _replaced_arms(arms: tuple[Arm, ...], keys: list[str], text: str, path: str) -> tuple[Arm, ...]:
    by_name = {arm.name: arm for arm in arms}
    wanted = text.split(",") if not keys else [keys[0]]
    for name in wanted:
        if name not in by_name:
            raise UserError(f"{path}: no arm {name!r}; there are: {', '.join(by_name)}")
    if not keys:
        return tuple(_without_arms(by_name[name], by_name, wanted) for name in wanted)
    if len(keys) == 1:
        fields = [f"{path}.{name}" for name in ARM_FIELDS]
        raise UserError(f"{path!r} is an arm; set one of: {', '.join((*fields, *OWN_FIELDS))}")
    if keys[1] in OWN_FIELDS:
        field = ".".join(keys[1:])
        return tuple(
            dataclasses.replace(
                arm, own=(*(one for one in arm.own if one.partition("=")[0] != field), f"{field}={text}")
            )
            if arm.name == keys[0]
            else arm
            for arm in arms
        )
    if keys[1] not in ARM_FIELDS:
        raise UserError(f"no field {path!r}; there are: {', '.join((*ARM_FIELDS, *OWN_FIELDS))}")
    return tuple(replace_field(arm, keys[1:], text, path) if arm.name == keys[0] else arm for arm in arms)


def _with_arms(experiment: Experiment, arms: tuple[Arm, ...]) -> Experiment:
    """The experiment with these of its arms, and what is left to compare."""
    names = {arm.name for arm in arms}
    left = tuple(pair for pair in experiment.comparisons if set(pair.split(":")) <= names)
    return dataclasses.replace(experiment, arms=arms, comparisons=left)


def _without_arms(arm: Arm, arms: dict[str, Arm], kept: list[str]) -> Arm:
    """The arm as it is, but matched to the layers of an arm that goes, and no longer to its name."""
    if arm.match is None:
        return arm
    measure, _, reference = arm.match.partition(":")
    if reference not in arms or reference in kept or reference == arm.name:
        return arm
    gone = arms[reference]
    if gone.match is not None:
        raise UserError(f"arm {arm.name} is matched to {reference}, which is matched itself: keep {reference} as well")
    return dataclasses.replace(arm, match=f"{measure}:{gone.reading}")


def assignments(experiment: Experiment | Growth) -> tuple[str, ...]:
    """The whole configuration as overrides, one a field, which `override` reads back."""

    def of(node: Any, prefix: str) -> Iterator[str]:
        for field in dataclasses.fields(node):
            value = getattr(node, field.name)
            if field.name == "arms":
                yield f"arms={','.join(arm.name for arm in value)}"
                for arm in value:
                    yield f"arms.{arm.name}.model={arm.model}"
                    optional = {name: getattr(arm, name) for name in ("connectivity", "match", "start")}
                    yield from (f"arms.{arm.name}.{name}={text}" for name, text in optional.items() if text)
                    yield from (f"arms.{arm.name}.{assignment}" for assignment in arm.own)
            elif dataclasses.is_dataclass(value):
                yield from of(value, f"{prefix}{field.name}.")
            else:
                yield f"{prefix}{field.name}={value_text(value)}"

    return tuple(of(experiment, ""))
