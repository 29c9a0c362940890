"""Checks of a model and of its calibration batches, before any work is done with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rfprune.errors import UserError, error_summary
from rfprune.families.architectures import ARCHITECTURES
from rfprune.model.batch import LABEL_NAMES, SIGNALS, Batch, model_inputs, token_mask
from rfprune.model.layout import Layout
from rfprune.model.residency import execution_device, stored_tensors

_NUM_DIMS = {
    "input_ids": 2,
    "inputs_embeds": 3,
    "pixel_values": 4,
    "input_features": 3,
    "input_values": 2,
}
"""Dimensions of the main input; multiple choice has one more, (B, choices, S)."""

_OPTIONS = ("use_cache", "return_dict", "output_attentions", "output_hidden_states")
"""Arguments of a model that are no inputs; a collator makes tensors of them, too."""

_FORWARD_ERRORS = (
    *(RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError),
    *(AssertionError, NotImplementedError),
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_weights(model: PreTrainedModel) -> None:
    """Check that all parameters have values, an ordinary dtype, and are finite.

    Raises:
        UserError: names the first parameter that is nowhere or distributed, was made in inference
            mode, has a dtype without arithmetic, or holds NaN or infinity.
    """
    parameters = dict(model.named_parameters())
    for name, value in stored_tensors(model):
        if name not in parameters:
            continue
        parameter = parameters[name]
        if value.is_meta:
            raise UserError(
                f"parameter '{name}' is on the meta device and has no value; load the model with "
                "from_pretrained"
            )
        if type(parameter.data).__name__ == "DTensor":
            raise UserError(
                f"parameter '{name}' is distributed over several processes; save the whole model, "
                "and load it in one process with from_pretrained"
            )
        if parameter.is_inference():
            raise UserError(
                f"parameter '{name}' was made in torch.inference_mode(), where nothing can be "
                "differentiated; load the model outside of it"
            )
        if parameter.is_floating_point() and parameter.dtype not in _DTYPES:
            raise UserError(
                f"parameter '{name}' has dtype {parameter.dtype}; load the model with "
                "dtype=torch.float32 or torch.bfloat16"
            )
        if not torch.isfinite(value).all():
            raise UserError(
                f"parameter '{name}' holds NaN or infinity; save or download the checkpoint again"
            )


@contextmanager
def running_on(model: PreTrainedModel, number: int) -> Iterator[None]:
    """Turn an error of a model that runs on the batch `number` into a UserError.

    What a model is called with is its user's choice, and each family has errors of its own.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FORWARD_ERRORS as error:
        raise UserError(
            f"this {type(model).__name__} cannot run on batches[{number}] ({error_summary(error)})"
            "; give the inputs that its forward() takes, and leave everything else out"
        ) from error


def check_layer_outputs(model: PreTrainedModel, layout: Layout, batch: Batch) -> None:
    """Check that the layers of a model return what the row of its family says.

    `rfprune.model.layerwise.layer_calls` replaces layers by stand-ins, which must return the same
    kind of value. A wrong row would fail late in a run, and only in models of four layers or more.

    Args:
        batch: the model runs on its first example.

    Raises:
        UserError: a layer returns a tensor where the row has a tuple, or the other way round.
    """

    def check(_: nn.Module, __: Any, output: Any) -> None:
        expected = layout.layer_output_length
        length = len(output) if isinstance(output, tuple) else None
        if (length is None) != (expected is None) or (length or 0) < (expected or 0):
            returned, in_row = (
                "a tensor" if number is None else f"a tuple of {number}"
                for number in (length, expected)
            )
            raise UserError(
                f"the layers of this {layout.model_type} model return {returned}, but the row of "
                f"its family says {in_row}; correct `layer_output_length` in "
                "rfprune/families/architectures.py, or install a release of transformers that this "
                "version was tested with"
            )

    with ExitStack() as stack, torch.no_grad():
        for path in layout.layers:
            stack.callback(model.get_submodule(path).register_forward_hook(check).remove)
        model(**{name: value[:1] for name, value in model_inputs(batch).items()})


def reads_last_token(model: Any) -> bool:
    """Whether the head of a model reads the last token that is not the pad token: a classifier on a
    decoder."""
    family = ARCHITECTURES.get(getattr(model.config, "model_type", ""))
    is_causal = family is not None and family.causal
    return is_causal and type(model).__name__.endswith("ForSequenceClassification")


