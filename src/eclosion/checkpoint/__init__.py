"""Checkpoints that are either whole or invisible."""
