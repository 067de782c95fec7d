"""Define the parts of an experiment as frozen dataclasses. An override, such as `epochs=3`, replaces a field.

The type of a field says whether it is static or traced. A plain field is static: another value needs another compiled
program. A field of type `Traced` is a tuple of values, which the program takes as arguments. Each combination of traced
values is trained once per seed. Each such training is one lane (model).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

from cnnlib.config.fields import path_and_text, replace_field, value_text
from cnnlib.data.declaration import Data
from cnnlib.errors import UserError, require
from cnnlib.spec.budget import MEASURES
from cnnlib.spec.layers import Connectivity
from cnnlib.spec.model import Model
from cnnlib.spec.window import LARGEST, Shape, shape_text
from cnnlib.system.registry import Registry

Traced = tuple[float, ...]


@dataclass(frozen=True)
class Augment:
    """Random changes of the training examples. The compiled program draws new changes at every step."""

    shift: int = 0
    """Largest shift along each spatial axis, in pixels, in both directions. Pixels that become empty are set to
    zero."""
    crop: int | None = None
    """Side, in pixels, of the random window that the net sees. Evaluation uses the central window. None: no crop."""
    flip: bool = False
    """Mirror each example with probability 0.5 along the last spatial axis (left and right of an image)."""

    def __post_init__(self) -> None:
        require(self.shift >= 0, f"augment.shift must not be negative, not {self.shift}")
        require(self.crop is None or self.crop >= 1, f"augment.crop must be at least 1, not {self.crop}")

    def seen_shape(self, input_shape: Shape) -> Shape:
        """Return the shape of an example after the crop. Raise UserError if `crop` or `shift` exceeds the example."""
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
    """The optimiser and its hyperparameters. Tuple fields are traced: several values make several lanes."""

    name: Literal["sgd", "adam", "adamw"] = "sgd"
    schedule: Literal["constant", "cosine", "one_cycle"] = "constant"
    """How the learning rate changes over the steps of the run. Its largest value is `learning_rate`."""
    learning_rate: Traced = (0.1,)
    momentum: Traced = (0.9,)
    """Decay of the running mean of gradients: SGD's momentum, Adam's beta 1."""
    weight_decay: Traced = (0.0,)
    """The optimisers sgd and adam add `weight_decay` times the parameter to the gradient. The optimiser adamw adds it
    to the update, before the learning rate scales the update."""
    label_smoothing: Traced = (0.0,)
    """Fraction of the target that is spread evenly over the classes. It affects only the training loss."""
    l1: Traced = (0.0,)
    """The number lambda of beta-LASSO (Neyshabur 2020): `l1 * sign(weight)` is added to the gradient of each kernel
    weight. Biases and norms are not affected."""
    l1_threshold: Traced = (0.0,)
    """The number beta of beta-LASSO. After each step, a kernel weight becomes zero if its magnitude is smaller than
    `l1_threshold * l1`."""

    def __post_init__(self) -> None:
        bounds = {"learning_rate": 1e9, "momentum": 1.0, "weight_decay": 1e9, "label_smoothing": 1.0}
        bounds |= {"l1": 1e9, "l1_threshold": 1e9}
        for name, upper in bounds.items():
            values = getattr(self, name)
            require(isinstance(values, tuple), f"optim.{name} must be a tuple, one value per lane, not {values!r}")
            require(len(values) > 0, f"optim.{name} needs at least one value")
            require(len(set(values)) == len(values), f"optim.{name} repeats a value: {value_text(values)}")
            for value in values:
                require(0.0 <= value < upper, f"optim.{name} must be in [0, {upper:g}), not {value:g}")


@dataclass(frozen=True)
class Lanes:
    """The lanes (models) that each arm trains."""

    seed: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds of initial weights, data order and augmentation. Each combination of traced values has one lane per
    seed."""
    order_seed: tuple[int, ...] | None = None
    """Seeds of the data's order, subset and augmentation. Each order seed is combined with each value of `seed`, and
    `seed` then determines only the initial weights. None: `seed` determines everything."""
    combine: Literal["product", "zip"] = "product"
    """How traced fields with several values make lanes. product: all combinations. zip: the first values of all fields,
    then the second values, and so on."""
    at_a_time: int | None = None
    """Number of lanes that a device trains at the same time, vectorised. 1: one lane after another. None: as many lanes
    as are fast and fit in memory. On a CPU, this is one lane for a conv or local net, and up to eight for a full net.
    On a GPU, it is all lanes."""

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
    """When checkpoints are written, and how many are kept. `--resume` continues from the latest one."""

    every: int = 1
    """Number of epochs between checkpoints of an arm. The last epoch always gets a checkpoint. 0: no checkpoints; an
    interrupted arm starts again from the beginning."""
    share: float = 0.01
    """Largest share of the processor's time that writing may take, in (0, 1]. If writing would take more, checkpoints
    are skipped, for example if an epoch takes less than a second. 1: all checkpoints are written, and training
    waits."""
    keep: int = 2
    """Number of latest checkpoints to keep per arm. The checkpoint with the highest mean validation accuracy is kept
    too."""

    def __post_init__(self) -> None:
        require(self.every >= 0, f"checkpoint.every must not be negative, not {self.every}")
        require(0.0 < self.share <= 1.0, f"checkpoint.share must be in (0, 1], not {self.share:g}")
        require(self.keep >= 1, f"checkpoint.keep must be at least 1, not {self.keep}")


