"""Files of images: read, opened and sized in one way, for the data stage, the training and the generation."""
