"""Models to and from Hugging Face folders: Megatron's `torch_dist` checkpoints, safetensors, tokenizers, cards."""
