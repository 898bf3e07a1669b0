"""Earth-style injection: what images look like elsewhere, drawn and put on a training image (CrossEarth, section 2)."""
