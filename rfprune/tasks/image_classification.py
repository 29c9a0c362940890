"""Image classification: a folder of images per class, or a saved dataset with an image column."""

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rfprune.errors import UserError, check_installed, error_summary
from rfprune.tasks.class_names import by_name, class_names_of
from rfprune.tasks.files import SHOWN_NAMES
from rfprune.tasks.labels import class_ids
from rfprune.tasks.registry import Task

IMAGE = "image"
"""The column of images: a path, or the bytes and the path that `datasets` stores."""

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
COLUMNS = ("image", "img", "pixel_values")
_LABELS = ("label", "labels", "fine_label")


def load_images(task: Task, split: str, data_dir: Path, *, labels_required: bool) -> Any:
    """Load one split of images, unopened.

    From DATA_DIR/SPLIT/CLASS/IMAGE, with folders named like the model's classes or their ids, or
    from a `save_to_disk` folder at DATA_DIR/SPLIT; both also below DATA_DIR/TASK. With
    `task.held_out` all images of the training split are loaded.

    Returns:
        A `datasets.Dataset` with the columns `image` and, if required, the label ids.

    Raises:
        UserError: there are no such folders, or one is named like no class of the model.
    """
    from datasets import Dataset

    if not data_dir.is_dir():
        problem = "is not a folder" if data_dir.exists() else "does not exist"
        raise UserError(
            f"The data folder '{data_dir}' {problem}: give one that holds train/CLASS/*.png and "
            f"validation/CLASS/*.png."
        )
    if task.held_out is not None:
        split = task.train_split
        existing = _split_folders(task, "validation", data_dir)
        if existing and split != "validation":
            raise UserError(
                f"'{existing[0]}' is a validation split already, and --validation-fraction makes "
                f"one: leave the flag out, or remove the folder."
            )
    found = _split_folders(task, split, data_dir)
    if not found:
        flag = "--train-split" if split == task.train_split else "--validation-split"
        names = sorted(path.name for path in data_dir.iterdir())[:SHOWN_NAMES] or ["nothing"]
        raise UserError(
            f"'{data_dir}' has no {split} images: needed is {split}/CLASS/*.png with a folder per "
            f"class, or a save_to_disk folder {split}, or another split named with "
            f"{flag} NAME, but it holds {', '.join(names)}."
        )
    if (found[0] / "state.json").is_file():
        return _saved(task, found[0], labels_required)
    paths, names = _in_folders(found[0])
    columns: dict[str, list[Any]] = {IMAGE: [str(path) for path in paths]}
    if labels_required:
        columns[task.label_column] = class_ids(task, names, f"'{found[0]}'")
    return Dataset.from_dict(columns)


def _split_folders(task: Task, split: str, data_dir: Path) -> list[Path]:
    folders = [folder / split for folder in (data_dir / task.name, data_dir)]
    return [folder for folder in folders if folder.is_dir()]


def _in_folders(folder: Path) -> tuple[list[Path], list[str]]:
    """All images below a folder, and the name of the class folder of each."""
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    paths = [
        path
        for one in classes
        for path in sorted(one.rglob("*"))
        if path.suffix.lower() in EXTENSIONS and path.is_file()
    ]
    names = [path.relative_to(folder).parts[0] for path in paths]
    if len(set(names)) < 2:
        there = ", ".join(path.name for path in classes[:SHOWN_NAMES]) or "no folders"
        raise UserError(
            f"'{folder}' holds images of {len(set(names))} class ({there}): give two or more "
            f"folders, one per class, with images ({', '.join(EXTENSIONS)}) in them."
        )
    return paths, names


def _saved(task: Task, folder: Path, labels_required: bool) -> Any:
    """A split saved by `datasets`, with images as they are stored."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library documents no error type
        raise UserError(
            f"'{folder}' is not a readable saved dataset: {error_summary(error)}."
        ) from error
    image = _one_of(COLUMNS, dataset.column_names, folder, "images")
    columns: dict[str, Any] = {
        IMAGE: dataset.cast_column(image, datasets.Image(decode=False))[image][:]
    }
    if labels_required:
        label = _one_of((task.label_column, *_LABELS), dataset.column_names, folder, "labels")
        values, source = dataset[label][:], f"'{folder}'"
        names = class_names_of(dataset.features.to_dict()).get(label)
        if names is not None:
            values = by_name(replace(task, label_column=label), label, names, values, source)
        columns[task.label_column] = class_ids(task, values, source)
    return datasets.Dataset.from_dict(columns)


def _one_of(wanted: Sequence[str], names: Sequence[str], folder: Path, what: str) -> str:
    for name in wanted:
        if name in names:
            return name
    raise UserError(
        f"'{folder}' has no column {', '.join(dict.fromkeys(wanted))} for the {what}, but "
        f"{', '.join(names) or 'none'}: rename one of them."
    )


def encode_images(task: Task, _: Any, chunk: Any, __: int | None) -> dict[str, Any]:
    """Columns of images, each opened once, so that a damaged file is an error before the run."""
    for image in chunk[IMAGE]:
        with _opened(image):
            pass
    columns = {IMAGE: list(chunk[IMAGE])}
    if task.label_column in chunk:
        columns["labels"] = chunk[task.label_column]
    return columns


def pixels(images: Sequence[Any], processor: Any) -> Tensor:
    """(B, channels, height, width), as the checkpoint's image processor makes them."""
    decoded = []
    for image in images:
        with _opened(image) as opened:
            decoded.append(_decoded(opened, image))
    values: Tensor = processor(decoded, return_tensors="pt")["pixel_values"]
    return values.to(torch.float32)


def _opened(image: Any) -> Any:
    """An image file with its header read."""
    check_installed("Image classification", ["pillow"])
    from PIL import Image, UnidentifiedImageError

    try:
        if isinstance(image, dict):
            return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] else image["path"])
        return Image.open(image)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise _unreadable(image, error) from error


def _decoded(opened: Any, image: Any) -> Any:
    try:
        return opened.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # PIL raises SyntaxError for a broken PNG
        raise _unreadable(image, error) from error


def _unreadable(image: Any, error: Exception) -> UserError:
    name = f"'{image['path']}'" if isinstance(image, dict) else f"'{image}'"
    return UserError(
        f"The image {name} cannot be read ({error_summary(error)}): replace or remove it."
    )
