"""The first minutes of a GPU, the most decisive first, as stages that __main__.py starts: `make gpu`."""
