"""The verb `bench`: timing, the machine's limits, and the figures of one against the other."""
