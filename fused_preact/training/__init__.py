"""Training from the command line: data, recipe, loop, checkpoint, curves."""
