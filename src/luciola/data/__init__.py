"""From documents to batches: what to read, how to pack it into rows, and which row comes when."""
