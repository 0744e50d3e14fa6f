"""What held-out text says of a model: its loss and speed at every exit, and which exit to take."""
