"""What other libraries wrap around a model does not reach the pruned copy.

Without these tests a pruned model could compute what the original computes, or be fitted in half
precision, without any error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import prune as torch_prune

from rfprune.cost.constraint import Constraint
from rfprune.errors import UserError
from rfprune.model.compact import compact
from rfprune.model.layout import layout_of
from rfprune.model.masks import full_masks
from rfprune.model.unwrapped import unwrapped
from rfprune.pruning import prune, prune_family
from rfprune.settings import METHODS, Settings

Tiny = Callable[..., Any]
Batch = dict[str, Tensor]
HALF = Constraint("mac", 0.5)


@pytest.fixture
def batches(tiny_batch: Tiny) -> list[Batch]:
    return [tiny_batch(6, 7 + seed, seed=seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def clean_state() -> Iterator[None]:
    """Compiled code and the state of accelerate do not last until the next test."""
    from accelerate.state import AcceleratorState

    yield
    torch.compiler.reset()
    AcceleratorState._reset_state(reset_partial_state=True)


def compile_it(function: Any) -> Any:
    return torch.compile(function, backend="eager")


def compile_forward(model: Any) -> None:
    model.forward = compile_it(model.forward)


def compile_forward_of_a_layer(model: Any) -> None:
    layer = model.bert.encoder.layer[0]
    layer.forward = compile_it(layer.forward)


def compile_a_submodule(model: Any) -> None:
    model.bert.encoder = compile_it(model.bert.encoder)


def compile_in_place(model: Any) -> None:
    for layer in model.bert.encoder.layer:
        layer.compile(backend="eager")


def prepare(model: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # one precision per process
    assert Accelerator(mixed_precision="bf16", cpu=True).prepare(model) is model


def prepare_compiled_forward(model: Any) -> None:
    compile_forward(model)
    prepare(model)


def place_and_prepare(model: Any) -> None:
    place(model)
    prepare(model)


def place(model: Any) -> None:
    from accelerate import dispatch_model

    devices = {"bert": "cpu", "dropout": "cpu", "classifier": "cpu"}
    dispatch_model(model, devices, main_device="cpu", force_hooks=True)


def without_gradients(model: Any) -> None:
    model.forward = torch.no_grad()(model.forward)


def autocast(model: Any) -> None:
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)


def own_bound_method(model: Any) -> None:
    model.forward = model.forward


WRAPPERS = [
    compile_forward,
    compile_forward_of_a_layer,
    compile_a_submodule,
    compile_in_place,
    prepare,
    prepare_compiled_forward,
    without_gradients,
    autocast,
    own_bound_method,
]


def logits(model: Any, batch: Batch) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", WRAPPERS, ids=lambda wrap: str(wrap.__name__))
def test_a_wrapped_model_is_pruned_as_the_plain_one(
    wrap: Callable[[Any], None], method: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    settings = Settings(method=method, round_to=None)
    expected = prune(tiny_model(), batches, HALF, settings)
    model = tiny_model()
    wrap(model)
    logits(model, batches[0])  # compiled code is there before our hooks are
    before = {path: dict(vars(module)) for path, module in model.named_modules()}
    result = prune(model, batches, HALF, settings)
    for path, module in model.named_modules():
        now = vars(module)
        assert {name: now[name] for name in before[path]} == before[path], "put back"
    assert all(torch.equal(*pair) for pair in zip(result.masks, expected.masks, strict=True))
    assert result.achieved == expected.achieved
    found = logits(result.model, batches[0])
    assert torch.equal(found, logits(expected.model, batches[0]))
    assert (found - logits(model, batches[0])).abs().max() > 0.01
    assert not [module for module in result.model.modules() if "forward" in vars(module)]


@pytest.mark.parametrize("wrap", [place, place_and_prepare], ids=lambda wrap: str(wrap.__name__))
def test_a_copy_of_a_model_placed_on_devices_is_its_own(
    wrap: Callable[[Any], None], tiny_model: Tiny, batches: list[Batch]
) -> None:
    expected = prune(tiny_model(), batches, HALF)
    model = tiny_model()
    wrap(model)
    placed = [path for path, module in model.named_modules() if hasattr(module, "_hf_hook")]
    assert len(placed) > 4
    result = prune(model, batches, HALF)
    assert torch.equal(logits(result.model, batches[0]), logits(expected.model, batches[0]))
    result.model.to(torch.float64)  # not the original, by accelerate's closure
    assert {parameter.dtype for parameter in result.model.parameters()} == {torch.float64}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_copy_can_be_prepared_and_generates_by_its_own_code(tiny_model: Tiny) -> None:
    model = tiny_model("gpt2", "causal-lm")
    model._compiled_call = model.forward
    prepare(model)
    layout = layout_of(model)
    copied = compact(unwrapped(model), layout, full_masks(layout))
    assert not {"_compiled_call", "_is_accelerate_prepared"} & set(vars(copied))
    prepare(copied)
    assert "forward" in vars(copied)


def test_nothing_is_copied_without_a_wrapper_and_no_weight_with_one(tiny_model: Tiny) -> None:
    model = tiny_model()
    assert unwrapped(model) is model
    compile_forward(model)
    copied = unwrapped(model)
    assert copied is not model
    assert list(map(id, copied.parameters())) == list(map(id, model.parameters()))
    assert list(map(id, copied.buffers())) == list(map(id, model.buffers()))


def closure(model: Any) -> None:
    old = model.forward
    model.forward = lambda *args, **kwargs: old(*args, **kwargs)


def wrapped_closure(model: Any) -> None:
    old = model.classifier.forward
    model.classifier.forward = functools.wraps(old)(lambda *args: 2 * old(*args))


def method_of_another_model(model: Any) -> None:
    model.forward = type(model)(model.config).forward


def bound_function(model: Any) -> None:
    model.bert.forward = MethodType(lambda self, *args, **kwargs: None, model.bert)


def other_method(model: Any) -> None:
    model.bert.encoder.layer[1].attention.register_forward_hook = lambda *_: None


@pytest.mark.parametrize(
    ("replace", "where"),
    [
        (closure, "model.forward"),
        (wrapped_closure, "model.classifier.forward"),
        (method_of_another_model, "model.forward"),
        (bound_function, "model.bert.forward"),
        (other_method, r"model.bert.encoder.layer.1.attention.register_forward_hook"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_any_other_replaced_method_is_refused(
    replace: Callable[[Any], None], where: str, tiny_model: Tiny
) -> None:
    model = tiny_model()
    replace(model)
    with pytest.raises(UserError, match=rf"`{where}` was replaced .*\(del {where}\), or load"):
        prune(model, [], HALF)


def test_a_forward_that_is_replaced_for_the_whole_class_is_kept(
    tiny_model: Tiny, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, plain = tiny_model(), prune(tiny_model(), batches, HALF)
    monkeypatch.setattr(nn.LayerNorm, "forward", lambda self, x: x * self.weight + self.bias)
    result = prune(model, batches, HALF)
    assert (logits(result.model, batches[0]) - logits(plain.model, batches[0])).abs().max() > 0.01


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda linear: torch_prune.l1_unstructured(linear, "weight", amount=0.3),
            r"'bert.pooler.dense.weight' is masked .*prune\.remove\(module, 'weight'\)",
        ),
        (
            parametrizations.weight_norm,
            "'bert.pooler.dense' has a parametrised weight.*remove_parametrizations",
        ),
        (
            torch.nn.utils.spectral_norm,
            "SpectralNorm computes.*remove function of torch.nn.utils.spectral_norm",
        ),
    ],
    ids=["masks", "parametrisation", "hook"],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_are_computed_are_refused(
    change: Callable[[nn.Module], Any], says: str, tiny_model: Tiny
) -> None:
    model = tiny_model()
    change(model.bert.pooler.dense)
    with pytest.raises(UserError, match=says):
        prune(model, [], HALF)


@pytest.mark.parametrize(
    ("wrap", "way_out"),
    [
        (compile_it, r"OptimizedModule .*`model\._orig_mod`"),
        (nn.DataParallel, r"DataParallel .*`model\.module`"),
        (lambda model: torch.jit.trace(model.classifier, torch.ones(1, 16)), "that was traced"),
        (lambda model: "bert-base", "str .*from_pretrained"),
        (type, "a type is not a model"),
        (lambda model: None, "NoneType is not a model"),
    ],
    ids=["compiled", "parallel", "traced", "name", "class", "nothing"],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_wrapper_around_a_model_is_refused(
    wrap: Callable[[Any], Any], way_out: str, tiny_model: Tiny
) -> None:
    with pytest.raises(UserError, match=way_out):
        prune(wrap(tiny_model()), [], HALF)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "another default device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_caller_s_context_has_no_influence_and_stays(
    name: str, method: str, tiny_model: Tiny, batches: list[Batch]
) -> None:
    settings, constraints = Settings(method=method, round_to=None), [HALF, Constraint("mac", 0.3)]
    expected = list(prune_family(tiny_model(), batches, constraints, settings))
    model = tiny_model()
    with CONTEXTS[name]():
        before = state()
        results = []
        for result in prune_family(model, iter(batches), iter(constraints), settings):
            assert state() == before
            results.append(result)
    for result, other in zip(results, expected, strict=True):
        assert torch.equal(logits(result.model, batches[0]), logits(other.model, batches[0]))
        assert result.achieved == other.achieved


def state() -> tuple[object, ...]:
    """Torch's, of this thread."""
    return (
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_device(),
        torch.get_default_dtype(),
    )


def test_the_default_dtype_has_no_influence_and_stays(
    tiny_model: Tiny, batches: list[Batch]
) -> None:
    expected, model = prune(tiny_model(), batches, HALF), tiny_model()
    torch.set_default_dtype(torch.bfloat16)
    try:
        result = prune(model, batches, HALF)
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(logits(result.model, batches[0]), logits(expected.model, batches[0]))
