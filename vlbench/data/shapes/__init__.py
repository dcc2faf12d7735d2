"""The embedded world: procedural scenes with all their supervision, written in the field's real formats."""
