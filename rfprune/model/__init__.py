"""The only folder that knows Hugging Face module names: a Transformer seen as prunable blocks."""
