"""Results: the record schema, and one writer per format."""
