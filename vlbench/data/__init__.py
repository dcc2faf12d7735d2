"""Data: every source as ``image, texts, label, regions``, read from the formats that the field already uses."""
