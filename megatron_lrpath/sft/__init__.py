"""Fine-tuning on chats and instructions: lines to messages, messages to tokens, tokens to packed samples."""