@dataclass(frozen=True)
class Wandb:
    """How `--wandb` copies a run to Weights & Biases."""

    per: Literal["lane", "group"] = "lane"
    """lane: each lane has a W&B run, and so has the group. group: only the group has a W&B run, which holds means and
    standard deviations."""
    entity: str | None = None
    """The user or team that owns the project. None: the user's default entity."""
    project: str = "cnnlib"
    tags: tuple[str, ...] = ()
    """Tags in addition to the names of the data set and the platform."""
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
"""Fields of an experiment that an arm may override for itself, in its field `own`."""


def check_arm_name(name: str) -> None:
    """Raise UserError unless `name` can be the name of an arm, and so of its files."""
    require(
        re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,99}", name) is not None,
        f"an arm's name is made of letters, digits, '_' and '-', 100 at most, not {name[:120]!r}",
    )


@dataclass(frozen=True)
class Arm:
    """One architecture with its static settings: one compiled program."""

    name: str
    model: Model
    connectivity: Connectivity | None = None
    """Connectivity of all layers that have a window. None: each layer keeps the connectivity that `model` declares."""
    match: str | None = None
    """Budget for the widths, written MEASURE:REFERENCE. REFERENCE is a number (`parameters:61706`) or something whose
    MEASURE is counted: another arm, an architecture (`macs:lenet5`), or layers in short notation. None: the widths are
    not scaled."""
    start: Connectivity | None = None
    """Connectivity whose initialiser draws the weights. For example, with `conv` a full net starts as the convolution
    that the same seed draws. None: the arm's own connectivity."""
    own: tuple[str, ...] = ()
    """Overrides for this arm only: `augment.shift=2`, `data.train=500`. Command line: `arms.NAME.augment.shift=2`."""

    def __post_init__(self) -> None:
        for assignment in self.own:
            path = assignment.partition("=")[0]
            require(
                path.split(".")[0] in OWN_FIELDS,
                f"arm {self.name}: no field {path!r} that an arm has of its own; there are: {', '.join(OWN_FIELDS)}",
            )
        check_arm_name(self.name)
        if self.match is not None:
            measure, colon, reference = self.match.partition(":")
            require(
                measure in MEASURES and bool(colon) and bool(reference.strip()),
                f"arm {self.name}: match={self.match} is no MEASURE:REFERENCE, such as parameters:lenet5; "
                f"measures are: {', '.join(MEASURES)}",
            )

    @property
    def reading(self) -> Model:
        """Return the model in the arm's connectivity. Its widths are not matched to a budget yet."""
        return self.model if self.connectivity is None else self.model.with_connectivity(self.connectivity)


