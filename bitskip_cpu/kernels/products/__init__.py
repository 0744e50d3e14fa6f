"""Products of weights with activations, by instruction set."""
