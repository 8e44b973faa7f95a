"""One linear file a way of training; what the methods share stands in trainer.py and callbacks.py."""
