"""A pruned model as its family's own plain architecture, where the configuration can say its sizes.

That takes the same number of units in every layer. A configuration has an entry for the number of
neurons; for fewer heads it must have one for their width too, else fewer heads would be wider ones.
What comes out carries no code and no entry of ours: any tool that knows the family loads it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import SizeEntries
from rfprune.model.dense import share_buffers, tie_as, with_joined_tables
from rfprune.model.layout import Layout, layout_of


def plain_sizes(model: PreTrainedModel, layout: Layout) -> dict[str, tuple[int, ...]]:
    """By kind of block, the numbers of units in every layer that the configuration can say.

    Raises:
        UserError: it can say none: the family has no entry for it, or an earlier pruning has left
            the layers with different numbers of heads.
    """
    entries = _entries(model.config)
    counts = {kind: _counts(layout, kind) for kind in ("head", "neuron")}
    least = {kind: min(found) for kind, found in counts.items()}
    heads: tuple[int, ...] = (least["head"],)
    if entries.heads:
        heads = tuple(n for n in range(1, least["head"] + 1) if _can_say(model.config, n))
    elif counts["head"] != {model.config.num_attention_heads}:
        raise UserError(
            f"this model has {sorted(counts['head'])} heads in its layers, where the configuration "
            f"of a {model.config.model_type} model can only say {model.config.num_attention_heads} "
            "for all; leave out --uniform (uniform=True)"
        )
    return {"head": heads, "neuron": tuple(range(1, least["neuron"] + 1))}


def to_plain(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the class that was pruned, equal to `model` to the bit, and sharing its weights.

    Args:
        model: pruned (or not), with the same number of heads and of neurons in every layer.

    Raises:
        UserError: the configuration cannot say these numbers; see `plain_sizes`.
    """
    layout = layout_of(model)
    allowed = plain_sizes(model, layout)
    kept = {kind: _counts(layout, kind) for kind in allowed}
    if any(len(counts) > 1 or not counts <= set(allowed[kind]) for kind, counts in kept.items()):
        raise UserError(
            f"the layers of this model keep {sorted(kept['head'])} heads and "
            f"{sorted(kept['neuron'])} neurons, which its configuration cannot say; prune it with "
            "uniform=True"
        )
    config = _with_sizes(model.config, kept["head"].pop(), kept["neuron"].pop())
    base: Any = getattr(type(model), "pruned_from", type(model))
    with torch.device("meta"):
        plain: PreTrainedModel = base(config)
    blocks = (getattr(model.config, "rfprune", None) or {}).get("blocks", [])
    plain.load_state_dict(with_joined_tables(model.state_dict(), blocks, plain), assign=True)
    tie_as(model, plain)
    share_buffers(model, plain)
    if hasattr(model, "generation_config"):
        plain.generation_config = copy.deepcopy(model.generation_config)
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return plain.train(model.training)


def _entries(config: PretrainedConfig) -> SizeEntries:
    entries = ARCHITECTURES[config.model_type].size_entries
    if entries is None:
        raise UserError(
            f"the configuration of a {config.model_type} model has no single entry for the number "
            "of its neurons, so --uniform (uniform=True) cannot make a plain one; leave it out"
        )
    return entries


def _counts(layout: Layout, kind: str) -> set[int]:
    """The numbers of units of one kind that layers have.

    Raises:
        UserError: a layer has none.
    """
    found = [block for block in layout.blocks if block.kind == kind]
    if len({block.layer for block in found}) < len(layout.layers):
        raise UserError(
            f"this model has layers without {kind}s, which a plain architecture has not; leave out "
            "--uniform (uniform=True)"
        )
    return {block.num_units for block in found}


def _with_sizes(config: PretrainedConfig, heads: int, neurons: int) -> PretrainedConfig:
    """A copy that says other sizes, and nothing of the pruning."""
    entries, said = _entries(config), copy.deepcopy(config)
    for entry in ("rfprune", "auto_map"):
        if hasattr(said, entry):
            delattr(said, entry)
    setattr(said, entries.neurons, neurons)
    if entries.heads:
        width = getattr(config, "head_dim", None)
        said.head_dim = width or config.hidden_size // config.num_attention_heads
        before = getattr(config, entries.heads[0])
        for name in entries.heads:
            setattr(said, name, getattr(config, name) * heads // before)
    return said


def _can_say(config: PretrainedConfig, heads: int) -> bool:
    """Whether the configuration, which checks itself when it is made, takes a number of heads."""
    said = _with_sizes(config, heads, 1)
    try:
        type(config).from_dict(said.to_dict())
    except Exception:  # each family refuses in its own way
        return False
    return True
