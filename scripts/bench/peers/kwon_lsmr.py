"""The solver of Kwon et al. 2022 for the scales of their mask tuning (section 4.3).

Their code solves the normal equations by LSMR, with a damping term and its default tolerances. The
package has the exact solution of the same problem (`rfprune.stages.least_squares.solve_scales`).
"""

from __future__ import annotations

import torch
from scipy.sparse.linalg import lsmr
from torch import Tensor


def solve_by_lsmr(gram: Tensor, residual: Tensor, damping: float) -> Tensor:
    """Changes of the scales (U,); see `rfprune.stages.least_squares.DampedSolver`."""
    return torch.from_numpy(lsmr(gram.cpu().numpy(), residual.cpu().numpy(), damp=damping)[0])
