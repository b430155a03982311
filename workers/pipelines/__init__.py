"""Pre- and postprocessing, a file a kind of model (`workers.port`): tensors, text and image."""
