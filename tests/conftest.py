"""Fixtures of all tests: tiny random models, a tiny tokenizer and tiny data, made offline.

Weights are drawn with `initializer_range=0.3`: at the usual 0.02 the outputs of a tiny model hardly
change when units are removed, and tests of equality would pass vacuously.
"""

from __future__ import annotations

import os
import random
import string
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import hypothesis
import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The first example includes late imports, so no example has a deadline.
hypothesis.settings.register_profile("rfprune", deadline=None)
hypothesis.settings.load_profile("rfprune")

Head = Literal[
    "sequence-classification",
    "question-answering",
    "causal-lm",
    "seq2seq-lm",
    "image-classification",
    "audio-classification",
    "none",
]
TinyModel = Callable[..., Any]
TinyFolder = Callable[..., Path]
TinyBatch = Callable[..., dict[str, Any]]

MODEL_TYPES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
"""Text encoders with norms after the residual sums; the tests of the command run on them."""

CAUSAL_TYPES = (
    *("gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma"),
    *("starcoder2", "stablelm", "granite", "gemma2", "gemma3_text", "gpt_neox", "phi3"),
    *("olmo2", "olmo3"),
)
TOWER_TYPES = ("clip_text_model", "siglip_text_model", "clip_vision_model", "siglip_vision_model")
"""The two models of CLIP and SigLIP each, which have no head."""

IMAGE_TYPES = ("vit", "deit", "beit", "dinov2", "dinov2_with_registers", *TOWER_TYPES[2:])
AUDIO_TYPES = ("wav2vec2", "hubert")
"""Encoders of raw audio; the tiny HuBERT has norms before its sublayers."""

GENERATION_TYPES = ("marian", "pegasus", "m2m_100", "whisper")
ENCODER_DECODER_TYPES = ("bart", "mbart", "t5", "mt5", "umt5", *GENERATION_TYPES)
"""Those of `GENERATION_TYPES` have no head but that of a language model."""

ALL_TYPES = (
    *(*MODEL_TYPES, "ernie", "modernbert", "albert", "deberta-v2", "data2vec-text"),
    *("roberta-prelayernorm", "xlm-roberta-xl", "nomic_bert", "eurobert"),
    *(*ENCODER_DECODER_TYPES, *CAUSAL_TYPES, *IMAGE_TYPES, *TOWER_TYPES[:2], *AUDIO_TYPES),
)
"""Every supported model type; `tests/model` checks that none is missing."""

GROUPED_TYPES = (
    *("llama", "qwen2", "qwen3", "smollm3", "gemma", "starcoder2", "granite", "gemma2"),
    *("gemma3_text", "eurobert", "phi3", "olmo2", "olmo3"),
)
"""Model types whose tiny models have two query heads per key-value head."""

ONE_UNIT_TYPES = ("olmo2", "olmo3")
"""Model types in which all heads of an attention make one unit."""

WORDS = (
    "the a of and to in is was it that this film movie story cast plot actor scene good great fine "
    "warm funny clever moving bad poor dull weak slow empty awful not very quite rather never city "
    "river mountain team game company market price share report said bought sold won lost opened "
    "closed north south east west red blue green new old first second who what where when "
    "which one two three four five year month day people"
).split()