@dataclass(frozen=True)
class Experiment:
    """An experiment: which arms to train, on which data, for how long."""

    arms: tuple[Arm, ...]
    data: Data = Data()
    augment: Augment = Augment()
    optim: Optim = Optim()
    lanes: Lanes = Lanes()
    epochs: int = 10
    passes: int = 1
    """Passes through the examples per epoch. Use more than one on small data sets, to avoid very short epochs."""
    batch_size: int = 128
    """Number of examples per step. If the last batch of a pass is incomplete, it is dropped."""
    reshuffle: bool = True
    """Draw a new order of the examples for each pass. False: always use the order in which they are stored."""
    accumulate: int = 1
    """Number of equal pieces that each batch is cut into. The pieces run one after another, in a fraction of the
    memory, and their gradients are added. Not allowed with norms, because their statistics need the whole batch."""
    remat: bool = False
    """For the backward pass, keep only the maps after each pooling and each residual, and compute the other maps again.
    Deeper nets and larger images then fit in the same memory, but training takes up to a third longer."""
    devices: int | None = None
    """Number of devices per host to use; the lanes are spread over them. None: all JAX devices. Each CPU core is one
    device."""
    mesh: tuple[int, ...] | None = None
    """Two numbers, LANES,SHARDS. Lanes are spread over LANES groups of devices. Each group has SHARDS devices, and
    every batch is divided over the devices of its group. None: as many groups as the lanes can use, then as many shards
    as divide the batch (on a CPU, one shard)."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and products. Parameters, optimiser state and losses are always float32."""
    precision: Literal["default", "high", "highest"] = "default"
    """Precision of float32 products. default: one pass of bfloat16 on a TPU, TF32 on a GPU. high: three passes of
    bfloat16 on a TPU. highest: float32. On a CPU, all three values mean float32."""
    comparisons: tuple[str, ...] = ()
    """Pairs of arms to compare, each written FIRST:SECOND. Fewer pairs give narrower confidence intervals. Empty: if
    there are few arms, all pairs are compared; if there are many, each arm is compared with the first."""
    compile_cache: bool = True
    """Keep compiled programs in the user's cache folder, so that later runs can use them again."""
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
        """Return the experiment with only `arm` and its own overrides. Raise UserError if one of them is not valid."""
        one = dataclasses.replace(self, arms=(dataclasses.replace(arm, own=()),), comparisons=())
        try:
            for path, text in map(path_and_text, arm.own):
                one = replace_field(one, path.split("."), text, path)
            return one
        except UserError as error:
            raise UserError(f"arm {arm.name}: {error}") from None


@dataclass(frozen=True)
class Growth:
    """An experiment that shows how counts grow with the size of the input. Nothing is trained."""

    arms: tuple[Arm, ...]
    sides: tuple[int, ...]
    """Sides of the square input, in pixels, in increasing order."""
    channels: int = 3
    num_classes: int = 10
    """Number of classes. Arms that end in one unit per class have this many output units."""

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
    """Return `experiment`, but take the cache, checkpoint, W&B and comparison settings from `other`.

    These settings do not affect results. If `experiment` has comparisons, or if it lacks an arm that `other` compares,
    its own comparisons stay.
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


EXPERIMENTS: Registry[Experiment | Growth] = Registry("experiment", package="cnnlib.experiments")


class LaneNumbers(NamedTuple):
    """The seeds and traced hyperparameters of one lane, or of all lanes of an arm as arrays."""

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
        """Return the hyperparameters without the seeds. Lanes with equal settings differ only by chance."""
        return self[2:]


SETTING_FIELDS = LaneNumbers._fields[2:]
"""Names of a lane's hyperparameters, without its seeds."""


def traced(optim: Optim) -> tuple[Traced, ...]:
    """Return the values of each traced field, in the order of `SETTING_FIELDS`."""
    numbers = (optim.learning_rate, optim.momentum, optim.weight_decay, optim.label_smoothing)
    return (*numbers, optim.l1, optim.l1_threshold)


def lane_numbers(experiment: Experiment) -> tuple[LaneNumbers, ...]:
    """Return all lanes of an arm. Each setting of the traced fields is combined with each seed; seeds vary fastest.

    `lanes.combine` says how settings are combined. If arms have overrides of their own, pass `experiment.of_arm(arm)`.
    """
    lanes, fields = experiment.lanes, traced(experiment.optim)
    if lanes.combine == "zip":
        longest = max(map(len, fields))
        settings = list(zip(*(values * longest if len(values) == 1 else values for values in fields), strict=True))
    else:
        settings = list(itertools.product(*fields))
    seeds = [(seed, order) for seed in lanes.seed for order in (lanes.order_seed or (seed,))]
    return tuple(LaneNumbers(*pair, *setting) for setting in settings for pair in seeds)
