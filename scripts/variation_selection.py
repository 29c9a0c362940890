"""What the variations of `scripts/variations.py` select units by, beyond the package's stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.model.layout import Block, Layout
from rfprune.model.masks import Masks, frozen
from rfprune.model.replay import Batch, token_mask
from rfprune.stages.curvature import Curvature
from rfprune.stages.objective import fisher_factors
from rfprune.stages.obs import _root

SWAP_PASSES = 40
"""Of `swap_units`, at most."""


def summed_and_weighted(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch], seed: int
) -> tuple[tuple[Curvature, ...], tuple[Curvature, ...]]:
    """What `collect_curvature` collects, with G from gradients summed over each example's tokens,
    and with A weighted by each token's squared gradient (weights of mean 1)."""
    generator = torch.Generator().manual_seed(seed)
    summed, weighted = [
        [Curvature(*(torch.zeros(()),) * 3) for _ in layout.blocks] for _ in range(2)
    ]
    for batch in batches:
        tokens = token_mask(batch)
        seen: list[tuple[Tensor, Tensor]] = []
        with frozen(model), ExitStack() as stack:
            for block in layout.blocks:
                consumer = model.get_submodule(block.consumer)
                stack.callback(consumer.register_forward_hook(_to_differentiate(seen)).remove)
            factors = fisher_factors(model(**batch), batch, model.config, generator)
            leaving = [output for _, output in seen]
            gradients = [
                torch.autograd.grad(factor.sum(), leaving, retain_graph=True) for factor in factors
            ]
        for i, (features, _) in enumerate(seen):
            features = features[tokens].float()
            of_block = [of_factor[i].float() * tokens[..., None] for of_factor in gradients]
            weight = torch.stack([g[tokens].square().sum(1) for g in of_block]).sum(0)[:, None]
            for moments, factor in ((summed[i], torch.ones_like(weight)), (weighted[i], weight)):
                moments.input_moment = moments.input_moment + (features * factor).T @ features
                moments.input_sum = moments.input_sum + (features * factor).sum(0)
                moments.tokens += len(features)
                moments.examples += len(tokens)
            for g in of_block:
                total, flat = g.sum(1), g[tokens]
                summed[i].gradient_moment = summed[i].gradient_moment + total.T @ total
                weighted[i].gradient_moment = weighted[i].gradient_moment + flat.T @ flat
    for moments in weighted:  # the trace of G is the sum of all weights
        factor = moments.tokens / moments.gradient_moment.trace()
        moments.input_moment, moments.input_sum = (
            factor * moments.input_moment,
            factor * moments.input_sum,
        )
    return tuple(summed), tuple(weighted)


def _to_differentiate(
    seen: list[tuple[Tensor, Tensor]],
) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        seen.append((inputs[0].detach(), output))
        return output

    return hook


def block_error(inputs: Tensor, rooted: Tensor, kept: Tensor) -> float:
    """Error of keeping the features `kept` (n,), the weights compensating as well as they can.

    Args:
        inputs: A (p, p) float64. rooted: R·W (r, p) float64, with RᵀR = G.
    """
    crossed = rooted @ inputs
    total = float((crossed * rooted).sum())
    if not len(kept):
        return total
    factor = torch.linalg.cholesky(inputs[kept][:, kept])
    explained = torch.linalg.solve_triangular(factor, crossed[:, kept].T, upper=False)
    return total - float(explained.square().sum())


def swap_units(
    inputs: Tensor, weight: Tensor, gradients: Tensor, mask: Tensor, unit_width: int
) -> tuple[Tensor, float, float]:
    """Exchange kept and removed units while the exact block error falls.

    Args:
        inputs: A (p, p) float64, positive definite. weight: W (d, p). gradients: G (d, d).
        mask: (U,), ones for the units to start from.

    Returns:
        The new mask (U,) of as many ones, and the error before and after.
    """
    rooted = _root(gradients.double()) @ weight.double()
    better = mask.clone()
    before = error = _mask_error(inputs, rooted, better, unit_width)
    if 0 < mask.sum() < len(mask):
        step = _swap_neurons if unit_width == 1 else _swap_heads
        for _ in range(SWAP_PASSES):
            found = step(inputs, rooted, better, unit_width, error)
            if found is None:
                break
            better, error = found
    return better, before, error


def _mask_error(inputs: Tensor, rooted: Tensor, mask: Tensor, unit_width: int) -> float:
    features = mask.repeat_interleave(unit_width).nonzero().flatten()
    return block_error(inputs, rooted, features)


def _swap_heads(
    inputs: Tensor, rooted: Tensor, mask: Tensor, unit_width: int, error: float
) -> tuple[Tensor, float] | None:
    """The best of all single exchanges, tried one by one; None if none lowers the error."""
    best: tuple[Tensor, float] | None = None
    for leaving in mask.nonzero().flatten().tolist():
        for entering in (mask == 0).nonzero().flatten().tolist():
            tried = mask.clone()
            tried[leaving], tried[entering] = 0.0, 1.0
            seen = _mask_error(inputs, rooted, tried, unit_width)
            if seen < (error * (1 - 1e-9) if best is None else best[1]):
                best = tried, seen
    return best


