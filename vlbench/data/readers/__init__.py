"""Readers, one per on-disk format. Each module exports ``READER``; ``core.catalog.READERS`` names it."""
