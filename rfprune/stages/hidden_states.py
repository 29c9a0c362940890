"""Hidden states of a model on all calibration batches, advanced from block to block.

Only the hidden states after one block are stored, without padding. Memory is therefore one hidden
state per token, for any number of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from rfprune.model.batch import Batch, decoder_token_mask, pack, token_mask, unpack
from rfprune.model.encoder_decoder import (
    block_token_mask,
    encoder_output,
    inputs_with_encoder_output,
)
from rfprune.model.layerwise import (
    LayerCalls,
    Trace,
    block_input,
    layer_calls,
    run_layer,
    trace_block,
)
from rfprune.model.layout import Block, Layout


@dataclass
class HiddenStates:
    """A model and its hidden states after one of its blocks.

    Attributes:
        model: the model that computes them.
        layout: its blocks. A pruned model may have the layout of the original.
        batches: the calibration batches.
        values: for every batch the output of `block` plus its residual, (tokens, d); before the
            first block the input of the first layer. They are views of one tensor, since separate
            tensors would fragment the memory.
        block: the last block that was passed; None before the first one.
        encoder_outputs: for every batch the encoder's output (tokens, d), if these are the hidden
            states of a decoder; else empty.
    """

    model: PreTrainedModel
    layout: Layout
    batches: Sequence[Batch]
    values: Sequence[Tensor]
    block: Block | None = None
    encoder_outputs: Sequence[Tensor] = ()

    def tokens(self, i: int, block: Block) -> Tensor:
        """Token mask (B, S) of batch i at a block."""
        return block_token_mask(self.layout, block, self.batches[i])

    def layer_calls(self, i: int) -> LayerCalls:
        """Arguments of the layers on batch i, apart from the hidden states."""
        return _layer_inputs(self.model, self.layout, self.batches[i], self._encoder_output(i))[1]

    def trace(self, i: int, block: Block, calls: LayerCalls) -> Trace:
        """Run the model on batch i, from the stored hidden states to the output of `block`."""
        hidden, done = self._run_to_layer(i, block, calls)
        path = self.layout.layers[block.layer]
        return trace_block(self.model, path, hidden, calls, block, skip=done)

    def block_input(self, i: int, block: Block, calls: LayerCalls) -> Tensor:
        """Input (B, S, d) of the input projections of `block` on batch i."""
        hidden, done = self._run_to_layer(i, block, calls)
        path = self.layout.layers[block.layer]
        return block_input(self.model, path, hidden, calls, block, skip=done)

    def advance(self, block: Block) -> None:
        """Replace the stored hidden states by those after `block`."""
        if block.sublayer.parallel:
            return
        for i in range(len(self.batches)):
            self.store(i, block, self.trace(i, block, self.layer_calls(i)).residual_sum)
        self.block = block

    def store(self, i: int, block: Block, residual_sum: Tensor) -> None:
        """Replace the stored hidden states of batch i by those after `block`, (B, S, d).

        The next block needs the input of a parallel block, so that stays.
        """
        if not block.sublayer.parallel:
            self.values[i].copy_(pack(residual_sum, self.tokens(i, block)))

    def _encoder_output(self, i: int) -> Tensor | None:
        return self.encoder_outputs[i] if self.encoder_outputs else None

    def _run_to_layer(self, i: int, block: Block, calls: LayerCalls) -> tuple[Tensor, list[Block]]:
        """Hidden states (B, S, d) in the layer of `block`, and the blocks of that layer that were
        passed already."""
        hidden = unpack(self.values[i], self.tokens(i, block))
        layer = self.layout.layer_indices(decoder=bool(self.encoder_outputs))[0]
        done: list[Block] = []
        if self.block is not None:
            layer, blocks = self.block.layer, self.layout.blocks_of_layer(self.block.layer)
            done = [*blocks[: blocks.index(self.block)], self.block]
        for path in self.layout.layers[layer : block.layer]:
            hidden, done = run_layer(self.model, path, hidden, calls, skip=done), []
        return hidden, done


def first_hidden_states(
    models: tuple[PreTrainedModel, PreTrainedModel],
    layouts: tuple[Layout, Layout],
    batches: Sequence[Batch],
    *,
    in_decoder: bool,
) -> tuple[HiddenStates, HiddenStates]:
    """Hidden states of teacher and student before the first layer of a stack.

    Both start from the same ones, since embeddings are not pruned.

    Args:
        models: teacher and student.
        layouts: of both; they differ where the student has fewer layers.
        in_decoder: the stack is the decoder; the encoders of both models are run first.
    """
    (teacher, student), (layout, student_layout) = models, layouts
    encoder_outputs: list[list[Tensor]] = [[], []]
    if in_decoder:
        encoder_outputs = [
            [encoder_output(model, batch) for batch in batches] for model in (teacher, student)
        ]
    tokens = [decoder_token_mask(one) if in_decoder else token_mask(one) for one in batches]
    sizes = [int(mask.sum()) for mask in tokens]

    def first(i: int) -> Tensor:
        encoded = encoder_outputs[1][i] if in_decoder else None
        return _layer_inputs(student, student_layout, batches[i], encoded)[0]

    hidden = first(0)
    joined = hidden.new_empty(sum(sizes), hidden.shape[-1])
    for i, state in enumerate(joined.split(sizes)):
        state.copy_(pack(first(i), tokens[i]))
    teacher_states, student_states = joined.clone().split(sizes), joined.split(sizes)
    return (
        HiddenStates(teacher, layout, batches, teacher_states, encoder_outputs=encoder_outputs[0]),
        HiddenStates(
            student, student_layout, batches, student_states, encoder_outputs=encoder_outputs[1]
        ),
    )


def _layer_inputs(
    model: PreTrainedModel, layout: Layout, batch: Batch, encoded: Tensor | None
) -> tuple[Tensor, LayerCalls]:
    inputs = None if encoded is None else inputs_with_encoder_output(batch, encoded)
    return layer_calls(model, layout, batch, decoder_inputs=inputs)
