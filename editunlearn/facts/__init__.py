"""What to forget and what to say instead. Nothing in here needs torch."""
