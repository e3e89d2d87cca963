"""Convert models to and from Hugging Face folders: Megatron's checkpoints, safetensors, tokenizers, model
cards.
"""
