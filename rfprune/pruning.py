"""prune(): the method on one page.

    collect   statistics of the model over the calibration batches (once for all constraints)
    choose    the units to keep within the budget of the constraint
    compact   remove all other units from a copy of the model
    fit       the weights that are left, by least squares against the original
    sparsify  set single weights to zero within the layers that are left, if asked to

`rfprune.methods` says what each method collects and how it chooses and fits; the mathematics is in
`rfprune.stages`. The model that is given is never changed: masks act through hooks that are removed
afterwards, and the student is a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedModel

from rfprune import distributed
from rfprune.cost.constraint import Constraint, CostModel
from rfprune.cost.limits import exact_costs
from rfprune.cost.macs import mac_costs
from rfprune.cost.memory import total_bytes
from rfprune.cost.params import total_params
from rfprune.cost.sizes import Sizes
from rfprune.errors import UserError
from rfprune.latency.profile import load_or_profile
from rfprune.latency.promise import LatencyPromise, meet_latency, missed_latency_warnings
from rfprune.latency.speedup import measure_ratio
from rfprune.latency.table import LatencyTable
from rfprune.latency.timed_batch import timed_batch
from rfprune.methods.budget import check_constraints, cost_model
from rfprune.methods.depth import DepthSearch, Selection, compare_layers
from rfprune.methods.problem import Problem, prepare_problem
from rfprune.methods.sparsity import add_zeros
from rfprune.methods.statistics import Statistics, collect_statistics
from rfprune.methods.unfinished import unfinished_folder
from rfprune.model.batch import Batch, mean_decoder_tokens, mean_tokens
from rfprune.model.compact import compact, unpruned_copy
from rfprune.model.frozen import default_torch_state, frozen
from rfprune.model.masks import Masks, compose_masks, full_masks, num_kept, scale_kept_units
from rfprune.model.plain import to_plain
from rfprune.model.residency import execution_device
from rfprune.result import PruneResult, units_of_layers
from rfprune.settings import Settings
from rfprune.stages.depth import StackOfLayers
from rfprune.stages.map_inputs import maps_of_layers
from rfprune.stages.objective import Loss


def prune(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraint: Constraint | Sizes | float | None,
    settings: Settings | None = None,
    *,
    loss: Loss | None = None,
    latency_table: LatencyTable | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> PruneResult:
    """Prune a fine-tuned Transformer to a constraint, without retraining.

    Args:
        model: a model of a supported type with any head, or none. It is left untouched, also after
            an error. Wrappers of torch.compile, accelerate and Trainer are ignored, and so is
            autocast: the result is that of the plain model.
        batches: calibration batches, as a data collator makes them: input_ids (B, S), or
            pixel_values (B, C, H, W) of images, or input_values (B, samples) of audio, or
            input_features (B, frequencies, frames) of spectrograms; attention_mask, and the model's
            other inputs. Labels are not needed. Read once.
        constraint: the fraction of the original cost to keep; a bare number is a fraction of MACs.
            `Sizes` give the heads and neurons of every layer instead. None keeps all heads and
            neurons, for `Settings(sparsity=...)` alone.
        settings: method and options; the default is `Settings()`.
        loss: a function of the model's outputs and a batch, labels included, that returns one loss
            per example (B,), or their mean. Its gradients replace those of the model's own
            predictions, and the cache is not used. The model is called without labels. The first
            batch is also used to check the loss.
        latency_table: for a constraint on latency; without one the model is profiled first, on a
            batch of median length.
        cache: a folder for the collected statistics, which other constraints and runs reuse; None
            for no cache.
        progress: show progress bars.

    Returns:
        The smaller model, its masks, the costs that were achieved, and warnings.

    Raises:
        UserError: the model type is not supported, the constraint cannot be met, an argument is
            wrong, the model cannot run on a batch, or weights or gradients are not finite. All but
            the last are checked before statistics are collected.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from rfprune import Constraint, prune
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                     intermediate_size=64, vocab_size=100)
        >>> model = BertForSequenceClassification(config)
        >>> batches = [{"input_ids": torch.randint(0, 100, (8, 16))} for _ in range(4)]
        >>> result = prune(model, batches, Constraint("mac", 0.5))
        >>> result.achieved["mac"] <= 0.5
        True

    Sources:
        The method "kwon" is Kwon et al. 2022, "A Fast Post-Training Pruning Framework for
        Transformers" (arXiv 2204.09656). `rfprune.methods.curvature` and `rfprune.methods.criteria`
        name the sources of the other methods.
    """
    wanted = _wanted(constraint, settings)
    problem = prepare_problem(
        model,
        batches,
        Settings() if settings is None else settings,
        loss=loss,
        latency_table=latency_table,
        cache=cache,
        progress=progress,
    )
    return next(prune_to_each(problem, [wanted]))


def prune_family(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    constraints: Iterable[Constraint | Sizes | float | None],
    settings: Settings | None = None,
    *,
    loss: Loss | None = None,
    latency_table: LatencyTable | None = None,
    cache: str | Path | None = None,
    progress: bool = False,
) -> Iterator[PruneResult]:
    """Prune to several constraints with one collection of statistics.

    Args:
        constraints: a list, or an iterator, of what `prune` takes. An iterator is advanced only
            after the previous result has been used, so a search can choose the next constraint by
            the results so far.

    The other arguments and the errors are those of `prune`.

    Yields:
        One result per constraint, in their order, each the same as `prune` returns.

    Example:
        >>> import torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from rfprune import Constraint, prune_family
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ...                     intermediate_size=64, vocab_size=100)
        >>> model = BertForSequenceClassification(config)
        >>> batches = [{"input_ids": torch.randint(0, 100, (8, 16))} for _ in range(4)]
        >>> constraints = [Constraint("mac", 0.7), Constraint("mac", 0.4)]
        >>> [result.constraint.ratio for result in prune_family(model, batches, constraints)]
        [0.7, 0.4]
    """
    if isinstance(constraints, Constraint | str) or not isinstance(constraints, Iterable):
        raise UserError(
            f"constraints is a single {type(constraints).__name__}; give a list, such as "
            "[Constraint('mac', 0.5)]"
        )
    wanted: Iterable[Target] = (_wanted(one, settings) for one in constraints)
    if isinstance(constraints, Sequence):  # an iterator is asked one by one
        wanted = list(wanted)
    problem = prepare_problem(
        model,
        batches,
        Settings() if settings is None else settings,
        loss=loss,
        latency_table=latency_table,
        cache=cache,
        progress=progress,
    )
    yield from prune_to_each(problem, wanted)


Target = Constraint | Sizes | None
"""What a model is pruned to; None where all units stay."""


def _wanted(constraint: Constraint | Sizes | float | None, settings: Settings | None) -> Target:
    """A constraint or sizes; None where something else than the removal of units is asked for."""
    if isinstance(constraint, Sizes):
        chosen = Settings() if settings is None else settings
        limits = chosen.protect or chosen.min_heads or chosen.min_neurons
        if limits or chosen.uniform or chosen.depth != "off":
            raise UserError(
                "sizes say what every layer keeps, so protect, min_heads, min_neurons, uniform and "
                "depth do nothing: leave them out"
            )
        return constraint
    if constraint is None and getattr(settings, "sparsity", None) is not None:
        return None
    return Constraint.of(constraint)


Collect = Callable[[Problem], Statistics]


def prune_to_each(
    problem: Problem, constraints: Iterable[Target], *, collect: Collect | None = None
) -> Iterator[PruneResult]:
    """Prune to several constraints; `prune_family` for a caller who has prepared the problem.

    The caller's torch state (autocast, inference mode, ...) holds between two results.

    Args:
        collect: collects the statistics, which choose units and fit weights, of another method
            than `Settings.method`; None for that method.
    """
    is_list = isinstance(constraints, Sequence)
    known = [one for one in constraints if one is not None] if is_list else []
    ratios = [one for one in known if isinstance(one, Constraint)]
    device = execution_device(problem.model)
    with default_torch_state(device):
        if problem.settings.sparsity is not None:
            maps_of_layers(problem.model, problem.layout)
        problem = _with_latency_table(problem, ratios)
        check_constraints(problem, ratios)
        for sizes in known:
            if isinstance(sizes, Sizes):
                sizes.kept(problem.layout)
        statistics = None
        if known or not is_list:
            statistics = (collect or collect_statistics)(problem)
        stacks: list[StackOfLayers] = []
        if statistics is not None and problem.settings.depth != "off":
            stacks = compare_layers(problem, statistics)
    for constraint in constraints:
        with default_torch_state(device):
            if isinstance(constraint, Constraint):
                check_constraints(problem, [constraint])  # an iterator gives them one by one
            result = _prune(problem.with_own_timer(), statistics, stacks, constraint)
        yield result


def _with_latency_table(problem: Problem, constraints: Sequence[Constraint]) -> Problem:
    """Profile the model if a constraint needs that and no table was given."""
    needed = any(constraint.metric == "latency" for constraint in constraints)
    if not needed or problem.latency_table is not None:
        return problem
    table = load_or_profile(
        None,
        problem.model,
        problem.layout,
        problem.inputs,
        round_to=problem.settings.round_to,
        progress=problem.progress,
    )
    return replace(problem, latency_table=table)


def _prune(
    problem: Problem,
    statistics: Statistics | None,
    stacks: Sequence[StackOfLayers],
    constraint: Target,
) -> PruneResult:
    """Remove units to meet a constraint, if there is one, and set weights to zero, if asked to."""
    settings, timer = problem.settings, problem.timer
    student, masks = problem.model, full_masks(problem.layout)
    promise, zeros, warnings = None, None, list[str]()
    removed: tuple[int, ...] = ()
    if constraint is None or statistics is None:
        student = unpruned_copy(student)
    else:
        student, kept, promise, warnings = _remove_units(problem, statistics, stacks, constraint)
        masks, removed = kept.masks, kept.removed
    if settings.uniform:
        student = to_plain(student)
    if settings.sparsity is not None:
        with timer.stage("sparsify"), frozen(student):
            zeros, failures = add_zeros(problem, student)
        warnings += failures
    latency = {"latency": promise.measured} if promise else {}
    return PruneResult(
        model=student,
        masks=masks,
        layout=problem.layout,
        removed_layers=removed,
        constraint=constraint if isinstance(constraint, Constraint) else None,
        achieved=_achieved(problem, student, masks) | latency,
        seconds=timer.report(),
        warnings=(*problem.warnings, *warnings),
        layers=tuple(units_of_layers(problem.layout, num_kept(masks))),
        mean_tokens=mean_tokens(problem.batches),
        importance=None if statistics is None else statistics.importance,
        curves=None if statistics is None else statistics.curves,
        cached=tuple(sorted(timer.cached)),
        promise=promise,
        sparsity=zeros,
    )


def _remove_units(
    problem: Problem,
    statistics: Statistics,
    stacks: Sequence[StackOfLayers],
    constraint: Constraint | Sizes,
) -> tuple[PreTrainedModel, Selection, LatencyPromise | None, list[str]]:
    """Prune to a constraint in one or more rounds; each starts from the student of the last.

    Sizes are reached in one round. Layers are removed in the only round, if at all.

    Returns:
        The student; what is kept of the original, with scales of its units; and warnings.
    """
    settings, timer = problem.settings, problem.timer
    student, masks = problem.model, full_masks(problem.layout)
    kept, promise, warnings = Selection(masks), None, list[str]()
    for number, target in enumerate(_targets(constraint, settings.rounds)):
        current = problem if number == 0 else problem.with_model(student)
        collected = statistics if number == 0 else collect_statistics(current)
        search = DepthSearch(current, collected, stacks)
        kept, promise = _choose(problem, search, masks, target)
        with timer.stage("compact"):
            unfinished = unfinished_folder(current, kept.masks, kept.removed)
            folder = None if unfinished is None else unfinished.path
            student = compact(
                current.model, current.layout, kept.masks, kept.removed, folder=folder
            )
            masks = compose_masks(problem.layout, masks, current.layout, kept.masks)
        warnings = missed_latency_warnings(promise)
        if settings.tune:
            with timer.stage("tune"), frozen(problem.model), frozen(student):
                scales, failures = statistics.fit(problem, student, target, kept.removed)
                masks = scale_kept_units(problem.layout, masks, scales)
            warnings += failures
        if unfinished is not None:
            unfinished.remove_with(student)
    return student, Selection(masks, kept.removed), promise, warnings


def schedule(ratio: float, rounds: int) -> list[float]:
    """The ratio after each round: every round removes the same fraction of what is left."""
    return [ratio ** (i / rounds) for i in range(1, rounds)] + [ratio]


def _targets(constraint: Constraint | Sizes, rounds: int) -> list[Constraint | Sizes]:
    """What the model is pruned to in each round."""
    if isinstance(constraint, Sizes):
        return [constraint]
    return [Constraint(constraint.metric, one) for one in schedule(constraint.ratio, rounds)]


def _choose(
    problem: Problem, search: DepthSearch, masks: Masks, constraint: Constraint | Sizes
) -> tuple[Selection, LatencyPromise | None]:
    """Choose the units and layers to keep; a constraint on latency is measured and corrected.

    Args:
        problem: the original model's, to which the constraint refers.
        search: with problem and statistics of the model as pruned so far.
        masks: of the original's units, as pruned so far.

    Returns:
        What is kept of the current model.
    """
    current = search.problem
    if isinstance(constraint, Sizes):
        costs = exact_costs(problem.layout, constraint.kept(problem.layout))
        return Selection(search.statistics.choose_units(current, costs, 0.0)), None
    costs = cost_model(problem, constraint.metric)
    consumers = [block.consumer for block in problem.layout.blocks]
    places = [consumers.index(block.consumer) for block in current.layout.blocks]
    num_units = [block.num_units for block in current.layout.blocks]

    def choose(costs: CostModel, budget: float) -> Selection:
        return search.choose(constraint, costs.select_blocks(places, num_units), budget)

    if constraint.metric != "latency":
        return choose(costs, costs.budget(constraint)), None

    def measure(kept: Selection) -> tuple[float, float]:
        with problem.timer.stage("verify"), frozen(problem.model):
            small = compact(current.model, current.layout, kept.masks, kept.removed)
            batch = timed_batch(problem.inputs, problem.latency_table)
            return distributed.broadcast_from_main(
                lambda: measure_ratio(problem.model, small, batch)
            )

    def kept_of_original(kept: Selection) -> tuple[int, ...]:
        return num_kept(compose_masks(problem.layout, masks, current.layout, kept.masks))

    return meet_latency(costs, constraint, choose, measure, kept_of_original, _removed_layers)


def _removed_layers(kept: Selection) -> tuple[int, ...]:
    return kept.removed


def _achieved(problem: Problem, student: PreTrainedModel, masks: Masks) -> dict[str, float]:
    """Costs of the student as fractions of the original's, by metric."""
    tokens, decoder_tokens = mean_tokens(problem.batches), mean_decoder_tokens(problem.batches)
    macs = mac_costs(problem.layout, tokens, decoder_tokens)
    return {
        "mac": macs.total(num_kept(masks)) / macs.original,
        "params": total_params(student) / total_params(problem.original),
        "memory": total_bytes(student) / total_bytes(problem.original),
    }
