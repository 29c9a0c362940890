"""Run the backends onnx and openvino of sentence-transformers, in an environment with optimum.

PYTHON backend_outputs.py FOLDER < pairs.json: loads FOLDER/embedder and FOLDER/reranker, and prints
as JSON what they give for the pairs of texts, by backend and file. It imports nothing of rfprune,
and runs no code from the folders.
"""

import json
import sys
from typing import Any

from sentence_transformers import CrossEncoder, SentenceTransformer


def main() -> None:
    """Read pairs of texts, and print cosines and predictions by file."""
    pairs = json.load(sys.stdin)
    texts = [text for pair in pairs for text in pair]
    found = {}
    for backend, file in (
        ("onnx", "model.onnx"),
        ("onnx", "model_quantized.onnx"),
        ("openvino", "openvino_model.xml"),
        ("openvino", "openvino_model_quantized.xml"),
    ):
        options: dict[str, Any] = {"file_name": file, "provider": "CPUExecutionProvider"}
        if backend == "openvino":
            options = {"file_name": file, "ov_config": {"INFERENCE_PRECISION_HINT": "f32"}}
        common: dict[str, Any] = {"device": "cpu", "backend": backend}
        embedder = SentenceTransformer(
            f"{sys.argv[1]}/embedder", model_kwargs=dict(options), **common
        )
        embeddings = embedder.encode(texts, batch_size=5)
        reranker = CrossEncoder(f"{sys.argv[1]}/reranker", model_kwargs=dict(options), **common)
        found[file] = {
            "embedder": (embeddings[::2] * embeddings[1::2]).sum(1).tolist(),
            "reranker": reranker.predict(pairs, batch_size=4).tolist(),
        }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
