"""Models and optimizers of several runs at the same step: a leading axis of members on every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap
from torch.linalg import vector_norm

from mupx.curvature import Captured, functional_gradients, zero_probes
from mupx.datasets.base import Split
from mupx.evaluation import examples_at_once
from mupx.groups import check_groups
from mupx.linalg import over, trace
from mupx.losses import Loss
from mupx.run import Run
from mupx.run_folder import Metrics
from mupx.stacked import stack
from mupx.stacked.base import Gradient, Rows, pick

CLIP_EPS = 1e-6  # as torch.nn.utils.clip_grad_norm_
ROUNDING = 1000  # units of eps by which a gradient may differ from the product of its rows
ROUNDED = 0.25  # and of the eps that autocast rounds both to: what independent errors come to


class Population:
    """Models and optimizers of several runs at the same step.

    Args:
        runs: Not started, with the same buffers. Their models and optimizers are where the members start
            from, and are not touched afterwards; their losses and steps are kept up to date.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = dict(enumerate(runs))
        first = runs[0]
        self.model, self.loss, self.steps, self.step = first.model, first.loss, first.steps, 0
        for run in runs:
            check_groups(run.optimizer, run.layers)
        each = [dict(run.model.named_parameters()) for run in runs]
        self.values = {name: torch.stack([own[name].detach() for own in each]) for name in each[0]}
        self.update = stack(self.model, [run.optimizer for run in runs], self.values)
        self.paired = len({run.experiment.train.seed for run in runs}) == 1
        scales = [run.experiment.hyperparameters.output_scale for run in runs]
        self.scales = torch.tensor(scales, dtype=first.dtype, device=first.device)
        self._probes: dict[str, Tensor] | None = None
        self._chunk: int | None = None

    @property
    def _leader(self) -> Run:
        """Any run: what it knows of data and schedule all know."""
        return next(iter(self.runs.values()))

    def advance(self) -> set[int]:
        """Do one step of every member and return those that diverged at it; they are gone.

        A member whose loss is finite, but not all of its gradients and factors are, is gone too.
        """
        self.model.train()
        schedule, due = self._leader.factor, self.update.captured
        captured, rows = self._passes(*self._batch())
        finite = [*captured.gradients.values(), *(each.signals for each in rows.values())]
        norms = torch.stack([vector_norm(tensor.flatten(1), dim=1) for tensor in finite])
        gradients: dict[str, Gradient] = {**self._clipped(captured.gradients, norms), **rows}
        factors = {name: dict(zip("AB", captured.factors(name), strict=True)) for name in due}
        sound = _sound(norms, factors)
        diverged = self._record(captured.loss.tolist())
        staying = [i for i, member in enumerate(self.runs) if sound[i] and member not in diverged]
        if len(staying) < len(self.runs):
            index = self._keep(staying)
            gradients = pick(gradients, index)
            factors = {name: pick(pair, index) for name, pair in factors.items()}
        if self.runs:
            self.update.advance(gradients, factors, schedule)
        return diverged

    def _record(self, losses: Sequence[float]) -> set[int]:
        """Count the step and keep its losses; return the members that diverged."""
        self.step += 1
        for run, loss in zip(self.runs.values(), losses, strict=True):
            run.untrained.setdefault("train", loss)
            run.losses.append(loss)
            run.step = self.step
        return {member for member, run in self.runs.items() if run.diverged(run.losses[-1])}

    def _batch(self) -> tuple[Tensor, Tensor]:
        if self.paired:
            return self._leader.batch()
        batches = [run.batch() for run in self.runs.values()]
        return torch.stack([x for x, _ in batches]), torch.stack([y for _, y in batches])

    def _passes(self, inputs: Tensor, targets: Tensor) -> tuple[Captured, dict[str, Rows]]:
        """Return gradients, losses and the rows behind the factors, all with a leading axis of members.

        Beside them the gradients that are left as rows, by weight.
        """
        if self._probes is None:
            self._probes = zero_probes(self.model, inputs if self.paired else inputs[0])
        by_rows = self.update.by_rows
        probes = {name: self._probes[name] for name in {*self.update.captured, *by_rows}}
        left = set(by_rows.values())

        def one(values: dict[str, Tensor], scale: Tensor, x: Tensor, y: Tensor) -> Captured:
            loss, precision = _Scaled(self.loss, scale), self._leader.precision
            return functional_gradients(self.model, loss, values, x, y, probes, left, precision)

        own = None if self.paired else 0
        captured: Captured = vmap(one, in_dims=(0, 0, own, own))(self.values, self.scales, inputs, targets)
        captured = captured._replace(
            inputs={name: _once(h) for name, h in captured.inputs.items()},
            weights={name: _once(w) for name, w in captured.weights.items()},
            terms=_once(captured.terms),
        )
        if self.step == 0 and self._leader.experiment.train.grad_clip is None:
            self.update.rows_suffice = {name for name in probes if self._rows_suffice(name, captured)}
        return captured, {weight: self._rows(captured, layer) for layer, weight in by_rows.items()}

    def _rows(self, captured: Captured, layer: str) -> Rows:
        signals, inputs = captured.signals[layer], captured.inputs[layer]
        amp = self._leader.experiment.train.amp == "bf16" and signals.dtype == torch.float32
        return Rows(signals, inputs, torch.bfloat16 if amp else None)

    def _rows_suffice(self, layer: str, captured: Captured) -> bool:
        """Whether a layer's rows give its weight's gradient; one with another use has more than they know."""
        weight = self.model.get_submodule(layer).weight
        name = next(name for name, parameter in self.model.named_parameters() if parameter is weight)
        gradient, inputs = captured.gradients[name], captured.inputs[layer]
        if len(inputs) > 1:
            return False
        rows = self._rows(captured, layer)
        rounding = ROUNDING * torch.finfo(gradient.dtype).eps
        if rows.precision is not None:
            rounding += ROUNDED * torch.finfo(rows.precision).eps
        return bool(vector_norm(rows.product - gradient.flatten(2)) <= rounding * vector_norm(gradient))

    def _clipped(self, gradients: dict[str, Tensor], norms: Tensor) -> dict[str, Tensor]:
        limit = self._leader.experiment.train.grad_clip
        if limit is None:
            return gradients
        factor = (limit / (vector_norm(norms, dim=0) + CLIP_EPS)).clamp(max=1.0)
        return {name: gradient * over(factor, gradient) for name, gradient in gradients.items()}

    def leave(self, members: Iterable[int]) -> None:
        """Let go of members."""
        gone = set(members)
        self._keep([i for i, member in enumerate(self.runs) if member not in gone])

    def _keep(self, positions: Sequence[int]) -> Tensor:
        """Let go of all but the members at some positions, and return those as an index."""
        index = torch.tensor(positions, dtype=torch.long, device=self.scales.device)
        if len(positions) < len(self.runs):
            kept = set(positions)
            self.runs = {m: run for i, (m, run) in enumerate(self.runs.items()) if i in kept}
            self.values |= pick(self.values, index)
            self.scales = self.scales[index]
            self.update.keep(index)
        return index

    @torch.no_grad()
    def evaluate(self, split: Split) -> dict[int, Metrics]:
        """Return every member's mean loss and accuracy over the terms of a split that count."""
        if not self.runs:
            return {}
        self.model.eval()
        place, loss = self._leader.placed, self.loss
        if self._chunk is None:
            own = {name: value[0] for name, value in self.values.items()}
            self._chunk = examples_at_once(
                self.model,
                lambda x: functional_call(self.model, own, (x,)),
                place(split.inputs[:2]),
                len(self.runs),
            )
        totals = torch.zeros(len(self.runs), dtype=torch.double, device=self.scales.device)
        right, terms, labelled = torch.zeros_like(totals), 0, True
        for x, y in zip(split.inputs.split(self._chunk), split.targets.split(self._chunk), strict=True):
            targets = y.to(self.scales.device)
            counted = int(loss.normaliser(targets))
            if counted == 0:
                continue  # the mean over no term is not a number
            outputs = self._outputs(place(x))
            totals += vmap(loss, in_dims=(0, None))(outputs, targets) * counted
            labelled = not targets.is_floating_point() and targets.shape == outputs.shape[1:-1]
            if labelled:
                right += (outputs.argmax(-1) == targets).flatten(1).sum(1)
            terms += counted
        pairs = zip((totals / terms).tolist(), (right / terms).tolist(), strict=True)
        return {m: Metrics(a, b if labelled else None) for m, (a, b) in zip(self.runs, pairs, strict=True)}

    def _outputs(self, inputs: Tensor) -> Tensor:
        with self._leader.precision():
            outputs: Tensor = vmap(lambda values: functional_call(self.model, values, (inputs,)))(self.values)
        return outputs.to(self.scales.dtype) * over(self.scales, outputs)


