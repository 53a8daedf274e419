"""Recipes: what makes edits say better things, or hold over more of them, whatever the method."""