def _swap_neurons(
    inputs: Tensor, rooted: Tensor, mask: Tensor, _: int, error: float
) -> tuple[Tensor, float] | None:
    """As many of the best exchanges at once as lower the error together; None if none does.

    The change of every single exchange is exact: with H = [A_KK]⁻¹ and the compensated weights V
    of the kept neurons K, a neuron r that comes back explains |t_r|²/s_r (t_r: what V leaves
    unexplained along r, s_r: its Schur complement), and then k costs |V_k|²/H_kk as updated by r.
    """
    kept, gone = mask.nonzero().flatten(), (mask == 0).nonzero().flatten()
    crossed = rooted @ inputs
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(inputs[kept][:, kept]))
    values = crossed[:, kept] @ inverse  # V (r, K)
    between = inputs[kept][:, gone]
    left = crossed[:, gone] - values @ between  # t (r, R)
    mixed = inverse @ between  # (K, R)
    schur = inputs.diagonal()[gone] - (between * mixed).sum(0)  # s (R,)
    energy = left.square().sum(0)
    share = mixed / schur
    cost = values.square().sum(0)[:, None] - 2 * share * (values.T @ left) + share**2 * energy
    change = cost / (inverse.diagonal()[:, None] + share * mixed) - energy / schur  # (K, R)
    best, leaving = change.min(0)
    pairs, used = list[tuple[int, int]](), set[int]()
    for entering in best.argsort().tolist():
        if best[entering] >= -1e-9 * error:
            break
        if int(leaving[entering]) not in used:
            used.add(int(leaving[entering]))
            pairs.append((int(leaving[entering]), entering))
    number = len(pairs)
    while number:
        tried = mask.clone()
        tried[kept[[pair[0] for pair in pairs[:number]]]] = 0.0
        tried[gone[[pair[1] for pair in pairs[:number]]]] = 1.0
        seen = _mask_error(inputs, rooted, tried, 1)
        if seen < error:
            return tried, seen
        number //= 2
    return None


def query_key_moments(
    model: PreTrainedModel, layout: Layout, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Second moments (heads, width, width) float64 of what queries and keys are, by module path;
    of keys about the mean over an example's tokens, since softmax does not see that mean."""
    found: dict[str, Tensor] = {}
    blocks = [block for block in layout.blocks if block.kind == "head"]
    for batch in batches:
        tokens = token_mask(batch)[..., None]

        def note(path: str, block: Block, tokens: Tensor = tokens) -> Callable[..., None]:
            def hook(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
                values = output.detach() * tokens
                if path == block.producers[1].path:
                    mean = values.sum(1, keepdim=True) / tokens.sum(1, keepdim=True)
                    values = (values - mean) * tokens
                heads = values.flatten(0, 1).double().unflatten(1, (-1, block.unit_width))
                moment = torch.einsum("thi,thj->hij", heads, heads)
                found[path] = found[path] + moment if path in found else moment

            return hook

        with torch.no_grad(), ExitStack() as stack:
            for block in blocks:
                for path in (producer.path for producer in block.producers[:2]):
                    handle = model.get_submodule(path).register_forward_hook(note(path, block))
                    stack.callback(handle.remove)
            model(**batch)
    count = sum(int(token_mask(batch).sum()) for batch in batches)
    return {path: moment / count for path, moment in found.items()}


def low_rank_scores(
    student: PreTrainedModel,
    layout: Layout,
    masks: Masks,
    moments: dict[str, Tensor],
    left: float,
) -> tuple[int, float]:
    """Give the bilinear forms q·k of all kept heads together a fraction `left` of their ranks.

    With C = L·Lᵀ the second moments of queries and keys, the error of a form B is
    |L_qᵀ·(B - I)·L_k|²: the best B of a rank falls out of the singular values of L_qᵀ·L_k.

    Returns:
        The number of dimensions that went, and the fraction of the scores' energy that did.
    """
    forms = []
    for block, mask in zip(layout.blocks, masks, strict=True):
        if block.kind == "head":
            query, key = (moments[producer.path] for producer in block.producers[:2])
            for place, head in enumerate(mask.nonzero().flatten().tolist()):
                roots = [_lower(moment[head]) for moment in (query, key)]
                forms.append((block, place, roots, torch.linalg.svd(roots[0].T @ roots[1])))
    if not forms:
        return 0, 0.0
    energies = torch.stack([svd.S.square() for *_, svd in forms])  # (heads, width)
    removed = round((1 - left) * energies.numel())
    cut = torch.zeros(energies.numel(), dtype=torch.bool)
    cut[energies.flatten().argsort()[:removed]] = True
    for (block, place, (query, key), svd), gone in zip(forms, cut.view_as(energies), strict=True):
        values = svd.S.masked_fill(gone, 0.0)
        middle = (svd.U * values) @ svd.Vh
        form = torch.linalg.solve(query.T, middle) @ torch.linalg.inv(key)  # B
        layer = student.get_submodule(block.producers[0].path)
        rows = slice(place * block.unit_width, (place + 1) * block.unit_width)
        with torch.no_grad():  # (B·k)·q = k·(Bᵀ·q)
            layer.weight[rows] = (form.T @ layer.weight[rows].double()).to(layer.weight)
            layer.bias[rows] = (form.T @ layer.bias[rows].double()).to(layer.bias)
    return removed, float(energies.flatten()[cut].sum() / energies.sum())


def _lower(moment: Tensor) -> Tensor:
    """L (n, n) with L·Lᵀ = the moment, a millionth of its diagonal added."""
    jitter = 1e-6 * float(moment.diagonal().mean()) + 1e-30
    factor: Tensor = torch.linalg.cholesky(moment + jitter * torch.eye(len(moment)).double())
    return factor
