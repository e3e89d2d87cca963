"""Fine-tuning on chats and instructions: convert lines to messages, then tokens, then packed samples."""
