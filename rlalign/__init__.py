"""Reinforcement-learning alignment for language, diffusion-language and flow models."""
