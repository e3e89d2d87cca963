"""Tokenizers: encode text, train, and export for Hugging Face."""
