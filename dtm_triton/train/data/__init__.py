"""Where images come from, how they are cropped, and what is drawn for them."""
