"""Where the files of a model come from: a folder, a hub, a saved state."""