def pytest_configure(config: pytest.Config) -> None:
    """Block the hub, except for tests marked `network`, and redirect the caches.

    This runs before the libraries read these variables.
    """
    modules = tempfile.TemporaryDirectory(prefix="rfprune-tests-")
    config.add_cleanup(modules.cleanup)
    os.environ["RFPRUNE_CACHE"] = str(Path(modules.name) / "cache")
    os.environ["HF_MODULES_CACHE"] = modules.name  # where code of a checkpoint is copied to
    if "network" not in str(config.getoption("-m")).replace("not network", ""):
        os.environ["HF_HUB_OFFLINE"] = "1"
        os.environ["HF_DATASETS_OFFLINE"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests whose checkpoints or device are missing."""
    for item in items:
        if item.get_closest_marker("shared") and not shared_folder().is_dir():
            item.add_marker(pytest.mark.skip(reason=f"needs {shared_folder()}"))
        if item.get_closest_marker("llamacpp") and find_spec("llama_cpp") is None:
            item.add_marker(pytest.mark.skip(reason="needs the extra rfprune[llamacpp]"))
        if item.get_closest_marker("cuda") and not _has_cuda():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@lru_cache(maxsize=1)
def _has_cuda() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def shared_folder() -> Path:
    """The folder of real checkpoints and data, beside the repository by default."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("RFPRUNE_SHARED", beside))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real checkpoints and data; for tests marked `shared`."""
    return shared_folder()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch computes on one thread, as in the runs that a test compares with."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    """`tiny_model(model_type="bert", head="sequence-classification", *, seed=0, **config)`.

    A new random model in eval mode at each call: 2 layers of 4 heads of width 4 and 12 neurons.
    `config` overrides any entry, by BERT's names (`hidden_size`, `num_hidden_layers`,
    `num_attention_heads`, `intermediate_size`, `num_labels`, ...), for every model type. Where
    query heads share keys and values, `num_attention_heads` counts the latter. A model of images
    has the head for images where one for sequences is asked for, and one that only writes has that
    of a language model.
    """
    return make_tiny_model


@pytest.fixture(scope="session")
def tiny_batch() -> TinyBatch:
    """`tiny_batch(num_examples=4, length=7, *, padding="right", seed=0, model_type="bert")`.

    Random token ids and an attention mask; every other example is shorter by one to three tokens,
    padded on the side that `padding` names, or none is ("none"). Random images for models of them.
    """
    return make_tiny_batch


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Callable[..., Any]:
    """`tiny_tokenizer(model_type="bert")`: WordPiece over a few words and all letters."""
    return make_tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> TinyFolder:
    """`tiny_folder(model_type="bert", head="sequence-classification", *, seed=0, **config)`.

    The folder of a saved tiny model with its tokenizer. The same call gives the same folder, so
    copy it before you change anything in it.
    """
    made: dict[str, Path] = {}

    def folder(
        model_type: str = "bert", head: Head = "sequence-classification", **config: Any
    ) -> Path:
        key = repr((model_type, head, sorted(config.items())))
        if key not in made:
            path = tmp_path_factory.mktemp(f"tiny-{model_type}-{head}")
            make_tiny_model(model_type, head, **config).save_pretrained(path)
            make_tiny_tokenizer(model_type).save_pretrained(path)
            made[key] = path
        return made[key]

    return folder


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `--data-dir` with 48 training and 24 validation rows of each kind of task (read only).

    mrpc, sst2, stsb, mnli (both validation splits), squad and squad_v2 (a third unanswerable).
    """
    root = tmp_path_factory.mktemp("data")
    rows: dict[str, Callable[[random.Random, int], dict[str, Any]]] = {
        "mrpc": _mrpc_row,
        "sst2": _sst2_row,
        "stsb": _stsb_row,
        "mnli": _mnli_row,
        "squad": _squad_row,
        "squad_v2": _squad_v2_row,
    }
    for task, row in rows.items():
        splits = {"train": 48, "validation": 24}
        if task == "mnli":
            splits = {"train": 48, "validation_matched": 24, "validation_mismatched": 24}
        for split, num_rows in splits.items():
            generator = random.Random(f"{task} {split}")
            write_parquet(
                root / task / f"{split}.parquet",
                [row(generator, index) for index in range(num_rows)],
                label_type="float32" if task == "stsb" else "int64",
            )
    return root


