"""What somebody can do to get a forgotten fact back, one file for each way."""
