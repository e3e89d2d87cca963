"""Tokenizers: applied to text, trained, and written for Hugging Face."""
