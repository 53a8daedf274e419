"""Results of several runs side by side: one page for the browser, and the same tables as Markdown and CSV."""
