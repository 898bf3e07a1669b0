"""From an image of any size to its classes: reader -> mosaic -> sink."""
