"""Words for CLIP: tokenizer, text tower, templates, checkpoints, class embeddings cached on disk."""
