"""From rows of text, words or images to model inputs: one encoder per kind of task."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from rfprune.tasks.image_classification import encode_images
from rfprune.tasks.language_modeling import encode_blocks
from rfprune.tasks.max_length import checked_length
from rfprune.tasks.multiple_choice import encode_choices
from rfprune.tasks.question_answering import encode_questions
from rfprune.tasks.registry import Kind, Task
from rfprune.tasks.seq2seq import encode_sources
from rfprune.tasks.similarity import encode_pairs
from rfprune.tasks.token_classification import encode_words

# Rows tokenised at a time: enough to use the tokenizer's threads without much memory.
ROWS_AT_A_TIME = 4096

Encoder = Callable[[Task, Any, Any, int | None], dict[str, Any]]
"""From a task, its tokenizer or image processor, a chunk of data and the maximum length to columns
of model inputs."""


def encode(task: Task, tokenizer: Any, dataset: Any, max_length: int | None = None) -> Any:
    """Tokenise a dataset, truncated and not padded.

    Args:
        task: see `rfprune.tasks.registry`.
        tokenizer: or the image processor.
        dataset: a split from `rfprune.tasks.splits.load_split`.
        max_length: tokens per row; None: the task's own.

    Returns:
        A `datasets.Dataset` with a row per example; per window in question answering, per text in
        similarity, per block in language modelling. Columns: input_ids, attention_mask and
        possibly token_type_ids, or image; with labels in the dataset also `labels`. Question
        answering has start_positions and end_positions instead, token indices, both at the CLS
        token if the window has no answer; token classification has token_labels.

    Raises:
        UserError: the tokenizer does not allow the length.
    """
    from datasets import Dataset, concatenate_datasets

    if task.kind == "language-modeling":
        length = checked_length(task, tokenizer, max_length)
        return Dataset.from_dict(encode_blocks(tokenizer, dataset[task.text_columns[0]][:], length))
    encoder = ENCODERS[task.kind]
    chunks = []
    for first in range(0, len(dataset), ROWS_AT_A_TIME):
        chunk = dataset[first : first + ROWS_AT_A_TIME]
        chunks.append(Dataset.from_dict(encoder(task, tokenizer, chunk, max_length)))
    return concatenate_datasets(chunks)


def encode_sentences(
    task: Task, tokenizer: Any, chunk: Any, max_length: int | None
) -> dict[str, Any]:
    """Columns of tokenised sentences or sentence pairs."""
    length = checked_length(task, tokenizer, max_length)
    texts = [chunk[name] for name in task.text_columns]
    columns = dict(tokenizer(*texts, truncation=True, max_length=length))
    if task.label_column in chunk:
        columns["labels"] = chunk[task.label_column]
    return columns


ENCODERS: Mapping[Kind, Encoder] = MappingProxyType(
    {
        "classification": encode_sentences,
        "regression": encode_sentences,
        "multi-label": encode_sentences,
        "multiple-choice": encode_choices,
        "token-classification": encode_words,
        "image-classification": encode_images,
        "question-answering": encode_questions,
        "similarity": encode_pairs,
        "seq2seq": encode_sources,
    }
)
