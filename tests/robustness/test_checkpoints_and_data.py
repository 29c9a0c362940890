"""Checkpoints and data with faults: refused in one sentence, and no code of a folder is run.

Deleting this lets a damaged file end in a traceback, or in a model that is silently wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.robustness.harness import (
    AFTER_LOADING,
    CODE,
    Case,
    Place,
    Request,
    check,
    edit_json,
    edit_weights,
    parametrize,
    with_flags,
)

Edit = Callable[[Path], Any]


def _model(given: str, says: str, edit: Edit, **changes: Any) -> Case:
    """A case of a good checkpoint, spoilt."""

    def prepare(place: Place) -> Request:
        edit(place.copy(place.material.model, "model"))
        return place.flags(**{"model": "model"} | changes)

    return Case(given, says, prepare)


def _config(given: str, says: str, **entries: Any) -> Case:
    """A checkpoint whose config.json has these entries."""
    return _model(
        given,
        says,
        lambda folder: edit_json(folder / "config.json", lambda config: config.update(entries)),
    )


def _weights(given: str, says: str, change: Callable[[dict[str, Any]], Any]) -> Case:
    return _model(given, says, lambda folder: edit_weights(folder / "model.safetensors", change))


def _write(name: str, content: str | bytes) -> Edit:
    """Replace a file."""
    raw = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(raw)


def _cut(name: str, share: float) -> Edit:
    """Leave only the beginning of a file."""

    def edit(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(share * len(content))])

    return edit


def _rename(old: str, new: str) -> Edit:
    return lambda folder: (folder / old).rename(folder / new)


def _fill(value: float, tensors: dict[str, Any]) -> None:
    tensors["bert.encoder.layer.0.attention.self.query.weight"][0, 0] = value


def _carrying_code(folder: Path) -> None:
    """Code for the model, its configuration and its tokenizer."""
    (folder / "evil.py").write_text(CODE, encoding="utf-8")
    name = "BertForSequenceClassification"
    edit_json(
        folder / "config.json",
        lambda config: config.update(
            auto_map={
                "AutoConfig": "evil.Config",
                "AutoModelForSequenceClassification": f"evil.{name}",
            }
        ),
    )
    edit_json(
        folder / "tokenizer_config.json",
        lambda config: config.update(
            auto_map={"AutoTokenizer": ["evil.Tokenizer", "evil.Tokenizer"]}
        ),
    )


def _sharded(shard: str) -> Edit:
    """Weights in a file that an index names."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "elsewhere")
        index = {"metadata": {}, "weight_map": {"classifier.bias": shard}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    return edit


_HEADS = {"id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
_HUGE_HEADER = (2**62).to_bytes(8, "little") + b"{}"

MODELS = (
    with_flags("a folder that is not there", "does not exist", model="./nowhere"),
    with_flags("`/etc/passwd`", "is a file", model="/etc/passwd"),
    with_flags("a device", "does not exist", model="/dev/zero"),
    Case("an empty folder", "is empty",
         lambda place: (Path("model").mkdir(), place.flags(model="model"))[1]),
    Case("no head at all", "no trained head",
         lambda place: place.flags(model=place.material.headless)),
    with_flags("a classifier for a task of questions", "no trained head", task="squad"),
    with_flags("an alias without such a checkpoint", "textattack", model="bert-base"),
    with_flags("the demo for another task", "The demo is a checkpoint for task sst2",
               model="demo"),
    _model("no config.json", "has no config.json",
           lambda folder: (folder / "config.json").unlink()),
    _model("a config.json that is a folder", "has no config.json", lambda folder: (
        (folder / "config.json").unlink(), (folder / "config.json").mkdir())),
    _model("a config.json cut short", "is not JSON", _cut("config.json", 0.5)),
    _model("a config.json of Latin-1", "is not JSON", _write("config.json", b'{"a": "\xe9"}')),
    _model("a config.json that is a list", "JSON object", _write("config.json", "[1]")),
    _model("a config.json nested 100,000 deep", "is not JSON",
           _write("config.json", "[" * 100_000)),
    _model("a config.json of a link to itself", "has no config.json", lambda folder: (
        (folder / "config.json").unlink(), (folder / "config.json").symlink_to("config.json"))),
    _config("no model_type", "names no model_type", model_type=None),
    _config("model_type gpt_neo", "is not supported", model_type="gpt_neo"),
    _config("model_type that is a list", "is not supported", model_type=["bert"]),
    _config("three labels for a task of two", "2 labels", **_HEADS),
    _config("labels in the wrong order", "label order",
            id2label={"0": "equivalent", "1": "not_equivalent"}),
    _config("label ids with a gap", "without gaps", id2label={"0": "a", "2": "b"}),
    _config("labels that are a number", "cannot be read", id2label=7),
    _config("5 heads in a hidden size of 16", "cannot be loaded", num_attention_heads=5),
    _config("no heads", "cannot be loaded", num_attention_heads=0),
    _config("-4 heads", "needs at least one head", num_attention_heads=-4),
    _config("a hidden size that is a word", "cannot be loaded", hidden_size="large"),
    _config("a hidden size that is not the weights'", "has the shape", hidden_size=32),
    _config("10¹⁵ neurons", "cannot be loaded", intermediate_size=10**15),
    _config("one layer more than there are weights", "lacks", num_hidden_layers=3),
    _config("one layer less than there are weights", "holds", num_hidden_layers=1),
    _config("no layers", "holds", num_hidden_layers=0),
    _config("an unknown activation", "cannot be loaded", hidden_act="magic"),
    _config("an unknown dtype", "float7", dtype="float7"),
    _config("a padding token beyond the vocabulary", "cannot be loaded", pad_token_id=10**6),
    _config("no positions", "has the shape", max_position_embeddings=0),
    _weights("a weight that is not a number", "NaN or infinity", partial(_fill, float("nan"))),
    _weights("an infinite weight", "NaN or infinity", partial(_fill, float("inf"))),
    _weights("a weight missing", "lacks a weight",
             lambda tensors: tensors.pop("bert.encoder.layer.1.output.dense.bias")),
    _weights("the head's weights missing", "no trained head",
             lambda tensors: tensors.pop("classifier.weight")),
    _weights("a weight of another shape", "has the shape", lambda tensors: tensors.update(
        {"classifier.weight": tensors["classifier.weight"][:, :3].contiguous()})),
    _model("no weights", "has no model.safetensors",
           lambda folder: (folder / "model.safetensors").unlink()),
    _model("weights cut short", "damaged", _cut("model.safetensors", 0.5)),
    _model("weights of 0 bytes", "damaged", _write("model.safetensors", b"")),
    _model("weights that promise a header of 4 EiB", "damaged",
           _write("model.safetensors", _HUGE_HEADER)),
    _model("weights that are a pointer of git-lfs", "git lfs pull", _write(
        "model.safetensors", "version https://git-lfs.github.com/spec/v1\n")),
    _model("weights as a pickle", "pickle", _rename("model.safetensors", "pytorch_model.bin")),
    _model("an index that names a missing file", "No such file", _sharded("model-1.safetensors")),
    _model("an index that names a file elsewhere", "No such file",
           _sharded("../../../../etc/passwd")),
    _model("an adapter", "holds an adapter", _write("adapter_config.json", "{}")),
    _model("no tokenizer", "tokenizer", lambda folder: [
        path.unlink() for path in folder.glob("tokenizer*")]),
    _model("a tokenizer cut short", "No tokenizer can be loaded", _cut("tokenizer.json", 0.5)),
    _model("a tokenizer of more words than the model", "embeddings", lambda folder: edit_json(
        folder / "tokenizer.json",
        lambda content: content["model"]["vocab"].update({"zyxw": 10**6}))),
    _model("code for model, configuration and tokenizer (which is not run)", "cannot be met",
           _carrying_code, **AFTER_LOADING),
)  # fmt: skip


def _data(given: str, says: str, files: dict[str, str | bytes], **changes: Any) -> Case:
    """A case of data/mrpc with these files in place of the good ones of the same split."""

    def prepare(place: Place) -> Request:
        place.copy(place.material.data, "data")
        for name, content in files.items():
            path = Path("data", "mrpc", name)
            path.with_suffix(".parquet").unlink(missing_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return place.flags(**{"data_dir": "data"} | changes)

    return Case(given, says, prepare)


def _questions(given: str, says: str, row: dict[str, Any]) -> Case:
    """A case of questions to a checkpoint that has a head for them."""
    line = json.dumps({"id": "1", "question": "what ?", "context": "the city"} | row) + "\n"

    def prepare(place: Place) -> Request:
        from tests.conftest import make_tiny_model, make_tiny_tokenizer

        make_tiny_model(head="question-answering").save_pretrained("model")
        make_tiny_tokenizer().save_pretrained("model")
        Path("data/squad").mkdir(parents=True)
        for split in ("train", "validation"):
            Path("data/squad", f"{split}.jsonl").write_text(2 * line, encoding="utf-8")
        return place.flags(model="model", task="squad", data_dir="data")

    return Case(given, says, prepare)


def _unreadable(place: Place) -> Request:
    """A file that the disk gives no byte of."""
    place.copy(place.material.data, "data")
    before = Path.read_bytes

    def fail(path: Path) -> bytes:
        if path.name == "train.csv":
            raise PermissionError(13, "Permission denied")
        return before(path)

    Path("data/mrpc/train.parquet").unlink()
    Path("data/mrpc/train.csv").write_text("a", encoding="utf-8")
    place.set(Path, "read_bytes", fail)
    return place.flags(data_dir="data")


HEADER = "sentence1,sentence2,label\n"
_ROW = "good film,bad film,1\n"


def _rows(rows: str, header: str = HEADER) -> dict[str, str | bytes]:
    return {"validation.csv": header + rows}


DATA = (
    with_flags("a folder that is not there", "does not exist", data_dir="nowhere"),
    Case("a file for a folder", "is not a folder",
         lambda place: place.flags(data_dir=place.material.model / "config.json")),
    Case("no data of this task", "has no train split of mrpc",
         lambda place: place.flags(data_dir=place.material.model)),
    Case("the task's own folder, one level too deep", "give the folder above",
         lambda place: place.flags(data_dir=place.material.data / "mrpc")),
    _data("the same split twice", "is there twice",
          {"validation.jsonl": "{}", "validation.csv": HEADER}),
    _data("a csv of 0 bytes", "0 bytes", {"validation.csv": ""}),
    _data("a csv of nothing but its header", "no rows", _rows("")),
    _data("a csv of blank lines", "no header line", {"validation.csv": "\n\n\n"}),
    _data("one training row", "train split of mrpc has 1 row", {"train.csv": HEADER + _ROW}),
    _data("one validation row", "validation split of mrpc has 1 row", _rows(_ROW)),
    _data("a csv in Latin-1", "is not UTF-8",
          {"validation.csv": (HEADER + "café,b,1\n" * 2).encode("latin-1")}),
    _data("a csv in UTF-16", "is not UTF-8",
          {"validation.csv": (HEADER + _ROW).encode("utf-16")}),
    _data("a csv of random bytes", "is not UTF-8", {"validation.csv": bytes(range(256))}),
    _data("a column missing", "has no column sentence2", _rows("a,1\n", "sentence1,label\n")),
    _data("columns of other names", "has no column", _rows(_ROW, "a,b,c\n")),
    _data("a column twice", "names a column twice", _rows(_ROW, "sentence1,sentence1,label\n")),
    _data("rows of different lengths", "has 4 fields", _rows(_ROW + "a,b,c,d\n")),
    _data("a quote that is never closed", "cannot be parsed", _rows('"a,b,1\n')),
    _data("a field of 200,000 letters", "cannot be parsed", _rows("a" * 200_000 + ",b,1\n")),
    _data("an empty cell", "sentence1 is missing", _rows(_ROW + ",b,1\n")),
    _data("all cells empty", "is missing", _rows(",,\n" * 3)),
    _data("a label of another task", "label is '7'", _rows(_ROW + "a,b,7\n")),
    _data("a label in words", "label is 'yes'", _rows(_ROW + "a,b,yes\n")),
    _data("a label of 0.5", "label is '0.5'", _rows(_ROW + "a,b,0.5\n")),
    _data("a label of 1e400", "label is '1e400'", _rows(_ROW + "a,b,1e400\n")),
    _data("training labels missing, with `--use-labels`", "has no column label",
          {"train.csv": "sentence1,sentence2\na,b\nc,d\n"}, use_labels=True),
    _data("a parquet file that is none", "is not a readable parquet",
          {"validation.parquet": "PAR1"}),
    _data("a line of jsonl cut short", "is not JSON", {"validation.jsonl": '{"sentence1": "a'}),
    _data("a line of jsonl that is a list", "is not a JSON object", {"validation.jsonl": "[1]"}),
    _data("a line of jsonl nested 100,000 deep", "is not JSON",
          {"validation.jsonl": "[" * 100_000}),
    _data("text that is a number", "is 7, not text", {"validation.jsonl": json.dumps(
        {"sentence1": 7, "sentence2": "b", "label": 1})}),
    _data("text that is no Unicode", "form no table", {"validation.jsonl": 2 * (
        '{"sentence1": "\\ud800", "sentence2": "b", "label": 1}\n')}),
    Case("a file that cannot be read", "Permission denied", _unreadable),
    _questions("an answer that is only a text", "must be", {"answers": "city"}),
    _questions("a question without an answer", "use --task squad_v2",
               {"answers": {"text": [], "answer_start": []}}),
    _questions("an answer that starts at -1", "must be",
               {"answers": {"text": ["a"], "answer_start": [-1]}}),
)  # fmt: skip


@parametrize(MODELS)
def test_bad_checkpoints_are_refused(case: Case, place: Place) -> None:
    check(case, place)


@parametrize(DATA)
def test_bad_data_is_refused(case: Case, place: Place) -> None:
    check(case, place)
