"""The published data sets of the field: what they are, how a download becomes a prepared folder, miniatures of them."""