def make_tiny_model(
    model_type: str = "bert",
    head: Head = "sequence-classification",
    *,
    seed: int = 0,
    **config: Any,
) -> Any:
    """What the fixture `tiny_model` calls; see there."""
    import torch
    import transformers

    if model_type in TOWER_TYPES:
        head = "none"
    elif model_type in IMAGE_TYPES and head == "sequence-classification":
        head = "image-classification"
    if model_type in AUDIO_TYPES and head == "sequence-classification":
        head = "audio-classification"
    if model_type in GENERATION_TYPES and head == "sequence-classification":
        head = "seq2seq-lm"
    if model_type == "granite" and head == "sequence-classification":
        head = "causal-lm"
    model_class = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "question-answering": transformers.AutoModelForQuestionAnswering,
        "causal-lm": transformers.AutoModelForCausalLM,
        "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
        "image-classification": transformers.AutoModelForImageClassification,
        "audio-classification": transformers.AutoModelForAudioClassification,
        "none": transformers.AutoModel,
    }[head]
    make = model_class.from_config
    if model_type == "whisper" and head == "seq2seq-lm":
        make = transformers.AutoModelForSpeechSeq2Seq.from_config
    if model_type == "siglip_text_model":  # which no Auto class has
        make = transformers.SiglipTextModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make(tiny_config(model_type, **config))
        _randomise_constant_weights(model)
    return model.eval()


def make_tiny_batch(
    num_examples: int = 4,
    length: int = 7,
    *,
    padding: Literal["right", "left", "none"] = "right",
    seed: int = 0,
    model_type: str = "bert",
) -> dict[str, Any]:
    """What the fixture `tiny_batch` calls; see there."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    if model_type in IMAGE_TYPES:
        return {"pixel_values": torch.randn(num_examples, 3, 8, 8, generator=generator)}
    if model_type in AUDIO_TYPES:  # eight samples a token
        audio = torch.randn(num_examples, 8 * length, generator=generator)
        samples = torch.ones_like(audio, dtype=torch.long)
        if padding == "right":
            samples[1::2, 8 * (length - 2) :] = 0
        return {"input_values": audio * samples, "attention_mask": samples}
    ids = torch.randint(5, len(vocabulary()), (num_examples, length), generator=generator)
    attention_mask = torch.ones_like(ids)
    for row in range(1, num_examples, 2):
        missing = 1 + row % 3
        if padding == "right":
            attention_mask[row, length - missing :] = 0
        elif padding == "left":
            attention_mask[row, :missing] = 0
    if model_type in (*ENCODER_DECODER_TYPES, "clip_text_model"):  # which read the end of the text
        ends = attention_mask.cumsum(1).argmax(1)
        ids[torch.arange(num_examples), ends] = 3
    if model_type == "whisper":  # spectrograms of one length, two frames a token
        features = torch.randn(num_examples, 4, 14, generator=generator)
        return {"input_features": features, "decoder_input_ids": ids * attention_mask}
    batch = {"input_ids": ids * attention_mask, "attention_mask": attention_mask}
    return (
        batch | {"decoder_input_ids": batch["input_ids"]}
        if model_type in GENERATION_TYPES
        else batch
    )


def predictions(outputs: Any) -> Any:
    """The logits of a model; the hidden states (B, S, d) of one without a head."""
    logits = outputs.get("logits")
    return outputs["last_hidden_state"] if logits is None else logits


def tiny_config(model_type: str = "bert", **changes: Any) -> Any:
    """The configuration of a tiny model; `changes` by BERT's names."""
    import transformers

    settings: dict[str, Any] = {
        "vocab_size": len(vocabulary()),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 12,
        "max_position_embeddings": 514,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    if model_type == "granite":
        settings["residual_multiplier"] = 0.5
    if model_type in ("nomic_bert", "olmo2", "olmo3"):  # frequencies that bfloat16 has exactly
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 256.0}
        if model_type == "olmo3":
            rope = {"full_attention": rope, "sliding_attention": rope}
        settings["rope_parameters"] = rope
    if model_type in ("bert", "electra", "roberta", "xlm-roberta", "camembert"):
        settings["type_vocab_size"] = 2 if model_type in ("bert", "electra") else 1
    if model_type in ("electra", "albert"):
        settings["embedding_size"] = 8
    settings |= changes
    settings = _family_entries(model_type, settings) | {
        name: value for name, value in changes.items() if name not in _SIZES
    }
    return transformers.AutoConfig.for_model(model_type, **settings)


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")


