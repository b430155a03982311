"""Pre- and postprocessing, a file a kind of model (`workers.port`): tensors, text, image, generation and chat."""
