"""Scoring: what a model says about a fact, what was lost and what stayed."""
