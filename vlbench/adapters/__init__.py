"""Adapters, one protocol a module: ``predict`` makes rows from a model, ``score`` makes numbers from rows."""
