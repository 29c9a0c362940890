"""llama.cpp as a PyTorch module, by llama-cpp-python: GGUF files are checked, scored and timed."""

from __future__ import annotations

import importlib
import importlib.util
import weakref
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def is_installed() -> bool:
    """Whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


class LlamaCppModel(nn.Module):
    """A GGUF file that is called like the language model it was made from.

    It runs on the CPU, on as many threads as PyTorch, one text after another, without gradients.
    """

    def __init__(self, path: Path, config: Any = None) -> None:
        super().__init__()
        self.path = path
        self.config = config
        # Callers take the device of a model from its parameters.
        self.device_parameter = nn.Parameter(torch.zeros(0), requires_grad=False)
        self._llama: Any = None
        self._max_length = 0  # tokens that the loaded model has room for
        self._release: Callable[[], Any] = lambda: None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        """{"logits": (B, S, V)}; zeros at padding.

        Args:
            input_ids: (B, S).
            attention_mask: (B, S).
        """
        llama = self._with_context(input_ids.shape[1])
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = torch.zeros(*input_ids.shape, llama.n_vocab())
        for row, ids, used in zip(logits, input_ids, mask.bool(), strict=True):
            llama.reset()
            llama.eval(ids[used].tolist())
            row[used] = torch.from_numpy(llama.scores[: int(used.sum())])
        return {"logits": logits}

    def close(self) -> None:
        """Release the memory of the model; it is loaded again when it is called."""
        self._release()
        self._llama, self._max_length = None, 0

    def _with_context(self, length: int) -> Any:
        """The model with room for this many tokens."""
        if length > self._max_length:
            self.close()
            self._max_length = length
            threads = torch.get_num_threads()
            self._llama = _silent_llama_cpp().Llama(
                str(self.path),
                n_ctx=length,
                logits_all=True,
                flash_attn=True,  # as stock llama.cpp by default
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
            # at the exit of Python it would be too late for the class's own destructor
            self._release = weakref.finalize(self, self._llama.close)
        return self._llama


@lru_cache(maxsize=1)
def _silent_llama_cpp() -> Any:
    """The package llama_cpp, whose library prints warnings about the sizes of pruned layers."""
    package: Any = importlib.import_module("llama_cpp")
    package.rfprune_log_callback = package.llama_log_callback(lambda *_: None)  # kept alive
    package.llama_log_set(package.rfprune_log_callback, None)
    return package
