"""One linear file a training method; what the methods share stands in trainer.py and callbacks.py."""
