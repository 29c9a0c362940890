"""From a task's data, on disk or on the hub, to padded batches of tokens.

Local data is read into memory and checked as a whole before anything else happens; what is wrong
with it is a UserError that names the file and the row (counted from 1).
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rfprune.errors import UserError
from rfprune.tasks import hub
from rfprune.tasks.checks import checked_columns
from rfprune.tasks.files import EXTENSIONS, Table, first_line, read_table, table_of
from rfprune.tasks.registry import CUSTOM, Task

# Rows tokenised at a time: enough for the tokenizer's threads, little as Python objects.
ROWS_AT_A_TIME = 4096
# A question keeps at most this part of the window, so that there is always room for context.
QUESTION_SHARE = 3
# Names of a folder's content shown in an error.
SHOWN_NAMES = 20
_KEPT_AS_THEY_ARE = ("id", "idx")
_POSITIONS = ("start_positions", "end_positions")
_LABELS = ("labels", *_POSITIONS)


def load_split(
    task: Task, split: str, data_dir: Path | None, *, labels_required: bool = True
) -> Any:
    """One split of a task as a `datasets.Dataset` in memory: texts, label, and id or idx if any.

    From DATA_DIR/TASK/SPLIT.{parquet,csv,tsv,jsonl,json} (`custom`: DATA_DIR/SPLIT... as well),
    from a `save_to_disk` folder at DATA_DIR/TASK, DATA_DIR/TASK/SPLIT or DATA_DIR, or from the hub
    where `data_dir` is None.
    Without `labels_required` labels are neither needed nor checked nor returned. UserError for
    whatever is missing, unreadable or wrong in the data.
    """
    from datasets import Dataset
    from pyarrow import ArrowException

    wanted = [*task.text_columns, *(() if task.name == CUSTOM else _KEPT_AS_THEY_ARE)]
    if labels_required:
        wanted.append(task.label_column)
    if data_dir is None:
        table = _from_hub(task, split, wanted)
    else:
        try:
            path = find_split(task, split, data_dir)
        except OSError as error:
            raise UserError(f"'{data_dir}' cannot be read: {error.strerror or error}.") from error
        table = read_table(path, wanted)
    columns = checked_columns(task, table, labels_required)
    try:
        return Dataset.from_dict(columns)
    except (ArrowException, ValueError, TypeError) as error:
        raise UserError(
            f"{table.source} has values that make no table ({first_line(error)}): one type a "
            f"column, and text in Unicode, is wanted."
        ) from error


def check_not_single(task: Task, split: str, dataset: Any) -> None:
    """UserError for a split of one row, which must be a mistake."""
    if len(dataset) == 1:
        raise UserError(
            f"The {split} split of {task.name} has 1 row: no model can be calibrated or scored on "
            f"a single example; give at least 2, better hundreds."
        )


def _from_hub(task: Task, split: str, wanted: Iterable[str]) -> Table:
    """The split as the hub, or its cache, has it."""
    import datasets

    name = task.hub_path + (f" ({task.hub_config})" if task.hub_config else "")
    with hub.cached_when_unreachable() as may_ask:
        try:
            dataset = datasets.load_dataset(task.hub_path, task.hub_config, split=split)
        except Exception as error:  # network, hub, cache and disk each have their own
            reason = first_line(error) if may_ask else "no connection, and not in the cache"
            raise UserError(
                f"The {split} split of dataset {name} could not be had from the Hugging Face hub "
                f"({reason}): connect to it, or give local files with --data-dir DIR, holding "
                f"DIR/{task.name}/{split}.parquet (or .csv, .tsv, .jsonl)."
            ) from error
    return table_of(dataset, list(wanted), f"The {split} split of dataset {name}")


def find_split(task: Task, split: str, data_dir: Path) -> Path:
    """The file or saved dataset that holds the split; UserError says what is there instead."""
    custom = task.name == CUSTOM
    if not data_dir.is_dir():
        problem = "is not a folder" if data_dir.exists() else "does not exist"
        holding = "train.csv and validation.csv" if custom else f"{task.name}/"
        raise UserError(f"The data folder '{data_dir}' {problem}: give one that holds {holding}.")
    folders = [data_dir / task.name, data_dir]
    with_files = folders if custom else folders[:1]
    found = [folder / f"{split}{extension}" for folder in with_files for extension in EXTENSIONS]
    found = [path for path in found if path.is_file()]
    found += [folder / split for folder in folders if _is_saved_dataset(folder / split)]
    if len(found) > 1:
        raise UserError(
            f"The {split} split is there twice, '{found[0]}' and '{found[1]}': keep one."
        )
    if not found:
        folder = folders[0] if folders[0].is_dir() else data_dir
        names = sorted(path.name for path in folder.iterdir()) or ["nothing"]
        there = ", ".join(names[:SHOWN_NAMES] + ["..."] * (len(names) > SHOWN_NAMES))
        raise UserError(
            f"'{data_dir}' has no {split} split of {task.name}: wanted "
            f"{'' if custom else task.name + '/'}{split}.parquet (or .csv, .tsv, .jsonl, or a "
            f"save_to_disk folder), but '{folder}' holds {there}"
            f"{_what_for(split) if custom else _one_level_off(task, split, data_dir)}."
        )
    return found[0]


def _one_level_off(task: Task, split: str, data_dir: Path) -> str:
    """What to do where the files lie in the data folder itself, and not in one for the task."""
    if not any((data_dir / f"{split}{extension}").is_file() for extension in EXTENSIONS):
        return ""
    if data_dir.resolve().name == task.name:
        return f": give the folder above, '{data_dir.resolve().parent}'"
    return f": move them to '{data_dir / task.name}'"


def _what_for(split: str) -> str:
    """What somebody's own data needs the split for, and how it comes about."""
    if split == "train":
        return "; prune with a few hundred to 2,000 of your training texts, which need no labels"
    return "; to be scored, the model needs labelled examples that it was not trained on"


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "state.json").is_file()


