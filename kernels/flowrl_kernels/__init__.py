"""Fused LM-head operators."""
