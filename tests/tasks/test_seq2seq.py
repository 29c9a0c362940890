"""Texts that encoder-decoders write, against generation and arithmetic example by example.

Without these a decoder could be compared at padding, or at the token beside the one that it wrote.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from rfprune import generate_targets
from rfprune.errors import RfpruneWarning, UserError
from rfprune.model.compact import compact
from rfprune.model.encoder_decoder import add_decoder_inputs
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from rfprune.settings import WritingSettings
from rfprune.stages.objective import divergences
from rfprune.tasks.baseline import below_baseline
from rfprune.tasks.evaluation import divergence, evaluate_model, prepare_evaluation
from rfprune.tasks.own_data import seq2seq_task, with_columns
from rfprune.tasks.seq2seq import (
    generation_config,
    sample_texts,
    target_divergence,
    warn_about_long_targets,
    written_tokens,
)
from rfprune.tasks.text_scores import (
    ROUGE,
    rouge_scores,
    score_of_rows,
    translation_scores,
)
from tests.conftest import WORDS, make_tiny_model, make_tiny_tokenizer

Tiny = Callable[..., Any]
TYPES = ("t5", "bart", "marian")
LENGTH = 7


@pytest.fixture(params=TYPES)
def model(request: pytest.FixtureRequest) -> Any:
    return ending_model(request.param)


def ending_model(model_type: str, seed: int = 0) -> Any:
    """A tiny model that does not repeat one token, and ends some texts before others."""
    model = make_tiny_model(model_type, "seq2seq-lm", seed=seed, scale_embedding=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().roll(1, 0))
    model.generation_config.eos_token_id = None
    ids = model.generate(**sources()[0], max_new_tokens=LENGTH, do_sample=False)
    late = [token for token in ids[1:, 2:5].flatten().tolist() if token not in ids[0]]
    model.generation_config.eos_token_id = max(late, key=late.count)
    return model


def sources() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 100, (8, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[1::2, 6:] = 0
    return [{"input_ids": ids * mask, "attention_mask": mask}]


def written_one_by_one(model: Any) -> list[list[int]]:
    """What the model writes from each source alone, without padding."""
    found = []
    for ids, mask in zip(*sources()[0].values(), strict=True):
        own = ids[mask.bool()][None]
        inputs = {"input_ids": own, "attention_mask": torch.ones_like(own)}
        found.append(model.generate(**inputs, max_new_tokens=LENGTH, do_sample=False)[0].tolist())
    return found


def test_the_decoder_reads_what_the_model_writes(model: Any) -> None:
    """At every token that the mask keeps, greedy generation chose the token that is written."""
    expected = written_one_by_one(model)
    assert len(set(map(len, expected))) > 1, "some texts end before others"
    (batch,) = generate_targets(model, sources(), max_new_tokens=LENGTH)
    with torch.no_grad():
        chosen = model(**batch).logits.argmax(-1)
    rows = zip(batch["decoder_input_ids"], batch["decoder_attention_mask"], chosen, strict=True)
    for (ids, mask, best), written in zip(rows, expected, strict=True):
        kept = mask.bool()
        assert mask.tolist() == sorted(mask.tolist(), reverse=True)
        assert ids[kept].tolist() == written[:-1]
        assert best[kept].tolist() == written[1:]


def test_divergence_is_that_of_single_texts(model: Any) -> None:
    other = ending_model(model.config.model_type, seed=1)
    batches = generate_targets(model, sources(), max_new_tokens=LENGTH)
    total, count = 0.0, 0
    for ids, mask, written in zip(*sources()[0].values(), written_one_by_one(model), strict=True):
        inputs = {"input_ids": ids[mask.bool()][None]}
        inputs["decoder_input_ids"] = torch.tensor([written[:-1]])
        with torch.no_grad():
            log_q, log_p = (one(**inputs).logits.log_softmax(-1) for one in (other, model))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        count += len(written) - 1
    found = target_divergence(other, model, batches)
    assert found == pytest.approx(total / count, rel=1e-3)
    assert found > 0.1
    assert target_divergence(model, model, batches) == 0
    whole = [{**one, "decoder_attention_mask": torch.ones_like(one["decoder_attention_mask"])}
             for one in batches]  # fmt: skip
    assert target_divergence(other, model, whole) != pytest.approx(found, rel=1e-3)


def test_pruning_sees_the_same_divergence(model: Any) -> None:
    """Its objective on the batches is the divergence that is reported: 0 with all units."""
    layout = layout_of(model)
    batches = generate_targets(model, sources(), max_new_tokens=LENGTH)
    prepared = add_decoder_inputs(model, batches[0])
    masks = full_masks(layout)
    masks[-1][:5] = 0
    masks[0][0] = 0
    small, same = (compact(model, layout, one) for one in (masks, full_masks(layout)))
    with torch.no_grad():
        outputs = [one(**batches[0]) for one in (model, small, same)]
    per_text = divergences(outputs[0], outputs[1], prepared, model.config).double()
    tokens = int(batches[0]["decoder_attention_mask"].sum())
    assert float(per_text.min()) > 0
    reported = target_divergence(small, model, batches)
    assert float(per_text.sum()) == pytest.approx(reported * tokens, rel=1e-3)
    assert float(divergences(outputs[0], outputs[2], prepared, model.config).abs().max()) < 1e-5
    filled = {**batches[0]}
    filled["decoder_input_ids"] = torch.where(
        batches[0]["decoder_attention_mask"].bool(), batches[0]["decoder_input_ids"], 9
    )
    found = target_divergence(small, model, [filled])
    assert found == pytest.approx(reported, rel=1e-4), "filling is not read"


def test_generation_follows_the_checkpoint_without_sampling() -> None:
    model = make_tiny_model("t5", "seq2seq-lm")
    own = model.generation_config
    assert generation_config(model, WritingSettings()).max_new_tokens == 128
    own.do_sample, own.temperature, own.num_beams, own.max_length = True, 0.5, 3, 20
    own.min_length = 12
    config = generation_config(model, WritingSettings())
    assert (config.num_beams, config.max_new_tokens, config.do_sample) == (3, 20, False)
    short = generation_config(model, WritingSettings(max_new_tokens=LENGTH, num_beams=1))
    assert (short.num_beams, short.max_new_tokens, short.min_length) == (1, LENGTH, LENGTH)
    assert own.do_sample and own.max_length == 20, "the model's own settings stay"
    first, again = (generate_targets(model, sources(), max_new_tokens=LENGTH) for _ in range(2))
    assert torch.equal(first[0]["decoder_input_ids"], again[0]["decoder_input_ids"])
    bart = make_tiny_model("bart", "seq2seq-lm", max_position_embeddings=16)
    assert generation_config(bart, WritingSettings()).max_new_tokens == 15


def test_texts_without_an_end_are_told(model: Any) -> None:
    batches, rows = sources(), [np.arange(8)]
    for length in (LENGTH, 1):
        writing = WritingSettings(max_new_tokens=length)
        tokens = written_tokens(model, batches, rows, writing)
        assert tokens.shape == (8, length + 1)
        ends = int((tokens == model.generation_config.eos_token_id).any(1).sum())
        with pytest.warns(RfpruneWarning, match=f"{8 - ends} of 8 texts .* cut at {length} tokens"):
            warn_about_long_targets(model, tokens, writing)
    tokens[:, -1] = model.generation_config.eos_token_id
    warn_about_long_targets(model, tokens, writing)


def test_models_that_write_nothing_are_refused() -> None:
    for other in (make_tiny_model("gpt2", "causal-lm"), make_tiny_model("bart")):
        with pytest.raises(UserError, match="no encoder-decoder that writes texts"):
            generate_targets(other, sources())


def test_batches_without_a_text_to_write_from_are_refused() -> None:
    model = make_tiny_model("bart", "seq2seq-lm")
    with pytest.raises(UserError, match="no batches to write texts from: give at least one"):
        generate_targets(model, [])
    spectrograms = {"input_features": torch.zeros(1, 4, 14)}
    with pytest.raises(UserError, match=r"batches\[1\] holds input_features, .* from input_ids"):
        generate_targets(model, [*sources()[:1], spectrograms])


TEXTS = st.lists(
    st.tuples(*(st.text("ab .,", max_size=12).map(lambda text: f"{text} a b"),) * 2), min_size=2,
    max_size=6,
)  # fmt: skip


@settings(max_examples=15)
@given(TEXTS, st.data())
def test_scores_of_some_rows_are_those_of_their_texts(
    pairs: list[tuple[str, str]], data: Any
) -> None:
    rows = data.draw(st.lists(st.integers(0, len(pairs) - 1), min_size=1, max_size=8))
    written, targets = (list(column) for column in zip(*pairs, strict=True))
    some = [written[row] for row in rows], [targets[row] for row in rows]
    expected = {
        "chrf": CHRF().corpus_score(some[0], [some[1]]).score,
        "bleu": BLEU(force=True).corpus_score(some[0], [some[1]]).score,
    }
    assert translation_scores(*some) == pytest.approx(expected)
    expected |= {name: 100 * value for name, value in rouge_scores(*some).items()}
    for name in ("chrf", "bleu", *ROUGE):
        found = score_of_rows(name, written, targets)(np.array(rows))
        assert found == pytest.approx(expected[name])


def write_pairs(folder: Path, targets: dict[str, str] | None = None) -> None:
    folder.mkdir(exist_ok=True)
    for split, number in (("train", 8), ("validation", 6)):
        draw = random.Random(split)
        sources = [" ".join(draw.choices(WORDS, k=draw.randint(4, 9))) for _ in range(number)]
        rows = [{"source": one, "target": (targets or {}).get(one, one)} for one in sources]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))


@pytest.mark.parametrize("score", ["chrf", "rougeL"])
def test_from_file_to_score(score: str, tmp_path: Path) -> None:
    """The best possible score for targets that the model wrote itself; its prefix matters."""
    write_pairs(tmp_path)
    model, tokenizer = ending_model("t5"), make_tiny_tokenizer("t5")
    writing = WritingSettings(score=score, max_new_tokens=LENGTH)
    task = with_columns(seq2seq_task(writing), tmp_path, None, None)
    assert (task.text_columns, task.label_column) == (("source",), "target")
    data = prepare_evaluation(task, tokenizer, tmp_path, batch_size=4)
    assert data.pairs is not None
    texts = data.pairs.texts(evaluate_model(model, data).logits[0])
    of_others = [texts[-1], *texts[:-1]]
    write_pairs(tmp_path, dict(zip(data.pairs.sources, of_others, strict=True)))
    wrong = prepare_evaluation(task, tokenizer, tmp_path, batch_size=4)
    reason = below_baseline(wrong, evaluate_model(model, wrong), model)
    assert reason is not None and "targets of other rows" in reason
    write_pairs(tmp_path, dict(zip(data.pairs.sources, texts, strict=True)))
    data = prepare_evaluation(task, tokenizer, tmp_path, batch_size=4)
    original = evaluate_model(model, data)
    assert original.metric_name == score
    assert original.score == pytest.approx(100) or score != "chrf"  # ROUGE reads no signs
    assert below_baseline(data, original, model) is None
    other = ending_model("t5", seed=1)
    apart = evaluate_model(other, data, reference=model, reference_evaluation=original)
    assert apart.score < original.score / 2
    assert divergence(original, original) == 0 < divergence(original, apart)
    again = evaluate_model(other, data, reference=model)
    assert again.from_reference == pytest.approx(apart.from_reference)
    with pytest.raises(ValueError, match="reference="):
        divergence(original, evaluate_model(other, data))
    prefixed = seq2seq_task(WritingSettings(source_prefix="translate : ", max_new_tokens=LENGTH))
    before = prepare_evaluation(with_columns(prefixed, tmp_path, None, None), tokenizer, tmp_path)
    longer = sum(len(batch["input_ids"][0]) for batch in before.batches)
    assert longer == max(len(batch["input_ids"][0]) for batch in data.batches) + 10
    assert data.pairs is not None
    shown = sample_texts(data.pairs, {"original": texts[:2]}, width=20)
    assert [len(one["source"]) for one in shown] == [20, 20]
    assert shown[0]["source"].endswith("...")
