"""What a main path needs over the years: room on disk, a way back, and what became of a document."""
