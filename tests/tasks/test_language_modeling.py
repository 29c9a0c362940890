"""Blocks of text, perplexity and the divergence of language models, against plain arithmetic.

Without these a token could be scored by the logits at its own position, or a block lose text.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from rfprune.errors import UserError
from rfprune.tasks import language_modeling
from rfprune.tasks.evaluation import divergence, evaluate_model, prepare_evaluation
from rfprune.tasks.generation import continuations
from rfprune.tasks.language_modeling import encode_blocks, token_likelihoods
from rfprune.tasks.metrics import perplexity
from rfprune.tasks.own_data import language_task, with_columns
from tests.conftest import WORDS, make_tiny_model, make_tiny_tokenizer, vocabulary

Tiny = Callable[..., Any]

TEXT = "\n\n".join(" ".join(WORDS[i : i + 7]) for i in range(0, len(WORDS) - 7, 3))


def language_model(seed: int = 0, **changes: Any) -> Any:
    config = make_tiny_model(is_decoder=True, **changes).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.BertLMHeadModel(config)


def batches_of(*lengths: int) -> tuple[list[dict[str, Any]], list[Any]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for number in lengths:
        ids = torch.randint(5, 60, (number, 9), generator=generator)
        batches.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    rows = np.split(np.arange(sum(lengths))[::-1], np.cumsum(lengths)[:-1])  # not in order
    return batches, rows


def test_likelihoods_are_those_of_the_next_token() -> None:
    model = language_model()
    batches, rows = batches_of(2, 3)
    found, apart = token_likelihoods(model, batches, rows)
    assert apart is None
    assert model.training, "a model comes back in the mode that it was in"
    model.eval()
    for batch, numbers in zip(batches, rows, strict=True):
        for ids, number in zip(batch["input_ids"], numbers, strict=True):
            expected = -model(input_ids=ids[None], labels=ids[None]).loss.item()  # it shifts
            assert found[number].mean() == pytest.approx(expected, rel=1e-4)
    assert perplexity(found) == pytest.approx(float(np.exp(-found.mean())), rel=1e-4)
    assert len(np.unique(found.round(4))) > 20


@pytest.mark.parametrize("entries", [1, 300, 2**24])
def test_divergence_beside_another_model(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """KL(reference || model), averaged over all tokens that are predicted, however it is cut up."""
    monkeypatch.setattr(language_modeling, "_ENTRIES_AT_A_TIME", entries)
    model, reference = language_model().eval(), language_model(1).eval()
    batches, rows = batches_of(2, 3)
    _, found = token_likelihoods(model, batches, rows, reference)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    with torch.inference_mode():
        log_q, log_p = (m(input_ids=ids).logits[:, :-1].log_softmax(-1) for m in (model, reference))
    expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    assert expected > 0.1
    assert found == pytest.approx(expected, rel=1e-4)
    assert token_likelihoods(model, batches, rows, model)[1] == 0


def test_a_validation_text_from_file_to_perplexity(tmp_path: Path) -> None:
    for split in ("train", "validation"):
        (tmp_path / f"{split}.txt").write_text(TEXT)
    task = with_columns(language_task(), tmp_path, None, None)
    data = prepare_evaluation(task, make_tiny_tokenizer(), tmp_path, max_length=12, batch_size=4)
    model, other = language_model().eval(), language_model(1).eval()
    original = evaluate_model(model, data)
    beside = evaluate_model(other, data, reference=model)
    assert set(original.scores) == {"perplexity"}
    assert original.score == pytest.approx(perplexity(original.logits[0]))
    assert data.num_examples == len(original.logits[0]) == len(TEXT.split()) // 12
    assert divergence(original, original) == 0 < divergence(original, beside)
    with pytest.raises(ValueError, match="reference="):
        divergence(original, evaluate_model(other, data))
    some = prepare_evaluation(task, make_tiny_tokenizer(), tmp_path, max_length=12, limit=3)
    assert some.num_examples == 3
    for split, advice in (("validation", "--validation-fraction"), ("train", "calibrate")):
        (tmp_path / f"{split}.txt").rename(tmp_path / f"{split}.md")
        with pytest.raises(UserError, match=f"no {split} split of language-modeling.*{advice}"):
            with_columns(language_task(), tmp_path, None, None)
        (tmp_path / f"{split}.md").rename(tmp_path / f"{split}.txt")


@pytest.mark.parametrize("piece", [1, 40, 10**6])
def test_blocks_are_the_text_cut_up(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_modeling, "_PIECE", piece)
    tokenizer = make_tiny_tokenizer()
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    blocks = encode_blocks(tokenizer, [TEXT], 16)["input_ids"]
    assert {len(block) for block in blocks} == {16}
    joined = [token for block in blocks for token in block]
    assert joined == whole[: len(joined)]
    assert len(whole) - len(joined) < 16


def test_blocks_begin_as_the_tokenizer_begins() -> None:
    """Of a tokenizer with a BOS token; CLS is none."""
    tokenizer = make_tiny_tokenizer()
    plain = encode_blocks(tokenizer, [TEXT], 8)["input_ids"]
    tokenizer.bos_token = tokenizer.cls_token
    begun = encode_blocks(tokenizer, [TEXT], 8)["input_ids"]
    assert all(block[0] == tokenizer.cls_token_id for block in begun)
    assert begun[0][1:] == plain[0][:7] and begun[1][1] == plain[0][7]


def test_a_model_without_a_vocabulary_is_refused() -> None:
    batches, rows = batches_of(2)
    with pytest.raises(UserError, match="returns no logits per token"):
        token_likelihoods(make_tiny_model(), batches, rows)
    broken = language_model()
    broken.cls.predictions.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        token_likelihoods(broken, batches, rows)


def test_tables_of_texts_are_paragraphs(tmp_path: Path) -> None:
    rows = TEXT.split("\n\n")
    for split in ("train", "validation"):
        lines = ["body", *(f'"{row}"' for row in rows)]
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    task = with_columns(language_task(), tmp_path, ["body"], None)
    data = prepare_evaluation(task, make_tiny_tokenizer(), tmp_path, max_length=12)
    assert data.num_examples == len(TEXT.split()) // 12
    with pytest.raises(UserError, match="usual columns for the text"):
        with_columns(language_task(), tmp_path, None, None)
    with pytest.raises(UserError, match="has one text:"):
        with_columns(language_task(), tmp_path, ["body", "other"], None)


def test_models_continue_the_same_prompt() -> None:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=1, n_head=2, n_positions=30, vocab_size=len(vocabulary()),
        initializer_range=0.3, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        one, other = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    tokenizer = make_tiny_tokenizer("gpt2")
    blocks = torch.tensor(encode_blocks(tokenizer, [TEXT], 28)["input_ids"])
    written = continuations({"one": one, "other": other}, tokenizer, [{"input_ids": blocks}])
    assert one.training
    assert written["prompt"] == TEXT.replace("\n\n", " ")[: len(written["prompt"])]
    assert len(written["prompt"].split()) == 24
    assert written["one"] != written["other"]
    assert 1 <= len(written["one"].split()) <= 6, "there are no more than 30 positions"
    again = continuations({"one": one}, tokenizer, [{"input_ids": blocks}])
    assert again["one"] == written["one"]
    assert continuations({"one": make_tiny_model()}, tokenizer, [{"input_ids": blocks}]) == {}


def test_rows_are_scored_a_few_at_a_time(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = tiny_model("gpt2", "causal-lm"), tiny_model("gpt2", "causal-lm", seed=1)
    ids = torch.randint(0, model.config.vocab_size, (5, 9), generator=torch.Generator())
    batches, rows = [{"input_ids": ids}], [np.array([3, 0, 4, 1, 2])]
    whole, apart = token_likelihoods(model, batches, rows, other)
    sizes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(language_modeling, "_ENTRIES_AT_A_TIME", 9 * model.config.vocab_size)
    parts, same = token_likelihoods(model, batches, rows, other)
    assert sizes == [2, 2, 1]
    np.testing.assert_allclose(parts, whole, atol=1e-5)
    assert same == pytest.approx(apart, rel=1e-4)
    assert apart is not None
    assert apart > 0
