"""Between the packed layout and rows."""
