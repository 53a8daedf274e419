"""Pure tensor functions: no model, no files, nothing of ours imported."""
