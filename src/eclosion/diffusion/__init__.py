"""Diffusion mathematics: tensors in, tensors out."""
