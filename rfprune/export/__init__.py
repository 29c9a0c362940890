"""The pruned model in other formats: what `--export` writes.

formats.py   the formats, one line each; checks, writes, scores and times the requested ones
contract.py  what every export must do: compute the same, and be measured the same way
dense.py     original shapes with zeros, for any tool that knows the architecture
onnx.py      ONNX, in float32 and with int8 weights
gguf.py      GGUF for llama.cpp; gguf_vocabulary.py: the tokenizer in it; llama_cpp.py: its runtime
openvino.py  OpenVINO, likewise; it reads the ONNX file

A new format needs a file here with a function `write_FORMAT(folder, job)`, a line in
formats.FORMATS, its name in settings.EXPORTS, and, if another runtime runs it, a label in
report/summary.py.
"""
