"""Scores of written texts: chrF and BLEU by sacrebleu, ROUGE by rouge-score.

chrF (Popovic 2015) and BLEU (Papineni et al. 2002) are no means over texts: they are computed from
counts that are summed over all of them. A score of some of the texts needs only the sum of their
counts, so a bootstrap counts once. ROUGE (Lin 2004) is a mean over texts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROUGE = ("rouge1", "rouge2", "rougeL")


def translation_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """`chrf` and `bleu` in points of 100, as sacrebleu computes them by default."""
    return {
        name: float(_counting(name).corpus_score(list(predictions), [list(references)]).score)
        for name in ("chrf", "bleu")
    }


def rouge_scores(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """The mean F-measures of `rouge1`, `rouge2` and `rougeL`, as fractions of 1."""
    means = _rouge_of_each(predictions, references).mean(axis=0)
    return dict(zip(ROUGE, means.tolist(), strict=True))


def score_of_rows(
    name: str, predictions: Sequence[str], references: Sequence[str]
) -> Callable[[NDArray[np.int64]], float]:
    """A function from row numbers, which may repeat, to a score in points of 100.

    Args:
        name: chrf, bleu, rouge1, rouge2 or rougeL.
        predictions: N texts.
        references: those that they should be.
    """
    if name in ROUGE:
        each = _rouge_of_each(predictions, references)[:, ROUGE.index(name)]
        return lambda rows: 100.0 * float(each[rows].mean())
    metric = _counting(name)
    counts = np.array(metric._extract_corpus_statistics(list(predictions), [list(references)]))
    return lambda rows: float(metric._aggregate_and_compute([counts[rows].sum(0).tolist()]).score)


def _counting(name: str) -> Any:
    """A metric of sacrebleu; it does not warn about texts that look tokenised already."""
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return CHRF() if name == "chrf" else BLEU(force=True)


def _rouge_of_each(predictions: Sequence[str], references: Sequence[str]) -> NDArray[np.float64]:
    """F-measures (N, 3) of words without their endings, as in the metric `rouge` of evaluate."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(ROUGE, use_stemmer=True)
    pairs = zip(references, predictions, strict=True)
    found = [scorer.score(reference, prediction) for reference, prediction in pairs]
    return np.array([[one[name].fmeasure for name in ROUGE] for one in found])
