"""Prompts in, packed batches out."""