def encode(task: Task, tokenizer: Any, dataset: Any, max_length: int | None = None) -> Any:
    """Tokenise into a `datasets.Dataset`, truncated and not padded, one row an example.

    Question answering gives one row a window of the context (see `question_windows`). Columns:
    input_ids, attention_mask, token_type_ids where the tokenizer makes them, and, where the
    dataset has them, labels (question answering: start_positions and end_positions, token
    indices; both the CLS token where the window has no answer). `max_length` in tokens; the
    task's own if None. UserError where the tokenizer does not allow it.
    """
    from datasets import Dataset, concatenate_datasets

    length = _checked_length(task, tokenizer, max_length)
    rows_of = _question_rows if task.kind == "question-answering" else _sentence_rows
    chunks = []
    for first in range(0, len(dataset), ROWS_AT_A_TIME):
        chunk = dataset[first : first + ROWS_AT_A_TIME]
        chunks.append(Dataset.from_dict(rows_of(task, tokenizer, chunk, length)))
    return concatenate_datasets(chunks)


def _checked_length(task: Task, tokenizer: Any, max_length: int | None) -> int:
    """The number of tokens a row may have."""
    # Tokenizers that know no limit state one of 1e30.
    limit = int(min(tokenizer.model_max_length, 10**9))
    if max_length is None:
        max_length = min(task.max_length, limit)
    pair = len(task.text_columns) == 2
    shortest = tokenizer.num_special_tokens_to_add(pair=pair) + len(task.text_columns)
    if task.kind == "question-answering":
        shortest = max(32, shortest)  # room for a piece of the question and for moving windows
    if not shortest <= max_length <= limit:
        raise UserError(
            f"A maximal length of {max_length} tokens does not fit: for {task.name} this "
            f"checkpoint takes {shortest} to {limit}."
        )
    return max_length


def _sentence_rows(task: Task, tokenizer: Any, chunk: Any, max_length: int) -> dict[str, Any]:
    """Columns of tokenised sentences or sentence pairs."""
    texts = [chunk[name] for name in task.text_columns]
    columns = dict(tokenizer(*texts, truncation=True, max_length=max_length))
    if task.label_column in chunk:
        columns["labels"] = chunk[task.label_column]
    return columns


def question_windows(
    task: Task,
    tokenizer: Any,
    questions: Sequence[str],
    contexts: Sequence[str],
    max_length: int | None = None,
) -> Any:
    """The tokenizer's `BatchEncoding` of windows over each context, each behind its question.

    Has `offset_mapping`, and `overflow_to_sample_mapping` from window to question. Windows
    overlap by the task's stride, or by a third of a window shorter than three strides. A question
    that would leave a window too little context is cut (to a third of the window).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(
            f"Task {task.name} needs a fast tokenizer, for character offsets, and the "
            f"checkpoint has none: save its tokenizer.json with "
            f"AutoTokenizer.from_pretrained(..., use_fast=True).save_pretrained(...)."
        )
    length = _checked_length(task, tokenizer, max_length)
    return tokenizer(
        _cut_questions(tokenizer, questions, length // QUESTION_SHARE),
        list(contexts),
        truncation="only_second",
        max_length=length,
        stride=min(task.stride, length // QUESTION_SHARE),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )


def _cut_questions(tokenizer: Any, questions: Sequence[str], max_tokens: int) -> list[str]:
    """Questions without white space before them (some have it), of at most so many tokens."""
    stripped = [question.strip() for question in questions]
    offsets = tokenizer(stripped, add_special_tokens=False, return_offsets_mapping=True)
    return [
        question if len(spans) <= max_tokens else question[: spans[max_tokens - 1][1]]
        for question, spans in zip(stripped, offsets["offset_mapping"], strict=True)
    ]


def _question_rows(task: Task, tokenizer: Any, chunk: Any, max_length: int) -> dict[str, Any]:
    """Columns of windows, with the answer's token positions where there are answers."""
    questions, contexts = (chunk[name] for name in task.text_columns)
    windows = question_windows(task, tokenizer, questions, contexts, max_length)
    skipped = ("offset_mapping", "overflow_to_sample_mapping")
    columns = {name: values for name, values in windows.items() if name not in skipped}
    if task.label_column in chunk:
        columns |= _answer_positions(windows, tokenizer.cls_token_id, chunk[task.label_column])
    return columns


