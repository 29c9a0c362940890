"""The solver of Kwon et al. 2022 for the scales of their mask tuning (section 4.3).

Their code solves the normal equations by LSMR, with a damping term and its default tolerances. The
package has the exact solution of the same problem (`rfprune.stages.least_squares.solve_scales`).
"""

from __future__ import annotations

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor

from rfprune.stages.least_squares import Moments, NumericalFailure, scale_system


def lsmr_scales(
    moments: Moments,
    weight: Tensor,
    bias: Tensor | None,
    unit_width: int,
    damping: float,
    limit: float,
) -> Tensor:
    """Scales (U,) in float64; arguments and exceptions are those of `solve_scales`."""
    gram, residual = scale_system(moments, weight, bias, unit_width)
    change = lsmr(gram.cpu().numpy(), residual.cpu().numpy(), damp=damping)[0]
    scales = 1 + torch.from_numpy(change)
    if not bool((scales.abs() <= limit).all()):
        raise NumericalFailure(f"a scale of {float(scales.abs().max()):.3g} is beyond ±{limit:g}")
    return scales
