"""Upload to the Hugging Face hub."""