class _Scaled:
    """A loss of outputs times ``output_scale``.

    Args:
        loss: The loss.
        scale: A scalar.
    """

    def __init__(self, loss: Loss, scale: Tensor) -> None:
        self.loss, self.scale = loss, scale
        self.mask, self.normaliser = loss.mask, loss.normaliser
        self.sampled_gradients, self.exact_gradients = loss.sampled_gradients, loss.exact_gradients

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss."""
        return self.loss(outputs * self.scale, targets)


def _once(tensor: Tensor) -> Tensor:
    """Return ``[1, …]`` of what is the same for all members: ``vmap`` repeats it without a copy."""
    return tensor[:1] if tensor.stride(0) == 0 else tensor


def _sound(norms: Tensor, factors: Mapping[str, Mapping[str, Tensor]]) -> list[bool]:
    """Say of every member whether its gradients and factors are finite.

    Args:
        norms: Of the gradients, or of the rows they are left as, ``[parameters, P]``.
        factors: Layer → side → ``[P or 1, d, d]``; with a finite trace no entry can be infinite.
    """
    traces = [trace(factor).expand(norms.shape[1]) for pair in factors.values() for factor in pair.values()]
    found: list[bool] = torch.stack([*norms, *traces]).isfinite().all(0).tolist()
    return found


def share_buffers(runs: Sequence[Run]) -> bool:
    """Whether one model's buffers are those of all; random ones depend on the seed."""
    first = dict(runs[0].model.named_buffers())
    return all(torch.equal(buffer, first[name]) for run in runs for name, buffer in run.model.named_buffers())
