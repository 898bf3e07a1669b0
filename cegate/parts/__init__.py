"""Everything that learns, a file each: sites of the gate, and parts outside of it."""
