"""What is said before a run, sentence by sentence, each with where it is known from (no torch).

P is the poster of S. Ishikawa and R. Yokota: it gives directions and one table, and where a number is needed
to speak of "large" or "few", the number is a convention of mupx and says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from mupx.config import Experiment
from mupx.dotted import differences
from mupx.scaling import find_rule

P, IK, Q = "P", "IK", "Q"
REFERENCES: Mapping[str, str] = {
    P: 'Ishikawa & Yokota, "When does second-order optimization speed up training?", ICLR Tiny 2024',
    IK: "Ishikawa & Karakida, ICLR 2024, arXiv:2312.12226",
    Q: "Qiu et al., arXiv:2512.05620",
}
DERIVED, MEASURED = "derived for mupx", "measured here"
OWN = "mupx's benchmarks/poster.py"
CONVENTION = "a convention of mupx, P gives no number"

LARGE, SMALL = 1e-2, 1e-4  # ratio of batch to data: from here on large, up to here small
FEW = 1_000  # steps below which a preconditioner that is fitted step by step has few
MEASURED_GROWTH = 64  # the largest width ratio over which mupx's own benchmarks follow transfer
ITERATIVE = ("psgd", "psgd-newton")

# Keys that tuned values hold for.
TUNED_FOR = (
    "data.name",
    "data.args",
    "train.batch_size",
    "train.epochs",
    "train.steps",
    "train.schedule",
    "train.warmup",
    "train.grad_clip",
    "train.loss",
    "hyperparameters.weight_decay",
    "optimizer.name",
    "optimizer.weight_decay_mode",
)

Regime = Literal["likely", "open", "unlikely"]
Level = Literal["note", "warning"]
Topic = Literal["pays", "first", "refresh", "cost", "transfer", "iterations"]


@dataclass(frozen=True)
class Statement:
    """One sentence of advice.

    Attributes:
        topic: What it is about.
        code: Short name, stable over versions.
        level: ``warning`` for what is likely to go wrong.
        text: The sentence.
        source: Where it is known from: a key of :data:`REFERENCES`, or in words.
    """

    topic: Topic
    code: str
    level: Level
    text: str
    source: str

    @property
    def key(self) -> str:
        """The key of the source in :data:`REFERENCES`, or what stands in its place."""
        return self.source.partition(",")[0]

    def to_json(self) -> dict[str, str]:
        """Return the statement as a document, with its source in full."""
        return {
            **asdict(self),
            "source": self.source.replace(self.key, REFERENCES.get(self.key, self.key), 1),
        }


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run.

    Attributes:
        examples: In the training split.
        batch_size: Examples per step.
        steps: Steps.
    """

    examples: int
    batch_size: int
    steps: int

    @property
    def ratio(self) -> float:
        """Batch over data."""
        return self.batch_size / self.examples

    @property
    def epochs(self) -> float:
        """Passes over the data."""
        return self.steps * self.batch_size / self.examples

    @property
    def regime(self) -> Regime:
        """Whether second order is likely to pay."""
        return "likely" if self.ratio >= LARGE else "unlikely" if self.ratio <= SMALL else "open"


VERDICTS: Mapping[Regime, str] = {
    "likely": "likely to pay: the batch is large for the data",
    "open": "open: the batch is neither large nor small for the data; tune both kinds on the proxy",
    "unlikely": "the benefit can vanish: the data set is very large for the batch",
}


def pays(sizes: Sizes) -> Iterator[Statement]:
    """Say whether second order is likely to pay."""
    where = f"batch / data = {sizes.batch_size:,} / {sizes.examples:,} = {sizes.ratio:.2g}"
    yield Statement(
        "pays",
        "batch-data-ratio",
        "note",
        f"second order is {VERDICTS[sizes.regime]} ({where}); what matters is that ratio: it pays with large "
        "batches or small data sets, and with very large data sets the benefit can vanish",
        P,
    )
    yield Statement(
        "pays",
        "no-threshold",
        "note",
        f"large from {LARGE:g}, small up to {SMALL:g}: {CONVENTION}",
        DERIVED,
    )
    yield Statement(
        "pays",
        "at-small-scale",
        "note",
        "an MLP on 8,000 images and fewer gained from second order at every batch, most at the largest, and "
        "more in training loss the fewer the images; the ratio alone did not decide how much",
        OWN,
    )