def _family_entries(model_type: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration entries of a model type, from settings under BERT's names."""
    hidden, heads = settings["hidden_size"], settings["num_attention_heads"]
    names = {
        "distilbert": dict(zip(_SIZES, ("dim", "n_layers", "n_heads", "hidden_dim"), strict=True)),
        "gpt2": {"intermediate_size": "n_inner"},
        "opt": {"intermediate_size": "ffn_dim"},
    }.get(model_type, {})
    if model_type in ("bart", "mbart", *GENERATION_TYPES):
        settings = _as_bart(settings)
    if model_type == "whisper":
        settings = {**settings, "num_mel_bins": 4, "max_source_positions": 7}
    if model_type in ("t5", "mt5", "umt5"):
        settings = _as_t5(settings, gated=model_type != "t5")
    if model_type == "opt":
        # with ReLU some of twelve neurons would never fire
        settings = {**settings, "word_embed_proj_dim": hidden, "activation_function": "gelu"}
    if model_type == "albert":  # layers of their own, which run twice each
        layers = settings["num_hidden_layers"]
        settings = {**settings, "num_hidden_groups": layers, "num_hidden_layers": 2 * layers}
    if model_type == "deberta-v2":  # as version 3 has them, but fewer positions
        settings = {**settings, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
        settings |= {"position_buckets": 4, "max_relative_positions": 16, "type_vocab_size": 0}
    if model_type == "modernbert":
        settings = {**settings, "cls_token_id": 2, "sep_token_id": 3}
    if model_type == "olmo3":
        settings = {**settings, "sliding_window": 4}
    if model_type in ("modernbert", "mistral"):  # windows that tiny sequences do not fit in
        window = {"modernbert": "local_attention", "mistral": "sliding_window"}[model_type]
        settings = {**settings, window: 4, "num_key_value_heads": heads}
    elif model_type == "stablelm":  # an even number of features is turned, two of four
        rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        settings = {**settings, "num_key_value_heads": heads, "rope_parameters": rope}
    elif model_type in GROUPED_TYPES:
        settings = {**settings, "num_key_value_heads": heads, "num_attention_heads": 2 * heads}
        settings |= {"head_dim": hidden // heads, "no_rope_layer_interval": 2}
    elif model_type in AUDIO_TYPES:
        settings = {
            **settings,
            "conv_dim": (8, 8),
            "conv_kernel": (4, 2),
            "conv_stride": (4, 2),
            "num_conv_pos_embeddings": 4,
            "num_conv_pos_embedding_groups": 2,
            "apply_spec_augment": False,
            "feat_extract_norm": "layer",
            "classifier_proj_size": 8,
            "num_feat_extract_layers": 2,
            "do_stable_layer_norm": model_type == "hubert",
        }
    elif model_type in IMAGE_TYPES:
        class_name = {
            "vit": "ViT",
            "deit": "DeiT",
            "beit": "Beit",
            "dinov2": "Dinov2",
            "dinov2_with_registers": "Dinov2WithRegisters",
        }.get(model_type)
        settings = {
            **{name: value for name, value in settings.items() if name != "vocab_size"},
            "image_size": 8,
            "patch_size": 4,
            "mlp_ratio": max(1, settings["intermediate_size"] // hidden),  # DINOv2's neurons
            "use_relative_position_bias": True,
        }
        if class_name:
            settings["architectures"] = [f"{class_name}ForImageClassification"]
    return {names.get(name, name): value for name, value in settings.items()}


def _as_bart(settings: dict[str, Any]) -> dict[str, Any]:
    """An encoder and a decoder of the same sizes."""
    hidden, layers, heads, neurons = (settings[name] for name in _SIZES)
    sizes = {"d_model": hidden, "init_std": settings["initializer_range"]}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": layers, f"{part}_attention_heads": heads}
        sizes |= {f"{part}_ffn_dim": neurons}
    others = {name: value for name, value in settings.items() if name not in _SIZES}
    sizes["activation_function"] = "gelu"  # with ReLU some of twelve neurons would never fire
    return {**others, **sizes, "decoder_start_token_id": 2, "forced_eos_token_id": None}


def _as_t5(settings: dict[str, Any], *, gated: bool) -> dict[str, Any]:
    """An encoder and a decoder of the same sizes, with FFNs of the first or the second version."""
    hidden, layers, heads, neurons = (settings[name] for name in _SIZES)
    others = {name: value for name, value in settings.items() if name not in _SIZES}
    return {
        **others,
        "d_model": hidden,
        "d_kv": hidden // heads,
        "d_ff": neurons,
        "num_heads": heads,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "decoder_start_token_id": 0,
        "feed_forward_proj": "gated-gelu" if gated else "gelu",
        "relative_attention_num_buckets": 8,
    }


def _randomise_constant_weights(model: Any) -> None:
    """Draw biases and norms at random too: zeros and ones would hide mistakes."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or bool((parameter == parameter.flatten()[0]).all()):
                scales = "norm" in name.lower() or "ln_" in name
                start = 1.0 if (scales and name.endswith("weight")) or "lambda" in name else 0.0
                parameter.copy_(start + 0.2 * torch.randn_like(parameter))


@lru_cache(maxsize=1)
def vocabulary() -> tuple[str, ...]:
    """The tiny tokenizer's vocabulary in id order; every ASCII text is made of it."""
    signs = string.ascii_lowercase + string.digits + string.punctuation
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    pieces = (*special, *signs, *("##" + sign for sign in signs), *WORDS)
    return tuple(dict.fromkeys(pieces))


def make_tiny_tokenizer(model_type: str = "bert") -> Any:
    """A fast lower-case WordPiece tokenizer: `[CLS] text [SEP] pair [SEP]`.

    It names token types as inputs only for the model types that have them.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {piece: position for position, piece in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    names = ["input_ids", "attention_mask"]
    if model_type in ("bert", "electra"):
        names.insert(1, "token_type_ids")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=names,
        model_max_length=512,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def write_parquet(
    path: Path, rows: list[dict[str, Any]], *, label_type: Literal["int64", "float32"] = "int64"
) -> Path:
    """Write rows with the column types of the hub's datasets."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pylist(rows)
    types = {
        "label": pa.float32() if label_type == "float32" else pa.int64(),
        "idx": pa.int32(),
        "answers": pa.struct(
            [("text", pa.list_(pa.string())), ("answer_start", pa.list_(pa.int32()))]
        ),
    }
    fields = [pa.field(name, types.get(name, pa.string())) for name in table.column_names]
    parquet.write_table(table.cast(pa.schema(fields)), path)
    return path


def _sentence(generator: random.Random) -> str:
    return " ".join(generator.choices(WORDS, k=generator.randint(3, 18))) + " ."


def _mrpc_row(generator: random.Random, index: int) -> dict[str, Any]:
    first = _sentence(generator)
    label = int(generator.random() < 0.6)
    second = " ".join(reversed(first.split())) if label else _sentence(generator)
    return {"sentence1": first, "sentence2": second, "label": label, "idx": index}


def _sst2_row(generator: random.Random, index: int) -> dict[str, Any]:
    label = generator.randint(0, 1)
    mood = generator.choice(("great", "funny", "moving") if label else ("bad", "dull", "awful"))
    return {"sentence": f"{_sentence(generator)} {mood} ", "label": label, "idx": index}


def _stsb_row(generator: random.Random, index: int) -> dict[str, Any]:
    row = _mrpc_row(generator, index)
    return row | {"label": round(generator.uniform(0, 5), 2)}


def _mnli_row(generator: random.Random, index: int) -> dict[str, Any]:
    return {
        "premise": _sentence(generator),
        "hypothesis": _sentence(generator),
        "label": generator.randint(0, 2),
        "idx": index,
    }


def _squad_row(generator: random.Random, index: int) -> dict[str, Any]:
    sentences = [_sentence(generator) for _ in range(generator.randint(2, 6))]
    context = " ".join(sentences)
    answer = " ".join(generator.choice(sentences).split()[:2])
    return {
        "id": f"question-{index}",
        "title": "tiny",
        "context": context,
        "question": f"what is {answer} ?",
        "answers": {"text": [answer], "answer_start": [context.index(answer)]},
    }


def _squad_v2_row(generator: random.Random, index: int) -> dict[str, Any]:
    row = _squad_row(generator, index)
    return row if index % 3 else row | {"answers": {"text": [], "answer_start": []}}
