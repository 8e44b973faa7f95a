"""Data that people can see: a mix as the model gets it, and what is in it."""