def iterations(sizes: Sizes, configured: str, registered: Sequence[str]) -> Iterator[Statement]:
    """Warn of preconditioners that are fitted step by step and get few steps."""
    poor = sizes.ratio >= LARGE or sizes.steps < FEW
    for name in ITERATIVE:
        if poor and (name == configured or name in registered):
            yield Statement(
                "iterations",
                "few-iterations",
                "warning" if name == configured else "note",
                f"{name} fits its curvature step by step: it improves with the number of iterations, not "
                f"with the batch, and is poor at large batch; this run has {sizes.steps:,} steps at batch / "
                f"data = {sizes.ratio:.2g} (few: below {FEW:,}, large: from {LARGE:g}, {CONVENTION}); take "
                "smaller batches and more steps, or kfac or shampoo",
                P,
            )
    if poor and "psgd" in (configured, *registered):
        yield Statement(
            "iterations",
            "more-iterations",
            "note",
            "more fit iterations per step (optimizer.args.iterations) lowered psgd's loss at every batch; a "
            "larger batch made its fit better too, though less",
            OWN,
        )


def not_transferred(experiment: Experiment, sizes: Sizes, tuned: Experiment | None) -> Iterator[Statement]:
    """Say what no width rule carries over, in this configuration.

    Args:
        experiment: The target's.
        sizes: Of its run.
        tuned: As it was tuned, where that is known.
    """
    train, hyper = experiment.train, experiment.hyperparameters
    decay = f"weight_decay {hyper.weight_decay:g} ({experiment.optimizer.weight_decay_mode})"
    clip = "" if train.grad_clip is None else f", grad_clip {train.grad_clip:g}"
    yield Statement(
        "transfer",
        "kept-equal",
        "note",
        f"no rule transfers batch size ({sizes.batch_size:,}), data-set size ({sizes.examples:,}), number of "
        f"steps ({sizes.steps:,}), schedule ({train.schedule}, warmup {train.warmup:g}) or regularisation "
        f"({decay}{clip}): keep them equal between proxy and target",
        IK,
    )
    for line in [] if tuned is None else _differences(tuned, experiment):
        text = f"{line}: the values were tuned for the old one, which no rule carries over"
        yield Statement("transfer", "differs-from-tuned", "warning", text, IK)
    if experiment.optimizer.scaling_rule.damping:
        yield Statement(
            "transfer",
            "damping-grows",
            "note",
            "the best damping grows with the batch and with lr: search both, at the target's batch",
            P,
        )
        yield Statement(
            "transfer",
            "damping-grows-with-lr",
            "note",
            "K-FAC's best damping grew with lr, fourfold with a fourfold one; with the batch it grew where "
            "the number of epochs was fixed, and only there",
            OWN,
        )
        yield from _damping_rule(experiment)
    yield from _widths(experiment)


def _differences(tuned: Experiment, experiment: Experiment) -> list[str]:
    old, new = (e.model_dump(mode="json") for e in (tuned, experiment))
    return [line for line in differences(old, new) if line.startswith(TUNED_FOR)]


def _damping_rule(experiment: Experiment) -> Iterator[Statement]:
    optimizer = experiment.optimizer
    rule = optimizer.damping_rule or find_rule(optimizer.scaling_rule.name).default_damping
    if rule == "absolute":
        scaled = experiment.scaling.parametrization != "sp"
        text = (
            "absolute damping is right at another width only with the table's multipliers of ρ_A and ρ_B"
            + (
                ", which the groups carry: another trainer must take them over"
                if scaled
                else ", which sp leaves at 1: use mup, or a relative rule (trace, relative)"
            )
        )
        yield Statement(
            "transfer", "absolute-damping", "note" if scaled else "warning", text, f"{IK}, Prop. 4.1"
        )


def _widths(experiment: Experiment) -> Iterator[Statement]:
    base, width = experiment.scaling.base_width, experiment.scaling.width
    if base == width:
        text = (
            f"width {width} is the base width: every multiplier is 1, nothing is transferred (--width WIDTH)"
        )
        yield Statement("transfer", "no-growth", "note", text, DERIVED)
    if width > MEASURED_GROWTH * base:
        text = (
            f"width {width} is {width / base:.3g} times the base width; mupx's own benchmarks follow "
            f"transfer over {MEASURED_GROWTH}×: verify at widths between"
        )
        yield Statement("transfer", "beyond-measured", "warning", text, MEASURED)
