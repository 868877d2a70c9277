"""What was loaded and what was not, at the first load and at every reload."""