def check_pad_token(model: PreTrainedModel, batches: Sequence[Batch]) -> None:
    """Check that a classifier on a decoder finds the last token of each example.

    Raises:
        UserError: the model has no pad token, or the batches are padded with another one.
    """
    if not reads_last_token(model):
        return
    name, pad = type(model).__name__, model.config.pad_token_id
    way_out = "set model.config.pad_token_id = tokenizer.pad_token_id"
    for batch in batches:
        tokens, mask = batch.get("input_ids"), batch.get("attention_mask")
        if tokens is None or len(tokens) < 2:
            continue
        if pad is None:
            raise UserError(
                f"model.config.pad_token_id is None, but {name} needs the id of the pad token to "
                f"find the last token of each example in a batch: {way_out}"
            )
        if mask is None:
            continue
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = (places * (tokens != pad)).argmax(dim=1, keepdim=True)
        if not mask.gather(1, last).all():
            other = int(tokens[mask == 0][0])
            raise UserError(
                f"model.config.pad_token_id is {pad}, but the batches are padded with {other}, so "
                f"{name} would read padding as the last token: {way_out}, and pad with that id"
            )


def checked_batches(
    model: PreTrainedModel, batches: Iterable[Any], *, labelled: bool = False
) -> Iterator[Batch]:
    """Copies of batches on the model's device, checked before the model runs.

    Args:
        labelled: labels are used, and must be classes that the model has.

    Raises:
        UserError: names the batch and the entry that a model cannot be called with: what is not a
            tensor of one row per example, ids beyond the vocabulary, more tokens than positions.
    """
    if isinstance(batches, Mapping | Tensor | str | bytes) or not isinstance(batches, Iterable):
        raise UserError(
            f"batches is a single {type(batches).__name__}, but must be a list (or any iterable) "
            "of batches; for a single batch give [batch]"
        )
    device = execution_device(model)
    for number, batch in enumerate(batches):
        name = f"batches[{number}]"
        checked = _with_rows(name, _to_device(name, batch, device), model)
        _check_ids(name, checked, model)
        if labelled and "labels" in checked:
            _check_labels(name, checked, model)
        yield checked


def _to_device(name: str, batch: Any, device: torch.device) -> dict[str, Tensor]:
    if not isinstance(batch, Mapping):
        raise UserError(
            f"{name} is a {type(batch).__name__}, but a batch must map names to tensors, as a data "
            "collator's output does: collate the examples first"
        )
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name}[{key!r}] is a {type(value).__name__}, but a batch must map names to "
                "tensors: leave it out, or collate it to a tensor (return_tensors='pt')"
            )
        if key in _OPTIONS:
            raise UserError(f"{name}[{key!r}] is an option, not a model input: leave it out")
        if value.is_meta or value.is_nested or value.layout != torch.strided:
            raise UserError(f"{name}[{key!r}] is not an ordinary dense tensor: give one")
        if value.dim() == 0:
            raise UserError(
                f"{name}[{key!r}] is a single number, but every entry of a batch must have one row "
                "per example: leave it out"
            )
    # a tensor from inference mode cannot be differentiated
    moved = {str(key): value.to(device) for key, value in batch.items()}
    return {key: value.clone() if value.is_inference() else value for key, value in moved.items()}


