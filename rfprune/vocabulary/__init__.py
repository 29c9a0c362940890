"""Vocabulary trimming: keep the tokens that given texts need, in the tokenizer and in the model."""
