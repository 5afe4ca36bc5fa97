"""From two sets of images to numbers that say how alike they are."""
