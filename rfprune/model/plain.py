"""A pruned model as a plain one: its family's own class, with smaller sizes in its configuration.

This needs the same number of units in every layer. A configuration has one entry for the number of
neurons. For fewer heads it must also have an entry for their width, otherwise fewer heads would be
wider ones. A plain model has no code of its own and no entry of ours: any tool that knows the
family loads it.
"""

from __future__ import annotations

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel

from rfprune.errors import UserError
from rfprune.families.architectures import ARCHITECTURES
from rfprune.families.schema import SizeEntries
from rfprune.model.layout import Layout, layout_of
from rfprune.model.modeling_rfprune import BIAS_TABLE
from rfprune.model.original_class import fill, make_on_meta, original_config
from rfprune.model.residency import is_offloaded, stored_tensors
from rfprune.model.weight_store import offload_like


def plain_sizes(model: PreTrainedModel, layout: Layout) -> dict[str, tuple[int, ...]]:
    """The numbers of units per layer that a model's configuration can express.

    Returns:
        By kind of block ("head", "neuron"), in ascending order.

    Raises:
        UserError: it can express none: the family has no entry for the number of neurons, or an
            earlier pruning has left the layers with different numbers of heads, or with none.
    """
    entries = _entries(model.config)
    counts = {kind: _counts(layout, kind) for kind in ("head", "neuron")}
    least = {kind: min(found) for kind, found in counts.items()}
    heads: tuple[int, ...] = (least["head"],)
    if entries.heads:
        heads = tuple(n for n in range(1, least["head"] + 1) if _is_valid(model.config, n))
    elif _removes_heads(model.config, counts["head"]):
        raise UserError(
            f"the layers of this model have {sorted(counts['head'])} heads, but the configuration "
            f"of a {model.config.model_type} model can only express "
            f"{model.config.num_attention_heads} in all; leave out --uniform (uniform=True)"
        )
    return {"head": heads, "neuron": tuple(range(1, least["neuron"] + 1))}


def to_plain(model: PreTrainedModel) -> PreTrainedModel:
    """Turn a pruned model into one of its original class, with smaller sizes in its configuration.

    Args:
        model: pruned or not, with the same number of heads and of neurons in every layer.

    Returns:
        A model that computes the same bits and shares the weights of `model`.

    Raises:
        UserError: the configuration cannot express these numbers; see `plain_sizes`.
    """
    layout = layout_of(model)
    allowed = plain_sizes(model, layout)
    kept = {kind: _counts(layout, kind) for kind in allowed}
    if any(len(counts) > 1 or not counts <= set(allowed[kind]) for kind, counts in kept.items()):
        raise UserError(
            f"the layers of this model keep {sorted(kept['head'])} heads and "
            f"{sorted(kept['neuron'])} neurons, which its configuration cannot express; prune it "
            "with --uniform (uniform=True)"
        )
    plain = make_on_meta(model, _resized(model.config, kept["head"].pop(), kept["neuron"].pop()))
    tables = {name for name in model.state_dict() if name.endswith(f"{BIAS_TABLE}.weight")}
    fill(plain, model, model.state_dict() | dict(stored_tensors(model, tables)))
    if is_offloaded(model):
        offload_like(plain, model, {})
    for name, parameter in plain.named_parameters():
        parameter.requires_grad_(model.get_parameter(name).requires_grad)
    return plain


def _entries(config: PretrainedConfig) -> SizeEntries:
    entries = ARCHITECTURES[config.model_type].size_entries
    if entries is None:
        raise UserError(
            f"the configuration of a {config.model_type} model has no single entry for the number "
            "of neurons, so --uniform (uniform=True) cannot make a plain model; leave it out"
        )
    return entries


def _removes_heads(config: PretrainedConfig, counts: set[int]) -> bool:
    """Whether a layer has fewer heads than the configuration of the model names."""
    rows = [row for stack in ARCHITECTURES[config.model_type].stacks for row in stack.sublayers]
    return counts != {1 if any(row.one_unit for row in rows) else config.num_attention_heads}


def _counts(layout: Layout, kind: str) -> set[int]:
    """The numbers of units of one kind that layers have.

    Raises:
        UserError: a layer has none.
    """
    found = [block for block in layout.blocks if block.kind == kind]
    if len({block.layer for block in found}) < len(layout.layers):
        raise UserError(
            f"this model has layers without {kind}s, which a plain model cannot have; leave out "
            "--uniform (uniform=True)"
        )
    return {block.num_units for block in found}


def _resized(config: PretrainedConfig, heads: int, neurons: int) -> PretrainedConfig:
    """A copy with other sizes, and without the entries that pruning adds."""
    entries, resized = _entries(config), original_config(config)
    setattr(resized, entries.neurons, neurons)
    if entries.heads:
        width = getattr(config, "head_dim", None)
        resized.head_dim = width or config.hidden_size // config.num_attention_heads
        units = getattr(config, entries.heads[0])
        for name in entries.heads:
            setattr(resized, name, getattr(config, name) * heads // units)
    return resized


def _is_valid(config: PretrainedConfig, heads: int) -> bool:
    """Whether the configuration's own checks, made when it is loaded, accept a number of heads."""
    try:
        type(config).from_dict(_resized(config, heads, 1).to_dict())
    except (StrictDataclassError, ValueError):
        return False
    return True