def _answer_positions(
    windows: Any, cls_token_id: int | None, answers: Sequence[Any]
) -> dict[str, list[int]]:
    """First and last token of the first answer in each window, or the CLS token's index twice."""
    positions: dict[str, list[int]] = {name: [] for name in _POSITIONS}
    for window, example in enumerate(windows["overflow_to_sample_mapping"]):
        token_ids = windows["input_ids"][window]
        outside = token_ids.index(cls_token_id) if cls_token_id in token_ids else 0
        answer = answers[example]
        first, last = outside, outside
        if answer["text"]:
            in_context = np.array([part == 1 for part in windows.sequence_ids(window)])
            start = answer["answer_start"][0]
            span = _tokens_of_span(
                np.array(windows["offset_mapping"][window]),
                in_context,
                start,
                start + len(answer["text"][0]),
            )
            first, last = span or (outside, outside)
        positions["start_positions"].append(first)
        positions["end_positions"].append(last)
    return positions


def _tokens_of_span(
    offsets: np.ndarray[Any, Any], in_context: np.ndarray[Any, Any], start: int, end: int
) -> tuple[int, int] | None:
    """First and last token touching characters start to end; None unless the window has them all.

    `offsets` is (S, 2), characters from and to; `in_context` is (S,), true for context tokens.
    """
    context = offsets[in_context]
    if len(context) == 0 or start < context[0, 0] or end > context[-1, 1]:
        return None
    touching = in_context & (offsets[:, 0] < end) & (offsets[:, 1] > start)
    found = np.flatnonzero(touching)
    return (int(found[0]), int(found[-1])) if len(found) else None


def length_sorted_rows(encoded: Any, batch_size: int) -> list[list[int]]:
    """Row numbers of each batch, longest rows first: a lack of memory shows at once."""
    if batch_size < 1:
        raise UserError(f"A batch size of {batch_size} is not possible: it must be at least 1.")
    lengths = np.array([len(row) for row in encoded["input_ids"][:]])
    order = np.argsort(-lengths, kind="stable").tolist()
    return [order[first : first + batch_size] for first in range(0, len(order), batch_size)]


def make_batches(
    encoded: Any, tokenizer: Any, batch_size: int, *, with_labels: bool = False
) -> list[dict[str, Tensor]]:
    """Batches of up to `batch_size` rows, in the order of `length_sorted_rows`.

    Tensors are (B, S) with S the longest row of the batch, int64; labels (B,), int64 or, for a
    regression, float32. UserError where labels are asked for and there are none.
    """
    names = [name for name in encoded.column_names if with_labels or name not in _LABELS]
    if with_labels and not set(_LABELS) & set(names):
        raise UserError("Labels are needed here, but the data has none.")
    chosen = encoded.select_columns(names)
    return [collate(chosen[rows], tokenizer) for rows in length_sorted_rows(encoded, batch_size)]


def collate(columns: dict[str, list[Any]], tokenizer: Any) -> dict[str, Tensor]:
    """Pad columns of token lists to their longest, on the tokenizer's side, and make tensors."""
    lengths = [len(row) for row in columns["input_ids"]]
    longest = max(lengths)
    left = tokenizer.padding_side == "left"
    fill = {
        "input_ids": tokenizer.pad_token_id or 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    batch: dict[str, Tensor] = {}
    for name, rows in columns.items():
        if name in _LABELS:
            batch[name] = torch.tensor(rows)
            if left and name in _POSITIONS:
                batch[name] += longest - torch.tensor(lengths)
            continue
        padded = torch.full((len(rows), longest), fill.get(name, 0))
        for target, row in zip(padded, rows, strict=True):
            where = slice(longest - len(row), None) if left else slice(len(row))
            target[where] = torch.tensor(row)
        batch[name] = padded
    return batch
