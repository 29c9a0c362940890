"""remove_units(): a smaller model without the heads and neurons that a user names.

transformers had `prune_heads` for this until version 5.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping

import torch
from transformers import PreTrainedModel

from rfprune.errors import RfpruneWarning, UserError
from rfprune.methods.curvature import refit_weights
from rfprune.methods.problem import prepare_problem
from rfprune.model.batch import Batch
from rfprune.model.compact import compact
from rfprune.model.frozen import default_torch_state, frozen
from rfprune.model.layout import Layout, layout_of
from rfprune.model.masks import Masks, full_masks
from rfprune.model.rebuild import check_rebuildable
from rfprune.model.residency import execution_device
from rfprune.model.unwrapped import unwrapped
from rfprune.settings import Settings

Removed = Mapping[int, Collection[int]]
"""The numbers of units to remove, by layer."""


def remove_units(
    model: PreTrainedModel,
    *,
    heads: Removed | None = None,
    neurons: Removed | None = None,
    cross_heads: Removed | None = None,
    batches: Iterable[Batch] | None = None,
) -> PreTrainedModel:
    """Remove chosen heads and neurons, as `prune_heads` of transformers did until version 5.

    Layers are counted from 0, in an encoder-decoder those of the encoder before those of the
    decoder. Query heads that share keys and values are removed together: a number is that of a
    key-value head.

    Args:
        model: of a supported type, pruned or not. It is left untouched.
        heads: numbers of the heads to remove by layer, such as {0: [1, 2]}.
        neurons: numbers of the FFN neurons to remove by layer.
        cross_heads: numbers of the heads of cross-attention to remove by layer.
        batches: calibration batches as for `prune`; the weights that are left are fitted to the
            original's outputs by least squares. None: they stay as they are.

    Returns:
        A physically smaller model. `save_pretrained` saves it with its code, and `load_pruned`
        loads it.

    Raises:
        UserError: a layer, head or neuron does not exist, or nothing would be left.

    Example:
        >>> from rfprune import remove_units
        >>> smaller = remove_units(model, heads={0: [1, 2]}, neurons={1: range(4)})
        >>> smaller.num_parameters() < model.num_parameters()
        True
    """
    model = unwrapped(model)
    layout = layout_of(model)
    check_rebuildable(model)
    given = {"heads": heads, "neurons": neurons, "cross_heads": cross_heads}
    masks = masks_without(layout, {name: one for name, one in given.items() if one})
    if batches is None:
        with default_torch_state(execution_device(model)):
            return compact(model, layout, masks)
    problem = prepare_problem(model, batches, Settings(method="importance", importance="random"))
    with default_torch_state(execution_device(model)):
        student = compact(model, layout, masks)
        with frozen(problem.model), frozen(student):
            failures = refit_weights(problem, student)
    for sentence in (*problem.warnings, *failures):
        warnings.warn(sentence, RfpruneWarning, stacklevel=2)
    return student


def masks_without(layout: Layout, removed: Mapping[str, Removed]) -> Masks:
    """Masks of ones, with zeros for the units to remove.

    Args:
        removed: by the name of the sublayer, then by layer.

    Raises:
        UserError: a layer or unit does not exist, or no unit would be left, or none is removed.
    """
    masks = full_masks(layout)
    places = {(block.layer, block.sublayer.name): b for b, block in enumerate(layout.blocks)}
    for name, by_layer in removed.items():
        if not isinstance(by_layer, Mapping):
            raise UserError(
                f"{name} is a {type(by_layer).__name__}; give the numbers by layer: {{0: [1, 2]}}"
            )
        for layer, numbers in by_layer.items():
            if (layer, name) not in places:
                known = sorted({one for one, kind in places if kind == name})
                where = f"layers {known[0]} to {known[-1]} have them" if known else "none has them"
                raise UserError(f"layer {layer!r:.40} has no {name} to remove: {where}")
            mask = masks[places[layer, name]]
            wrong = [one for one in numbers if not _is_index(one, len(mask))]
            if wrong:
                raise UserError(
                    f"layer {layer} has the {name} 0 to {len(mask) - 1}, and not {wrong[0]!r:.40}"
                )
            mask[torch.tensor(sorted(numbers), dtype=torch.long)] = 0.0
    if all(bool(mask.all()) for mask in masks):
        raise UserError("there is nothing to remove: name heads={0: [1, 2]} or neurons={0: [3]}")
    if not any(bool(mask.any()) for mask in masks):
        raise UserError("no head and no neuron would be left: keep at least one")
    return masks


def _is_index(number: object, size: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number < size
