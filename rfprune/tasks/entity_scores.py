"""Precision, recall and F1 of named entities, from one tag per word (B-PER, I-PER, O, ...).

An entity counts as found if its first word, last word and type are all right, as in the CoNLL-2000
script (Tjong Kim Sang and Buchholz 2000). These thirty lines replace the package seqeval, whose
default mode gives the same numbers: it has had no release since 2020 and no wheel.
"""

import re
from collections.abc import Sequence

Span = tuple[int, int, int, str]
"""An entity: its row, its first word, its last word, its type."""

_TAG = re.compile(r"([BIES])-(.+)")
_OUTSIDE = ("O", "")


def names_entities(label_names: Sequence[str]) -> bool:
    """Whether these labels tag parts of entities, such as B-PER, I-PER and O."""
    return any(map(_TAG.fullmatch, label_names)) and all(
        name in _OUTSIDE or _TAG.fullmatch(name) for name in label_names
    )


def entity_scores(
    predictions: Sequence[Sequence[str]], references: Sequence[Sequence[str]]
) -> dict[str, float]:
    """`f1`, `precision` and `recall` of the entities in rows of tags, as fractions of 1.

    A score without a denominator (no entity predicted, or none in the references) is 0.
    """
    found, wanted = entity_spans(predictions), entity_spans(references)
    right = len(found & wanted)
    precision, recall = (right / len(spans) if spans else 0.0 for spans in (found, wanted))
    f1 = 2 * right / (len(found) + len(wanted)) if found or wanted else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def entity_spans(rows: Sequence[Sequence[str]]) -> set[Span]:
    """The entities in rows of tags.

    An entity begins at B or S, at a change of type, after E or S, and after O. It ends before the
    next one begins, before O, and at the end of its row.
    """
    spans: set[Span] = set()
    for row, names in enumerate(rows):
        start, previous = 0, _OUTSIDE
        for word, (part, kind) in enumerate([*map(_part_and_type, names), _OUTSIDE]):
            begins = part != "O" and (part in "BS" or previous[0] in "OES" or kind != previous[1])
            if previous[0] != "O" and (begins or part == "O"):
                spans.add((row, start, word - 1, previous[1]))
            start, previous = (word if begins else start), (part, kind)
    return spans


def _part_and_type(name: str) -> tuple[str, str]:
    match = _TAG.fullmatch(name)
    return (match[1], match[2]) if match else _OUTSIDE
