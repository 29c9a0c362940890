"""Texts of the corpus keep their pieces, and the model its outputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel

from rfprune import UserError, load_pruned, prune, trim_vocabulary
from tests.vocabulary.random_tokenizers import KINDS, LETTERS

WORD = st.text(LETTERS, min_size=1, max_size=8)
TEXTS = st.lists(st.lists(WORD, min_size=1, max_size=4).map(" ".join), min_size=1, max_size=6)
OTHER = st.text(LETTERS + "Zü \n", min_size=1, max_size=12)


def model_for(tokenizer: Any) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer) + 3,  # some rows without a token
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertModel(config, add_pooling_layer=False).eval()


def ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor([tokenizer(text)["input_ids"]])


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), texts=TEXTS, other=OTHER)
def test_texts_keep_their_pieces_and_outputs(
    kind: str, seed: int, texts: list[str], other: str
) -> None:
    tokenizer = KINDS[kind](seed)
    model = model_for(tokenizer)
    trimmed = trim_vocabulary(model, tokenizer, texts)
    assert trimmed.compare(texts).changed_texts == 0
    for text in texts:
        old, new = ids(tokenizer, text), ids(trimmed.tokenizer, text)
        assert torch.equal(trimmed.new_ids(old), new)
        with torch.inference_mode():
            assert torch.equal(model(old)[0], trimmed.model(new)[0])
    assert trimmed.tokenizer(other)["input_ids"], "other texts still have an encoding"
    for token in tokenizer.all_special_tokens:
        new_id = trimmed.tokenizer.convert_tokens_to_ids(token)
        assert trimmed.old_ids[new_id] == tokenizer.convert_tokens_to_ids(token)


def wrapped(model: Any) -> Any:
    """A tokenizer that splits at spaces, with the special token [UNK]."""
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", pad_token="[UNK]")


def test_wordpiece_would_find_an_encoding_without_the_pieces_before_its_failure() -> None:
    """The word "abc" is unknown since "ab" is found first; without it "a" and "##bc" would do."""
    from tokenizers import models

    pieces = {"[UNK]": 0, "ab": 1, "a": 2, "##bc": 3, "x": 4}
    tokenizer = wrapped(models.WordPiece(pieces, unk_token="[UNK]"))
    trimmed = trim_vocabulary(model_for(tokenizer), tokenizer, ["abc", "xbc", "a"])
    assert tokenizer.tokenize("abc") == trimmed.tokenizer.tokenize("abc") == ["[UNK]"]


def test_an_unknown_character_costs_as_much_as_before_in_a_unigram() -> None:
    """It costs 10 more than the worst piece. Without "zzz", "ab" and an unknown x would win."""
    from tokenizers import models

    scores = {"[UNK]": 0.0, "ab": -1.0, "a": -60.0, "b": -60.0, "bx": -60.0, "zzz": -130.0}
    tokenizer = wrapped(models.Unigram(list(scores.items()), unk_id=0))
    trimmed = trim_vocabulary(model_for(tokenizer), tokenizer, ["abx", "ab"])
    assert tokenizer.tokenize("abx") == trimmed.tokenizer.tokenize("abx") == ["a", "bx"]


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_fewer_tokens_mean_fewer_rows_everywhere(tiny_model: Any, tiny_tokenizer: Any) -> None:
    """Also in output layers, tied and untied, and in their biases."""
    tokenizer = tiny_tokenizer()
    texts = ["the good film", "a dull plot"]
    for model_type, head in (("bart", "seq2seq-lm"), ("gpt2", "causal-lm"), ("t5", "seq2seq-lm")):
        for tied in (True, False):
            model = tiny_model(model_type, head, tie_word_embeddings=tied)
            before = {name: value.clone() for name, value in model.state_dict().items()}
            trimmed = trim_vocabulary(model, tokenizer, texts)
            size = len(trimmed.tokenizer)
            assert size < len(tokenizer)
            assert trimmed.model.config.vocab_size == len(trimmed.old_ids) >= size
            assert trimmed.model.get_output_embeddings().weight.shape[0] == len(trimmed.old_ids)
            assert is_tied(trimmed.model) == is_tied(model)
            for name, value in model.state_dict().items():
                assert torch.equal(value, before[name]), "the original is untouched"
            old = ids(tokenizer, texts[0])
            inputs = {"input_ids": old}
            small = {"input_ids": trimmed.new_ids(old)}
            if model_type != "gpt2":
                inputs["decoder_input_ids"] = inputs["input_ids"]
                small["decoder_input_ids"] = small["input_ids"]
            with torch.inference_mode():
                logits = model(**inputs).logits[..., list(trimmed.old_ids)]
                torch.testing.assert_close(trimmed.model(**small).logits, logits)


def test_masked_language_models_keep_the_bias_of_their_decoder(tiny_tokenizer: Any) -> None:
    from transformers import BertForMaskedLM

    tokenizer = tiny_tokenizer()
    config = model_for(tokenizer).config
    model = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    trimmed = trim_vocabulary(model, tokenizer, ["the good film"])
    old = ids(tokenizer, "the [MASK] film")
    logits = model(old).logits[..., list(trimmed.old_ids)]
    torch.testing.assert_close(trimmed.model(trimmed.new_ids(old)).logits, logits)


def test_a_saved_folder_loads_with_the_auto_classes(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    model, tokenizer = tiny_model("bert", "none"), tiny_tokenizer()
    trimmed = trim_vocabulary(model, tokenizer, ["the good film"])
    trimmed.save(tmp_path / "small")
    again, loaded = (one.from_pretrained(tmp_path / "small") for one in (AutoModel, AutoTokenizer))
    old = ids(tokenizer, "the good film")
    assert torch.equal(ids(loaded, "the good film"), trimmed.new_ids(old))
    with torch.inference_mode():
        assert torch.equal(again.eval()(ids(loaded, "the good film"))[0], model(old)[0])


def test_a_pruned_model_can_be_trimmed(
    tmp_path: Path, tiny_model: Any, tiny_batch: Any, tiny_tokenizer: Any
) -> None:
    tokenizer = tiny_tokenizer()
    pruned = prune(tiny_model(), [tiny_batch()], 0.5).model
    trimmed = trim_vocabulary(pruned, tokenizer, ["the good film"])
    trimmed.save(tmp_path / "small")
    old = ids(tokenizer, "the good film")
    with torch.inference_mode():
        expected = pruned(old).logits
        assert torch.equal(trimmed.model(trimmed.new_ids(old)).logits, expected)
        loaded = load_pruned(tmp_path / "small")
        torch.testing.assert_close(loaded(trimmed.new_ids(old)).logits, expected)


def test_offloaded_models_are_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model = tiny_model("bert", "none")
    model.encoder.layer[0].to("meta")
    with pytest.raises(UserError, match="offloaded weights cannot be trimmed"):
        trim_vocabulary(model, tiny_tokenizer(), ["a"])


def test_positions_that_count_from_the_padding_keep_its_id(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """In RoBERTa the first position is one more than the id of the padding."""
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "!"  # not the first token
    pad = tokenizer.pad_token_id
    model = tiny_model("roberta", "none", pad_token_id=pad, max_position_embeddings=pad + 20)
    trimmed = trim_vocabulary(model, tokenizer, ["the good film"])
    assert trimmed.tokenizer.pad_token_id == trimmed.model.config.pad_token_id == pad
    old = ids(tokenizer, "the good film")
    with torch.inference_mode():
        assert torch.equal(model(old)[0], trimmed.model(trimmed.new_ids(old))[0])


def test_ids_of_the_generation_settings_follow_their_tokens(
    tiny_model: Any, tiny_tokenizer: Any
) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny_model("gpt2", "causal-lm")
    film, dull = (tokenizer.convert_tokens_to_ids(word) for word in ("film", "dull"))
    model.generation_config.eos_token_id = [film, 3]
    model.generation_config.suppress_tokens = [dull]
    trimmed = trim_vocabulary(model, tokenizer, ["the good plot"])
    found = trimmed.model.generation_config
    names = trimmed.tokenizer.convert_ids_to_tokens
    assert names(found.eos_token_id) == ["film", "[SEP]"]
    assert names(found.suppress_tokens) == ["dull"]
    assert model.generation_config.eos_token_id == [film, 3]


def test_rare_tokens_go_with_a_least_count(tiny_model: Any, tiny_tokenizer: Any) -> None:
    model, tokenizer = tiny_model("bert", "none"), tiny_tokenizer()
    texts = ["the good film", "the dull film"]
    trimmed = trim_vocabulary(model, tokenizer, texts, min_count=2)
    kept = trimmed.tokenizer.get_vocab()
    assert {"the", "film"} <= kept.keys()
    assert not {"good", "dull"} & kept.keys()
    changes = trimmed.compare(texts)
    assert (changes.changed_texts, changes.unknown_after) == (2, 0)
    with pytest.raises(UserError, match="'good' was not kept"):
        trimmed.new_ids(ids(tokenizer, "good"))


Change = Callable[[Any], tuple[Any, dict[str, Any]]]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "hold no token"),
        (["", " "], {}, "hold no token"),
        ("one text", {}, "single str"),
        ([b"bytes"], {}, "text 0 is a bytes"),
        (["a"], {"min_count": 0}, "min_count 0"),
        (["a"], {"min_count": True}, "min_count True"),
        (["a"], {"keep_ids": [3, 10**6]}, "keep_ids has 1000000, but the model has the ids 0 to"),
        (["a"], {"min_count": 9}, "hold no token that occurs 9 times"),
    ],
)
def test_mistakes_are_refused(
    tiny_model: Any, tiny_tokenizer: Any, texts: Any, options: dict[str, Any], message: str
) -> None:
    model, tokenizer = tiny_model("bert", "none"), tiny_tokenizer()
    with pytest.raises(UserError, match=message):
        trim_vocabulary(model, tokenizer, texts, **options)


def test_other_tokenizers_are_refused(tiny_model: Any, tiny_tokenizer: Any) -> None:
    class Slow:
        is_fast = False

    model, tokenizer = tiny_model("bert", "none"), tiny_tokenizer()
    with pytest.raises(UserError, match="a Slow cannot be trimmed: load a fast"):
        trim_vocabulary(model, Slow(), ["a"])
    tokenizer.add_tokens([f"word{number}" for number in range(9)])
    with pytest.raises(UserError, match="the tokenizer that the model was trained with"):
        trim_vocabulary(model, tokenizer, ["a"])


def test_the_file_holds_no_id_of_before(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any
) -> None:
    """In the template, in the padding and in the added tokens."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<last>"]})
    model = tiny_model("bert", "none", vocab_size=len(tokenizer))
    tokenizer(["a", "a b"], padding=True)  # leaves its padding in the file
    trimmed = trim_vocabulary(model, tokenizer, ["the good film"])
    trimmed.tokenizer.save_pretrained(tmp_path)
    file = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = trimmed.tokenizer.get_vocab()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert vocabulary["<last>"] == len(vocabulary) - 1
    for token in file["added_tokens"]:
        assert vocabulary[token["content"]] == token["id"]
    for name, token in file["post_processor"]["special_tokens"].items():
        assert token["ids"] == [vocabulary[name]]
