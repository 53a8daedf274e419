"""Unlearners: methods that train a model to forget, beside the editors."""
