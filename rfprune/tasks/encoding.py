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
from rfprune.tasks.similarity import encode_pairs
from rfprune.tasks.token_classification import encode_words

# Rows tokenised at a time: enough for the tokenizer's threads, little as Python objects.
ROWS_AT_A_TIME = 4096

Encoder = Callable[[Task, Any, Any, int | None], dict[str, Any]]
"""From a task, its tokenizer or image processor, a chunk of data and the tokens a row to columns of
model inputs."""


def encode(task: Task, tokenizer: Any, dataset: Any, max_length: int | None = None) -> Any:
    """Tokenise into a `datasets.Dataset`, truncated and not padded, one row an example.

    Question answering gives one row a window of the context (see `tokenize_windows`), similarity
    one row a text, language modelling one row a block. Columns: input_ids, attention_mask,
    token_type_ids where the tokenizer makes them, and, where the dataset has them, labels
    (question answering: start_positions and end_positions, token indices; both the CLS token where
    the window has no answer; token classification: token_labels). Images are a column `image`.
    `max_length` in tokens; the task's own if None. UserError where the tokenizer does not allow it.
    """
    from datasets import Dataset, concatenate_datasets

    if task.kind == "language-modeling":
        length = checked_length(task, tokenizer, max_length)
        return Dataset.from_dict(encode_blocks(tokenizer, dataset[task.text_columns[0]][:], length))
    rows_of = ENCODERS[task.kind]
    chunks = []
    for first in range(0, len(dataset), ROWS_AT_A_TIME):
        chunk = dataset[first : first + ROWS_AT_A_TIME]
        chunks.append(Dataset.from_dict(rows_of(task, tokenizer, chunk, max_length)))
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
    }
)