def _with_rows(name: str, batch: dict[str, Tensor], model: PreTrainedModel) -> Batch:
    """Check that all entries have one row per example; position ids for all are repeated."""
    main = next((key for key in _NUM_DIMS if key in batch), None)
    if main is None:
        raise UserError(
            f"{name} holds {', '.join(batch) or 'nothing'}, but a model needs input_ids (B, S), "
            "or pixel_values for images, or input_values or input_features for audio"
        )
    taken = model.main_input_name
    if taken in SIGNALS and taken not in batch:
        raise UserError(
            f"{name} holds {', '.join(batch)}, but a {type(model).__name__} takes {taken}: give "
            "what its image processor or feature extractor makes"
        )
    inputs = batch[main]
    has_choices = any(base.__name__.endswith("ForMultipleChoice") for base in type(model).__mro__)
    num_dims = _NUM_DIMS[main] + has_choices
    if inputs.dim() != num_dims:
        raise UserError(
            f"{name}['{main}'] has shape {tuple(inputs.shape)}, but a {type(model).__name__} takes "
            f"{num_dims} dimensions, the first of which counts examples: collate examples first"
        )
    if inputs.numel() == 0:
        raise UserError(
            f"{name}['{main}'] has shape {tuple(inputs.shape)}, so it holds no example or no "
            "token: leave the batch out, or give at least one example"
        )
    positions = batch.get("position_ids")
    if positions is not None and positions.dim() == 2 and len(positions) == 1:
        batch["position_ids"] = positions.expand(len(inputs), -1)
    for key, value in batch.items():
        if len(value) != len(inputs):
            raise UserError(
                f"{name}[{key!r}] has {len(value)} rows, but '{main}' has {len(inputs)}: give one "
                "row per example, or leave it out"
            )
        if key not in LABEL_NAMES and value.is_floating_point() and not value.isfinite().all():
            raise UserError(f"{name}[{key!r}] holds NaN or infinity: give finite numbers")
    if main not in SIGNALS:
        token_mask(batch)  # which checks the attention mask
    elif main == "input_values" and batch.get("attention_mask", inputs).shape != inputs.shape:
        raise UserError(
            f"{name}['attention_mask'] has shape {tuple(batch['attention_mask'].shape)}, but "
            f"'{main}' has {tuple(inputs.shape)}: give one number per sample, or leave it out"
        )
    return batch


def _check_ids(name: str, batch: Batch, model: PreTrainedModel) -> None:
    """Check ids against embeddings; on a GPU an id out of range would end the process."""
    tables = {
        key: getattr(stack, "get_input_embeddings", lambda: None)()
        for key, stack in (("input_ids", model), ("decoder_input_ids", model.get_decoder()))
        if key in batch  # an audio model may have no embeddings to look for
    }
    tables["token_type_ids"] = _embedding(model, ("token_type_embeddings",))
    decoder = model.get_decoder() if model.config.is_encoder_decoder else None
    encoder = model if decoder is None else model.get_encoder()
    for key in ("input_ids", "token_type_ids", "decoder_input_ids"):
        ids, table = batch.get(key), tables.get(key)
        if ids is None:
            continue
        if ids.dtype not in (torch.int64, torch.int32):
            raise UserError(
                f"{name}['{key}'] holds {ids.dtype}, not whole numbers: give ids as torch.long"
            )
        rows = int(getattr(table, "num_embeddings", 2**62))
        bad = ids[(ids < 0) | (ids >= rows)]
        if bad.numel():
            raise UserError(
                f"{name}['{key}'] has the id {int(bad[0])}, but the model has embeddings for 0 to "
                f"{rows - 1}: use the tokenizer of this model"
            )
        if key == "token_type_ids":
            continue
        limit = _num_positions(decoder if key == "decoder_input_ids" else encoder)
        if limit is not None and ids.shape[-1] > limit:
            raise UserError(
                f"{name}['{key}'] has {ids.shape[-1]} tokens per example, but this model takes at "
                f"most {limit}: tokenize with truncation=True, max_length={limit}"
            )


def _check_labels(name: str, batch: Batch, model: PreTrainedModel) -> None:
    """Check the range of labels that are classes."""
    labels = batch["labels"]
    number = model.config.num_labels
    if batch["input_ids"].dim() == 3 if "input_ids" in batch else False:
        number = batch["input_ids"].shape[1]
    elif model.can_generate():
        number = model.get_output_embeddings().weight.shape[0]
    elif model.config.problem_type == "regression" or number == 1:
        return
    bad = labels[(labels != -100) & ((labels < 0) | (labels >= number))]
    if not labels.is_floating_point() and bad.numel():
        raise UserError(
            f"{name}['labels'] has the label {int(bad[0])}, but the model has classes 0 to "
            f"{number - 1}: give its own labels, or leave use_labels (--use-labels) out"
        )


def _embedding(model: nn.Module, names: Sequence[str]) -> nn.Embedding | None:
    """The first embedding of a model that has one of these names."""
    found = (
        module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] in names and isinstance(module, nn.Embedding)
    )
    return next(found, None)


def _num_positions(stack: nn.Module | None) -> int | None:
    """The largest number of tokens for which a stack has positions; None if it has no table."""
    names = ("position_embeddings", "wpe", "embed_positions")
    table = None if stack is None else _embedding(stack, names)
    if table is None:
        return None
    padding = table.padding_idx
    offset = getattr(table, "offset", 0 if padding is None else padding + 1)
    return int(table.num_embeddings - offset)
