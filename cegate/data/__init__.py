"""Images and labels: files, sets, random changes, batches, and procedural scenes."""
