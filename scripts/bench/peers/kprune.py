"""K-prune: Park et al., ICLR 2024, "Accurate retraining-free pruning for pretrained encoder-based
language models" (arXiv 2308.03449).

Sublayers are pruned one by one, bottom up. For each of them:

    knowledge measurement     of every unit that is left, in this sublayer and above it. Predictive:
                              half the squared gradient, with respect to the unit's mask, of
                              KL(original || pruned so far) at a temperature. Representational: the
                              energy of what the unit adds to the hidden states
    mask search (KPMS)        importance = (predictive + λ·representational) / cost; one threshold
                              over all these units within the rest of the budget; only the
                              sublayer's own units are removed
    weight tuning (KPWT)      the output projection is solved by least squares: its output plus the
                              residual of the pruned model is to be that of the original model

No labels are needed: the original's predictions take their place. The gradient of a KL divergence
is zero where both models are the same. So nothing is known about predictions at the first sublayer,
and its units are chosen by representational knowledge alone, as in the authors' code. From the
second one on, the model differs from the original, and the gradient is not zero.

Where the paper leaves something open, the port follows the authors' code: one gradient for the mean
loss of a batch; squares summed over batches and divided by the number of examples; temperature 2
and λ = 2.5e-4 of their published command. For regression the mean squared difference replaces the
KL divergence; for question answering it is the mean of those of start and end.

Departures:

- The authors tune λ and a factor μ for heads by task. Here they are those of the command that they
  publish. Its μ is 64, the width of their heads, by which they multiply the mean over the features
  of a head; here a head has the sum over its features, for any width.
- The gradient is that of one mask a head, as in the paper; their code has a mask for each feature.
- Costs are those of the package, and the budget may be used up; there, it is not quite.
- Least squares are solved in float64; where that fails, the sublayer keeps its weights, with a
  warning. An FFN that loses no neuron is solved as well; their code does not change it.
- A sublayer without units keeps its bias, which their code removes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from rfprune.cost.constraint import CostModel
from rfprune.errors import UserError
from rfprune.methods.problem import Problem
from rfprune.model.batch import Batch, model_inputs, pack, token_mask
from rfprune.model.compact import unpruned_copy
from rfprune.model.frozen import frozen
from rfprune.model.layerwise import (
    layer_calls,
    layer_scale,
    layers_bypassed,
    run_layer,
    trace_block,
)
from rfprune.model.layout import Block, Layout
from rfprune.model.linear import linear, weight_of
from rfprune.model.masks import full_masks, masked
from rfprune.stages.least_squares import Moments, NumericalFailure, solve_weights
from scripts.bench.peers.choice import Choice, keep_highest, require_one_stack, require_units

TEMPERATURE = 2.0
"""Of the predictions whose divergence is measured."""

REPRESENTATIONAL = 2.5e-4
"""λ, the weight of representational knowledge."""

PREDICTIONS = ("logits", "start_logits", "end_logits")


def prepare(problem: Problem) -> Callable[[CostModel, float], Choice]:
    """Nothing can be collected before the constraint is known: it decides what is pruned below."""
    model, layout = problem.model, problem.layout
    require_one_stack(layout, "K-prune")
    if any(layer_scale(model, block) is not None for block in layout.blocks):
        raise UserError("K-prune is written for sublayers whose output is not scaled")

    def choose(costs: CostModel, budget: float) -> Choice:
        walk = BottomUp(model, unpruned_copy(model), layout, problem.inputs)
        with frozen(model), frozen(walk.student):
            return walk.prune(costs, budget)

    return choose


@dataclass(frozen=True)
class Knowledge:
    """Predictive and representational knowledge (U,) of the units of a block."""

    predictive: Tensor
    representational: Tensor

    def importance(self) -> Tensor:
        """Weighted sum (U,), not yet divided by the cost of a unit."""
        return self.predictive + REPRESENTATIONAL * self.representational


class BottomUp:
    """A pass from the first sublayer to the last.

    Attributes:
        model: the original, frozen.
        student: a copy of it. The columns of removed units become zero in its output projections.
        layout: of both.
        batches: calibration batches with token masks.
        wanted: the original's predictions on every batch.
        states: hidden states (B, S, d) of model and student on every batch, before the present
            layer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        student: PreTrainedModel,
        layout: Layout,
        batches: Sequence[Batch],
    ) -> None:
        self.model, self.student, self.layout, self.batches = model, student, layout, batches
        with torch.no_grad():
            self.wanted = [predictions(model(**model_inputs(batch))) for batch in batches]
            entering = [layer_calls(model, layout, batch)[0] for batch in batches]
        self.states = (entering, list(entering))

    def prune(self, costs: CostModel, budget: float) -> Choice:
        """Choose the units of every block and tune it."""
        blocks, masks, warnings = self.layout.blocks, list[Tensor](), list[str]()
        for number, block in enumerate(blocks):
            left = range(number, len(blocks))
            of_left = costs.select_blocks(left, [blocks[b].num_units for b in left])
            scores = [
                one.importance() * len(one.predictive) / float(table[-1])
                for one, table in zip(self.measure(number), of_left.tables, strict=True)
            ]
            mask = keep_highest(scores, of_left, budget)[0]
            budget -= float(costs.tables[number][int(mask.sum())])
            masks.append(mask)
            warnings += self.tune(block, mask)
            if block is self.layout.blocks_of_layer(block.layer)[-1]:
                self._advance(block.layer)
        tuned = {
            block.consumer: weight_of(linear(self.student, block.consumer)).detach()
            for block in blocks
        }

        def recover(pruned: PreTrainedModel) -> Sequence[str]:
            for block, mask in zip(blocks, masks, strict=True):
                columns = _columns(block, mask)
                if columns.any():
                    weight = weight_of(linear(pruned, block.consumer))
                    weight.data.copy_(tuned[block.consumer][:, columns])
            return warnings

        return Choice(require_units(tuple(masks)), recover)

    def measure(self, number: int) -> list[Knowledge]:
        """Knowledge of the units of block `number` and of all blocks above it."""
        blocks = self.layout.blocks[number:]
        squares = [torch.zeros(block.num_units, dtype=torch.float64) for block in blocks]
        energies = [torch.zeros(block.num_units, dtype=torch.float64) for block in blocks]
        examples = sum(len(token_mask(batch)) for batch in self.batches)
        tokens = sum(int(token_mask(batch).sum()) for batch in self.batches)
        for i in range(len(self.batches)):
            gradients, features = self._differentiate(i, blocks)
            for b, block in enumerate(blocks):
                squares[b] += gradients[b].double().cpu().square() / 2
                weight = weight_of(linear(self.student, block.consumer)).double()
                energy = features[b].double().square().sum(0) * weight.square().mean(0)
                energies[b] += energy.view(block.num_units, -1).sum(1).cpu()
        return [
            Knowledge(predictive / examples, representational / tokens)
            for predictive, representational in zip(squares, energies, strict=True)
        ]

    def _differentiate(
        self, i: int, blocks: Sequence[Block]
    ) -> tuple[Sequence[Tensor], list[Tensor]]:
        """On batch i, gradients (U,) of the lost knowledge with respect to masks of ones, and
        features (tokens, p), for all blocks from one on."""
        student, batch = self.student, self.batches[i]
        layout, hidden = replace(self.layout, blocks=tuple(blocks)), self.states[1][i]
        masks = [mask.to(hidden).requires_grad_() for mask in full_masks(layout)]
        features: dict[str, Tensor] = {}
        tokens = token_mask(batch)

        def hook_of(consumer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                features[consumer] = pack(inputs[0].detach(), tokens)

            return hook

        with ExitStack() as stack, torch.enable_grad():
            for block in blocks:
                module = student.get_submodule(block.consumer)
                added = module.register_forward_pre_hook(hook_of(block.consumer))
                stack.callback(added.remove)
            stack.enter_context(masked(student, layout, masks))
            calls, output = layer_calls(student, layout, batch)[1], hidden
            for path in layout.layers[blocks[0].layer :]:
                output = run_layer(student, path, output, calls)
            with layers_bypassed(student, layout, output, hidden):
                outputs = student(**model_inputs(batch), return_dict=True)
            lost = lost_knowledge(self.wanted[i], predictions(outputs), student.config)
        found = torch.autograd.grad(lost, masks)
        return found, [features[block.consumer] for block in blocks]

    @torch.no_grad()
    def tune(self, block: Block, mask: Tensor) -> list[str]:
        """Remove units of a block and solve for the weights of the others, in place.

        Returns:
            A warning if the solve failed.
        """
        columns, path = _columns(block, mask), self.layout.layers[block.layer]
        consumer = linear(self.student, block.consumer)
        weight = weight_of(consumer)
        moments = Moments.zeros(int(columns.sum()), len(weight), "cpu")
        for batch, state, own_state in zip(self.batches, *self.states, strict=True):
            calls, tokens = layer_calls(self.model, self.layout, batch)[1], token_mask(batch)
            wanted = trace_block(self.model, path, state, calls, block).residual_sum
            own = trace_block(self.student, path, own_state, calls, block)
            assert own.features is not None, "the student has the original's shapes"
            target = wanted - (own.residual_sum - own.output)
            if consumer.bias is not None:
                target = target - consumer.bias
            moments.add(pack(own.features, tokens)[:, columns], pack(target, tokens))
        weight[:, ~columns] = 0.0
        try:
            solved = solve_weights(moments, ridge=0.0, intercept=False)[0]
        except NumericalFailure as failure:
            return [f"{block.name} keeps its weights: {failure}"]
        weight[:, columns] = solved.to(weight)
        return []

    @torch.no_grad()
    def _advance(self, layer: int) -> None:
        path = self.layout.layers[layer]
        for model, states in zip((self.model, self.student), self.states, strict=True):
            for i, batch in enumerate(self.batches):
                calls = layer_calls(model, self.layout, batch)[1]
                states[i] = run_layer(model, path, states[i], calls)


def predictions(outputs: Any) -> dict[str, Tensor]:
    """The logits of a classifier, a regression or question answering.

    Raises:
        UserError: the outputs have no predictions, or one for each token.
    """
    found = {name: outputs[name] for name in PREDICTIONS if name in outputs}
    if not found or any(logits.dim() != 2 for logits in found.values()):
        raise UserError("K-prune is written for classification, regression and question answering")
    return found


def lost_knowledge(
    wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], config: Any
) -> Tensor:
    """What a batch has lost of the original's predictions, the mean over its examples."""
    if "logits" in found and (config.problem_type == "regression" or found["logits"].shape[1] == 1):
        return functional.mse_loss(found["logits"], wanted["logits"])
    divergences = [
        functional.kl_div(
            (found[name] / TEMPERATURE).log_softmax(-1),
            (wanted[name] / TEMPERATURE).log_softmax(-1),
            reduction="batchmean",
            log_target=True,
        )
        for name in found
    ]
    return TEMPERATURE**2 * torch.stack(divergences).mean()


def _columns(block: Block, mask: Tensor) -> Tensor:
    """Booleans (p,): input features of a block's output projection whose unit is kept."""
    return mask.bool().repeat_interleave(block.unit_width)
