"""Images from folders and saved datasets to pixel values.

Without these an image could be scored with the label of another folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from rfprune.errors import UserError
from rfprune.tasks.batching import LazyBatches, make_batches
from rfprune.tasks.encoding import encode
from rfprune.tasks.evaluation_set import prepare_evaluation
from rfprune.tasks.own_data import custom_task, with_columns
from rfprune.tasks.splits import load_split


class Halves:
    """An image processor as simple as can be: the mean shade of each channel, halved."""

    def __call__(self, images: Sequence[Any], return_tensors: str) -> dict[str, torch.Tensor]:
        assert return_tensors == "pt"
        shades = [np.asarray(image).mean(axis=(0, 1)) / 2 for image in images]
        return {"pixel_values": torch.tensor(np.stack(shades))[:, :, None, None]}


def task_of(*names: str) -> Any:
    config = transformers.ViTConfig(id2label=dict(enumerate(names)))
    task = custom_task(config, None, "here", "image-classification")
    return with_columns(task, Path(), None, None)


CATS = task_of("Cat", "Dog")


def write(path: Path, shade: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (5, 4), shade if mode == "L" else (shade, 0, 0)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two cats and a dog to validate on; a gray one among them."""
    for split in ("train", "validation"):
        write(tmp_path / split / "dog" / "a.png", 30)
        write(tmp_path / split / "cat" / "inside" / "b.jpeg", 100, "L")
        write(tmp_path / split / "cat" / "c.PNG", 50)
        (tmp_path / split / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_folders_are_classes_in_any_case(folder: Path) -> None:
    data = load_split(CATS, "validation", folder)
    assert [Path(path).name for path in data["image"]] == ["c.PNG", "b.jpeg", "a.png"]
    assert data["label"] == [0, 0, 1]
    (batch,) = make_batches(encode(CATS, Halves(), data), Halves(), 3, with_labels=True)
    shades = batch["pixel_values"][:, :, 0, 0].round()
    assert shades.tolist() == [[25, 0, 0], [50, 50, 50], [15, 0, 0]]
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["labels"].tolist() == [0, 0, 1]
    ids = task_of("LABEL_0", "LABEL_1")
    for old, new in (("cat", "0"), ("dog", "1")):
        (folder / "validation" / old).rename(folder / "validation" / new)
    assert load_split(ids, "validation", folder)["label"] == [0, 0, 1]


def test_images_are_opened_when_their_batch_is_wanted(folder: Path) -> None:
    data = prepare_evaluation(CATS, Halves(), folder, batch_size=2)
    assert isinstance(data.batches, LazyBatches) and len(data.batches) == 2
    before = [batch["pixel_values"] for batch in data.batches]
    assert [len(values) for values in before] == [2, 1]
    write(folder / "validation" / "dog" / "a.png", 200)
    assert data.batches[1]["pixel_values"][0, 0, 0, 0] == 100


def test_training_images_need_no_classes_that_are_known(folder: Path) -> None:
    (folder / "train" / "cat").rename(folder / "train" / "lynx")
    assert load_split(CATS, "train", folder, labels_required=False).column_names == ["image"]
    with pytest.raises(UserError, match="does not know the label 'lynx'"):
        load_split(CATS, "train", folder)


def test_a_saved_dataset(folder: Path) -> None:
    import datasets

    images = [str(folder / "train" / "dog" / "a.png"), str(folder / "train" / "cat" / "c.PNG")]
    features = datasets.Features(
        {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    saved = datasets.Dataset.from_dict({"img": images, "label": [1, 0]}, features=features)
    saved.save_to_disk(folder / "saved" / "validation")
    data = load_split(CATS, "validation", folder / "saved")
    (batch,) = make_batches(encode(CATS, Halves(), data), Halves(), 2, with_labels=True)
    assert batch["pixel_values"][:, 0, 0, 0].tolist() == [15, 25]
    assert batch["labels"].tolist() == [1, 0]
    saved.remove_columns("label").save_to_disk(folder / "unlabelled" / "validation")
    with pytest.raises(UserError, match="no column label.* for the labels, but img"):
        load_split(CATS, "validation", folder / "unlabelled")
    for path in (folder / "saved" / "validation").glob("*.arrow"):
        path.write_bytes(b"nonsense")
    with pytest.raises(UserError, match="not a readable saved dataset"):
        load_split(CATS, "validation", folder / "saved")


def test_an_image_that_breaks_off_is_named(folder: Path) -> None:
    path = folder / "validation" / "dog" / "a.png"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    encoded = encode(CATS, Halves(), load_split(CATS, "validation", folder))
    with pytest.raises(UserError, match=r"a\.png' cannot be read.*replace or remove"):
        make_batches(encoded, Halves(), 3)
    with pytest.raises(UserError, match="does not exist: give one that holds train/CLASS"):
        load_split(CATS, "train", folder / "missing")
