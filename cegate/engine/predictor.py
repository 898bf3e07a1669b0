"""Where finding images was until 0.1.0; scripts of that time import it from here."""

from cegate.scenes.files import find_images

__all__ = ["find_images"]
