"""The papers' tables and figures: what each needs, running it, measuring, rendering."""
