"""Bad data for `custom`, `language-modeling`, `similarity` and `seq2seq`: refused in one sentence.

Deleting this lets a wrong column or an unreadable image end in a traceback after an hour.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.conftest import make_tiny_model, make_tiny_tokenizer
from tests.robustness.harness import Case, Place, Request, check, parametrize

TEXT = "the film was a good one and the cast was very funny .\n\n" * 40
TAGS = ("O", "B-PER", "I-PER")

Files = Mapping[str, str | bytes]


def _saved(place: Place, head: str, **changes: Any) -> Path:
    """The tiny checkpoint of all cases with another head, all of it drawn at random."""
    import transformers

    folder = place.copy(place.material.model, "model")
    config = transformers.AutoConfig.from_pretrained(folder, **changes)
    for path in folder.glob("*.safetensors"):
        path.unlink()
    getattr(transformers, f"Bert{head}")(config).save_pretrained(folder)
    return folder


def _written(files: Files) -> Path:
    for name, content in files.items():
        path = Path("data") / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return Path("data")


def _case(
    given: str, says: str, head: str, files: Files, entries: Any = None, **flags: Any
) -> Case:
    def prepare(place: Place) -> Request:
        model = _saved(place, head, **(entries or {}))
        return place.flags(**{"model": model, "data_dir": _written(files)} | flags)

    return Case(given, says, prepare)


def _text(given: str, says: str, files: Files, head: str = "LMHeadModel", **flags: Any) -> Case:
    small = {"task": "language-modeling", "max_length": 16}
    return _case(given, says, head, {"train.txt": TEXT, "validation.txt": TEXT, **files},
                 {"is_decoder": True}, **{**small, **flags})  # fmt: skip


def _rows(*rows: Any) -> Files:
    lines = "\n".join(map(json.dumps, rows * 2 if len(rows) == 1 else rows))
    return {"train.jsonl": lines, "validation.jsonl": lines}


def _tagged(given: str, says: str, *rows: Any) -> Case:
    labels = {"id2label": dict(enumerate(TAGS)), "label2id": {t: i for i, t in enumerate(TAGS)}}
    return _case(given, says, "ForTokenClassification", _rows(*rows), labels, task="custom")


def _images(given: str, says: str, files: Files, classes: int = 2) -> Case:
    """With the entry of a model of images; what is said must not need its weights."""

    def prepare(place: Place) -> Request:
        import transformers

        config = transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=12,
            image_size=8, patch_size=4, num_labels=classes,
        )  # fmt: skip
        transformers.ViTForImageClassification(config).save_pretrained("model")
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
        Path("model/preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
        return place.flags(model="model", data_dir=_written(files), task="custom")

    return Case(given, says, prepare)


def _png(shade: int) -> bytes:
    """A valid image of 1 x 1."""
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (1, 1), (shade, 0, 0)).save(stream, "png")
    return stream.getvalue()


def _folder(validation: Mapping[str, bytes]) -> Files:
    train = {f"train/{name}/{i}.png": _png(i) for name in ("0", "1") for i in range(4)}
    return {**train, **{f"validation/{name}": content for name, content in validation.items()}}


def _writer(given: str, says: str, *rows: Any, model_type: str = "bart", **flags: Any) -> Case:
    def prepare(place: Place) -> Request:
        writes = model_type in ("bart", "whisper")
        model = make_tiny_model(model_type, "seq2seq-lm" if writes else "none")
        model.save_pretrained("model")
        make_tiny_tokenizer(model_type).save_pretrained("model")
        small = {"model": "model", "task": "seq2seq", "max_new_tokens": 4}
        return place.flags(**small | {"data_dir": _written(_rows(*rows)), **flags})

    return Case(given, says, prepare)


_GOOD = {"tokens": ["a", "film"], "ner_tags": ["O", "B-PER"]}
_ASKED = {"sent1": "the film", "sent2": "was", "ending0": "good", "ending1": "bad"}
_TEXTS = {"source": "a film", "target": "a plot"}
_PAIR = {"sentence1": "a film", "sentence2": "a plot"}

TASKS = (
    _text("language modelling: an empty text", "is empty", {"validation.txt": ""}),
    _text("language modelling: nothing but white space", "is empty", {"train.txt": " \n\n"}),
    _text("language modelling: a text of three words", "one block of 16",
          {"validation.txt": "the film was"}),
    _text("language modelling: a text in Latin-1", "is not UTF-8",
          {"train.txt": "café ".encode("latin-1") * 99}),
    _text("language modelling: a text of random bytes", "is not UTF-8",
          {"train.txt": bytes(range(256))}),
    _text("language modelling: a text twice, as .txt and .csv", "is there twice",
          {"train.csv": "text\na\n"}),
    _text("language modelling with a classifier", "not a ...ForCausalLM", {},
          head="ForSequenceClassification"),
    _text("language modelling with `--label-column`", "belongs to --task custom", {},
          label_column="label"),
    _text("language modelling with `--max-drop`", "perplexity of language-modeling does", {},
          constraint=None, max_drop=1),
    _text("language modelling: an encoder with `--export gguf`", "not a BertLMHeadModel", {},
          export="gguf"),
    _text("language modelling with `--use-labels`", "--use-labels does nothing", {},
          use_labels=True),
    _case("a language model for `custom`", "use --task language-modeling", "LMHeadModel",
          {"train.txt": TEXT}, {"is_decoder": True}, task="custom"),
    _case("language modelling: a table without the column", "has no column 'body'", "LMHeadModel",
          _rows({"text": TEXT}), {"is_decoder": True}, task="language-modeling",
          text_columns="body"),
    _tagged("tags: no column of words", "none of the usual columns", {"text": "a"}),
    _tagged("tags: no column of tags", "has no column 'ner_tags'", {"tokens": ["a"]}),
    _tagged("tags: words in one text", "not a list of texts", {**_GOOD, "tokens": "a film"}),
    _tagged("tags: fewer tags than words", "2 tokens but 1 ner_tags",
            {**_GOOD, "ner_tags": ["O"]}),
    _tagged("tags: one that the model does not know", "does not know the ner_tags 'B-ORG'",
            {**_GOOD, "ner_tags": ["O", "B-ORG"]}),
    _case("choices: none", "no columns for the choices", "ForMultipleChoice",
          _rows({"question": "who ?", "label": 0}), task="custom"),
    _case("choices: the right one by its name", "number of the right choice",
          "ForMultipleChoice", _rows({**_ASKED, "label": "ending1"}), task="custom"),
    _case("choices: not equally many", "has 3 choices, the first one 2", "ForMultipleChoice",
          _rows(*({"question": "?", "choices": ["a"] * n, "label": 0} for n in (2, 3))),
          task="custom"),
    _case("several labels: an unknown one", "does not know the labels 'loud'",
          "ForSequenceClassification", _rows({"text": "a", "labels": ["loud"]}),
          {"problem_type": "multi_label_classification"}, task="custom"),
    _case("several labels: in one text", "not a list", "ForSequenceClassification",
          _rows({"text": "a", "labels": "LABEL_0"}),
          {"problem_type": "multi_label_classification"}, task="custom"),
    _case("similarity: one text", "compares two texts", "Model", _rows({**_PAIR, "score": 1.0}),
          task="similarity", text_columns="sentence1"),
    _case("similarity: a score in words", "takes a number", "Model",
          _rows({**_PAIR, "score": "high"}, {**_PAIR, "score": "low"}), task="similarity"),
    _case("choices with `--export onnx`", "does not support multiple-choice", "ForMultipleChoice",
          _rows({**_ASKED, "label": 0}), task="custom", export="onnx"),
    _case("similarity: no score", "has no column 'label'", "Model", _rows(_PAIR, _PAIR),
          task="similarity"),
    _writer("seq2seq: no source", "none of the usual columns", {"target": "a"}),
    _writer("seq2seq: no target", "has no column 'target' for the target texts", {"source": "a"}),
    _writer("seq2seq: a target that is missing", "row 2: target is missing", _TEXTS,
            {**_TEXTS, "target": None}),
    _writer("seq2seq: an empty target", "row 2: target is empty", _TEXTS, {**_TEXTS, "target": ""}),
    _writer("seq2seq: a source that is a number", "row 1: source is 3, not text",
            {**_TEXTS, "source": 3}),
    _writer("seq2seq: two columns of sources", "this task has one text", _TEXTS,
            text_columns=["source", "target"]),
    _writer("seq2seq: longer sources than the model reads", "exceeds the 514 positions", _TEXTS,
            max_length=2000),
    _writer("seq2seq: no data", "--task seq2seq needs your own data", _TEXTS, data_dir=None),
    _writer("seq2seq: an encoder", "is a BertModel, which does not write", _TEXTS,
            model_type="bert"),
    _writer("seq2seq: a language model", "is a GPT2Model, which does not write", _TEXTS,
            model_type="gpt2"),
    _writer("seq2seq: a model of images", "is a ViTModel, which does not write", _TEXTS,
            model_type="vit"),
    _writer("seq2seq: a model of spectrograms", "prune() in Python with batches of input_features",
            _TEXTS, model_type="whisper"),
    _writer("custom: a model of spectrograms", "prune() in Python with batches of input_features",
            _TEXTS, model_type="whisper", task="custom", max_new_tokens=None),
    _writer("custom: a model of raw audio", "prune() in Python with batches of input_values",
            _TEXTS, model_type="wav2vec2", task="custom", max_new_tokens=None),
    _writer("seq2seq with `--use-labels`", "--use-labels does nothing", _TEXTS, use_labels=True),
    _writer("seq2seq with `--export onnx`", "takes two files", _TEXTS, export="onnx"),
    _writer("seq2seq with an unknown `--score`", "invalid choice: 'rouge'", _TEXTS, score="rouge"),
    _writer("an encoder-decoder that writes for `custom`", "use --task seq2seq", _TEXTS,
            task="custom", max_new_tokens=None),
    _writer("`--num-beams` for `custom`", "--num-beams would do nothing for custom", _TEXTS,
            task="custom", max_new_tokens=None, num_beams=2),
    _images("images: none", "no train images", {"readme.txt": "nothing here"}),
    _images("images: one class", "images of 1 class", _folder({"0/a.png": _png(0)})),
    _images("images: not in folders", "images of 0 class", _folder({"a.png": _png(0)})),
    _images("images: an unknown class", "does not know the label 'lynx'",
            _folder({"0/a.png": _png(0), "lynx/b.png": _png(1)})),
    _images("images: one that is a text", "b.png' cannot be read",
            _folder({"0/a.png": _png(0), "1/b.png": b"not an image"})),
    _images("images: one of 0 bytes", "b.png' cannot be read",
            _folder({"0/a.png": _png(0), "1/b.png": b""})),
)  # fmt: skip


@parametrize(TASKS)
def test_bad_task_data_is_refused(case: Case, place: Place) -> None:
    check(case, place)
